"""Where a training's time goes: what each part of its steps takes, and how near it comes to what the device can do.

It is measured on a `Run` of its own, so the training itself is not disturbed. Every step is made as the run's last one:
its images are whole, and no layer waits any more; what is mixed then is mixed. On a GPU a clock of the host would see
how long it takes to launch kernels, so parts are told apart by events on the device. Where steps are captured, the
events are captured with them, and the parts of the replayed step are measured, which is the one that a training makes.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from core import metrics
from core.config import TrainConfig
from core.data import Splits
from core.loop.graphs import CAPTURED_STEP, Capture, CapturedSteps, CudaCapture
from core.loop.run import EVALUATION_BATCH, Execution, Run
from core.loop.step import Batch, Section, batch_sizes
from core.runtime import clock, compute_dtype, isolated_rng, own_stream

Part = Literal[Section, "evaluation", "host"]
"""What an epoch's time is spent on; `Times.host_s` says what `host` is."""

SECTIONS: tuple[Section, ...] = get_args(Section)

# Long enough to even out a busy machine, short enough to wait for. The fewest steps are those of `seconds_per_epoch`;
# more than the most would say no more.
MEASURED_S = 2.0
FEWEST_STEPS, MOST_STEPS = 3, 200
# The side of the largest matrices multiplied: 8192 fills an H200, and takes 0.4 GB in bf16. How long a product may take
# lets a CPU stop at smaller ones, which keep it as busy.
LARGEST_SIDE, LONGEST_PRODUCT_S = 8192, 0.2

USUAL = Execution()


@dataclass(frozen=True)
class Times:
    """What an epoch's steps take, one way of launching them. Seconds are an epoch's."""

    sections_s: dict[Section, float]
    """Seconds by part, in a step's order; without `averaging` where there is none.

    On the CPU, between a part's beginning and its end. On CUDA, from the end of the work before it to the end of its
    own on the device's timeline: where the host launches kernels more slowly than the device finishes them, the pauses
    in between are the part's as well. A replayed step has no such pauses.
    """
    host_s: float
    """What no part accounts for: on the CPU all that is done between parts, which is to gather the images, to draw what
    is drawn once a batch, and Python. On CUDA the time in which the device works on no part: it gathers images or waits
    for them, or waits for the host to begin the step."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.sections_s.values()) + self.host_s


@dataclass(frozen=True)
class Profile:
    """Where the time of a training's epochs goes.

    What is done once an epoch, as to draw its order, counts as often as it was met between the timed steps, which is
    not at all where an epoch has more steps than were timed. Evaluation always counts.
    """

    launched: Times
    """Its steps, launched kernel by kernel."""
    replayed: Times | None
    """Its steps, replayed as CUDA graphs; None where they are not captured."""
    evaluation_s: float
    """An epoch's passes over the validation images: two under EMA, which is judged beside the weights themselves. SWA
    judges and recalibrates its average once, at the end of the run, which is not counted."""
    images: int
    """Training images that an epoch shows."""
    steps: int
    """An epoch's."""
    timed_steps: int
    """How many steps the times are the mean of."""
    parameters: int
    """The network's."""
    flops_per_image: int
    """Of one image's forward and backward pass: see `flops_per_image`."""
    dtype: Literal["bfloat16", "float32"]
    """What the network computes in: bfloat16 under autocast."""
    peak_flops: float
    """FLOP/s: the device's `measured_peak_flops` in that type."""
    peak_memory_bytes: int | None
    """The most that tensors took of the device while steps were launched kernel by kernel, images and weights
    included; None on a CPU."""

    @property
    def trained(self) -> Times:
        """The steps as a training makes them: replayed where they are captured."""
        return self.launched if self.replayed is None else self.replayed

    @property
    def epoch_s(self) -> float:
        """Seconds of an epoch of training and evaluation."""
        return self.trained.seconds + self.evaluation_s

    @property
    def images_per_s(self) -> float:
        """Training images a second, evaluation counted."""
        return self.images / self.epoch_s

    @property
    def graph_saves(self) -> float | None:
        """The share of a step's time that replaying it saves; None where steps are not captured."""
        return None if self.replayed is None else 1 - self.replayed.seconds / self.launched.seconds

    @property
    def step_flops(self) -> float:
        """FLOP/s over whole steps, without evaluation."""
        return self.flops_per_image * self.images / self.trained.seconds

    @property
    def network_flops(self) -> float:
        """FLOP/s over the forward and backward passes alone."""
        took_s = self.trained.sections_s["forward"] + self.trained.sections_s["backward"]
        return self.flops_per_image * self.images / took_s

    @property
    def largest(self) -> Part:
        """The part that takes the most time."""
        parts = self.parts(self.trained)
        return max(parts, key=lambda part: parts[part])

    def parts(self, times: Times) -> dict[Part, float]:
        """Seconds of an epoch by part, of steps launched that way."""
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
    """Measures where the time of a training's epochs goes, on a run of its own; torch's generators stay as they are.

    Args:
        steps: how many are timed, at least 1, each way of launching them; None: as many as take `MEASURED_S`.
        execution: how the training is run.

    Raises:
        ConfigError: the data and the network do not fit each other, or a step cannot be captured.
        torch.OutOfMemoryError: not even a small part of a batch fits the device's memory; on a CPU a RuntimeError.
    """
    with isolated_rng(device), own_stream(device):
        measured = _measure(config, splits, device, steps, execution)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the memory of graphs that are gone is of use to no others
    return measured


