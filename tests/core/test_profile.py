"""Profiles count every part of a step once and have no side effects."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import count
from typing import Any, Self

import pytest
import torch
from torch import nn

from core.config import TrainConfig
from core.data import Splits
from core.errors import ConfigError
from core.loop import Execution, train
from core.loop import profile as profile_module
from core.loop.profile import (
    DeviceStopwatch,
    Profile,
    Stopwatch,
    TimedCapture,
    Times,
    flops_per_image,
    measured_peak_flops,
    products_as_precise_as_convolutions,
    profile,
)
from core.models.stages import FixedGroupNorm
from tests.core.recorded import RecordedGraph
from tests.core.test_execution import Counting
from tests.core.trainings import CPU, EveryStepByPython, same

STEP = ["augment", "forward", "backward", "optimizer"]

# Ten seconds of training on 60 images and two of evaluation.
KNOWN = Profile(
    launched=Times({"augment": 1.0, "forward": 2.0, "backward": 4.0, "optimizer": 0.5}, host_s=2.5),
    replayed=None,
    evaluation_s=2.0,
    images=60,
    steps=3,
    timed_steps=3,
    parameters=10,
    flops_per_image=10,
    dtype="float32",
    peak_flops=200.0,
    peak_memory_bytes=None,
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the peak with the smallest product only."""
    monkeypatch.setattr(profile_module, "LONGEST_PRODUCT_S", 0.0)


