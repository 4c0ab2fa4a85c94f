"""Which trials end before the study's deadline, by the measured speed of their configurations."""

from __future__ import annotations

from collections.abc import Sequence

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from core.config import TrainConfig
from core.data import Splits
from core.loop import seconds_per_epoch
from hpo.study import Study
from hpo.study.deadline import OutOfTime, TooLong
from hpo.trials import trial_index_of

PLAIN_S = "plain_epoch_s"
"""User attribute of a trial: seconds of an epoch as measured by a few steps before it began."""

# Trials that the estimate is corrected by.
_LAST = 10


class Pace:
    """Ends trials of a study with a deadline in time."""

    def __init__(self, study: Study, device: torch.device) -> None:
        self._study, self._device = study, device

    def begin(self, trial: optuna.trial.Trial, trial_index: int, config: TrainConfig, splits: Sequence[Splits]) -> None:
        """Measure a trial's speed by a few steps.

        Raises:
            TooLong: It cannot end before the deadline unless it is pruned.
            ConfigError: The configuration cannot be trained, as in `core.loop.train`.
        """
        if not self._study.deadline.is_set:
            return
        seconds = seconds_per_epoch(config, splits[0], device=self._device)
        if not config.is_probe:  # it has no epochs, nor their costs
            trial.set_user_attr(PLAIN_S, seconds)
            seconds *= self._correction()
        epochs = config.epochs * len(splits) - self._saved_epochs(trial_index)
        try:
            self._study.deadline.check(seconds * epochs + self._after())
        except OutOfTime as error:
            raise TooLong from error

    def epoch_ended(self, seconds: float) -> None:
        """Raise OutOfTime if another epoch as long as this one would end too late."""
        self._study.deadline.record()
        self._study.deadline.check(seconds)

    def _correction(self) -> float:
        """Largest ratio of real to measured time among the last finished and paused trials, without the probes.

        The few steps run without CUDA graphs and at the full image size, and do not see every cost of an epoch.
        """
        ratios = [
            float(trial.user_attrs["elapsed_s"]) / (trial.user_attrs["epochs"] * trial.user_attrs[PLAIN_S])
            for trial in self._ended(TrialState.COMPLETE, TrialState.PRUNED, TrialState.WAITING)
            if trial.user_attrs.get("epochs") and PLAIN_S in trial.user_attrs
        ]
        return max(ratios[-_LAST:], default=1.0)

    def _after(self) -> float:
        """Most seconds of the last complete trials beside their epochs, as for predictions with all views."""
        beside = [
            trial.duration.total_seconds() - float(trial.user_attrs["elapsed_s"])
            for trial in self._ended(TrialState.COMPLETE)
            if trial.duration is not None
        ]
        return max([0.0, *beside[-_LAST:]])

    def _ended(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials in these states whose time is known; those waiting have paused."""
        trials = self._study.optuna.get_trials(deepcopy=False, states=states)
        return [trial for trial in trials if "elapsed_s" in trial.user_attrs]

    def _saved_epochs(self, trial_index: int) -> int:
        """Number of epochs that earlier attempts at the trial have reported, if they left a checkpoint."""
        if not self._study.paths.checkpoints_of(trial_index):
            return 0
        trials = self._study.optuna.get_trials(deepcopy=False)
        return max((trial.last_step or 0 for trial in trials if trial_index_of(trial) == trial_index), default=0)


def _seconds(trial: optuna.trial.FrozenTrial) -> float:
    """Time of a finished trial from its beginning, of an interrupted one that of its epochs."""
    whole = trial.duration
    return max(float(trial.user_attrs["elapsed_s"]), 0.0 if whole is None else whole.total_seconds())
