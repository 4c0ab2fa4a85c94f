"""One worker: opens a study by its name, claims its trials, and trains them, in whatever process it was put.

It tells its parent what happens, and takes its orders between epochs.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from core.config import TrainConfig
from core.data import Division, load_dataset
from core.errors import CoreError
from core.loop import EpochMetrics
from hpo.errors import HpoError
from hpo.paths import cache_root, data_root
from hpo.search.interrupts import Interrupts
from hpo.search.loop import run_study
from hpo.storage import mask
from hpo.study import Study, open_study
from hpo.trials import Outcome
from hpo.workers.capacity import occupy, peak_memory_bytes
from hpo.workers.engine import STOPPED
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
    without_networks,
)

# Until a worker that waits for its orders looks whether it is to stop.
_LOOK_S = 0.2


class Orders:
    """What the parent has asked for so far.

    Args:
        share: what the worker may have at first.
    """

    def __init__(self, share: Share, interrupts: Interrupts) -> None:
        self.share = share
        self.begun = threading.Event()
        self.retired = False
        self._interrupts = interrupts

    def take(self, order: Order) -> None:
        """Takes one more; from any thread."""
        match order:
            case Share():
                self.share = order
            case Retire():
                self.retired = True
                self.begun.set()
            case Begin():
                self.begun.set()
            case Stop():
                self._interrupts.request()


def work_on(
    job: Job, *, device: torch.device, orders: Orders, send: Callable[[Event], None], interrupts: Interrupts
) -> int:
    """Works until nothing is left, or the parent wants no more.

    Args:
        device: as this process names it.
        send: hands an event to the parent.

    Returns:
        The exit status: 0, `STOPPED`, 2 where a person has to mend something, and 1 for a crash.
    """
    return _Worker(job, device, orders, send, interrupts).run()


def failure_of(error: Exception, job: Job) -> tuple[Failed, int]:
    """(What a worker says of what ends it, without the storage's password; its exit status.)"""

    def masked(text: str) -> str:
        return text.replace(job.storage_url, mask(job.storage_url))

    if isinstance(error, (HpoError, CoreError)):
        return Failed(masked(str(error)), None), 2
    trace = "".join(traceback.format_exception(error))
    return Failed(masked(f"{type(error).__name__}: {error}"), masked(trace)), 1


class _Worker:
    """Opens the study, works, and says so. A listener of the study, too."""

    def __init__(
        self, job: Job, device: torch.device, orders: Orders, send: Callable[[Event], None], interrupts: Interrupts
    ) -> None:
        self._job, self._device, self._orders, self._send_event = job, device, orders, send
        self._interrupts = interrupts
        self._share: Share | None = None
        self._sending = threading.Lock()

    def run(self) -> int:
        try:
            study, division = self._open()
            self._send(Ready())
            with self._interrupts.let_through():
                while not self._orders.begun.wait(_LOOK_S):
                    self._interrupts.check()
            run_study(
                study,
                self._job.space,
                partial(division.on, self._device),
                device=self._device,
                listener=self,
                interrupts=self._interrupts,
                wanted=lambda: not self._orders.retired,
                options=self._job.options,
            )
        except KeyboardInterrupt:
            return STOPPED
        except Exception as error:
            failed, status = failure_of(error, self._job)
            self._send(failed)
            return status
        return 0

    def _open(self) -> tuple[Study, Division]:
        """The study and the images, on the device, as the parent has them: it has warned of what is odd in them.

        Nothing is interrupted here. The parent has filled the cache, so this is soon over.
        """
        job = self._job
        logging.disable(logging.WARNING)
        self._take_share()
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        config = job.space.baseline.data
        dataset = load_dataset(
            config,
            data_path=job.data_path,
            data_root=data_root(),
            cache_dir=cache_root(),
            skip_broken=job.skip_broken,
            download=False,
        )
        study = open_study(
            job.space,
            name=job.study,
            dataset=dataset,
            storage_url=job.storage_url,
            data_path=job.data_path,
            patient=True,  # it takes the place of one that would have waited
        )
        study.use_depot(job.depot)
        self._log_to_parent()
        division = Division(dataset)
        division.on(self._device, config)
        return study, division

    def _log_to_parent(self) -> None:
        """Sends records to the parent: warnings and worse, and what we say ourselves."""
        logging.disable(logging.NOTSET)
        handlers = [_ParentHandler(self._send)]
        logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=handlers, force=True)
        for package in ("core", "hpo"):
            logging.getLogger(package).setLevel(logging.INFO)

    def _send(self, event: Event) -> None:
        # Half a message, or two at once, would end the conversation; a heartbeat's thread may have to warn as well.
        with self._interrupts.held(), self._sending:
            self._send_event(event)

    def _take_share(self) -> None:
        if self._share != self._orders.share:
            self._share = self._orders.share
            occupy(self._share, self._device)

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
