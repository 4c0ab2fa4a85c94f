"""Who won, and how sure that is, from a few trainings of each configuration on other seeds and other splits.

A replicate is a seed and a split that every configuration is trained with, so that configurations are compared within
replicates: what makes one split easy or hard, it does to all of them. The splits of two replicates overlap, for all are
drawn from the same images; the plain t interval takes the scores for independent and is far too narrow. The corrected
resampled t interval (Nadeau and Bengio 2003, "Inference for the generalization error", Machine Learning 52) widens it:
the mean of n scores has the variance (1/n + validation images / training images) · s². More replicates narrow it less
and less, since they show other weights and other splits, but no other images. With folds all k · r values count as the
n scores (Bouckaert and Frank 2004, "Evaluating the replicability of significance tests", PAKDD).

The best of several challengers is picked by the scores that it is then judged by. So its advantage over the base is
given with an interval that holds for all challengers at once (Bonferroni), those that were stopped early included. A
handful of replicates says little about their own spread, and t's quantiles far out in its tails are huge then; so the
spreads of the other challengers' advantages count too, up to as much as the leader's own (as in the moderated t of
Smyth 2004, "Linear models and empirical Bayes methods", Statistical Applications in Genetics and Molecular Biology 3).
On simulated splits this finds a planted advantage more often and covers the truth no less, even where one challenger
is three times as noisy as the others. A challenger whose trainings now succeed and now fail is a hundred times as
noisy, and says nothing of the leader: so the spread that is lent is taken for twice the leader's own at most. Simulated
(40,000 drawings, 3 to 10 replicates, 2 to 7 challengers, spreads 0.3 to 10 times the others'): the interval covers the
truth in 94 % at least, and beside a challenger ten times as noisy an advantage of two spreads is found, of 5 and 10
replicates, in 28 and 63 % in place of 5 %. Nothing here trains or reads anything.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

Scores = Mapping[int, tuple[float, ...]]
"""Replicate -> the value of each of its folds (one where there are none), as measured. NaN: the training failed."""

CONFIDENCE = 0.95
RACE_CONFIDENCE = 0.9
"""One-sided, of the test that stops a challenger. On simulated ladders of nearly equal configurations it drops the best
one in 3 to 10 % of the races, for another that is hardly worse, and what it saves is worth more to those that go on."""
MIN_REPLICATES = 3
"""Fewer give no test worth its name: with two, the t distribution has one degree of freedom."""
GOOD_REPLICATES = 5
"""So many are wanted before another candidate is: t's quantile at 95 % has come down from 4.3 to 2.8."""
FIRST_REPLICATES = 10
MAX_REPLICATES = 20
"""Beyond, with a quarter of the images for validation, twice as many would narrow an interval by 7 %."""
LENT_AT_MOST = 2.0
"""Times its own is what a leader's spread is taken for at most, when others lend it theirs."""
MAX_CANDIDATES = 8
"""Each challenger more widens the interval of whichever is picked."""

# Scores and losses are of the size of one; those that differ by less are equal, but for sums in floating point.
_EQUAL = 1e-12


@dataclass(frozen=True)
class Interval:
    """A mean with its interval: what it may be, at the confidence that was asked for."""

    mean: float
    half_width: float
    """`math.inf` where nothing can be said of the spread: one replicate, or values that are all equal."""
    n: int
    """The replicates behind it."""

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


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
    """The corrected resampled t interval of a mean (Nadeau and Bengio 2003).

    The half width is t · s · sqrt(1/n + test_share), with the standard deviation s of the n values and t's quantile at
    n - 1 degrees of freedom. A score of few images comes in steps, and a handful of replicates may agree by the chance
    of rounding: a spread below one step is taken for one step, and where no step is known, values that are all equal
    have no interval (an infinite one), rather than a perfectly certain one.

    Args:
        values: finite scores or differences of scores; k a replicate with k folds.
        test_share: validation images / training images of one split. 0: the values are independent.
        replicates: how many the values come from; as many as there are values where it is left out.
        confidence: of the interval, two-sided.
        comparisons: how many intervals shall hold at once with this confidence (Bonferroni).
        resolution: the step of a value: 1 / validation images for a share of them, 0 for a loss.
        others: values of the same kind whose spread is about the same. Their variance is averaged with that of the
            values, weighted with their degrees of freedom, but with no more than the values' own; and it is taken for
            `LENT_AT_MOST`² times the values' own at most.

    Raises:
        ValueError: there are no values, one is not finite, or an argument is out of its range.
    """
    n = len(values)
    replicates = n if replicates is None else replicates
    if n == 0 or not all(map(math.isfinite, values)):
        raise ValueError(f"an interval needs at least one value, and all of them finite, not {list(values)}")
    if test_share < 0 or resolution < 0 or not 0 < confidence < 1 or comparisons < 1 or not 1 <= replicates <= n:
        raise ValueError(
            f"cannot be: test_share {test_share}, resolution {resolution}, confidence {confidence}, "
            f"{comparisons} comparisons, {replicates} replicates of {n} values"
        )
    mean = math.fsum(values) / n
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
    quantile = float(stdtrit(freedom, 1 - (1 - confidence) / (2 * comparisons)))
    return Interval(mean, quantile * spread * math.sqrt(1 / n + test_share), replicates)


