"""Train a study's waiting trials in this process, the only one or one worker of several.

However the process ends, finished trials are in the storage, and the running one resumes from its checkpoint.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError

from core.data import Splits
from core.errors import CoreError
from core.loop import seconds_per_epoch
from core.runtime import describe_device
from hpo.confirmation.trials import why_stopped
from hpo.dashboard import artifacts
from hpo.errors import HpoError
from hpo.loggers import Callback, TensorBoard
from hpo.reporter import NO_PROGRESS, StudyView
from hpo.search.interrupts import Interrupts
from hpo.search.objective import Divide, Objective
from hpo.search.options import TrialOptions
from hpo.search.training import standard_error, validation_confusion
from hpo.search.weights import DEFAULTS, SpaceOnDisk, explain_full_disk, keep_evidence, keep_weights
from hpo.space import ConfirmationSpace, SearchSpace
from hpo.space.pruner import RungPruner, build_pruner, keeps_of, lets_through
from hpo.storage.optuna_access import trial_by_number
from hpo.study import Study
from hpo.study.deadline import OutOfTime, TooLong
from hpo.trials import REASON, STANDARD_ERROR, STOPPED, Outcome, is_baseline

logger = logging.getLogger(__name__)

MOST_TOO_LONG = 5
"""Trials of a process that are passed over, each after a few timed steps, since they would end after the limit."""
# Seconds between two checks of other processes' trials.
_WAIT_S = 0.5


@dataclass(frozen=True)
class Estimate:
    """The estimated duration of a run, in seconds, with one training at a time."""

    trial_s: float
    """One trial in full, of the baseline's speed."""
    in_full_s: float
    """All trials in full, and the recipes."""
    pruned_s: float
    """The same if each rung keeps the configured fraction; equal without rungs. Recipes are never pruned."""


def estimate(
    space: SearchSpace, splits: Sequence[Splits], *, trials: int, recipes: int, device: torch.device
) -> Estimate:
    """Estimate the duration of a run from a few timed steps. Of several folds the first is timed."""
    folds = len(splits)
    steps = space.baseline.epochs * folds
    per_step = seconds_per_epoch(space.baseline, splits[0], device=device)
    in_full = (trials + recipes) * steps * per_step
    pruner = build_pruner(space.pruner, space.baseline.epochs, folds)
    share, before, visited = 1.0, 0, 0.0
    for rung, keep in {**keeps_of(pruner, trials), steps: 1.0}.items():
        visited += share * (rung - before)
        share, before = share * keep, rung
    let_through = pruner.let_through if isinstance(pruner, RungPruner) else 0.0
    unpruned = recipes + sum(lets_through(trial_index, let_through) for trial_index in range(trials))
    pruned = ((trials + recipes - unpruned) * visited + unpruned * steps) * per_step
    return Estimate(steps * per_step, in_full, pruned)


@dataclass
class _Limit:
    """What a run still claims after the time limit has stopped a trial."""

    study: Study
    too_long: set[int] = field(default_factory=set)
    """Indices that wait for more time."""
    ending: bool = False
    """Whether no trial can run from its first epoch to its last."""

    @property
    def is_felt(self) -> bool:
        return self.ending or bool(self.too_long)

    def allows_another(self, trial: optuna.Trial, trial_index: int, why: OutOfTime) -> bool:
        """Whether a paused trial may go on to its end, or a shorter one at all."""
        if not self.ending and self.study.queue.paused():
            self.ending = True
            return True
        # Others are compared with the baseline, and with every training of a confirmation.
        needed = self.study.confirms is not None or is_baseline(trial)
        if isinstance(why, TooLong) and len(self.too_long) < MOST_TOO_LONG and not needed:
            self.too_long.add(trial_index)
            return True
        return False


