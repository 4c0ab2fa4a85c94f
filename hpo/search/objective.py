"""One trial: its parameters become a `TrainConfig`, `core.train` runs it, and what happens is reported.

A trial's seed follows from the study's seed and the trial's slot, so that a retried or resumed trial, which has a new
number, trains the very network that the first attempt would have.

With folds (`data.folds`), a trial trains them one after the other, and its value is the mean of what each fold's kept
epoch scored. It reports as it goes: in the first fold the epoch's score, later the mean of the finished folds' final
scores and the current one, so that a pruner can end it after any epoch.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import optuna
import torch
from pydantic import ValidationError

from core.config import DataConfig, TrainConfig
from core.errors import ConfigError, DivergedError
from core.loop import EpochMetrics, TrainResult, train
from core.runtime import derive_seed, is_out_of_memory
from hpo.paths import StudyPaths
from hpo.reporter import StudyView
from hpo.search.interrupts import Interrupts
from hpo.search.training import fold_label, going_on, of_fold
from hpo.space import SearchSpace, to_yaml
from hpo.space.pruner import RungPruner
from hpo.study.results import append_line
from hpo.trials import CONFIG, REPLICATE_OF, RESUMED_EPOCH, Outcome, first_twin

if TYPE_CHECKING:
    from core.data import Splits

logger = logging.getLogger(__name__)

Divide = Callable[[DataConfig], "Sequence[Splits]"]
"""Divides the images as a configuration asks, on the device: one split, or one a fold."""


class Objective:
    """Trains what a trial asks for.

    Args:
        divide: gives the training and validation images, on the device.
        seed: the study's.
        before_training: told of the checkpoint that a training would go on from, there or not.
        on_checkpoint: told of each checkpoint that is whole and in place.
    """

    def __init__(
        self,
        space: SearchSpace,
        divide: Divide,
        paths: StudyPaths,
        *,
        seed: int,
        device: torch.device,
        progress: StudyView,
        interrupts: Interrupts,
        before_training: Callable[[Path], None] | None = None,
        on_checkpoint: Callable[[Path], None] | None = None,
    ) -> None:
        self.space, self.divide, self.paths = space, divide, paths
        self.seed, self.device, self.progress, self.interrupts = seed, device, progress, interrupts
        self.before_training, self.on_checkpoint = before_training, on_checkpoint

    def __call__(self, trial: optuna.trial.Trial, trial_index: int) -> Outcome:
        """Runs the trial to its end. What is raised is a fault of ours, or a person's Ctrl-C."""
        params = self.space.suggest(trial)  # all of them, before anything can fail
        twin = first_twin(trial.study.get_trials(deepcopy=False), trial.params, trial_index)
        if twin is not None:  # with another seed it says how far luck goes, and is no new configuration
            trial.set_user_attr(REPLICATE_OF, twin)
        try:
            config = self._config(trial, params, trial_index)
        except ValidationError as error:
            text = "; ".join(str(fault["msg"]).removeprefix("Value error, ") for fault in error.errors())
            shown = self.space.shown(trial)
            return Outcome(trial.number, trial_index, "pruned", None, None, shown, failure="invalid", why=text)
        self.paths.trial(trial.number).mkdir(parents=True, exist_ok=True)
        self.paths.trial_config(trial.number).write_text(to_yaml(config))
        attempt = _Attempt(self, trial, trial_index, config, self.divide(config.data), twin)
        try:
            for fold in range(1, attempt.folds + 1):
                attempt.begin(fold)
                attempt.end(self._train(attempt))
        except optuna.TrialPruned as verdict:
            return attempt.outcome("pruned", attempt.reported, why=str(verdict))
        except Exception as error:
            failure = failure_of(error)
            if failure is None:
                raise
            return attempt.outcome("pruned", None, failure=failure, why=str(error).partition("\n")[0])
        return attempt.outcome("complete", attempt.value)

    def _config(self, trial: optuna.trial.Trial, params: dict[str, Any], trial_index: int) -> TrainConfig:
        """What the trial trains, seed included: what its parameters mean, or the configuration that it brings."""
        brought = trial.user_attrs.get(CONFIG)
        if brought is not None:
            return TrainConfig.model_validate_json(json.dumps(brought))
        return self.space.config(params).override({"seed": derive_seed(self.seed, "trial", trial_index)})

    def _train(self, attempt: _Attempt) -> TrainResult:
        """Trains a fold on from its checkpoint, or anew where there is none that can be used."""
        checkpoint = self.paths.checkpoint(attempt.trial_index, attempt.fold)
        if self.before_training is not None:
            self.before_training(checkpoint)
        with self.interrupts.patient():
            return going_on(checkpoint, f"trial {attempt.trial.number}", lambda: self._train_from(checkpoint, attempt))

    def _train_from(self, checkpoint: Path, attempt: _Attempt) -> TrainResult:
        return train(
            of_fold(attempt.config, attempt.fold),
            attempt.splits[attempt.fold - 1],
            device=self.device,
            on_epoch_end=attempt.epoch_ended,
            on_resume=attempt.resumed,
            resume_from=checkpoint,
            checkpoint_to=checkpoint,
            # A trial that has passed a rung is worth more than its epochs: the others were judged by it.
            checkpoint_at=attempt.rungs(),
            # A finished fold is not trained again when a later one is cut off.
            checkpoint_at_end=attempt.folds > 1,
            on_checkpoint=self.on_checkpoint,
            metric=self.space.metric,
        )


