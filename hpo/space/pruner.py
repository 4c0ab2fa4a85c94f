"""Compares trials at their rungs, and stops those that fall behind.

A rung is an epoch, counted from 1. At a rung a trial survives if it is among the best ceil(keep × n) of the n trials
that have come so far (asynchronous successive halving, Li et al. 2018, arXiv 1810.05934). Optuna's own form knows only
the rungs min_resource · η^k, fills every lower rung from a first late report, and counts a retried trial twice; this
one takes any rungs, judges each once, and counts slots. Optuna's pruners stay available by name.

A trial of several folds reports its steps through: epoch e of fold j is step (j - 1) × epochs + e. It is compared at
the rungs of its first fold, and at the end of every fold but the last, where its value is the mean over the finished
folds: there all trials have trained the same folds, and what one fold's images make easy or hard is the same for all.
The ends of the folds together cut as one rung does: each keeps the n-th root of `keep`. With `keep` at every end, three
rungs and five folds, one trial in 2,300 would see its last fold.

What pruning loses cannot be seen in trials that were cut. So a few, `let_through` of them, chosen by their slot before
anything is known of them, go on to their end from the rung that would have cut them: of those their final value is
known, and they are a fair sample of what is cut. For all others the search is what it would have been without them:
such a trial counts at the rungs up to its cut, and at no later one. The sampler alone sees a complete trial, with its
final value, where it would have seen a pruned one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
from hpo.storage.optuna_access import storage_of, trial_id
from hpo.trials import LET_THROUGH, RECIPE, is_baseline, trial_index_of

__all__ = ["Place", "RungPruner", "build_pruner", "lets_through", "places_of", "rung_epochs", "spared"]

_RUNG = "rung:"


def rung_epochs(fractions: Sequence[float], epochs: int) -> tuple[int, ...]:
    """The epochs that these fractions of the run are: at least 1, each once, ascending, before the last epoch."""
    return tuple(sorted({rung for f in fractions if (rung := max(1, round(f * epochs))) < epochs}))


def lets_through(trial_index: int, share: float) -> bool:
    """Whether the trial of a slot goes on where it would be cut: evenly spread over the slots, by their number alone.

    Of 0.02 these are slots 25, 75, 125, …: none where a study has so few trials that one in full would count.

    Args:
        share: of all slots, in [0, 0.5].
    """
    return math.floor(trial_index * share + 0.5) > math.floor((trial_index - 1) * share + 0.5)


@dataclass(frozen=True)
class Place:
    """How a trial stood at a rung, when it was judged there."""

    rank: int
    """1 is the best; equals share the better rank."""
    of: int
    """How many trials had come to the rung, this one included."""
    kept: bool

    def __str__(self) -> str:
        return f"{self.standing}, {'kept' if self.kept else 'pruned'}"

    @property
    def standing(self) -> str:
        """The rank in words: "3rd of 14"."""
        return f"{_ordinal(self.rank)} of {self.of}"


class RungPruner(BasePruner):
    """Prunes a trial that at a rung is not among the best `keep` of the trials that have come so far.

    Reports may come at every epoch; the decision falls when a rung is reached, from the value reported at exactly that
    epoch. It is written into the trial (one small system attribute a rung), so that an attempt that goes on from a
    checkpoint is not judged again among more rivals than its undisturbed twin had. NaN ranks worst, equals survive
    together, and a slot counts once, however often it was retried.

    Args:
        rungs: epochs, counted from 1.
        keep: the fraction that survives each rung, in (0, 1].
        fold_ends: steps that are rungs too, of which each keeps so much that all of them together keep `keep`.
        let_through: the share of slots whose trials go on where they would be cut, in [0, 0.5].
    """

    def __init__(
        self, rungs: Sequence[int], keep: float, fold_ends: Sequence[int] = (), *, let_through: float = 0.0
    ) -> None:
        if any(rung < 1 for rung in (*rungs, *fold_ends)):
            raise ValueError(f"rungs are epochs, counted from 1, not {[*rungs, *fold_ends]}")
        if not 0 < keep <= 1:
            raise ValueError(f"keep must lie in (0, 1], not {keep}")
        if not 0 <= let_through <= 0.5:
            raise ValueError(f"let_through must lie in [0, 0.5], not {let_through}")
        self.keeps = dict.fromkeys(sorted(set(rungs)), keep)
        """Rung -> the fraction that survives it, in the order of the rungs."""
        self.keeps |= {rung: keep ** (1 / len(fold_ends)) for rung in sorted(set(fold_ends))}
        self.rungs = tuple(self.keeps)
        self.let_through = let_through
        # Trial id -> rung -> place: what the storage knows too, so that an epoch between rungs costs no access to it.
        self._places: dict[int, dict[int, Place]] = {}
        # The trials of which the storage has been told that they were let through.
        self._told: set[int] = set()

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial has fallen behind at a rung that it has reached."""
        if spared(trial) or trial.last_step is None:
            return False
        places = self._judged(study, trial)
        for rung in self.rungs:
            if rung > trial.last_step:
                break
            if rung not in places and rung in trial.intermediate_values:
                places[rung] = place = self._judge(study, trial, rung)
                mark = [place.rank, place.of, place.kept]
                storage_of(study).set_trial_system_attr(trial_id(trial), f"{_RUNG}{rung}", mark)
            if rung in places and not places[rung].kept:
                # Behind its cut a trial is not judged any more: it takes no place from others.
                return not self._let_through(study, trial, rung)
        return False

    def verdict(self, study: Study, trial: Trial | FrozenTrial) -> str:
        """What the pruner thinks of the trial, for a progress display: "rung 6: 3rd of 14, kept"."""
        if why := spared(trial):
            return f"{why}, never pruned"
        frozen = storage_of(study).get_trial(trial_id(trial))
        places = _reached(self._judged(study, trial), frozen.last_step or 0)
        if not places:
            return f"first rung: {self.rungs[0]}" if self.rungs else ""
        rung = max(places)
        if not places[rung].kept and self._goes_on(frozen):
            return f"rung {rung}: {places[rung].standing}, let through on purpose"
        return f"rung {rung}: {places[rung]}"

    def _goes_on(self, trial: FrozenTrial) -> bool:
        """Whether a trial goes on where it is cut; one that did does so under another share too."""
        return LET_THROUGH in trial.user_attrs or lets_through(trial_index_of(trial), self.let_through)

    def _let_through(self, study: Study, trial: FrozenTrial, rung: int) -> bool:
        """Whether a trial that is cut at the rung goes on; the storage is told so, once."""
        if not self._goes_on(trial):
            return False
        if trial_id(trial) not in self._told and LET_THROUGH not in trial.user_attrs:
            storage_of(study).set_trial_user_attr(trial_id(trial), LET_THROUGH, rung)
        self._told.add(trial_id(trial))
        return True

    def _judged(self, study: Study, trial: Trial | FrozenTrial) -> dict[int, Place]:
        """The places that the trial, or the attempts before it, have been given."""
        if trial_id(trial) not in self._places:
            self._places[trial_id(trial)] = {
                int(key.removeprefix(_RUNG)): Place(*mark)
                for key, mark in storage_of(study).get_trial_system_attrs(trial_id(trial)).items()
                if key.startswith(_RUNG)
            }
        return self._places[trial_id(trial)]

    def _judge(self, study: Study, trial: FrozenTrial, rung: int) -> Place:
        sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
        own = _goodness(trial.intermediate_values[rung], sign)
        rivals: dict[int, float] = {}  # slot -> its goodness at the rung; a later attempt overwrites an earlier
        for other in study.get_trials(deepcopy=False):
            cut_before = other.user_attrs.get(LET_THROUGH, rung) < rung
            if other.state != TrialState.FAIL and rung in other.intermediate_values and not cut_before:
                rivals[trial_index_of(other)] = _goodness(other.intermediate_values[rung], sign)
        rivals.pop(trial_index_of(trial), None)
        of = len(rivals) + 1
        rank = 1 + sum(goodness > own for goodness in rivals.values())
        # Less a rounding error: 0.07 × 100 is 7.000000000000001, and keeps 7.
        return Place(rank, of, rank <= math.ceil(self.keeps[rung] * of - 1e-9))


