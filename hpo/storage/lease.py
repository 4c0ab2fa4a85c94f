"""Leases: who runs a trial, so that a dead process's trial can be told from a live one's.

A lease names the host, the boot, the process and its start. The kernel of the machine that the process ran on knows at
once, and for certain, whether it lives; only that machine can ask it. Of other machines' processes a database knows by
their heartbeats, judged by its server's clock alone; a journal does not, and leaves them to a person's word.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from optuna.storages import BaseStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.trial import FrozenTrial, TrialState

logger = logging.getLogger(__name__)

LEASE = "lease"
"""The user attribute of a trial that was claimed: host, boot, process and its start."""

# A claim is two writes, the state and the lease. A trial without a lease is being claimed right now, or its process
# died in between; a write takes milliseconds, under a storm of workers a few seconds.
_GRACE_S = 60

# The inode of the process space that a machine boots with: PROC_PID_INIT_INO of Linux (include/linux/proc_ns.h).
_FIRST_PROCESS_SPACE = "4026531836"

# Seconds that the end of a trial waits for a heartbeat that is being written.
_LAST_BEAT_S = 1.0


class Held(NamedTuple):
    """A running trial that another host holds."""

    number: int
    host: str
    since: datetime
    """When it was claimed, as Optuna keeps it: local time without a zone."""


def own_lease() -> dict[str, Any]:
    """Names this process so that no other, later or elsewhere, can be taken for it."""
    lease = {"host": host(), "boot": _boot_id(), **_process(os.getpid())}
    parent = multiprocessing.parent_process()
    return lease if parent is None or parent.pid is None else {**lease, "parent": _process(parent.pid)}


def _process(pid: int) -> dict[str, int | None]:
    return {"pid": pid, "start": _process_start(pid)}


def held_elsewhere(trial: FrozenTrial) -> Held | None:
    """Who holds a running trial, if it is another host: whether its process lives cannot be seen from here."""
    lease = trial.user_attrs.get(LEASE)
    if lease is None or lease["host"] == host():
        return None
    assert trial.datetime_start is not None, "a running trial was started"
    return Held(trial.number, str(lease["host"]), trial.datetime_start)


def is_abandoned(trial: FrozenTrial) -> bool:
    """Whether the process that claimed a running trial is dead, as far as this machine can know."""
    lease = trial.user_attrs.get(LEASE)
    if lease is None:
        begun = trial.datetime_start
        return begun is None or datetime.now() - begun > timedelta(seconds=_GRACE_S)
    if lease["host"] != host():
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


def has_heartbeat(storage: BaseStorage) -> bool:
    """Whether the storage keeps heartbeats, by which hosts know of each other's processes."""
    return _heart_of(storage) is not None


@contextmanager
def beating(storage: BaseStorage, trial_id: int) -> Iterator[None]:
    """Lets other hosts know that the trial's process lives, by a thread; nothing in storages without heartbeats.

    The thread beats on whatever becomes of a beat. Whether to wait for a storage that is lost is for those to say who
    write results to it.
    """
    heart = _heart_of(storage)
    if heart is None:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_beat, args=(heart, trial_id, done), name=f"heartbeat of {trial_id}", daemon=True)
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
    """The numbers of the running trials that other hosts hold and whose processes have long shown no heartbeat.

    This host's are not among them: here the lease knows better, and a process that was stopped for long is not dead.
    """
    heart = _heart_of(storage)
    if heart is None:
        return set()
    stale = set(heart._get_stale_trial_ids(study_id))
    running = storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
    return {trial.number for trial in running if trial._trial_id in stale and held_elsewhere(trial) is not None}


def _heart_of(storage: BaseStorage) -> BaseHeartbeat | None:
    """The storage, if it keeps heartbeats."""
    return storage if isinstance(storage, BaseHeartbeat) and storage.get_heartbeat_interval() is not None else None


def machine() -> str:
    """Names the kernel that this process runs on, which containers of one machine share."""
    return _boot_id() or socket.gethostname()


def died_alone(trial: FrozenTrial) -> bool:
    """Whether an abandoned trial's process died by itself, which its configuration may be to blame for.

    One that went down with its machine was none, nor one whose parent is dead too: somebody ended them all.
    """
    lease = trial.user_attrs.get(LEASE)
    if lease is None or lease["host"] != host() or lease["boot"] != _boot_id():
        return False
    parent = lease.get("parent")
    return parent is None or _process_start(parent["pid"]) == parent["start"]


def host() -> str:
    """This machine, or the container on it that sees the same processes: several may share its name and boot."""
    return socket.gethostname() + _process_space()


@cache
def _process_space() -> str:
    """What tells a container's numbers of processes from its machine's; empty where they are the machine's."""
    space = Path("/proc/self/ns/pid")
    number = re.sub(r"\D", "", space.readlink().name) if space.is_symlink() else ""
    return "" if number in ("", _FIRST_PROCESS_SPACE) else f"#{number}"


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
