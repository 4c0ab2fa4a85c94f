"""The statistics of a confirmation: intervals, early stopping and the comparison with the baseline.

A replicate is a seed and a split with which every configuration is trained, so configurations are compared in pairs.
The splits are the folds of a repeated k-fold. Their training images overlap, and across repeats their validation
images, so the variance of a mean is corrected (Nadeau and Bengio 2003, Machine Learning 52; Bouckaert and Frank 2004,
PAKDD), see `effective_share`. The interval of the leader's advantage holds for all challengers at once (Bonferroni),
and their spreads are pooled with its own, as in the moderated t (Smyth 2004, Stat. Appl. Genet. Mol. Biol. 3).

The score of a configuration in the search does not count. The finalists were selected by it, recipes are ranked by it,
and the baseline is not: their differences would be too high by the optimism of the best of many (Cawley and Talbot
2010, JMLR 11). A trial at a rung and the mean over neighbours are the same scores.

What is claimed follows the interval, and what is refitted the expectation: the leader is the better bet as soon as it
is ahead, proven or not. Its expected gain is its lead, shrunk by the noise of the means (Carvalho, Polson and Scott
2010, Biometrika 97). The documentation (`honest-winner.md`) has simulations of both.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated

from pydantic import BeforeValidator

Scores = Mapping[int, tuple[float, ...]]
"""The value of each fold (one without folds) by replicate; NaN if the training failed."""

CONFIDENCE = 0.95
RACE_ERROR = 0.2
"""Bound on the error of all looks of a race together, see `cannot_win`."""
MIN_REPLICATES = 3  # with two, t's quantiles are useless
FIRST_REPLICATES = 10
MAX_REPLICATES = 20  # with a quarter of the images for validation, twice as many would narrow an interval by 7 %
LENT_AT_MOST = 2.0
"""Limit of the pooled spread, relative to the leader's: a challenger that sometimes fails is very noisy."""
MAX_CANDIDATES = 6  # five finalists and the baseline: every further one widens the interval of the leader
MAX_TRAININGS = MAX_CANDIDATES * FIRST_REPLICATES

WITHIN_REPEAT = 0.5
"""Correlation of two folds of a repeat, relative to that of two free splits. Folds share no validation image, only most
of their training images. With it, intervals cover as often as with free splits (`bench_splits.py`)."""

