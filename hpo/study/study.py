"""A study: created, found and resumed; its budget as a total, and its trials as slots of that total.

Slot k of a total is a waiting trial with the user attribute `slot`. It is claimed by a compare-and-set on its state in
the storage, never by Optuna's `ask()`, which creates: so a total is exact under any number of workers, and the same
command again goes on to it. A claimed trial holds a lease; when its process is dead, the attempt is marked failed and
its slot queued again with the parameters that it had. Where two processes queue the same slot at once, the earlier
trial counts and the later one is never claimed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import socket
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial
from pydantic import ValidationError

from core.config import TrainConfig
from hpo.errors import StudyError
from hpo.paths import StudyPaths, confirmed_by, is_confirmation, studies_root
from hpo.space import ConfirmationSpace, space_from_yaml, space_to_yaml
from hpo.space.pruner import build_pruner
from hpo.space.samplers import build_sampler
from hpo.storage import is_journal, is_masked, mask, open_storage
from hpo.storage.lease import (
    LEASE,
    Held,
    beating,
    died_alone,
    has_heartbeat,
    held_elsewhere,
    is_abandoned,
    own_lease,
    stale_elsewhere,
)
from hpo.study.metadata import (
    RECORD,
    check_fingerprint,
    check_same,
    check_weights,
    config_of,
    data_path_of,
    new_record,
    read_record,
    shown_attributes,
    skips_broken,
    storage_url_of,
    write_record,
)
from hpo.study.warm_start import CONSTRAINT, take_over_trials
from hpo.trials import (
    ARTIFACT,
    BASE,
    CONFIG,
    CRASHES,
    FAILURE,
    INTERRUPTED,
    RECIPE,
    RESUMED_EPOCH,
    SLOT,
    STOPPED,
    TAKEN_FROM,
    slot_of,
    standing,
)

if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

    from core.data import Dataset
    from hpo.space import Recipe, SearchSpace
    from hpo.storage.artifacts import Depot

__all__ = [
    "BASE",
    "CONFIRMATION",
    "FAILURE",
    "INTERRUPTED",
    "RECIPE",
    "SLOT",
    "TAKEN_FROM",
    "Counts",
    "Held",
    "Study",
    "Trained",
    "check_search_name",
    "find_study",
    "list_studies",
    "open_study",
]

logger = logging.getLogger(__name__)

_TOTAL = "trials"  # study user attribute: the total, for workers that join
_COMMAND = "command"  # study user attribute: what the study was last run by
_SPACE = "space"  # study user attribute: the space as YAML, for workers that join without its file
_DEPOT = "artifacts"  # study user attribute: where `--artifacts` keeps files for all machines, without a password
_RETRIES = "retries"  # study user attribute: how often a slot is begun again after its process died
CONFIRMATION = "confirmation"
"""The user attribute of a study that was confirmed: the verdict in words."""
_PACKING = "packing"  # study user attribute: host and device -> how many trials at once were best there, and why
_DEVICES = "devices:"  # how a study user attribute begins that says what a host's trials are trained on
_DEFAULT_RETRIES = 3  # one more than a pool fills a seat again, so that a seat is given up before a configuration is
_NAME = re.compile(r"\w[\w.\-]{0,99}")


@dataclass(frozen=True)
class Counts:
    """How a study's trials stand. Interrupted attempts are not in it."""

    complete: int
    pruned: int
    """By the pruner."""
    failures: int
    """Pruned because they could not be trained: `diverged`, `oom`, `invalid`."""
    running: int
    waiting: int

    @property
    def finished(self) -> int:
        """What counts towards the total."""
        return self.complete + self.pruned + self.failures


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
        record: Mapping[str, Any],
        storage_url: str,
        space: SearchSpace | None = None,
    ) -> None:
        self.optuna = optuna_study
        self.paths = paths
        self.record = record
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
        return str(self.record["space"])

    @property
    def confirms(self) -> str | None:
        """The study whose best configurations this one trains again; None of a search."""
        name = self.record["identity"].get("confirms")
        return None if name is None else str(name)

    @property
    def metric(self) -> str:
        return str(self.record["metric"])

    @property
    def direction(self) -> str:
        """`maximize` or `minimize`."""
        return str(self.record["direction"])

    @property
    def sign(self) -> int:
        """1 where more of the metric is better, -1 where less is."""
        return 1 if self.direction == "maximize" else -1

    @property
    def seed(self) -> int:
        return int(self.record["seed"])

    @property
    def storage_shown(self) -> str:
        """The storage without its password."""
        return mask(self.storage_url)

    @property
    def data_name(self) -> str:
        return str(self.record["data"]["name"])

    @property
    def data_path(self) -> Path | None:
        """What `--data` was when the study began."""
        return data_path_of(self.record)

    @property
    def skip_broken(self) -> bool:
        """Whether broken image files were left out of the study's data."""
        return skips_broken(self.record)

    @property
    def total(self) -> int | None:
        """How many trials the study was last run for; None before its first run."""
        total = self._storage.get_study_user_attrs(self._id).get(_TOTAL)
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

    def artifact_store(self) -> ArtifactStore:
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
        return _space_of(self.name, self.optuna.user_attrs)

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
        check_fingerprint(self.name, self.record, dataset.fingerprint)

    def check_weights(self, config: TrainConfig) -> None:
        """Raises StudyError where the file of weights that a trial began from has changed."""
        check_weights(self.name, self.record, [config.model.pretrained_file])

    # Its trials

    @property
    def _storage(self) -> optuna.storages.BaseStorage:
        return self.optuna._storage

    @property
    def _id(self) -> int:
        return self.optuna._study_id

    def _trials(self) -> list[FrozenTrial]:
        """Every trial, by number. Not copies: do not change them."""
        return self.optuna.get_trials(deepcopy=False)

    def counts(self) -> Counts:
        """How the slots stand, each counted once."""
        counted = list(standing(self._trials()).values())
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
        complete = [trial for trial in standing(self._trials()).values() if trial.state == TrialState.COMPLETE]
        return min(complete, key=lambda trial: (-self.sign * _value(trial), slot_of(trial)), default=None)

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

        seed = int(trial.user_attrs.get("seed", derive_seed(self.seed, "trial", slot_of(trial))))
        try:
            return config_of(self.record, trial.params).override({"seed": seed})
        except ValidationError as error:
            why = "; ".join(str(fault["msg"]).removeprefix("Value error, ") for fault in error.errors())
            raise StudyError(
                f"study {self.name}: trial {trial.number} has no configuration that can be trained ({why}); "
                "choose another"
            ) from error

    def ensure_slots(self, total: int) -> Counts:
        """Queues what is missing of slots 0 to `total` - 1: the base, the recipes that the space can express, others.

        The base takes the first slot that is free: 0, but where trials of another study were taken over. A slot whose
        attempts were all cut off is queued with the parameters of the last one.
        """
        assert self._space is not None, "only a study that was opened with its space can queue trials"
        if self.total != total:
            self.optuna.set_user_attr(_TOTAL, total)
        trials = self._trials()
        taken = standing(trials)
        for trial in trials:
            if trial.state == TrialState.WAITING and taken[slot_of(trial)] is not trial:
                self._fail(trial)  # two processes queued the same slot: this one was second
        last_attempt = {slot_of(trial): trial for trial in trials}
        for slot in sorted(last_attempt.keys() - taken.keys()):
            if slot < total:
                self._queue_again(last_attempt[slot])
        missing = self._missing({**last_attempt, **taken}.values())
        for slot in range(total):
            if slot not in last_attempt:
                params, attributes = missing.pop(0) if missing else ({}, {})
                self._queue(slot, params, attributes)
        for _, attributes in missing:
            what = f"recipe {attributes[RECIPE]}" if RECIPE in attributes else "the base"
            logger.info("%s is no trial of the study: its %d trials were all queued before", what, total)
        return self.counts()

    def queue(self, trials: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
        """Queues these trials, each (parameters, attributes), behind all that there are, and raises the total to that.

        The total comes last, so that whoever dies here, or queues at the same time, leaves no slot without a trial.
        Without any trials it still rises to those that are there: whoever died may not have come to it.
        """
        known = [slot_of(trial) for trial in self._trials()]
        first = max(known, default=-1) + 1
        for slot, (params, attributes) in enumerate(trials, first):
            self._queue(slot, params, attributes)
        if first + len(trials) > (self.total or 0):
            self.optuna.set_user_attr(_TOTAL, first + len(trials))

    def unslotted_recipes(self) -> list[Recipe]:
        """The recipes that the space can express and that are no trial of the study, in the space's order.

        A recipe that is the base, or another recipe, is a trial where that is one. One that waits beyond the total is
        none, since no worker will claim it.
        """
        assert self._space is not None, "only a study that was opened with its space knows its recipes"
        total = self.total
        trials = [
            trial
            for trial in standing(self._trials()).values()
            if trial.state != TrialState.WAITING or total is None or slot_of(trial) < total
        ]
        names = {attributes.get(RECIPE) for _, attributes in self._missing(trials)}
        return [recipe for recipe in self._space.recipes if recipe.name in names]

    def _missing(self, trials: Iterable[FrozenTrial]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """(parameters, attributes) of the base and of each recipe that the space can express, if not among these."""
        assert self._space is not None
        if self.confirms is not None:  # it has what was queued for it, and nothing of its own
            return []
        attributes = [trial.user_attrs for trial in trials]
        names = {known.get(RECIPE) for known in attributes}
        base = self._space.base_params()
        expressed = [(recipe.name, self._space.express(recipe.config)) for recipe in self._space.recipes]
        seen = [params for name, params in expressed if name in names]
        missing: list[tuple[dict[str, Any], dict[str, Any]]] = []
        if any(BASE in known for known in attributes):
            seen.append(base)
        else:
            missing.append((base, {BASE: True}))
        for name, params in expressed:
            if params is None or params in seen:
                continue
            if missing and params == missing[0][0] and BASE in missing[0][1]:
                missing[0][1][RECIPE] = name
            else:
                missing.append((params, {RECIPE: name}))
            seen.append(params)
        return missing

    def _queue(self, slot: int, params: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
        self.optuna.add_trial(
            create_trial(
                state=TrialState.WAITING,
                system_attrs={"fixed_params": dict(params)} if params else None,
                user_attrs={SLOT: slot, **attributes},
            )
        )

    def _queue_again(self, attempt: FrozenTrial, *, crashes: int | None = None) -> None:
        """Queues the slot of an attempt that was cut off: same parameters, same rungs judged, values to be reported.

        Args:
            crashes: how many attempts died so far; None leaves it at what the attempt says.
        """
        cut_off = {LEASE, INTERRUPTED, RESUMED_EPOCH, FAILURE, STOPPED, "error"}
        # What the sampler and the pruner remember of a trial stands in its system attributes, and stays. The attempt's
        # pictures do not: the next one draws them anew.
        dropped = (CONSTRAINT, ARTIFACT)
        self.optuna.add_trial(
            create_trial(
                state=TrialState.WAITING,
                params=attempt.params,
                distributions=attempt.distributions,
                user_attrs={key: value for key, value in attempt.user_attrs.items() if key not in cut_off}
                | ({CRASHES: crashes} if crashes else {}),
                system_attrs={k: v for k, v in attempt.system_attrs.items() if not k.startswith(dropped)},
            )
        )

    def claim(self) -> tuple[optuna.Trial, int] | None:
        """Takes the waiting trial of the lowest slot: (trial, slot), or None where nothing is left of the total.

        The trial is RUNNING and this process holds its lease. Its parameters are the sampler's to suggest, as after
        `ask()`, but for those that are fixed.
        """
        assert self._space is not None, "only a study that was opened with its space can run trials: it has the sampler"
        self.optuna._thread_local.cached_all_trials = None  # as `ask()` does: the trial shall see the latest history
        total = self.total
        for slot, trial in sorted(standing(self._trials()).items()):
            if trial.state != TrialState.WAITING or (total is not None and slot >= total):
                continue
            try:
                won = self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            except UpdateFinishedTrialError:
                continue
            if won:
                self._storage.set_trial_user_attr(trial._trial_id, LEASE, own_lease())
                return optuna.Trial(self.optuna, trial._trial_id), slot
        return None

    def finish(
        self,
        trial: optuna.Trial,
        state: Literal["complete", "pruned"],
        value: float | None = None,
        *,
        failure: str | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> bool:
        """Ends a claimed trial; False where it was taken from this process before, and its result is dropped.

        Args:
            state: `complete`, with a value, or `pruned`; both count towards the total.
            failure: `diverged`, `oom` or `invalid`, of a pruned trial that could not be trained: a constraint, so that
                the sampler keeps away from it. Trials without one count as feasible.
            attributes: what to remember of the trial.
        """
        if state == "complete" and (value is None or not math.isfinite(value)):
            raise ValueError(f"trial {trial.number} is complete with the value {value}")
        try:
            for key, item in (attributes or {}).items():
                trial.set_user_attr(key, item)
            if failure is not None:
                trial.set_user_attr(FAILURE, failure)
                trial.set_constraint(FAILURE, 1.0)
            if state == "complete":
                self.optuna.tell(trial, value, state=TrialState.COMPLETE)
            else:
                self.optuna.tell(trial, state=TrialState.PRUNED)
        except (UpdateFinishedTrialError, ValueError):
            if self._storage.get_trial(trial._trial_id).state == TrialState.RUNNING:
                raise
            # Its lease was taken for dead, and its slot queued again: the result of the other attempt will count.
            logger.warning("trial %d was taken from this process while it ran; its result is dropped", trial.number)
            return False
        return True

    def release(self, trial: optuna.Trial, *, crashed: bool = False) -> None:
        """Gives a claimed trial back: the attempt is marked as interrupted, and its slot queued again.

        Args:
            crashed: whether the attempt counts against `retries`.
        """
        frozen = self._storage.get_trial(trial._trial_id)
        if frozen.state == TrialState.RUNNING:
            self._interrupt(frozen, crashed=crashed)

    def reap(self, *, force: bool = False, blameless: bool = False) -> list[int]:
        """Gives back what dead processes had claimed, and returns the slots that are queued again.

        Whether a process of another host lives cannot be seen from here, but by the heartbeats that a database keeps;
        without them its trials are left alone, and `held_elsewhere` names them.

        Args:
            force: gives those back too. One that lives after all loses its trial, and its result is dropped.
            blameless: counts no death against `retries`: it was we who killed.
        """
        running = self._running()
        if not running:
            return []
        silent = stale_elsewhere(self._storage, self._id) if any(map(held_elsewhere, running)) else set()
        queued = []
        for trial in running:
            if is_abandoned(trial):
                lost = self._interrupt(trial, crashed=not blameless and died_alone(trial))
            elif trial.number in silent or (force and held_elsewhere(trial) is not None):
                lost = self._interrupt(trial, crashed=False)
            else:
                continue
            if lost:
                queued.append(slot_of(trial))
        return queued

    def held_elsewhere(self) -> list[Held]:
        """The running trials that other hosts hold: at work there, or left behind, by a container with another name."""
        return [held for trial in self._running() if (held := held_elsewhere(trial)) is not None]

    def requeue_lost(self) -> bool:
        """Queues again what a process left behind that died while it gave a trial back; whether anything waits then."""
        if self.total is not None:
            self.ensure_slots(self.total)
        return self.waiting() > 0

    def at_work(self) -> list[int]:
        """The running trials of the total that are waited for: of living processes, as far as that can be seen."""
        total = self.total
        return [
            trial.number
            for trial in self._running()
            if (total is None or slot_of(trial) < total)
            and (held_elsewhere(trial) is None or has_heartbeat(self._storage))
        ]

    def beating(self, trial: optuna.Trial) -> contextlib.AbstractContextManager[None]:
        """While in it, other hosts can see that the claimed trial's process lives, where the storage keeps that."""
        return beating(self._storage, trial._trial_id)

    def waiting(self) -> int:
        """How many slots of the total wait to be claimed."""
        total = self.total
        return sum(
            trial.state == TrialState.WAITING and (total is None or slot < total)
            for slot, trial in standing(self._trials()).items()
        )

    def _running(self) -> list[FrozenTrial]:
        return [trial for trial in self._trials() if trial.state == TrialState.RUNNING]

    def _interrupt(self, trial: FrozenTrial, *, crashed: bool) -> bool:
        """Ends an attempt and queues its slot again; False where another process did, or where it crashes too often."""
        # An attempt without parameters died before its configuration could be at fault.
        crashes = int(trial.user_attrs.get(CRASHES, 0)) + bool(crashed and trial.params)
        if crashes > self.retries:
            self._give_up(trial, crashes)
            return False
        try:
            self._storage.set_trial_user_attr(trial._trial_id, INTERRUPTED, True)
        except UpdateFinishedTrialError:
            return False
        # A process that dies between these two leaves a slot without a trial, which `ensure_slots` queues again.
        if not self._fail(trial):
            return False
        self._queue_again(trial, crashes=crashes)
        return True

    def _give_up(self, trial: FrozenTrial, crashes: int) -> None:
        """Ends a trial whose process died again and again: its configuration cannot be trained here."""
        reported = trial.intermediate_values
        values = [reported[max(reported)]] if reported else None  # as `tell` does with a pruned trial
        try:
            self._storage.set_trial_user_attr(trial._trial_id, CRASHES, crashes)
            self._storage.set_trial_user_attr(trial._trial_id, FAILURE, "crashed")
            self._storage.set_trial_system_attr(trial._trial_id, f"{CONSTRAINT}{FAILURE}", 1.0)
            self._storage.set_trial_state_values(trial._trial_id, TrialState.PRUNED, values)
        except UpdateFinishedTrialError:  # another process was faster
            return
        for checkpoint in self.paths.checkpoints_of(slot_of(trial)):
            self.drop_checkpoint(checkpoint)
        logger.warning(
            "trial %d: %d attempt(s) at it died with their process, so it counts as failed to train; "
            "--retries N allows more",
            trial.number,
            crashes,
        )

    def _fail(self, trial: FrozenTrial) -> bool:
        try:
            return self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            return False


def _on_this_host(device: str) -> str:
    """Hosts that share a storage may have devices of one name, and other cores and memory beside them."""
    return f"{socket.gethostname()}: {device}"


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None, "a complete trial has a value"
    return trial.value


# Creating, finding, resuming


def open_study(
    space: SearchSpace,
    *,
    name: str,
    dataset: Dataset,
    storage_url: str | None = None,
    seed: int | None = None,
    data_path: Path | None = None,
    take_over: str | None = None,
    patient: bool = False,
) -> Study:
    """Creates the study, or goes on to it.

    Args:
        storage_url: an Optuna storage URL or a journal's path; None is the study's own, for a new study a journal file.
        seed: the study's; None is the study's own, for a new study 0.
        data_path: what `--data` is, to be remembered.
        take_over: a study whose trials begin this one, where they fit.
        patient: whether a database's server that does not answer is waited for, as it is later on.

    Raises:
        StudyError: the study was begun with another space, seed, storage or data; or the storage cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # `hpo` has a progress display of its own
    if not isinstance(space, ConfirmationSpace):
        check_search_name(name)
    paths = StudyPaths.of(_checked(name))
    written = read_record(paths)
    url = storage_url_of(paths, written, storage_url)
    if written is not None and is_journal(url) and not Path(url).exists():
        raise StudyError(f"{url} is gone, but {paths.study_yaml} is there; put the journal back, or delete {paths.dir}")
    study = optuna.create_study(
        study_name=name,
        storage=open_storage(url, patient=patient),
        direction=space.direction,
        load_if_exists=True,
        sampler=build_sampler(space.sampler, seed=seed or 0),
        pruner=build_pruner(space.pruner, space.base.epochs, space.base.data.folds),
    )
    stored = study.user_attrs.get(RECORD)
    if stored is None and study.get_trials(deepcopy=False):
        stored = study.user_attrs.get(RECORD)  # again: another process may have begun it and queued trials in between
        if stored is None:
            raise StudyError(f"storage {mask(url)} has a study {name} that hpo did not begin; choose another --study")
    if stored is None:
        stored = new_record(space, dataset, seed=seed or 0, data_path=data_path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # an axis's name in the dashboard hangs on it, no more
            study.set_metric_names([space.metric])
        for key, value in shown_attributes(stored).items():
            study.set_user_attr(key, value)
        study.set_user_attr(RECORD, stored)  # last: with it the study has begun
    check_same(name, stored, space, dataset, seed)
    study.sampler = build_sampler(space.sampler, seed=stored["seed"])
    opened = Study(study, paths, stored, url, space)
    if take_over is not None:
        old = find_study(take_over)
        take_over_trials(
            study,
            stored,
            space,
            old_name=old.name,
            old_record=old.record,
            old_trials=old.optuna.get_trials(deepcopy=False),
        )
    write_record(paths, stored, storage_url=url, space=space, dataset=dataset)
    return opened


def find_study(name: str | None = None, *, storage_url: str | None = None) -> Study:
    """The study of that name, or the one that was run last, to be looked at.

    Raises:
        StudyError: there is none, or its storage cannot be opened.
    """
    if name is None:
        names = [known for known in _by_last_run() if not is_confirmation(known)]
        if not names:
            raise StudyError(f"no studies in {studies_root()} yet; begin with: hpo run digits")
        name = names[0]
    paths = StudyPaths.of(_checked(name))
    record = read_record(paths)
    if record is None:
        known = sorted(_by_last_run())
        there = f"there are {', '.join(known)}" if known else "there are none; begin with: hpo run digits"
        raise StudyError(f"no study {name} in {studies_root()}; {there}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = storage_url_of(paths, record, storage_url)
    if is_journal(url) and not Path(url).exists():
        raise StudyError(f"study {name}: its journal {url} is gone; put it back, or delete {paths.dir}")
    storage = open_storage(url)
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError as error:
        raise StudyError(f"storage {mask(url)} has no study {name}; give the right one by --storage") from error
    return Study(study, paths, record, url)


@dataclass(frozen=True)
class Joined:
    """A study that another process has begun, before its images are here."""

    name: str
    storage_url: str = field(repr=False)
    """It may hold a password."""
    record: Mapping[str, Any]
    space: SearchSpace

    @property
    def data_path(self) -> Path | None:
        """What `--data` was when the study began."""
        return data_path_of(self.record)

    @property
    def skip_broken(self) -> bool:
        """Whether broken image files were left out of the study's data."""
        return skips_broken(self.record)

    def open(self, dataset: Dataset, *, data_path: Path | None) -> Study:
        """The study, ready to be worked on.

        Raises:
            StudyError: these are not the images that it was begun with.
        """
        return open_study(
            self.space, name=self.name, dataset=dataset, storage_url=self.storage_url, data_path=data_path
        )


def join_study(name: str, *, storage_url: str | None = None) -> Joined:
    """A study that was begun here or, with its storage's URL, anywhere.

    Raises:
        StudyError: there is none, or its storage cannot be opened.
    """
    if storage_url is None or read_record(StudyPaths.of(_checked(name))) is not None:
        found = find_study(name, storage_url=storage_url)
        url, study = found.storage_url, found.optuna
    else:
        url = storage_url
        if is_journal(url) and not Path(url).exists():
            raise StudyError(f"storage {url}: there is no such journal; give the one that the study was begun with")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.load_study(study_name=name, storage=open_storage(url))
        except KeyError as error:
            raise StudyError(f"storage {mask(url)} has no study {name}; begin it by hpo run, --workers 0") from error
    attributes = study.user_attrs
    space = _space_of(name, attributes)
    return Joined(name, url, attributes[RECORD], space)


def _space_of(name: str, attributes: Mapping[str, Any]) -> SearchSpace:
    """The space that a study's attributes hold."""
    if RECORD not in attributes or _SPACE not in attributes:
        raise StudyError(f"study {name} was begun by another version, or not by hpo; run it once by hpo run")
    return space_from_yaml(attributes[_SPACE], attributes[RECORD]["space"])


def list_studies() -> list[Study]:
    """Every study that can be opened, the one that was run last first; the others are warned of."""
    studies = []
    for name in _by_last_run():
        try:
            studies.append(find_study(name))
        except StudyError as error:
            logger.warning("study %s cannot be opened: %s", name, error)
    return studies


def _by_last_run() -> list[str]:
    """The names of all studies, the one that was run last first."""
    root = studies_root()
    files = [StudyPaths(folder).study_yaml for folder in root.iterdir()] if root.is_dir() else []
    found = sorted((file for file in files if file.exists()), key=lambda file: file.stat().st_mtime, reverse=True)
    return [file.parent.name for file in found]


def check_search_name(name: str) -> None:
    """Raises StudyError where a search may not have this name."""
    if is_confirmation(_checked(name)):
        raise StudyError(f"study {name}: the ending is reserved for what hpo confirm trains; choose another --study")


def _checked(name: str) -> str:
    if not _NAME.fullmatch(confirmed_by(name)):  # which may be as long as any, and its confirmation's is longer
        raise StudyError(
            f"--study {name!r}: a name is letters, digits, _ . - and begins with no . or -; choose another"
        )
    return name
