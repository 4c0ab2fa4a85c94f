"""Training steps as CUDA graphs, captured once per shape and then replayed.

The host cannot launch the hundreds of kernels of a small network's step as fast as the device runs them. A captured
step reads its batch and values from fixed tensors. Random generators continue as without capture.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch

from core.augment import MixPlan
from core.errors import GraphError
from core.loop.memory import free_cache
from core.loop.step import Batch, Launch, StepShape, StepValues
from core.runtime import allowed_waits, is_out_of_memory, noticed_waits

logger = logging.getLogger(__name__)

# Steps of each number of images, size and optimizer phase before a capture. The first creates state and constants, and
# libraries choose their kernels; the second is checked for host synchronization.
WARM_UP_STEPS = 2
# A capture takes about as long as ten steps, and a replay saves half of one where launches limit the speed.
FEWEST_REPLAYS = 20

# Since torch 2.14, where doing so explicitly warns.
GENERATORS_REGISTER_THEMSELVES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)


class Capture(Protocol):
    """Records a function's kernels."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Run the function once, and return its replay on the same memory."""


class CudaCapture:
    """CUDA graphs in one memory pool, run one after the other. `generators` excludes torch's default one.

    `torch.cuda.graph` would first wait for the device and return all cached memory to it.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = generators
        self._live: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """See `Capture`. After any error but GraphError, the device can be used as before.

        Raises:
            GraphError: torch cannot leave the capture.
        """
        graph = torch.cuda.CUDAGraph()
        if not GENERATORS_REGISTER_THEMSELVES:
            for generator in self._generators:
                graph.register_generator_state(generator)
        if not self._live:  # torch does not accept a pool whose graphs are all gone
            self._pool = torch.cuda.graph_pool_handle()
        with allowed_waits():  # the first use of a generator in a capture waits for its stream
            # `thread_local`: another thread may allocate pinned memory or wait for a copy.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function()
            except BaseException as error:
                _end(graph, error)
                graph.reset()
                raise
            _end(graph)
        self._live.add(graph)
        graph.replay()
        return graph.replay


def _end(graph: torch.cuda.CUDAGraph, cause: BaseException | None = None) -> None:
    """End a capture, in which `cause` was raised."""
    try:
        graph.capture_end()
    except RuntimeError as error:
        # CUDA has refused an operation of the capture. torch then skips its own end of it: the allocator stays in the
        # capture, and before torch 2.14 so do the generators, which draw the same numbers again and again.
        reason = _first_line(cause or error)
        raise GraphError(
            f"recording a step as a CUDA graph failed ({reason}), and torch cannot use the GPU in this process any "
            "more; precision.cuda_graphs: false avoids it"
        ) from (cause or error)


class CapturedSteps:
    """Runs steps as captured graphs.

    Args:
        run: the device part of a step.
        capture: captures it.
        device: the training's device.
        name: the network and the loss, for messages.
        remaining: the number of steps of a shape that are left in the training, with the present one.
        averages: the number of averages of the network.
    """

    def __init__(
        self,
        run: Launch,
        capture: Capture,
        device: torch.device,
        name: str,
        remaining: Callable[[StepShape], int],
        averages: int,
    ) -> None:
        self._run, self._capture, self._device, self._name = run, capture, device, name
        self._remaining = remaining
        self._warm_ups: Counter[Hashable] = Counter()
        self._rare: set[StepShape] = set()
        self._replays: dict[StepShape, Callable[[], None]] = {}
        self._inputs: dict[int, Batch] = {}
        self._stage: Hashable = None
        self._off = False
        self._row = torch.zeros(7 + averages, device=device)
        factor, smoothing, keep = self._row[:3].unbind()
        self._values = StepValues(factor, smoothing, MixPlan(keep, self._row[3:7]), self._row[7:].unbind())

    def __call__(self, batch: Batch, shape: StepShape, values: StepValues) -> None:
        """Make a step, or replay it. If steps cannot be captured, warn once, and launch their kernels one by one.

        Raises:
            GraphError: a capture failed, and the device cannot be used any more.
        """
        if self._off:
            self._run(batch, shape, values)
            return
        self._fill(values)
        if shape.stage != self._stage:
            # Sizes, phases and all else that changes during a run never returns.
            self._stage = shape.stage
            self._replays.clear()
        if (replay := self._replays.get(shape)) is not None:
            torch._foreach_copy_(self._inputs[len(batch)].tensors, batch.tensors)
            replay()
            return
        warmed = (shape.images, shape.size, shape.optimizer)
        self._warm_ups[warmed] += 1
        if self._warm_ups[warmed] == WARM_UP_STEPS:
            with noticed_waits(self._device) as waits:
                self._run(batch, shape, self._values)
            if waits:
                self._launch_from_now_on(f"it waits for the host ({waits[0]})")
        elif self._warm_ups[warmed] < WARM_UP_STEPS or self._is_rare(shape) or not self._record(batch, shape):
            self._run(batch, shape, self._values)

    def _record(self, batch: Batch, shape: StepShape) -> bool:
        """Make a step and capture it; False if nothing was done."""
        held = self._inputs.setdefault(len(batch), batch.like())
        torch._foreach_copy_(held.tensors, batch.tensors)
        run, values = self._run, self._values
        for _ in range(2):
            try:
                self._replays[shape] = self._capture.capture(lambda: run(held, shape, values))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    self._launch_from_now_on(f"it cannot be recorded ({_first_line(error)})")
                    return False
            else:
                return True
            # A capture cannot use memory that torch caches for other purposes.
            free_cache()
        logger.info("the memory holds no CUDA graph of a step of %d images: it is launched", shape.images)
        self._rare.add(shape)
        return False

    def _launch_from_now_on(self, why: str) -> None:
        logger.warning(
            "%s: its step cannot be a CUDA graph, since %s: it is launched kernel by kernel", self._name, why
        )
        self._off = True
        self._replays.clear()
        self._inputs.clear()

    def _is_rare(self, shape: StepShape) -> bool:
        if shape not in self._rare and self._remaining(shape) < FEWEST_REPLAYS:
            self._rare.add(shape)
        return shape in self._rare

    def _fill(self, values: StepValues) -> None:
        mix = values.mix or MixPlan(keep=1.0)
        numbers = [values.factor, values.smoothing, mix.keep, *(mix.box or (0, 0, 0, 0)), *values.averages]
        row = torch.tensor(numbers, dtype=torch.float32, pin_memory=self._device.type == "cuda")
        self._row.copy_(row, non_blocking=True)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
