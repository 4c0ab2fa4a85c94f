"""The confirmation as a study of its own: which trainings are queued, and which are stopped early.

A trial trains one configuration on one replicate: a seed and a split that are new to the search. The splits are the
folds of a repeated k-fold, so that each image is validated once per repeat. Before a worker trains a claimed trial, it
checks whether the configuration can still win, so workers need no coordinator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import optuna
from filelock import FileLock
from optuna.trial import FrozenTrial, TrialState

from core.config import TrainConfig
from core.data import Dataset, folds, val_parts
from core.errors import UserError
from core.runtime import derive_seed
from hpo.confirmation import statistics
from hpo.confirmation.candidates import best_trial, candidates, confirmed_before
from hpo.confirmation.result import BASELINE, Candidate, current_key, dump, identity_of
from hpo.confirmation.statistics import GOOD_REPLICATES, MAX_CANDIDATES, MAX_REPLICATES, allocate
from hpo.errors import StudyError
from hpo.paths import StudyPaths, confirmation_of
from hpo.space import CANDIDATE, REPLICATE, ConfirmationSpace
from hpo.study import Study, open_study
from hpo.study.metadata import read_metadata
from hpo.trials import CONFIG, FAILURE, STOPPED, effective_trials, trial_index_of

if TYPE_CHECKING:
    from pathlib import Path

    from core.data import Splits
    from hpo.space import SearchSpace

_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_SPLIT_SEEDS = 2**31  # range of `data.split_seed`
_MAX_DRAWS = 100  # splits tried for a replicate


@dataclass(frozen=True)
class Training:
    """One configuration on one replicate: queued, trained or stopped."""

    number: int
    """Of the trial."""
    trial_index: int
    key: str
    """Of the candidate, when it was queued."""
    identity: str
    """See `identity_of`."""
    replicate: int
    val_part: int | None
    """See `DataConfig`; None if its split was drawn freely."""
    is_over: bool
    values: tuple[float, ...] | None
    """The value of each fold (one without folds), NaN if it failed; None if it was not trained, or not yet."""
    stopped: str | None
    """Why it was not trained."""
    failure: str | None
    """Why it failed."""
    epochs: int
    elapsed_s: float

    @classmethod
    def of(cls, trial: FrozenTrial) -> Training:
        attributes = trial.user_attrs
        config, failure = attributes[CONFIG], attributes.get(FAILURE)
        values = None
        if trial.state == TrialState.COMPLETE:
            values = tuple(map(float, attributes.get("fold_values", trial.values)))
        elif failure is not None:
            values = (math.nan,) * (config["data"]["folds"] or 1)
        return cls(
            trial.number,
            trial_index_of(trial),
            current_key(str(attributes[CANDIDATE])),
            identity_of(config),
            int(attributes[REPLICATE]),
            config["data"].get("val_part"),
            trial.state in _FINISHED,
            values,
            attributes.get(STOPPED),
            failure,
            int(attributes.get("epochs", 0)),
            float(attributes.get("elapsed_s", 0.0)),
        )


def trainings(study: Study) -> list[Training]:
    """Return all trainings of a confirmation, by trial index."""
    trials = effective_trials(study.optuna.get_trials(deepcopy=False))
    return [Training.of(trial) for _, trial in sorted(trials.items())]


def scores_of(found: Iterable[Training]) -> dict[str, dict[int, tuple[float, ...]]]:
    """Group values by configuration and replicate, without those not trained."""
    scores: dict[str, dict[int, tuple[float, ...]]] = {}
    for training in found:
        if training.values is not None:
            scores.setdefault(training.identity, {})[training.replicate] = training.values
    return scores


def in_parts(known: Sequence[Training]) -> bool:
    """Whether the replicates of a confirmation validate disjoint parts in turn; those of earlier versions do not."""
    return not known or any(training.val_part is not None for training in known)


def per_repeat(known: Iterable[Training]) -> int:
    """Return the number of replicates whose validation images are disjoint; of an unfinished repeat those it has."""
    return 1 + max((training.val_part or 0 for training in known), default=0)


def why_stopped(study: Study, space: ConfirmationSpace, trial: optuna.Trial, trial_index: int) -> str | None:
    """Explain why a claimed trial of a confirmation need not be trained; None if its candidate may still win.

    Only lower trial indices count, so a resumed confirmation decides as an undisturbed one. The baseline stops only if
    it fails.
    """
    identity = identity_of(trial.user_attrs[CONFIG])
    before = [training for training in trainings(study) if training.trial_index < trial_index]
    stopped = (training.stopped for training in before if training.identity == identity and training.stopped)
    if (known := next(stopped, None)) is not None:
        return known
    scores, names = scores_of(before), {training.identity: training.key for training in before}
    own = scores.pop(identity, {})
    is_baseline = current_key(trial.user_attrs[CANDIDATE]) == BASELINE
    return statistics.cannot_win(
        own,
        {} if is_baseline else {names[other]: found for other, found in scores.items()},
        test_share=space.test_share,
        per_repeat=per_repeat(before),
        maximize=space.direction == "maximize",
        resolution=space.resolution,
    )


def replicated(config: TrainConfig, replicate: int, *, seed: int, dataset: Dataset, parts: bool = True) -> TrainConfig:
    """Give a configuration the seed and the split of a replicate (counted from 0), which differ from its own.

    Splits that leave a class without images, as duplicates may, are skipped. If the data give the validation images,
    only the seed differs.

    Args:
        seed: Of the search.
        parts: Whether consecutive replicates validate disjoint parts of the images, as many as a split has. With
            `data.folds`, each replicate does.

    Raises:
        UserError: None of many splits can be trained on.
    """
    trained = config.override({"seed": derive_seed(seed, "confirm", replicate)})
    if dataset.gives_val(config.data):
        return trained
    drawn: tuple[str | int, ...] = (replicate,)
    if parts and config.data.folds is None:
        repeat, part = divmod(replicate, val_parts(dataset, config.data))
        trained, drawn = trained.override({"data.val_part": part}), ("repeat", repeat)
    draws = (derive_seed(seed, "confirm", *drawn, "split", again) % _SPLIT_SEEDS for again in count())
    others = (draw for draw in draws if draw != config.data.split_seed)
    for tried, split_seed in enumerate(others, 1):
        found = trained.override({"data.split_seed": split_seed})
        try:
            folds(dataset, found.data)
        except UserError:
            if tried >= _MAX_DRAWS:
                raise
        else:
            return found
    raise AssertionError("the draws are endless")


def search_epochs(study: Study) -> int:
    """Return the number of epochs trained by the finished trials of a search."""
    trials = effective_trials(study.optuna.get_trials(deepcopy=False)).values()
    return sum(int(trial.user_attrs.get("epochs", 0)) for trial in trials if trial.state in _FINISHED)


def seconds_per_epoch(study: Study, number: int | None = None) -> float | None:
    """Return the mean time of an epoch of a search's complete trials, or of one of them; None if it is not known."""
    trials = [
        trial.user_attrs
        for trial in study.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if number in (None, trial.number)
    ]
    timed = [found for found in trials if found.get("epochs") and "elapsed_s" in found]
    epochs = sum(int(found["epochs"]) for found in timed)
    return sum(float(found["elapsed_s"]) for found in timed) / epochs if epochs else None


