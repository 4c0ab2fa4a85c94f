"""Leases: who runs a trial, so that a dead process's trial can be told from a live one's.

A lease names the host, the boot, the process and its start. A heartbeat would need a thread and a clock that all
machines share; the kernel of the machine that the process ran on knows at once, and for certain. Only that machine can
ask it, so a trial that another one holds is left to a person's word.
"""

from __future__ import annotations

import os
import socket
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from optuna.trial import FrozenTrial

LEASE = "lease"
"""The user attribute of a trial that was claimed: host, boot, process and its start."""

# A claim is two writes, the state and the lease. A trial without a lease is being claimed right now, or its process
# died in between; a write takes milliseconds, under a storm of workers a few seconds.
_GRACE_S = 60


class Held(NamedTuple):
    """A running trial that another host holds."""

    number: int
    host: str
    since: datetime
    """When it was claimed, as Optuna keeps it: local time without a zone."""


def own_lease() -> dict[str, Any]:
    """Names this process so that no other, later or elsewhere, can be taken for it."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot_id(), "pid": pid, "start": _process_start(pid)}


def held_elsewhere(trial: FrozenTrial) -> Held | None:
    """Who holds a running trial, if it is another host: whether its process lives cannot be seen from here."""
    lease = trial.user_attrs.get(LEASE)
    if lease is None or lease["host"] == socket.gethostname():
        return None
    assert trial.datetime_start is not None, "a running trial was started"
    return Held(trial.number, str(lease["host"]), trial.datetime_start)


def is_abandoned(trial: FrozenTrial) -> bool:
    """Whether the process that claimed a running trial is dead, as far as this machine can know."""
    lease = trial.user_attrs.get(LEASE)
    if lease is None:
        begun = trial.datetime_start
        return begun is None or datetime.now() - begun > timedelta(seconds=_GRACE_S)
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
