"""Works a study off, trial by trial, in this process, be it the only one or one worker of several.

A slot is claimed in the storage, trained, and finished there before the next one is claimed. Whatever ends the process,
the trials that were finished are in the storage, and the one that ran goes on from its checkpoint under the same slot.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import optuna
import torch
from filelock import FileLock
from optuna.exceptions import UpdateFinishedTrialError
from safetensors.torch import save_file, save_model

from core.config import DataConfig, TrainConfig
from core.data import Splits
from core.errors import CoreError
from core.loop import EpochMetrics, TrainResult, seconds_per_epoch
from core.runtime import derive_seed, describe_device
from hpo.confirmation.trials import why_stopped
from hpo.dashboard import artifacts
from hpo.errors import FULL_DISK, HpoError, StudyError
from hpo.paths import TrainingPaths
from hpo.reporter import NO_PROGRESS, StudyView
from hpo.search.interrupts import Interrupts
from hpo.search.objective import Divide, Objective, failure_of
from hpo.search.options import TrialOptions
from hpo.search.training import Watch, train_recorded, validation_confusion
from hpo.space import ConfirmationSpace, Recipe, SearchSpace, to_yaml
from hpo.space.pruner import RungPruner, build_pruner, lets_through
from hpo.storage.atomic import replacing
from hpo.study import Study
from hpo.study.results import read_result, write_result
from hpo.trials import REASON, STOPPED, Outcome

logger = logging.getLogger(__name__)

# Complete trials whose weights are kept for the refit: the best, and two in case a later confirmation prefers them.
KEPT_MODELS = 3

# Between two looks at what other processes train.
_LOOK_S = 0.5

DEFAULTS = TrialOptions()


def estimate_s(
    space: SearchSpace, splits: Sequence[Splits], *, trials: int, references: int, device: torch.device
) -> tuple[float, float]:
    """Seconds that so many trials and recipes take on this device, from timed steps: (all in full, as pruned).

    The second number supposes that each rung keeps the share that the rung pruner is told to keep, and that what it
    lets through trains in full; other pruners make no such promise, and both numbers are then the same. Recipes beside
    the study are never pruned. All folds are supposed to take as long as the first.

    Args:
        splits: one, or one a fold.
    """
    folds = len(splits)
    steps = space.baseline.epochs * folds
    per_step = seconds_per_epoch(space.baseline, splits[0], device=device)
    in_full = (trials + references) * steps * per_step
    pruner = build_pruner(space.pruner, space.baseline.epochs, folds)
    if not isinstance(pruner, RungPruner):
        return in_full, in_full
    share, before, visited = 1.0, 0, 0.0
    for rung, keep in {**pruner.keeps, steps: 1.0}.items():
        visited += share * (rung - before)
        share, before = share * keep, rung
    in_full_too = references + sum(lets_through(trial_index, pruner.let_through) for trial_index in range(trials))
    return in_full, ((trials + references - in_full_too) * visited + in_full_too * steps) * per_step


def run_study(
    study: Study,
    space: SearchSpace,
    splits: Sequence[Splits] | Divide,
    *,
    device: torch.device,
    interrupts: Interrupts,
    progress: StudyView = NO_PROGRESS,
    options: TrialOptions = DEFAULTS,
) -> None:
    """Runs the trials that wait, until none is left of the total.

    Args:
        splits: on the device: one, or one a fold; or what divides the images as a trial's configuration asks.

    Raises:
        KeyboardInterrupt: a person's Ctrl-C, or SIGTERM; the running trial is back in the queue.
        HpoError: something that a person has to mend, a full disk for instance; the running trial is back in the queue.
        Exception: a crash; the running trial is back in the queue, as often as `study.retries` allows.
    """
    space_on_disk, depot = _SpaceOnDisk(study, options.keep_gb), study.depot

    def saved(checkpoint: Path) -> None:
        if depot is not None:
            depot.send(checkpoint)
        space_on_disk.keep_within()

    def divide(config: DataConfig) -> Sequence[Splits]:
        return splits(config) if callable(splits) else splits

    objective = Objective(
        space,
        divide,
        study.paths,
        seed=study.seed,
        device=device,
        progress=progress,
        interrupts=interrupts,
        before_training=None if depot is None else depot.bring,
        on_checkpoint=saved,
    )
    while True:
        study.queue.reap()
        if (claimed := study.queue.claim()) is None:
            return
        trial, trial_index = claimed
        try:
            with full_disk_told(study.paths.dir), study.queue.beating(trial):
                outcome = _stopped(study, space, trial, trial_index) or objective(trial, trial_index)
                if study.confirms is None:  # a refit takes the search's weights, and pictures of every seed say little
                    _keep(study, space, divide(space.baseline.data), trial, outcome, device)
                space_on_disk.keep_within()
                # One thread and two do not add in the same order: with the same number, a trial's values are the same.
                where = {"torch_threads": torch.get_num_threads(), "device": describe_device(device)}
                where |= {REASON: outcome.why} if outcome.failure is not None else {}
                counted = study.queue.finish(
                    trial, outcome.state, outcome.value, failure=outcome.failure, attributes=outcome.attributes | where
                )
        except UpdateFinishedTrialError:  # its lease was taken for dead, and its slot queued again
            logger.warning("trial %d was taken from this process while it ran; it is dropped", trial.number)
            continue
        except BaseException as error:
            study.queue.release(trial, crashed=_is_crash(error))
            raise
        if counted:  # else another process has the slot now, and needs them
            for fold in range(1, (space.baseline.data.folds or 1) + 1):
                study.drop_checkpoint(study.paths.checkpoint(trial_index, fold))
        progress.refresh(force=True)
        del outcome  # the networks, which the next trial's would otherwise have to fit beside
        interrupts.check()


def _stopped(study: Study, space: SearchSpace, trial: optuna.Trial, trial_index: int) -> Outcome | None:
    """How a confirmation's trial ends that need not be trained, since its candidate can no longer win; None else."""
    if not isinstance(space, ConfirmationSpace):
        return None
    space.suggest(trial)
    why = why_stopped(study, space, trial, trial_index)
    if why is None:
        return None
    attributes = {STOPPED: why, "epochs": 0}
    return Outcome(trial.number, trial_index, "pruned", None, None, space.shown(trial), why=why, attributes=attributes)


