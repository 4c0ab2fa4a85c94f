"""`train(left_s=…)`: where the remaining epochs do not fit the time, the rest of the schedule is compressed into fewer.

The clock of these tests ticks whenever it is read, twice an epoch: an epoch takes two seconds.
"""

from __future__ import annotations

import math
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import core.averaging
import core.loop.run
from core.averaging import ExponentialAveraging
from core.config import TrainConfig
from core.data import Splits
from core.loop import EpochMetrics, TrainResult, train
from tests.core.trainings import CPU, same

EPOCH_S = 2.0
ENOUGH = 1e6


@pytest.fixture
def progress(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The progress of every step, by the schedule."""
    ticks, seen, factor = count(), list[float](), core.loop.run.factor_of
    monkeypatch.setattr(core.loop.run, "clock", lambda _: float(next(ticks)))

    def spied(config: TrainConfig, now: float, reductions: int) -> float:
        seen.append(now)
        return factor(config, now, reductions)

    monkeypatch.setattr(core.loop.run, "factor_of", spied)
    return seen


@pytest.fixture
def six(tiny: TrainConfig) -> TrainConfig:
    return tiny.override({"epochs": 6, "averaging.name": "ema"})


def limited(config: TrainConfig, digits: Splits, left: dict[int, float], **options: Any) -> TrainResult:
    """Train with these seconds left after so many epochs, else with enough."""
    done = [0]

    def on_epoch_end(now: EpochMetrics) -> None:
        done[0] = now.epoch
        if now.epoch == options.get("cut"):
            raise KeyboardInterrupt

    more = {name: value for name, value in options.items() if name != "cut"}
    return train(
        config,
        digits,
        device=CPU,
        on_epoch_end=on_epoch_end,
        on_resume=lambda history: done.__setitem__(0, len(history)),
        left_s=lambda: left.get(done[0], ENOUGH),
        **more,
    )


@pytest.mark.usefixtures("progress")
def test_enough_time_changes_nothing(six: TrainConfig, digits: Splits) -> None:
    assert same(limited(six, digits, {}), train(six, digits, device=CPU))


def test_without_enough_time_the_schedule_still_runs_to_its_end(
    six: TrainConfig, digits: Splits, progress: list[float]
) -> None:
    result = limited(six, digits, {2: 2.5 * EPOCH_S, 3: 1.4 * EPOCH_S})
    assert len(result.history) == 4
    steps = len(progress) // 4
    expected = [step / (6 * steps) for step in range(2 * steps)]
    expected += [2 / 6 + (1 - 2 / 6) * step / (2 * steps) for step in range(2 * steps)]
    assert progress == pytest.approx(expected)
    assert result.kept.epoch == 4
    assert result.history[-1].averaged is not None


def test_an_average_has_the_same_number_of_half_lives_in_a_compressed_run(
    six: TrainConfig, digits: Splits, progress: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core.averaging, "WARMUP_OFFSET", 1)  # no smaller decay at the first updates
    decays, weight_of = list[float](), ExponentialAveraging.next_weight
    monkeypatch.setattr(
        ExponentialAveraging, "next_weight", lambda self: decays.append(1 - weight_of(self)) or weight_of(self)
    )
    half_life = six.averaging.half_life_fraction
    for left in ({}, {1: 2 * EPOCH_S, 2: EPOCH_S}):
        decays.clear(), progress.clear()
        limited(six, digits, left)
        assert len(decays) == len(progress)
        assert sum(map(math.log2, decays)) == pytest.approx(-1 / half_life)


def test_time_that_comes_back_is_used_up_to_the_planned_epochs(
    six: TrainConfig, digits: Splits, progress: list[float]
) -> None:
    result = limited(six, digits, {1: EPOCH_S, 2: ENOUGH})
    assert len(result.history) == 2, "one epoch was left, and it ended the schedule"
    progress.clear()
    result = limited(six, digits, {1: 3 * EPOCH_S})
    assert len(result.history) == 6
    assert all(before < after < 1 for before, after in pairwise(progress))


def test_one_epoch_follows_even_without_any_time(six: TrainConfig, digits: Splits, progress: list[float]) -> None:
    result = limited(six, digits, {3: -100.0})
    assert len(result.history) == 4
    assert progress[-1] > 0.95 - 1 / (len(progress) / 4)


def test_a_part_of_the_schedule_ends_where_it_would_have(
    six: TrainConfig, digits: Splits, progress: list[float]
) -> None:
    result = limited(six, digits, {1: 2 * EPOCH_S}, stop_after=5)
    steps = len(progress) // len(result.history)
    assert len(result.history) == 5, "before the next epoch there is enough time again"
    ends = [progress[steps * epoch - 1] for epoch in (1, 5)]
    assert ends[0] < 1 / 6
    assert ends[1] < 5 / 6


@pytest.mark.usefixtures("progress")
@pytest.mark.parametrize("averaging", ["ema", "swa"])
def test_a_resumed_training_is_compressed_as_the_uninterrupted_one(
    averaging: str, six: TrainConfig, digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core.loop.run, "CHECKPOINT_SHARE", float("inf"))
    config, left = six.override({"averaging.name": averaging}), {2: 2 * EPOCH_S, 3: EPOCH_S}
    whole, file = limited(config, digits, left), tmp_path / "x.pt"
    with pytest.raises(KeyboardInterrupt):
        limited(config, digits, left, cut=3, checkpoint_to=file)
    resumed = limited(config, digits, left, resume_from=file, checkpoint_to=file, checkpoint_at_end=True)
    assert len(whole.history) == 4
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor)
    again = limited(config, digits, {}, resume_from=file)
    assert len(again.history) == 4, "a finished training is not continued when there is time again"
