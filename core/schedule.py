"""The learning rate over a run, as a factor of its peak: a pure function of how much of the run is over.

A warm-up that rises linearly (Goyal et al. 2017, arXiv 1706.02677), then half a cosine without restarts (Loshchilov and
Hutter 2017, arXiv 1608.03983), a straight line, nothing, or falls: by the same factor every so often (`step`, torch's
StepLR), as written down (`pieces`; He et al. 2016, arXiv 1512.03385, divide by 10 at half and three quarters of their
CIFAR-10 runs), or where validation stops improving (`plateau`, torch's ReduceLROnPlateau; He et al. for ImageNet). The
warm-up goes first, and the falls are where they would be without it.

Being a function of progress alone, a schedule has no state to save, and a run of 200 epochs has the same one at 3.
`plateau` depends on the scores so far too, and on nothing else: `reductions` counts its falls anew from them, so that
the history of a run, which a checkpoint holds, is all its state. A run without validation images has no scores, and
follows instead what they led to elsewhere: `replayed`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from core.config import ScheduleConfig

# Progress is step / steps, rounded: 0.9 / 0.3 may be less than 3. A fall comes this share of the run early, which is
# less than one step in runs of up to 10⁹ steps, and far more than the rounding.
_ROUNDING = 1e-9


def factor(config: ScheduleConfig, progress: float, reductions: int = 0) -> float:
    """The learning rate as a factor of its peak, in [0, 1].

    Args:
        config: the schedule.
        progress: the share of the run's steps that are over, in [0, 1]; the first step's is 0.
        reductions: how often a `plateau` schedule has fallen: what `reductions` says. The others do not ask.

    Raises:
        ValueError: `progress` lies outside [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress {progress} lies outside [0, 1]")
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
    """How often a `plateau` schedule has fallen after these epochs; 0 for the other schedules.

    It falls after `patience_fraction` of the run, rounded to epochs and at least one, in which no score was better than
    the best before, and then counts anew against the same best: torch's ReduceLROnPlateau with a `patience` of one
    epoch fewer, which are the bad epochs that torch still tolerates, a threshold of 0 and no cooldown. Early stopping
    counts its patience alike.

    Args:
        config: the schedule.
        scores: the validation score of each epoch so far; one that is not a number is not better.
        maximize: whether more is better.
        epochs: those of the whole run.
    """
    return len(_falls(config, scores, maximize, epochs))


def replayed(config: ScheduleConfig, scores: Sequence[float], *, maximize: bool, epochs: int) -> ScheduleConfig:
    """The schedule for a run without validation images: a `plateau` as what it turned out to be in this one.

    Args:
        config: the schedule of the run that had them; any but `plateau` is returned unchanged.
        scores: that run's validation scores, as for `reductions`.
        maximize: whether more is better.
        epochs: those of that run.

    Returns:
        The `pieces` of the same factor at every step, or `constant` where it never fell; the warm-up is kept.
    """
    if config.name != "plateau":
        return config
    pieces: list[tuple[float, float]] = []
    lowest = 1.0
    for count, epoch in enumerate(_falls(config, scores, maximize, epochs), start=1):
        reduced = _reduced(config, count)
        if epoch < epochs and reduced < lowest:  # a fall at the run's end, or at the lowest factor, changes nothing
            pieces.append((epoch / epochs, reduced))
            lowest = reduced
    changed = {"name": "pieces", "pieces": tuple(pieces)} if pieces else {"name": "constant"}
    return ScheduleConfig.model_validate(config.model_dump() | changed)


def _falls(config: ScheduleConfig, scores: Sequence[float], maximize: bool, epochs: int) -> list[int]:
    """The epochs, counted from 1, at whose end a `plateau` schedule falls."""
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
    """A `plateau`'s factor after that many falls; never quite 0, which no piece of `replayed` could say."""
    return max(float(config.gamma**count), config.final_factor, sys.float_info.min)
