"""The parent of the workers: start them, show their log, replace dead ones, and let none outlive the run.

The storage records which process runs which trial, so the parent's own death costs at most the running epochs.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from optuna.trial import FrozenTrial, TrialState

from hpo.errors import StudyError
from hpo.reporter import StudyView
from hpo.search.interrupts import Interrupts
from hpo.search.training import trial_label
from hpo.search.weights import keep_best_weights
from hpo.storage.lease import LEASE
from hpo.study import Study
from hpo.text import done_and_safe
from hpo.trials import PAUSED_BY
from hpo.workers.engine import Engine, Exit, Failure, Output, Worker, WorkerSlot, WorkerSpec

logger = logging.getLogger(__name__)

# Replacements in a slot that finishes no trial. Two deaths may be accidents; a third has a lasting cause.
REPLACEMENTS = 2
# Seconds between two checks for trials of other runs' dead processes.
REAP_EVERY_S = 1.0
# Seconds between two readings of the storage.
_REFRESH_S = 0.5
# Seconds until a worker that should exit is killed.
_PATIENCE_S = 30.0


def run_workers(
    study: Study,
    spec: WorkerSpec,
    *,
    engine: Engine,
    slots: Sequence[WorkerSlot],
    progress: StudyView,
    interrupts: Interrupts,
) -> bool:
    """Train the study's waiting trials.

    Args:
        study: with its trials queued.
        engine: closed at the end.
        slots: filled in this order.

    Returns:
        False if the study's deadline or patience does not allow another trial.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the running trials are back in the queue.
        StudyError: the user has to fix a worker's error, or every worker dies early.
        RuntimeError: the last worker crashed; its traceback is the cause.
    """
    supervisor = _Supervisor(study, spec, engine, slots, progress, interrupts)
    try:
        all_done = supervisor.run()
    finally:
        try:
            supervisor.stop()
        finally:
            engine.close()
    keep_best_weights(study, folds=spec.space.baseline.data.folds or 1, options=spec.options)
    return all_done


@dataclass
class _Supervisor:
    """Keeps the slots of all devices filled."""

    study: Study
    spec: WorkerSpec
    engine: Engine
    slots: Sequence[WorkerSlot]
    progress: StudyView
    interrupts: Interrupts
    workers: dict[WorkerSlot, Worker] = field(default_factory=dict)
    deaths: Counter[WorkerSlot] = field(default_factory=Counter)
    """Since a worker of the slot finished or paused a trial."""
    no_more: set[WorkerSlot] = field(default_factory=set)
    last_words: str = ""
    last_crash: Exception | None = None

    def run(self) -> bool:
        """Work until no trial waits or runs, or deadline or patience do not allow another; return whether they did."""
        while True:
            self._work()
            self.study.queue.reclaim()
            if not self.study.queue.claimable():
                return True
            if not any(map(self._usable, self.slots)):
                if self.no_more:
                    return False
                raise self._all_dead()

    def _work(self) -> None:
        """Work until no worker is left."""
        self._fill()
        reaped_at = time.monotonic()
        while self.workers:
            with self.interrupts.let_through():
                self.engine.wait(self.workers.values(), _REFRESH_S)
            for slot, worker in list(self.workers.items()):
                ended = worker.ended  # before its output, which is then complete
                for output in worker.output():
                    self._handle(slot, output)
                if ended:
                    self._end(slot)
            self.progress.refresh()
            self.study.deadline.record()
            if time.monotonic() - reaped_at >= REAP_EVERY_S:
                reaped_at = time.monotonic()
                self.study.queue.reclaim()
                self._fill()

    def _fill(self) -> None:
        """Start workers for waiting trials beyond the idle workers; dismiss unplaced ones if none waits."""
        waiting, training = self.study.queue.claimable(), self._training()
        idle = [worker for worker in self.workers.values() if worker.process not in training]
        free = list(filter(self._usable, self.slots))
        for slot in free[: max(0, waiting - len(idle))]:
            self._start(slot)
        if not waiting:
            for worker in idle:
                if worker.process is None:  # a cluster may never place it
                    worker.stop()

    def _usable(self, slot: WorkerSlot) -> bool:
        return not (slot in self.workers or slot in self.no_more or self.deaths[slot] > REPLACEMENTS)

    def _start(self, slot: WorkerSlot) -> None:
        self.workers[slot] = self.engine.start(self.spec, slot)

    def _trials_of(self, worker: Worker) -> list[FrozenTrial]:
        trials = self.study.optuna.get_trials(deepcopy=False)
        return [trial for trial in trials if worker.process is not None and _holder(trial) == worker.process]

    def _has_paused(self, process: tuple[str, int]) -> bool:
        trials = self.study.optuna.get_trials(deepcopy=False)
        return any(trial.user_attrs.get(PAUSED_BY) == list(process) for trial in trials)

    def _training(self) -> set[tuple[str, int] | None]:
        """The processes that hold a running trial."""
        trials = self.study.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return {_holder(trial) for trial in trials if LEASE in trial.user_attrs}

    def _handle(self, slot: WorkerSlot, output: Output) -> None:
        if not isinstance(output, Failure):
            target = logging.getLogger(output.name)
            if target.isEnabledFor(output.levelno):
                target.handle(output)
        elif output.trace is None:
            raise StudyError(output.text)
        else:
            logger.warning("%s crashed: %s", slot.name, output.text)
            self.last_crash = RuntimeError(f"{slot.name} failed: {output.text}")
            self.last_crash.__cause__ = _WorkerError(output.trace)

    def _end(self, slot: WorkerSlot) -> None:
        worker = self.workers[slot]
        exited = self._close(slot)
        if exited.no_more:
            self.no_more.add(slot)
        if exited.clean:
            return
        if any(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in self._trials_of(worker)):
            self.deaths[slot] = 0
        if worker.process is not None and self._has_paused(worker.process):
            self.deaths[slot] = 0
        self.deaths[slot] += not exited.blameless
        self.last_words = exited.words
        who, requeued = slot.name, ""
        self.study.queue.reclaim()  # another process may have been faster
        last = max(self._trials_of(worker), key=lambda trial: trial.datetime_start or datetime.min, default=None)
        if last is not None and last.state == TrialState.FAIL:
            base = self.spec.space.baseline
            who += f" ({trial_label(last, epochs=base.epochs, folds=base.data.folds or 1)})"
            requeued = "; its trial is queued again"
        then = "another takes its place" if self._usable(slot) else "it is not replaced any more"
        if self._usable(slot) and self.study.queue.claimable():
            self._start(slot)
        logger.warning("%s %s%s; %s", who, exited.words, requeued, then)

    def _close(self, slot: WorkerSlot) -> Exit:
        exited = self.workers[slot].close(_PATIENCE_S)
        del self.workers[slot]  # not before: an interrupted `close` is repeated
        return exited

    def _all_dead(self) -> Exception:
        if self.last_crash is not None:
            return self.last_crash
        counts, total = self.study.counts(), self.study.total
        fewer = "fewer trials at once with --per-device" if len(self.slots) > 1 else "to free some memory"
        return StudyError(
            f"study {self.study.name}: every worker dies early, the last one {self.last_words}; "
            f"{done_and_safe(counts.finished, total)}; try {fewer}, then run the same command again"
        )

    def stop(self) -> None:
        """End every worker after its epoch, or at once on a second interrupt; their trials are back in the queue."""
        for worker in self.workers.values():
            worker.stop()
        with contextlib.suppress(KeyboardInterrupt), self.interrupts.patient():
            while self.workers:
                self.engine.wait(self.workers.values(), 1.0)
                for slot, worker in list(self.workers.items()):
                    ended = worker.ended
                    for output in worker.output():  # a full pipe would block it
                        if not isinstance(output, Failure) or output.trace is not None:
                            self._handle(slot, output)
                    if ended:
                        self._close(slot)
        for worker in self.workers.values():
            worker.kill()
        for slot in list(self.workers):
            self._close(slot)
        self.study.queue.reclaim(blameless=True)


def _holder(trial: FrozenTrial) -> tuple[str, int] | None:
    """(host, process ID) of the process that claimed the trial."""
    lease = trial.user_attrs.get(LEASE)
    return None if lease is None else (str(lease["host"]), int(lease["pid"]))


class _WorkerError(Exception):
    """A worker's traceback, printed above the parent's."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"
