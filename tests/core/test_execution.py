"""Captured, streamed, micro-batched and compiled trainings give the same results.

On the CPU, `RecordedGraph` repeats the operations of a step on the same memory in place of a CUDA graph. Tests marked
`gpu` use real graphs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import core.loop.graphs
import core.loop.step
from core.augment import Augment
from core.config import TrainConfig
from core.data import Splits
from core.errors import GraphError
from core.loop import Execution, TrainResult, seconds_per_epoch, train
from core.loop.graphs import FEWEST_REPLAYS, WARM_UP_STEPS, CudaCapture
from core.loop.memory import SMALLEST_MICRO_BATCH, batch_that_fits, kept_bytes, micro_batch_that_fits
from core.loop.profile import profile
from core.loop.run import Run
from core.loop.step import Batch, StepShape, StepValues
from core.runtime import is_out_of_memory, own_stream
from tests.core.conftest import Train
from tests.core.launches import launches
from tests.core.recorded import HostReads, RecordedGraph, let_the_cpu_capture
from tests.core.trainings import CASES, CPU, STATEFUL, EveryStepByPython, forbidden_waits, same

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _captured_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture shapes that a short training uses only a few times."""
    monkeypatch.setattr(core.loop.graphs, "FEWEST_REPLAYS", 1)


PERHAPS_OUT_OF_MEMORY = [
    "GET was unable to find an engine to execute this computation",
    "FIND was unable to find an engine to execute this computation",
    "Unable to find a valid cuDNN algorithm to run convolution",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED_CUDART",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
]


class Failing:
    """A capture that raises an error the first times, without limit by default."""

    def __init__(self, error: BaseException, times: int | None = None) -> None:
        self.error, self.times = error, times
        self.tried = 0

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        self.tried += 1
        if self.times is None or self.tried <= self.times:
            raise self.error
        return EveryStepByPython.capture(function)


class Counting(EveryStepByPython):
    """Counts captures and replays."""

    def __init__(self) -> None:
        self.count = self.replays = 0

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:  # type: ignore[override]
        self.count += 1
        replay = EveryStepByPython.capture(function)

        def counted() -> None:
            self.replays += 1
            replay()

        return counted


def losses(result: TrainResult) -> list[float]:
    return [epoch.train_loss for epoch in result.history]


