"""A study as its storage has it: metadata, trials, best, results. `hpo.study.queue` changes its trials."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError

from core.config import TrainConfig
from hpo.errors import StudyError
from hpo.paths import StudyPaths
from hpo.space import space_from_yaml, space_to_yaml
from hpo.storage import is_masked, mask
from hpo.storage.optuna_access import id_of, storage_of
from hpo.study.metadata import (
    METADATA,
    check_fingerprint,
    check_weights,
    config_of,
    data_path_of,
    skips_broken,
)
from hpo.study.queue import TrialQueue
from hpo.trials import (
    CONFIG,
    FAILURE,
    TOTAL,
    Counts,
    effective_trials,
    trial_index_of,
)

if TYPE_CHECKING:
    from core.data import Dataset
    from hpo.space import SearchSpace
    from hpo.storage.artifacts import Depot
    from hpo.storage.optuna_access import OptunaArtifactStore


_COMMAND = "command"  # study user attribute: what the study was last run by
_SPACE = "space"  # study user attribute: the space as YAML, for workers that join without its file
_DEPOT = "artifacts"  # study user attribute: where `--artifacts` keeps files for all machines, without a password
_RETRIES = "retries"  # study user attribute: how often a slot is begun again after its process died
CONFIRMATION = "confirmation"
"""The user attribute of a study that was confirmed: the verdict in words."""
_PACKING = "packing"  # study user attribute: host and device -> how many trials at once were best there, and why
_DEVICES = "devices:"  # how a study user attribute begins that says what a host's trials are trained on
_DEFAULT_RETRIES = 3  # one more than a pool fills a seat again, so that a seat is given up before a configuration is


@dataclass(frozen=True)
class Trained:
    """A trial as it was trained."""

    config: TrainConfig
    value: float
    epochs: int
    """The epoch whose weights are kept and whose value counts: fewer than the configuration's where a later one was
    worse."""
    ran: int
    """The epochs that it ran: fewer than the configuration's where it stopped early."""


