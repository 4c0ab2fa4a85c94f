"""How many trials at once train the most images a second on one device: decided from measurements, and nothing else.

A small network leaves most of a device idle, and several trainings at once fill it; a large one fills it alone, and a
second would only take half of it. So the number is doubled, 1, 2, 4, …, as long as the device then trains at least a
tenth more images a second than at the best number before, and as long as its memory holds so many.

Trials differ in cost. The images a second of two sets of trials would compare their networks, and not how many of them
ran at once. So the same trials are timed twice, right before the new ones begin and right after: what share of their
speed they keep, times how many times as many run now, is the gain. (The new ones are supposed to lose as much by the
company as the old ones do.) Only where none of the old ones lasts through both windows are the totals compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

# What a larger number must gain to be kept. Below a tenth, a gain drowns in the noise of a window, and more trials at
# once have a price that no window shows: the sampler and the pruner know less when each of them begins.
WORTHWHILE = 1.10
# A window has so many epochs of every worker, and so many seconds of its training. On two CPU cores the rate of three
# epochs of digits spreads by 2 to 4 %.
WINDOW_EPOCHS = 3
WINDOW_S = 1.0
# Memory that a trial is given beyond the most that one was seen to need: most trials of the search are still to come.
MARGIN = 1.25


@dataclass(frozen=True)
class Reading:
    """What a window came to."""

    trainings: Mapping[str, float]
    """Training -> its images a second, validation included."""
    images_per_s: float
    """Of all workers together."""


class Window:
    """Epochs of every worker while their number stays the same.

    An epoch counts if the one before it, of the same training, ended in the window too: so a training's first epoch,
    which pays for start-up, never does, nor one that began under another number of workers.

    Args:
        workers: those that train while it is open.
        epochs: how many of each worker fill it, at least.
        seconds: how long those must have taken, at least.
    """

    def __init__(self, workers: Collection[int], *, epochs: int = WINDOW_EPOCHS, seconds: float = WINDOW_S) -> None:
        self._workers, self._epochs, self._seconds = tuple(workers), epochs, seconds
        self._last: dict[int, tuple[str, int, float]] = {}
        self._spans: dict[int, dict[str, list[tuple[int, float]]]] = {
            worker: defaultdict(list) for worker in self._workers
        }
        """Worker -> training -> (images, seconds) of each epoch that counts."""

    def add(self, worker: int, training: str, *, epoch: int, images: int, elapsed_s: float) -> None:
        """An epoch has ended.

        Args:
            training: names what the worker trains; it may begin another one within the window.
            epoch: counted from 1.
            images: shown in the epoch.
            elapsed_s: since the training began, validation included.
        """
        if worker not in self._spans:
            return
        before = self._last.get(worker)
        self._last[worker] = (training, epoch, elapsed_s)
        if before is not None and before[:2] == (training, epoch - 1):
            self._spans[worker][training].append((images, elapsed_s - before[2]))

    @property
    def full(self) -> bool:
        """Whether every worker has enough epochs in it."""
        for trainings in self._spans.values():
            spans = [span for counted in trainings.values() for span in counted]
            if len(spans) < self._epochs or sum(seconds for _, seconds in spans) < self._seconds:
                return False
        return True

    def reading(self) -> Reading:
        """What the epochs in it came to, once it is full."""
        trainings = {name: _rate(spans) for each in self._spans.values() for name, spans in each.items()}
        workers = [_rate([span for spans in each.values() for span in spans]) for each in self._spans.values()]
        return Reading(trainings, sum(workers))


def _rate(spans: Collection[tuple[int, float]]) -> float:
    return sum(images for images, _ in spans) / sum(seconds for _, seconds in spans)


def gain(before: Reading, after: Reading, *, factor: float) -> float:
    """How many times as many images a second are trained after the new trials have joined.

    Args:
        factor: how many times as many trials run after as before.
    """
    both = before.trainings.keys() & after.trainings.keys()
    if not both:
        return after.images_per_s / before.images_per_s
    kept = sum(after.trainings[name] for name in both) / sum(before.trainings[name] for name in both)
    return factor * kept


@dataclass(frozen=True)
class Limit:
    """What bounds the number beside its worth."""

    memory_bytes: int
    """What the device had free before the first trial."""
    trials: int | None = None
    """The largest number that makes sense; None for any."""
    why: str = ""
    """What that number is, in words: `the CPU has 2 cores`."""


class Packing:
    """Which number of trials at once to try next, and which was best.

    `alone` is told what one trial does by itself, then `joined` what came of each number that `next` asks for; `saw`
    what memory the trials need, whenever that is known.
    """

    def __init__(self, limit: Limit) -> None:
        self._limit = limit
        self._speeds: dict[int, float] = {}
        """Number of trials -> images a second, as the trials that ran alone first would have trained them."""
        self._peak_bytes = 0
        self._over = False
        self.best = 1
        """The number that is kept so far."""

    def saw(self, memory_bytes: int) -> None:
        """So much memory of the device a trial has needed."""
        self._peak_bytes = max(self._peak_bytes, memory_bytes)

    def alone(self, reading: Reading) -> None:
        """What one trial does by itself."""
        self._speeds = {1: reading.images_per_s}

    def joined(self, number: int, before: Reading, after: Reading) -> None:
        """What came of as many trials as `next` said: just before, and after they had grown to that number."""
        speed = self._speeds[self.best] * gain(before, after, factor=number / self.best)
        self._speeds[number] = speed
        if speed >= WORTHWHILE * self._speeds[self.best]:
            self.best = number
        else:
            self._over = True

    @property
    def next(self) -> int | None:
        """The number to try next: twice the best, or what is allowed of that; None where the best is found."""
        allowed = [2 * self.best, self._fitting, self._limit.trials]
        number = min(bound for bound in allowed if bound is not None)
        return None if self._over or number <= self.best else number

    @property
    def _fitting(self) -> int | None:
        """How many trials the memory holds; None before any has been seen."""
        return int(self._limit.memory_bytes // (MARGIN * self._peak_bytes)) if self._peak_bytes else None

    def said(self) -> str:
        """The choice in one line, with its numbers."""
        if not self._speeds:
            return f"1 trial at once: {self._bound()}"
        alone, chosen = self._speeds[1], self._speeds[self.best]
        others = [number for number in sorted(self._speeds) if number not in (1, self.best)]
        words = f"{at_once(self.best)}: {chosen:,.0f} images/s" + (
            "" if self.best == 1 else f" against {alone:,.0f} with one"
        )
        parts = [words, *(f"{number} gave {self._speeds[number]:,.0f}" for number in others)]
        return "; ".join([*parts, *([] if self._over else [self._bound()])])

    def _bound(self) -> str:
        """Why no larger number was tried."""
        fitting = self._fitting
        if fitting is None or (self._limit.trials is not None and self._limit.trials <= max(fitting, 1)):
            return self._limit.why
        needed, there = _gigabytes(self._peak_bytes), _gigabytes(self._limit.memory_bytes)
        return f"the memory holds no more ({needed} a trial at most, {there} free)"


def at_once(number: int) -> str:
    """So many trials at once, in words."""
    return f"{number} trial{'' if number == 1 else 's'} at once"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
