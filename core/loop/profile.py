"""Time of each part of a training step, and utilization of the device.

A separate `Run` repeats its last step: full image size, no frozen layers. On a GPU, events time the parts, also in
captured steps.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count, cycle, islice
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from core import metrics
from core.averaging import validations_per_epoch
from core.config import TrainConfig
from core.data import Splits
from core.errors import ConfigError
from core.imports import blaming
from core.loop.graphs import FEWEST_REPLAYS, WARM_UP_STEPS, Capture, CapturedSteps, CudaCapture
from core.loop.run import Execution, Run, code_in_step
from core.loop.step import Batch, Section
from core.runtime import clock, compute_dtype, isolated_rng, own_stream
from core.tta import EVALUATION_BATCH

Part = Literal[Section, "evaluation", "host"]
"""Parts of an epoch's time."""

SECTIONS: tuple[Section, ...] = get_args(Section)

MEASURED_S = 2.0
FEWEST_STEPS, MOST_STEPS = 3, 200
# 8192 saturates an H200 and takes 0.4 GB in bf16; the time stops a CPU earlier.
LARGEST_SIDE, LONGEST_PRODUCT_S = 8192, 0.2

USUAL = Execution()


@dataclass(frozen=True)
class Times:
    """Seconds per epoch of its steps."""

    sections_s: dict[Section, float]
    """By part, in order; on CUDA including gaps while the host launches kernels."""
    host_s: float
    """The rest: gathering images, random numbers per batch, Python; on CUDA also waiting."""

    @property
    def seconds(self) -> float:
        """Total."""
        return sum(self.sections_s.values()) + self.host_s


@dataclass(frozen=True)
class Profile:
    """Time of a training's epochs. Work per epoch counts only if the timed steps include it."""

    launched: Times
    """Without capture."""
    replayed: Times | None
    """As CUDA graphs, if steps are captured."""
    evaluation_s: float
    """Validation per epoch, without SWA's at the end."""
    images: int
    steps: int
    timed_steps: int
    parameters: int
    flops_per_image: int
    """See the function of that name."""
    dtype: Literal["bfloat16", "float32"]
    peak_flops: float
    """FLOP/s: `measured_peak_flops` of that dtype."""
    peak_memory_bytes: int | None
    """Of all tensors on the device without capture; None on a CPU."""

    @property
    def trained(self) -> Times:
        """As in a training: replayed if captured."""
        return self.launched if self.replayed is None else self.replayed

    @property
    def epoch_s(self) -> float:
        """Seconds per epoch with evaluation."""
        return self.trained.seconds + self.evaluation_s

    @property
    def images_per_s(self) -> float:
        """Training images per second of `epoch_s`."""
        return self.images / self.epoch_s

    @property
    def graph_saves(self) -> float | None:
        """Fraction of a step's time saved by capture."""
        return None if self.replayed is None else 1 - self.replayed.seconds / self.launched.seconds

    @property
    def step_flops(self) -> float:
        """FLOP/s of steps."""
        return self.flops_per_image * self.images / self.trained.seconds

    @property
    def network_flops(self) -> float:
        """FLOP/s of forward and backward passes."""
        took_s = self.trained.sections_s["forward"] + self.trained.sections_s["backward"]
        return self.flops_per_image * self.images / took_s

    @property
    def largest(self) -> Part:
        """The slowest part."""
        parts = self.parts(self.trained)
        return max(parts, key=lambda part: parts[part])

    def parts(self, times: Times) -> dict[Part, float]:
        """Return the seconds per epoch of each part."""
        parts: dict[Part, float] = {"evaluation": self.evaluation_s, "host": times.host_s}
        return {name: times.sections_s[name] for name in SECTIONS if name in times.sections_s} | parts


def profile(
    config: TrainConfig,
    splits: Splits,
    *,
    device: torch.device,
    steps: int | None = None,
    execution: Execution = USUAL,
) -> Profile:
    """Measure the time of a training's epochs from `steps`; by default as many as take `MEASURED_S`.

    Raises the errors of `core.loop.train` at its start, and ConfigError for a probe, which has no steps.
    """
    if config.is_probe:
        raise ConfigError("optim.name: logistic has no steps to profile; leave out --profile")
    with isolated_rng(device), own_stream(device):
        measured = _measure(config, splits, device, steps, execution)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the graphs
    return measured


