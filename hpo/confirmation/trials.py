"""The confirmation as a study of its own: what is queued, who is stopped, and what it came to.

A trial is one configuration on one replicate: a seed and a split that all configurations of the replicate share, so
that they are compared in pairs, and that the search never had. Replicates are queued one after the other, each with
all configurations, and before a claimed trial trains, whoever claimed it asks whether its configuration can still win.
So no coordinator is needed, and any number of workers may train, of this machine and of others. The splits draw other
validation images each time; the test images are the same for all, and stay locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import count
from typing import TYPE_CHECKING

import optuna
from optuna.trial import FrozenTrial, TrialState

from core.config import TrainConfig
from core.data import Dataset, folds
from core.errors import UserError
from core.runtime import derive_seed
from hpo.confirmation import statistics
from hpo.confirmation.candidates import Candidate, candidates, confirmed_before, identity_of
from hpo.confirmation.result import BASE, Confirmation, Contender, searched_best
from hpo.confirmation.statistics import GOOD_REPLICATES, MAX_CANDIDATES, MAX_REPLICATES, allocate
from hpo.errors import StudyError
from hpo.paths import StudyPaths, confirmation_of
from hpo.space import CANDIDATE, REPLICATE, ConfirmationSpace
from hpo.study import Study, open_study
from hpo.study.metadata import read_metadata
from hpo.study.versions import versions
from hpo.trials import CONFIG, FAILURE, STOPPED, effective_trials, trial_index_of

if TYPE_CHECKING:
    from pathlib import Path

    from core.data import Splits
    from hpo.space import SearchSpace

_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_SPLIT_SEEDS = 2**31  # what `data.split_seed` may be
_TRIED_SPLITS = 100  # of a replicate, before it is said that none can be trained on


@dataclass(frozen=True)
class Training:
    """One configuration on one replicate, queued, trained or stopped."""

    trial_index: int
    key: str
    """The candidate's name when it was queued."""
    identity: str
    """Names its configuration."""
    replicate: int
    is_over: bool
    values: tuple[float, ...] | None
    """One, or one a fold; NaN where it could not be trained; None where it was not trained, or not yet."""
    stopped: str | None
    failure: str | None
    epochs: int
    elapsed_s: float

    @classmethod
    def of(cls, trial: FrozenTrial) -> Training:
        """What a confirmation's trial is."""
        attributes = trial.user_attrs
        config, failure = attributes[CONFIG], attributes.get(FAILURE)
        values = None
        if trial.state == TrialState.COMPLETE:
            values = tuple(map(float, attributes.get("fold_values", trial.values)))
        elif failure is not None:
            values = (math.nan,) * (config["data"]["folds"] or 1)
        return cls(
            trial_index_of(trial),
            str(attributes[CANDIDATE]),
            identity_of(config),
            int(attributes[REPLICATE]),
            trial.state in _FINISHED,
            values,
            attributes.get(STOPPED),
            failure,
            int(attributes.get("epochs", 0)),
            float(attributes.get("elapsed_s", 0.0)),
        )


def trainings(study: Study) -> list[Training]:
    """All of a confirmation, by slot."""
    trials = effective_trials(study.optuna.get_trials(deepcopy=False))
    return [Training.of(trial) for _, trial in sorted(trials.items())]


def scores_of(found: Iterable[Training]) -> dict[str, dict[int, tuple[float, ...]]]:
    """Configuration -> replicate -> values, of what was trained."""
    scores: dict[str, dict[int, tuple[float, ...]]] = {}
    for training in found:
        if training.values is not None:
            scores.setdefault(training.identity, {})[training.replicate] = training.values
    return scores


