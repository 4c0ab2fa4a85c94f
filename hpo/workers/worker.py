"""One worker process: open a study, claim its trials and train them, with results in the storage."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from logging.handlers import QueueHandler
from queue import Queue

import torch

from core.data import Dataset, Division, load_dataset
from core.errors import CoreError, GraphError
from core.weights import weights_in
from hpo.errors import HpoError
from hpo.paths import cache_root, data_root
from hpo.search.interrupts import Interrupts
from hpo.search.loop import run_study
from hpo.storage import mask
from hpo.study import Study, open_study
from hpo.workers.capacity import occupy
from hpo.workers.engine import NO_MORE, STOPPED, UNUSABLE, Failure, Output, Resources, WorkerSpec

logger = logging.getLogger(__name__)


def work_on(
    spec: WorkerSpec,
    *,
    device: torch.device,
    resources: Resources,
    emit: Callable[[Output], None],
    interrupts: Interrupts,
    setting: AbstractContextManager[None] | None = None,
) -> int:
    """Train waiting trials until none is left, or the deadline or patience does not allow another.

    Args:
        device: as this process names it.
        emit: passes log records and the final error to the parent.
        interrupts: may end the worker after an epoch.
        setting: prepares the machine.

    Returns:
        The exit status: 0, `NO_MORE`, `STOPPED`, `UNUSABLE`, 2 for a fault that the user has to fix, 1 for a crash.
    """
    try:
        with setting or nullcontext(), weights_in(spec.options.weights):
            study, division = _open(spec, device, resources, emit)
            interrupts.check()
            all_done = run_study(
                study,
                spec.space,
                partial(division.on, device),
                device=device,
                interrupts=interrupts,
                options=spec.options,
            )
    except KeyboardInterrupt:
        return STOPPED
    except GraphError as error:
        logger.warning("%s", error)
        return UNUSABLE
    except Exception as error:
        failure = _failure(error, spec)
        emit(failure)
        return 2 if failure.trace is None else 1
    return 0 if all_done else NO_MORE


def _failure(error: Exception, spec: WorkerSpec) -> Failure:
    """Describe the error that ends a worker, without the storage's password."""

    def masked(text: str) -> str:
        return text.replace(spec.storage_url, mask(spec.storage_url))

    if isinstance(error, (HpoError, CoreError)):
        return Failure(masked(str(error)), None)
    trace = "".join(traceback.format_exception(error))
    return Failure(masked(f"{type(error).__name__}: {error}"), masked(trace))


def open_data(spec: WorkerSpec, device: torch.device, resources: Resources) -> tuple[Dataset, Division]:
    """Limit this process to its resources, and open the cached images on the device."""
    occupy(resources, device)
    dataset = load(spec, download=False)
    division = Division(dataset)
    division.on(device, spec.space.baseline.data)
    return dataset, division


def load(spec: WorkerSpec, *, download: bool) -> Dataset:
    """Open the study's images, through this machine's cache."""
    return load_dataset(
        spec.space.baseline.data,
        data_path=spec.data_path,
        data_root=data_root(),
        cache_dir=cache_root(),
        skip_broken=spec.skip_broken,
        download=download,
    )


def _open(
    spec: WorkerSpec, device: torch.device, resources: Resources, emit: Callable[[Output], None]
) -> tuple[Study, Division]:
    logging.disable(logging.WARNING)  # the parent has warned about the data and the study
    dataset, division = open_data(spec, device, resources)
    study = open_study(
        spec.space,
        name=spec.study,
        dataset=dataset,
        storage_url=spec.storage_url,
        data_path=spec.data_path,
        patient=True,  # it may replace a worker that would have waited for a lost storage
    )
    study.files.use_store(spec.store_url)
    logging.disable(logging.NOTSET)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Emitter(emit)], force=True)
    for package in ("core", "hpo"):
        logging.getLogger(package).setLevel(logging.INFO)
    return study, division


class _Emitter(QueueHandler):
    """Passes records on, after `prepare` has formatted them: their arguments may not be picklable."""

    def __init__(self, emit: Callable[[Output], None]) -> None:
        super().__init__(Queue())  # unused
        self._pass_on = emit

    def enqueue(self, record: logging.LogRecord) -> None:
        self._pass_on(record)
