"""One trial: its parameters become a `TrainConfig`, `core.train` runs it, and its epochs are reported.

The seed follows from the study's seed and the trial index, so that a retried trial trains the same network.

The value of a trial with folds (`data.folds`) is the mean of their kept epochs. It reports the mean of the finished
folds' scores and the current one, so that a pruner can end it after any epoch.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import optuna
import torch
from pydantic import ValidationError

from core.calibration import calibrated_loss
from core.config import DataConfig, TrainConfig
from core.errors import ConfigError, DivergedError
from core.loop import EpochMetrics, TrainResult, train
from core.runtime import is_out_of_memory
from core.seeds import derive_seed
from hpo.reporter import StudyView
from hpo.search.costs import measured
from hpo.search.held_out import half_lives
from hpo.search.interrupts import Interrupts
from hpo.search.pace import Pace
from hpo.search.training import fold_label, naming_images, of_fold, on_host, resume_or_restart, without_failed_graphs
from hpo.space import SearchSpace, to_yaml
from hpo.space.pruner import PromotePruner, RungPruner, mark_loss
from hpo.storage.atomic import write_file
from hpo.storage.optuna_access import storage_of, trial_id
from hpo.study import Study
from hpo.study.results import append_line
from hpo.trials import CONFIG, COSTS, REPLICATE_OF, RESUMED_EPOCH, VAL_LOSS, Outcome, first_twin

if TYPE_CHECKING:
    from core.data import Splits

logger = logging.getLogger(__name__)

Divide = Callable[[DataConfig], "Sequence[Splits]"]
"""Splits the images on the device for a configuration: one split, or one per fold."""


@dataclass(frozen=True)
class Objective:
    """Trains the configuration of a trial."""

    space: SearchSpace
    divide: Divide
    study: Study
    device: torch.device
    progress: StudyView
    interrupts: Interrupts
    """May end a trial after an epoch."""
    on_checkpoint: Callable[[Path], None] | None = None
    """Called with the path of each complete checkpoint."""

    @cached_property
    def pace(self) -> Pace:
        """May end a trial before its first epoch, or after one."""
        return Pace(self.study, self.device)

    def __call__(self, trial: optuna.trial.Trial, trial_index: int, *, until: int | None = None) -> Outcome:
        """Run the trial to its end. A configuration that cannot be trained is an outcome, not an exception.

        Args:
            until: The step after which it pauses; None to run to its end.

        Raises:
            KeyboardInterrupt: An interrupt or the deadline has ended it; its checkpoint is saved.
        """
        params = self.space.suggest(trial)  # all of them, before anything can fail
        twin = first_twin(trial.study.get_trials(deepcopy=False), trial.params, trial_index)
        if twin is not None:
            trial.set_user_attr(REPLICATE_OF, twin)
        try:
            config = self._config(trial, params, trial_index)
        except ValidationError as error:
            text = "; ".join(str(fault["msg"]).removeprefix("Value error, ") for fault in error.errors())
            shown = self.space.shown(trial)
            return Outcome(trial.number, trial_index, "pruned", None, None, shown, failure="invalid", why=text)
        self.study.paths.trial(trial.number).mkdir(parents=True, exist_ok=True)
        write_file(self.study.paths.trial_config(trial.number), to_yaml(naming_images(config, self.study.data_path)))
        attempt = _Attempt(self, trial, trial_index, config, self.divide(config.data), twin, until)
        try:
            self._measure_costs(trial, config, attempt.splits[0])
            self.pace.begin(trial, trial_index, config, attempt.splits)
            for fold in range(1, attempt.folds + 1):
                attempt.begin(fold)
                attempt.end(self._train(attempt))
        except optuna.TrialPruned as verdict:
            return attempt.outcome("pruned", attempt.reported, why=str(verdict))
        except _Paused:
            return attempt.outcome("paused", attempt.reported)
        except Exception as error:
            failure = failure_of(error)
            if failure is None:
                raise
            return attempt.outcome("pruned", None, failure=failure, why=str(error).partition("\n")[0])
        return attempt.outcome("complete", statistics.fmean(attempt.values))

    def _config(self, trial: optuna.trial.Trial, params: dict[str, Any], trial_index: int) -> TrainConfig:
        own = trial.user_attrs.get(CONFIG)
        if own is not None:
            return TrainConfig.model_validate_json(json.dumps(own))
        return self.space.config(params).override({"seed": derive_seed(self.study.seed, "trial", trial_index)})

    def _measure_costs(self, trial: optuna.trial.Trial, config: TrainConfig, splits: Splits) -> None:
        """Store the costs of a search's trial, by which its rungs select the trials that it is compared with."""
        costs = self.space.objective.costs
        if self.study.confirms is None and not set(costs) <= {*trial.user_attrs.get(COSTS, {})}:
            trial.set_user_attr(COSTS, measured(costs, config, splits, self.device))

    def _train(self, attempt: _Attempt) -> TrainResult:
        checkpoint = self.study.paths.checkpoint(attempt.trial_index, attempt.fold)
        if self.study.files.store is not None:
            self.study.files.store.bring(checkpoint)
        name = f"trial {attempt.trial.number}"
        with self.interrupts.patient():
            return resume_or_restart(checkpoint, name, lambda: self._train_from(checkpoint, attempt))

    def _train_from(self, checkpoint: Path, attempt: _Attempt) -> TrainResult:
        with without_failed_graphs(self.study.settings, of_fold(attempt.config, attempt.fold)) as config:
            return train(
                config,
                attempt.splits[attempt.fold - 1],
                device=self.device,
                on_epoch_end=attempt.epoch_ended,
                on_resume=attempt.resumed,
                resume_from=checkpoint,
                checkpoint_to=checkpoint,
                # A trial that has passed a rung is worth more than its epochs: others were compared with it.
                checkpoint_at=attempt.rungs(),
                # A finished fold is not trained again if a later one is interrupted.
                checkpoint_at_end=attempt.folds > 1,
                on_checkpoint=self.on_checkpoint,
                calibrate_at=attempt.rungs() if attempt.ranked_by_loss else frozenset(),
                metric=self.space.metric,
                averages=() if self.study.confirms is None else half_lives(config),
            )