def differences(a: Scores, b: Scores) -> tuple[list[float], int]:
    """a - b in each fold of each replicate that both have, in the order of the replicates, and how many those are.

    Raises:
        ValueError: a replicate has another number of folds for one than for the other.
    """
    common = sorted(set(a) & set(b))
    return [x - y for replicate in common for x, y in zip(a[replicate], b[replicate], strict=True)], len(common)


def failed(scores: Scores) -> bool:
    """Whether one of the trainings gave no score: such a configuration cannot be relied on, whatever the others say."""
    return not all(math.isfinite(value) for values in scores.values() for value in values)


def own_score(scores: Scores, *, test_share: float, resolution: float = 0.0) -> Interval | None:
    """The interval of a configuration's own score; None where it has none, or a training of it failed."""
    values = [value for replicate in sorted(scores) for value in scores[replicate]]
    if not values or failed(scores):
        return None
    return corrected_interval(values, test_share=test_share, replicates=len(scores), resolution=resolution)


def cannot_win(
    candidate: Scores, rivals: Mapping[str, Scores], *, test_share: float, maximize: bool, resolution: float = 0.0
) -> str | None:
    """Why the candidate need not be trained again, in words; None where it may still win.

    It cannot win where a one-sided paired test at 90 %, of the same corrected variance, finds it worse than the leader:
    the rival that beats it by most, among those with which it has at least three replicates in common.
    """
    if failed(candidate):
        return "one of its trainings gave no score"
    sign = 1 if maximize else -1
    behind: dict[str, tuple[list[float], int]] = {}
    for name, rival in rivals.items():
        found, replicates = differences(rival, candidate)
        if replicates >= MIN_REPLICATES and not failed(rival):
            behind[name] = [sign * value for value in found], replicates
    if not behind:
        return None
    leader = max(behind, key=lambda name: math.fsum(behind[name][0]) / len(behind[name][0]))
    values, replicates = behind[leader]
    both_sides = 1 - 2 * (1 - RACE_CONFIDENCE)  # the interval's lower end alone is looked at
    gap = corrected_interval(
        values, test_share=test_share, replicates=replicates, confidence=both_sides, resolution=resolution
    )
    if gap.low <= 0:
        return None
    sure = f"by at least {gap.low:.4f} at {100 * RACE_CONFIDENCE:.0f} %"
    return f"worse than {leader} by {gap.mean:.4f} over {gap.n} replicates, {sure}"


@dataclass(frozen=True)
class Allocation:
    """How many configurations are trained on how many replicates, to begin with."""

    candidates: int
    """The base included."""
    replicates: int
    trainings: int


