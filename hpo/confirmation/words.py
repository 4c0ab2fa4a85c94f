"""Intervals of a confirmation as text."""

from __future__ import annotations

import math
from dataclasses import replace

from hpo.confirmation.statistics import Interval

NO_GAIN = "no significant gain"
"""Beginning of a verdict if the baseline wins."""

_DECIMALS, _MOST_DECIMALS = 3, 6


def score(interval: Interval | None) -> str:
    """Format a score: "0.912 ± 0.004 (n = 5)"."""
    if interval is None:
        return "no score"
    return f"{plus_minus(interval)} (n = {interval.n}{'' if math.isfinite(interval.half_width) else ', no interval'})"


def plus_minus(interval: Interval) -> str:
    """Format a mean with its half width: "0.912 ± 0.004"; without a half width, the mean alone.

    There are enough decimals to compare the half width with zero and with the mean.
    """
    if not math.isfinite(interval.half_width):
        return f"{interval.mean:.{_DECIMALS}f}"
    for decimals in range(_DECIMALS, _MOST_DECIMALS + 1):
        mean, half = round(interval.mean, decimals), round(interval.half_width, decimals)
        if half > 0 and (abs(mean) > half) == (abs(interval.mean) > interval.half_width):
            break
    return f"{interval.mean:.{decimals}f} ± {interval.half_width:.{decimals}f}"


def beside_the_baseline(ahead: Interval) -> str:
    """Describe the advantage of a challenger that does not win: "beats the baseline by 0.003 ± 0.006 (n = 5)"."""
    size = plus_minus(replace(ahead, mean=abs(ahead.mean)))
    if float(size.partition(" ")[0]) == 0:  # as displayed
        compared = f"equals the baseline, {size}"
    else:
        compared = f"{'beats' if ahead.mean > 0 else 'is worse than'} the baseline by {size}"
    if math.isfinite(ahead.half_width):
        return f"{compared} (n = {ahead.n})"
    reason = "one replicate gives" if ahead.n < 2 else "equal differences give"
    return f"{compared} (n = {ahead.n}; {reason} no interval)"
