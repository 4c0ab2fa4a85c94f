"""Which configurations are worth another look, and why: the best of a search by more than its best score.

The best of many noisy scores is partly luck, and each other way to look at the same trials is lucky elsewhere: the
score at a rung, when less was decided yet; the mean over a trial's neighbours in the space, which a single lucky
training hardly moves; the recipes that others have tuned; the base, which is to be beaten.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from core.config import TrainConfig
from hpo.confirmation.result import BASE
from hpo.space import load_recipe
from hpo.space.pruner import RungPruner, build_pruner
from hpo.study import Study
from hpo.study.results import read_result
from hpo.trials import RECIPE, effective_trials, is_baseline

if TYPE_CHECKING:
    from hpo.space import SearchSpace

# A trial's neighbours, itself among them, that predict its score. Of fewer trials than twice as many, most would be
# everybody's neighbours.
NEIGHBOURS = 5

_ORDINALS = ("", "second ", "third ")


@dataclass(frozen=True)
class Candidate:
    """A configuration that may be trained again."""

    key: str
    """`base`, `trial 12` or `recipe NAME`."""
    trial: int | None
    """The complete trial of the search that trained it: of several, the one with the best score."""
    recipe: str | None
    chosen_for: tuple[str, ...]
    """Why, in words; not empty."""
    config: TrainConfig
    """As the search trained it, seed and split included."""
    epochs: int
    """That a refit trains."""
    search_value: float | None

    @property
    def identity(self) -> str:
        """The same for the same configuration, whatever its seed and split."""
        return identity_of(self.config.model_dump(mode="json"))


def identity_of(config: Mapping[str, Any]) -> str:
    """Names a configuration, as `TrainConfig.model_dump(mode="json")` has it, but for its seed and its split."""
    data = {name: value for name, value in config["data"].items() if name != "split_seed"}
    tree = {name: value for name, value in config.items() if name != "seed"} | {"data": data}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def candidates(study: Study, space: SearchSpace) -> list[Candidate]:
    """All that a criterion speaks for, in the order in which they are preferred, the base among them.

    Each configuration is there once, with all reasons for it. Where one is the base, or a recipe, that is its name.

    Args:
        space: the study's.
    """
    return _Choice(study, space).made()


def confirmed_before(study: Study, identities: Iterable[str]) -> list[Candidate]:
    """The complete trials of the search with one of these configurations, whatever speaks for them now."""
    wanted = set(identities)
    if not wanted:
        return []
    found: dict[str, Candidate] = {}
    for trial in _ranked(study, _complete(study)):
        candidate = _of_trial(study, trial, "confirmed before")
        if candidate.identity in wanted:
            found.setdefault(candidate.identity, candidate)
    return list(found.values())


class _Choice:
    """The candidates of one study, criterion by criterion."""

    def __init__(self, study: Study, space: SearchSpace) -> None:
        self._study, self._space = study, space
        self._trials = _ranked(study, _complete(study))
        self._found: dict[str, Candidate] = {}

    def made(self) -> list[Candidate]:
        firsts = self._firsts()
        recipes = self._recipes()
        rungs = list(self._at_rungs())
        for each in (
            firsts[:1],
            [self._base()],
            rungs[:1],
            self._predicted(),
            recipes[:1],
            firsts[1:2],
            recipes[1:],
            rungs[1:],
            firsts[2:],
        ):
            for candidate in each:
                self._add(candidate)
        return list(self._found.values())

    def _add(self, candidate: Candidate) -> None:
        """Takes it in, or its reasons where the same configuration is there already."""
        known = self._found.get(candidate.identity)
        if known is None:
            self._found[candidate.identity] = candidate
            return
        named = candidate if _rank(candidate) < _rank(known) else known
        # The numbers are those of the trial that was chosen first; of the base and a recipe, if they have been trained.
        numbers = known if known.trial is not None else candidate
        self._found[candidate.identity] = replace(
            numbers,
            key=named.key,
            recipe=known.recipe or candidate.recipe,
            chosen_for=tuple(dict.fromkeys((*known.chosen_for, *candidate.chosen_for))),
        )

    def _base(self) -> Candidate:
        """The base, even where the search has not come to it or could not train it."""
        trial = next((trial for trial in self._trials if is_baseline(trial)), None)
        if trial is not None:
            return replace(_of_trial(self._study, trial, "the base"), key=BASE)
        config = self._space.baseline
        return Candidate(BASE, None, None, ("the base",), config, config.epochs, None)

    def _firsts(self) -> list[Candidate]:
        """The best score and the next ones, of different configurations."""
        seen: dict[str, Candidate] = {}
        for trial in self._trials:
            rank = len(seen)
            candidate = _of_trial(self._study, trial, f"{_ORDINALS[rank]}best validation score")
            seen.setdefault(candidate.identity, candidate)
            if len(seen) == len(_ORDINALS):
                break
        return list(seen.values())

    def _at_rungs(self) -> Iterator[Candidate]:
        """The best complete trial at each rung, the last rung first."""
        epochs, folds = self._space.baseline.epochs, self._space.baseline.data.folds
        pruner = build_pruner(self._space.pruner, epochs, folds)
        if not isinstance(pruner, RungPruner):
            return
        for rung in sorted(pruner.rungs, reverse=True):
            there = [trial for trial in self._trials if rung in trial.intermediate_values]
            best = self._best(there, lambda trial, rung=rung: trial.intermediate_values[rung])  # type: ignore[misc]
            if best is not None:
                where = f"after fold {rung // epochs}" if folds and rung % epochs == 0 else f"at epoch {rung}"
                yield _of_trial(self._study, best, f"best {where}")

    def _predicted(self) -> list[Candidate]:
        """The trial whose neighbours are the best."""
        by_params: dict[str, list[FrozenTrial]] = {}
        for trial in self._trials:
            by_params.setdefault(json.dumps(trial.params, sort_keys=True), []).append(trial)
        trials = [same[0] for same in by_params.values()]
        if len(trials) < 2 * NEIGHBOURS:
            return []
        places = unit_cube([trial.params for trial in trials], self._space.distributions)
        values = [float(np.mean([_value(trial) for trial in same])) for same in by_params.values()]
        predicted = dict(zip((trial.number for trial in trials), predict(places, values), strict=True))
        best = self._best(trials, lambda trial: predicted[trial.number])
        return [] if best is None else [_of_trial(self._study, best, "best predicted by its neighbours")]

    def _recipes(self) -> list[Candidate]:
        """The recipes, the best first: those that are trials, and those that were trained beside the study."""
        found = [
            replace(_of_trial(self._study, trial, "a recipe"), key=f"recipe {name}", recipe=str(name))
            for trial in self._trials
            if (name := trial.user_attrs.get(RECIPE)) is not None
        ]
        for paths in self._study.paths.references():
            result = read_result(paths) or {}
            if math.isfinite(value := result.get("value", math.nan)):
                name = paths.dir.name
                config = load_recipe(paths.config).config
                kept = [row["epoch"] for row in result.get("folds", [result])]
                epochs = int(float(np.mean(kept)) + 0.5)  # of folds the mean, half an epoch to the longer run
                found.append(Candidate(f"recipe {name}", None, name, ("a recipe",), config, epochs, value))
        sign = self._study.sign
        found.sort(key=lambda one: (-sign * (one.search_value or 0.0), one.key))
        # One that was edited after it had been a trial is there twice; the better one keeps the name.
        return list({one.key: one for one in reversed(found)}.values())[::-1]

    def _best(self, trials: Sequence[FrozenTrial], score: Callable[[FrozenTrial], float]) -> FrozenTrial | None:
        """The trial with the best of these scores; of equals the one with the best value."""
        finite = [trial for trial in trials if math.isfinite(score(trial))]
        return max(finite, key=lambda trial: self._study.sign * score(trial), default=None)


def unit_cube(params: Sequence[dict[str, Any]], distributions: dict[str, BaseDistribution]) -> NDArray[np.float64]:
    """(trials, coordinates): where trials lie in the space, each range from 0 to 1, a logarithmic one in its logarithm.

    Two different choices are as far from each other as the ends of a range. What a trial does without lies in the
    middle, as far from all that have it as can be said.
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
    """True is not 1 here."""
    return type(choice) is type(value) and choice == value