def flops_per_image(model: nn.Module, image: tuple[int, int, int]) -> int:
    """Count the operations of convolutions, matrix products and attention in both passes of one image (C, H, W)."""
    images = torch.empty(2, *image, device="meta")  # batch norm needs two
    with blaming("the operations of the network cannot be counted"), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta")(images).sum().backward()
    return int(counter.get_total_flops()) // len(images)


def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of the fastest product of square matrices, float32 as precise as convolutions."""
    fastest, side = 0.0, 256
    with products_as_precise_as_convolutions():
        while True:
            product_s = _product_s(side, device, dtype)
            fastest = max(fastest, 2 * side**3 / product_s)
            if side == LARGEST_SIDE or 8 * product_s > LONGEST_PRODUCT_S:
                return fastest
            side *= 2


def _measure(
    config: TrainConfig, splits: Splits, device: torch.device, steps: int | None, execution: Execution
) -> Profile:
    computes_in = compute_dtype(config.precision.autocast, device)
    peak_flops = measured_peak_flops(device, computes_in)
    with Run(config, splits, device, execution=execution) as run:
        channels, height, width = splits.images.shape[1:]
        flops = flops_per_image(run.model, (channels, height, width))
        run.model.train()
        captured = isinstance(run.one_step.launch, CapturedSteps)
        run.one_step.launch = None
        steps = _whole_chunks(run, steps or _steps_to_time(run))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        launched = _launched(run, steps)
        peak_memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        replayed = None
        if captured:
            replayed = _replayed(run, steps, lambda: execution.capture or CudaCapture([run.generator]))
        return Profile(
            launched=launched,
            replayed=replayed,
            evaluation_s=_evaluation_s(run) * validations_per_epoch(config.averaging),
            images=run.visits,
            steps=len(run.batch_sizes),
            timed_steps=steps,
            parameters=sum(parameter.numel() for parameter in run.model.parameters()),
            flops_per_image=flops,
            dtype="bfloat16" if computes_in == torch.bfloat16 else "float32",
            peak_flops=peak_flops,
            peak_memory_bytes=peak_memory,
        )


def _steps_to_time(run: Run) -> int:
    """Number of steps that take `MEASURED_S`, after a warm-up."""
    steps = _whole_chunks(run, 1)
    _run_steps(run, steps)
    return min(max(round(MEASURED_S / _run_steps(run, steps).seconds * steps), FEWEST_STEPS), MOST_STEPS)


def _whole_chunks(run: Run, steps: int) -> int:
    """Return at least as many steps, of batches that are augmented together, from the second such chunk on."""
    total, lengths = 0, cycle(chunk.stop - chunk.start for chunk in run.chunks)
    next(lengths)
    while total < steps:
        total += next(lengths)
    return total


def _launched(run: Run, steps: int) -> Times:
    stopwatch = stopwatch_of(run.device)
    run.one_step.section = stopwatch.section
    run.one_step.launch = None
    return _times(run, _run_steps(run, steps, stopwatch), stopwatch)


def _replayed(run: Run, steps: int, capture: Callable[[], Capture]) -> Times:
    """Time replayed steps: in total without events, by part with them."""
    run.one_step.section = lambda _: contextlib.nullcontext()
    _capture_all(run, steps, capture())
    untimed = _run_steps(run, steps)
    stopwatch = stopwatch_of(run.device)
    run.one_step.section = stopwatch.section
    _capture_all(run, steps, TimedCapture(capture(), stopwatch))
    _run_steps(run, steps, stopwatch)
    return _times(run, untimed, stopwatch)


def _capture_all(run: Run, steps: int, capture: Capture) -> None:
    run.one_step.launch = CapturedSteps(
        run.one_step.run,
        capture,
        run.device,
        code_in_step(run.config),
        remaining=lambda _: FEWEST_REPLAYS,
        averages=len(run.one_step.averages),
    )
    if run.device.type == "cuda":
        torch.cuda.empty_cache()  # frees the graphs' memory
    for _ in range(WARM_UP_STEPS + 1):
        _run_steps(run, steps)


class TimedSteps(NamedTuple):
    """Time of steps, and their images."""

    seconds: float
    images: int


def _run_steps(run: Run, steps: int, stopwatch: Stopwatch | None = None) -> TimedSteps:
    """Time steps, after the untimed ones of the first chunk, which draws the order."""
    batches = chain.from_iterable(map(run.batches, count(1)))
    for batch in islice(batches, run.chunks[0].stop):
        _step(run, batch)
    if stopwatch is not None:
        stopwatch.reset()
    images = 0
    started = clock(run.device)
    for batch in islice(batches, steps):
        _step(run, batch)
        images += len(batch)
    seconds = clock(run.device) - started
    if stopwatch is not None:
        stopwatch.read(stopwatch.take())
    return TimedSteps(seconds, images)


def _step(run: Run, batch: Batch) -> None:
    run.step_count = run.total_steps - 1
    run.step(batch)


def _times(run: Run, timed: TimedSteps, stopwatch: Stopwatch) -> Times:
    """Convert to times per epoch. Parts of replayed steps, measured separately, may exceed their total."""
    epochs = timed.images / run.visits
    sections = {name: stopwatch.seconds[name] / epochs for name in SECTIONS if name in stopwatch.seconds}
    return Times(sections, max(timed.seconds / epochs - sum(sections.values()), 0.0))


def _evaluation_s(run: Run) -> float:
    """Seconds of validating; extrapolated from a batch if longer than `MEASURED_S`."""
    val = run.splits.val
    if not len(val):
        return 0.0
    first = val[:EVALUATION_BATCH]
    _score_s(run, first)  # warm-up
    pass_s = _score_s(run, first) * len(val) / len(first)
    return pass_s if pass_s > MEASURED_S else _score_s(run, val)


def _score_s(run: Run, rows: Tensor) -> float:
    started = clock(run.device)
    metrics.scores(run.logits(run.model, rows), run.splits.labels[rows])
    return clock(run.device) - started


def _product_s(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of the fastest of three products."""
    generator = torch.Generator(device).manual_seed(0)
    one, other = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(one)
    fastest = math.inf
    for _ in range(3):
        started = clock(device)
        torch.mm(one, other, out=product)
        fastest = min(fastest, clock(device) - started)
    return fastest