def allocate(*, budget_trainings: int, candidates: int) -> Allocation:
    """What a budget of so many whole trainings is spent on, of so many configurations, the base among them.

    At least two of them (the favourite and the base) three times, even beyond the budget; then five times; then more
    of them, five times each, up to eight; then more often, up to ten times. What those that are stopped early leave
    over goes to the others, up to `MAX_REPLICATES`; that is for whoever trains them.

    Raises:
        ValueError: there is no configuration.
    """
    if candidates < 1:
        raise ValueError("there is no configuration to confirm")
    contenders = min(2, candidates)
    replicates = max(MIN_REPLICATES, min(GOOD_REPLICATES, budget_trainings // contenders))
    if replicates == GOOD_REPLICATES:
        contenders = max(contenders, min(MAX_CANDIDATES, candidates, budget_trainings // GOOD_REPLICATES))
        replicates = min(FIRST_REPLICATES, budget_trainings // contenders)
    return Allocation(contenders, replicates, contenders * replicates)


@dataclass(frozen=True)
class Judgement:
    """Who won."""

    leader: str | None
    """The best challenger of those that were neither stopped nor failed."""
    winner: str
    """The leader where there is evidence that it beats the base; else the base, unless that could not be trained."""
    scores: dict[str, Interval]
    """The own score of each that has one."""
    advantage: Interval | None
    """The leader over the base (positive: better), holding for all challengers at once."""
    evidence: bool
    """Whether the leader beats the base."""


def judge(
    scores: Mapping[str, Scores],
    *,
    base: str,
    stopped: Collection[str],
    test_share: float,
    maximize: bool,
    resolution: float = 0.0,
) -> Judgement:
    """Picks the best challenger, and says whether it beats the base.

    Args:
        scores: of every configuration that was to be confirmed, those that failed or were stopped too: each challenger
            had its chance to be picked, and the interval of the picked one allows for all of them.
        base: the configuration to beat. It needs not to be among the scores, where it could not be trained.
        stopped: those that can no longer be picked. The base is never stopped.
        test_share: validation images / training images of one split.
        maximize: whether a higher score is better.
        resolution: the step of a score, as `corrected_interval` has it.

    Raises:
        ValueError: none was trained.
    """
    intervals = {
        key: interval
        for key, found in scores.items()
        if (interval := own_score(found, test_share=test_share, resolution=resolution)) is not None
    }
    challengers = [key for key in scores if key != base]
    standing = [key for key in challengers if key in intervals and key not in stopped]
    if not standing:
        if base not in intervals:
            raise ValueError("neither the base nor a challenger could be trained")
        return Judgement(None, base, intervals, None, evidence=False)
    if base not in intervals:
        leader = _best({key: intervals[key].mean for key in standing}, maximize=maximize)
        return Judgement(leader, leader, intervals, None, evidence=False)
    sign = 1 if maximize else -1
    # Of those that were stopped too: their spread tells of the leader's.
    ahead: dict[str, tuple[list[float], int]] = {}
    for key in challengers:
        found, replicates = differences(scores[key], scores[base])
        if replicates and not failed(scores[key]):
            ahead[key] = [sign * value for value in found], replicates
    standing = [key for key in standing if key in ahead]
    if not standing:
        return Judgement(None, base, intervals, None, evidence=False)
    # One lucky training must not stand before what others did three times.
    enough = min(MIN_REPLICATES, max(ahead[key][1] for key in standing))
    means = {key: math.fsum(ahead[key][0]) / len(ahead[key][0]) for key in standing if ahead[key][1] >= enough}
    leader = _best(means, maximize=True)
    values, replicates = ahead[leader]
    advantage = corrected_interval(
        values,
        test_share=test_share,
        replicates=replicates,
        comparisons=len(challengers),
        resolution=resolution,
        others=[others for key, (others, of) in ahead.items() if key != leader and of >= MIN_REPLICATES],
    )
    evidence = advantage.low > 0
    return Judgement(leader, leader if evidence else base, intervals, advantage, evidence)


def optimism(search_value: float, confirmed: Interval, *, maximize: bool) -> float:
    """How much better a score that was picked as the best of a search is than what it was confirmed to be."""
    return (search_value - confirmed.mean) if maximize else (confirmed.mean - search_value)


def _best(values: Mapping[str, float], *, maximize: bool) -> str:
    """The key of the best value; of equals the first."""
    return max(values, key=lambda key: values[key] if maximize else -values[key])


def _squares(values: Sequence[float]) -> float:
    """The sum of the squared deviations from the mean; 0 where they are those of sums in floating point."""
    mean = math.fsum(values) / len(values)
    deviations = [value - mean for value in values]
    if max(map(abs, deviations)) <= _EQUAL:
        return 0.0
    return math.fsum(deviation * deviation for deviation in deviations)
