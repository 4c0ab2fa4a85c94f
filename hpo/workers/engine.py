"""The interface between the pool and its workers, and the values that cross between processes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from logging import LogRecord
from pathlib import Path
from typing import Protocol

from hpo.search.options import TrialOptions
from hpo.space import SearchSpace

STOPPED = 130
"""Exit status of a stopped worker, as in a shell."""
UNUSABLE = 69
"""Exit status of a worker that can no longer use its GPU: `EX_UNAVAILABLE` of sysexits.h."""

NO_MORE = 75
"""Exit status of a worker that the deadline or the patience allows no more trial: `EX_TEMPFAIL` of sysexits.h."""


@dataclass(frozen=True)
class WorkerSpec:
    """The study that a worker trains, and how. Sent through a pipe, because command lines are public."""

    space: SearchSpace  # as resolved by the parent: its file may change
    study: str
    storage_url: str = field(repr=False)  # may hold a password
    data_path: Path | None
    skip_broken: bool
    folder: Path
    """The parent's working directory."""
    options: TrialOptions = field(default_factory=TrialOptions)
    store_url: str | None = field(default=None, repr=False)
    """The shared artifact store; None for the study's folder."""


@dataclass(frozen=True)
class Resources:
    """One worker's part of a machine."""

    threads: int
    """torch's, on the CPU."""
    memory_fraction: float | None
    """Of the GPU's total memory, for CUDA's context too; None without a limit."""


@dataclass(frozen=True)
class WorkerSlot:
    """A place for one worker process; a dead worker is replaced in its slot."""

    device: str
    """torch's name on this machine; `cpu` or `cuda` on a cluster."""
    name: str
    """In messages: `worker 2`, or with several devices `worker 2 on cuda:1`."""
    resources: Resources


def worker_slots(device: str, number: int, resources: Resources, *, alone: bool = True) -> list[WorkerSlot]:
    """Return slots on a device, which their names omit if it is `alone`."""
    where = "" if alone else f" on {device}"
    return [WorkerSlot(device, f"worker {index}{where}", resources) for index in range(1, number + 1)]


@dataclass(frozen=True)
class Failure:
    """The error that ended a worker."""

    text: str
    trace: str | None
    """Traceback of a crash; None for an error that the user has to fix."""


Output = LogRecord | Failure


@dataclass(frozen=True)
class Exit:
    """How a worker ended."""

    clean: bool
    """With nothing left to do, or no time or patience."""
    words: str
    """After the worker's name: `was killed by SIGKILL`."""
    blameless: bool = False
    """Stopped from outside, lost with its machine, or after a fault that its successor avoids."""
    no_more: bool = False
    """The study's deadline or patience does not allow another trial."""

    @classmethod
    def with_status(cls, status: int, where: str = "") -> Exit:
        known = {STOPPED: "was stopped", UNUSABLE: "can no longer use its GPU"}
        how = known.get(status, f"ended with exit status {status}")
        late = status == NO_MORE
        return cls(clean=late or status == 0, words=how + where, blameless=status in known, no_more=late)


class Worker(Protocol):
    """A started worker as its parent sees it."""

    @property
    def process(self) -> tuple[str, int] | None:
        """Host and process ID, as in its trials' leases; None before a cluster has placed it."""

    @property
    def ended(self) -> bool: ...

    def output(self) -> list[Output]:
        """Return its output since the last call."""

    def stop(self) -> None:
        """Request that it gives its trial back after the epoch and exits. Does not wait."""

    def kill(self) -> None:
        """End it at once; `close` must still be called."""

    def close(self, patience_s: float) -> Exit:
        """Wait for its exit, kill it after `patience_s`, and free its resources."""


class Engine(Protocol):
    """Starts workers on some kind of machine."""

    def start(self, spec: WorkerSpec, slot: WorkerSlot) -> Worker:
        """Start a worker, which claims trials once it has opened study and data."""

    def wait(self, workers: Collection[Worker], timeout_s: float) -> None:
        """Return when a worker has output or has ended, or after `timeout_s`."""

    def close(self) -> None:
        """Free the engine's resources, after all workers have ended."""