@contextlib.contextmanager
def products_as_precise_as_convolutions() -> Iterator[None]:
    """Multiply float32 matrices on CUDA as precisely as it convolves: by default in TF32."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    if before == "tf32" or convolutions.fp32_precision != "tf32":
        yield
        return
    # Sets both names: torch refuses to read a single one.
    products.allow_tf32 = True
    try:
        yield
    finally:
        products.allow_tf32 = False
        products.fp32_precision = before


class Stopwatch:
    """Sums the time of parts by the host's clock."""

    def __init__(self) -> None:
        self.seconds: dict[Section, float] = {}
        """By part."""

    def reset(self) -> None:
        """Set all times to zero."""
        self.seconds.clear()

    @contextlib.contextmanager
    def section(self, name: Section) -> Iterator[None]:
        """Time a part; for `TrainStep.section`."""
        started = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - started)

    def take(self) -> list[Span]:
        """Return the device's spans since the last call."""
        return []

    def read(self, spans: list[Span]) -> None:
        """Wait for the device, and add these spans."""

    def _add(self, name: Section, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class DeviceStopwatch(Stopwatch):
    """Sums the time of parts by CUDA events, which each replay of a graph records again."""

    def __init__(self) -> None:
        super().__init__()
        self._spans: list[Span] = []

    def reset(self) -> None:
        super().reset()
        self._spans = []

    @contextlib.contextmanager
    def section(self, name: Section) -> Iterator[None]:
        begin, end = _event(), _event()
        begin.record()
        yield
        end.record()
        self._spans.append(Span(name, begin, end))

    def take(self) -> list[Span]:
        taken, self._spans = self._spans, []
        return taken

    def read(self, spans: list[Span]) -> None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.current_stream().synchronize()
        if spans:
            spans[-1].end.synchronize()
        for span in spans:
            self._add(span.name, span.begin.elapsed_time(span.end) / 1000)  # milliseconds


class Span(NamedTuple):
    """A part of a step on the device's timeline."""

    name: Section
    begin: torch.cuda.Event
    end: torch.cuda.Event


class TimedCapture:
    """A `Capture` whose replays add to a stopwatch, waiting for the device."""

    def __init__(self, capture: Capture, stopwatch: Stopwatch) -> None:
        self._capture, self._stopwatch = capture, stopwatch

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        self._stopwatch.take()  # discard steps without capture
        replay = self._capture.capture(function)
        spans = self._stopwatch.take()

        def timed() -> None:
            replay()
            self._stopwatch.read(spans)

        return timed


def _event() -> torch.cuda.Event:
    """A timing event, as a node of a captured graph (`external`)."""
    return torch.cuda.Event(enable_timing=True, external=True)  # type: ignore[no-untyped-call]


def stopwatch_of(device: torch.device) -> Stopwatch:
    """Create the device's stopwatch."""
    return DeviceStopwatch() if device.type == "cuda" else Stopwatch()
