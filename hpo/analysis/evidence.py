"""The finished trials of a study, the best of them, and the probabilities of patterns among them by chance.

The best are taken from each fifth of the study: a sampler that learns draws its later trials close together, so among
the best of all, everything that these share would look decisive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from hpo.analysis.study_data import value_of
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
    """The complete and pruned trials of a study."""

    finished: tuple[FrozenTrial, ...]
    complete: int
    best: tuple[FrozenTrial, ...]
    """The best fifth of each fifth of the study, the best of all first. At most half of its complete trials: the
    baseline, which is never pruned, is not good for that reason alone."""

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
        """The same of the best trials, the best trial's first."""
        return [trial.params[path] for trial in self.best if path in trial.params]


def read_evidence(study: Study) -> Evidence:
    """Read the finished trials of a study, and select the best of each part."""
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    effective = effective_trials(study.optuna.get_trials(deepcopy=False)).values()
    finished = sorted((trial for trial in effective if trial.state in states), key=lambda trial: trial.number)

    def rank(trial: FrozenTrial) -> tuple[float, int]:
        return -study.sign * value_of(trial), trial.number

    length, best = max(1, math.ceil(len(finished) / _PARTS)), []
    for begin in range(0, len(finished), length):
        part = finished[begin : begin + length]
        complete = sorted((trial for trial in part if trial.state == TrialState.COMPLETE), key=rank)
        best += complete[: min(math.ceil(len(part) / _PARTS), math.ceil(len(complete) / 2))]
    count = sum(trial.state == TrialState.COMPLETE for trial in finished)
    return Evidence(tuple(finished), count, tuple(sorted(best, key=rank)))


def binomial_tail(least: int, of: int, share: float) -> float:
    """The probability of at least so many successes `of` independent ones of probability `share`."""
    from scipy.stats import binom

    return float(binom.sf(least - 1, of, share))


def spread_chance(share: float, of: int) -> float:
    """The probability that `of` uniform numbers span at most this fraction of their range."""
    from scipy.stats import beta

    return float(beta.cdf(share, of - 1, 2))


def missing_chance(having: int, among: int, picked: int) -> float:
    """The probability that none of `picked` trials, drawn from `among`, is one of the `having`."""
    from scipy.stats import hypergeom

    return float(hypergeom.pmf(0, among, having, picked))
