"""Learning-rate schedules, as a factor of the peak rate that depends on the progress of the run alone.

A linear warm-up (Goyal et al. 2017, arXiv 1706.02677) is followed by half a cosine (Loshchilov and Hutter 2017, arXiv
1608.03983), a line, a constant, or reductions: regular (`step`, torch's StepLR), listed (`pieces`; He et al. 2016,
arXiv 1512.03385), or when validation stops improving (`plateau`, torch's ReduceLROnPlateau), recomputed from the
history of scores. A run without validation images uses `replayed`, the reductions of an earlier run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from core.config import ScheduleConfig

# Progress is a rounded quotient: 0.9 / 0.3 may be less than 3. Reductions apply this fraction of the run early, which
# is more than the rounding error and less than one step of up to 10⁹.
_ROUNDING = 1e-9


def factor(config: ScheduleConfig, progress: float, reductions: int = 0) -> float:
    """Return the learning rate as a factor of its peak, in [0, 1].

    `progress` is the completed fraction of the run's steps. A `plateau` needs the number of `reductions`.

    Raises:
        ValueError: `progress` is outside [0, 1].
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
    fallen = (progress - config.warmup_fraction) / (1 - config.warmup_fraction)
    remaining = 1 - fallen if config.name == "linear" else (1 + math.cos(math.pi * fallen)) / 2
    return config.final_factor + (1 - config.final_factor) * remaining


def reductions(config: ScheduleConfig, scores: Sequence[float], *, maximize: bool, epochs: int) -> int:
    """Return the number of reductions of a `plateau` schedule so far; 0 for other schedules.

    The factor is reduced after `patience_fraction` of the run (rounded to epochs, at least one) without an improvement
    over the best of `scores`; NaN is not an improvement. This is torch's ReduceLROnPlateau with a `patience` of one
    epoch fewer, a threshold of 0 and no cooldown.
    """
    return len(_falls(config, scores, maximize, epochs))


def replayed(config: ScheduleConfig, scores: Sequence[float], *, maximize: bool, epochs: int) -> ScheduleConfig:
    """Return the schedule for a run without validation images, from the scores of an earlier run.

    A `plateau` becomes the `pieces` with the same factor at every step, or `constant` if it was never reduced. Other
    schedules are unchanged.
    """
    if config.name != "plateau":
        return config
    pieces: list[tuple[float, float]] = []
    lowest = 1.0
    for count, epoch in enumerate(_falls(config, scores, maximize, epochs), start=1):
        reduced = _reduced(config, count)
        if epoch < epochs and reduced < lowest:  # no effect at the end of the run or at the lowest factor
            pieces.append((epoch / epochs, reduced))
            lowest = reduced
    changed = {"name": "pieces", "pieces": tuple(pieces)} if pieces else {"name": "constant"}
    return ScheduleConfig.model_validate(config.model_dump() | changed)


def _falls(config: ScheduleConfig, scores: Sequence[float], maximize: bool, epochs: int) -> list[int]:
    """Epochs, counted from 1, at the end of which a `plateau` schedule is reduced."""
    if config.name != "plateau":
        return []
    patience = max(1, round(config.patience_fraction * epochs))
    best, bad, falls = -math.inf, 0, []
    for epoch, score in enumerate(scores, start=1):
        gain = score if maximize else -score
        if gain > best:
            best, bad = gain, 0
        else:
            bad += 1
        if bad == patience:
            falls.append(epoch)
            bad = 0
    return falls


def _reduced(config: ScheduleConfig, count: int) -> float:
    """Factor of a `plateau` after `count` reductions; above 0, as `pieces` require."""
    return max(float(config.gamma**count), config.final_factor, sys.float_info.min)