def _is_crash(error: BaseException) -> bool:
    """Whether an attempt ended by a fault that may be its configuration's, as its process's death may be."""
    return isinstance(error, Exception) and not isinstance(error, (HpoError, CoreError))


def wait_for_others(study: Study, interrupts: Interrupts) -> bool:
    """Waits for the trials that other processes train, in case one of them has to be gone on with.

    Returns:
        Whether a trial waits now; False where all of the total is over, or what is not cannot be waited for: nothing
        tells whether another host lives, but the heartbeats that a database keeps.
    """
    told = False
    while True:
        study.queue.reap()
        if study.queue.waiting():
            return True
        if not (others := study.queue.at_work()):
            return False
        if not told:
            numbers = ", ".join(map(str, others))
            logger.info("waiting for trial %s, which another process trains", numbers)
            told = True
        with interrupts.let_through():
            time.sleep(_LOOK_S)


@contextlib.contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    """Turns a full disk into one line on what to do: it is no fault of a configuration, and waits for a person.

    Raises:
        StudyError: in place of what the library that wrote has raised.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, HpoError) or not _is_full_disk(error):
            raise
        name = getattr(error, "filename", None) or folder
        raise StudyError(
            f"{name}: no space is left on the disk; free some, and run the same command again: what is done is safe, "
            "and each running trial goes on from its last checkpoint"
        ) from error


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    # safetensors has an error of its own, with the system's words in it.
    return any(os.strerror(number) in str(error) for number in FULL_DISK)


def pending_references(study: Study, space: SearchSpace) -> list[Recipe]:
    """The recipes that are no trial of the study, and have not been trained as they stand now."""
    unslotted = {recipe.name for recipe in study.queue.unslotted_recipes()}
    beside = [recipe for recipe in space.recipes if recipe.name in unslotted or space.express(recipe.config) is None]
    return [recipe for recipe in beside if not _is_trained(study, recipe)]


def run_references(
    study: Study,
    space: SearchSpace,
    splits: Sequence[Splits],
    *,
    device: torch.device,
    interrupts: Interrupts,
    say: Callable[[str], None],
    progress: StudyView = NO_PROGRESS,
) -> None:
    """Train the recipes that are not trials of the study, as long as a trial, each once in the study's life."""
    for recipe in pending_references(study, space):
        with _alone(study.paths.reference(recipe.name), interrupts):
            if not _is_trained(study, recipe):  # by another run of the study, which was waited for
                _run_reference(study, space, splits, recipe, device=device, progress=progress, interrupts=interrupts)
        result = read_result(study.paths.reference(recipe.name)) or {}
        came_to = f"{result['value']:.4f}" if "value" in result else f"{result['failure']}  ({result['why']})"
        say(f"recipe {recipe.name}  {space.metric} {came_to}")