def spared(trial: Trial | FrozenTrial) -> str:
    """What a trial is that runs to its end, whatever it reports, since the best one is compared to it; else empty."""
    if is_baseline(trial):
        return "the base"
    return f"recipe {trial.user_attrs[RECIPE]}" if RECIPE in trial.user_attrs else ""


def places_of(trial: FrozenTrial) -> dict[int, Place]:
    """Rung -> the place that a trial was given there, of the rungs that it has come to, in their order."""
    marks = {key: mark for key, mark in trial.system_attrs.items() if key.startswith(_RUNG)}
    places = {int(key.removeprefix(_RUNG)): Place(*mark) for key, mark in marks.items()}
    return dict(sorted(_reached(places, trial.last_step or 0).items()))


def _reached(places: Mapping[int, Place], epoch: int) -> dict[int, Place]:
    """The places at the rungs up to an epoch: the marks of a later one are an interrupted attempt's, which this one has
    still to come to."""
    return {rung: place for rung, place in places.items() if rung <= epoch}


def _goodness(value: float, sign: float) -> float:
    return -math.inf if math.isnan(value) else sign * value


def _ordinal(n: int) -> str:
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"


class _Sparing(BasePruner):
    """Before an Optuna pruner in the order of classes: the base and the recipes run to their end."""

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        return not spared(trial) and super().prune(study, trial)  # type: ignore[safe-super]


# Subclasses, not wrappers: Optuna asks `isinstance(study.pruner, HyperbandPruner)` to give brackets their own history.
class _Median(_Sparing, MedianPruner): ...


class _Percentile(_Sparing, PercentilePruner): ...


class _SuccessiveHalving(_Sparing, SuccessiveHalvingPruner): ...


class _Hyperband(_Sparing, HyperbandPruner): ...


def build_pruner(config: grammar.Pruner, epochs: int, folds: int | None = None) -> BasePruner:
    """The pruner that a search space asks for, for runs of that many epochs in each fold.

    What it has as a fraction of the run is one of the first fold's epochs. A trial that was retried counts twice for
    Optuna's pruners, which know no slots.
    """
    match config:
        case grammar.RungsPruner():
            fold_ends = [fold * epochs for fold in range(1, folds or 1)]
            rungs = rung_epochs(config.rungs, epochs)
            return RungPruner(rungs, config.keep, fold_ends, let_through=config.let_through)
        case grammar.NoPruner():
            return NopPruner()
        case grammar.MedianPruner():
            return _Median(config.startup_trials, round(config.warmup_fraction * epochs))
        case grammar.PercentilePruner():
            return _Percentile(100 * config.keep, config.startup_trials, round(config.warmup_fraction * epochs))
        case grammar.SuccessiveHalvingPruner():
            first = max(1, round(config.min_fraction * epochs))
            return _SuccessiveHalving(first, config.reduction_factor)
        case grammar.HyperbandPruner():
            first = max(1, round(config.min_fraction * epochs))
            return _Hyperband(first, epochs * (folds or 1), config.reduction_factor)
