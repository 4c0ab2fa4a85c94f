"""The confirmation as a study of its own: its trainings, their seeds and splits, and the race between configurations.

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
from optuna.trial import FrozenTrial, TrialState

from core.config import TrainConfig
from core.data import Dataset, folds, val_parts
from core.errors import UserError
from core.seeds import derive_seed
from hpo.confirmation import statistics
from hpo.confirmation.result import BASELINE, current_key, identity_of
from hpo.errors import StudyError
from hpo.paths import StudyPaths, confirmation_of
from hpo.space import CANDIDATE, REPLICATE, ConfirmationSpace
from hpo.study import Study, open_study
from hpo.study.metadata import read_metadata
from hpo.trials import CONFIG, FAILURE, STOPPED, effective_trials, is_paused, trial_index_of

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


@dataclass(frozen=True)
class Race:
    """Which trainings of a confirmation count, and which configurations have left it."""

    counted: tuple[Training, ...]
    """Without those that a worker began while another still trained the replicate after which their configuration
    leaves: one worker alone would not have trained them."""
    left: dict[str, str]
    """Why each configuration left, by identity."""


def race(known: Iterable[Training], space: ConfirmationSpace) -> Race:
    """Replay the race of a confirmation from its trainings alone, so every worker and every resumed run agrees.

    Whether a configuration stays for a replicate depends on the lower replicates with lower trial indices, once all of
    these are over. The baseline stays unless one of its trainings fails.
    """
    counted: list[Training] = []
    left: dict[str, str] = {}
    for training in sorted(known, key=lambda one: one.trial_index):
        if training.identity in left:
            continue
        before = [one for one in counted if one.replicate < training.replicate]
        why = training.stopped
        if why is None and all(one.is_over for one in before):
            why = _why_leaving(training, before, space)
        if why is None:
            counted.append(training)
        else:
            left[training.identity] = why
    return Race(tuple(counted), left)


def _why_leaving(training: Training, before: Sequence[Training], space: ConfirmationSpace) -> str | None:
    scores, names = scores_of(before), {one.identity: one.key for one in before}
    own = scores.pop(training.identity, {})
    return statistics.cannot_win(
        own,
        {} if training.key == BASELINE else {names[other]: found for other, found in scores.items()},
        test_share=space.test_share,
        per_repeat=per_repeat(before),
        maximize=space.direction == "maximize",
        resolution=space.resolution,
    )


def why_stopped(study: Study, space: ConfirmationSpace, trial: optuna.Trial, trial_index: int) -> str | None:
    """Explain why a claimed trial of a confirmation need not be trained; None if its candidate may still win."""
    known = [training for training in trainings(study) if training.trial_index <= trial_index]
    return race(known, space).left.get(identity_of(trial.user_attrs[CONFIG]))


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
    """Return the number of epochs trained by the finished and paused trials of a search."""
    trials = effective_trials(study.optuna.get_trials(deepcopy=False)).values()
    trained = [trial for trial in trials if trial.state in _FINISHED or is_paused(trial)]
    return sum(int(trial.user_attrs.get("epochs", 0)) for trial in trained)


def search_seconds(study: Study) -> float | None:
    """Return the training time of the finished trials of a search; None if it is not known."""
    trials = effective_trials(study.optuna.get_trials(deepcopy=False)).values()
    return sum(float(trial.user_attrs.get("elapsed_s", 0.0)) for trial in trials if trial.state in _FINISHED) or None


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