def why_stopped(study: Study, space: ConfirmationSpace, trial: optuna.Trial, trial_index: int) -> str | None:
    """Why a claimed trial need not be trained: its candidate cannot win any more. None: it is to be trained.

    What is asked is what stands in lower slots, so that a confirmation that is cut off and goes on decides as an
    undisturbed one. The base is compared with all others, and never stopped unless it cannot be trained.
    """
    identity = identity_of(trial.user_attrs[CONFIG])
    before = [training for training in trainings(study) if training.trial_index < trial_index]
    stopped = (training.stopped for training in before if training.identity == identity and training.stopped)
    if (known := next(stopped, None)) is not None:
        return known
    scores, names = scores_of(before), {training.identity: training.key for training in before}
    own = scores.pop(identity, {})
    rivals = {} if trial.user_attrs[CANDIDATE] == BASE else {names[other]: found for other, found in scores.items()}
    return statistics.cannot_win(
        own,
        rivals,
        test_share=space.test_share,
        maximize=space.direction == "maximize",
        resolution=space.resolution,
    )


def replicated(config: TrainConfig, replicate: int, *, seed: int, dataset: Dataset | None = None) -> TrainConfig:
    """The configuration as a replicate trains it: on the replicate's split, with the replicate's seed.

    Args:
        config: as the search trained it, which neither split nor seed will be.
        seed: the study's.
        dataset: the images. Where many are copies of each other, one split leaves a class without any, and another does
            not: the first that does not is taken. None: the first of all.

    Raises:
        UserError: none of many splits can be trained on.
    """
    trained = config.override({"seed": derive_seed(seed, "confirm", replicate)})
    draws = (derive_seed(seed, "confirm", replicate, "split", again) % _SPLIT_SEEDS for again in count())
    others = (draw for draw in draws if draw != config.data.split_seed)
    for tried, split_seed in enumerate(others, 1):
        found = trained.override({"data.split_seed": split_seed})
        try:
            if dataset is not None:
                folds(dataset, found.data)
        except UserError:
            if tried >= _TRIED_SPLITS:
                raise
        else:
            return found
    raise AssertionError("there is no end of draws")


def search_epochs(study: Study) -> int:
    """The epochs that the finished trials of a search have trained."""
    trials = effective_trials(study.optuna.get_trials(deepcopy=False)).values()
    return sum(int(trial.user_attrs.get("epochs", 0)) for trial in trials if trial.state in _FINISHED)


def open_confirmation(
    search: Study, space: SearchSpace, dataset: Dataset, splits: Sequence[Splits], *, data_path: Path | None
) -> Study:
    """Begins the confirmation of a study beside it, in the same storage, or goes on to it.

    Args:
        space: the search's.
        splits: the search's: one, or one a fold.

    Raises:
        StudyError: a confirmation of another study of this name lies there.
    """
    confirming = ConfirmationSpace.of(
        search.name,
        space.objective,
        space.baseline,
        space.path,
        train_images=len(splits[0].train),
        val_images=len(splits[0].val),
    )
    name = confirmation_of(search.name)
    paths = StudyPaths.of(name)
    written = read_metadata(paths)
    if written is not None and written["hash"] != confirming.hash:
        raise StudyError(
            f"study {name} confirms another study that was called {search.name}; delete {paths.dir}, or give the "
            "search another --study"
        )
    study = open_study(
        confirming,
        name=name,
        dataset=dataset,
        storage_url=search.storage_url,
        seed=search.seed,
        data_path=data_path,
    )
    study.use_depot(None if search.depot is None else search.depot.url)
    study.remember_space(confirming)
    return study


