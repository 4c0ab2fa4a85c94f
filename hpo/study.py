"""A study: created, found and resumed; its budget as a total, and its trials as slots of that total.

Slot k of a total is a waiting trial with the user attribute `slot`. It is claimed by a compare-and-set on its state in
the storage, never by Optuna's `ask()`, which creates: so a total is exact under any number of workers, and the same
command again goes on to it. A claimed trial holds a lease (host, boot, process, start of the process); when its process
is dead, the attempt is marked failed and its slot queued again with the parameters that it had. Where two processes
queue the same slot at once, the earlier trial counts and the later one is never claimed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial
from ruamel.yaml import YAML

from core.config import TrainConfig
from hpo.errors import StudyError
from hpo.paths import StudyPaths, studies_root
from hpo.pruner import BASE, SLOT, build_pruner, slot_of
from hpo.samplers import build_sampler
from hpo.search_space import diff
from hpo.search_space.document import shown
from hpo.storage import is_journal, is_masked, mask, open_storage

if TYPE_CHECKING:
    from core.data import Dataset
    from hpo.search_space import SearchSpace

logger = logging.getLogger(__name__)

RECIPE = "recipe"
"""The user attribute of a trial that is a recipe: the recipe's name."""
FAILURE = "failure"
"""The user attribute of a trial that could not be trained to its end: `diverged`, `oom` or `invalid`."""
INTERRUPTED = "interrupted"
"""The user attribute of an attempt that was cut off; its slot was queued again."""
TAKEN_FROM = "taken_from"
"""The user attribute of a trial that another study ran: `STUDY/NUMBER`."""

