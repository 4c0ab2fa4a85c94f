"""What a worker and its parent say to each other: plain values, and nothing that holds a tensor.

A tensor would cross as shared memory or as a file's descriptor, and die with the process that sent it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from core.config import TrainConfig
from core.loop import EpochMetrics
from hpo.search.options import TrialOptions
from hpo.space import SearchSpace
from hpo.trials import Outcome


@dataclass(frozen=True)
class Job:
    """What a worker is to work on. It crosses to its process by a pipe: a command line is for everyone to read."""

    space: SearchSpace
    """As the parent resolved it: the file that it came from may change."""
    study: str
    storage_url: str = field(repr=False)
    """It may hold a password."""
    data_path: Path | None
    skip_broken: bool
    folder: Path
    """Where the parent works, which relative paths start from."""
    options: TrialOptions = field(default_factory=TrialOptions)
    depot: str | None = field(default=None, repr=False)
    """The URL or path where checkpoints and artifacts are shared with other machines; None: in the study's folder."""


# To a worker


@dataclass(frozen=True)
class Share:
    """What a worker may have of the machine, from its next epoch on."""

    threads: int
    """torch's, on the CPU."""
    memory_fraction: float | None
    """Of the GPU's whole memory; None without one."""


@dataclass(frozen=True)
class Begin:
    """Claim trials."""


@dataclass(frozen=True)
class Retire:
    """Finish the running trial, and claim no more."""


@dataclass(frozen=True)
class Stop:
    """Finish the running epoch, give the trial back, and leave."""


Order = Share | Begin | Retire | Stop


# From a worker


@dataclass(frozen=True)
class Ready:
    """Study and data are open; the worker waits for `Begin`."""


@dataclass(frozen=True)
class TrialStarted:
    """A trial, or one of its folds, begins to train."""

    label: str
    config: TrainConfig


@dataclass(frozen=True)
class EpochEnded:
    """An epoch is over."""

    epoch: EpochMetrics
    verdict: str
    """What the pruner thinks."""
    memory_bytes: int
    """The most that the worker has needed so far, on its device."""


@dataclass(frozen=True)
class TrialEnded:
    """A trial is over, and its end is in the storage."""

    outcome: Outcome
    """Without its networks."""


@dataclass(frozen=True)
class Logged:
    """A log record."""

    logger: str
    level: int
    text: str


@dataclass(frozen=True)
class Failed:
    """The worker gives up; what it trained is back in the queue."""

    text: str
    trace: str | None
    """The traceback of a crash, which another worker may not meet; None where a person has to mend something."""


Event = Ready | TrialStarted | EpochEnded | TrialEnded | Logged | Failed


def without_networks(outcome: Outcome) -> Outcome:
    """The outcome as far as it is shown: no networks, and of its epochs the last."""
    return replace(outcome, results=(), history=outcome.history[-1:], rows=outcome.rows[-1:])