def run_study(
    study: Study,
    space: SearchSpace,
    splits: Sequence[Splits] | Divide,
    *,
    device: torch.device,
    interrupts: Interrupts,
    progress: StudyView = NO_PROGRESS,
    options: TrialOptions = DEFAULTS,
    callbacks: Sequence[Callback] = (),
) -> bool:
    """Train trials until none of the total waits. After an error, the running trial is back in the queue.

    Args:
        splits: On the device: one, one per fold, or a function that splits the images for a configuration.
        callbacks: Called after each trial that this process has ended, which is in the storage by then.

    Returns:
        False if the study's deadline or patience does not allow another trial.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, after an epoch.
        HpoError: An error that the user has to fix, such as a full disk.
        GraphError: This process cannot use the GPU any more.
        Exception: A crash, which counts against `study.settings.retries`; or an error of a callback.
    """
    divide: Divide = splits if callable(splits) else lambda _: splits
    space_on_disk = SpaceOnDisk(study, options)
    shared = partial(_share_checkpoint, study, space_on_disk)
    objective = Objective(space, divide, study, device, progress, interrupts, on_checkpoint=shared)
    limit = _Limit(study)
    while True:
        study.queue.reclaim()
        if study.deadline.left_s() <= 0 or study.patience.is_over:
            return not study.queue.claimable()
        if (claimed := study.queue.claim(ending=limit.ending, without=limit.too_long)) is None:
            return not (limit.is_felt and study.queue.claimable())
        trial, trial_index = claimed
        try:
            with explain_full_disk(study.paths.dir), study.queue.heartbeat(trial):
                until = None if limit.ending else study.queue.next_rung(trial)
                ended = _run_trial(study, objective, trial, trial_index, space_on_disk, until)
        except UpdateFinishedTrialError:  # its lease was taken for dead, and its trial index queued again
            logger.warning("trial %d was requeued by another process while it ran; it is dropped", trial.number)
            continue
        except OutOfTime as error:
            study.queue.release(trial)
            if not limit.allows_another(trial, trial_index, error):
                return False
            continue
        except BaseException as error:
            # A crash may be the configuration's fault, an interrupt or a user's error is not.
            crashed = isinstance(error, Exception) and not isinstance(error, (HpoError, CoreError))
            study.queue.release(trial, crashed=crashed)
            raise
        if ended:  # else it pauses, or another process trains this index now, and the checkpoints are needed
            _drop_checkpoints(study, space, trial_index)
            _call(callbacks, study, trial.number, tensorboard=options.tensorboard)
        progress.refresh(force=True)
        interrupts.check()


def _call(callbacks: Sequence[Callback], study: Study, number: int, *, tensorboard: bool) -> None:
    own: list[Callback] = [TensorBoard()] if tensorboard else []
    for callback in (*own, *callbacks):
        callback(study.optuna, copy.deepcopy(trial_by_number(study.optuna, number)))


def _drop_checkpoints(study: Study, space: SearchSpace, trial_index: int) -> None:
    for fold in range(1, (space.baseline.data.folds or 1) + 1):
        study.files.drop_checkpoint(study.paths.checkpoint(trial_index, fold))


def _run_trial(
    study: Study,
    objective: Objective,
    trial: optuna.Trial,
    trial_index: int,
    space_on_disk: SpaceOnDisk,
    until: int | None,
) -> bool:
    """Train a trial, keep its files and store its end or its pause. Returns whether it has ended.

    The networks of its outcome are freed on return: the next trial needs the memory.
    """
    space, device = objective.space, describe_device(objective.device)
    outcome = _stopped(study, space, trial, trial_index) or objective(trial, trial_index, until=until)
    if study.confirms is None:  # a refit takes the search's weights
        splits = objective.divide(space.baseline.data)
        matrix = None
        if outcome.results:
            keep_weights(study, splits, outcome, space_on_disk.options.keep)
            matrix = validation_confusion(outcome.results, splits)
            outcome.attributes[STANDARD_ERROR] = standard_error(outcome.results, splits, space.metric)
        classes = splits[0].classes
        artifacts.record(study, space, trial, outcome, confusion=matrix, classes=classes, device=device)
    elif outcome.results and outcome.config is not None:  # also for the label audit: its splits are others
        keep_evidence(study, objective.divide(outcome.config.data), outcome)
    space_on_disk.keep_within()
    # One thread and two do not add in the same order: with the same number, a trial's values are reproducible.
    attributes = {**outcome.attributes, "torch_threads": torch.get_num_threads(), "device": device}
    if outcome.failure is not None:
        attributes[REASON] = outcome.why
    if outcome.state == "paused":
        assert until is not None, "it was to pause"
        study.queue.pause(trial, until, attributes)
        return False
    return study.queue.finish(trial, outcome.state, outcome.value, failure=outcome.failure, attributes=attributes)


def _share_checkpoint(study: Study, space_on_disk: SpaceOnDisk, checkpoint: Path) -> None:
    if study.files.store is not None:
        study.files.store.send(checkpoint)
    space_on_disk.keep_within()


def _stopped(study: Study, space: SearchSpace, trial: optuna.Trial, trial_index: int) -> Outcome | None:
    """The outcome of a confirmation's trial whose candidate can no longer win; else None."""
    if not isinstance(space, ConfirmationSpace):
        return None
    space.suggest(trial)
    why = why_stopped(study, space, trial, trial_index)
    if why is None:
        return None
    attributes = {STOPPED: why, "epochs": 0}
    return Outcome(trial.number, trial_index, "pruned", None, None, space.shown(trial), why=why, attributes=attributes)


def wait_for_others(study: Study, interrupts: Interrupts) -> bool:
    """Wait for other processes' trials, until a trial can be claimed; return whether one can.

    Running trials of other hosts that are not known to be alive are not waited for.
    """
    logged = False
    while True:
        study.queue.reclaim()
        if study.queue.claimable():
            return True
        if not (others := study.queue.at_work()):
            return False
        if not logged:
            numbers = ", ".join(map(str, others))
            logger.info("waiting for trial %s, which another process trains", numbers)
            logged = True
        with interrupts.let_through():
            time.sleep(_WAIT_S)