_CERTAIN = 500.0  # larger arguments may overflow
_EQUAL = 1e-12  # deviations up to this are rounding errors; scores and losses are of the order of 1


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval."""

    mean: float
    half_width: Annotated[float, BeforeValidator(lambda value: math.inf if value is None else value)]
    """`math.inf` (null in JSON) if the spread is unknown: one replicate, or only equal values."""
    n: int
    """Number of replicates."""

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def corrected_interval(
    values: Sequence[float],
    *,
    test_share: float,
    replicates: int | None = None,
    confidence: float = CONFIDENCE,
    comparisons: int = 1,
    resolution: float = 0.0,
    others: Sequence[Sequence[float]] = (),
) -> Interval:
    """Compute the corrected resampled t interval: t · s · sqrt(1/n + test_share), with n - 1 degrees of freedom.

    Args:
        values: n finite scores or differences of scores; k per replicate with k folds.
        test_share: Validation images / training images of one split; 0 for independent values.
        replicates: Number of replicates behind the values; n by default.
        confidence: Two-sided, in (0, 1).
        comparisons: Number of intervals that hold at once (Bonferroni).
        resolution: Step of a value, and least s: 1 / validation images for a share of them; 0 for a loss, and equal
            values then have an infinite interval.
        others: Samples whose pooled variance is averaged with the values', by degrees of freedom up to their own.

    Raises:
        ValueError: There are no values, one is not finite, or an argument is out of range.
    """
    n = len(values)
    replicates = n if replicates is None else replicates
    if n == 0 or not all(map(math.isfinite, values)):
        raise ValueError(f"an interval needs at least one value, and all of them finite, not {list(values)}")
    if test_share < 0 or resolution < 0 or not 0 < confidence < 1 or comparisons < 1 or not 1 <= replicates <= n:
        raise ValueError(
            f"out of range: test_share {test_share}, resolution {resolution}, confidence {confidence}, "
            f"{comparisons} comparisons, {replicates} replicates of {n} values"
        )
    mean = fmean(values)
    if replicates < 2:
        return Interval(mean, math.inf, replicates)
    squares, freedom = _squares(values), n - 1
    lent = sum(len(other) - 1 for other in others)
    if lent > 0:
        weight = min(lent, freedom)
        own = max(squares / freedom, resolution**2)
        squares += weight * min(math.fsum(map(_squares, others)) / lent, LENT_AT_MOST**2 * own)
        freedom += weight
    spread = max(math.sqrt(squares / freedom), resolution)
    if spread == 0:
        return Interval(mean, math.inf, replicates)
    from scipy.special import stdtrit  # takes a third of a second to import

    quantile = float(stdtrit(freedom, 1 - (1 - confidence) / (2 * comparisons)))
    return Interval(mean, quantile * spread * math.sqrt(1 / n + test_share), replicates)


def effective_share(numbers: Sequence[int], *, test_share: float, per_repeat: int) -> float:
    """Compute the `test_share` that corrects the mean of these values: r / (1 - r), with the mean correlation r of two.

    Free splits have the r of Nadeau and Bengio, test_share / (1 + test_share), and folds of the same repeat
    `WITHIN_REPEAT` of it.

    Args:
        numbers: The replicate of each value; of several folds each.
        test_share: Validation images / training images of one split.
        per_repeat: Number of replicates whose splits are disjoint, from each multiple of it; 1 if all are free.
    """
    pairs = math.comb(len(numbers), 2)
    within = sum(math.comb(each, 2) for each in Counter(number // per_repeat for number in numbers).values())
    correlation = test_share / (1 + test_share)
    correlation *= 1 - (1 - WITHIN_REPEAT) * within / max(pairs, 1)
    return correlation / (1 - correlation)


def _squares(values: Sequence[float]) -> float:
    """Sum of the squared deviations from the mean; 0 if they are rounding errors."""
    mean = fmean(values)
    squares = [(value - mean) ** 2 for value in values]
    return math.fsum(squares) if max(squares) > _EQUAL**2 else 0.0


@dataclass(frozen=True)
class Paired:
    """The differences of two configurations in their common replicates."""

    values: tuple[float, ...]
    """One per fold of each common replicate, in the order of the replicates."""
    numbers: tuple[int, ...]
    """The replicate of each value."""

    @property
    def replicates(self) -> int:
        return len(set(self.numbers))

    @property
    def mean(self) -> float:
        return fmean(self.values)


def paired(a: Scores, b: Scores, *, maximize: bool = True) -> Paired:
    """Subtract the scores of `b` from those of `a`, or vice versa if lower scores are better."""
    common, sign = sorted(set(a) & set(b)), 1 if maximize else -1
    values = (sign * (x - y) for replicate in common for x, y in zip(a[replicate], b[replicate], strict=True))
    return Paired(tuple(values), _numbers({replicate: a[replicate] for replicate in common}))


def _numbers(scores: Scores) -> tuple[int, ...]:
    return tuple(replicate for replicate in sorted(scores) for _ in scores[replicate])


def failed(scores: Scores) -> bool:
    """Whether a training gave no score."""
    return not all(math.isfinite(value) for values in scores.values() for value in values)


def own_score(scores: Scores, *, test_share: float, per_repeat: int = 1, resolution: float = 0.0) -> Interval | None:
    """Compute the interval of a configuration's score; None without scores, or if a training failed."""
    values = [value for replicate in sorted(scores) for value in scores[replicate]]
    if not values or failed(scores):
        return None
    share = effective_share(_numbers(scores), test_share=test_share, per_repeat=per_repeat)
    return corrected_interval(values, test_share=share, replicates=len(scores), resolution=resolution)