def flops_per_image(model: nn.Module, image: tuple[int, int, int]) -> int:
    """Floating-point operations of one image's forward and backward pass through the network.

    Convolutions, matrix products and attention are counted, a multiplication and an addition as two; what is done
    element by element is not, nor is augmentation. Counted on tensors without memory; the network is left as it is.

    Args:
        image: its channels, height and width.
    """
    network = copy.deepcopy(model).to("meta")
    images = torch.empty(2, *image, device="meta")  # two: batch norm needs them
    with FlopCounterMode(display=False) as counter:
        network(images).sum().backward()
    return int(counter.get_total_flops()) // len(images)


def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest product of two square matrices of that type, among sides from 256 to `LARGEST_SIDE`.

    Measured for as large a side as takes `LONGEST_PRODUCT_S`. On CUDA, float32 is multiplied as convolutions are, which
    is in TF32 unless torch is told otherwise. It is what can be had of the device here and now, below its data sheet.
    """
    fastest, side = 0.0, 256
    with products_as_precise_as_convolutions():
        while True:
            product_s = _product_s(side, device, dtype)
            fastest = max(fastest, 2 * side**3 / product_s)
            if side == LARGEST_SIDE or 8 * product_s > LONGEST_PRODUCT_S:
                return fastest
            side *= 2


# ---- the measurement


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
        steps = steps or _worth_timing(run)
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
            evaluation_s=_evaluation_s(run) * (2 if config.averaging.name == "ema" else 1),
            images=run.visits,
            steps=len(batch_sizes(run.visits, config.batch_size)),
            timed_steps=steps,
            parameters=sum(parameter.numel() for parameter in run.model.parameters()),
            flops_per_image=flops,
            dtype="bfloat16" if computes_in == torch.bfloat16 else "float32",
            peak_flops=peak_flops,
            peak_memory_bytes=peak_memory,
        )


def _worth_timing(run: Run) -> int:
    """How many steps take `MEASURED_S`, within bounds. Pays for what the first steps set up."""
    _walk(run, 1)
    return min(max(round(MEASURED_S / _walk(run, 1).seconds), FEWEST_STEPS), MOST_STEPS)


def _launched(run: Run, steps: int) -> Times:
    """The run's steps, launched kernel by kernel."""
    stopwatch = stopwatch_of(run.device)
    run.one_step.section = stopwatch.section
    run.one_step.launch = None
    return _times(run, _walk(run, steps, stopwatch), stopwatch)


def _replayed(run: Run, steps: int, capture: Callable[[], Capture]) -> Times:
    """The run's steps, replayed: their whole time as a training makes them, and their parts' with events in between.

    Args:
        capture: makes how they are captured. Both times anew, as torch captures nothing more into the memory of graphs
            that are gone.
    """
    run.one_step.section = lambda _: contextlib.nullcontext()
    _capture_all(run, steps, capture())
    untimed = _walk(run, steps)
    stopwatch = stopwatch_of(run.device)
    run.one_step.section = stopwatch.section
    _capture_all(run, steps, TimedCapture(capture(), stopwatch))
    _walk(run, steps, stopwatch)
    return _times(run, untimed, stopwatch)


def _capture_all(run: Run, steps: int, capture: Capture) -> None:
    """Captures each shape of step that a walk of so many steps makes, and forgets what was captured before."""
    run.one_step.launch = CapturedSteps(run.one_step.run, capture, run.device, run.config.model.name)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()  # the memory of those graphs is of use to no others
    for _ in range(CAPTURED_STEP):
        _walk(run, steps)


class Walk(NamedTuple):
    """So many of a run's steps."""

    seconds: float
    images: int


def _walk(run: Run, steps: int, stopwatch: Stopwatch | None = None) -> Walk:
    """Makes so many steps, of which the stopwatch counts the parts, after one that is not timed.

    Every walk makes the same steps: the first epoch's, and on through the next ones', with the same draws. The step
    before them draws the epoch's order, and lets images that stream get ahead.
    """
    batches = chain.from_iterable(map(run.batches, count(1)))
    _step(run, next(batches))
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
    return Walk(seconds, images)


