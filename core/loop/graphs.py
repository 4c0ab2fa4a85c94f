"""The whole step, from augmentation to averaging, as a CUDA graph: captured once for each shape, then replayed.

A small network's step is hundreds of kernels of a few microseconds each, which the host cannot launch as fast as the
device finishes them; a replay launches them all at once. A captured step reads its batch and its values from tensors
that stay where they are, and that are filled before each replay; its random numbers come from generators that are
registered with the graph and go on from replay to replay as they would without.

The last, smaller batch of an epoch is a shape of its own, and captured like any other: padding it would change what
batch norm sees. The first steps of each shape are made kernel by kernel, since libraries set themselves up in them and
optimizers make their moments. Nothing is repeated for the capture's sake: capturing runs nothing, and the replay that
follows is the step itself.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from core.errors import ConfigError
from core.loop.step import Batch, Launch, StepShape, StepValues
from core.runtime import allowed_waits, forbidden_waits, is_out_of_memory

# Steps of a shape that are launched kernel by kernel before one is captured. The second is watched for waits, which a
# capture could not hold; in the first, a network may still make constants.
WARM_UP_STEPS = 2
# The step of a shape that is captured. A capture takes the host as long as some ten steps, so a shape that is seen a
# few times only, such as the last batch of one size of images with one kind of mixing, is not worth one.
CAPTURED_STEP = 8

# What torch and CUDA say where a capture, or the watch before it, is at fault: "called a synchronizing CUDA operation",
# "operation not permitted when stream is capturing", "cudaErrorStreamCapture…".
_OF_CAPTURES = re.compile("synchroniz|captur", re.IGNORECASE)


# Since torch 2.14 a capture finds its generators by itself, and registering one warns.
GENERATORS_REGISTER_THEMSELVES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)


class Capture(Protocol):
    """Turns a function that launches kernels into one that launches the same kernels on the same memory."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Runs the function, once, and returns what runs it again."""


class CudaCapture:
    """CUDA graphs that share one pool of memory, which is right as long as they run one after the other.

    Args:
        generators: the CUDA generators that are drawn from, but for torch's own, which registers itself.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = generators
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        if not GENERATORS_REGISTER_THEMSELVES:
            for generator in self._generators:
                graph.register_generator_state(generator)
        # `thread_local`: another thread may be allocating pinned memory, or waiting for a copy.
        with (
            allowed_waits(),  # a generator's first number in a capture waits for its stream, outside of the capture
            torch.cuda.graph(
                graph, pool=self._pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
            ),
        ):
            function()
        graph.replay()
        return graph.replay


class CapturedSteps:
    """Launches steps as captured graphs.

    Args:
        run: the device's half of a step.
        capture: how it is captured.
        device: where its inputs lie.
        name: the network's, for an error's words.
    """

    def __init__(self, run: Launch, capture: Capture, device: torch.device, name: str) -> None:
        self._run, self._capture, self._device, self._name = run, capture, device, name
        self._seen: Counter[StepShape] = Counter()
        self._replays: dict[StepShape, Callable[[], None]] = {}
        self._inputs: dict[int, Batch] = {}
        self._row = torch.zeros(8, device=device)
        factor, average, smoothing, keep = self._row[:4].unbind()
        self._values = StepValues(factor, average, smoothing, keep, self._row[4:])

    def __call__(self, batch: Batch, shape: StepShape, values: StepValues) -> None:
        """Makes a step, a replayed one where its shape has been captured.

        Raises:
            ConfigError: the network's step cannot be captured.
        """
        self._fill(values)
        if (replay := self._replays.get(shape)) is not None:
            torch._foreach_copy_(self._inputs[len(batch)].tensors, batch.tensors)
            replay()
            return
        self._seen[shape] += 1
        if self._seen[shape] == WARM_UP_STEPS:
            with self._unless_captured("waits for the host"), forbidden_waits(self._device):
                self._run(batch, shape, self._values)
        elif self._seen[shape] < CAPTURED_STEP:
            self._run(batch, shape, self._values)
        else:
            held = self._inputs.setdefault(len(batch), batch.like())
            torch._foreach_copy_(held.tensors, batch.tensors)
            run, values = self._run, self._values
            with self._unless_captured("cannot be recorded"):
                self._replays[shape] = self._capture.capture(lambda: run(held, shape, values))

    def _fill(self, values: StepValues) -> None:
        """Sends the step's numbers to the device without a wait, which a copy from pinned memory is."""
        numbers = [values.factor, values.average, values.smoothing, values.keep, *values.box]
        row = torch.tensor(numbers, dtype=torch.float32, pin_memory=self._device.type == "cuda")
        self._row.copy_(row, non_blocking=True)

    @contextlib.contextmanager
    def _unless_captured(self, why: str) -> Iterator[None]:
        """Turns a failure to capture into a word on what to do; any other is one of its own."""
        try:
            yield
        except RuntimeError as error:
            # Ending a capture that failed raises once more, and with less to say.
            cause = error.__context__ or error
            if is_out_of_memory(error) or is_out_of_memory(cause) or not _OF_CAPTURES.search(f"{error} {cause}"):
                raise
            reason = str(cause).partition("\n")[0]
            raise ConfigError(
                f"model.name {self._name}: its step {why}, so it is no CUDA graph ({reason}); "
                "set precision.cuda_graphs to false"
            ) from error
