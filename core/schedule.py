"""The learning rate over a run, as a factor of its peak: a pure function of how much of the run is over.

A warm-up that rises linearly (Goyal et al. 2017, arXiv 1706.02677), then half a cosine without restarts (Loshchilov and
Hutter 2017, arXiv 1608.03983), a straight line, or nothing. Being a function of progress alone, it has no state to
save, and a run of 200 epochs has the same schedule at 3.
"""

from __future__ import annotations

import math

from core.config import ScheduleConfig


def factor(config: ScheduleConfig, progress: float) -> float:
    """The learning rate as a factor of its peak, in [0, 1].

    Args:
        config: the schedule.
        progress: the share of the run's steps that are over, in [0, 1]; the first step's is 0.

    Raises:
        ValueError: `progress` lies outside [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress {progress} lies outside [0, 1]")
    if progress < config.warmup_fraction:
        return config.warmup_start + (1 - config.warmup_start) * progress / config.warmup_fraction
    if config.name == "constant":
        return 1.0
    fallen = (progress - config.warmup_fraction) / (1 - config.warmup_fraction)
    remaining = 1 - fallen if config.name == "linear" else (1 + math.cos(math.pi * fallen)) / 2
    return config.final_factor + (1 - config.final_factor) * remaining
