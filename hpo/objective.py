"""One trial: its parameters become a `TrainConfig`, `core.train` runs it, and what happens is reported.

A trial's seed follows from the study's seed and the trial's slot, so that a retried or resumed trial, which has a new
number, trains the very network that the first attempt would have.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import optuna
import torch
from pydantic import ValidationError

from core.config import TrainConfig
from core.errors import CheckpointError, ConfigError, DivergedError
from core.loop import EpochMetrics, TrainResult, train
from core.runtime import derive_seed, is_out_of_memory
from hpo.interrupts import Interrupts
from hpo.paths import StudyPaths
from hpo.search_space import SearchSpace, to_yaml
from hpo.training import append_line

if TYPE_CHECKING:
    from core.data import Splits
    from hpo.pruner import RungPruner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    number: int
    slot: int
    state: Literal["complete", "pruned"]
    value: float | None
    """The objective: the final one of a complete trial, the last reported one of a pruned trial."""
    config: TrainConfig | None
    params: dict[str, Any]
    history: tuple[EpochMetrics, ...] = ()
    result: TrainResult | None = None
    failure: str | None = None
    """`diverged`, `oom` or `invalid`, of a trial that could not be trained to its end."""
    why: str = ""
    """The pruner's verdict, or the failure's text."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """What the storage remembers beside the value."""


class Listener(Protocol):
    """Whoever wants to see a study run, one training at a time."""

    def trial_started(self, label: str, config: TrainConfig) -> None: ...

    def epoch_ended(self, epoch: EpochMetrics, verdict: str) -> None: ...

    def trial_ended(self, outcome: Outcome) -> None: ...

    def reference_ended(self, name: str, result: dict[str, Any]) -> None: ...


class Objective:
    """Trains what a trial asks for.

    Args:
        seed: the study's.
        splits: the training and validation images, on the device.
    """

    def __init__(
        self,
        space: SearchSpace,
        splits: Splits,
        paths: StudyPaths,
        *,
        seed: int,
        device: torch.device,
        listener: Listener,
        interrupts: Interrupts,
    ) -> None:
        self.space, self.splits, self.paths = space, splits, paths
        self.seed, self.device, self.listener, self.interrupts = seed, device, listener, interrupts

    def __call__(self, trial: optuna.trial.Trial, slot: int) -> Outcome:
        """Runs the trial to its end. What is raised is a fault of ours, or a person's Ctrl-C."""
        params = self.space.suggest(trial)  # all of them, before anything can fail
        try:
            config = self.space.config(params).override({"seed": derive_seed(self.seed, "trial", slot)})
        except ValidationError as error:
            text = "; ".join(str(fault["msg"]).removeprefix("Value error, ") for fault in error.errors())
            return Outcome(trial.number, slot, "pruned", None, None, params, failure="invalid", why=text)
        self.paths.trial(trial.number).mkdir(parents=True, exist_ok=True)
        self.paths.trial_config(trial.number).write_text(to_yaml(config))
        self.listener.trial_started(f"trial {trial.number}", config)
        attempt = _Attempt(self, trial, slot, config)
        try:
            result = self._train(attempt)
        except optuna.TrialPruned as verdict:
            return attempt.outcome("pruned", attempt.history[-1].score(self.space.metric), why=str(verdict))
        except Exception as error:
            failure = failure_of(error)
            if failure is None:
                raise
            return attempt.outcome("pruned", None, failure=failure, why=str(error).partition("\n")[0])
        return attempt.outcome("complete", result.value(self.space.metric), result=result)

    def _train(self, attempt: _Attempt) -> TrainResult:
        """Goes on from the slot's checkpoint, or begins anew where there is none that can be used."""
        checkpoint = self.paths.checkpoint(attempt.slot)
        with self.interrupts.let_through():
            try:
                return self._train_from(checkpoint, attempt)
            except CheckpointError as error:
                logger.warning("trial %d begins anew: %s", attempt.trial.number, error)
                checkpoint.unlink()
                return self._train_from(checkpoint, attempt)

    def _train_from(self, checkpoint: Path, attempt: _Attempt) -> TrainResult:
        return train(
            attempt.config,
            self.splits,
            device=self.device,
            on_epoch_end=attempt.epoch_ended,
            on_resume=attempt.resumed,
            resume_from=checkpoint,
            checkpoint_to=checkpoint,
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

    def __init__(self, objective: Objective, trial: optuna.trial.Trial, slot: int, config: TrainConfig) -> None:
        self.objective, self.trial, self.slot, self.config = objective, trial, slot, config
        self.metric = objective.space.metric
        self.history: list[EpochMetrics] = []
        self.metrics_file = objective.paths.trial_metrics(trial.number)
        self.metrics_file.write_text("")

    def resumed(self, history: tuple[EpochMetrics, ...]) -> None:
        """Reports again what the interrupted attempt had reported: its rungs have been judged already."""
        with self.objective.interrupts.held():
            for epoch in history:
                self._report(epoch)

    def epoch_ended(self, epoch: EpochMetrics) -> None:
        """Reports an epoch, and raises TrialPruned where the pruner ends the trial."""
        with self.objective.interrupts.held():
            self._judge(epoch)

    def _judge(self, epoch: EpochMetrics) -> None:
        self._report(epoch)
        pruner = self.trial.study.pruner
        # The last epoch decides nothing any more: the trial is complete, and its value is worth keeping.
        last = epoch.epoch == self.config.epochs
        pruned = not last and self.trial.should_prune()
        verdict = _verdict(pruner, self.trial)
        self.objective.listener.epoch_ended(epoch, verdict)
        if pruned:
            raise optuna.TrialPruned(verdict or f"pruned at epoch {epoch.epoch}")

    def _report(self, epoch: EpochMetrics) -> None:
        self.history.append(epoch)
        append_line(self.metrics_file, epoch.row(self.metric))
        self.trial.report(epoch.score(self.metric), epoch.epoch)

    def outcome(
        self,
        state: Literal["complete", "pruned"],
        value: float | None,
        *,
        result: TrainResult | None = None,
        failure: str | None = None,
        why: str = "",
    ) -> Outcome:
        """How the attempt ended, with what the storage is to remember of it."""
        last = self.history[-1] if self.history else None
        attributes: dict[str, Any] = {"epochs": len(self.history)}
        if result is not None:
            attributes["kept_epoch"] = result.kept.epoch
        if last is not None:
            attributes |= {"elapsed_s": round(last.elapsed_s, 3), "images_per_s": round(last.images_per_s, 1)}
            for name, scores in (("raw", last.raw), ("averaged", last.averaged)):
                if scores is not None:
                    attributes[f"{name}_accuracy"] = scores.accuracy
        return Outcome(
            self.trial.number,
            self.slot,
            state,
            value,
            self.config,
            dict(self.trial.params),
            tuple(self.history),
            result,
            failure,
            why,
            attributes,
        )


def _verdict(pruner: optuna.pruners.BasePruner | RungPruner, trial: optuna.trial.Trial) -> str:
    """What the pruner thinks, where it says so."""
    verdict = getattr(pruner, "verdict", None)
    return "" if verdict is None else str(verdict(trial.study, trial))