def _step(run: Run, batch: Batch) -> None:
    """Makes the run's last step, however often it was made."""
    run.step_count = run.total_steps - 1
    run.step(batch)


def _times(run: Run, walk: Walk, stopwatch: Stopwatch) -> Times:
    """Of an epoch. The parts of replayed steps are of another walk, and might come to a little more than the whole."""
    epochs = walk.images / run.visits
    sections = {name: stopwatch.seconds[name] / epochs for name in SECTIONS if name in stopwatch.seconds}
    return Times(sections, max(walk.seconds / epochs - sum(sections.values()), 0.0))


def _evaluation_s(run: Run) -> float:
    """A pass over the validation images; where it would take longer than `MEASURED_S`, as much for each as the first
    ones take."""
    val = run.splits.val
    if not len(val):
        return 0.0
    first = val[:EVALUATION_BATCH]
    _judge(run, first)  # pays for start-up
    pass_s = _judge(run, first) * len(val) / len(first)
    return pass_s if pass_s > MEASURED_S else _judge(run, val)


def _judge(run: Run, rows: Tensor) -> float:
    """Seconds that it takes to score the weights on these images."""
    started = clock(run.device)
    metrics.scores(run.logits(run.model, rows), run.splits.labels[rows])
    return clock(run.device) - started


# ---- the device's peak


def _product_s(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of the fastest of a few products of two matrices of that side."""
    generator = torch.Generator(device).manual_seed(0)
    one, other = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(one)
    fastest = math.inf
    for _ in range(3):  # the first pays for start-up
        started = clock(device)
        torch.mm(one, other, out=product)
        fastest = min(fastest, clock(device) - started)
    return fastest


@contextlib.contextmanager
def products_as_precise_as_convolutions() -> Iterator[None]:
    """Lets CUDA multiply float32 matrices in TF32 where it convolves in it, which is torch's default for convolutions
    alone; the setting is restored."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    if before == "tf32" or convolutions.fp32_precision != "tf32":
        yield
        return
    # By the older name, which sets the newer too: torch refuses to read one where only the other was set.
    products.allow_tf32 = True
    try:
        yield
    finally:
        products.allow_tf32 = False
        products.fp32_precision = before


# ---- the stopwatch


class Stopwatch:
    """Adds up the seconds that the parts of steps take, by the host's clock."""

    def __init__(self) -> None:
        self.seconds: dict[Section, float] = {}
        """By part, since the reset."""

    def reset(self) -> None:
        """Begins at nothing."""
        self.seconds.clear()

    @contextlib.contextmanager
    def section(self, name: Section) -> Iterator[None]:
        """What a part of a step runs in; for `TrainStep.section`."""
        started = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - started)

    def take(self) -> list[Span]:
        """The spans since they were last taken, which `read` is yet to count: none, as they are counted at once."""
        return []

    def read(self, spans: list[Span]) -> None:
        """Waits for the device, and counts these spans."""

    def _add(self, name: Section, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class DeviceStopwatch(Stopwatch):
    """Adds up what the parts of steps take on a CUDA device, by events before and behind each.

    The events can be captured in a graph, and are recorded anew by each of its replays. A graph does not keep them
    alive, so whoever replays it keeps its spans.
    """

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
            spans[-1].end.synchronize()  # the last of the stream's
        for span in spans:
            self._add(span.name, span.begin.elapsed_time(span.end) / 1000)  # of milliseconds


class Span(NamedTuple):
    """One part of one step on the device's timeline."""

    name: Section
    begin: torch.cuda.Event
    end: torch.cuda.Event


class TimedCapture:
    """A `Capture` whose replays a stopwatch counts. Each waits for the device, so their whole time means nothing.

    Args:
        capture: how steps are captured.
        stopwatch: whose `section` the steps' parts run in.
    """

    def __init__(self, capture: Capture, stopwatch: Stopwatch) -> None:
        self._capture, self._stopwatch = capture, stopwatch

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """See `Capture`."""
        self._stopwatch.take()  # of the steps before it, which were launched kernel by kernel
        replay = self._capture.capture(function)
        spans = self._stopwatch.take()

        def timed() -> None:
            replay()
            self._stopwatch.read(spans)

        return timed


def _event() -> torch.cuda.Event:
    """One that tells the time. External: a capture makes it a node of the graph, and not an order between streams."""
    return torch.cuda.Event(enable_timing=True, external=True)  # type: ignore[no-untyped-call]


def stopwatch_of(device: torch.device) -> Stopwatch:
    """The one that tells the truth there."""
    return DeviceStopwatch() if device.type == "cuda" else Stopwatch()
