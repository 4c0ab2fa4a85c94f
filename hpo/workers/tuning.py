"""Finds the best number of trials at once while the first trials run: `packing` decides, the workers measure.

The new workers of each step load first, which disturbs the others, and wait. Then a window of the old trials alone,
then the new ones begin, then a window of all.

On a CPU the threads are divided anew with every step, between two epochs of a trial, so that those first trainings
cannot be repeated bit by bit. With a fixed number each training can, given its configuration; the study as a whole
cannot with more than one at once, since the rungs' verdicts and the sampler's later suggestions depend on who ends
first.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from core.loop import EpochMetrics
from hpo.workers.packing import Limit, Packing, Reading, Window


class Workers(Protocol):
    """Whoever starts and ends workers, by the numbers of their places."""

    @property
    def living(self) -> Collection[int]:
        """Those whose process runs."""

    def open(self, number: int) -> None:
        """Starts a worker, which then waits."""

    def begin(self, number: int) -> None:
        """Lets it claim trials; nothing where it does already."""

    def retire(self, number: int) -> None:
        """Lets it end after its trial, or at once while it waits."""

    def share_among(self, trials: int) -> None:
        """Divides the device among so many."""

    def waiting(self) -> int:
        """How many trials wait to be claimed."""


@dataclass(frozen=True)
class Choice:
    """The number of trials at once to go on with."""

    trials: int
    why: str
    """In one line."""
    measured: bool = True
    """Whether it is the best; False where the measuring ended before that was known."""


def not_found_out(why: str, number: int) -> str:
    """That the best number is not known, in one line."""
    return f"--per-device auto: not found out, {why}; going on with {number}"


class Tuning:
    """Asks for more workers as long as that is worth it, and retires those that are too many.

    A study whose trials run out, or a worker that dies, ends the measuring: what was found best so far stays, as a
    choice that is not `measured`.
    """

    def __init__(self, workers: Workers, limit: Limit) -> None:
        self._workers, self._packing = workers, Packing(limit)
        self._measuring = True
        self._running = 0
        """Workers that train now, from place 0 on, while it measures."""
        self._loading: set[int] = set()
        self._retired: set[int] = set()
        """Those that the memory turned out not to hold, until they are over."""
        self._window: Window | None = None
        self._before: Reading | None = None
        """The window of the old trials alone, while that of all is open."""
        self._choice: Choice | None = None

    @property
    def number(self) -> int:
        """The best number of workers, as far as it is known."""
        return self._packing.best

    def start(self) -> None:
        """Opens the first worker, and the one that may join it."""
        self._open_up_to(1)
        self._invite()

    def pop_choice(self) -> Choice | None:
        """The choice, once, when it has been made."""
        choice, self._choice = self._choice, None
        return choice

    # What happens

    def ready(self, number: int) -> None:
        """A worker has loaded, and waits."""
        self._loading.discard(number)
        if not self._measuring:
            if number < self.number:
                self._workers.begin(number)
        elif not self._loading:
            if not self._running:
                self._running = 1
                self._workers.begin(0)
            self._window = Window(range(self._running))

    def epoch_ended(self, number: int, training: str, epoch: EpochMetrics, memory_bytes: int) -> None:
        """A worker has trained an epoch, and needed so much memory at most so far."""
        self._packing.saw(memory_bytes)
        if self._window is None:
            return
        self._window.add(number, training, epoch=epoch.epoch, images=epoch.images, elapsed_s=epoch.elapsed_s)
        if self._window.full:
            reading, self._window = self._window.reading(), None
            if self._before is None:
                self._join(reading)
            else:
                self._judge(self._before, reading)

    def ended(self, number: int) -> None:
        """A worker is over: it has retired, has found no trial to claim, or has died."""
        self._loading.discard(number)
        if number in self._retired:
            self._retired.discard(number)  # it has trained nothing, so that nothing is measured less
        elif self._measuring:
            rest = self._workers.waiting()
            self._give_up(f"worker {number + 1} ended while it was measured" if rest else "the trials ran out")
        elif all(place < self.number for place in self._workers.living):
            self._workers.share_among(self.number)

    # What is done

    def _open_up_to(self, number: int) -> None:
        for place in range(self._running, number):
            if place not in self._workers.living:
                self._loading.add(place)
                self._workers.open(place)

    def _invite(self) -> None:
        """Opens the workers of the next number, or settles for what there is."""
        number = self._packing.next
        if number is None:
            self._conclude()
        elif self._workers.waiting() < number - self._running:
            self._give_up(f"too few trials are left to try {number} at once")
        else:
            self._open_up_to(number)

    def _join(self, reading: Reading) -> None:
        """The old trials have been timed alone: lets the new ones begin, if the memory holds them."""
        if self._running == 1:
            self._packing.alone(reading)
        number = self._packing.next
        if number is None:
            self._conclude()
            return
        for place in sorted(self._workers.living):
            if place >= number:
                self._retired.add(place)
                self._workers.retire(place)
        self._before = reading
        self._workers.share_among(number)
        for place in range(self._running, number):
            self._workers.begin(place)
        self._running = number
        self._window = Window(range(number))

    def _judge(self, before: Reading, after: Reading) -> None:
        """Old and new trials have been timed together."""
        self._before = None
        self._packing.joined(self._running, before, after)
        self._invite()

    def _conclude(self) -> None:
        """The best number is found."""
        self._choice = Choice(self._packing.best, self._packing.said())
        self._settle()

    def _give_up(self, why: str) -> None:
        """The best number cannot be found any more."""
        self._choice = Choice(self.number, not_found_out(why, self.number), measured=False)
        self._settle()

    def _settle(self) -> None:
        """Goes on with the best number so far."""
        self._measuring, self._window = False, None
        too_many = False
        for place in sorted(self._workers.living):
            if place >= self.number:
                self._workers.retire(place)
                too_many = True
            elif place not in self._loading:
                self._workers.begin(place)
        if not too_many:
            self._workers.share_among(self.number)