@contextlib.contextmanager
def _alone(paths: StudyPaths) -> Iterator[None]:
    """No other process of this machine queues meanwhile: two that saw the same missing would both queue it."""
    paths.dir.mkdir(parents=True, exist_ok=True)
    with paths.queueing.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Plan:
    """What a confirmation trains: the candidates that its budget allows, on as many replicates.

    Args:
        space: the search's.
        share: what it may cost, as a share of the epochs that the search has trained; None is a third, and at least
            what two configurations cost `GOOD_REPLICATES` times: with fewer, one that is five points better is found no
            more often than not.

    Raises:
        StudyError: no trial of the search is complete.
    """

    def __init__(self, search: Study, space: SearchSpace, *, share: float | None) -> None:
        if search.best_trial() is None:
            raise StudyError(f"study {search.name} has no complete trial yet; go on with it by hpo run")
        self._search, self._seed = search, search.seed
        self.cost_epochs = space.baseline.epochs * (space.baseline.data.folds or 1)
        """Of one training, at most."""
        self.search_trials, self.search_epochs = search.counts().finished, search_epochs(search)
        if share is None:
            self.budget_epochs = max(self.search_epochs // 3, 2 * GOOD_REPLICATES * self.cost_epochs)
        else:
            self.budget_epochs = int(share * self.search_epochs + 1e-9)  # less a rounding error: 0.1 × 30 is 3
        self._preferred = preferred = candidates(search, space)
        self.allocation = allocate(budget_trainings=self.budget_epochs // self.cost_epochs, candidates=len(preferred))
        self.chosen = tuple(preferred[: self.allocation.candidates])
        why = "for which the budget is too small"
        if self.allocation.candidates == MAX_CANDIDATES:
            why = f"since more than {MAX_CANDIDATES} would only widen all intervals"
        self.left_out = tuple(
            f"{candidate.key} ({', '.join(candidate.chosen_for)}), {why}"
            for candidate in preferred[self.allocation.candidates :]
        )

    @property
    def challengers(self) -> tuple[Candidate, ...]:
        """All but the base; without one there is nothing to train."""
        return tuple(candidate for candidate in self.chosen if candidate.key != BASE)

    @property
    def is_over_budget(self) -> bool:
        """Whether the least that says anything costs more than was asked for."""
        return self.allocation.trainings * self.cost_epochs > self.budget_epochs

    def queue(self, study: Study, dataset: Dataset | None = None) -> int:
        """Queues what is missing, replicate by replicate; returns how many trainings.

        Where all that was planned is over, what early stopping has saved goes to those that are still in. Not until one
        of them is found to be better: a test that is repeated until it finds something finds it too often.

        Args:
            study: the confirmation.
            dataset: the images, for splits that can be trained on; see `replicated`.

        Raises:
            UserError: there are none such.
        """
        with _alone(study.paths):
            return self._queue(study, dataset)

    def _queue(self, study: Study, dataset: Dataset | None) -> int:
        there = trainings(study)
        missing = self._missing(there, range(self.allocation.replicates))
        if not missing and all(training.is_over for training in there):
            missing = self._saved(there)
        places = {identity: place for place, identity in enumerate(dict.fromkeys(t.identity for t in there))}
        queued = []
        for candidate, replicate in missing:
            place = places.setdefault(candidate.identity, len(places))
            config = replicated(candidate.config, replicate, seed=self._seed, dataset=dataset)
            attributes = {CANDIDATE: candidate.key, REPLICATE: replicate, CONFIG: config.model_dump(mode="json")}
            queued.append(({CANDIDATE: place, REPLICATE: replicate}, attributes))
        study.queue.enqueue(queued)  # without any too: whoever queued before may have died before the total was raised
        return len(queued)

    def _missing(self, there: Sequence[Training], replicates: Iterable[int]) -> list[tuple[Candidate, int]]:
        """What is neither trained nor queued, of those that are still in."""
        known = {(training.identity, training.replicate) for training in there}
        effective_trials = self._standing(there)
        return [
            (one, number) for number in replicates for one in effective_trials if (one.identity, number) not in known
        ]

    def _saved(self, there: Sequence[Training]) -> list[tuple[Candidate, int]]:
        """More replicates of those that are still in, as many as the plan's trainings still allow."""
        effective_trials, identities = self._standing(there), {candidate.identity for candidate in self.chosen}
        if len(effective_trials) < 2:
            return []
        trained = sum(training.values is not None for training in there if training.identity in identities)
        more: list[tuple[Candidate, int]] = []
        for replicate in range(self.allocation.replicates, MAX_REPLICATES):
            round_ = self._missing(there, [replicate])
            if trained + len(more) + len(round_) > self.allocation.trainings:
                break
            more += round_
        return more

    def _standing(self, there: Sequence[Training]) -> list[Candidate]:
        """The candidates that are still in; none where all challengers are out."""
        out = {training.identity for training in there if training.stopped or training.failure}
        challengers = [candidate for candidate in self.challengers if candidate.identity not in out]
        return [one for one in self.chosen if one.identity not in out] if challengers else []

    def conclude(self, study: Study | None) -> Confirmation:
        """What the trainings came to, so far.

        Args:
            study: the confirmation; None where there was nothing to train.

        Raises:
            StudyError: nothing could be trained.
        """
        there = [] if study is None else trainings(study)
        confirming = study.space() if study is not None else None
        contenders = [
            _contender(candidate, [training for training in there if training.identity == candidate.identity])
            for candidate in (*self.chosen, *self._earlier(there))
        ]
        return _concluded(self, self._search, contenders, there, confirming)

    def _earlier(self, there: Sequence[Training]) -> list[Candidate]:
        """Those that an earlier confirmation trained and this one would not: they had their chance, and may win."""
        left = {training.identity for training in there if training.values} - {one.identity for one in self.chosen}
        spoken_for = [one for one in self._preferred if one.identity in left]
        return spoken_for + confirmed_before(self._search, left - {one.identity for one in spoken_for})


def _contender(candidate: Candidate, there: Collection[Training]) -> Contender:
    failures = [training.failure for training in there if training.failure]
    stopped = [training.stopped for training in there if training.stopped]
    return Contender(
        key=candidate.key,
        trial=candidate.trial,
        recipe=candidate.recipe,
        chosen_for=candidate.chosen_for,
        config=candidate.config.model_dump(mode="json"),
        epochs=candidate.epochs,
        search_value=candidate.search_value,
        scores=scores_of(there).get(candidate.identity, {}),
        stopped=None if failures or not stopped else stopped[0],
        failure=failures[0] if failures else None,
        interval=None,
    )


def _concluded(
    plan: Plan,
    search: Study,
    contenders: Sequence[Contender],
    there: Sequence[Training],
    confirming: SearchSpace | None,
) -> Confirmation:
    """Judges the contenders, and puts all that is to be said into one place."""
    maximize = search.direction == "maximize"
    judgement = None
    if isinstance(confirming, ConfirmationSpace):
        try:
            judgement = statistics.judge(
                {one.key: one.scores for one in contenders},
                base=BASE,
                stopped=[one.key for one in contenders if one.stopped is not None],
                test_share=confirming.test_share,
                maximize=maximize,
                resolution=confirming.resolution,
            )
        except ValueError as error:
            failures = ", ".join(f"{one.key}: {one.failure or 'not trained yet'}" for one in contenders)
            raise StudyError(
                f"study {search.name}: nothing could be trained again ({failures}); look at it by "
                f"hpo study show {confirmation_of(search.name)}"
            ) from error
    intervals = {} if judgement is None else judgement.scores
    judged = [replace(one, interval=intervals.get(one.key)) for one in contenders]
    judged.sort(key=lambda one: math.inf if one.interval is None else -search.sign * one.interval.mean)
    return Confirmation(
        study=search.name,
        metric=search.metric,
        direction=search.direction,
        contenders=tuple(judged),
        leader=None if judgement is None else judgement.leader,
        winner=BASE if judgement is None else judgement.winner,
        evidence=judgement is not None and judgement.evidence,
        advantage=None if judgement is None else judgement.advantage,
        optimism=_optimism(judged, maximize=maximize),
        search_epochs=plan.search_epochs,
        budget_epochs=plan.budget_epochs,
        epochs=sum(training.epochs for training in there),
        trainings=sum(training.values is not None for training in there),
        replicates=max((len(one.scores) for one in judged), default=0),
        elapsed_s=sum(training.elapsed_s for training in there),
        left_out=plan.left_out,
        search_trials=plan.search_trials,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
    )


def _optimism(contenders: Sequence[Contender], *, maximize: bool) -> float | None:
    """How much the search's own best score flatters; None where that trial has no score of its own to be held to."""
    best = searched_best(contenders, maximize=maximize)
    if best is None or best.search_value is None or best.interval is None:
        return None
    return statistics.optimism(best.search_value, best.interval, maximize=maximize)
