"""The configurations that a search has to beat, with their scores in the search and in the confirmation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from hpo.confirmation.result import BASELINE, Contender
from hpo.trials import FAILURE, RECIPE, is_baseline

if TYPE_CHECKING:
    from hpo.analysis.study_data import StudyData


@dataclass(frozen=True)
class Entry:
    """A configuration: the baseline, a recipe, the best trial, or another one that was confirmed."""

    key: str
    """`base`, `trial 12` or `recipe NAME`, as in a confirmation."""
    trial: int | None
    """The number of its trial in the search."""
    value: float | None
    """Its value in the search."""
    failure: str | None = None
    """Why it could not be trained."""
    state: str = "complete"
    """The state of its trial."""
    contender: Contender | None = None
    """Its scores in the confirmation."""

    @property
    def is_baseline(self) -> bool:
        """Whether this is the baseline configuration."""
        return self.key == BASELINE

    @property
    def mean(self) -> float | None:
        """The confirmed score."""
        interval = None if self.contender is None else self.contender.interval
        return None if interval is None else interval.mean

    @property
    def half_width(self) -> float | None:
        """Half the width of the confirmed score's 95 % interval; None if there is no interval."""
        interval = None if self.contender is None else self.contender.interval
        return None if interval is None or not math.isfinite(interval.half_width) else interval.half_width


def key_of(trial: FrozenTrial) -> str:
    """Return the key of a search's trial in a confirmation."""
    if is_baseline(trial):
        return BASELINE
    return f"recipe {trial.user_attrs[RECIPE]}" if RECIPE in trial.user_attrs else f"trial {trial.number}"


def entries_of(
    trials: Iterable[FrozenTrial], recipe_runs: Mapping[str, Mapping[str, Any]], best: FrozenTrial | None = None
) -> list[Entry]:
    """The baseline, the recipes and the best of these trials, and the recipes that were trained beside the study."""
    found = [
        Entry(
            key_of(trial),
            trial.number,
            trial.value if trial.state == TrialState.COMPLETE else None,
            trial.user_attrs.get(FAILURE),
            trial.state.name.lower(),
        )
        for trial in trials
        if trial is best or is_baseline(trial) or RECIPE in trial.user_attrs
    ]
    return found + [
        Entry(f"recipe {name}", None, result.get("value"), result.get("failure"))
        for name, result in recipe_runs.items()
    ]


def ranked_entries(data: StudyData) -> list[Entry]:
    """All entries of a study: first the confirmed ones, in their order, then the others, best value first."""
    entries = {entry.key: entry for entry in entries_of(data.trials, data.recipe_runs, data.best)}
    confirmed = []
    for one in () if data.confirmation is None else data.confirmation.contenders:
        entry = entries.pop(one.key, Entry(one.key, one.trial, one.search_value))
        confirmed.append(replace(entry, contender=one, failure=one.failure or entry.failure))
    others = entries.values()
    return confirmed + sorted(
        others, key=lambda entry: math.inf if entry.value is None else -data.gain(entry.value, 0.0)
    )
