"""What a study's trials show of its parameters, and how probable that would be if they showed nothing.

The best are taken from each fifth of the study, not from the whole. A sampler that learns draws its later trials near
to one another, and they are better for whatever it has learned: among the best of all, everything would look decisive
that those late trials happen to share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from hpo.study import Study
from hpo.trials import effective_trials

CHANCE = 0.05
"""How probable what is seen may be without any effect."""
FEWEST_BEST = 5
"""Best trials: among so many, one that is out of place is seen."""

_FEWEST_TRIALS = 20  # finished: a fifth of fewer is not five
_PARTS = 5  # of a study, one after the other; of each the best fifth


@dataclass(frozen=True)
class Evidence:
    """A study's trials that are over, one a slot."""

    finished: tuple[FrozenTrial, ...]
    """Complete and pruned."""
    complete: int
    best: tuple[FrozenTrial, ...]
    """The best fifth of each fifth of the study, but the better half at most of what is complete in it; the best of all
    first."""

    @property
    def too_few(self) -> str:
        """Why nothing can be said; empty where something can."""
        if len(self.finished) < _FEWEST_TRIALS:
            return f"fewer than {_FEWEST_TRIALS} finished trials say too little, and there are {len(self.finished)}"
        if len(self.best) < FEWEST_BEST:
            best = f"{len(self.best)} of the {self.complete} complete trials"
            return f"only {best} are among the best of their time, and fewer than {FEWEST_BEST} say too little"
        return ""

    def drawn(self, path: str) -> list[Any]:
        """A parameter's values in the finished trials that have it, as Optuna keeps them."""
        return [trial.params[path] for trial in self.finished if path in trial.params]

    def among_best(self, path: str) -> list[Any]:
        """Its values in the best trials that have it, the best trial's first."""
        return [trial.params[path] for trial in self.best if path in trial.params]


def gather(study: Study) -> Evidence:
    """The trials of a study that are over, and which of them are the best of their time."""
    over = [
        trial
        for trial in effective_trials(study.optuna.get_trials(deepcopy=False)).values()
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    ]
    over.sort(key=lambda trial: trial.number)
    length = max(1, math.ceil(len(over) / _PARTS))
    parts = [over[begin : begin + length] for begin in range(0, len(over), length)]
    best = sorted((ranked for part in parts for ranked in _best_of(part, -study.sign)), key=lambda ranked: ranked[:2])
    complete = sum(trial.state == TrialState.COMPLETE for trial in over)
    return Evidence(tuple(over), complete, tuple(trial for _, _, trial in best))


def _best_of(part: Sequence[FrozenTrial], sign: int) -> list[tuple[float, int, FrozenTrial]]:
    """The best of a stretch of the study, each behind what it is ranked by."""
    complete = [
        (sign * trial.value, trial.number, trial)
        for trial in part
        if trial.state == TrialState.COMPLETE and trial.value is not None
    ]
    complete.sort(key=lambda ranked: ranked[:2])
    return complete[: min(math.ceil(len(part) / _PARTS), math.ceil(len(complete) / 2))]


def binomial_tail(least: int, of: int, share: float) -> float:
    """The probability of at least so many successes, each of the probability `share`."""
    return sum(math.comb(of, k) * share**k * (1 - share) ** (of - k) for k in range(least, of + 1))


def spread_chance(share: float, of: int) -> float:
    """The probability that `of` uniform numbers lie within some stretch that is this share of their range."""
    return of * share ** (of - 1) - (of - 1) * share**of


def missing_chance(having: int, among: int, picked: int) -> float:
    """The probability that of those picked from among all none is one of the `having`."""
    return math.comb(among - having, picked) / math.comb(among, picked)
