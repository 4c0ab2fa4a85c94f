"""Two measures of a pruner's safety: does the order at a rung predict the final order, and what did pruning lose?

The first is Spearman's rank correlation among the trials that ran to the end, a selected sample. The second comes from
the trials that `pruner.let_through` lets continue, a fair sample.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from hpo.analysis.study_data import StudyData, value_of
from hpo.space.pruner import goodness_at
from hpo.trials import LET_THROUGH

_FEWEST = 4  # trials; the variance of a rank correlation divides by n - 3
_Z95 = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Agreement:
    """Agreement of a rung's order with the final one, among complete trials."""

    rung: int
    points: tuple[tuple[float, float], ...]
    """(value at the rung, final value) of each trial that has both."""
    rho: float | None
    """Spearman's rank correlation, with what the rung ranks by; None for fewer than three trials, or equal values."""
    interval: tuple[float, float] | None
    """Its 95 % interval; None for fewer than four trials, or a perfect agreement."""


@dataclass(frozen=True)
class LetThrough:
    """A trial that continued past the rung that would have pruned it."""

    trial: FrozenTrial
    rung: int
    gain: float | None
    """Improvement of its final value over the best of all others; None if it has none."""


def agreement(data: StudyData, rung: int) -> Agreement:
    """Compare the order at a rung with the final order."""
    trials = [trial for trial in data.complete if math.isfinite(trial.intermediate_values.get(rung, math.nan))]
    points = tuple((trial.intermediate_values[rung], value_of(trial)) for trial in trials)
    sign = data.study.sign
    rho = spearman(goodness_at(trials, rung, sign), [sign * final for _, final in points])
    return Agreement(rung, points, rho, None if rho is None else fisher_interval(rho, len(points)))


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None for fewer than three pairs, or equal values."""
    from scipy.stats import spearmanr

    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(spearmanr(a, b).statistic)


def fisher_interval(rho: float, n: int) -> tuple[float, float] | None:
    """The 95 % interval of a rank correlation of n pairs; None for few pairs or a perfect correlation.

    Fisher's z with the variance (1 + rho² / 2) / (n - 3) of Bonett and Wright (2000, Psychometrika 65).
    """
    if n < _FEWEST or abs(rho) > 1 - 1e-12:
        return None
    half = _Z95 * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)


def fraction_interval(k: int, n: int) -> tuple[float, float]:
    """The exact 95 % interval of a probability (Clopper and Pearson 1934), given k successes in n."""
    from scipy.stats import binomtest

    found = binomtest(k, n).proportion_ci(method="exact")
    return float(found.low), float(found.high)


def let_through(data: StudyData) -> list[LetThrough]:
    """The trials let through, compared with the best of the others."""
    others = [value_of(trial) for trial in data.complete if LET_THROUGH not in trial.user_attrs]
    best = (max if data.maximize else min)(others, default=None)
    return [
        LetThrough(
            trial,
            int(trial.user_attrs[LET_THROUGH]),
            data.gain(value_of(trial), best) if trial.state == TrialState.COMPLETE and best is not None else None,
        )
        for trial in data.trials
        if LET_THROUGH in trial.user_attrs
    ]
