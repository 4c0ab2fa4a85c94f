"""The parent of the workers: starts them, shows what they tell, replaces what dies, and lets none outlive the run.

Nothing is handed out here. The storage knows what waits, what runs and in whose hands, so that a worker that dies is a
lease to be reaped and a seat to be filled, and the parent's own death costs no more than the running trials' epochs.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from hpo.errors import StudyError
from hpo.reporter import Listener
from hpo.search.interrupts import Interrupts
from hpo.search.loop import keep_best_weights
from hpo.study import Study
from hpo.workers.engine import Ending, Engine, Seat, Worker
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
    Share,
    Stop,
    TrialEnded,
    TrialStarted,
)
from hpo.workers.packing import Limit
from hpo.workers.tuning import Tuning

logger = logging.getLogger(__name__)

# How often a seat is filled again while its workers finish no trial: a death may be an accident, twice in one seat it
# may be bad luck, and behind a third one stands something that a fourth would meet too.
REPLACEMENTS = 2
# Between two looks for trials whose process is dead, of this run or of another.
REAP_EVERY_S = 5.0
# Until a worker that has said its last word is killed: it may have a trial's pictures to finish.
_PATIENCE_S = 30.0


class Lane(Listener, Protocol):
    """Whoever shows what one worker does."""

    def clear(self) -> None:
        """The worker runs nothing any more."""


@dataclass(frozen=True)
class Crew:
    """The workers of one device, or of what a cluster places by itself."""

    device: str
    """As torch names it here."""
    device_name: str
    """Names it where the best number is remembered."""
    size: int | None
    """How many workers; None finds out in the first trials which number is best, and remembers it in the study."""
    share: Callable[[int], Share]
    """What each of so many workers may have."""
    limit: Limit
    """What bounds the number, where it is to be found."""
    alone: bool = True
    """Whether no other device has workers, so that the device need not be named."""

    def seat(self, number: int) -> Seat:
        """Its seat of that number, from 0 on."""
        return Seat(number, self.device, f"worker {number + 1}" + ("" if self.alone else f" on {self.device}"))


def run_workers(
    study: Study,
    job: Job,
    *,
    engine: Engine,
    crews: Sequence[Crew],
    lane: Callable[[], Lane],
    interrupts: Interrupts,
) -> None:
    """Works the study off up to its total.

    Args:
        study: with its slots queued.
        crews: of each device.
        lane: makes one more place for a worker to be shown in.

    Raises:
        KeyboardInterrupt: a person's Ctrl-C, or SIGTERM; the running trials are back in the queue.
        StudyError: a worker met something that a person has to mend, or no worker lives for long.
        RuntimeError: the last of the workers that crash, with its traceback; the running trials are back in the queue.
    """
    pool = _Pool(study, job, engine, crews, lane, interrupts)
    try:
        pool.run()
    finally:
        try:
            pool.stop()
        finally:
            engine.close()
    keep_best_weights(study, folds=job.space.baseline.data.folds or 1, options=job.options)


class _Occupied:
    """A seat, the worker in it, and what became of those before."""

    def __init__(self, crew: _CrewAtWork, seat: Seat, lane: Lane) -> None:
        self.crew, self.seat, self.lane = crew, seat, lane
        self.worker: Worker | None = None
        self.training = ""
        """What the worker trains: `trial 3`."""
        self.deaths = 0
        """Since a worker here has finished a trial."""

    @property
    def usable(self) -> bool:
        return self.worker is None and self.deaths <= REPLACEMENTS


class _CrewAtWork:
    """A device's seats. The tuning's `Workers`, too: it sees the seats by their numbers."""

    def __init__(self, crew: Crew, pool: _Pool) -> None:
        self.crew, self._pool = crew, pool
        self.seats: dict[int, _Occupied] = {}
        self.tuning = Tuning(self, crew.limit) if crew.size is None else None
        self.share = crew.share(crew.size or 1)

    @property
    def number(self) -> int:
        """How many workers there are to be, as far as that is known."""
        if self.tuning is not None:
            return self.tuning.number
        assert self.crew.size is not None
        return self.crew.size

    @property
    def living(self) -> Collection[int]:
        return [number for number, seat in self.seats.items() if seat.worker is not None]

    def usable(self) -> list[int]:
        """The seats that may be filled again."""
        return [number for number in range(self.number) if number not in self.seats or self.seats[number].usable]

    def open(self, number: int) -> None:
        if number not in self.seats:
            self.seats[number] = self._pool.make_seat(self, self.crew.seat(number))
        self._pool.fill(self.seats[number])

    def begin(self, number: int) -> None:
        self._order(number, Begin())

    def retire(self, number: int) -> None:
        self._order(number, Retire())

    def share_among(self, trials: int) -> None:
        self.share = self.crew.share(trials)
        for number in self.living:
            self._order(number, self.share)

    def waiting(self) -> int:
        return self._pool.waiting()

    def _order(self, number: int, order: Order) -> None:
        seat = self.seats.get(number)
        if seat is not None and seat.worker is not None:
            seat.worker.order(order)


class _Pool:
    """The workers of all devices."""

    def __init__(
        self,
        study: Study,
        job: Job,
        engine: Engine,
        crews: Sequence[Crew],
        lane: Callable[[], Lane],
        interrupts: Interrupts,
    ) -> None:
        self._study, self._job, self._engine, self._interrupts = study, job, engine, interrupts
        self._make_lane = lane
        self._crews = [_CrewAtWork(crew, self) for crew in crews]
        self._last_words = ""
        self._last_crash: Exception | None = None

    def run(self) -> None:
        """Works until no trial of the total waits, and none runs that could come back."""
        for crew in self._crews:
            if crew.tuning is not None:
                crew.tuning.start()
        while True:
            self._work()
            self._study.queue.reap()
            if not self.waiting():
                return
            if not any(crew.usable() for crew in self._crews):
                raise self._all_dead()
            self._fill_seats()

    def _work(self) -> None:
        """Until no worker is left."""
        self._fill_seats()
        reaped_at = time.monotonic()
        while occupied := self._occupied():
            with self._interrupts.let_through():
                ready = self._engine.wait([seat.worker for seat in occupied if seat.worker is not None], REAP_EVERY_S)
            for seat in occupied:
                if seat.worker in ready:
                    self._hear(seat)
            for crew in self._crews:
                if crew.tuning is not None and (chosen := crew.tuning.pop_choice()) is not None:
                    logger.info("%s", chosen.why)
                    if chosen.measured:
                        self._study.remember_packing(crew.crew.device_name, chosen.trials, chosen.why)
            if time.monotonic() - reaped_at >= REAP_EVERY_S:
                reaped_at = time.monotonic()
                if self._study.queue.reap():
                    self._fill_seats()
                if not self.waiting():
                    self._dismiss_idle()

    def _fill_seats(self) -> None:
        """Fills what seats are free, as far as trials wait that no worker has been started for."""
        # A worker that is loading has claimed nothing yet.
        loading = sum(not seat.training for seat in self._occupied())
        wanted = self.waiting() - loading
        # By turns, so that few trials do not crowd on the first device.
        free = [(number, crew) for crew in self._crews if crew.tuning is None or crew.seats for number in crew.usable()]
        for number, crew in sorted(free, key=lambda at: at[0])[: max(0, wanted)]:
            crew.open(number)

    def _dismiss_idle(self) -> None:
        """Lets go of workers that have nothing to do: on a cluster one may never find a place."""
        for seat in self._occupied():
            if seat.worker is not None and not seat.training and seat.crew.tuning is None:
                seat.worker.order(Retire())

    def waiting(self) -> int:
        """How many trials wait to be claimed."""
        return self._study.queue.waiting()

    def _occupied(self) -> list[_Occupied]:
        return [seat for crew in self._crews for seat in crew.seats.values() if seat.worker is not None]

    def make_seat(self, crew: _CrewAtWork, seat: Seat) -> _Occupied:
        """A seat that nobody sat in before."""
        return _Occupied(crew, seat, self._make_lane())

    def fill(self, seat: _Occupied) -> None:
        """Starts a worker in the seat."""
        seat.worker = self._engine.start(self._job, seat.seat, seat.crew.share)

    # What the workers say

    def _hear(self, seat: _Occupied) -> None:
        """Takes one message of a worker, or its end."""
        assert seat.worker is not None
        try:
            event = seat.worker.hear()
        except EOFError:
            self._end(seat)
            return
        self._show(seat, event)
        tuning, number = seat.crew.tuning, seat.seat.number
        match event:
            case Ready() if tuning is not None:
                tuning.ready(number)
            case Ready():
                seat.crew.begin(number)
            case EpochEnded() if tuning is not None:
                tuning.epoch_ended(number, seat.training, event.epoch, event.memory_bytes)
            case TrialEnded():
                seat.deaths = 0
            case Failed(trace=None):
                raise StudyError(event.text)
            case Failed():
                self._last_crash = _crash(seat.seat, event)

    def _show(self, seat: _Occupied, event: Event) -> None:
        match event:
            case TrialStarted():
                seat.training = event.label
                seat.lane.trial_started(event.label, event.config)
            case EpochEnded():
                seat.lane.epoch_ended(event.epoch, event.verdict)
            case TrialEnded():
                seat.training = ""
                seat.lane.trial_ended(event.outcome)
            case Logged():
                teller = logging.getLogger(event.logger)
                if teller.isEnabledFor(event.level):
                    teller.handle(teller.makeRecord(event.logger, event.level, "", 0, event.text, (), None))
            case Failed() if event.trace is not None:
                logger.warning("%s crashed: %s", seat.seat.name, event.text)

    def _end(self, seat: _Occupied) -> None:
        """A worker is over: by itself, or dead."""
        ending, training = self._empty(seat, _PATIENCE_S)
        tuning = seat.crew.tuning
        if tuning is not None:
            tuning.ended(seat.seat.number)
        if ending.clean:
            return
        seat.deaths += not ending.blameless
        self._last_words = ending.words
        who = seat.seat.name + (f" ({training})" if training else "")
        again = "; its trial is queued again" if self._study.queue.reap() else ""
        if not seat.usable:
            then = "it was replaced before, and is not any more"
        elif seat.seat.number >= seat.crew.number:
            then = "it is not needed any more"
        else:
            then = "another takes its place"
            if self.waiting():
                self.fill(seat)
        logger.warning("%s %s%s; %s", who, ending.words, again, then)

    def _empty(self, seat: _Occupied, patience_s: float) -> tuple[Ending, str]:
        """Lets go of a worker; returns how it ended, and what it was training."""
        assert seat.worker is not None
        ending, training = seat.worker.end(patience_s), seat.training
        seat.worker, seat.training = None, ""
        seat.lane.clear()
        return ending, training

    def _all_dead(self) -> Exception:
        if self._last_crash is not None:
            return self._last_crash
        counts, total = self._study.counts(), self._study.total
        several = sum(crew.number for crew in self._crews) > 1
        fewer = "give fewer trials at once by --per-device" if several else "look at the machine's memory"
        return StudyError(
            f"study {self._study.name}: no worker lives for long, the last one {self._last_words}; "
            f"{counts.finished} of {total} trials are done and safe; {fewer}, and run the same command again"
        )

    def stop(self) -> None:
        """Ends every worker that is left, each after its epoch; what they trained is back in the queue at the end.

        A person who interrupts once more has them killed instead; each trial then goes on from its last checkpoint.
        """
        for seat in self._occupied():
            assert seat.worker is not None
            seat.worker.order(Stop())
        with contextlib.suppress(KeyboardInterrupt), self._interrupts.patient():
            while occupied := self._occupied():
                ready = self._engine.wait([seat.worker for seat in occupied if seat.worker is not None], 1.0)
                for seat in occupied:
                    if seat.worker is not None and seat.worker in ready:
                        try:  # a worker whose words nobody takes would never end
                            self._show(seat, seat.worker.hear())
                        except EOFError:
                            self._empty(seat, _PATIENCE_S)
        for seat in self._occupied():
            assert seat.worker is not None
            seat.worker.kill()
        for seat in self._occupied():
            self._empty(seat, _PATIENCE_S)
        self._study.queue.reap(blameless=True)


class _WorkerError(Exception):
    """A worker's traceback, to stand above the parent's."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _crash(seat: Seat, event: Failed) -> Exception:
    crash = RuntimeError(f"{seat.name} failed: {event.text}")
    crash.__cause__ = _WorkerError(event.trace)
    return crash