class Study:
    """A study on its storage.

    Args:
        optuna_study: what Optuna knows of it.
        record: what the study searches, as study.yaml holds it.
        storage_url: what the storage is opened by; it may hold a password, `storage_shown` never does.
        space: the search space, for whoever is to run trials.
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
        self.depot: Depot | None = None
        """Where checkpoints, weights and artifacts are kept for all machines, once `use_depot` was called."""
        self._space = space

    # What it is

    @property
    def name(self) -> str:
        return self.paths.name

    @property
    def space_name(self) -> str:
        return str(self.metadata["space"])

    @property
    def confirms(self) -> str | None:
        """The study whose best configurations this one trains again; None of a search."""
        name = self.metadata["identity"].get("confirms")
        return None if name is None else str(name)

    @property
    def metric(self) -> str:
        return str(self.metadata["metric"])

    @property
    def direction(self) -> str:
        """`maximize` or `minimize`."""
        return str(self.metadata["direction"])

    @property
    def sign(self) -> int:
        """1 where more of the metric is better, -1 where less is."""
        return 1 if self.direction == "maximize" else -1

    @property
    def seed(self) -> int:
        return int(self.metadata["seed"])

    @property
    def storage_shown(self) -> str:
        """The storage without its password."""
        return mask(self.storage_url)

    @property
    def data_name(self) -> str:
        return str(self.metadata["data"]["name"])

    @property
    def data_path(self) -> Path | None:
        """What `--data` was when the study began."""
        return data_path_of(self.metadata)

    @property
    def skip_broken(self) -> bool:
        """Whether broken image files were left out of the study's data."""
        return skips_broken(self.metadata)

    @property
    def total(self) -> int | None:
        """How many trials the study was last run for; None before its first run."""
        total = self._storage.get_study_user_attrs(self._id).get(TOTAL)
        return None if total is None else int(total)

    @property
    def command(self) -> str | None:
        """What the study was last run by, to be typed again; None before its first run."""
        command = self._storage.get_study_user_attrs(self._id).get(_COMMAND)
        return None if command is None else str(command)

    @property
    def retries(self) -> int:
        """How often a slot is begun again after a process died that trained it; then it counts as failed to train."""
        return int(self._storage.get_study_user_attrs(self._id).get(_RETRIES, _DEFAULT_RETRIES))

    def remember_retries(self, retries: int | None) -> None:
        """Keeps how often a slot is begun again, for all that work on the study; None leaves it as it is."""
        if retries is not None and retries != self.retries:
            self.optuna.set_user_attr(_RETRIES, retries)

    def use_depot(self, url: str | None) -> None:
        """Keeps checkpoints, weights and artifacts where other machines reach them too.

        Args:
            url: a path, or what fsspec knows; None is what the study was given before, if it was.

        Raises:
            StudyError: it was given another one before, or one with a password, which is not remembered; or there is
                no driver for it.
        """
        known = self._storage.get_study_user_attrs(self._id).get(_DEPOT)
        if url is None and known is not None and is_masked(known):
            raise StudyError(f"study {self.name}: give --artifacts {known} with the password, which is not remembered")
        if url and "://" not in url:
            url = str(Path(url).resolve())  # relative to where this command runs, which others do not know
        if url and known is not None and mask(url) != known:
            raise StudyError(
                f"study {self.name} keeps its artifacts in {known}; leave --artifacts out, or choose another --study"
            )
        if url == "":
            raise StudyError("--artifacts is empty; give a folder or a URL, or leave it out")
        if url is not None and known is None and any(trial.state != TrialState.WAITING for trial in self._trials()):
            raise StudyError(
                f"study {self.name} keeps its artifacts in {self.paths.dir}; leave --artifacts out, or choose another "
                "--study"
            )
        url = url or known
        if url is None:
            return
        from hpo.storage.artifacts import Depot

        self.depot = Depot(url, self.paths.dir)
        if known is None:
            self.optuna.set_user_attr(_DEPOT, mask(url))

    def drop_checkpoint(self, checkpoint: Path) -> None:
        """Lets go of a finished trial's checkpoint, wherever it lies."""
        from core.checkpoint import unfinished  # with torch, which looking at a study does not need

        if self.depot is not None:
            self.depot.drop(checkpoint)
        else:
            checkpoint.unlink(missing_ok=True)
        unfinished(checkpoint).unlink(missing_ok=True)

    @property
    def artifact_dir(self) -> Path | None:
        """The folder of the dashboard's pictures, for optuna-dashboard itself; None where they lie behind a URL."""
        known = self._storage.get_study_user_attrs(self._id).get(_DEPOT)
        if known is None:
            return self.paths.artifacts
        return None if "://" in known else Path(known) / self.paths.dir.name / self.paths.inside(self.paths.artifacts)

    def artifact_store(self) -> OptunaArtifactStore:
        """Where the pictures of trials are kept for the dashboard; its folder is made where it is missing."""
        if self.depot is not None:
            return self.depot.artifacts(self.paths.artifacts)
        from optuna.artifacts import FileSystemArtifactStore

        self.paths.artifacts.mkdir(parents=True, exist_ok=True)
        return FileSystemArtifactStore(self.paths.artifacts)

    def bring_trial(self, number: int, *, folds: int) -> None:
        """Brings here from the depot what a refit takes over from a trial that another machine has trained."""
        if self.depot is None:
            return
        weights = [self.paths.trial_model(number, fold) for fold in range(1, folds + 1)]
        for file in (*weights, self.paths.trial_metrics(number)):
            if not file.exists():
                self.depot.fetch(self.paths.inside(file), file)

    def remember_space(self, space: SearchSpace) -> None:
        """Keeps the space for workers that join without its file."""
        text = space_to_yaml(space)
        if self._storage.get_study_user_attrs(self._id).get(_SPACE) != text:
            self.optuna.set_user_attr(_SPACE, text)

    def space(self) -> SearchSpace:
        """The space as it was when the study was last run, without its recipes.

        Raises:
            StudyError: the study is not of this version.
        """
        return space_of(self.name, self.optuna.user_attrs)

    def remember_command(self, command: str) -> None:
        """Keeps the command that runs the study, without any password."""
        if self.command != command:
            self.optuna.set_user_attr(_COMMAND, command)

    def packing(self, device: str) -> tuple[int, str] | None:
        """How many trials at once were found best on this host's device of that name, and why; None where none were."""
        known = self._storage.get_study_user_attrs(self._id).get(_PACKING, {}).get(_on_this_host(device))
        return None if known is None else (int(known["trials"]), str(known["why"]))

    def remember_packing(self, device: str, trials: int, why: str) -> None:
        """Keeps how many trials at once were found best on this host's device of that name."""
        known = self._storage.get_study_user_attrs(self._id).get(_PACKING, {})
        self.optuna.set_user_attr(_PACKING, {**known, _on_this_host(device): {"trials": trials, "why": why}})

    def remember_device(self, device: str) -> None:
        """Keeps what this host's trials are trained on, in words, to be read in the dashboard; it may be several."""
        key = f"{_DEVICES}{socket.gethostname()}"
        known = str(self._storage.get_study_user_attrs(self._id).get(key, ""))
        if device not in known.split("; "):
            self.optuna.set_user_attr(key, f"{known}; {device}" if known else device)

    def check_data(self, dataset: Dataset) -> None:
        """Raises StudyError where these are not the images that the study was begun with."""
        check_fingerprint(self.name, self.metadata, dataset.fingerprint)

    def check_weights(self, config: TrainConfig) -> None:
        """Raises StudyError where the file of weights that a trial began from has changed."""
        check_weights(self.name, self.metadata, [config.model.pretrained_file])

    # Its trials

    @cached_property
    def queue(self) -> TrialQueue:
        """The queue of its trials; what changes them is there."""
        return TrialQueue(self, self._space)

    @property
    def _storage(self) -> optuna.storages.BaseStorage:
        return storage_of(self.optuna)

    @property
    def _id(self) -> int:
        return id_of(self.optuna)

    def _trials(self) -> list[FrozenTrial]:
        """Every trial, by number. Not copies: do not change them."""
        return self.optuna.get_trials(deepcopy=False)

    def counts(self) -> Counts:
        """How the slots stand, each counted once."""
        counted = list(effective_trials(self._trials()).values())
        pruned = [trial for trial in counted if trial.state == TrialState.PRUNED]
        failures = sum(FAILURE in trial.user_attrs for trial in pruned)
        states = [trial.state for trial in counted]
        return Counts(
            complete=states.count(TrialState.COMPLETE),
            pruned=len(pruned) - failures,
            failures=failures,
            running=states.count(TrialState.RUNNING),
            waiting=states.count(TrialState.WAITING),
        )

    def best_trial(self) -> FrozenTrial | None:
        """The complete trial with the best value, of equals the first slot; None before any is complete."""
        complete = [trial for trial in effective_trials(self._trials()).values() if trial.state == TrialState.COMPLETE]
        return min(complete, key=lambda trial: (-self.sign * _value(trial), trial_index_of(trial)), default=None)

    def trained(self, number: int) -> Trained:
        """A complete trial's configuration, seed included, and what came of it.

        Raises:
            StudyError: there is no such trial, or it is not complete.
        """
        trials = self._trials()
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
        """The configuration that a trial has trained, seed included, whatever became of it.

        Raises:
            StudyError: its parameters make none.
        """
        if CONFIG in trial.user_attrs:
            return TrainConfig.model_validate_json(json.dumps(trial.user_attrs[CONFIG]))
        from core.runtime import derive_seed  # with torch, which looking at a study does not need

        seed = int(trial.user_attrs.get("seed", derive_seed(self.seed, "trial", trial_index_of(trial))))
        try:
            return config_of(self.metadata, trial.params).override({"seed": seed})
        except ValidationError as error:
            why = "; ".join(str(fault["msg"]).removeprefix("Value error, ") for fault in error.errors())
            raise StudyError(
                f"study {self.name}: trial {trial.number} has no configuration that can be trained ({why}); "
                "choose another"
            ) from error


def _on_this_host(device: str) -> str:
    """Hosts that share a storage may have devices of one name, and other cores and memory beside them."""
    return f"{socket.gethostname()}: {device}"


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None, "a complete trial has a value"
    return trial.value


def space_of(name: str, attributes: Mapping[str, Any]) -> SearchSpace:
    """The space that a study's attributes hold."""
    if METADATA not in attributes or _SPACE not in attributes:
        raise StudyError(f"study {name} was begun by another version, or not by hpo; run it once by hpo run")
    return space_from_yaml(attributes[_SPACE], attributes[METADATA]["space"])
