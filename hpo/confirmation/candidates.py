"""The configurations worth confirming, each with its reasons.

The best of many noisy scores is partly luck, so other criteria choose too: the score at a rung, and the mean over a
trial's neighbours in the search space.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from hpo.confirmation.result import BASELINE, Candidate, dump
from hpo.errors import StudyError
from hpo.paths import LONG_BASELINE
from hpo.space import load_recipe
from hpo.space.pruner import build_pruner, goodness_at, keeps_of
from hpo.study import Study
from hpo.study.results import read_result
from hpo.trials import RECIPE, best_first, effective_trials, is_baseline

if TYPE_CHECKING:
    from hpo.space import SearchSpace

NEIGHBOURS = 5
"""Trials that predict a score. Of fewer than twice as many trials, most would be neighbours of all others."""

_ORDINALS = ("", "second ", "third ", "fourth ", "fifth ")


def best_trial(study: Study) -> FrozenTrial:
    """Return the best trial of a search; StudyError if none is complete."""
    best = study.best_trial()
    if best is None:
        raise StudyError(f"study {study.name} has no complete trial yet; resume it with hpo run")
    return best


def best_searched(study: Study) -> Candidate:
    """Return the best trial or recipe by its score in the search; StudyError if no trial is complete."""
    best_trial(study)
    scored = [one for one in candidates(study, study.space()) if one.search_value is not None]
    return max(scored, key=lambda one: study.sign * (one.search_value or 0.0))


def candidates(study: Study, space: SearchSpace) -> list[Candidate]:
    """Return the candidates of all criteria and the baseline, in order of preference.

    A configuration chosen by several criteria appears once, with all reasons.
    """
    return _Choice(study, space).made()


def confirmed_before(study: Study, identities: Collection[str]) -> list[Candidate]:
    """Return the best complete trial of a search for each of these configurations, see `identity_of`."""
    if not identities:
        return []
    found = _configurations(study, _ranked_trials(study), "confirmed before")
    return [candidate for candidate in found if candidate.identity in identities]


class _Choice:
    """The candidates of one study, criterion by criterion."""

    def __init__(self, study: Study, space: SearchSpace) -> None:
        self._study, self._space = study, space
        self._trials = _ranked_trials(study)
        self._found: dict[str, Candidate] = {}

    def made(self) -> list[Candidate]:
        firsts, recipes, rungs = self._firsts(), self._recipes(), list(self._at_rungs())
        in_order = (
            *firsts[:1],
            self._baseline(),
            *rungs[:1],
            *self._predicted(),
            *recipes[:1],
            *firsts[1:2],
            *recipes[1:],
            *rungs[1:],
            *firsts[2:],
        )
        for candidate in in_order:
            self._add(candidate)
        return list(self._found.values())

    def _add(self, candidate: Candidate) -> None:
        known = self._found.get(candidate.identity)
        if known is None:
            self._found[candidate.identity] = candidate
            return
        named = candidate if _priority(candidate) < _priority(known) else known
        # A baseline or recipe may not have been a trial.
        numbers = known if known.trial is not None else candidate
        self._found[candidate.identity] = replace(
            numbers,
            key=named.key,
            recipe=known.recipe or candidate.recipe,
            chosen_for=tuple(dict.fromkeys((*known.chosen_for, *candidate.chosen_for))),
        )

    def _baseline(self) -> Candidate:
        trial = next((trial for trial in self._trials if is_baseline(trial)), None)
        if trial is not None:
            return replace(_of_trial(self._study, trial, "the baseline"), key=BASELINE)
        config = self._space.baseline
        return Candidate(BASELINE, None, None, ("the baseline",), dump(config), config.epochs, None)

    def _firsts(self) -> list[Candidate]:
        ranked = zip(_ORDINALS, _configurations(self._study, self._trials), strict=False)
        return [replace(one, chosen_for=(f"{nth}best validation score",)) for nth, one in ranked]

    def _at_rungs(self) -> Iterator[Candidate]:
        """The best complete trial at each rung by the pruner's ranking, the last rung first."""
        epochs, folds = self._space.baseline.epochs, self._space.baseline.data.folds
        pruner = build_pruner(self._space.pruner, epochs, folds)
        for rung in sorted(keeps_of(pruner, len(self._trials)), reverse=True):
            reached = [trial for trial in self._trials if rung in trial.intermediate_values]
            ranks = goodness_at(reached, rung, self._study.sign)
            values = {trial.number: self._study.sign * rank for trial, rank in zip(reached, ranks, strict=True)}
            if (best := self._best(values)) is not None:
                where = f"after fold {rung // epochs}" if folds and rung % epochs == 0 else f"at epoch {rung}"
                yield _of_trial(self._study, best, f"best {where}")

    def _predicted(self) -> list[Candidate]:
        by_params: dict[str, list[FrozenTrial]] = {}
        for trial in self._trials:
            by_params.setdefault(json.dumps(trial.params, sort_keys=True), []).append(trial)
        trials = [same[0] for same in by_params.values()]
        if len(trials) < 2 * NEIGHBOURS:
            return []
        places = unit_cube([trial.params for trial in trials], self._space.distributions)
        values = [float(np.mean([_value(trial) for trial in same])) for same in by_params.values()]
        best = self._best(dict(zip((trial.number for trial in trials), predict(places, values), strict=True)))
        return [] if best is None else [_of_trial(self._study, best, "best predicted by its neighbours")]

    def _recipes(self) -> list[Candidate]:
        """The recipes, trials of the study or trained beside it, the best first."""
        found = [
            replace(_of_trial(self._study, trial, "a recipe"), key=f"recipe {name}", recipe=str(name))
            for trial in self._trials
            if (name := trial.user_attrs.get(RECIPE)) is not None
        ]
        for paths in self._study.paths.references():
            if paths.dir.name == LONG_BASELINE:  # each of its replicates would cost as much as the search
                continue
            result = read_result(paths) or {}
            if math.isfinite(value := result.get("value", math.nan)):
                name = paths.dir.name
                kept = [row["epoch"] for row in result.get("folds", [result])]
                epochs = int(float(np.mean(kept)) + 0.5)  # mean of the folds, rounded half up
                config = dump(load_recipe(paths.config).config)
                found.append(Candidate(f"recipe {name}", None, name, ("a recipe",), config, epochs, value))
        found.sort(key=lambda one: (-self._study.sign * (one.search_value or 0.0), one.key))
        # A recipe edited after it was a trial is found twice; the better one keeps the name.
        return list({one.key: one for one in reversed(found)}.values())[::-1]

    def _best(self, scores: Mapping[int, float]) -> FrozenTrial | None:
        """The trial with the best score by number; of equals the one with the best value."""
        finite = [trial for trial in self._trials if math.isfinite(scores.get(trial.number, math.nan))]
        return max(finite, key=lambda trial: self._study.sign * scores[trial.number], default=None)


