"""Schedules match torch's warm-up, decay and reductions, as a function of progress and scores."""

from __future__ import annotations

import math
import random
import warnings
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from core.config import ScheduleConfig, TrainConfig
from core.losses import smoothing_at
from core.schedule import factor, factor_of, reductions, replayed, saturated_from, without_validation

STEPS, WARMUP_STEPS = 200, 20
NAMES = ("cosine", "linear", "constant", "step", "pieces", "plateau")


def torch_factors(decay: type[LRScheduler], **options: float) -> list[float]:
    """torch's factors of a warm-up from 0.1 followed by that decay, with peak 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = SequentialLR(
        optimizer,
        [
            LinearLR(optimizer, start_factor=0.1, end_factor=1.0, total_iters=WARMUP_STEPS),
            decay(optimizer, **options),  # type: ignore[arg-type]
        ],
        milestones=[WARMUP_STEPS],
    )
    factors = []
    for _ in range(STEPS):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR warns about its own use of `epoch`
            scheduler.step()
    return factors


@pytest.mark.parametrize("final_factor", [0.0, 0.25])
def test_cosine_matches_torch(final_factor: float) -> None:
    config = ScheduleConfig(
        name="cosine", warmup_fraction=WARMUP_STEPS / STEPS, warmup_start=0.1, final_factor=final_factor
    )
    ours = [factor(config, step / STEPS) for step in range(STEPS)]
    theirs = torch_factors(CosineAnnealingLR, T_max=STEPS - WARMUP_STEPS, eta_min=final_factor)
    assert ours == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("swa_factor", [0.05, 0.5, 1.0])
def test_with_swa_the_rate_falls_as_torchs_cosine_and_is_held_while_weights_are_averaged(swa_factor: float) -> None:
    config = TrainConfig().override(
        {
            "schedule.warmup_fraction": WARMUP_STEPS / STEPS,
            "schedule.warmup_start": 0.1,
            "averaging.name": "swa",
            "averaging.swa_start_fraction": 0.75,
            "averaging.swa_factor": swa_factor,
        }
    )
    ours = [factor_of(config, step / STEPS) for step in range(STEPS)]
    start = 3 * STEPS // 4
    theirs = torch_factors(CosineAnnealingLR, T_max=start - WARMUP_STEPS, eta_min=swa_factor)
    assert ours[:start] == pytest.approx(theirs[:start], abs=1e-12)
    assert set(ours[start:]) == {swa_factor}


def test_averaging_from_within_the_warm_up_holds_the_rate_after_it() -> None:
    config = TrainConfig().override({"averaging.name": "swa", "averaging.swa_start_fraction": 0.0})
    factors = [factor_of(config, step / STEPS) for step in range(STEPS)]
    assert factors[: STEPS // 20] == [factor(config.schedule, step / STEPS) for step in range(STEPS // 20)]
    assert set(factors[STEPS // 20 :]) == {config.averaging.swa_factor}


@pytest.mark.parametrize("name", ["constant", "step", "pieces"])
def test_swa_changes_no_other_schedule(name: str) -> None:
    config = TrainConfig().override({"averaging.name": "swa", "schedule.name": name})
    progress = [step / STEPS for step in range(STEPS)]
    assert [factor_of(config, each) for each in progress] == [factor(config.schedule, each) for each in progress]


@pytest.mark.parametrize("final_factor", [0.0, 0.25])
def test_linear_matches_torch(final_factor: float) -> None:
    config = ScheduleConfig(
        name="linear", warmup_fraction=WARMUP_STEPS / STEPS, warmup_start=0.1, final_factor=final_factor
    )
    ours = [factor(config, step / STEPS) for step in range(STEPS)]
    theirs = torch_factors(LinearLR, start_factor=1.0, end_factor=final_factor, total_iters=STEPS - WARMUP_STEPS)
    assert ours == pytest.approx(theirs, abs=1e-12)


# ---- step


@pytest.mark.parametrize(
    ("epochs", "every", "step_fraction"),
    [(10, 3, 0.3), (10, 1, 0.1), (30, 7, 7 / 30), (100, 30, 0.3), (7, 7, 1.0), (60, 9, 0.15), (90, 30, 1 / 3)],
)
@pytest.mark.parametrize("steps_per_epoch", [1, 7, 40])
@pytest.mark.parametrize("gamma", [0.1, 0.97])
def test_step_matches_torch(epochs: int, every: int, step_fraction: float, steps_per_epoch: int, gamma: float) -> None:
    config = ScheduleConfig(name="step", warmup_fraction=0.0, step_fraction=step_fraction, gamma=gamma)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = StepLR(optimizer, step_size=every, gamma=gamma)
    total = epochs * steps_per_epoch
    for epoch in range(epochs):
        for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
            assert factor(config, step / total) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_step_is_reduced_exactly_at_epoch_boundaries() -> None:
    for steps_per_epoch in range(1, 400):
        config = ScheduleConfig(name="step", warmup_fraction=0.0, step_fraction=0.3)
        total = 10 * steps_per_epoch
        factors = [factor(config, step / total) for step in range(total)]
        falls = [step for step in range(1, total) if factors[step] < factors[step - 1]]
        assert falls == [3 * steps_per_epoch, 6 * steps_per_epoch, 9 * steps_per_epoch]


def test_step_counts_from_the_start_of_the_run() -> None:
    config = ScheduleConfig(name="step", warmup_fraction=0.2, step_fraction=0.3, gamma=0.5)
    assert [factor(config, progress) for progress in (0.2, 0.29, 0.3, 0.59, 0.6)] == [1, 1, 0.5, 0.5, 0.25]


# ---- pieces


def test_pieces_follow_the_list() -> None:
    # 3e-6 for 30 epochs, 2e-6 for 50, 1e-6 for 100
    config = ScheduleConfig(name="pieces", warmup_fraction=0.0, pieces=((30 / 180, 2 / 3), (80 / 180, 1 / 3)))
    for steps_per_epoch in (1, 13, 50):
        total = 180 * steps_per_epoch
        rates = [3e-6 * factor(config, step / total) for step in range(total)]
        diary = [3e-6] * 30 * steps_per_epoch + [2e-6] * 50 * steps_per_epoch + [1e-6] * 100 * steps_per_epoch
        assert rates == pytest.approx(diary, rel=1e-12)


def test_pieces_may_rise_and_the_last_lasts() -> None:
    config = ScheduleConfig(name="pieces", warmup_fraction=0.0, pieces=((0.2, 0.1), (0.4, 0.9), (0.6, 0.01)))
    factors = [factor(config, progress / 10) for progress in range(11)]
    assert factors == [1, 1, 0.1, 0.1, 0.9, 0.9, 0.01, 0.01, 0.01, 0.01, 0.01]


def test_empty_pieces_are_constant() -> None:
    config = ScheduleConfig(name="pieces", warmup_fraction=0.0, pieces=())
    assert factor(config, 0) == factor(config, 1) == 1


# ---- plateau


def plateau(**fields: Any) -> ScheduleConfig:
    return ScheduleConfig(name="plateau", **fields)


def noisy_scores(seed: int, epochs: int) -> list[float]:
    """Scores that rise, stall and tie, with one NaN in ten."""
    draw = random.Random(seed)
    return [
        float("nan") if draw.random() < 0.1 else round(1 - 0.8**epoch + draw.gauss(0, 0.1), 1)
        for epoch in range(epochs)
    ]


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize(("epochs", "patience"), [(10, 1), (50, 2), (100, 10)])
@pytest.mark.parametrize("seed", range(10))
def test_plateau_matches_torch(seed: int, epochs: int, patience: int, maximize: bool) -> None:
    config = plateau(warmup_fraction=0.0, patience_fraction=patience / epochs, gamma=0.3, final_factor=0.001)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = ReduceLROnPlateau(
        optimizer,
        mode="max" if maximize else "min",
        factor=0.3,
        patience=patience - 1,  # torch's tolerated bad epochs
        threshold=0.0,
        min_lr=0.001,
        eps=0.0,
    )
    scores = [score if maximize else -score for score in noisy_scores(seed, epochs)]
    for epoch, score in enumerate(scores, start=1):
        optimizer.step()
        scheduler.step(score)
        fallen = reductions(config, scores[:epoch], maximize=maximize, epochs=epochs)
        ours = factor(config, epoch / epochs, fallen)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_plateau_is_reduced_after_each_patience() -> None:
    config = plateau(patience_fraction=0.3)  # three of ten epochs
    scores = [0.5, 0.6, 0.6, 0.5, 0.6, 0.1, 0.2, 0.3, 0.7, 0.7]
    counts = [reductions(config, scores[:epoch], maximize=True, epochs=10) for epoch in range(11)]
    assert counts == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_patience_is_at_least_one_epoch() -> None:
    config = plateau(patience_fraction=0.01)
    assert reductions(config, [0.5, 0.4, 0.3], maximize=True, epochs=3) == 2


def test_the_direction_depends_on_the_metric() -> None:
    config = plateau(patience_fraction=0.1)
    assert reductions(config, [3.0, 2.0, 1.0], maximize=False, epochs=10) == 0
    assert reductions(config, [3.0, 2.0, 1.0], maximize=True, epochs=10) == 2


@pytest.mark.parametrize("maximize", [True, False])
def test_nan_is_not_an_improvement(maximize: bool) -> None:
    config = plateau(patience_fraction=0.2)
    nan = float("nan")
    assert reductions(config, [nan, nan, nan, nan], maximize=maximize, epochs=10) == 2
    assert reductions(config, [nan, 0.5, nan, 0.5], maximize=maximize, epochs=10) == 1


def test_plateau_stays_above_its_final_factor() -> None:
    config = plateau(warmup_fraction=0.0, gamma=0.5, final_factor=0.2)
    assert [factor(config, 0.5, count) for count in range(5)] == [1, 0.5, 0.25, 0.2, 0.2]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "plateau"])
def test_other_schedules_have_no_reductions(name: str) -> None:
    config = ScheduleConfig(name=name, patience_fraction=0.1)  # type: ignore[arg-type]
    assert reductions(config, [0.5] * 10, maximize=True, epochs=10) == 0
    assert factor(config, 0.7, reductions=5) == factor(config, 0.7)


# ---- a plateau, replayed


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.1, 0.33])
@pytest.mark.parametrize("final_factor", [0.0, 0.05])
@pytest.mark.parametrize("steps_per_epoch", [1, 7, 33])
def test_a_replayed_plateau_has_the_same_factor_at_every_step(
    maximize: bool, warmup_fraction: float, final_factor: float, steps_per_epoch: int
) -> None:
    epochs = 30
    config = plateau(warmup_fraction=warmup_fraction, final_factor=final_factor, patience_fraction=0.1, gamma=0.3)
    for seed in range(20):
        scores = noisy_scores(seed, epochs)
        again = replayed(config, scores, maximize=maximize, epochs=epochs)
        for step in range(epochs * steps_per_epoch):
            fallen = reductions(config, scores[: step // steps_per_epoch], maximize=maximize, epochs=epochs)
            progress = step / (epochs * steps_per_epoch)
            assert factor(again, progress) == factor(config, progress, fallen)


def test_a_replayed_plateau_consists_of_its_reductions() -> None:
    config = plateau(warmup_fraction=0.1, patience_fraction=0.2, gamma=0.5, final_factor=0.2)
    again = replayed(config, [0.5] + [0.4] * 9, maximize=True, epochs=10)
    # The fourth reduction, at 0.9, has no effect.
    assert again == ScheduleConfig(
        name="pieces",
        warmup_fraction=0.1,
        pieces=((0.3, 0.5), (0.5, 0.25), (0.7, 0.2)),
        patience_fraction=0.2,
        gamma=0.5,
        final_factor=0.2,
    )


@pytest.mark.parametrize("scores", [[], [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.2]])
def test_a_plateau_without_reductions_is_replayed_as_constant(scores: list[float]) -> None:
    config = plateau(warmup_fraction=0.2, patience_fraction=0.25)
    again = replayed(config, scores, maximize=True, epochs=4)
    assert again == config.model_copy(update={"name": "constant"})


def test_a_plateau_reduced_to_zero_can_be_replayed() -> None:
    config = plateau(gamma=1e-9, patience_fraction=0.01)
    again = replayed(config, [0.5] * 100, maximize=True, epochs=100)  # (1e-9)⁹⁹ is no float
    assert 0 < factor(again, 0.99) == factor(config, 0.99, 98) < 1e-300


@pytest.mark.parametrize("name", [name for name in NAMES if name != "plateau"])
def test_other_schedules_are_replayed_unchanged(name: str) -> None:
    config = ScheduleConfig(name=name)  # type: ignore[arg-type]
    assert replayed(config, [0.5] * 10, maximize=True, epochs=10) is config


# ---- smoothing that falls when the validation loss has saturated

SMOOTHED = TrainConfig().override(
    {"epochs": 10, "loss.smoothing": 0.2, "loss.smoothing_final": 0.05, "loss.smoothing_patience_fraction": 0.3}
)


@pytest.mark.parametrize(
    ("losses", "epoch"),
    [
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], None),
        ([1.0, 0.9, 0.9, 0.95, 0.91], 5),  # equal is no better
        ([1.0, 0.9, 0.95, 0.94, 0.8, 0.9, 0.85], None),
        ([1.0, 0.9, 0.95, 0.94, 0.8, 0.9, 0.85, 0.81, 0.1], 8),
        ([math.nan, 1.0, 1.0], None),
        ([], None),
    ],
)
def test_smoothing_falls_after_a_patience_without_a_lower_loss(losses: list[float], epoch: int | None) -> None:
    assert saturated_from(SMOOTHED.loss, losses, epochs=10) == epoch
    better = [-1.0, -2.0, -3.0]
    assert saturated_from(SMOOTHED.loss, losses + better, epochs=10) == epoch, "it does not rise again"


@pytest.mark.parametrize("losses", [[1.0] * 10, [1.0, 0.9, 0.95, 0.94, 0.8, 0.9, 0.85, 0.81, 0.1, 0.1]])
@pytest.mark.parametrize("steps_per_epoch", [1, 7, 33])
def test_a_run_without_validation_repeats_the_smoothing_at_every_step(
    losses: list[float], steps_per_epoch: int
) -> None:
    again = without_validation(SMOOTHED, losses, losses, maximize=False)
    assert again.loss.smoothing_patience_fraction is None
    for step in range(10 * steps_per_epoch):
        saturated = saturated_from(SMOOTHED.loss, losses[: step // steps_per_epoch], epochs=10) is not None
        progress = step / (10 * steps_per_epoch)
        assert smoothing_at(again.loss, progress) == smoothing_at(SMOOTHED.loss, progress, saturated=saturated)


def test_smoothing_that_never_fell_is_repeated_as_constant_and_others_are_unchanged() -> None:
    falling = [1.0 - epoch / 20 for epoch in range(10)]
    again = without_validation(SMOOTHED, falling, falling, maximize=False)
    assert {smoothing_at(again.loss, progress / 10) for progress in range(11)} == {0.2}
    linear = TrainConfig().override({"loss.smoothing": 0.2, "loss.smoothing_final": 0.0, "schedule.name": "plateau"})
    changed = without_validation(linear, [0.5] * 60, [0.5] * 60, maximize=True)
    assert changed.loss == linear.loss
    assert changed.schedule == replayed(linear.schedule, [0.5] * 60, maximize=True, epochs=60)


@pytest.mark.parametrize("field", ["smoothing_final_from", "smoothing_patience_fraction"])
def test_a_time_for_the_final_smoothing_needs_one(field: str) -> None:
    with pytest.raises(ValidationError, match=f"loss.{field} is read only where loss.smoothing_final is given"):
        TrainConfig().override({f"loss.{field}": 0.5})
    with pytest.raises(ValidationError, match="exclude each other"):
        TrainConfig().override(
            {"loss.smoothing_final": 0, "loss.smoothing_final_from": 0.5, "loss.smoothing_patience_fraction": 0.5}
        )


# ---- every schedule


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup_fraction", [0.05, 0.29])
def test_the_warmup_rises_linearly_to_one(name: str, warmup_fraction: float) -> None:
    config = ScheduleConfig(name=name, warmup_fraction=warmup_fraction, warmup_start=0.2)  # type: ignore[arg-type]
    assert factor(config, 0) == pytest.approx(0.2)
    assert factor(config, warmup_fraction / 2) == pytest.approx(0.6)
    assert factor(config, warmup_fraction) == 1


@pytest.mark.parametrize("name", NAMES)
def test_without_warmup_the_first_step_is_at_the_peak(name: str) -> None:
    assert factor(ScheduleConfig(name=name, warmup_fraction=0.0), 0) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "end"), [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)])
def test_the_run_ends_at_the_final_factor_unless_constant(name: str, end: float) -> None:
    config = ScheduleConfig(name=name, final_factor=0.1)  # type: ignore[arg-type]
    assert factor(config, 1) == pytest.approx(end)


@pytest.mark.parametrize("name", NAMES)
def test_the_factor_never_rises_after_the_warmup(name: str) -> None:
    config = ScheduleConfig(name=name, final_factor=0.3)  # type: ignore[arg-type]
    factors = [factor(config, progress / 1000) for progress in range(50, 1001)]
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
def test_progress_outside_the_run_is_refused(progress: float) -> None:
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        factor(ScheduleConfig(), progress)
