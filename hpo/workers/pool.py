"""The parent of the workers: starts them, shows what they tell, replaces what dies, and lets none outlive the run.

Nothing is handed out here. The storage knows what waits, what runs and in whose hands, so that a worker that dies is a
lease to be reaped and a place to be filled, and the parent's own death costs no more than the running trials.
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import multiprocessing.resource_tracker
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Protocol

from hpo.driver import keep_best_weights
from hpo.errors import StudyError
from hpo.interrupts import SIGNALS, Interrupts
from hpo.objective import Listener
from hpo.study import Study
from hpo.workers.capacity import Capacity
from hpo.workers.messages import (
    Begin,
    EpochEnded,
    Event,
    Failed,
    Job,
    Logged,
    Order,
    Ready,
    Retire,
    TrialEnded,
    TrialStarted,
)
from hpo.workers.tuning import Tuning
from hpo.workers.worker import ASK_AGAIN_S, work

logger = logging.getLogger(__name__)

# How often a worker's place is filled again: a death may be an accident, twice in one place it may be bad luck, and
# behind a third one stands something that a fourth would meet too.
REPLACEMENTS = 2
# Until a worker that was asked to stop is killed: it stops between two steps of training, and may have a trial's
# pictures to finish.
_PATIENCE_S = 30.0


class Lane(Listener, Protocol):
    """Whoever shows what one worker does."""

    def clear(self) -> None:
        """The worker runs nothing any more."""


def run_workers(
    study: Study,
    job: Job,
    *,
    trials_at_once: int | None,
    capacity: Capacity,
    device_name: str,
    lane: Callable[[], Lane],
    interrupts: Interrupts,
) -> None:
    """Works the study off up to its total with several workers on one device.

    Args:
        study: with its slots queued.
        trials_at_once: the number of workers, which `capacity.check` lets pass; None finds out in the first trials
            which number is best, and remembers it in the study.
        capacity: what the device has free.
        device_name: names the device where the best number is remembered.
        lane: makes one more place for a worker to be shown in.

    Raises:
        KeyboardInterrupt: a person's Ctrl-C, or SIGTERM; the running trials are back in the queue.
        StudyError: a worker met something that a person has to mend, or no worker lives for long.
        RuntimeError: a fault of ours in a worker, with its traceback; the running trials are back in the queue.
    """
    pool = _Pool(study, job, capacity, lane, interrupts)
    try:
        pool.run(trials_at_once, device_name)
    finally:
        pool.stop()
    keep_best_weights(study, folds=job.space.base.data.folds or 1)


@dataclass
class _Place:
    """A living worker, and how to talk to it."""

    process: SpawnProcess
    events: Connection
    orders: Connection
    training: str = ""
    """What it trains: `trial 3`."""

    def order(self, order: Order) -> None:
        with contextlib.suppress(OSError):  # it is dying, and its last events are still to be read
            self.orders.send(order)

    def close(self) -> None:
        self.events.close()
        self.orders.close()
        self.process.close()


class _Pool:
    """The workers by the numbers of their places, from 0 on."""

    def __init__(
        self, study: Study, job: Job, capacity: Capacity, lane: Callable[[], Lane], interrupts: Interrupts
    ) -> None:
        self._study, self._job, self._capacity, self._interrupts = study, job, capacity, interrupts
        self._make_lane = lane
        self._lanes: dict[int, Lane] = {}
        self._places: dict[int, _Place] = {}
        self._deaths: Counter[int] = Counter()
        self._last_words = ""
        self._share = capacity.share(1)
        self._tuning: Tuning | None = None

    def run(self, trials_at_once: int | None, device_name: str) -> None:
        """Works until no trial waits."""
        if trials_at_once is None:
            self._tuning = Tuning(self, self._capacity.limit())
            self._tuning.start()
        else:
            self._share = self._capacity.share(trials_at_once)
        while True:
            self._work(device_name)
            self._study.reap()
            if not (waiting := self._study.waiting()):
                return
            number = self._tuning.number if self._tuning else trials_at_once
            assert number is not None
            # None of these works now: they had found nothing to claim before a trial came back to the queue.
            usable = [place for place in range(number) if self._deaths[place] <= REPLACEMENTS]
            if not usable:
                raise self._all_dead(number)
            for place in usable[:waiting]:
                self.open(place)

    def _work(self, device_name: str) -> None:
        """Until no worker is left."""
        while self._places:
            with self._interrupts.let_through():
                ready = wait([place.events for place in self._places.values()])
            for number, place in list(self._places.items()):
                if place.events in ready:
                    self._hear(number, place)
            if self._tuning is not None and (chosen := self._tuning.pop_choice()) is not None:
                logger.info("%s", chosen.why)
                if chosen.measured:
                    self._study.remember_packing(device_name, chosen.trials, chosen.why)

    # What the tuning asks for

    @property
    def living(self) -> Collection[int]:
        """The workers whose process runs."""
        return self._places.keys()

    def open(self, number: int) -> None:
        """Starts a worker, which claims nothing before it is told to begin."""
        context = multiprocessing.get_context("spawn")
        events, theirs = context.Pipe(duplex=False)
        taken, orders = context.Pipe(duplex=False)
        process = context.Process(
            target=work, args=(self._job, self._share, theirs, taken), name=f"hpo worker {number + 1}"
        )
        # A signal that comes while the worker is still importing waits until the worker can give its trial back. The
        # tracker is started before, since starting it lifts the block.
        multiprocessing.resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # else the worker's death would not end the pipe
        taken.close()
        self._places[number] = _Place(process, events, orders)

    def begin(self, number: int) -> None:
        """Lets a worker claim trials."""
        self._order(number, Begin())

    def retire(self, number: int) -> None:
        """Lets a worker end after its trial."""
        self._order(number, Retire())

    def share_among(self, trials: int) -> None:
        """Divides the device among so many workers, whatever they are just doing."""
        self._share = self._capacity.share(trials)
        for number in self._places:
            self._order(number, self._share)

    def waiting(self) -> int:
        """How many trials wait to be claimed."""
        return self._study.waiting()

    def _order(self, number: int, order: Order) -> None:
        if number in self._places:
            self._places[number].order(order)

    # What the workers say

    def _hear(self, number: int, place: _Place) -> None:
        """Takes one message of a worker, or its end."""
        try:
            event: Event = place.events.recv()
        except (EOFError, OSError):  # OSError: killed in the middle of a message
            self._end(number)
            return
        self._show(number, place, event)
        match event:
            case Ready():
                if self._tuning is None:
                    self.begin(number)
                else:
                    self._tuning.ready(number)
            case EpochEnded() if self._tuning is not None:
                self._tuning.epoch_ended(number, place.training, event.epoch, event.memory_bytes)
            case Failed():
                raise _failure(number, event)

    def _show(self, number: int, place: _Place, event: Event) -> None:
        lane = self._lane(number)
        match event:
            case TrialStarted():
                place.training = event.label
                lane.trial_started(event.label, event.config)
            case EpochEnded():
                lane.epoch_ended(event.epoch, event.verdict)
            case TrialEnded():
                place.training = ""
                lane.trial_ended(event.outcome)
            case Logged():
                teller = logging.getLogger(event.logger)
                if teller.isEnabledFor(event.level):
                    teller.handle(teller.makeRecord(event.logger, event.level, "", 0, event.text, (), None))

    def _lane(self, number: int) -> Lane:
        if number not in self._lanes:
            self._lanes[number] = self._make_lane()
        return self._lanes[number]

    def _end(self, number: int) -> None:
        """A worker's process is over: by itself, or dead."""
        place = self._places.pop(number)
        status = _reap_process(place.process, _PATIENCE_S)
        place.close()
        self._lane(number).clear()
        if self._tuning is not None:
            self._tuning.ended(number)
        if status == 0:
            return
        self._deaths[number] += 1
        self._last_words = _last_words(status)
        who = f"worker {number + 1}" + (f" ({place.training})" if place.training else "")
        again = "; its trial is queued again" if self._study.reap() else ""
        if self._deaths[number] > REPLACEMENTS:
            then = "it was replaced before, and is not any more"
        elif self._tuning is not None and number >= self._tuning.number:
            then = "it is not needed any more"
        else:
            then = "another takes its place"
            if self._study.waiting():
                self.open(number)
        logger.warning("%s %s%s; %s", who, self._last_words, again, then)

    def _all_dead(self, number: int) -> StudyError:
        counts, total = self._study.counts(), self._study.total
        fewer = "give fewer trials at once by --per-device" if number > 1 else "look at the machine's memory"
        return StudyError(
            f"study {self._study.name}: no worker lives for long, the last one {self._last_words}; "
            f"{counts.finished} of {total} trials are done and safe; {fewer}, and run the same command again"
        )

    def stop(self) -> None:
        """Ends every worker that is left; what they trained is back in the queue when this returns."""
        deadline = time.monotonic() + _PATIENCE_S
        asked = -math.inf
        while self._places and (left := deadline - time.monotonic()) > 0:
            if time.monotonic() - asked >= ASK_AGAIN_S:
                asked = time.monotonic()
                for place in self._places.values():
                    place.process.terminate()
            ready = wait([place.events for place in self._places.values()], min(left, ASK_AGAIN_S))
            for number, place in list(self._places.items()):
                if place.events not in ready:
                    continue
                try:  # a worker whose words nobody takes would never end
                    self._show(number, place, place.events.recv())
                except (EOFError, OSError):
                    self._close(number, max(0.0, left))
        for number in list(self._places):
            self._close(number, 0.0)
        self._study.reap()

    def _close(self, number: int, patience_s: float) -> None:
        place = self._places.pop(number)
        _reap_process(place.process, patience_s)
        place.close()
        self._lane(number).clear()


def _reap_process(process: SpawnProcess, patience_s: float) -> int:
    """Waits for a process that is about to end, kills it where it does not, and returns its exit status."""
    process.join(patience_s)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def _last_words(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"ended with exit status {status}"
    return f"was killed by {signal.Signals(-status).name}"


class _WorkerError(Exception):
    """A worker's traceback, to stand above the parent's."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _failure(number: int, event: Failed) -> Exception:
    if event.trace is None:
        return StudyError(event.text)
    fault = RuntimeError(f"worker {number + 1} failed: {event.text}")
    fault.__cause__ = _WorkerError(event.trace)
    return fault