_RECORD = "hpo"  # study user attribute: what the study searches, for machines without its study.yaml
_TOTAL = "trials"  # study user attribute: the total, for workers that join
_COMMAND = "command"  # study user attribute: what the study was last run by
_LEASE = "lease"
_CONSTRAINT = "constraints:"  # how Optuna begins the system attribute that `Trial.set_constraint` writes
# A claim is two writes, the state and the lease. A trial without a lease is being claimed right now, or its process
# died in between; a write takes milliseconds, under a storm of workers a few seconds.
_LEASE_GRACE_S = 60
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
    """Those that it kept: fewer than the configuration's where it stopped early."""


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
        self._space = space

    # What it is

    @property
    def name(self) -> str:
        return self.paths.name

    @property
    def space_name(self) -> str:
        return str(self.record["space"])

    @property
    def metric(self) -> str:
        return str(self.record["metric"])

    @property
    def direction(self) -> str:
        """`maximize` or `minimize`."""
        return str(self.record["direction"])

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
        path = self.record["data"]["path"]
        return None if path is None else Path(path)

    @property
    def skip_broken(self) -> bool:
        """Whether broken image files were left out of the study's data."""
        return bool(self.record["data"]["skip_broken"])

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

    def remember_command(self, command: str) -> None:
        """Keeps the command that runs the study, without any password."""
        if self.command != command:
            self.optuna.set_user_attr(_COMMAND, command)

    def check_data(self, dataset: Dataset) -> None:
        """Raises StudyError where these are not the images that the study was begun with."""
        _check_fingerprint(self.name, self.record, dataset.fingerprint)

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
        standing = list(_standing(self._trials()).values())
        pruned = [trial for trial in standing if trial.state == TrialState.PRUNED]
        failures = sum(FAILURE in trial.user_attrs for trial in pruned)
        states = [trial.state for trial in standing]
        return Counts(
            complete=states.count(TrialState.COMPLETE),
            pruned=len(pruned) - failures,
            failures=failures,
            running=states.count(TrialState.RUNNING),
            waiting=states.count(TrialState.WAITING),
        )

    def best_trial(self) -> FrozenTrial | None:
        """The complete trial with the best value, of equals the first slot; None before any is complete."""
        sign = -1.0 if self.direction == "maximize" else 1.0
        complete = [trial for trial in _standing(self._trials()).values() if trial.state == TrialState.COMPLETE]
        return min(complete, key=lambda trial: (sign * _value(trial), slot_of(trial)), default=None)

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
        from core.runtime import derive_seed  # with torch, which looking at a study does not need

        seed = int(trial.user_attrs.get("seed", derive_seed(self.seed, "trial", slot_of(trial))))
        config = _config(self.record, trial.params).override({"seed": seed})
        return Trained(config, _value(trial), int(trial.user_attrs.get("epochs", config.epochs)))

    def ensure_slots(self, total: int) -> Counts:
        """Queues what is missing of slots 0 to `total` - 1: the base, the recipes that the space can express, others.

        A slot whose attempts were all cut off is queued with the parameters of the last one.
        """
        assert self._space is not None, "only a study that was opened with its space can queue trials"
        if self.total != total:
            self.optuna.set_user_attr(_TOTAL, total)
        trials = self._trials()
        standing = _standing(trials)
        for trial in trials:
            if trial.state == TrialState.WAITING and standing[slot_of(trial)] is not trial:
                self._fail(trial)  # two processes queued the same slot: this one was second
        last_attempt = {slot_of(trial): trial for trial in trials}
        recipes = self._recipes({trial.user_attrs.get(RECIPE) for trial in trials})
        base = self._space.base_params()
        for slot in range(total):
            if slot in standing:
                continue
            if slot in last_attempt:
                self._queue_again(last_attempt[slot])
            elif slot == 0:
                same = [name for name, params in recipes.items() if params == base]
                self._queue(slot, base, {BASE: True} | ({RECIPE: same[0]} if same else {}))
                recipes = {name: params for name, params in recipes.items() if params != base}
            elif recipes:
                name = next(iter(recipes))
                self._queue(slot, recipes.pop(name), {RECIPE: name})
            else:
                self._queue(slot, {}, {})
        for name in recipes:
            logger.info("recipe %s is not in the study: its %d trials were all queued before", name, total)
        return self.counts()

    def _recipes(self, queued: Iterable[str | None]) -> dict[str, dict[str, Any]]:
        """The recipes that the space can express and that are no trial yet, as parameters."""
        assert self._space is not None
        known = set(queued)
        expressed = {recipe.name: self._space.express(recipe.config) for recipe in self._space.recipes}
        return {name: params for name, params in expressed.items() if params is not None and name not in known}

    def _queue(self, slot: int, params: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
        self.optuna.add_trial(
            create_trial(
                state=TrialState.WAITING,
                system_attrs={"fixed_params": dict(params)} if params else None,
                user_attrs={SLOT: slot, **attributes},
            )
        )

    def _queue_again(self, attempt: FrozenTrial) -> None:
        """Queues the slot of an attempt that was cut off: same parameters, same rungs judged, values to be reported."""
        cut_off = {_LEASE, INTERRUPTED, "error"}
        self.optuna.add_trial(
            create_trial(
                state=TrialState.WAITING,
                params=attempt.params,
                distributions=attempt.distributions,
                user_attrs={key: value for key, value in attempt.user_attrs.items() if key not in cut_off},
                # What the sampler and the pruner remember of a trial stands in its system attributes.
                system_attrs={k: v for k, v in attempt.system_attrs.items() if not k.startswith(_CONSTRAINT)},
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
        standing = _standing(self._trials())
        for slot in sorted(standing):
            trial = standing[slot]
            if trial.state != TrialState.WAITING or (total is not None and slot >= total):
                continue
            try:
                won = self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            except UpdateFinishedTrialError:
                continue
            if won:
                self._storage.set_trial_user_attr(trial._trial_id, _LEASE, _own_lease())
                return optuna.Trial(self.optuna, trial._trial_id), slot
        return None

    def finish(
        self,
        trial: optuna.Trial,
        state: str,
        value: float | None = None,
        *,
        failure: str | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Ends a claimed trial.

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
            if self._storage.get_trial(trial._trial_id).state != TrialState.FAIL:
                raise
            # Its lease was taken for dead, and its slot queued again: the result of the other attempt will count.
            logger.warning("trial %d was taken from this process while it ran; its result is dropped", trial.number)

    def release(self, trial: optuna.Trial) -> None:
        """Gives a claimed trial back: the attempt is marked as interrupted, and its slot queued again."""
        frozen = self._storage.get_trial(trial._trial_id)
        if frozen.state == TrialState.RUNNING:
            self._interrupt(frozen)

    def reap(self) -> list[int]:
        """Gives back what dead processes of this machine had claimed, and returns the slots.

        Whether a process of another machine lives cannot be seen from here: its trials are left alone.
        """
        running = [trial for trial in self._trials() if trial.state == TrialState.RUNNING]
        return [slot_of(trial) for trial in running if _is_abandoned(trial) and self._interrupt(trial)]

    def _interrupt(self, trial: FrozenTrial) -> bool:
        """Ends an attempt and queues its slot again; False where another process did."""
        try:
            self._storage.set_trial_user_attr(trial._trial_id, INTERRUPTED, True)
        except UpdateFinishedTrialError:
            return False
        # A process that dies between these two leaves a slot without a trial, which `ensure_slots` queues again.
        if not self._fail(trial):
            return False
        self._queue_again(trial)
        return True

    def _fail(self, trial: FrozenTrial) -> bool:
        try:
            return self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            return False


def _standing(trials: Iterable[FrozenTrial]) -> dict[int, FrozenTrial]:
    """Slot -> the trial that stands for it: what was not cut off, the earlier of two, but whatever was begun first."""
    standing: dict[int, FrozenTrial] = {}
    for trial in trials:
        if trial.state == TrialState.FAIL:
            continue
        other = standing.get(slot_of(trial))
        if other is None or (other.state == TrialState.WAITING and trial.state != TrialState.WAITING):
            standing[slot_of(trial)] = trial
    return standing


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
) -> Study:
    """Creates the study, or goes on to it.

    Args:
        storage_url: an Optuna storage URL or a journal's path; None is the study's own, for a new study a journal file.
        seed: the study's; None is the study's own, for a new study 0.
        data_path: what `--data` is, to be remembered.
        take_over: a study whose trials begin this one, where they fit.

    Raises:
        StudyError: the study was begun with another space, seed, storage or data; or the storage cannot be opened.
    """
    _check_name(name)
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # `hpo` has a progress display of its own
    paths = StudyPaths.of(name)
    written = _read_record(paths)
    url = _storage_url(paths, written, storage_url)
    if written is not None and is_journal(url) and not Path(url).exists():
        raise StudyError(f"{url} is gone, but {paths.study_yaml} is there; put the journal back, or delete {paths.dir}")
    study = optuna.create_study(
        study_name=name,
        storage=open_storage(url),
        direction=space.direction,
        load_if_exists=True,
        sampler=build_sampler(space.sampler, seed=seed or 0),
        pruner=build_pruner(space.pruner, space.base.epochs),
    )
    stored = study.user_attrs.get(_RECORD)
    if stored is None:
        if study.get_trials(deepcopy=False):
            raise StudyError(f"storage {mask(url)} has a study {name} that hpo did not begin; choose another --study")
        stored = _new_record(space, dataset, seed=seed or 0, data_path=data_path)
        study.set_user_attr(_RECORD, stored)
    _check_same(name, stored, space, dataset, seed)
    study.sampler = build_sampler(space.sampler, seed=stored["seed"])
    opened = Study(study, paths, stored, url, space)
    if take_over is not None:
        _take_over(find_study(take_over), opened, space)
    _write_record(opened, space, dataset)
    return opened


def find_study(name: str | None = None, *, storage_url: str | None = None) -> Study:
    """The study of that name, or the one that was run last, to be looked at.

    Raises:
        StudyError: there is none, or its storage cannot be opened.
    """
    if name is None:
        names = _by_last_run()
        if not names:
            raise StudyError(f"no studies in {studies_root()} yet; begin with: hpo run digits")
        name = names[0]
    _check_name(name)
    paths = StudyPaths.of(name)
    record = _read_record(paths)
    if record is None:
        known = sorted(_by_last_run())
        there = f"there are {', '.join(known)}" if known else "there are none; begin with: hpo run digits"
        raise StudyError(f"no study {name} in {studies_root()}; {there}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = _storage_url(paths, record, storage_url)
    if is_journal(url) and not Path(url).exists():
        raise StudyError(f"study {name}: its journal {url} is gone; put it back, or delete {paths.dir}")
    storage = open_storage(url)
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError as error:
        raise StudyError(f"storage {mask(url)} has no study {name}; give the right one by --storage") from error
    return Study(study, paths, record, url)


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


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise StudyError(
            f"--study {name!r}: a name is letters, digits, _ . - and begins with no . or -; choose another"
        )


def _storage_url(paths: StudyPaths, record: Mapping[str, Any] | None, given: str | None) -> str:
    """Where the study lies: what was given, or what its study.yaml says, or its own journal."""
    if given == "":
        raise StudyError("--storage is empty; give a URL, or leave it out for a journal file")
    if record is None:
        return given or str(paths.journal)
    written = record.get("storage") or str(paths.journal)
    if given is not None and mask(given) != mask(written):
        raise StudyError(f"study {paths.name} lies in {mask(written)}; leave --storage out, or choose another --study")
    if given is None and is_masked(written):
        raise StudyError(f"study {paths.name}: give --storage {written} with the password, which is never written down")
    return given or written


def _check_same(name: str, stored: Mapping[str, Any], space: SearchSpace, dataset: Dataset, seed: int | None) -> None:
    """What a study was begun with holds for all of its trials."""
    way_out = f"begin another study: --study NAME, with --take-over {name} if its trials are to count where they fit"
    if stored["hash"] != space.hash:
        lines = "\n".join(f"  {line}" for line in diff(stored["identity"], space.identity()))
        raise StudyError(f"study {name} was begun with another space:\n{lines}\n{way_out}")
    _check_fingerprint(name, stored, dataset.fingerprint)
    if seed is not None and seed != stored["seed"]:
        raise StudyError(
            f"study {name} was begun with --seed {stored['seed']}, not {seed}; "
            "leave --seed out, or choose another --study"
        )


def _check_fingerprint(name: str, record: Mapping[str, Any], fingerprint: str) -> None:
    known = record["data"]["fingerprint"]
    if fingerprint != known:
        raise StudyError(
            f"study {name} was begun with other images ({record['data']['name']}, fingerprint {known[:12]}, "
            f"not {fingerprint[:12]}); give the same by --data, or choose another --study"
        )


def _new_record(space: SearchSpace, dataset: Dataset, *, seed: int, data_path: Path | None) -> dict[str, Any]:
    """What is remembered of a study in its storage and in study.yaml, as plain JSON."""
    record = {
        "space": space.name,
        "hash": space.hash,
        "metric": space.metric,
        "direction": space.direction,
        "seed": seed,
        "data": {
            "name": dataset.name,
            "path": None if data_path is None else str(data_path),
            "fingerprint": dataset.fingerprint,
            "skip_broken": bool(dataset.report.broken),
        },
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "base": space.base.model_dump(mode="json"),
        "identity": space.identity(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(record))
    return plain


def _read_record(paths: StudyPaths) -> dict[str, Any] | None:
    if not paths.study_yaml.exists():
        return None
    try:
        record = YAML(typ="safe", pure=True).load(paths.study_yaml.read_text(encoding="utf-8"))
    except Exception as error:
        raise StudyError(f"{paths.study_yaml} cannot be read ({error}); delete it and run the study again") from error
    if not isinstance(record, dict) or "hash" not in record:
        raise StudyError(f"{paths.study_yaml} is no study of hpo's; delete it and run the study again")
    return record


def _write_record(study: Study, space: SearchSpace, dataset: Dataset) -> None:
    """Writes study.yaml where it is missing, whole or not at all; its time says when the study was last run."""
    file = study.paths.study_yaml
    if file.exists():
        os.utime(file)
        return
    if study.storage_shown != study.storage_url:
        logger.warning(
            "study %s: the storage's password is not written down; give --storage again to go on", study.name
        )
    content = {
        "name": study.name,
        # The study's own journal moves with its folder, so its path is not written down.
        "storage": None if study.storage_url == str(study.paths.journal) else study.storage_shown,
        "space_file": shown(space.path),
        **study.record,
        "classes": list(dataset.classes),
    }
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 120
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=file.parent, prefix=".study.", delete=False, encoding="utf-8"
    ) as temporary:
        yaml.dump(content, temporary)
        temporary.flush()
        os.fsync(temporary.fileno())
    Path(temporary.name).replace(file)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("hpo-vision", "optuna", "torch", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _config(record: Mapping[str, Any], params: Mapping[str, Any]) -> TrainConfig:
    """The configuration that a trial's parameters mean in the study of this record."""
    base = TrainConfig.model_validate_json(json.dumps(record["base"]))
    values = {}
    for path, value in params.items():
        # The space keeps a list among the choices as its JSON text, since Optuna takes scalars only.
        choices = record["identity"][f"search.{path}"].get("choices", [])
        values[path] = next((c for c in choices if isinstance(c, list) and json.dumps(c) == value), value)
    return base.override(values)


# Taking over another study's trials


def _take_over(old: Study, new: Study, space: SearchSpace) -> int:
    """Copies those finished trials of another study that the new space could have drawn, under its distributions.

    A trial fits if the new space can express the very configuration that it trained. It keeps its slot. A study that
    has trials already is left as it is, so that the same command again goes on.

    Raises:
        StudyError: the trials are not comparable, or none fits.
    """
    if new.optuna.get_trials(deepcopy=False):
        return 0
    was, now = old.record["identity"], space.identity()
    apart = [line for line in diff(was, now) if not line.startswith(("search.", "base."))]
    if apart:
        raise StudyError(f"--take-over {old.name}: its trials are not comparable: {'; '.join(apart)}; leave it out")
    if old.record["data"]["fingerprint"] != new.record["data"]["fingerprint"]:
        raise StudyError(f"--take-over {old.name}: it was begun with other images; leave it out")
    finished = [t for t in _standing(old._trials()).values() if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    taken = 0
    for trial in finished:
        config = _config(old.record, trial.params)
        params = space.express(config)
        if params is None:
            continue
        taken += 1
        new.optuna.add_trial(_copy_of(trial, old, params, space, is_base=params == space.base_params()))
    if not taken:
        raise StudyError(f"--take-over {old.name}: none of its {len(finished)} finished trials fits; leave it out")
    logger.info("study %s: %d of %d trials taken over from %s", new.name, taken, len(finished), old.name)
    return taken


def _copy_of(
    trial: FrozenTrial, old: Study, params: Mapping[str, Any], space: SearchSpace, *, is_base: bool
) -> FrozenTrial:
    from core.runtime import derive_seed

    user_attrs = {key: value for key, value in trial.user_attrs.items() if key not in (_LEASE, BASE)}
    user_attrs.setdefault(TAKEN_FROM, f"{old.name}/{trial.number}")
    user_attrs.setdefault("seed", derive_seed(old.seed, "trial", slot_of(trial)))
    copied = create_trial(
        state=trial.state,
        value=trial.value,
        params=dict(params),
        distributions={path: space.distributions[path] for path in params},
        user_attrs=user_attrs | {SLOT: slot_of(trial)} | ({BASE: True} if is_base else {}),
        system_attrs={k: v for k, v in trial.system_attrs.items() if k.startswith(_CONSTRAINT)},
        intermediate_values=trial.intermediate_values,
    )
    copied.datetime_start, copied.datetime_complete = trial.datetime_start, trial.datetime_complete
    return copied


# Leases


@cache
def _boot_id() -> str | None:
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else None


def _process_start(pid: int) -> int | None:
    """Clock ticks from the boot to the start of the process; None where no such process runs."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # Behind the command's name, which may hold anything, stand the state and, 19 fields on, the start: proc_pid_stat.
    state, *fields = stat.rpartition(b")")[2].split()
    return None if state in (b"Z", b"X") else int(fields[18])


def _own_lease() -> dict[str, Any]:
    """Names this process so that no other, later or elsewhere, can be taken for it."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot_id(), "pid": pid, "start": _process_start(pid)}


def _is_abandoned(trial: FrozenTrial) -> bool:
    """Whether the process that claimed a running trial is dead, as far as this machine can know."""
    lease = trial.user_attrs.get(_LEASE)
    if lease is None:
        begun = trial.datetime_start
        return begun is None or datetime.now() - begun > timedelta(seconds=_LEASE_GRACE_S)
    if lease["host"] != socket.gethostname():
        return False
    if lease["boot"] != _boot_id():
        return True
    if lease["start"] is not None:
        return bool(_process_start(lease["pid"]) != lease["start"])
    try:  # a system without /proc
        os.kill(lease["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
