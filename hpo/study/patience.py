"""`--patience`: end a search when a better trial is unlikely. It is kept in the storage, so every worker sees it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from optuna.trial import TrialState

from hpo.trials import FAILURE, STANDARD_ERROR, effective_trials

if TYPE_CHECKING:
    import optuna

    from hpo.study.settings import StudySettings

AHEAD = 20
"""Number of further trials that are considered."""
CHANCE = 0.1
"""A search with patience ends when the chance that one of them is better is below this."""


def chance_of_better(scores: Sequence[float], error: float, trials: int) -> float:
    """Estimate the chance that one of the next `AHEAD` trials beats the best score by more than its standard error.

    A new trial is expected to score like one of the past trials, with normal noise of the standard error: a smoothed
    bootstrap (Silverman and Young 1987, Biometrika 74), in closed form. The best trial alone gives a new trial a chance
    of 0.16 / `trials`, so that no search of fewer than 31 trials ends.

    Args:
        scores: Of the trials with one; higher is better.
        error: Standard error of the best score, positive.
        trials: Number of past trials. Those without a score, which failed, have no chance.
    """
    normal, best = NormalDist(), max(scores)
    one = sum(normal.cdf((score - best) / error - 1) for score in scores) / trials
    return 1 - (1 - one) ** AHEAD


@dataclass(frozen=True)
class Outlook:
    """The state of a search with patience."""

    trials: int
    best: float
    error: float
    """Standard error of the best value."""
    chance: float
    """Of a better trial, see `chance_of_better`."""

    @property
    def is_over(self) -> bool:
        """Whether the search should end."""
        return self.chance < CHANCE


class Patience:
    """The patience of a study."""

    def __init__(self, study: optuna.Study, settings: StudySettings) -> None:
        self._study = study
        self._settings = settings

    def begin(self, patience: bool) -> None:
        """Set or remove the patience of a run."""
        self._settings.patience = patience

    @property
    def is_over(self) -> bool:
        """Whether the study has patience, and a better trial is unlikely."""
        outlook = self.outlook() if self._settings.patience else None
        return outlook is not None and outlook.is_over

    def outlook(self) -> Outlook | None:
        """Estimate the chance of a better trial; None before a complete trial whose standard error is known."""
        effective = effective_trials(self._study.get_trials(deepcopy=False)).values()
        trials = [trial for trial in effective if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        errors = [float(trial.user_attrs[STANDARD_ERROR]) for trial in complete if STANDARD_ERROR in trial.user_attrs]
        if not errors:
            return None
        sign = 1 if self._study.direction.name == "MAXIMIZE" else -1
        best = max(complete, key=lambda trial: sign * (trial.value or 0.0))
        error = float(best.user_attrs.get(STANDARD_ERROR, statistics.fmean(errors)))
        scores = [sign * trial.value for trial in trials if trial.value is not None and FAILURE not in trial.user_attrs]
        assert best.value is not None, "a complete trial has a value"
        return Outlook(len(trials), best.value, error, chance_of_better(scores, error, len(trials)))