def cannot_win(
    candidate: Scores,
    others: Mapping[str, Scores],
    *,
    test_share: float,
    maximize: bool,
    per_repeat: int = 1,
    resolution: float = 0.0,
) -> str | None:
    """Explain why a candidate needs no further training; None if it may still win.

    A one-sided paired test compares it with the one of the others that is ahead by most, after each common replicate
    from the third on. Look k has the error `RACE_ERROR` / (k (k + 1)). These add up to less than `RACE_ERROR` however
    many looks there are, so the race may end at any time (a union bound, as in the successive elimination of Even-Dar,
    Mannor and Mansour 2006, JMLR 7; races go back to Maron and Moore 1994, NIPS 6). The number of others is not
    corrected for. In simulations the best is stopped in 3 to 4 % (`bench_confirm.py --simulate`).
    """
    if failed(candidate):
        return "one of its trainings gave no score"
    ahead = {
        name: lead
        for name, scores in others.items()
        if (lead := paired(scores, candidate, maximize=maximize)).replicates >= MIN_REPLICATES and not failed(scores)
    }
    if not ahead:
        return None
    leader = max(ahead, key=lambda name: ahead[name].mean)
    look = ahead[leader].replicates - MIN_REPLICATES + 1
    error = RACE_ERROR / (look * (look + 1))
    gap = corrected_interval(
        ahead[leader].values,
        test_share=effective_share(ahead[leader].numbers, test_share=test_share, per_repeat=per_repeat),
        replicates=ahead[leader].replicates,
        confidence=1 - 2 * error,  # only the lower end is used
        resolution=resolution,
    )
    if gap.low <= 0:
        return None
    sure = f"by at least {gap.low:.4f} at {100 * (1 - error):.3g} %"
    return f"worse than {leader} by {gap.mean:.4f} over {gap.n} replicates, {sure}"


@dataclass(frozen=True)
class Allocation:
    """The number of configurations, the baseline included, and of replicates to begin with."""

    candidates: int
    replicates: int

    @property
    def trainings(self) -> int:
        return self.candidates * self.replicates


