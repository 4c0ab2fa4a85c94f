"""The interface between the pool and its workers' machines, and the plain values that cross between processes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hpo.search.options import TrialOptions
from hpo.space import SearchSpace

STOPPED = 130
"""Exit status of a worker that was stopped, as a shell reports it."""


@dataclass(frozen=True)
class WorkerSpec:
    """The study that a worker trains, and how. It crosses to the process by a pipe: command lines are public."""

    space: SearchSpace
    """As resolved by the parent: its file may change."""
    study: str
    storage_url: str = field(repr=False)
    """It may hold a password."""
    data_path: Path | None
    skip_broken: bool
    folder: Path
    """The parent's working directory, for relative paths."""
    options: TrialOptions = field(default_factory=TrialOptions)
    store_url: str | None = field(default=None, repr=False)
    """URL or path of the artifact store that other machines share; None for the study's folder."""


@dataclass(frozen=True)
class Resources:
    """One worker's part of the machine."""

    threads: int
    """torch's, on the CPU."""
    memory_fraction: float | None
    """Of the GPU's total memory; None without a GPU."""


@dataclass(frozen=True)
class WorkerSlot:
    """A place for one worker process; a dead worker is replaced in its slot."""

    number: int
    """Counted from 0 on each device."""
    device: str
    """torch's name for it on this machine, `cpu` or `cuda:1`; only its kind where a cluster places the worker."""
    name: str
    """For messages: `worker 2`, or with several devices `worker 2 on cuda:1`."""


@dataclass(frozen=True)
class LogRecord:
    """A record of a worker's log."""

    logger: str
    level: int
    text: str


@dataclass(frozen=True)
class Failure:
    """The error that ended a worker; its trial is back in the queue."""

    text: str
    trace: str | None
    """Traceback of a crash, which another worker may not meet; None for an error that the user has to fix."""


Output = LogRecord | Failure


@dataclass(frozen=True)
class Exit:
    """How a worker ended."""

    clean: bool
    """By itself, with nothing left to do."""
    words: str
    """To follow the worker's name: `was killed by SIGKILL`."""
    blameless: bool = False
    """It was stopped from outside, or lost with its machine: its replacement need not expect the same."""


class Worker(Protocol):
    """A started worker as its parent sees it."""

    @property
    def process(self) -> tuple[str, int] | None:
        """Its host and process ID, as in its trials' leases; None before a cluster has placed it."""

    @property
    def ended(self) -> bool:
        """Whether it has exited."""

    def output(self) -> list[Output]:
        """Return what it has logged since the last call."""

    def stop(self) -> None:
        """Ask it to finish its epoch, give its trial back and exit. Does not wait."""

    def kill(self) -> None:
        """End it at once. `close` must still be called."""

    def close(self, patience_s: float) -> Exit:
        """Wait for its exit, kill it after `patience_s` seconds, and free its resources."""


class Engine(Protocol):
    """Starts workers on some kind of machine."""

    def start(self, spec: WorkerSpec, slot: WorkerSlot, resources: Resources) -> Worker:
        """Start a worker, which claims trials as soon as it has opened study and data."""

    def wait(self, workers: Collection[Worker], timeout_s: float) -> None:
        """Return when one of the workers has output or has ended, or after `timeout_s` seconds."""

    def close(self) -> None:
        """Free the engine's own resources; all workers have ended."""
