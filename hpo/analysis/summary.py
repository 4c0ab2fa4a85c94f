"""A study's progress, best trial and baselines, for commands that show many studies or do not need their images."""

from __future__ import annotations

from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from hpo.analysis.baselines import Entry, entries_of
from hpo.study import Counts, Study
from hpo.study.results import read_result


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
        """The value of the best trial."""
        return None if self.best is None else self.best.value


def summarize(study: Study) -> StudySummary:
    """Read the current summary of a study."""
    finished = study.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    results = {reference.dir.name: read_result(reference) for reference in study.paths.references()}
    runs = {name: result for name, result in results.items() if result is not None}
    best = study.best_trial() if study.confirms is None else None
    return StudySummary(study.counts(), best, tuple(entries_of(finished, runs)))