def allocate(*, budget_trainings: int, candidates: int, least: int = MIN_REPLICATES) -> Allocation:
    """Spend a budget of whole trainings on candidates, the baseline included, and replicates.

    The favourite and the baseline are trained up to five times; then two or three challengers, four times each; then up
    to five, five times each; then all more often, up to ten times. All five from the start would choose a little better
    with fewer than 30 trainings, and prove less (`bench_confirm.py --simulate`).

    Args:
        least: Replicates of the favourite and the baseline, even beyond the budget.
    """
    if candidates < 1:
        raise ValueError("there is no configuration to confirm")
    chosen = min(candidates, MAX_CANDIDATES, max(2, min(4, budget_trainings // 4), budget_trainings // 5))
    return Allocation(chosen, max(least, min(FIRST_REPLICATES, budget_trainings // chosen)))


@dataclass(frozen=True)
class Comparison:
    """The result of comparing all configurations with the baseline; see `Confirmation`."""

    leader: str | None
    """The best challenger that was neither stopped nor failed."""
    winner: str
    scores: dict[str, Interval]
    """The score of each configuration that has one."""
    advantage: Interval | None
    expected: float | None
    """Expected gain of the leader over the baseline (positive: better), see `shrinkage`."""
    evidence: bool


def shrinkage(means: Sequence[float], variance: float) -> float:
    """Compute the share of the differences between means that is expected to remain, in (0, 1).

    The true scores are normal around a common mean, with a half-Cauchy prior on their spread whose scale is the noise
    of a mean. So the weight of the noise has a Beta(1/2, 1/2) prior, and the share an expectation in closed form.

    Args:
        means: k means, at least 2, of equal noise.
        variance: Of a mean's noise; infinity if it is unknown, and the share is then 1 / (k + 1).
    """
    from scipy.special import hyp1f1  # takes a third of a second to import

    k, half_squares = len(means), _squares(means) / (2 * variance) if variance else math.inf
    if half_squares > _CERTAIN:
        return 1 - k / 2 / half_squares
    # Kummer's transformation of 1F1(k/2; …; -half_squares), whose terms are all positive.
    numerator, denominator = hyp1f1(1.5, k / 2 + 1.5, half_squares), hyp1f1(0.5, k / 2 + 0.5, half_squares)
    return float(numerator / denominator) / (k + 1)


def compare(
    scores: Mapping[str, Scores],
    *,
    baseline: str,
    stopped: Collection[str],
    test_share: float,
    maximize: bool,
    per_repeat: int = 1,
    resolution: float = 0.0,
    margin: float = 0.0,
) -> Comparison:
    """Choose the best challenger, estimate its gain, and test whether it beats the baseline.

    Args:
        scores: Of all configurations, also failed and stopped ones, since the interval of the best allows for them.
        per_repeat: See `effective_share`, like `test_share`.
        margin: The leader wins if its expected gain is larger.

    Raises:
        ValueError: None was trained.
    """
    intervals = {
        key: interval
        for key, found in scores.items()
        if (interval := own_score(found, test_share=test_share, per_repeat=per_repeat, resolution=resolution))
        is not None
    }
    challengers = [key for key in scores if key != baseline]
    remaining = [key for key in challengers if key in intervals and key not in stopped]
    if baseline not in intervals:
        if not remaining:
            raise ValueError("neither the baseline nor a challenger could be trained")
        leader = max(remaining, key=lambda key: intervals[key].mean if maximize else -intervals[key].mean)
        return Comparison(leader, leader, intervals, None, None, evidence=False)
    # Stopped challengers too, since their spread is pooled with the leader's.
    ahead = {key: paired(scores[key], scores[baseline], maximize=maximize) for key in challengers}
    ahead = {key: lead for key, lead in ahead.items() if lead.replicates and not failed(scores[key])}
    remaining = [key for key in remaining if key in ahead]
    if not remaining:
        return Comparison(None, baseline, intervals, None, None, evidence=False)
    # A single lucky training must not lead configurations that were trained three times.
    enough = min(MIN_REPLICATES, max(ahead[key].replicates for key in remaining))
    finalists = {key: ahead[key] for key in remaining if ahead[key].replicates >= enough}
    leader = max(finalists, key=lambda key: finalists[key].mean)
    advantage = corrected_interval(
        ahead[leader].values,
        test_share=effective_share(ahead[leader].numbers, test_share=test_share, per_repeat=per_repeat),
        replicates=ahead[leader].replicates,
        comparisons=len(challengers),
        resolution=resolution,
        others=[lead.values for key, lead in ahead.items() if key != leader and lead.replicates >= MIN_REPLICATES],
    )
    shortest = min(finalists.values(), key=lambda lead: len(lead.values)).numbers
    share = effective_share(shortest, test_share=test_share, per_repeat=per_repeat)
    noise = _noise(list(finalists.values()), test_share=share, resolution=resolution)
    expected = advantage.mean * shrinkage([0.0, *(lead.mean for lead in finalists.values())], noise)
    winner = leader if expected > margin else baseline
    return Comparison(leader, winner, intervals, advantage, expected, evidence=advantage.low > 0)


def _noise(leads: Sequence[Paired], *, test_share: float, resolution: float) -> float:
    """Variance of a configuration's mean: half of that of a difference, pooled, of the fewest values."""
    freedom = sum(len(lead.values) - 1 for lead in leads)
    if not freedom:
        return math.inf
    spread = max(math.fsum(_squares(lead.values) for lead in leads) / freedom, resolution**2)
    return spread / 2 * (1 / min(len(lead.values) for lead in leads) + test_share)


def optimism(search_value: float, confirmed: Interval, *, maximize: bool) -> float:
    """Compute how much better the best score of a search is than the confirmed score of the same trial."""
    return (search_value - confirmed.mean) if maximize else (confirmed.mean - search_value)
