"""One worker: a process that opens a study by its name, claims its trials, and trains them.

It tells its parent what happens, and takes its orders between epochs. When the parent is gone, which the pipe between
them says, whatever killed it, the worker gives its trial back and leaves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from core.config import TrainConfig
from core.data import Splits, folds, load_dataset, on_device
from core.errors import CoreError
from core.loop import EpochMetrics
from hpo.driver import run_study
from hpo.errors import HpoError
from hpo.interrupts import SIGNALS, Interrupts
from hpo.objective import Outcome
from hpo.paths import cache_root, data_root
from hpo.storage import mask
from hpo.study import Study, open_study
from hpo.workers.capacity import occupy, peak_memory_bytes
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
    TrialEnded,
    TrialStarted,
    without_networks,
)

STOPPED = 130
"""The exit status of a worker that was interrupted, as a shell has it."""

# A worker whose parent is gone gives its trial back, which takes as long as a step of training. Where that hangs, it
# leaves all the same, and the next run reaps its trial.
_PATIENCE_S = 20.0
ASK_AGAIN_S = 1.0
"""Until a worker is asked to stop once more: a KeyboardInterrupt that is raised where Python calls back on its own, in
a weak reference's callback or a finalizer, is printed and lost."""


def work(job: Job, share: Share, events: Connection, orders: Connection) -> None:
    """Runs in the worker's process. It begins with `SIGNALS` blocked, so that none comes before it can be heeded."""
    os.chdir(job.folder)
    ordered = _Orders(orders, share)  # its thread begins while signals are blocked: they are the main thread's
    try:
        with Interrupts() as interrupts:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            try:
                status = _Worker(job, events, ordered, interrupts).run()
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a second Ctrl-C finds nothing more to stop
    except KeyboardInterrupt:  # one that was held to the end
        status = STOPPED
    sys.exit(status)


class _Orders(threading.Thread):
    """Listens to the parent, and remembers what it asked for."""

    def __init__(self, connection: Connection, share: Share) -> None:
        super().__init__(name="orders", daemon=True)
        self._connection = connection
        self.share = share
        self.begun = threading.Event()
        self.retired = False
        self.start()

    def run(self) -> None:
        try:
            while True:
                self._take(self._connection.recv())
        except (EOFError, OSError):  # the parent is gone
            deadline = time.monotonic() + _PATIENCE_S
            while time.monotonic() < deadline:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
                time.sleep(ASK_AGAIN_S)
            os._exit(1)

    def _take(self, order: Order) -> None:
        match order:
            case Share():
                self.share = order
            case Retire():
                self.retired = True
                self.begun.set()
            case Begin():
                self.begun.set()


class _Worker:
    """Opens the study, works, and says so. A listener of the study, too."""

    def __init__(self, job: Job, events: Connection, orders: _Orders, interrupts: Interrupts) -> None:
        self._job, self._events, self._orders, self._interrupts = job, events, orders, interrupts
        self._device = torch.device(job.device)
        self._share: Share | None = None

    def run(self) -> int:
        """Works until nothing is left, or the parent wants no more; returns the exit status."""
        try:
            study, splits = self._open()
            self._send(Ready())
            with self._interrupts.let_through():
                self._orders.begun.wait()
            run_study(
                study,
                self._job.space,
                splits,
                device=self._device,
                listener=self,
                interrupts=self._interrupts,
                wanted=lambda: not self._orders.retired,
            )
        except KeyboardInterrupt:
            return STOPPED
        except (HpoError, CoreError) as error:
            self._send(Failed(self._masked(str(error)), None))
            return 2
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            self._send(Failed(self._masked(said), self._masked(traceback.format_exc())))
            return 1
        return 0

    def _open(self) -> tuple[Study, tuple[Splits, ...]]:
        """The study and the images on the device, as the parent has them: it has warned of what is odd in them.

        Nothing is interrupted here. The parent has filled the cache, so this is soon over.
        """
        job = self._job
        logging.disable(logging.WARNING)
        self._take_share()
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        config = job.space.base.data
        dataset = load_dataset(
            config,
            data_path=job.data_path,
            data_root=data_root(),
            cache_dir=cache_root(),
            skip_broken=job.skip_broken,
            download=False,
        )
        study = open_study(
            job.space, name=job.study, dataset=dataset, storage_url=job.storage_url, data_path=job.data_path
        )
        self._log_to_parent()
        return study, on_device(folds(dataset, config), self._device)

    def _log_to_parent(self) -> None:
        """Sends records to the parent: warnings and worse, and what we say ourselves."""
        logging.disable(logging.NOTSET)
        logging.basicConfig(level=logging.WARNING, handlers=[_ParentHandler(self._send)], force=True)
        for package in ("core", "hpo"):
            logging.getLogger(package).setLevel(logging.INFO)

    def _send(self, event: Event) -> None:
        # Half a message would end the conversation. A parent that is gone is for the thread that listens to it.
        with self._interrupts.held(), contextlib.suppress(OSError):
            self._events.send(event)

    def _take_share(self) -> None:
        if self._share != self._orders.share:
            self._share = self._orders.share
            occupy(self._share, self._device)

    def _masked(self, text: str) -> str:
        return text.replace(self._job.storage_url, mask(self._job.storage_url))

    # As the study's listener

    def trial_started(self, label: str, config: TrainConfig) -> None:
        self._take_share()
        self._send(TrialStarted(label, config))

    def epoch_ended(self, epoch: EpochMetrics, verdict: str) -> None:
        self._send(EpochEnded(epoch, verdict, peak_memory_bytes(self._device)))
        self._take_share()

    def trial_ended(self, outcome: Outcome) -> None:
        self._send(TrialEnded(without_networks(outcome)))

    def reference_ended(self, name: str, result: dict[str, Any]) -> None:
        raise AssertionError(f"a worker trains no recipe beside the study: {name} {result}")


class _ParentHandler(logging.Handler):
    """Hands records to the parent, formatted: what they are made of may not cross to another process."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send(Logged(record.name, record.levelno, self.format(record)))
