"""The configurations that a search has to beat, and their scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from core.text import count
from hpo.confirmation.result import BASELINE, Contender
from hpo.confirmation.statistics import Interval
from hpo.paths import LONG_BASELINE
from hpo.space.pruner import spared
from hpo.trials import FAILURE, is_baseline

if TYPE_CHECKING:
    from hpo.analysis.study_data import StudyData


@dataclass(frozen=True)
class Entry:
    """The baseline, a recipe, the best trial, or another confirmed one."""

    key: str
    """`baseline`, `trial 12` or `recipe NAME`, as in a confirmation."""
    trial: int | None
    value: float | None
    failure: str | None = None
    """Why it could not be trained."""
    state: str = "complete"
    contender: Contender | None = None

    @property
    def is_baseline(self) -> bool:
        return self.key == BASELINE

    @property
    def interval(self) -> Interval | None:
        """The confirmed score with its 95 % interval."""
        return None if self.contender is None else self.contender.interval

    @property
    def mean(self) -> float | None:
        return None if self.interval is None else self.interval.mean


def key_of(trial: FrozenTrial) -> str:
    """Return the key of a search's trial in a confirmation."""
    return BASELINE if is_baseline(trial) else spared(trial) or f"trial {trial.number}"


def entries_of(
    trials: Iterable[FrozenTrial], recipe_runs: Mapping[str, Mapping[str, Any]], best: FrozenTrial | None = None
) -> list[Entry]:
    """The baseline, recipes and best of these trials, and the recipe runs."""
    found = [
        Entry(key_of(trial), trial.number, _value(trial), trial.user_attrs.get(FAILURE), trial.state.name.lower())
        for trial in trials
        if trial is best or spared(trial)
    ]
    return found + [
        Entry(_key_of_recipe(name, result), None, result.get("value"), result.get("failure"))
        for name, result in recipe_runs.items()
    ]


def _key_of_recipe(name: str, result: Mapping[str, Any]) -> str:
    if name != LONG_BASELINE:
        return f"recipe {name}"
    epochs = max((one["epoch"] for one in result.get("folds", [result]) if "epoch" in one), default=None)
    return "the baseline, longer" if epochs is None else f"the baseline for {count(epochs, 'epoch')}"


def _value(trial: FrozenTrial) -> float | None:
    return trial.value if trial.state == TrialState.COMPLETE else None


def ranked_entries(data: StudyData) -> list[Entry]:
    """The confirmed entries in their order, then the others, best value first."""
    entries = {entry.key: entry for entry in entries_of(data.trials, data.recipe_runs, data.best)}
    confirmed = []
    for one in () if data.confirmation is None else data.confirmation.contenders:
        entry = entries.pop(one.key, Entry(one.key, one.trial, one.search_value))
        confirmed.append(replace(entry, contender=one, failure=one.failure or entry.failure))
    others = entries.values()
    return confirmed + sorted(
        others, key=lambda entry: math.inf if entry.value is None else -data.gain(entry.value, 0.0)
    )
