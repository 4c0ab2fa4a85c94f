"""The finished trials of a study and the best of them, and the probabilities of patterns among them by chance.

The best trials are taken from each fifth of the study, not from the whole: a sampler that learns draws its later trials
close together, so among the best of all, everything that those late trials share would look decisive.
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
"""Significance level: patterns that are less probable by chance are acted on."""
FEWEST_BEST = 5
"""Best trials that have a parameter, needed to judge it."""

_FEWEST_TRIALS = 20  # finished; with fewer there are too few best ones
_PARTS = 5  # consecutive parts of a study; the best fifth of each is used


@dataclass(frozen=True)
class Evidence:
    """The effective finished trials of a study."""

    finished: tuple[FrozenTrial, ...]
    """Complete and pruned."""
    complete: int
    best: tuple[FrozenTrial, ...]
    """The best fifth of each fifth of the study, but at most half of its complete trials; the best of all first."""

    @property
    def too_few(self) -> str:
        """Why the trials are too few for any conclusion; empty if they are not."""
        if len(self.finished) < _FEWEST_TRIALS:
            return f"it takes {_FEWEST_TRIALS} finished trials, and there are {len(self.finished)}"
        if len(self.best) < FEWEST_BEST:
            best = f"{len(self.best)} of the {self.complete} complete trials"
            return f"only {best} are among the best of their part of the study, and it takes {FEWEST_BEST}"
        return ""

    def drawn(self, path: str) -> list[Any]:
        """A parameter's values in the finished trials that have it, in Optuna's representation."""
        return [trial.params[path] for trial in self.finished if path in trial.params]

    def among_best(self, path: str) -> list[Any]:
        """A parameter's values in the best trials that have it, the best trial's first."""
        return [trial.params[path] for trial in self.best if path in trial.params]


def read_evidence(study: Study) -> Evidence:
    """Read the finished trials of a study, and select the best of each part."""
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
    """The best trials of a part of the study, each with its sort key."""
    complete = [
        (sign * trial.value, trial.number, trial)
        for trial in part
        if trial.state == TrialState.COMPLETE and trial.value is not None
    ]
    complete.sort(key=lambda ranked: ranked[:2])
    return complete[: min(math.ceil(len(part) / _PARTS), math.ceil(len(complete) / 2))]


def binomial_tail(least: int, of: int, share: float) -> float:
    """The probability of at least so many successes `of` independent ones of probability `share`."""
    return sum(math.comb(of, k) * share**k * (1 - share) ** (of - k) for k in range(least, of + 1))


def spread_chance(share: float, of: int) -> float:
    """The probability that `of` uniform numbers span at most this fraction of their range."""
    return of * share ** (of - 1) - (of - 1) * share**of


def missing_chance(having: int, among: int, picked: int) -> float:
    """The probability that none of `picked` trials, drawn from `among`, is one of the `having`."""
    return math.comb(among - having, picked) / math.comb(among, picked)