def failure_of(error: Exception) -> str | None:
    """`diverged`, `oom` or `invalid`: why a configuration cannot be trained. None is a fault that is not its own."""
    if isinstance(error, DivergedError):
        return "diverged"
    if isinstance(error, ConfigError):
        return "invalid"
    return "oom" if is_out_of_memory(error) else None


class _Attempt:
    """What one trial has reported so far."""

    def __init__(
        self,
        objective: Objective,
        trial: optuna.trial.Trial,
        trial_index: int,
        config: TrainConfig,
        splits: Sequence[Splits],
        twin: int | None,
    ) -> None:
        self.objective, self.trial, self.trial_index, self.config, self.twin = (
            objective,
            trial,
            trial_index,
            config,
            twin,
        )
        self.metric = objective.space.metric
        self.splits, self.folds = splits, len(splits)
        self.fold = 0
        """The one that is training, counted from 1."""
        self.results: list[TrainResult] = []
        """Of the folds that are over."""
        self.values: list[float] = []
        """What they came to."""
        self.reported: float | None = None
        """The last value that Optuna was told."""
        self.history: list[EpochMetrics] = []
        self.rows: list[dict[str, float | int]] = []
        self.last: dict[int, EpochMetrics] = {}
        """Fold -> its last epoch so far."""
        self.before_s = 0.0
        """What the folds that are over have taken."""
        self.metrics_file = objective.paths.trial_metrics(trial.number)
        self.metrics_file.write_text("")

    @property
    def value(self) -> float:
        """The objective, of a trial whose folds are all over."""
        return statistics.fmean(self.values)

    def begin(self, fold: int) -> None:
        """A fold is about to train."""
        self.fold = fold
        self.before_s = self.history[-1].elapsed_s if self.history else 0.0

    def rungs(self) -> frozenset[int]:
        """The epochs of the fold that trains at which the rung pruner judges it; none of another pruner, which knows
        none."""
        pruner = self.trial.study.pruner
        if not isinstance(pruner, RungPruner):
            return frozenset()
        begun = (self.fold - 1) * self.config.epochs
        return frozenset(step - begun for step in pruner.keeps if begun < step <= begun + self.config.epochs)

    def resumed(self, history: tuple[EpochMetrics, ...]) -> None:
        """Reports again what the interrupted attempt had reported: its rungs have been judged already."""
        with self.objective.interrupts.held():
            for epoch in history:
                self._report(epoch)
            self.trial.set_user_attr(RESUMED_EPOCH, (self.fold - 1) * self.config.epochs + len(history))
        fold = f" of {fold_label(self.fold, self.folds)}" if self.folds > 1 else ""
        logger.info(
            "trial %d goes on after epoch %d%s, from the checkpoint of slot %d",
            self.trial.number,
            len(history),
            fold,
            self.trial_index,
        )

    def epoch_ended(self, epoch: EpochMetrics) -> None:
        """Reports an epoch, and raises TrialPruned where the pruner ends the trial."""
        with self.objective.interrupts.held():
            self._judge(epoch)
        if epoch.epoch < self.config.epochs:  # else the trial is over before it could be given back
            self.objective.interrupts.check()

    def end(self, result: TrainResult) -> None:
        """Takes a finished fold, reports the mean so far, and raises TrialPruned where the pruner ends the trial."""
        self.values.append(result.value(self.metric))
        if self.folds == 1:
            self.results.append(result)
            return
        # Off the device: the next fold's network, its gradients and its optimizer's state need the room.
        self.results.append(replace(result, model=result.model.cpu()))
        # Early stopping may have ended the fold before; all trials are compared at the same step.
        self._tell(statistics.fmean(self.values), epoch=self.config.epochs)
        if self.fold < self.folds and self.trial.should_prune():
            raise optuna.TrialPruned(self._verdict() or f"pruned at the end of fold {self.fold}")

    def _judge(self, epoch: EpochMetrics) -> None:
        self._report(epoch)
        # The last epoch decides nothing any more: the trial is complete, and its value is worth keeping. That of a fold
        # is judged by what the fold keeps, when it is over.
        last = epoch.epoch == self.config.epochs
        pruned = not last and self.trial.should_prune()
        self.objective.progress.refresh()
        if pruned:
            raise optuna.TrialPruned(self._verdict() or f"pruned at epoch {epoch.epoch}")

    def _report(self, epoch: EpochMetrics) -> None:
        timed = replace(epoch, elapsed_s=self.before_s + epoch.elapsed_s)
        row = timed.row(self.metric)
        self.rows.append(row if self.folds == 1 else {"fold": self.fold, **row})
        append_line(self.metrics_file, self.rows[-1])
        self.history.append(timed)
        self.last[self.fold] = timed
        if self.folds == 1 or epoch.epoch < self.config.epochs:  # else the fold's end reports this step, only once
            self._tell(statistics.fmean([*self.values, epoch.score(self.metric)]), epoch.epoch)

    def _tell(self, value: float, epoch: int) -> None:
        """Reports the value of this fold's epoch to Optuna."""
        self.reported = value
        self.trial.report(value, (self.fold - 1) * self.config.epochs + epoch)

    def _verdict(self) -> str:
        return _verdict(self.trial.study.pruner, self.trial)

    def outcome(
        self,
        state: Literal["complete", "pruned"],
        value: float | None,
        *,
        failure: str | None = None,
        why: str = "",
    ) -> Outcome:
        """How the attempt ended, with what the storage is to remember of it."""
        return Outcome(
            self.trial.number,
            self.trial_index,
            state,
            value,
            self.config,
            self.objective.space.shown(self.trial),
            tuple(self.history),
            tuple(self.rows),
            tuple(self.results) if state == "complete" else (),
            failure,
            self.twin,
            why,
            self._attributes(complete=state == "complete"),
        )

    def _attributes(self, *, complete: bool) -> dict[str, Any]:
        attributes: dict[str, Any] = {"epochs": len(self.history)}
        if complete:
            # Of folds the mean, which a training on all images then takes; half an epoch goes to the longer run.
            attributes["kept_epoch"] = int(statistics.fmean(result.kept.epoch for result in self.results) + 0.5)
        if self.folds > 1 and self.values:
            attributes["fold_values"] = list(self.values)
        if self.history:
            last = self.history[-1]
            attributes |= {"elapsed_s": round(last.elapsed_s, 3), "images_per_s": round(last.images_per_s, 1)}
            divided = [epoch.micro_batch for epoch in self.history if epoch.micro_batch is not None]
            if divided:
                attributes["micro_batch"] = min(divided)
        for name in ("raw", "averaged"):
            scores = [getattr(epoch, name) for epoch in self.last.values()]
            if scores and None not in scores:
                attributes[f"{name}_accuracy"] = statistics.fmean(found.accuracy for found in scores)
        return attributes


def _verdict(pruner: optuna.pruners.BasePruner | RungPruner, trial: optuna.trial.Trial) -> str:
    """What the pruner thinks, where it says so."""
    verdict = getattr(pruner, "verdict", None)
    return "" if verdict is None else str(verdict(trial.study, trial))