@contextlib.contextmanager
def _alone(paths: TrainingPaths, interrupts: Interrupts) -> Iterator[None]:
    """No other process trains into the folder meanwhile: two would write each other's checkpoints."""
    paths.dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(paths.lock)
    with interrupts.let_through():
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _run_reference(
    study: Study,
    space: SearchSpace,
    splits: Sequence[Splits],
    recipe: Recipe,
    *,
    device: torch.device,
    progress: StudyView,
    interrupts: Interrupts,
) -> None:
    """Trains one recipe into its folder, or writes there why it cannot be trained."""
    paths = study.paths.reference(recipe.name)
    config = _reference_config(study, recipe)
    if paths.config.exists() and paths.config.read_text() != to_yaml(config):
        # The recipe was edited.
        for stale in (paths.result, *paths.checkpoints(len(splits))):
            stale.unlink(missing_ok=True)
    try:
        with interrupts.patient(), full_disk_told(paths.dir):
            train_recorded(
                config,
                splits,
                paths,
                metric=space.metric,
                device=device,
                watch=_watched_by(progress, interrupts, recipe.name, config),
            )
    except Exception as error:
        failure = failure_of(error)
        if failure is None:
            raise
        write_result(paths, {"metric": space.metric, "failure": failure, "why": str(error).partition("\n")[0]})
        for checkpoint in paths.checkpoints(len(splits)):
            checkpoint.unlink(missing_ok=True)


def _watched_by(progress: StudyView, interrupts: Interrupts, name: str, config: TrainConfig) -> Watch:
    """Show a recipe's training, or each of its folds, and let an interrupt end it after an epoch."""

    def watch(label: str) -> Callable[[EpochMetrics], None]:
        shown = progress.training(", ".join(filter(None, (f"recipe {name}", label))), epochs=config.epochs)

        def epoch_ended(epoch: EpochMetrics) -> None:
            shown(epoch)
            interrupts.check()

        return epoch_ended

    return watch


def _reference_config(study: Study, recipe: Recipe) -> TrainConfig:
    return recipe.config.override({"seed": derive_seed(study.seed, "reference", recipe.name)})


def _is_trained(study: Study, recipe: Recipe) -> bool:
    """Whether the recipe has a result, of the configuration that it is now."""
    paths = study.paths.reference(recipe.name)
    return paths.result.exists() and paths.config.read_text() == to_yaml(_reference_config(study, recipe))


def _keep(
    study: Study,
    space: SearchSpace,
    splits: Sequence[Splits],
    trial: optuna.Trial,
    outcome: Outcome,
    device: torch.device,
) -> None:
    """Keep the weights of the best few trials, and record the trial for the dashboard."""
    if outcome.results:
        _keep_weights(study, splits, outcome)
    artifacts.record(
        study,
        space,
        trial,
        outcome,
        confusion=validation_confusion(outcome.results, splits) if outcome.results else None,
        classes=splits[0].classes,
        device=describe_device(device),
    )