def open_confirmation(
    search: Study, space: SearchSpace, dataset: Dataset, splits: Sequence[Splits], *, data_path: Path | None
) -> Study:
    """Create or resume the confirmation of a study, beside it and in the same storage."""
    confirming = ConfirmationSpace(
        name=space.path.stem,
        path=space.path,
        objective=space.objective,
        baseline=space.baseline,
        confirms=search.name,
        train_images=len(splits[0].train),
        val_images=len(splits[0].val),
    )
    name = confirmation_of(search.name)
    paths = StudyPaths.of(name)
    written = read_metadata(paths)
    if written is not None and written["hash"] != confirming.hash:
        raise StudyError(
            f"study {name} confirms another study with the name {search.name}; delete {paths.dir}, or give the search "
            "another --study"
        )
    study = open_study(
        confirming,
        name=name,
        dataset=dataset,
        storage_url=search.storage_url,
        seed=search.seed,
        data_path=data_path,
    )
    study.files.use_store(None if search.files.store is None else search.files.store.url)
    study.settings.set_space(confirming)
    return study


class Plan:
    """The trainings of a confirmation: the candidates and replicates that the budget allows.

    The budget is a share of the epochs trained by the search. None is a third, but at least two configurations with
    `GOOD_REPLICATES` replicates: fewer mostly miss an advantage of five points. `within_s` limits it to the epochs that
    fit these seconds, at the speed of the search.
    """

    def __init__(
        self, search: Study, space: SearchSpace, *, share: float | None, within_s: float | None = None
    ) -> None:
        best_trial(search)  # raises an error if there is none
        self.search, self.margin = search, space.confirm.margin
        self.cost_epochs = space.baseline.epochs * (space.baseline.data.folds or 1)
        """Maximum number of epochs of one training."""
        self.search_trials, self.search_epochs = search.counts().finished, search_epochs(search)
        if share is None:
            self.budget_epochs = max(self.search_epochs // 3, 2 * GOOD_REPLICATES * self.cost_epochs)
        else:
            self.budget_epochs = int(share * self.search_epochs + 1e-9)  # less a rounding error: 0.1 × 30 is 3
        if within_s is not None and (epoch_s := seconds_per_epoch(search)) is not None:
            self.budget_epochs = min(self.budget_epochs, int(within_s / epoch_s))
        self._preferred = preferred = candidates(search, space)
        self.allocation = allocate(budget_trainings=self.budget_epochs // self.cost_epochs, candidates=len(preferred))
        self.chosen = tuple(preferred[: self.allocation.candidates])
        why = "the budget is too small for it"
        if self.allocation.candidates == MAX_CANDIDATES:
            why = f"more than {MAX_CANDIDATES} would only widen all intervals"
        self.left_out = tuple(
            f"{candidate.key} ({', '.join(candidate.chosen_for)}): {why}"
            for candidate in preferred[self.allocation.candidates :]
        )

    @property
    def challengers(self) -> tuple[Candidate, ...]:
        """The chosen candidates without the baseline."""
        return tuple(candidate for candidate in self.chosen if candidate.key != BASELINE)

    @property
    def is_over_budget(self) -> bool:
        return self.allocation.trainings * self.cost_epochs > self.budget_epochs

    def queue(self, study: Study, dataset: Dataset) -> int:
        """Queue the missing trainings, replicate by replicate, and return their number.

        If all planned trainings are over, those saved by early stopping go to the remaining candidates,
        significant or not: a test repeated until it finds something finds it too often.
        """
        study.paths.dir.mkdir(parents=True, exist_ok=True)
        with FileLock(study.paths.queueing):  # two processes would queue the same trainings
            return self._queue(study, dataset)

    def _queue(self, study: Study, dataset: Dataset) -> int:
        known = trainings(study)
        missing = self._missing(known, range(self.allocation.replicates))
        if not missing and all(training.is_over for training in known):
            missing = self._saved(known)
        places = {identity: place for place, identity in enumerate(dict.fromkeys(t.identity for t in known))}
        queued = []
        for candidate, replicate in missing:
            place = places.setdefault(candidate.identity, len(places))
            config = replicated(
                candidate.train_config, replicate, seed=self.search.seed, dataset=dataset, parts=in_parts(known)
            )
            attributes = {CANDIDATE: candidate.key, REPLICATE: replicate, CONFIG: dump(config)}
            queued.append(({CANDIDATE: place, REPLICATE: replicate}, attributes))
        study.queue.enqueue(queued)  # also an empty list: a process may have died before it raised the total
        return len(queued)

    def _missing(self, known: Sequence[Training], replicates: Iterable[int]) -> list[tuple[Candidate, int]]:
        existing = {(training.identity, training.replicate) for training in known}
        remaining = self._remaining(known)
        return [(one, number) for number in replicates for one in remaining if (one.identity, number) not in existing]

    def _saved(self, known: Sequence[Training]) -> list[tuple[Candidate, int]]:
        """Further replicates of the remaining candidates, up to the planned number of trainings."""
        identities = {candidate.identity for candidate in self.chosen}
        if len(self._remaining(known)) < 2:
            return []
        trained = sum(training.values is not None for training in known if training.identity in identities)
        more: list[tuple[Candidate, int]] = []
        for replicate in range(self.allocation.replicates, MAX_REPLICATES):
            missing = self._missing(known, [replicate])
            if trained + len(more) + len(missing) > self.allocation.trainings:
                break
            more += missing
        return more

    def _remaining(self, known: Sequence[Training]) -> list[Candidate]:
        """The candidates neither stopped nor failed; none if all challengers are."""
        out = {training.identity for training in known if training.stopped or training.failure}
        remaining = [candidate for candidate in self.chosen if candidate.identity not in out]
        return remaining if any(candidate.key != BASELINE for candidate in remaining) else []

    def earlier(self, known: Sequence[Training]) -> list[Candidate]:
        """Return the candidates of an earlier confirmation that are not chosen now; they may win too."""
        left = {training.identity for training in known if training.values} - {one.identity for one in self.chosen}
        preferred = [one for one in self._preferred if one.identity in left]
        return preferred + confirmed_before(self.search, left - {one.identity for one in preferred})
