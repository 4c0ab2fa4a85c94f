"""Training steps as CUDA graphs, captured once per shape and then replayed.

The host cannot launch the hundreds of kernels of a small network's step as fast as the device runs them. A captured
step reads its batch and values from fixed tensors. Random generators continue as without capture.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Protocol

import torch

from core.augment import MixPlan
from core.errors import ConfigError
from core.loop.step import Batch, Launch, StepShape, StepValues
from core.runtime import allowed_waits, forbidden_waits, is_out_of_memory

# Steps of each number of images, size and optimizer phase before a capture. The first creates state and constants, and
# libraries choose their kernels; the second is checked for host synchronization.
WARM_UP_STEPS = 2
# A capture takes about as long as ten steps, and a replay saves half of one where launches limit the speed.
FEWEST_REPLAYS = 20

# "called a synchronizing CUDA operation", "not permitted when stream is capturing", "cudaErrorStreamCapture…"
_OF_CAPTURES = re.compile("synchroniz|captur", re.IGNORECASE)

# Since torch 2.14, where doing so explicitly warns.
GENERATORS_REGISTER_THEMSELVES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)


class Capture(Protocol):
    """Records a function's kernels."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Run the function once, and return its replay on the same memory."""


class CudaCapture:
    """CUDA graphs in one memory pool, run one after the other. `generators` excludes torch's default one."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = generators
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        if not GENERATORS_REGISTER_THEMSELVES:
            for generator in self._generators:
                graph.register_generator_state(generator)
        # `thread_local`: another thread may allocate pinned memory or wait for a copy.
        with (
            allowed_waits(),  # the first use of a generator in a capture waits for its stream
            torch.cuda.graph(
                graph, pool=self._pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
            ),
        ):
            function()
        graph.replay()
        return graph.replay


class CapturedSteps:
    """Runs steps as captured graphs.

    Args:
        run: the device part of a step.
        capture: captures it.
        device: the training's device.
        name: the network's, for error messages.
        remaining: the number of steps of a shape that are left in the training, with the present one.
    """

    def __init__(
        self, run: Launch, capture: Capture, device: torch.device, name: str, remaining: Callable[[StepShape], int]
    ) -> None:
        self._run, self._capture, self._device, self._name = run, capture, device, name
        self._remaining = remaining
        self._warm_ups: Counter[Hashable] = Counter()
        self._rare: set[StepShape] = set()
        self._replays: dict[StepShape, Callable[[], None]] = {}
        self._inputs: dict[int, Batch] = {}
        self._row = torch.zeros(8, device=device)
        factor, average, smoothing, keep = self._row[:4].unbind()
        self._values = StepValues(factor, average, smoothing, MixPlan(keep, self._row[4:]))

    def __call__(self, batch: Batch, shape: StepShape, values: StepValues) -> None:
        """Make a step, or replay it. Raises ConfigError if it cannot be captured."""
        self._fill(values)
        if (replay := self._replays.get(shape)) is not None:
            torch._foreach_copy_(self._inputs[len(batch)].tensors, batch.tensors)
            replay()
            return
        warmed = (shape.images, shape.size, shape.optimizer)
        self._warm_ups[warmed] += 1
        if self._warm_ups[warmed] == WARM_UP_STEPS:
            with self._capture_errors("waits for the host"), forbidden_waits(self._device):
                self._run(batch, shape, self._values)
        elif self._warm_ups[warmed] < WARM_UP_STEPS or self._is_rare(shape):
            self._run(batch, shape, self._values)
        else:
            held = self._inputs.setdefault(len(batch), batch.like())
            torch._foreach_copy_(held.tensors, batch.tensors)
            run, values = self._run, self._values
            with self._capture_errors("cannot be recorded"):
                self._replays[shape] = self._capture.capture(lambda: run(held, shape, values))

    def _is_rare(self, shape: StepShape) -> bool:
        if shape not in self._rare and self._remaining(shape) < FEWEST_REPLAYS:
            self._rare.add(shape)
        return shape in self._rare

    def _fill(self, values: StepValues) -> None:
        mix = values.mix or MixPlan(keep=1.0)
        numbers = [values.factor, values.average, values.smoothing, mix.keep, *(mix.box or (0, 0, 0, 0))]
        row = torch.tensor(numbers, dtype=torch.float32, pin_memory=self._device.type == "cuda")
        self._row.copy_(row, non_blocking=True)

    @contextlib.contextmanager
    def _capture_errors(self, why: str) -> Iterator[None]:
        """Turn errors of captures into a ConfigError with a fix."""
        try:
            yield
        except RuntimeError as error:
            # Ending a failed capture raises a less specific error.
            cause = error.__context__ or error
            if is_out_of_memory(error) or is_out_of_memory(cause) or not _OF_CAPTURES.search(f"{error} {cause}"):
                raise
            reason = str(cause).partition("\n")[0]
            raise ConfigError(
                f"model.name {self._name}: its step {why}, so it cannot be a CUDA graph ({reason}); "
                "set precision.cuda_graphs to false"
            ) from error