def failure_of(error: Exception) -> str | None:
    """Classify why a configuration cannot be trained: `diverged`, `oom` or `invalid`; None if it is not at fault."""
    if isinstance(error, DivergedError):
        return "diverged"
    if isinstance(error, ConfigError):
        return "invalid"
    return "oom" if is_out_of_memory(error) else None


class _Paused(KeyboardInterrupt):
    """Ends a training at a rung; `core.loop.train` saves its checkpoint."""


@dataclass
class _Attempt:
    """One trial's reports so far."""

    objective: Objective
    trial: optuna.trial.Trial
    trial_index: int
    config: TrainConfig
    splits: Sequence[Splits]
    twin: int | None
    until: int | None
    fold: int = 0
    """The fold in training, counted from 1."""
    results: list[TrainResult] = field(default_factory=list)
    """Results of the finished folds."""
    values: list[float] = field(default_factory=list)
    """Values of the finished folds."""
    losses: list[float] = field(default_factory=list)
    """Calibrated losses of the finished folds, if rungs rank by them."""
    reported: float | None = None
    """The last value reported to Optuna."""
    history: list[EpochMetrics] = field(default_factory=list)
    rows: list[dict[str, float | int]] = field(default_factory=list)
    last: dict[int, EpochMetrics] = field(default_factory=dict)
    """Fold -> its last epoch so far."""
    before_s: float = 0.0
    """Duration of the finished folds."""

    def __post_init__(self) -> None:
        self.folds, self.metric = len(self.splits), self.objective.space.metric
        self.metrics_file = self.objective.study.paths.trial_metrics(self.trial.number)
        write_file(self.metrics_file, "")
        stored = storage_of(self.trial.study).get_trial(trial_id(self.trial))
        self.stored_steps = frozenset(stored.intermediate_values)  # of a paused trial

    def begin(self, fold: int) -> None:
        self.fold = fold
        self.before_s = self.history[-1].elapsed_s if self.history else 0.0

    def rungs(self) -> frozenset[int]:
        """The epochs of this fold at which trials are compared; empty for pruners without rungs."""
        pruner = self.trial.study.pruner
        if not isinstance(pruner, RungPruner | PromotePruner):
            return frozenset()
        begun = (self.fold - 1) * self.config.epochs
        return frozenset(step - begun for step in pruner.rungs if begun < step <= begun + self.config.epochs)

    @property
    def ranked_by_loss(self) -> bool:
        """Whether a rung ranks by the calibrated loss."""
        return self.metric == "accuracy" and isinstance(self.trial.study.pruner, RungPruner | PromotePruner)

    def resumed(self, history: tuple[EpochMetrics, ...]) -> None:
        """Report the epochs of the interrupted attempt again."""
        with self.objective.interrupts.held():
            for epoch in history:
                self._report(epoch)
            self.trial.set_user_attr(RESUMED_EPOCH, self._step(len(history)))
            self._pause_if_due(len(history))  # its process died between the checkpoint and the pause
        fold = f" of {fold_label(self.fold, self.folds)}" if self.folds > 1 else ""
        text = "trial %d resumes after epoch %d%s, from the checkpoint of trial index %d"
        logger.info(text, self.trial.number, len(history), fold, self.trial_index)

    def epoch_ended(self, epoch: EpochMetrics) -> None:
        # After the last epoch the trial is over; `end` judges a fold by its kept epoch.
        last = epoch.epoch == self.config.epochs
        with self.objective.interrupts.held():
            self._report(epoch)
            pruned = not last and self.trial.should_prune()
            self.objective.progress.refresh()
            if pruned:
                raise optuna.TrialPruned(self._verdict() or f"pruned at epoch {epoch.epoch}")
            if not last:
                self._pause_if_due(epoch.epoch)
        if not last:
            self.objective.interrupts.check()
            earlier = self.history[-2].elapsed_s if len(self.history) > 1 else 0.0
            self.objective.pace.epoch_ended(self.history[-1].elapsed_s - earlier)

    def end(self, result: TrainResult) -> None:
        """Add a finished fold, and raise TrialPruned if the pruner ends the trial."""
        self.values.append(result.value(self.metric))
        if self.folds == 1:
            self.results.append(result)
            return
        # Off the device: the next fold needs the memory.
        self.results.append(on_host(result))
        if self.ranked_by_loss:
            assert result.val_logits is not None, "a trial has validation images"
            divided = self.splits[self.fold - 1]
            self.losses.append(calibrated_loss(result.val_logits, divided.labels[divided.val]))
            self._report_loss(statistics.fmean(self.losses), epoch=self.config.epochs)
        # Early stopping may have ended the fold earlier; all trials are compared at the same step.
        self._report_value(statistics.fmean(self.values), epoch=self.config.epochs)
        if self.fold < self.folds and self.trial.should_prune():
            raise optuna.TrialPruned(self._verdict() or f"pruned at the end of fold {self.fold}")
        if self.fold < self.folds:
            self._pause_if_due(self.config.epochs)

    def _step(self, epoch: int) -> int:
        """The step of an epoch of this fold."""
        return (self.fold - 1) * self.config.epochs + epoch

    def _pause_if_due(self, epoch: int) -> None:
        if self.until is not None and self._step(epoch) >= self.until:
            raise _Paused

    def _report(self, epoch: EpochMetrics) -> None:
        timed = replace(epoch, elapsed_s=self.before_s + epoch.elapsed_s)
        row = timed.row(self.metric)
        self.rows.append(row if self.folds == 1 else {"fold": self.fold, **row})
        append_line(self.metrics_file, self.rows[-1])
        self.history.append(timed)
        self.last[self.fold] = timed
        if self.folds == 1 or epoch.epoch < self.config.epochs:  # `end` reports a fold's last step
            # The loss first: a trial that other workers see at a rung has it.
            if epoch.calibrated_loss is not None:
                self._report_loss(statistics.fmean([*self.losses, epoch.calibrated_loss]), epoch.epoch)
            self._report_value(statistics.fmean([*self.values, epoch.score(self.metric)]), epoch.epoch)

    def _report_value(self, value: float, epoch: int) -> None:
        self.reported = value
        if self._step(epoch) not in self.stored_steps:
            self.trial.report(value, self._step(epoch))

    def _report_loss(self, loss: float, epoch: int) -> None:
        mark_loss(self.trial.study, self.trial, self._step(epoch), loss)

    def _verdict(self) -> str:
        verdict = getattr(self.trial.study.pruner, "verdict", None)
        return "" if verdict is None else str(verdict(self.trial.study, self.trial))

    def outcome(
        self,
        state: Literal["complete", "pruned", "paused"],
        value: float | None,
        *,
        failure: str | None = None,
        why: str = "",
    ) -> Outcome:
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
            # With folds their mean, for a training on all images; half an epoch is rounded up.
            attributes["kept_epoch"] = int(statistics.fmean(result.kept.epoch for result in self.results) + 0.5)
            attributes[VAL_LOSS] = statistics.fmean(result.kept.score("nll") for result in self.results)
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