def predict(places: NDArray[np.float64], values: Sequence[float]) -> list[float]:
    """What each trial's neighbours, itself among them, say of its score: their mean."""
    from sklearn.neighbors import KNeighborsRegressor  # takes a second, which looking at a study does not need

    model: Any = KNeighborsRegressor(n_neighbors=NEIGHBOURS)
    model.fit(places, values)
    return [float(value) for value in model.predict(places)]


def _of_trial(study: Study, trial: FrozenTrial, why: str) -> Candidate:
    trained = study.trained(trial.number)
    return Candidate(f"trial {trial.number}", trial.number, None, (why,), trained.config, trained.epochs, trained.value)


def _rank(candidate: Candidate) -> int:
    """Which of two names one configuration has: the base's before a recipe's before a trial's."""
    return 0 if candidate.key == BASE else 1 if candidate.recipe is not None else 2


def _complete(study: Study) -> list[FrozenTrial]:
    trials = effective_trials(study.optuna.get_trials(deepcopy=False))
    return [
        trial
        for _, trial in sorted(trials.items())
        if trial.state == TrialState.COMPLETE and math.isfinite(_value(trial))
    ]


def _ranked(study: Study, trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The best first; of equals the one that was there first, as `best_trial` has it."""
    return sorted(trials, key=lambda trial: -study.sign * _value(trial))


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None, "a complete trial has a value"
    return trial.value