class Ticking:
    """A clock that advances by a second each time it is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seconds = count()
        monkeypatch.setattr(profile_module.time, "perf_counter", lambda: float(next(seconds)))


class TestTheTimesOfAnEpoch:
    def test_are_the_sum_of_all_parts(self, digits: Splits, tiny: TrainConfig) -> None:
        measured = profile(tiny, digits, device=CPU, steps=4)
        assert list(measured.launched.sections_s) == STEP
        assert all(seconds > 0 for seconds in measured.launched.sections_s.values())
        assert measured.launched.host_s > 0  # sections take less than the total
        assert sum(measured.parts(measured.trained).values()) == pytest.approx(measured.epoch_s)
        assert measured.replayed is None
        assert measured.graph_saves is None

    @pytest.mark.parametrize(("averaging", "parts"), [("none", STEP), ("ema", [*STEP, "averaging"])])
    def test_include_averaging_if_on(self, digits: Splits, tiny: TrainConfig, averaging: str, parts: list[str]) -> None:
        measured = profile(tiny.override({"averaging.name": averaging}), digits, device=CPU, steps=2)
        assert list(measured.parts(measured.trained)) == [*parts, "evaluation", "host"]

    def test_are_extrapolated_from_the_timed_steps(
        self, digits: Splits, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The clock is read at both ends of the timed steps and of each part."""
        Ticking(monkeypatch)
        config = tiny.override({"averaging.name": "ema"})
        execution = Execution(batches_at_once=1)
        measured = profile(config, digits, device=CPU, steps=2, execution=execution)  # of 64 images each, of 192
        # A step reads the clock twelve times: eleven seconds, plus one to the next step; six are the parts'.
        expected = dict.fromkeys([*STEP, "averaging"], 2 * 192 / 128)
        assert measured.launched.sections_s == expected | {"augment": 2 * expected["augment"]}
        assert measured.launched.seconds == (2 * 12 + 1) * 192 / 128
        assert measured.evaluation_s == 1.25  # of a second, with both weights and EMA in a quarter of the run
        assert measured.images_per_s == pytest.approx(192 / (37.5 + 1.25))
        assert (measured.images, measured.steps, measured.timed_steps) == (192, 3, 2)

    def test_continue_over_epochs_and_count_images(
        self, digits: Splits, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Ticking(monkeypatch)
        config = tiny.override({"epochs": 1, "batch_size": 80})  # 80, 80, 32; the first is not timed
        execution = Execution(batches_at_once=1)
        measured = profile(config, digits, device=CPU, steps=5, execution=execution)  # 80, 32, 80, 80, 32
        assert measured.launched.seconds == pytest.approx((5 * 10 + 1) * 192 / 304)

    def test_are_of_all_batches_that_are_augmented_together(
        self, digits: Splits, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Ticking(monkeypatch)
        # Of three batches, two and one are augmented together; the first two are not timed.
        measured = profile(tiny, digits, device=CPU, steps=2, execution=Execution(batches_at_once=2))
        assert measured.timed_steps == 3
        assert measured.launched.sections_s == {**dict.fromkeys(STEP, 3.0), "augment": 3.0 + 2.0}

    def test_support_an_epoch_of_one_batch(self, digits: Splits, tiny: TrainConfig) -> None:
        measured = profile(tiny.override({"epochs": 1, "batch_size": 512}), digits, device=CPU, steps=2)
        assert measured.steps == 1
        assert measured.launched.seconds > 0

    def test_are_of_at_least_the_minimum_number_of_steps(
        self, digits: Splits, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(profile_module, "MEASURED_S", 0.0)
        assert profile(tiny, digits, device=CPU).timed_steps == profile_module.FEWEST_STEPS

    def test_without_validation_images_have_no_evaluation(self, digits: Splits, tiny: TrainConfig) -> None:
        assert profile(tiny, digits.whole(), device=CPU, steps=1).evaluation_s == 0

    def test_a_long_evaluation_is_extrapolated(
        self, digits: Splits, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Ticking(monkeypatch)  # every pass takes a second
        monkeypatch.setattr(profile_module, "EVALUATION_BATCH", 24)
        assert profile(tiny, digits, device=CPU, steps=1).evaluation_s == 96 / 24

    def test_raise_the_errors_of_a_training(self, digits: Splits, tiny: TrainConfig) -> None:
        with pytest.raises(ConfigError, match=r"^1 training image"):
            profile(tiny, dataclasses.replace(digits, train=digits.train[:1]), device=CPU)


class TestDerivedNumbers:
    def test_derived_numbers(self) -> None:
        assert KNOWN.trained is KNOWN.launched
        assert KNOWN.epoch_s == 12
        assert KNOWN.images_per_s == 5
        assert KNOWN.step_flops == 10 * 60 / 10  # without evaluation
        assert KNOWN.network_flops == 10 * 60 / 6
        assert KNOWN.largest == "backward"

    def test_replayed_steps_count(self) -> None:
        replayed = Times({"augment": 3.0, "forward": 0.5, "backward": 0.5, "optimizer": 0.5}, host_s=0.5)
        measured = dataclasses.replace(KNOWN, replayed=replayed)
        assert measured.trained is replayed
        assert measured.epoch_s == 7
        assert measured.graph_saves == pytest.approx(0.5)
        assert measured.network_flops == 10 * 60 / 1
        assert measured.largest == "augment"

    @pytest.mark.parametrize(("longest", "changes"), [("host", {"host_s": 9.0}), ("forward", {"host_s": 0.0})])
    def test_the_largest_cost_may_be_any_part(self, longest: str, changes: dict[str, float]) -> None:
        sections = {**KNOWN.launched.sections_s, **({"forward": 8.0} if longest == "forward" else {})}
        launched = dataclasses.replace(KNOWN.launched, sections_s=sections, **changes)
        assert dataclasses.replace(KNOWN, launched=launched).largest == longest
        assert dataclasses.replace(KNOWN, launched=launched, evaluation_s=50.0).largest == "evaluation"


class TestReplayedSteps:
    def test_are_measured_besides_launched_steps(self, digits: Splits, tiny: TrainConfig) -> None:
        config = tiny.override({"averaging.name": "ema"})
        measured = profile(config, digits, device=CPU, steps=3, execution=Execution(capture=EveryStepByPython))
        assert measured.replayed is not None
        assert measured.replayed.sections_s.keys() == measured.launched.sections_s.keys()
        assert measured.graph_saves is not None

    def test_are_timed_without_captures_or_launches(
        self, digits: Splits, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A replay does not read the clock, so all replayed steps take one second."""
        Ticking(monkeypatch)
        measured = profile(tiny, digits, device=CPU, steps=3, execution=Execution(capture=RecordedGraph))
        assert measured.replayed is not None
        assert measured.replayed.seconds == 1  # three replayed steps, without captures

    def test_are_captured_in_all_shapes_before_timing(self, digits: Splits, tiny: TrainConfig) -> None:
        capture = Counting()
        changes = {"batch_size": 80, "augment.mixup": 1.0, "augment.cutmix": 1.0}
        execution = Execution(capture=capture)
        profile(tiny.override(changes), digits, device=CPU, steps=12, execution=execution)
        assert capture.count == 2 * 2  # batches of 80 and 32, in total and by part


class RecordedEvent:
    """A CUDA event on the host's clock, recorded again by each replay."""

    captured: list[RecordedEvent] | None = None
    now_ms = count()

    def __init__(self, *, enable_timing: bool, external: bool) -> None:
        assert enable_timing
        assert external, "a capture would take it for an order between streams"
        self.at: float | None = None

    def record(self) -> None:
        if RecordedEvent.captured is not None:
            RecordedEvent.captured.append(self)
        else:
            self.at = next(self.now_ms)

    def synchronize(self) -> None:
        assert self.at is not None, "an event that was only captured"

    def elapsed_time(self, end: Self) -> float:
        assert self.at is not None
        assert end.at is not None
        return end.at - self.at


class RecordedEvents:
    """A capture of a step's events only."""

    @staticmethod
    def capture(function: Callable[[], None]) -> Callable[[], None]:
        events: list[RecordedEvent] = []
        RecordedEvent.captured = events
        function()
        RecordedEvent.captured = None

        def replay() -> None:
            for event in events:
                event.record()

        replay()
        return replay


class TestTheStopwatchOfADevice:
    @pytest.fixture(autouse=True)
    def _events(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "Event", RecordedEvent)

    def test_counts_launched_sections_on_read(self) -> None:
        stopwatch = DeviceStopwatch()
        for _ in range(3):
            with stopwatch.section("forward"):
                pass
            with stopwatch.section("backward"), stopwatch.section("averaging"):
                pass
        assert not stopwatch.seconds
        stopwatch.read(stopwatch.take())
        stopwatch.read(stopwatch.take())  # nothing is counted twice
        assert stopwatch.seconds == pytest.approx({"forward": 0.003, "averaging": 0.003, "backward": 0.009})
        stopwatch.reset()
        assert not stopwatch.seconds

    def test_counts_every_replay(self) -> None:
        stopwatch = DeviceStopwatch()

        def step() -> None:
            with stopwatch.section("augment"):
                pass

        step()  # without capture
        replay = TimedCapture(RecordedEvents(), stopwatch).capture(step)
        other = TimedCapture(RecordedEvents(), stopwatch).capture(step)
        stopwatch.reset()
        for _ in range(4):
            replay()
        other()
        stopwatch.read(stopwatch.take())
        assert stopwatch.seconds == pytest.approx({"augment": 0.005})

    def test_is_chosen_by_device(self) -> None:
        assert type(profile_module.stopwatch_of(CPU)) is Stopwatch
        assert type(profile_module.stopwatch_of(torch.device("cuda", 0))) is DeviceStopwatch


class TestTheOperationsOfANetwork:
    """A multiply-add is two operations; the gradient of each operand costs as much as the forward pass."""

    def test_are_those_of_a_convolution(self) -> None:
        network = nn.Conv2d(3, 8, 5, padding=2)
        forward = 2 * (3 * 5 * 5) * 8 * (16 * 12)
        assert flops_per_image(network, (3, 16, 12)) == 2 * forward  # images need no gradient

    def test_are_those_of_linear_layers(self) -> None:
        network = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.BatchNorm1d(7), nn.Linear(7, 5))
        assert flops_per_image(network, (3, 2, 2)) == 2 * (2 * 12 * 7) + 3 * (2 * 7 * 5)

    def test_of_group_norm_are_none(self) -> None:
        """Its tensors without memory have no autocast."""
        convolution = nn.Conv2d(3, 8, 5, padding=2)
        network = nn.Sequential(convolution, FixedGroupNorm(8))
        assert flops_per_image(network, (3, 16, 12)) == flops_per_image(convolution, (3, 16, 12))

    def test_are_counted_on_a_copy(self) -> None:
        network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        flops_per_image(network, (3, 8, 8))
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
        assert all(parameter.grad is None for parameter in network.parameters())

    def test_are_in_the_profile(self, digits: Splits, tiny: TrainConfig) -> None:
        """Computed for the two blocks of `tiny` on 8×8 images; the second has a 1×1 shortcut of stride 2."""
        measured = profile(tiny, digits, device=CPU, steps=1)
        stem = 2 * 64 * (1 * 9 * 8)
        first = 2 * 64 * 2 * (8 * 9 * 8)
        second = 2 * 16 * (8 * 9 * 16 + 16 * 9 * 16 + 8 * 16)
        head = 2 * 16 * 10
        assert measured.flops_per_image == 2 * stem + 3 * (first + second + head)


class TestThePeak:
    def test_is_the_fastest_product_among_growing_sides(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With tabulated times: 1024² is the fastest, and 4096² would take too long."""
        seconds = {256: 1e-3, 512: 2e-3, 1024: 8e-3, 2048: 0.1}
        monkeypatch.setattr(profile_module, "LONGEST_PRODUCT_S", 0.2)
        monkeypatch.setattr(profile_module, "_product_s", lambda side, *_: seconds[side])
        assert measured_peak_flops(CPU, torch.float32) == 2 * 1024**3 / 8e-3

    def test_ends_at_the_largest_side(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sides = []

        def product_s(side: int, *_: Any) -> float:
            sides.append(side)
            return 1e-6

        monkeypatch.setattr(profile_module, "LONGEST_PRODUCT_S", 0.2)
        monkeypatch.setattr(profile_module, "_product_s", product_s)
        measured_peak_flops(CPU, torch.float32)
        assert sides == [256, 512, 1024, 2048, 4096, 8192]

    def test_is_measured_in_the_networks_dtype(
        self, digits: Splits, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        types = []

        def product_s(side: int, device: torch.device, dtype: torch.dtype) -> float:
            types.append(dtype)
            return 1.0

        monkeypatch.setattr(profile_module, "_product_s", product_s)
        for mode in ("off", "bf16"):
            assert profile(tiny.override({"precision.autocast": mode}), digits, device=CPU, steps=1).peak_flops > 0
        assert types == [torch.float32, torch.bfloat16]

    def test_restores_the_precision_of_products(self) -> None:
        products = torch.backends.cuda.matmul
        before = (products.fp32_precision, products.allow_tf32, torch.get_float32_matmul_precision())
        with products_as_precise_as_convolutions():
            assert products.fp32_precision == "tf32"  # torch's default for convolutions
        assert (products.fp32_precision, products.allow_tf32, torch.get_float32_matmul_precision()) == before


CAPTURES = {"launched": None, "captured": EveryStepByPython}


@pytest.mark.parametrize("capture", CAPTURES.values(), ids=CAPTURES.keys())
class TestSideEffects:
    CHANGES = {"averaging.name": "ema", "augment.cutmix": 1.0, "augment.ops": 2, "model.dropout": 0.2}  # noqa: RUF012

    def test_generators_images_and_later_trainings_are_unchanged(
        self, digits: Splits, tiny: TrainConfig, capture: Any
    ) -> None:
        config, execution = tiny.override(self.CHANGES), Execution(capture=capture)
        before = train(config, digits, device=CPU, execution=execution)
        torch.manual_seed(5)
        state, images, labels = torch.get_rng_state(), digits.images.clone(), digits.labels.clone()
        profile(config, digits, device=CPU, steps=2, execution=execution)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(digits.images, images)
        assert torch.equal(digits.labels, labels)
        assert same(train(config, digits, device=CPU, execution=execution), before)


@pytest.mark.gpu
class TestOnCuda:
    DEVICE = torch.device("cuda", 0)

    def test_launched_and_replayed_steps_are_measured(self, digits: Splits, tiny: TrainConfig) -> None:
        changes = {"averaging.name": "ema", "batch_size": 80, "augment.mixup": 1.0, "augment.cutmix": 1.0}
        measured = profile(tiny.override(changes), digits, device=self.DEVICE, steps=20)
        assert measured.replayed is not None
        for times in (measured.launched, measured.replayed):
            assert list(times.sections_s) == [*STEP, "averaging"]
            assert all(seconds > 0 for seconds in times.sections_s.values())
        # Both are within the time that the host waited.
        assert measured.launched.host_s > 0
        assert measured.dtype == "bfloat16"
        assert measured.peak_memory_bytes is not None
        assert 0 < measured.peak_memory_bytes < torch.cuda.get_device_properties(self.DEVICE).total_memory

    def test_without_graphs_there_are_no_replayed_steps(self, digits: Splits, tiny: TrainConfig) -> None:
        assert profile(tiny.override({"precision.cuda_graphs": False}), digits, device=self.DEVICE).replayed is None

    def test_images_can_be_streamed(self, digits: Splits, tiny: TrainConfig) -> None:
        measured = profile(tiny, digits, device=self.DEVICE, steps=8, execution=Execution(streamed=True))
        assert measured.replayed is not None
        assert measured.epoch_s > 0

    def test_an_event_in_a_graph_times_every_replay(self) -> None:
        """A step of long products, and then of the same graph on a device that has nothing else to do."""
        matrix = torch.randn(2048, 2048, device=self.DEVICE)
        stopwatch = DeviceStopwatch()

        def step() -> None:
            with stopwatch.section("forward"):
                for _ in range(20):
                    matrix @ matrix
            with stopwatch.section("backward"):
                matrix @ matrix

        with profile_module.own_stream(self.DEVICE):
            step()
            replay = TimedCapture(profile_module.CudaCapture([]), stopwatch).capture(step)
            stopwatch.reset()
            replay()
            once = dict(stopwatch.seconds)
            replay()
        assert once["forward"] > 5 * once["backward"] > 0
        assert stopwatch.seconds["forward"] > once["forward"]
        assert stopwatch.seconds["backward"] > once["backward"]

    def test_memory_is_released(self, digits: Splits, tiny: TrainConfig) -> None:
        profile(tiny, digits, device=self.DEVICE, steps=4)
        before = torch.cuda.memory_allocated(self.DEVICE)
        profile(tiny, digits, device=self.DEVICE, steps=4)
        assert torch.cuda.memory_allocated(self.DEVICE) == before

    def test_torchs_generators_are_restored(self, digits: Splits, tiny: TrainConfig) -> None:
        torch.cuda.manual_seed(5)
        before = torch.cuda.get_rng_state(self.DEVICE)
        profile(tiny.override({"model.dropout": 0.2}), digits, device=self.DEVICE, steps=4)
        assert torch.equal(torch.cuda.get_rng_state(self.DEVICE), before)
