"""What the pool asks of wherever its workers run: processes of this machine, or actors of a cluster."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from hpo.workers.messages import Event, Job, Order, Share

STOPPED = 130
"""The exit status of a worker that was asked to stop, as a shell has it."""


@dataclass(frozen=True)
class Seat:
    """A place for one worker, which may be filled again and again."""

    number: int
    """Counted from 0, on its device."""
    device: str
    """As torch names it on this machine: `cpu`, `cuda:1`. What a cluster places by itself has the device's kind."""
    name: str
    """What a person is told: `worker 2`, or with several devices `worker 2 on cuda:1`."""


@dataclass(frozen=True)
class Ending:
    """How a worker ended."""

    clean: bool
    """By itself, with nothing left to do."""
    words: str
    """Behind the worker's name: `was killed by SIGKILL`."""
    blameless: bool = False
    """Whether it was taken away from outside, with its machine: the next one in its seat has nothing to fear."""


class Worker(Protocol):
    """A worker that was started, seen from its parent."""

    def order(self, order: Order) -> None:
        """Tells it something, if it still listens."""

    def hear(self) -> Event:
        """What it says next; waits where it says nothing.

        Raises:
            EOFError: it says nothing any more.
        """

    def kill(self) -> None:
        """Ends it at once, whatever it is doing; `end` is still to be called."""

    def end(self, patience_s: float) -> Ending:
        """Waits for its end, kills it where that does not come, and lets go of it."""


class Engine(Protocol):
    """Starts workers somewhere."""

    def start(self, job: Job, seat: Seat, share: Share) -> Worker:
        """Starts a worker, which says `Ready`, and claims nothing before it is told to begin."""

    def wait(self, workers: Collection[Worker], timeout_s: float) -> list[Worker]:
        """Those of the workers, all started here, that have something to say or are over; may be none in that time."""

    def close(self) -> None:
        """Lets go of what the engine itself holds; the workers are over."""