def _keep_weights(study: Study, splits: Sequence[Splits], outcome: Outcome) -> None:
    """Keeps this trial's weights if it is among the best few, and lets go of those that no longer are."""
    assert outcome.value is not None
    values = _complete_values(study)
    values[outcome.number] = study.sign * outcome.value
    best = _best_of(values)
    folds = range(1, len(outcome.results) + 1)
    if outcome.number in best:
        for fold, result in zip(folds, outcome.results, strict=True):
            with replacing(study.paths.trial_model(outcome.number, fold)) as weights:
                save_model(result.model, str(weights))
            _write_validation(study.paths.trial_validation(outcome.number, fold), result, splits[fold - 1])
        if study.depot is not None:
            for file in study.paths.needed_by_refit(outcome.number):
                study.depot.put(file, study.paths.inside(file))
    # What this one has displaced. What two workers kept at the same time goes when the run ends.
    before = _best_of({number: value for number, value in values.items() if number != outcome.number})
    _let_go(study, set(before) - set(best), folds=len(folds))


def _write_validation(path: Path, result: TrainResult, splits: Splits) -> None:
    """Writes what the network says of its validation images: `logits` (M, K) float32, and their `indices` (M,) int64.

    The indices are positions among the data set's images. A report needs no network to show what is mistaken for what.
    """
    assert result.val_logits is not None, "what is judged has validation images"
    with replacing(path) as file:
        save_file({"logits": result.val_logits.cpu().contiguous(), "indices": splits.val.cpu()}, str(file))


def keep_best_weights(study: Study, *, folds: int, options: TrialOptions = DEFAULTS) -> None:
    """Lets go of weights that two workers both kept, which ended a trial at the same time, and of those too large."""
    values = _complete_values(study)
    _let_go(study, values.keys() - set(_best_of(values)), folds=folds)
    _SpaceOnDisk(study, options.keep_gb).keep_within()


class _SpaceOnDisk:
    """Keeps a study's weights and checkpoints within what they may take.

    The weights go first, the worst trial's before others': a refit trains again what is missing. What a running trial
    needs to go on never goes; where that alone takes more, it is said, once.
    """

    def __init__(self, study: Study, keep_gb: float | None) -> None:
        self._study, self._keep_gb = study, keep_gb
        self._told = False

    def keep_within(self) -> None:
        """Deletes what is too much."""
        if self._keep_gb is None:
            return
        sizes = {path: _size(path) for path in self._study.paths.weights_and_checkpoints()}
        too_much = sum(sizes.values()) - self._keep_gb * 1e9
        values = _complete_values(self._study)
        for number in sorted(self._study.paths.numbers_with_weights(), key=lambda n: (values.get(n, -math.inf), -n)):
            if too_much <= 0:
                return
            logger.info("--keep-gb %g: the weights of trial %d are let go of", self._keep_gb, number)
            for path in self._study.paths.trial_models(number):
                path.unlink(missing_ok=True)  # in the depot it stays, which is not this disk
                too_much -= sizes.get(path, 0)
        if too_much > 0 and not self._told:
            self._told = True
            logger.warning(
                "--keep-gb %g: the checkpoints of the running trials alone take %.2f GB more; they are kept",
                self._keep_gb,
                too_much / 1e9,
            )


def _size(path: Path) -> int:
    """In bytes; 0 of a file that another worker has just let go of."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _complete_values(study: Study) -> dict[int, float]:
    """Trial -> its value, the larger the better."""
    return {
        trial.number: study.sign * trial.value
        for trial in study.optuna.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        if trial.value is not None
    }


def _best_of(values: Mapping[int, float]) -> list[int]:
    return sorted(values, key=lambda number: (-values[number], number))[:KEPT_MODELS]


def _let_go(study: Study, numbers: Iterable[int], *, folds: int) -> None:
    for number in numbers:
        for fold in range(1, folds + 1):
            weights = study.paths.trial_model(number, fold)
            for file in (weights, study.paths.trial_validation(number, fold)):
                file.unlink(missing_ok=True)
            if study.depot is not None:
                study.depot.remove(study.paths.inside(weights))
