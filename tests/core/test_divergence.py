"""A training is stopped only if it has clearly diverged."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from core.config import LossConfig, TrainConfig
from core.data import Splits
from core.errors import DivergedError
from core.loop import EpochMetrics, train
from core.loop.divergence import Divergence
from core.loop.run import Run
from core.losses import Criterion
from core.metrics import Scores

CPU = torch.device("cpu")
CLASSES = 10
GUESS = math.log(CLASSES)


def scores(loss: float, accuracy: float, balanced: float | None = None) -> Scores:
    balanced = accuracy if balanced is None else balanced
    return Scores(loss=loss, accuracy=accuracy, balanced_accuracy=balanced, macro_f1=0.0, ece=0.0)


LOST = scores(loss=12.0, accuracy=0.1)


def epoch(
    number: int, train_loss: float = 30.0, raw: Scores | None = LOST, averaged: Scores | None = None
) -> EpochMetrics:
    return EpochMetrics(
        epoch=number, step=number, lr=0.1, train_loss=train_loss, raw=raw, averaged=averaged, averaged_counts=False,
        images=100, images_per_s=1.0, elapsed_s=1.0,
    )  # fmt: skip


def judge(epochs: int = 40, loss: LossConfig | None = None, support: tuple[int, ...] = (50,) * CLASSES) -> Divergence:
    """Divergence of a training with as many training as validation images per class."""
    config = TrainConfig().override({"epochs": epochs, "schedule.warmup_fraction": 0.25})
    counts = torch.tensor(support)
    labels = torch.repeat_interleave(torch.arange(CLASSES), counts)
    return Divergence(config, Criterion(loss or LossConfig(), counts), counts, labels)


def test_a_run_is_stopped_after_a_diverged_quarter() -> None:
    history = [epoch(number) for number in range(11, 21)]
    judge().check(history[:-1])
    with pytest.raises(DivergedError, match=r"for 10 epochs up to epoch 20 the losses were more than 2 times"):
        judge().check(history)
    interrupted = [*history[:5], epoch(16, train_loss=2.0), *history[6:]]
    judge().check(interrupted)


def test_a_short_run_has_at_least_five_epochs() -> None:
    history = [epoch(number) for number in range(3, 8)]
    judge(epochs=8).check(history[:4])
    with pytest.raises(DivergedError, match="for 5 epochs"):
        judge(epochs=8).check(history)


@pytest.mark.parametrize(
    "now",
    [
        epoch(10),
        epoch(11, train_loss=0.1),
        epoch(11, train_loss=1.9 * GUESS),
        epoch(11, raw=scores(loss=12.0, accuracy=0.2)),
        epoch(11, raw=scores(loss=1.9 * GUESS, accuracy=0.1)),
        epoch(11, raw=scores(loss=12.0, accuracy=0.1, balanced=0.2)),
        epoch(11, averaged=scores(loss=2.0, accuracy=0.1)),
        epoch(11, averaged=scores(loss=12.0, accuracy=0.4)),
        epoch(11, raw=None),
    ],
    ids=[
        "while the rate warms up",
        "noise learnt by heart, or statistics that lag",
        "no worse than a guess in training",
        "overconfident, but better than chance",
        "no worse than a guess in validation",
        "one that favours rare classes",
        "averaged weights with a fine loss",
        "averaged weights with a fine accuracy",
        "nothing to validate on",
    ],
)
def test_epochs_that_have_not_diverged(now: EpochMetrics) -> None:
    assert judge().is_lost(epoch(11))
    assert not judge().is_lost(now)


@pytest.mark.parametrize(
    ("loss", "guess"),
    [
        (LossConfig(smoothing=0.3), GUESS),
        (LossConfig(class_weights="inverse"), GUESS),
        (LossConfig(name="focal", gamma=2.0), 0.9**2 * GUESS),
        (LossConfig(name="bce"), CLASSES * math.log(2)),
        (LossConfig(logit_adjustment=1.0), math.log(1023 / 1)),  # logits of the class frequencies
    ],
    ids=["smoothing", "class weights", "focal", "bce", "logit adjustment"],
)
def test_the_training_loss_is_compared_with_that_of_uniform_predictions(loss: LossConfig, guess: float) -> None:
    support = tuple(2**power for power in range(CLASSES))
    own = judge(loss=loss, support=support)
    assert own.train_loss == pytest.approx(guess)
    # Mixtures do not have a larger loss of uniform predictions.
    criterion = Criterion(loss, torch.tensor(support))
    targets = torch.rand(64, CLASSES, generator=torch.Generator().manual_seed(0)).softmax(1)
    for stage in (criterion.stage(0.0), criterion.stage(1.0)):
        assert criterion.mixed(torch.zeros(64, CLASSES), targets, stage) <= own.train_loss * (1 + 1e-6)
        assert criterion(torch.zeros(64, CLASSES), targets.argmax(1), stage) <= own.train_loss * (1 + 1e-6)


def test_on_long_tailed_data_chance_accuracy_is_the_largest_class() -> None:
    support = (512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
    assert judge(support=support).is_lost(epoch(11, raw=scores(loss=12.0, accuracy=512 / 1023, balanced=0.1)))
    assert not judge(support=support).is_lost(epoch(11, raw=scores(loss=12.0, accuracy=0.3, balanced=0.5)))


@pytest.mark.parametrize(
    "absurd",
    [
        {"optim.name": "sgd", "optim.lr": 100.0},
        {"optim.name": "adamw", "optim.lr": 100.0},
        {"optim.name": "adamw", "optim.lr": 100.0, "loss.name": "focal", "averaging.name": "ema"},
        {"optim.name": "muon", "optim.lr": 100.0, "loss.name": "bce", "augment.mixup": 0.4},
    ],
)
def test_an_excessive_rate_is_stopped_with_finite_losses(
    digits: Splits, tiny: TrainConfig, absurd: dict[str, Any]
) -> None:
    with pytest.raises(DivergedError, match="the accuracy was no better than chance; a lower"):
        train(tiny.override({"epochs": 16, **absurd}), digits, device=CPU)


def long_tailed(splits: Splits) -> Splits:
    """The digits with half as many images of each class as of the previous one."""

    def thinned(rows: torch.Tensor) -> torch.Tensor:
        kept = [of[: max(1, len(of) >> k)] for k in range(CLASSES) for of in [rows[splits.labels[rows] == k]]]
        return torch.cat(kept)

    return dataclasses.replace(splits, train=thinned(splits.train), val=thinned(splits.val))


def mislabelled(splits: Splits) -> Splits:
    """The digits with random labels."""
    order = torch.randperm(len(splits.labels), generator=torch.Generator().manual_seed(0))
    return dataclasses.replace(splits, labels=splits.labels[order])


@pytest.mark.parametrize("of", [lambda splits: splits, long_tailed, mislabelled], ids=["whole", "tail", "mislabelled"])
@pytest.mark.parametrize(
    "changes",
    [
        {"optim.lr_scale": 30.0},
        {"optim.name": "sgd", "optim.lr_scale": 30.0, "averaging.name": "swa"},
        {"optim.name": "nadam", "optim.lr_scale": 10.0, "averaging.name": "ema", "loss.class_weights": "inverse"},
        {"optim.name": "muon", "optim.lr_scale": 100.0, "loss.logit_adjustment": 1.0, "loss.name": "focal"},
        {"loss.name": "bce", "augment.mixup": 0.4, "optim.lr_scale": 0.1},
    ],
)
def test_ordinary_trainings_do_not_diverge(digits: Splits, tiny: TrainConfig, changes: dict[str, Any], of: Any) -> None:
    config = tiny.override({"epochs": 12, "schedule.warmup_fraction": 0.0, **changes})
    data = of(digits)
    judge = Run(config, data, CPU).divergence
    assert sum(map(judge.is_lost, train(config, data, device=CPU).history)) <= 1
