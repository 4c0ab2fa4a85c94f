"""Prunes or pauses trials at rungs; also builds Optuna's pruners by name.

`rungs` is asynchronous successive halving.

A trial survives a rung (an epoch) if it is among the best ceil(keep × n) of the n trials that have reached it so far
(Li et al. 2018, arXiv 1810.05934). Unlike Optuna's, it takes any rungs, decides once at each, and counts a retried
trial once. With folds, epoch e of fold j is step (j - 1) × epochs + e, and the end of every fold but the last is a rung
too, for the mean over the finished folds.

Accuracies of few images are noisy, so where a study maximizes accuracy, its rungs rank by the validation loss at the
best temperature; `docs/benchmarks.md` compares the two.

Among equally good trials the noise of validation decides, and each is cut with probability 1 - keep, or less often
while few have reached the rung and where scores are equal.

In a study with costs beside the score, a trial is compared only with those that cost about as much or less: a small
network is not cut by larger ones.

A few trials continue where they would be pruned, to measure the loss by pruning. They do not count at later rungs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
)
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from hpo.space import grammar
from hpo.space.own_parts import own_pruner
from hpo.storage.optuna_access import storage_of, trial_id
from hpo.trials import COSTS, LET_THROUGH, RECIPE, RUNG_LOSS, is_baseline, trial_index_of

_RUNG = "rung:"
SIMILAR = 1.25
"""In studies with costs, a trial is compared at a rung with those that cost at most this many times as much."""


def rung_epochs(fractions: Sequence[float], epochs: int) -> tuple[int, ...]:
    """Convert fractions of a run to distinct epochs, ascending, without the last epoch."""
    return tuple(sorted({rung for f in fractions if (rung := max(1, round(f * epochs))) < epochs}))


def lets_through(trial_index: int, fraction: float) -> bool:
    """Whether a trial is let through; the chosen trial indices are evenly spaced: with 0.02, 25, 75, 125 and so on."""
    return math.floor(trial_index * fraction + 0.5) > math.floor((trial_index - 1) * fraction + 0.5)


class Place(NamedTuple):
    """Rank of a trial at a rung when it was decided."""

    rank: int
    """1 is the best; equals share the better rank."""
    of: int
    """Number of trials that had reached the rung, including this one."""
    kept: bool

    def __str__(self) -> str:
        return f"{self.standing}, {'kept' if self.kept else 'pruned'}"

    @property
    def standing(self) -> str:
        """The rank in words: "3rd of 14"."""
        suffix = "th" if 10 <= self.rank % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(self.rank % 10, "th")
        return f"{self.rank}{suffix} of {self.of}"


class RungPruner(BasePruner):
    """Prunes by asynchronous successive halving. NaN ranks worst.

    The decision is stored in the trial, so that a resumed attempt is not compared again.

    Args:
        rungs: Epochs, counted from 1.
        keep: Fraction that survives each rung, in (0, 1].
        fold_ends: Steps that are rungs too, each with the n-th root of `keep`.
        let_through: Fraction of the trial indices whose trials are not pruned, in [0, 0.5].
    """

    def __init__(
        self, rungs: Sequence[int], keep: float, fold_ends: Sequence[int] = (), *, let_through: float = 0.0
    ) -> None:
        if any(rung < 1 for rung in (*rungs, *fold_ends)):
            raise ValueError(f"rungs are epochs, counted from 1, not {[*rungs, *fold_ends]}")
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be in (0, 1], not {keep}")
        if not 0 <= let_through <= 0.5:
            raise ValueError(f"let_through must be in [0, 0.5], not {let_through}")
        self.keeps = dict.fromkeys(sorted(set(rungs)), keep)
        """Rung -> the fraction that survives it, ascending by rung."""
        self.keeps |= {rung: keep ** (1 / len(fold_ends)) for rung in sorted(set(fold_ends))}
        self.rungs = tuple(self.keeps)
        self.let_through = let_through
        # Trial id -> rung -> place: a cache, so that epochs between rungs do not read the storage.
        self._places: dict[int, dict[int, Place]] = {}
        self._marked: set[int] = set()  # ids of trials whose attribute is in the storage

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        if spared(trial) or trial.last_step is None:
            return False
        places = self._stored_places(study, trial)
        for rung in self.rungs:
            if rung > trial.last_step:
                break
            if rung not in places and rung in trial.intermediate_values:
                places[rung] = self._place_at(study, trial, rung)
                mark_place(study, trial, rung, places[rung])
            if rung in places and not places[rung].kept:
                if not self._continues(trial):
                    return True
                self._mark_let_through(study, trial, rung)
                return False
        return False

    def verdict(self, study: Study, trial: Trial | FrozenTrial) -> str:
        """The trial's last decision: "rung 6: 3rd of 14, kept"."""
        if why := spared(trial):
            return f"{why}, never pruned"
        frozen = storage_of(study).get_trial(trial_id(trial))
        places = _reached(self._stored_places(study, trial), frozen.last_step or 0)
        if not places:
            return f"first rung: {self.rungs[0]}" if self.rungs else ""
        rung = max(places)
        if not places[rung].kept and self._continues(frozen):
            return f"rung {rung}: {places[rung].standing}, let through on purpose"
        return f"rung {rung}: {places[rung]}"

    def _continues(self, trial: FrozenTrial) -> bool:
        # An earlier attempt may have been let through under another fraction.
        return LET_THROUGH in trial.user_attrs or lets_through(trial_index_of(trial), self.let_through)

    def _mark_let_through(self, study: Study, trial: FrozenTrial, rung: int) -> None:
        if trial_id(trial) not in self._marked and LET_THROUGH not in trial.user_attrs:
            storage_of(study).set_trial_user_attr(trial_id(trial), LET_THROUGH, rung)
        self._marked.add(trial_id(trial))

    def _stored_places(self, study: Study, trial: Trial | FrozenTrial) -> dict[int, Place]:
        if trial_id(trial) not in self._places:
            self._places[trial_id(trial)] = _marks(storage_of(study).get_trial_system_attrs(trial_id(trial)))
        return self._places[trial_id(trial)]

    def _place_at(self, study: Study, trial: FrozenTrial, rung: int) -> Place:
        sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
        others: dict[int, FrozenTrial] = {}  # by trial index; a later attempt replaces an earlier one
        for other in study.get_trials(deepcopy=False):
            cut_before = other.user_attrs.get(LET_THROUGH, rung) < rung
            comparable = rung in other.intermediate_values and not _is_dearer(other, trial)
            if other.state != TrialState.FAIL and comparable and not cut_before:
                others[trial_index_of(other)] = other
        others.pop(trial_index_of(trial), None)
        of = len(others) + 1
        own, *theirs = goodness_at([trial, *others.values()], rung, sign)
        rank = 1 + sum(goodness > own for goodness in theirs)
        # Less a rounding error: 0.07 × 100 is 7.000000000000001, and keeps 7.
        return Place(rank, of, rank <= math.ceil(self.keeps[rung] * of - 1e-9))


