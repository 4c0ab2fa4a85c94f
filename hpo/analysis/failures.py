"""Failed trials by cause, and the parameter that best distinguishes them from the other trials.

Numbers are compared by the Mann-Whitney rank-sum test, choices by Fisher's exact test of each against the rest, and all
tests corrected by Bonferroni.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from hpo.analysis.study_data import StudyData
from hpo.trials import FAILURE, INTERRUPTED

FEWEST = 3
"""Failures of a cause that a test needs."""
_LEVEL = 0.05  # of significance


@dataclass(frozen=True)
class Pattern:
    """A parameter whose values differ in the failures of a cause."""

    cause: str
    path: str
    p: float
    """Corrected for the number of tests."""
    choice: Any = None
    """The choice that is more or less frequent; None for a number."""
    among_failures: tuple[float, ...] = ()
    """The median of a number, or (how many have the choice, how many there are)."""
    among_others: tuple[float, ...] = ()


def by_cause(data: StudyData) -> dict[str, list[FrozenTrial]]:
    """Cause -> failed trials, the most frequent cause first."""
    found: dict[str, list[FrozenTrial]] = {}
    for trial in data.failed:
        found.setdefault(str(trial.user_attrs[FAILURE]), []).append(trial)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def interrupted(data: StudyData) -> list[FrozenTrial]:
    """The attempts that other trials replaced after an interrupt or crash."""
    every = data.study.optuna.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    return [trial for trial in every if trial.user_attrs.get(INTERRUPTED)]


def pattern_of(data: StudyData, cause: str) -> Pattern | None:
    """The most significant pattern of a cause; None if none is significant."""
    failed = by_cause(data).get(cause, [])
    others = [*data.complete, *data.pruned]
    if len(failed) < FEWEST or len(others) < FEWEST:
        return None
    found = [
        pattern
        for path in sorted({path for trial in failed for path in trial.params})
        for pattern in _patterns(cause, path, failed, others)
    ]
    best = min(found, key=lambda pattern: (pattern.p, pattern.path), default=None)
    if best is None or best.p * len(found) >= _LEVEL:
        return None
    return replace(best, p=best.p * len(found))


def _patterns(cause: str, path: str, failed: Sequence[FrozenTrial], others: Sequence[FrozenTrial]) -> Iterator[Pattern]:
    """Test one parameter: once for a number, once for each choice."""
    from scipy.stats import fisher_exact, mannwhitneyu

    theirs = [trial.params[path] for trial in failed if path in trial.params]
    rest = [trial.params[path] for trial in others if path in trial.params]
    if len(theirs) < FEWEST or len(rest) < FEWEST or len({*map(repr, theirs), *map(repr, rest)}) < 2:
        return
    if not isinstance(failed[0].distributions.get(path), CategoricalDistribution):
        p = float(mannwhitneyu(theirs, rest).pvalue)
        yield Pattern(cause, path, p, None, (statistics.median(theirs),), (statistics.median(rest),))
        return
    for choice in sorted(set(theirs), key=repr):
        a, b = theirs.count(choice), rest.count(choice)
        p = float(fisher_exact([[a, len(theirs) - a], [b, len(rest) - b]]).pvalue)
        yield Pattern(cause, path, p, choice, (a, len(theirs)), (b, len(rest)))
