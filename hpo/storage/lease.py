"""Leases: which process runs a trial, so that trials of dead processes can be reclaimed.

Processes of the same host are checked by number and start time, those of other hosts by heartbeats in a database.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import psutil
from optuna.storages import BaseStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.trial import FrozenTrial, TrialState

from hpo.storage.optuna_access import id_of, storage_of, trial_id

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

LEASE = "lease"
"""User attribute of a claimed trial: its host, boot and process."""

# A running trial without a lease is being paused, or claimed in a storage of Optuna's; or its process died meanwhile.
_GRACE_S = 60

# Inode of the machine's own pid namespace: PROC_PID_INIT_INO (include/linux/proc_ns.h).
_FIRST_PID_NAMESPACE = "4026531836"

_LAST_BEAT_S = 1.0  # wait for a heartbeat that is being written


class Held(NamedTuple):
    """A running trial of a process on another host."""

    number: int
    host: str
    since: datetime
    """When it was claimed, in local time without a zone, as Optuna stores it."""


def own_lease() -> dict[str, Any]:
    """Return a lease that no later process and no process of another host has."""
    lease: dict[str, Any] = {"host": host(), "boot": _boot_id(), "pid": os.getpid(), "start": _start_of(os.getpid())}
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        lease["parent"] = {"pid": parent.pid, "start": _start_of(parent.pid)}
    return lease


def held_elsewhere(trial: FrozenTrial) -> Held | None:
    """Return the trial's holder if it is another host."""
    lease = trial.user_attrs.get(LEASE)
    if lease is None or lease["host"] == host():
        return None
    assert trial.datetime_start is not None, "a running trial was started"
    return Held(trial.number, str(lease["host"]), trial.datetime_start)


def is_abandoned(trial: FrozenTrial) -> bool:
    """Return whether the trial's process is dead, as far as this host knows."""
    lease = trial.user_attrs.get(LEASE)
    if lease is None:
        begun = trial.datetime_start
        # Also if the clock was set back since.
        return begun is None or abs(datetime.now() - begun) > timedelta(seconds=_GRACE_S)
    if lease["host"] != host():
        return False
    if lease["boot"] != _boot_id():
        return True
    if lease["start"] is None:  # of version 0.1.0, on systems without /proc
        return not psutil.pid_exists(lease["pid"])
    return bool(_start_of(lease["pid"]) != lease["start"])


def died_alone(trial: FrozenTrial) -> bool:
    """Return whether the process died without its machine or parent."""
    lease = trial.user_attrs.get(LEASE)
    if lease is None or lease["host"] != host() or lease["boot"] != _boot_id():
        return False
    parent = lease.get("parent")
    return parent is None or _start_of(parent["pid"]) == parent["start"]


def has_heartbeat(storage: BaseStorage) -> TypeGuard[BaseHeartbeat]:
    """Return whether the storage keeps heartbeats."""
    return isinstance(storage, BaseHeartbeat) and storage.get_heartbeat_interval() is not None


@contextmanager
def heartbeat(storage: BaseStorage, trial_id: int) -> Iterator[None]:
    """Record heartbeats of a trial while the block runs, if the storage keeps them; errors are logged."""
    if not has_heartbeat(storage):
        yield
        return
    done, name = threading.Event(), f"heartbeat of {trial_id}"
    thread = threading.Thread(target=_beat, args=(storage, trial_id, done), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(_LAST_BEAT_S)


def _beat(heart: BaseHeartbeat, trial_id: int, done: threading.Event) -> None:
    interval_s = heart.get_heartbeat_interval()
    missed = False
    while not done.wait(interval_s):
        try:
            heart.record_heartbeat(trial_id)
        except Exception as error:
            if not missed:
                logger.warning("no heartbeat could be written (%s); trying on every %d s", error, interval_s)
            missed = True
        else:
            missed = False


def stale_elsewhere(storage: BaseStorage, study_id: int) -> set[int]:
    """Return the numbers of other hosts' running trials without heartbeats."""
    running = storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
    if not has_heartbeat(storage):
        return set()
    stale = set(storage._get_stale_trial_ids(study_id))
    return {trial.number for trial in running if trial_id(trial) in stale and held_elsewhere(trial) is not None}


def dead_of(study: optuna.Study, running: Sequence[FrozenTrial]) -> set[int]:
    """Return the numbers of the running trials whose process is dead, as far as this host and heartbeats show."""
    dead = {trial.number for trial in running if is_abandoned(trial)}
    if any(map(held_elsewhere, running)):
        dead |= stale_elsewhere(storage_of(study), id_of(study))
    return dead


def worker_of(trial: FrozenTrial) -> str:
    """Return `host:pid` of the process that runs a trial; empty while it is being claimed."""
    lease = trial.user_attrs.get(LEASE)
    return "" if lease is None else f"{lease['host']}:{lease['pid']}"


def machine() -> str:
    """Return an id of the running kernel; containers share it."""
    return _boot_id() or socket.gethostname()


def host() -> str:
    """Return an id of this machine or container."""
    return socket.gethostname() + _pid_namespace()


@cache
def _pid_namespace() -> str:
    """Empty outside of containers."""
    namespace = Path("/proc/self/ns/pid")
    number = re.sub(r"\D", "", namespace.readlink().name) if namespace.is_symlink() else ""
    return "" if number in ("", _FIRST_PID_NAMESPACE) else f"#{number}"


@cache
def _boot_id() -> str | None:
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else None


def _start_of(pid: int) -> int | None:
    """Start of a process in hundredths of a second, on Linux since the boot; None if not running."""
    while True:
        boot_s = psutil.boot_time() if psutil.LINUX else 0.0
        try:
            process = psutil.Process(pid)
            if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return None
            start_s: float = process.create_time() - boot_s
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return None
        if not psutil.LINUX or psutil.boot_time() == boot_s:  # else the clock was set in between
            return round(100 * start_s)
