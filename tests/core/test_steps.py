"""No training step makes the host wait for the device or copies between them, whatever the configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import core.loop.run
import core.loop.step
from core.augment import Augment
from core.averaging import ExponentialAveraging
from core.config import OWN_PARTS, TrainConfig
from core.data import Splits
from core.loop import Execution
from core.loop.run import Run
from core.loop.step import TrainStep
from core.losses import Criterion
from core.optim import StepOptimizer
from tests.core.fake_cuda import CopyError, run_fake_step
from tests.core.recorded import HostReadError, HostReads, let_the_cpu_capture
from tests.core.step_configs import STEP, STEPS, WITHOUT_EFFECT, choices, fields
from tests.core.trainings import CPU, EveryStepByPython

# Of a run: in its warm-up, mixed, with a frozen backbone and small images; and without, after a switch of SWATS.
PROGRESS = (0.0, 0.97)


PLACES: dict[str, tuple[Any, str]] = {
    "random numbers": (Augment, "draw"),
    "augmentation": (Augment, "apply"),
    "sizing": (core.loop.step, "resize"),
    "mixing": (core.loop.step, "apply_mix"),
    "network": (nn.Conv2d, "forward"),
    "loss": (Criterion, "mixed"),
    "optimizer": (StepOptimizer, "step"),
    "averaging": (ExponentialAveraging, "update"),
}


class WatchedStep(TrainStep):
    """Steps whose device part raises HostReadError if the host would wait for the device."""

    def run(self, *args: Any) -> None:
        with HostReads():
            super().run(*args)


def splits(side: int) -> Splits:
    """48 random images of three classes."""
    images = torch.randint(0, 256, (48, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Splits(
        images, torch.arange(48) % 3, torch.arange(40), torch.arange(40, 48), ("a", "b", "c"), (0.5,) * 3, (0.25,) * 3
    )


def run_steps(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run steps as captured on a GPU, with the values on the device and no Python numbers."""
    let_the_cpu_capture(monkeypatch)
    monkeypatch.setattr(core.loop.run, "TrainStep", WatchedStep)
    config = TrainConfig().override(changes)
    side = 32 if config.model.name.startswith("timm/") else 16
    with Run(config, splits(side), CPU, execution=Execution(capture=EveryStepByPython)) as run:
        run.model.train()
        with HostReads():
            batch = next(run.batches(epoch=1))
        for progress in PROGRESS:
            run.step_count = int(progress * run.total_steps)
            run.step(batch)


@pytest.mark.parametrize("changes", STEPS.values(), ids=STEPS)
def test_a_step_does_not_wait_for_the_device(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run_steps(changes, monkeypatch)


@pytest.mark.parametrize("name", [name for name in STEPS if name.startswith(("the", "augm", "loss", "optim", "aver"))])
def test_a_step_on_cuda_does_not_copy_to_or_from_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without memory, with small images, after a switch of SWATS."""
    let_the_cpu_capture(monkeypatch)
    run_fake_step(TrainConfig().override(STEPS[name]), 0.25)


@pytest.mark.parametrize("place", ["random numbers", "augmentation", "network", "loss", "optimizer", "averaging"])
def test_a_tensor_made_on_the_host_is_detected(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = PLACES[place]
    function = getattr(owner, name)

    def copying(*args: Any, **kwargs: Any) -> Any:
        torch.arange(3).to("cuda")
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, copying)
    with pytest.raises(CopyError, match="_to_copy"):
        run_fake_step(TrainConfig().override({**STEP, "augment.cutmix": 1.0}), 0.25)


def test_every_choice_of_the_configuration_is_in_the_table() -> None:
    used = [TrainConfig().override(changes).flat() for changes in STEPS.values()]
    without_choices = set()
    for path, field in fields():
        values = choices(path, field)
        if not values:
            without_choices.add(path)
        missing = [value for value in values if all(config[path] != value for config in used)]
        assert not missing, f"{path}: no step with {missing}"
    own = {"augment.name", *(f"{part}.kwargs" for part in OWN_PARTS)}
    assert without_choices == {"model.name", "model.widths", "model.blocks", "sampling.caps", *own}
    assert len(STEPS) >= 40


def test_fields_without_effect_exist() -> None:
    flat = TrainConfig().flat()
    assert all(any(path == name or path.startswith(f"{name}.") for path in flat) for name in WITHOUT_EFFECT)


VECTOR = torch.tensor([1.0, -2.0])
READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda vector: vector[0].item(),
    "float": lambda vector: float(vector[0]),
    "if": lambda vector: 1 if vector[0] > 0 else 2,
    "mask": lambda vector: vector[vector > 0],
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("place", PLACES)
def test_a_single_read_is_detected_anywhere(place: str, read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = PLACES[place]
    function = getattr(owner, name)

    def reading(*args: Any, **kwargs: Any) -> Any:
        READS[read](VECTOR)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, reading)
    with pytest.raises(HostReadError):
        run_steps({**STEP, "augment.cutmix": 1.0}, monkeypatch)


def test_a_read_in_the_backward_pass_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = nn.Linear.forward

    def hooked(self: nn.Linear, images: Tensor) -> Tensor:
        logits = forward(self, images)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * gradient.abs().max().item())
        return logits

    monkeypatch.setattr(nn.Linear, "forward", hooked)
    with pytest.raises(HostReadError, match=r"evaluate_function.* > aten::item"):
        run_steps(STEP, monkeypatch)