def unit_cube(params: Sequence[dict[str, Any]], distributions: dict[str, BaseDistribution]) -> NDArray[np.float64]:
    """Map the parameters of trials to points (trials, coordinates), each range to [0, 1] on its scale.

    Two choices are as far apart as the ends of a range. A parameter that a trial lacks is in the middle.
    """
    rows = [
        [place for name, distribution in distributions.items() for place in _coordinates(distribution, name, one)]
        for one in params
    ]
    return np.array(rows, dtype=float)


def _coordinates(distribution: BaseDistribution, name: str, params: dict[str, Any]) -> list[float]:
    if isinstance(distribution, CategoricalDistribution):
        here = params.get(name, object())
        return [float(_same_choice(choice, here)) / math.sqrt(2) for choice in distribution.choices]
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    if name not in params:
        return [0.5]
    low, high, value = float(distribution.low), float(distribution.high), float(params[name])
    if distribution.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return [(value - low) / (high - low) if high > low else 0.5]


def _same_choice(choice: Any, value: Any) -> bool:
    return type(choice) is type(value) and choice == value  # True and 1 differ


def predict(places: NDArray[np.float64], values: Sequence[float]) -> list[float]:
    """Predict each trial's score from points (trials, coordinates): the mean over its neighbours, itself included."""
    from sklearn.neighbors import KNeighborsRegressor  # takes a second to import

    model: Any = KNeighborsRegressor(n_neighbors=NEIGHBOURS)
    model.fit(places, values)
    return [float(value) for value in model.predict(places)]


def _of_trial(study: Study, trial: FrozenTrial, why: str) -> Candidate:
    number, trained = trial.number, study.trained(trial.number)
    return Candidate(f"trial {number}", number, None, (why,), dump(trained.config), trained.epochs, trained.value)


def _configurations(study: Study, trials: Sequence[FrozenTrial], why: str = "") -> Iterator[Candidate]:
    """The different configurations of trials, each by its first trial."""
    seen = set()
    for trial in trials:
        candidate = _of_trial(study, trial, why)
        if candidate.identity not in seen:
            seen.add(candidate.identity)
            yield candidate


def _priority(candidate: Candidate) -> int:
    """Lower for the key that is kept of several."""
    return 0 if candidate.key == BASELINE else 1 if candidate.recipe is not None else 2


def _ranked_trials(study: Study) -> list[FrozenTrial]:
    """The complete trials, the best first, in the order of `Study.best_trial`."""
    trials = effective_trials(study.optuna.get_trials(deepcopy=False)).values()
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and math.isfinite(_value(trial))]
    return sorted(complete, key=lambda trial: best_first(trial, study.sign))


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None, "a complete trial has a value"
    return trial.value
