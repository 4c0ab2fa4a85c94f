"""A study's progress, best trial and baselines."""

from __future__ import annotations

from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from hpo.analysis.baselines import Entry, entries_of
from hpo.study import Study
from hpo.study.results import read_recipe_runs
from hpo.trials import Counts


@dataclass(frozen=True)
class StudySummary:
    """A study's progress and results."""

    counts: Counts
    best: FrozenTrial | None
    """None for a confirmation, whose best trial is only the luckiest replicate."""
    baselines: tuple[Entry, ...]
    """The finished baseline and recipes."""

    @property
    def best_value(self) -> float | None:
        return None if self.best is None else self.best.value


def summarize(study: Study) -> StudySummary:
    """Read the current summary of a study."""
    finished = study.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    best = study.best_trial() if study.confirms is None else None
    return StudySummary(study.counts(), best, tuple(entries_of(finished, read_recipe_runs(study.paths))))
