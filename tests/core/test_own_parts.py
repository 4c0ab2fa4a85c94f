"""A loss, a transform of batches and an optimizer of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from core.augment import OwnTransform
from core.config import AugmentConfig, LossConfig, TrainConfig
from core.data import Splits
from core.errors import ConfigError, UserError
from core.loop import Execution, train
from core.losses import Criterion, Stage
from tests.core.recorded import RecordedGraph
from tests.core.trainings import CPU, same

OwnModule = Callable[[str], str]

LOSS = """
import torch
from torch import nn
from torch.nn import functional as F


class Margin(nn.Module):
    def __init__(self, num_classes, class_counts, margin=0.0):
        super().__init__()
        self.register_buffer("margins", margin / class_counts ** 0.25)

    def forward(self, logits, targets):
        if targets.ndim == 1:
            targets = F.one_hot(targets, logits.shape[1]).float()
        return F.cross_entropy(logits - targets * self.margins, targets, reduction="none")


def scalar(): return lambda logits, targets: F.cross_entropy(logits, targets)
def labels_only(): return lambda logits, targets: F.nll_loss(logits.log_softmax(1), targets)
def table(): return lambda logits, targets: logits
def constant(): return lambda logits, targets: torch.tensor(1.0)
def reading(): return lambda logits, targets: F.cross_entropy(logits, targets) * (1 + 0 * logits.max().item())
def learned(): return nn.Linear(10, 10)
def number(): return 3
"""

TRANSFORM = """
import torch


class Noise:
    def __init__(self, std=0.1):
        self.std = std

    def __call__(self, images):
        assert images.dtype == torch.float32
        return images.add_(self.std * torch.randn_like(images)) if self.std else images


def halves(): return lambda images: images[..., ::2]
def bytes_(): return lambda images: images.byte()
def failing(): return lambda images: images[7]
"""

OPTIMIZER = """
import torch