def _is_dearer(other: FrozenTrial, trial: FrozenTrial) -> bool:
    """Whether a trial costs over `SIMILAR` times as much as another, in any cost that is known of both."""
    theirs, own = other.user_attrs.get(COSTS, {}), trial.user_attrs.get(COSTS, {})
    return any(cost > SIMILAR * own[name] for name, cost in theirs.items() if name in own)


class PromotePruner(NopPruner):
    """Prunes nothing: trials pause at its rungs, and `hpo.study.promotion` decides which of them continue.

    Args:
        rungs: Steps, counted from 1, ascending.
        reduction_factor: One in this many trials at a rung continues.
    """

    def __init__(self, rungs: Sequence[int], reduction_factor: int) -> None:
        self.rungs, self.reduction_factor = tuple(rungs), reduction_factor

    def used(self, trials: int) -> tuple[int, ...]:
        """Return the rungs in a study of so many trials: those that at least `reduction_factor` of them reach."""
        fewest = self.reduction_factor
        return tuple(rung for k, rung in enumerate(self.rungs) if math.ceil(trials / fewest**k) >= fewest)


def keeps_of(pruner: BasePruner, trials: int) -> dict[int, float]:
    """Return rung -> the fraction that survives it, ascending, in a study of so many trials; empty without rungs."""
    match pruner:
        case RungPruner():
            return dict(pruner.keeps)
        case PromotePruner():
            return dict.fromkeys(pruner.used(trials), 1 / pruner.reduction_factor)
    return {}