@pytest.mark.parametrize("case", CASES)
def test_a_captured_training_equals_launched_steps_bitwise_and_plain_ones_in_loss(
    trained: Train, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are within 1e-3 of plain ones, since scalars on the device are float32 where Python has float64."""
    let_the_cpu_capture(monkeypatch)
    replayed = trained(case, capture=RecordedGraph)
    assert same(replayed, trained(case, capture=EveryStepByPython))
    assert losses(replayed) == pytest.approx(losses(trained(case)), rel=1e-3)


def test_a_captured_training_resumes_bitwise(digits: Splits, tiny: TrainConfig, tmp_path: Path) -> None:
    config = tiny.override({"epochs": 8, "averaging.name": "ema", "augment.mixup": 0.4})
    execution = Execution(capture=EveryStepByPython)
    whole = train(config, digits, device=CPU, execution=execution)
    half = tmp_path / "half.pt"
    train(config, digits, device=CPU, execution=execution, stop_after=4, checkpoint_to=half, checkpoint_at_end=True)
    recorded = Execution(capture=RecordedGraph)
    assert same(whole, train(config, digits, device=CPU, execution=recorded, resume_from=half))


@pytest.mark.parametrize("capture", [None, EveryStepByPython], ids=["as it is", "captured"])
def test_a_finished_training_holds_no_memory(
    digits: Splits, tiny: TrainConfig, capture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without garbage collection, since the next training's probe would miss the memory."""
    runs: list[weakref.ref[Any]] = []
    build = core.loop.run.build_optimizer

    def building(*args: Any, **kwargs: Any) -> Any:
        optimizer = build(*args, **kwargs)
        runs.append(weakref.ref(optimizer))
        return optimizer

    monkeypatch.setattr(core.loop.run, "build_optimizer", building)
    gc.disable()
    try:
        train(tiny, digits, device=CPU, execution=Execution(capture=capture))
        seconds_per_epoch(tiny, digits, device=CPU)
        profile(tiny, digits, device=CPU, steps=2, execution=Execution(capture=capture))
        assert [run() for run in runs] == [None, None, None]
    finally:
        gc.enable()


def test_the_estimate_of_an_epoch_captures_nothing(
    digits: Splits, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(core.loop.run, "CapturedSteps", refuse)
    assert seconds_per_epoch(tiny, digits, device=CPU) > 0


def test_cuda_graphs_can_be_switched_off(digits: Splits, tiny: TrainConfig) -> None:
    execution = Execution(capture=Failing(AssertionError()))
    without = train(tiny.override({"precision.cuda_graphs": False}), digits, device=CPU, execution=execution)
    assert same(without, train(tiny, digits, device=CPU))


class TestAStepThatCannotBeCaptured:
    ERROR = "operation not permitted when stream is capturing"

    def test_is_launched_with_one_warning(
        self, digits: Splits, tiny: TrainConfig, caplog: pytest.LogCaptureFixture
    ) -> None:
        capture = Failing(RuntimeError(f"{self.ERROR}\nmore"))
        result = train(tiny.override({"batch_size": 80}), digits, device=CPU, execution=Execution(capture=capture))
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert caplog.messages[0].startswith("model.name resnet: its step cannot be a CUDA graph")
        assert f"({self.ERROR})" in caplog.messages[0]
        assert capture.tried == 1
        assert losses(result) == pytest.approx(losses(train(tiny.override({"batch_size": 80}), digits, device=CPU)))

    def test_waits_and_is_launched_with_one_warning(
        self, digits: Splits, tiny: TrainConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        @contextlib.contextmanager
        def noticed_waits(_: torch.device) -> Iterator[list[str]]:
            with HostReads(raises=False) as reads:
                yield reads.found

        monkeypatch.setattr(core.loop.graphs, "noticed_waits", noticed_waits)
        capture = Counting()
        with Run(tiny, digits, CPU, execution=Execution(capture=capture)) as run:
            run.one_step.network = lambda images: run.model(images * (1 if images.max().item() > -99 else 0))
            for epoch in range(1, 4):
                for batch in run.batches(epoch):
                    run.step(batch)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "it waits for the host (aten::item)" in caplog.messages[0]
        assert capture.count == 0

    def test_frees_cached_memory_and_is_captured(
        self, digits: Splits, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        capture, freed = Failing(torch.OutOfMemoryError("CUDA out of memory."), times=1), []
        monkeypatch.setattr(core.loop.graphs, "free_cache", lambda: freed.append(capture.tried))
        recorded = train(tiny, digits, device=CPU, execution=Execution(capture=capture))
        assert freed == [1]
        assert capture.tried == 2
        assert same(recorded, train(tiny, digits, device=CPU, execution=Execution(capture=EveryStepByPython)))

    def test_finds_no_memory_and_is_launched(
        self, digits: Splits, tiny: TrainConfig, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        capture = Failing(torch.OutOfMemoryError("CUDA out of memory."), times=2)
        config = tiny.override({"batch_size": 80})  # 80, 80, 32
        result = train(config, digits, device=CPU, execution=Execution(capture=capture))
        assert capture.tried == 3  # the smaller batches fit
        assert "the memory holds no CUDA graph of a step of 80 images" in caplog.text
        assert losses(result) == pytest.approx(losses(train(config, digits, device=CPU)), rel=1e-3)


def test_graphs_of_a_stage_that_is_over_are_freed(digits: Splits, tiny: TrainConfig) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Replay:
        def __init__(self, function: Callable[[], None]) -> None:
            self.function = function
            alive.add(self)

        def __call__(self) -> None:
            nonlocal most
            most = max(most, len(alive))
            self.function()

    class Held:
        def capture(self, function: Callable[[], None]) -> Callable[[], None]:
            function()
            return Replay(function)

    changes = {
        "epochs": 16, "batch_size": 80, "augment.start_size_fraction": 0.5, "optim.head_only_fraction": 0.2,
        "augment.mixup": 1.0, "augment.mix_off_fraction": 0.9,
    }  # fmt: skip
    train(tiny.override(changes), digits, device=CPU, execution=Execution(capture=Held()))
    assert most == 2  # batches of 80 and 32


class FakeGraph:
    """`torch.cuda.CUDAGraph` without a device: a capture runs its function, and replays are counted."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def register_generator_state(self, generator: torch.Generator) -> None:
        pass

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self.pool = pool
        self.calls.append(f"begin {capture_error_mode}")

    def capture_end(self) -> None:
        self.calls.append("end")

    def reset(self) -> None:
        self.calls.append("reset")

    def replay(self) -> None:
        self.calls.append("replay")


class TestCudaCapture:
    @pytest.fixture
    def graphs(self, monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
        """The graphs made."""
        made: list[FakeGraph] = []

        def build() -> FakeGraph:
            made.append(FakeGraph())
            return made[-1]

        handles = itertools.count()
        monkeypatch.setattr(torch.cuda, "CUDAGraph", build)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: object())
        monkeypatch.setattr(torch.cuda, "stream", lambda *_: contextlib.nullcontext())
        monkeypatch.setattr(core.loop.graphs, "allowed_waits", contextlib.nullcontext)
        for stops_the_device in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, stops_the_device, self.refuse)
        return made

    @staticmethod
    def refuse() -> None:
        raise AssertionError

    def test_neither_waits_for_the_device_nor_empties_the_cache(self, graphs: list[FakeGraph]) -> None:
        ran = []
        replay = CudaCapture([]).capture(lambda: ran.append(1))
        replay()
        assert ran == [1]
        assert graphs[0].calls == ["begin thread_local", "end", "replay", "replay"]

    def test_shares_the_pool_of_living_graphs(self, graphs: list[FakeGraph]) -> None:
        capture = CudaCapture([])
        replays = [capture.capture(lambda: None) for _ in range(2)]
        shared = {graph.pool for graph in graphs}
        assert len(shared) == 1
        graphs.clear()
        del replays
        capture.capture(lambda: None)
        assert graphs[0].pool not in shared

    def test_a_failed_step_leaves_the_capture(self, graphs: list[FakeGraph]) -> None:
        def fail() -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        capture = CudaCapture([])
        with pytest.raises(torch.OutOfMemoryError):
            capture.capture(fail)
        assert graphs[0].calls == ["begin thread_local", "end", "reset"]
        capture.capture(lambda: None)
        assert graphs[1].pool != graphs[0].pool

    @pytest.mark.parametrize("reported_by", ["the step", "the end of the capture"])
    def test_an_invalid_capture_is_reported(
        self, graphs: list[FakeGraph], monkeypatch: pytest.MonkeyPatch, reported_by: str
    ) -> None:
        def invalid(*_: Any) -> None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

        def fail() -> None:
            if reported_by == "the step":
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

        monkeypatch.setattr(FakeGraph, "capture_end", invalid)
        reason = "operation not permitted" if reported_by == "the step" else "a previous error"
        with pytest.raises(
            GraphError, match=rf"{reason}.*\), and torch cannot.*precision\.cuda_graphs: false avoids it$"
        ):
            CudaCapture([]).capture(fail)


MIXED = {"augment.mixup": 0.2, "augment.cutmix": 1.0, "augment.mix_probability": 0.7, "loss.smoothing": 0.1}


class TestMostStepsAreReplayed:
    """In runs of 60 epochs of 18 steps: 17 of 256 images and one of 100."""

    EPOCHS, STEPS = 60, 18

    @pytest.fixture(autouse=True)
    def _captured_as_usual(self, _captured_early: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(core.loop.graphs, "FEWEST_REPLAYS", FEWEST_REPLAYS)

    def replayed(self, epochs: int, *, side: int = 8, **changes: Any) -> tuple[Counting, float]:
        """Train some of the epochs; return the fraction of replayed steps."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (17 * 256 + 100, 1, side, side), generator=generator, dtype=torch.uint8)
        labels = torch.arange(len(images)) % 3
        splits = Splits(images, labels, torch.arange(len(images)), torch.arange(50), ("a", "b", "c"), (0.5,), (0.3,))
        small = {"batch_size": 256, "model.widths": (4,), "model.blocks": (1,), "model.stem_kernel": 3}
        config = TrainConfig(epochs=self.EPOCHS).override({**small, **changes})
        capture = Counting()
        train(config, splits, device=CPU, stop_after=epochs, execution=Execution(capture=capture))
        return capture, (capture.replays + capture.count) / (epochs * self.STEPS)

    @pytest.mark.parametrize("changes", [{}, MIXED], ids=["plain", "mixed"])
    def test_after_two_epochs(self, changes: dict[str, Any]) -> None:
        capture, share = self.replayed(2, **changes)
        assert capture.count == 1
        assert share == (2 * 17 - WARM_UP_STEPS) / (2 * self.STEPS)
        assert share > 0.85

    def test_with_growing_images(self) -> None:
        capture, share = self.replayed(6, side=32, **MIXED, **{"augment.start_size_fraction": 0.5})
        assert capture.count == 2
        assert share > 0.85

    def test_last_batches_are_captured_in_a_long_run(self) -> None:
        capture, share = self.replayed(4)
        assert capture.count == 2
        assert share == (4 * self.STEPS - 2 * WARM_UP_STEPS) / (4 * self.STEPS)

    def test_few_remaining_steps_are_not_captured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(self.__class__, "EPOCHS", FEWEST_REPLAYS + 1)
        capture, _ = self.replayed(4)
        assert capture.count == 1


def test_mixed_targets_are_not_smoothed(digits: Splits, tiny: TrainConfig) -> None:
    config = tiny.override({"augment.mixup": 1.0, "optim.name": "sgd"})
    runs = [Run(config.override({"loss.smoothing": smoothing}), digits, CPU) for smoothing in (0.0, 0.3)]
    for run in runs:
        run.model.train()
        run.step(next(run.batches(epoch=1)))
    assert runs[0].one_step.loss_sum == runs[1].one_step.loss_sum


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"augment.mixup": 1.0, "augment.mix_off_fraction": 0.55, "augment.start_size_fraction": 0.5},
        {"loss.class_weights": "inverse", "loss.class_weights_from_fraction": 0.8},
        {"optim.head_only_fraction": 0.25},
        {"optim.name": "swats", "optim.swats.switch_fraction": 0.35, "optim.head_only_fraction": 0.2},
        {"optim.name": "swats", "optim.swats.switch": "criterion", "schedule.warmup_fraction": 0.3},
    ],
)
def test_the_remaining_steps_of_a_shape_are_known(digits: Splits, tiny: TrainConfig, changes: dict[str, Any]) -> None:
    run = Run(tiny.override({"epochs": 7, "batch_size": 80, **changes}), digits, CPU)  # 80, 80, 32 images
    expected: list[int] = []
    shapes: list[StepShape] = []

    def record(batch: Batch, shape: StepShape, values: StepValues) -> None:
        shapes.append(shape)
        expected.append(run.remaining(shape))

    run.one_step.launch = record
    for epoch in range(1, 8):
        for batch in run.batches(epoch):
            run.step(batch)
    assert expected == [shapes[step:].count(shape) for step, shape in enumerate(shapes)]


def test_each_shape_of_a_step_is_captured_once(digits: Splits, tiny: TrainConfig) -> None:
    capture = Counting()
    config = tiny.override({"epochs": WARM_UP_STEPS + 3, "batch_size": 80})  # 192 images: 80, 80, 32
    result = train(config, digits, device=CPU, execution=Execution(capture=capture))
    assert capture.count == 2
    assert [epoch.images for epoch in result.history] == [192] * config.epochs


def test_both_passes_choose_the_fastest_convolutions_and_evaluation_does_not(
    digits: Splits, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned: list[bool] = []

    @contextlib.contextmanager
    def tuned_convolutions(_: torch.device) -> Iterator[None]:
        tuned.append(True)
        yield
        tuned.pop()

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, images: torch.Tensor) -> torch.Tensor:
            seen.append(("forward", bool(tuned)))
            return images.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            seen.append(("backward", bool(tuned)))
            return gradient

    seen: list[tuple[str, bool]] = []
    monkeypatch.setattr(core.loop.step, "tuned_convolutions", tuned_convolutions)
    run = Run(tiny, digits, CPU)
    run.model.conv1.register_forward_hook(lambda _, __, out: Watched.apply(out))
    run.step(next(run.batches(epoch=1)))
    assert seen == [("forward", True), ("backward", True)]
    run.logits(run.model, digits.val)
    assert seen[-1] == ("forward", False)


@pytest.mark.parametrize("capture", [None, RecordedGraph], ids=["launched", "captured"])
@pytest.mark.parametrize("case", STATEFUL)
def test_a_streamed_training_equals_the_resident_one_bitwise(
    trained: Train, case: str, capture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_the_cpu_capture(monkeypatch)
    assert same(trained(case, streamed=True, capture=capture), trained(case, capture=capture))


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_batches_augmented_together_changes_nothing(
    trained: Train, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_the_cpu_capture(monkeypatch)
    one_by_one = trained(case, batches_at_once=1)
    assert same(one_by_one, trained(case, batches_at_once=2))
    assert same(one_by_one, trained(case, batches_at_once=1000))
    assert same(one_by_one, trained(case))
    assert same(one_by_one, trained(case, batches_at_once=2, streamed=True))


def test_augmentation_is_below_8_percent_of_the_launches_at_batch_64() -> None:
    """Of ResNet-18 with RandAugment on 5,056 images."""
    count = 64 * 79
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, rows = torch.arange(count) % 10, torch.arange(count)
    splits = Splits(images, labels, rows, rows[:8], tuple("0123456789"), (0.5,) * 3, (0.25,) * 3)
    config = TrainConfig(batch_size=64).override({"augment.ops": 2, "augment.strength": 0.4, "averaging.name": "ema"})
    with Run(config, splits, CPU, execution=Execution(capture=EveryStepByPython)) as run:
        run.model.train()
        batches: list[Batch] = []
        augmented = launches(lambda: batches.extend(run.batches(epoch=1)))
        run.step(batches[0])
        steps = len(batches) * launches(lambda: run.step(batches[0]))
    assert augmented <= 0.08 * (augmented + steps)


@pytest.mark.parametrize(("most", "expected"), [(10_000, 3), (128, 1), (64, 1)])
def test_batches_are_augmented_together_as_far_as_the_memory_holds_them(
    digits: Splits, tiny: TrainConfig, most: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = Augment.apply

    def limited(self: Augment, images: Tensor, draws: Any) -> Tensor:
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return apply(self, images, draws)

    monkeypatch.setattr(Augment, "apply", limited)
    run = Run(tiny, digits, CPU, execution=Execution(probe=True, batches_at_once=3))
    assert (run.batches_at_once, run.one_step.micro_batch) == (expected, None)
    assert all(parameter.grad is None for parameter in run.model.parameters())


class TestABatchThatDoesNotFit:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"augment.cutmix": 1.0, "loss.class_weights": "inverse"},
            {"loss.name": "focal", "loss.class_weights": "effective", "loss.smoothing": 0.1},
        ],
        ids=["plain", "mixed and weighted", "focal and weighted"],
    )
    def test_gives_the_gradients_of_the_whole_batch(
        self, digits: Splits, tiny: TrainConfig, changes: dict[str, Any]
    ) -> None:
        config = tiny.override({"model.norm": "group", **changes})
        whole, parts = (Run(config, digits, CPU) for _ in range(2))
        parts.one_step.micro_batch = 24  # of 64: 24, 24, 16
        for run in (whole, parts):
            run.model.train()
            run.step(next(run.batches(epoch=1)))
        assert parts.one_step.loss_sum.item() == pytest.approx(whole.one_step.loss_sum.item(), rel=1e-5)
        for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)

    def test_is_halved_until_it_fits(self) -> None:
        model = nn.BatchNorm2d(3)
        before = model.running_mean.clone() if model.running_mean is not None else None
        tried: list[int | None] = []

        def step(size: int | None) -> None:
            tried.append(size)
            model(torch.rand(4, 3, 2, 2)).sum().backward()
            if size is None or size > 40:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        assert micro_batch_that_fits(step, model, batch_size=129, moments=2) == 33
        assert tried == [None, 65, 33]
        assert before is not None
        assert torch.equal(model.running_mean, before)  # type: ignore[arg-type]
        assert model.weight.grad is None

    def test_smallest_part_too_large_is_out_of_memory(self) -> None:
        tried: list[int | None] = []

        def step(size: int | None) -> None:
            tried.append(size)
            raise torch.OutOfMemoryError("CUDA out of memory.")

        with pytest.raises(torch.OutOfMemoryError):
            micro_batch_that_fits(step, nn.Linear(2, 2), batch_size=32, moments=1)
        assert tried == [None, 16, SMALLEST_MICRO_BATCH]

    @pytest.mark.parametrize("message", PERHAPS_OUT_OF_MEMORY)
    def test_is_an_error_of_a_library_if_a_part_of_it_fits(self, message: str) -> None:
        def try_batch(size: int | None) -> None:
            if size is None or size > 40:
                raise RuntimeError(message)

        assert micro_batch_that_fits(try_batch, nn.Linear(2, 2), batch_size=129, moments=1) == 33
        assert batch_that_fits(try_batch, batch_size=129) == 32

    @pytest.mark.parametrize("later", [PERHAPS_OUT_OF_MEMORY[0], "CUDA error: an illegal memory access"])
    def test_is_the_librarys_error_if_no_part_of_it_fits(self, later: str) -> None:
        first = RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED")
        errors = itertools.chain([first], itertools.repeat(RuntimeError(later)))

        def step(size: int | None) -> None:
            raise next(errors)

        with pytest.raises(RuntimeError) as caught:
            micro_batch_that_fits(step, nn.Linear(2, 2), batch_size=32, moments=1)
        assert caught.value is first
        assert any("in step" in note for note in first.__notes__)

    @pytest.mark.parametrize("half_works", [True, False])
    def test_is_classified_in_the_middle_of_a_training(
        self, digits: Splits, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, half_works: bool
    ) -> None:
        message = "GET was unable to find an engine to execute this computation"
        tried: list[int] = []

        def fail(run: Run, *, final: bool) -> None:
            raise RuntimeError(message)

        def try_memory(step: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
            tried.append(len(images))
            if not half_works:
                raise RuntimeError("another")

        monkeypatch.setattr(Run, "epoch", fail)
        monkeypatch.setattr(core.loop.step.TrainStep, "try_memory", try_memory)
        with pytest.raises(RuntimeError, match=message) as caught:
            train(tiny, digits, device=CPU, execution=Execution(probe=False))
        assert tried == [32]
        assert is_out_of_memory(caught.value) is half_works

    def test_other_errors_propagate(self) -> None:
        def step(size: int | None) -> None:
            raise RuntimeError("size mismatch")

        with pytest.raises(RuntimeError, match="size mismatch"):
            micro_batch_that_fits(step, nn.Linear(2, 2), batch_size=32, moments=1)

    def test_a_probe_does_not_change_the_training(self, digits: Splits, tiny: TrainConfig) -> None:
        config = tiny.override({"averaging.name": "ema", "augment.ops": 2, "model.dropout": 0.2})
        probed = train(config, digits, device=CPU, execution=Execution(probe=True))
        assert probed.kept.micro_batch is None
        assert same(probed, train(config, digits, device=CPU))

    def test_is_split_in_a_process_with_too_little_memory(self) -> None:
        """Limits the address space of a process."""
        if sys.platform != "linux":
            pytest.skip("limits of the address space are Linux's")
        program = textwrap.dedent("""
            import dataclasses, resource, torch
            from core.config import TrainConfig
            from core.data import Splits
            from core.loop import Execution, train

            torch.set_num_threads(1)
            images = torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8)
            labels = torch.arange(128) % 2
            splits = Splits(images, labels, torch.arange(128), torch.arange(8), ("a", "b"), (0.5,) * 3, (0.5,) * 3)
            config = TrainConfig(epochs=1, batch_size=128).override({"model.widths": (32,), "model.blocks": (1,)})
            few = dataclasses.replace(splits, train=torch.arange(16))
            train(config, few, device=torch.device("cpu"))  # libraries allocate memory of their own
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 60 * 2**20,) * 2)
            kept = train(config, splits, device=torch.device("cpu"), execution=Execution(probe=True)).kept
            print(kept.micro_batch, kept.images, kept.train_loss)
        """)
        # Return freed blocks at once: otherwise fragmentation of the C library's heap decides whether a step fits.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(64 * 1024)}
        ended = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120, env=environment
        )
        assert ended.returncode == 0, ended.stderr
        micro_batch, images, loss = ended.stdout.split()
        assert SMALLEST_MICRO_BATCH <= int(micro_batch) < 128
        assert int(images) == 128
        assert 0 < float(loss) < 10


class TestAStepBeyondTheMemoryOfACpu:
    """The system would kill the process, so the memory of a step is predicted from a few images."""

    def test_is_predicted_from_what_the_backward_pass_needs(self) -> None:
        model = nn.Sequential(nn.Linear(10, 100), nn.Sigmoid(), nn.Linear(100, 3))
        images = torch.rand(8, 10)
        # Float32: the input, what the sigmoid returned, and no parameters.
        assert kept_bytes(lambda: model(images).sum().backward(), model) == 4 * (8 * 10 + 8 * 100)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_is_split(self, digits: Splits, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        run = Run(tiny, digits, CPU)
        assert run.one_step.micro_batch is None
        kept = kept_bytes(partial(run._try_step, 8), run.model) / 8
        fixed = (1 + run.optimizer.moments) * sum(parameter.nbytes for parameter in run.model.parameters())
        free = fixed + 1.25 * kept * 40
        monkeypatch.setattr("core.loop.run.free_memory", lambda _: free)
        found = train(tiny, digits, device=CPU)  # in batches of 64
        assert found.kept.micro_batch == 32
        assert math.isfinite(found.kept.train_loss)

    def test_is_out_of_memory_if_the_smallest_part_is_too_large(
        self, digits: Splits, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("core.loop.run.free_memory", lambda _: 1e4)
        with pytest.raises(torch.OutOfMemoryError, match="a step of 64 images takes about"):
            train(tiny, digits, device=CPU)

    def test_the_prediction_does_not_change_the_training(self, digits: Splits, tiny: TrainConfig) -> None:
        config = tiny.override({"averaging.name": "ema", "augment.ops": 2, "model.dropout": 0.2})
        assert same(
            train(config, digits, device=CPU), train(config, digits, device=CPU, execution=Execution(probe=False))
        )

    @pytest.mark.slow
    def test_takes_the_memory_that_is_predicted(self) -> None:
        """In a process of its own, by the system's count of a step of 64 images."""
        if sys.platform != "linux":
            pytest.skip("/proc is Linux's")
        program = textwrap.dedent("""
            from functools import partial
            from pathlib import Path
            import torch
            from core.config import TrainConfig
            from core.data import Splits
            from core.loop import Execution
            from core.loop.memory import kept_bytes
            from core.loop.run import HOST_BYTES_PER_KEPT_BYTE, Run
            from core.runtime import release_freed_memory

            torch.set_num_threads(1)
            images = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8)
            splits = Splits(
                images, torch.arange(64) % 2, torch.arange(64), torch.arange(8), ("a", "b"), (0.5,) * 3, (0.5,) * 3
            )
            config = TrainConfig(batch_size=64).override({"model.widths": (32, 64), "model.blocks": (2, 2)})
            run = Run(config, splits, torch.device("cpu"), execution=Execution(probe=False))
            run.model.train()
            predicted = 64 * HOST_BYTES_PER_KEPT_BYTE * kept_bytes(partial(run._try_step, 8), run.model) / 8

            def status(name):
                lines = Path("/proc/self/status").read_text().splitlines()
                return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

            release_freed_memory()
            Path("/proc/self/clear_refs").write_text("5")  # the peak is the present now
            before = status("VmRSS")
            run._try_step(64)
            print((status("VmHWM") - before) / predicted)
        """)
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert ended.returncode == 0, ended.stderr
        assert 0.7 < float(ended.stdout) < 1.25


@pytest.mark.slow
def test_a_compiled_training_has_equal_losses_and_is_compiled_once(
    tmp_path: Path,
) -> None:
    """In a separate process with an empty compilation cache."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU, and there is no g++")
    program = textwrap.dedent("""
        import json, torch
        from torch._dynamo.utils import counters
        from core.config import TrainConfig
        from core.data import load_dataset, split
        from core.loop import train
        from core.models import compilation

        compilation.bandwidth = lambda device: 1.0  # compiling always pays
        vgg = {"model.name": "vgg", "model.norm": "none", "model.blocks": (1,)}
        config = TrainConfig(epochs=2, batch_size=539).override({"model.widths": (8,), "model.blocks": (2,)})
        splits = split(load_dataset(config.data), config.data)
        found = []
        for network, seed, compiled in (
            (vgg, 0, False), (vgg, 0, True), (vgg, 1, True), ({}, 0, False), ({}, 0, "auto"), ({}, 1, "auto")
        ):
            counters.clear()
            changes = {**network, "seed": seed, "precision.compile": compiled}
            history = train(config.override(changes), splits, device=torch.device("cpu")).history
            found.append([[epoch.train_loss for epoch in history], dict(counters["inductor"])])
        print(json.dumps(found))
    """)

    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=400
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    for (plain, _), (first, compiled), (_, again) in (found[:3], found[3:]):  # a network, two equal blocks
        assert first == pytest.approx(plain, rel=1e-4)
        assert compiled["fxgraph_cache_miss"] == 2  # of both passes
        assert again == {}


@pytest.mark.gpu
class TestOnCuda:
    """Losses are compared within 2 %, since atomic sums and bf16 diverge slowly; frozen values or skipped batches
    differ by far more."""

    @pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
    def test_graphs_streams_and_plain_launches_have_the_same_losses(
        self, digits: Splits, tiny: TrainConfig, changes: dict[str, Any]
    ) -> None:
        device = torch.device("cuda:0")
        config = tiny.override({"epochs": 6, "optim.lr_scale": 1.0, **changes})
        plain = losses(train(config.override({"precision.cuda_graphs": False}), digits.to(device), device=device))
        graphs = losses(train(config, digits.to(device), device=device))
        streamed = losses(train(config, digits, device=device, execution=Execution(streamed=True)))
        assert graphs == pytest.approx(plain, rel=0.02)
        assert streamed == pytest.approx(plain, rel=0.02)

    @pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
    @pytest.mark.parametrize("graphs", [True, False])
    def test_nothing_in_an_epoch_waits_for_the_device(
        self, digits: Splits, tiny: TrainConfig, changes: dict[str, Any], graphs: bool
    ) -> None:
        device = torch.device("cuda:0")
        config = tiny.override({**changes, "epochs": 8, "precision.cuda_graphs": graphs})
        with own_stream(device):
            run = Run(config, digits.to(device), device)
            run.model.train()
            for batch in run.batches(epoch=1):  # the first step may create constants
                run.step(batch)
            for epoch in range(2, 6):
                with forbidden_waits(device):
                    for batch in run.batches(epoch):
                        run.step(batch)
            run.one_step.network = lambda images: run.model(images * images.abs().max().item())
            run.one_step.launch = run.one_step.run
            with pytest.raises(RuntimeError, match="synchronizing"), forbidden_waits(device):
                run.step(next(run.batches(epoch=6)))

    def test_a_step_that_waits_is_launched_with_one_warning(
        self, digits: Splits, tiny: TrainConfig, caplog: pytest.LogCaptureFixture
    ) -> None:
        device = torch.device("cuda:0")
        with own_stream(device), Run(tiny, digits.to(device), device) as run:
            run.one_step.network = lambda images: run.model(images * (1 if images.max().item() > -99 else 0))
            for epoch in range(1, 4):
                for batch in run.batches(epoch):
                    run.step(batch)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "it waits for the host (test_execution.py:" in caplog.messages[0]

    def test_a_capture_can_follow_one_that_its_step_broke_off(self) -> None:
        device = torch.device("cuda:0")
        numbers = torch.zeros(3, device=device)

        def add() -> None:
            numbers.add_(1)

        def fail() -> None:
            add()
            raise torch.OutOfMemoryError("CUDA out of memory.")

        with own_stream(device):
            capture = CudaCapture([])
            with pytest.raises(torch.OutOfMemoryError):
                capture.capture(fail)
            torch.cuda.empty_cache()
            capture.capture(add)()
        assert numbers.tolist() == [2, 2, 2]

    def test_a_capture_that_cuda_refuses_is_reported(self) -> None:
        """In a process of its own, which cannot use the GPU any more."""
        program = textwrap.dedent("""
            import torch
            from core.errors import GraphError
            from core.loop.graphs import CudaCapture
            from core.runtime import own_stream

            device = torch.device("cuda:0")
            numbers = torch.zeros(3, device=device)
            with own_stream(device):
                try:
                    CudaCapture([]).capture(lambda: print(numbers.sum().item()))
                except GraphError as error:
                    print(error)
        """)
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert ended.stdout.startswith("recording a step as a CUDA graph failed ("), ended.stderr

    def test_a_batch_that_does_not_fit_is_divided(self, digits: Splits, tiny: TrainConfig) -> None:
        device = torch.device("cuda:0")
        config = tiny.override({"epochs": 5, "model.widths": (64, 128), "batch_size": 150, "augment.cutmix": 1.0})
        large = dataclasses.replace(digits, images=digits.images.repeat_interleave(8, 2).repeat_interleave(8, 3))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        train(config, large.to(device), device=device)
        needed, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.6 * needed) / total)
        try:
            divided = train(config, large.to(device), device=device)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert divided.kept.micro_batch is not None
        assert divided.kept.micro_batch < 150

    def test_trainings_release_their_memory(self, digits: Splits, tiny: TrainConfig) -> None:
        device = torch.device("cuda:0")
        splits = digits.to(device)
        train(tiny, splits, device=device)  # libraries keep workspaces
        gc.collect()
        before = torch.cuda.memory_allocated()
        for seed in range(4):
            train(tiny.override({"seed": seed, "averaging.name": "ema"}), splits, device=device)
            gc.collect()
            assert torch.cuda.memory_allocated() == before

    @pytest.mark.parametrize("compilation", [True, "auto"])
    def test_a_compiled_training_is_captured_too(
        self, digits: Splits, tiny: TrainConfig, compilation: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("core.models.compilation.bandwidth", lambda device: 1.0)  # compiling always pays
        device = torch.device("cuda:0")
        config = tiny.override(
            {"epochs": 6, "optim.lr_scale": 1.0, "batch_size": 80, "augment.start_size_fraction": 0.5}
        )
        by_inductor = train(config.override({"precision.compile": compilation}), digits.to(device), device=device)
        assert losses(by_inductor) == pytest.approx(losses(train(config, digits.to(device), device=device)), rel=0.02)