class Signs(torch.optim.Optimizer):
    def __init__(self, params, lr, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "steps": 0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["steps"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    mean = state.setdefault("mean", torch.zeros_like(parameter))
                    mean.lerp_(parameter.grad, 1 - group["beta"])
                    parameter.sub_(mean.sign() / group["steps"] ** 0.5, alpha=group["lr"])


def adam(params, lr, weight_decay): return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)
def lbfgs(params, lr): return torch.optim.LBFGS([p for group in params for p in group["params"]], lr=lr)
def nothing(params, lr): return None
"""


@pytest.fixture
def own(own_module: OwnModule, tiny: TrainConfig) -> TrainConfig:
    """Three epochs with all three parts."""
    loss, transform, optimizer = map(own_module, (LOSS, TRANSFORM, OPTIMIZER))
    return tiny.override(
        {
            "epochs": 3, "loss.name": f"{loss}:Margin", "loss.kwargs.margin": 0.5, "augment.name": f"{transform}:Noise",
            "optim.name": f"{optimizer}:Signs", "optim.lr": 0.003, "optim.kwargs.beta": 0.8,
        }
    )  # fmt: skip


def test_a_resumed_training_with_own_parts_is_bitwise_the_same(own: TrainConfig, digits: Splits, tmp_path: Any) -> None:
    whole, checkpoint = train(own, digits, device=CPU), tmp_path / "checkpoint"
    assert whole.history[-1].train_loss < whole.history[0].train_loss

    def stop(epoch: Any) -> None:
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(own, digits, device=CPU, checkpoint_to=checkpoint, on_epoch_end=stop)
    assert same(train(own, digits, device=CPU, resume_from=checkpoint), whole)


@pytest.mark.parametrize("field", ["loss.kwargs.margin", "augment.kwargs.std", "optim.kwargs.beta"])
def test_each_argument_changes_the_trained_weights(own: TrainConfig, digits: Splits, field: str) -> None:
    one, other = (train(own.override({"epochs": 1, field: value}), digits, device=CPU) for value in (0.1, 0.7))
    assert not same(one, other)


# The loss


def criterion(name: str, *, mixes: bool = False, **kwargs: Any) -> Criterion:
    return Criterion(LossConfig(name=name, kwargs=kwargs), torch.tensor([16, 1, 1]), mixes=mixes)  # type: ignore[arg-type]


def test_a_loss_gets_the_counts_of_the_classes_and_its_mean_is_taken(own_module: OwnModule) -> None:
    loss = criterion(f"{own_module(LOSS)}:Margin", mixes=True, margin=2.0)
    logits, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    # margins 2 / 16^¼ = 1, 2 and 2: softmax over (−1, 0, 0) and (0, −2, 0)
    expected = sum(m + torch.tensor([-m, 0.0, 0.0]).logsumexp(0).item() for m in (1.0, 2.0)) / 2
    stage = Stage(smoothing=0.0, weighted=False)
    assert loss(logits, labels, stage).item() == pytest.approx(expected)
    mixtures = torch.nn.functional.one_hot(labels, 3).float()
    assert loss.mixed(logits, mixtures, stage).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Margn", "has no Margn; did you mean Margin"),
        ("table", r"returns a tensor \(2, 3\) for 2 images, not their mean loss or one for each"),
        ("constant", "does not depend on the logits"),
        ("learned", "has parameters of its own, which no optimizer trains"),
        ("number", "returns a int, not a function of logits and labels"),
        ("labels_only", r"fails with .* mixtures of classes, since augment mixes images, \(2, 3\): .*py:\d+"),
    ],
)
def test_a_loss_that_cannot_be_used_is_refused(own_module: OwnModule, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        criterion(f"{own_module(LOSS)}:{name}", mixes=True)


def test_a_loss_of_labels_is_enough_where_nothing_is_mixed(own_module: OwnModule) -> None:
    criterion(f"{own_module(LOSS)}:labels_only")


def test_arguments_of_a_loss_are_checked(own_module: OwnModule) -> None:
    with pytest.raises(ConfigError, match=r"loss.kwargs: .*:Margin has no argument margn; did you mean margin\?"):
        criterion(f"{own_module(LOSS)}:Margin", margn=1.0)


def test_a_recorded_step_uses_the_loss(own_module: OwnModule, tiny: TrainConfig, digits: Splits) -> None:
    values = {"epochs": 12, "optim.name": "sgd", "loss.name": f"{own_module(LOSS)}:scalar"}
    recorded = train(tiny.override(values), digits, device=CPU, execution=Execution(capture=RecordedGraph))
    launched = train(tiny.override(values), digits, device=CPU)
    torch.testing.assert_close(recorded.model.state_dict(), launched.model.state_dict(), rtol=1e-3, atol=1e-4)


def test_a_loss_that_waits_is_launched_with_a_warning(
    own_module: OwnModule, tiny: TrainConfig, digits: Splits, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny.override({"epochs": 12, "loss.name": f"{own_module(LOSS)}:reading"})
    train(config, digits, device=CPU, execution=Execution(capture=RecordedGraph))
    [line] = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert f"model.name resnet, loss.name {config.loss.name}: its step cannot be a CUDA graph" in line


# The transform


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("halves", r"returns a Tensor \(2, 1, 8, 4\) torch.float32 for images \(2, 1, 8, 8\)"),
        ("bytes_", r"returns a Tensor \(2, 1, 8, 8\) torch.uint8"),
        ("failing", r"fails with images \(2, 1, 8, 8\): IndexError: .*py:\d+\)"),
    ],
)
def test_a_transform_that_cannot_be_used_is_refused(own_module: OwnModule, name: str, message: str) -> None:
    config = AugmentConfig(name=f"{own_module(TRANSFORM)}:{name}")
    with pytest.raises(ConfigError, match=message):
        OwnTransform(config, (0.5,), (0.25,), CPU).check((1, 8, 8), torch.float32)


def test_a_transform_gets_pixels_from_0_to_1_and_its_result_is_normalized(own_module: OwnModule) -> None:
    name = own_module("def spread():\n    return lambda images: images * images\n")
    transform = OwnTransform(AugmentConfig(name=f"{name}:spread"), (0.5,), (0.25,), CPU)
    pixels = torch.rand(3, 1, 4, 4)
    torch.testing.assert_close(transform((pixels - 0.5) / 0.25), (pixels**2 - 0.5) / 0.25)


# The optimizer


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lbfgs", r"fails in a step: TypeError: .*closure"),
        ("nothing", "returns None, not a torch.optim.Optimizer"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused(
    own_module: OwnModule, tiny: TrainConfig, digits: Splits, name: str, message: str
) -> None:
    config = tiny.override({"optim.name": f"{own_module(OPTIMIZER)}:{name}", "optim.lr": 0.01})
    with pytest.raises(ConfigError, match=message):
        train(config, digits, device=CPU)


def test_rates_decay_and_clipping_are_those_of_the_same_optimizer_here(
    own_module: OwnModule, tiny: TrainConfig, digits: Splits
) -> None:
    values = {
        "optim.lr": 0.002, "optim.weight_decay": 0.02, "optim.grad_clip": 1.0, "optim.backbone_lr_scale": 0.5,
        "optim.head_only_fraction": 0.3, "epochs": 3,
    }  # fmt: skip
    theirs = train(tiny.override(values), digits, device=CPU)
    ours = train(tiny.override({**values, "optim.name": f"{own_module(OPTIMIZER)}:adam"}), digits, device=CPU)
    torch.testing.assert_close(ours.model.state_dict(), theirs.model.state_dict(), rtol=1e-3, atol=1e-4)


def test_an_optimizer_is_launched_with_a_warning(
    own: TrainConfig, digits: Splits, caplog: pytest.LogCaptureFixture
) -> None:
    train(own.override({"epochs": 1}), digits, device=CPU, execution=Execution(capture=RecordedGraph))
    [line] = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert f"optim.name {own.optim.name}: steps of your own optimizer cannot be CUDA graphs" in line


# The configuration


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"optim.name": "own:Signs"}, "optim.lr_scale has no reference for own:Signs of your own: give optim.lr"),
        ({"optim.name": "own:Signs", "optim.lr": 0.1, "optim.kwargs.lr": 0.1}, "optim.kwargs.lr is optim.lr: leave it"),
        ({"optim.kwargs.beta": 0.1}, "optim.kwargs are for code of your own; optim.name is adamw: leave them out"),
        ({"loss.kwargs.margin": 0.1}, "loss.kwargs are for code of your own; loss.name is cross_entropy"),
        ({"augment.kwargs.std": 0.1}, "augment.kwargs are for code of your own; augment.name is None"),
        ({"loss.name": "own:Loss", "loss.kwargs.class_counts": 3}, "loss.kwargs.class_counts follows from the images"),
        ({"loss.name": "own:Loss", "loss.smoothing": 0.1}, "loss.smoothing is no field of a loss of your own"),
        ({"loss.name": "own/loss.py:Loss"}, "names a file; .*: own.loss:Loss"),
        ({"loss.name": "own:a b"}, "must be PACKAGE.MODULE:NAME of your own code, not 'own:a b'"),
        ({"augment.name": "noise"}, "must be PACKAGE.MODULE:NAME of your own code, not 'noise'"),
        ({"loss.name": "focl"}, "Input should be 'cross_entropy', 'focal' or 'bce'"),
    ],
)  # fmt: skip
def test_invalid_values_are_refused(values: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        TrainConfig().override(values)


def test_another_name_drops_what_it_lacks() -> None:
    balanced = TrainConfig().override({"loss.class_weights": "inverse", "loss.smoothing": 0.1})
    other = {"loss.name": "own:Loss", "loss.smoothing": 0.0}
    assert balanced.dropped_by(other) == ["loss.class_weights"]
    own = balanced.override({**other, "loss.kwargs.margin": 0.5})
    assert own.dropped_by({"loss.name": "focal"}) == ["loss.kwargs.margin"]
    assert own.override({"loss.name": "focal"}).loss.kwargs == {}