def mark_place(study: Study, trial: FrozenTrial, rung: int, place: Place) -> None:
    """Store the decision about a trial at a rung."""
    storage_of(study).set_trial_system_attr(trial_id(trial), f"{_RUNG}{rung}", list(place))


def spared(trial: Trial | FrozenTrial) -> str:
    """The baseline or a recipe, which is never pruned; empty for other trials."""
    if is_baseline(trial):
        return "the baseline"
    return f"recipe {trial.user_attrs[RECIPE]}" if RECIPE in trial.user_attrs else ""


def places_of(trial: FrozenTrial) -> dict[int, Place]:
    """The places at the rungs reached."""
    return dict(sorted(_reached(_marks(trial.system_attrs), trial.last_step or 0).items()))


def _marks(attributes: Mapping[str, Any]) -> dict[int, Place]:
    return {int(key.removeprefix(_RUNG)): Place(*mark) for key, mark in attributes.items() if key.startswith(_RUNG)}


def _reached(places: Mapping[int, Place], epoch: int) -> dict[int, Place]:
    """The places up to an epoch; later ones belong to an interrupted attempt."""
    return {rung: place for rung, place in places.items() if rung <= epoch}


def goodness_at(trials: Sequence[FrozenTrial], rung: int, sign: float) -> list[float]:
    """Return what ranks trials that reached a rung; larger is better.

    It is the calibrated loss if all of them have it (see `RUNG_LOSS`), and the reported value otherwise.
    """
    key = f"{RUNG_LOSS}{rung}"
    losses = [float(trial.system_attrs[key]) for trial in trials if key in trial.system_attrs]
    if len(losses) < len(trials):
        return [_goodness(trial.intermediate_values[rung], sign) for trial in trials]
    return [_goodness(loss, -1.0) for loss in losses]


def mark_loss(study: Study, trial: Trial, step: int, loss: float) -> None:
    """Store the calibrated loss of a trial at a step."""
    storage_of(study).set_trial_system_attr(trial_id(trial), f"{RUNG_LOSS}{step}", loss)


def _goodness(value: float, sign: float) -> float:
    return -math.inf if math.isnan(value) else sign * value


class _Sparing(BasePruner):
    """Mixin: the baseline and the recipes are not pruned."""

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        return not spared(trial) and super().prune(study, trial)  # type: ignore[safe-super]


# Subclasses, not wrappers: Optuna checks isinstance(study.pruner, HyperbandPruner) to separate the brackets' trials.
class _Median(_Sparing, MedianPruner): ...


class _Percentile(_Sparing, PercentilePruner): ...


class _SuccessiveHalving(_Sparing, SuccessiveHalvingPruner): ...


class _Hyperband(_Sparing, HyperbandPruner): ...


class _Own(BasePruner):
    """The user's pruner for all trials but the baseline and the recipes, imported when it is first needed."""

    def __init__(self, config: grammar.OwnPruner) -> None:
        self._config = config

    @cached_property
    def _pruner(self) -> BasePruner:
        return own_pruner(self._config)

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        return not spared(trial) and self._pruner.prune(study, trial)


def build_pruner(config: grammar.Pruner, epochs: int, folds: int | None = None) -> BasePruner:
    """Build the pruner of runs, or folds, of these epochs. Optuna's pruners count a retried trial twice."""

    def epoch(fraction: float) -> int:
        return max(1, round(fraction * epochs))

    match config:
        case grammar.OwnPruner():
            return _Own(config)
        case grammar.RungsPruner():
            fold_ends = [fold * epochs for fold in range(1, folds or 1)]
            rungs = rung_epochs(config.rungs, epochs)
            return RungPruner(rungs, config.keep, fold_ends, let_through=config.let_through)
        case grammar.PromotePruner():
            return PromotePruner(rung_epochs(config.rungs, epochs * (folds or 1)), config.reduction_factor)
        case grammar.NoPruner():
            return NopPruner()
        case grammar.MedianPruner():
            return _Median(config.startup_trials, round(config.warmup_fraction * epochs))
        case grammar.PercentilePruner():
            return _Percentile(100 * config.keep, config.startup_trials, round(config.warmup_fraction * epochs))
        case grammar.SuccessiveHalvingPruner():
            return _SuccessiveHalving(epoch(config.min_fraction), config.reduction_factor)
        case grammar.HyperbandPruner():
            return _Hyperband(epoch(config.min_fraction), epochs * (folds or 1), config.reduction_factor)
