"""Learning-rate schedules: a factor of the peak rate that depends on the progress of the run alone.

Only a `plateau`, and label smoothing with `smoothing_patience_fraction`, also depend on past validation. A run without
validation images repeats an earlier run (`without_validation`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from core.config import LossConfig, ScheduleConfig, TrainConfig

# Progress is a rounded quotient: 0.9 / 0.3 may be less than 3. More than that error, less than a step of up to 10⁹.
_ROUNDING = 1e-9


def factor_of(config: TrainConfig, progress: float, reductions: int = 0) -> float:
    """Return the learning rate as a factor of its peak, with the tail that SWA holds; see `factor`."""
    swa = config.averaging
    if swa.name != "swa":
        return factor(config.schedule, progress, reductions)
    return factor(config.schedule, progress, reductions, end=swa.swa_start_fraction, last=swa.swa_factor)


def factor(
    config: ScheduleConfig, progress: float, reductions: int = 0, *, end: float = 1.0, last: float | None = None
) -> float:
    """Return the learning rate as a factor of its peak, in [0, 1].

    Args:
        config: the schedule.
        progress: the completed fraction of the run's steps.
        reductions: those of a `plateau` so far.
        end: the progress at which cosine and linear schedules have fallen, and from which they are constant.
        last: their factor then; `final_factor` by default.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress {progress} is outside [0, 1]")
    if progress < config.warmup_fraction:
        return config.warmup_start + (1 - config.warmup_start) * progress / config.warmup_fraction
    if config.name == "constant":
        return 1.0
    if config.name == "step":
        return float(config.gamma ** math.floor((progress + _ROUNDING) / config.step_fraction))
    if config.name == "pieces":
        return next((value for start, value in reversed(config.pieces) if start <= progress + _ROUNDING), 1.0)
    if config.name == "plateau":
        return _reduced(config, reductions)
    last = config.final_factor if last is None else last
    if progress >= end:
        return last
    fallen = (progress - config.warmup_fraction) / (end - config.warmup_fraction)
    remaining = 1 - fallen if config.name == "linear" else (1 + math.cos(math.pi * fallen)) / 2
    return last + (1 - last) * remaining


def reductions(config: ScheduleConfig, scores: Sequence[float], *, maximize: bool, epochs: int) -> int:
    """Return the number of reductions of a `plateau` so far; 0 for other schedules.

    As torch's ReduceLROnPlateau with a `patience` of one epoch fewer, a threshold of 0 and no cooldown. NaN is not an
    improvement.
    """
    return len(_falls(config, scores, maximize, epochs))


def saturated_from(config: LossConfig, losses: Sequence[float], *, epochs: int) -> int | None:
    """Return the epoch, counted from 1, after which smoothing is `smoothing_final`; None if not yet or never.

    Args:
        config: with `smoothing_patience_fraction`, else the result is None.
        losses: the validation losses so far.
        epochs: those of the run.
    """
    if config.smoothing_patience_fraction is None:
        return None
    return next(iter(_stalls([-loss for loss in losses], config.smoothing_patience_fraction, epochs)), None)


def without_validation(
    config: TrainConfig, scores: Sequence[float], losses: Sequence[float], *, maximize: bool
) -> TrainConfig:
    """Return the configuration that repeats a run with these validation scores and losses, without validation."""
    schedule = replayed(config.schedule, scores, maximize=maximize, epochs=config.epochs)
    after, changed = saturated_from(config.loss, losses, epochs=config.epochs), {}
    if after is not None and after < config.epochs:
        changed = {"smoothing_patience_fraction": None, "smoothing_final_from": after / config.epochs}
    elif config.loss.smoothing_patience_fraction is not None:
        changed = {"smoothing_patience_fraction": None, "smoothing_final": None}
    loss = LossConfig.model_validate(config.loss.model_dump() | changed)
    return config.model_copy(update={"schedule": schedule, "loss": loss})


def replayed(config: ScheduleConfig, scores: Sequence[float], *, maximize: bool, epochs: int) -> ScheduleConfig:
    """Return the schedule that repeats a `plateau` with these scores at every step; others are unchanged."""
    if config.name != "plateau":
        return config
    pieces: list[tuple[float, float]] = []
    lowest = 1.0
    for count, epoch in enumerate(_falls(config, scores, maximize, epochs), start=1):
        reduced = _reduced(config, count)
        if epoch < epochs and reduced < lowest:
            pieces.append((epoch / epochs, reduced))
            lowest = reduced
    changed = {"name": "pieces", "pieces": tuple(pieces)} if pieces else {"name": "constant"}
    return ScheduleConfig.model_validate(config.model_dump() | changed)


def _falls(config: ScheduleConfig, scores: Sequence[float], maximize: bool, epochs: int) -> list[int]:
    """Epochs, counted from 1, at the end of which a `plateau` is reduced."""
    if config.name != "plateau":
        return []
    return _stalls([score if maximize else -score for score in scores], config.patience_fraction, epochs)


def _stalls(gains: Sequence[float], patience_fraction: float, epochs: int) -> list[int]:
    """Epochs, counted from 1, at which the patience has passed without a higher gain, or since the one before."""
    patience = max(1, round(patience_fraction * epochs))
    best, bad, stalls = -math.inf, 0, []
    for epoch, gain in enumerate(gains, start=1):
        if gain > best:
            best, bad = gain, 0
        else:
            bad += 1
        if bad == patience:
            stalls.append(epoch)
            bad = 0
    return stalls


def _reduced(config: ScheduleConfig, count: int) -> float:
    """Factor after `count` reductions; above 0, as `pieces` require."""
    return max(float(config.gamma**count), config.final_factor, sys.float_info.min)
