"""A study in its storage: metadata, trials, best trial, results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.errors import StudyError
from hpo.storage import METADATA, mask
from hpo.storage.lease import dead_of
from hpo.study.code import own_code
from hpo.study.deadline import Deadline
from hpo.study.files import StudyFiles
from hpo.study.metadata import check_code, check_fingerprint, check_weights, config_of
from hpo.study.patience import Patience
from hpo.study.queue import TrialQueue
from hpo.study.settings import StudySettings
from hpo.trials import CONFIG, Counts, best_first, count_trials, effective_trials, trial_index_of

if TYPE_CHECKING:
    from core.config import TrainConfig
    from core.data import Dataset
    from hpo.paths import StudyPaths
    from hpo.space import SearchSpace


@dataclass(frozen=True)
class Trained:
    """A complete trial as it was trained."""

    config: TrainConfig
    value: float
    epochs: int
    """Epoch of the kept weights and of the value."""
    ran: int
    """Number of epochs that ran."""


class Study:
    """A study on its storage.

    Args:
        storage_url: It may contain a password.
        space: Needed to queue or claim trials.
    """

    def __init__(
        self,
        optuna_study: optuna.Study,
        paths: StudyPaths,
        metadata: Mapping[str, Any],
        storage_url: str,
        space: SearchSpace | None = None,
    ) -> None:
        self.optuna = optuna_study
        self.paths = paths
        self.metadata = metadata
        self.storage_url = storage_url
        self.settings = StudySettings(optuna_study)
        self.deadline = Deadline(self.settings)
        self.patience = Patience(optuna_study, self.settings)
        self.files = StudyFiles(optuna_study, self.settings, paths)
        self.queue = TrialQueue(optuna_study, self.settings, self.files, paths, space)

    # Metadata

    @property
    def name(self) -> str:
        """The study's name."""
        return self.paths.name

    @property
    def space_name(self) -> str:
        """Name of the search space."""
        return str(self.metadata["space"])

    @property
    def confirms(self) -> str | None:
        """Name of the confirmed study; None for a search."""
        name = self.metadata["identity"].get("confirms")
        return None if name is None else str(name)

    @property
    def metric(self) -> str:
        """Name of the objective."""
        return str(self.metadata["metric"])

    @property
    def direction(self) -> str:
        """Direction of the objective: `maximize` or `minimize`."""
        return str(self.metadata["direction"])

    @property
    def sign(self) -> int:
        """1 if the objective is maximized, -1 if it is minimized."""
        return 1 if self.direction == "maximize" else -1

    @property
    def seed(self) -> int:
        """Seed of the sampler and of the trials."""
        return int(self.metadata["seed"])

    @property
    def storage_shown(self) -> str:
        """URL of the storage without its password."""
        return mask(self.storage_url)

    @property
    def data_name(self) -> str:
        """Name of the data set."""
        return str(self.metadata["data"]["name"])

    @property
    def data_path(self) -> Path | None:
        """The `--data` that the study was created with."""
        path = self.metadata["data"]["path"]
        return None if path is None else Path(path)

    @property
    def skip_broken(self) -> bool:
        """Whether broken image files were left out of the study's data."""
        return bool(self.metadata["data"]["skip_broken"])

    @property
    def total(self) -> int | None:
        """Number of trials that the study was last run for; None before."""
        return self.settings.total

    @property
    def command(self) -> str | None:
        """Command that last ran the study, without any password; None before."""
        return self.settings.command

    def space(self) -> SearchSpace:
        """Return the search space of the last run, without its recipes."""
        return stored_space(self.optuna)

    def check_data(self, dataset: Dataset) -> None:
        """Raise StudyError unless these are the study's images."""
        check_fingerprint(self.name, self.metadata, dataset)

    def check_sources(self, config: TrainConfig) -> None:
        """Raise StudyError if the file of pretrained weights, or the user's own code, has changed."""
        check_weights(self.name, self.metadata, [config.model.pretrained_file])
        check_code(self.name, self.metadata, own_code(config))

    # Trials and results

    def counts(self) -> Counts:
        """Return the number of trials by state."""
        trials = self.optuna.get_trials(deepcopy=False)
        return count_trials(trials, dead_of(self.optuna, [t for t in trials if t.state == TrialState.RUNNING]))

    def best_trial(self) -> FrozenTrial | None:
        """Return the best complete trial; see `best_first` for equals."""
        trials = effective_trials(self.optuna.get_trials(deepcopy=False)).values()
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        return min(complete, key=lambda trial: best_first(trial, self.sign), default=None)

    def trained(self, number: int) -> Trained:
        """Return configuration and result of a complete trial; StudyError if there is no such."""
        trials = self.optuna.get_trials(deepcopy=False)
        if not 0 <= number < len(trials):
            raise StudyError(f"study {self.name} has no trial {number}; its trials are 0 to {len(trials) - 1}")
        trial = trials[number]
        if trial.state != TrialState.COMPLETE:
            state = "failed" if trial.state == TrialState.FAIL else trial.state.name.lower()
            raise StudyError(f"study {self.name}: trial {number} is {state}; choose a complete one")
        config = self.config_of(trial)
        ran = int(trial.user_attrs.get("epochs", config.epochs))
        return Trained(config, _value(trial), epochs=int(trial.user_attrs.get("kept_epoch", ran)), ran=ran)

    def config_of(self, trial: FrozenTrial) -> TrainConfig:
        """Return a trial's configuration with its seed, in any state; StudyError if its parameters make none."""
        from pydantic import ValidationError

        from core.config import TrainConfig
        from core.seeds import derive_seed

        if CONFIG in trial.user_attrs:
            return TrainConfig.model_validate_json(json.dumps(trial.user_attrs[CONFIG]))
        seed = int(trial.user_attrs.get("seed", derive_seed(self.seed, "trial", trial_index_of(trial))))
        try:
            return config_of(self.metadata, trial.params).override({"seed": seed})
        except ValidationError as error:
            why = "; ".join(str(fault["msg"]).removeprefix("Value error, ") for fault in error.errors())
            raise StudyError(
                f"study {self.name}: trial {trial.number} has no configuration that can be trained ({why}); "
                "choose another"
            ) from error


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None, "a complete trial has a value"
    return trial.value


def stored_space(study: optuna.Study) -> SearchSpace:
    """Return the stored search space without its recipes; StudyError if there is none."""
    from hpo.space import space_from_yaml

    settings = StudySettings(study)
    metadata, text = settings.get(METADATA), settings.space
    if metadata is None or text is None:
        raise StudyError(
            f"study {study.study_name} was begun by another version, or not by hpo; run it once by hpo run"
        )
    return space_from_yaml(text, metadata["space"])
