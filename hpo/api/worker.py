"""`hpo worker`: join a study that was started here or elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from core.data import Division
from core.weights import weights_in
from hpo.api.common import open_dataset, report_data, weights_of
from hpo.api.options import WorkerOptions
from hpo.loggers import TensorBoard
from hpo.report.words import joining, progress_text
from hpo.reporter import Reporter, Silent
from hpo.search.interrupts import Interrupts
from hpo.study import Study, join_study, open_study
from hpo.text import duration
from hpo.workers.placement import place
from hpo.workers.work import Work

MARGIN_S = 120.0
"""Seconds before a worker's limit at which it begins to stop, as a batch queue warns before it kills."""


@dataclass(frozen=True)
class WorkerResult:
    """The outcome of `worker`."""

    study: Study
    out_of_time: bool = False
    """Whether the worker's own time limit ended it."""


def worker(
    options: WorkerOptions, reporter: Reporter | None = None, interrupts: Interrupts | None = None
) -> WorkerResult:
    """Run trials of a study until none is waiting, or a time limit does not allow another.

    Raises:
        HpoError: There is no such study, or it has other images.
        CoreError: The data or a device cannot be used.
        KeyboardInterrupt: Stopped; the running trials are queued again with their checkpoints.
    """
    reporter, interrupts = reporter or Silent(), interrupts or Interrupts()
    with interrupts.let_through():
        if options.tensorboard:
            TensorBoard()  # without its package, before the images are read
        placement = place(options.device, options.devices, options.workers, options.per_device)
        joined = join_study(options.study, storage_url=options.storage)
        space, data = joined.space(), options.data or joined.data_path
        config = space.baseline.data
        dataset = open_dataset(config, data, skip_broken=joined.skip_broken)
        study = open_study(
            space, name=joined.name, dataset=dataset, storage_url=joined.storage_url, data_path=options.data
        )
        study.files.use_store(options.artifacts)
        division = Division(dataset)
        report_data(dataset, division.here(config), reporter)
    work = Work(
        study,
        space,
        division,
        placement,
        data=data,
        skip_broken=joined.skip_broken,
        options=options.trial_options.model_copy(update={"weights": weights_of(study, options.weights)}),
        interrupts=interrupts,
        say=reporter.say,
    )
    try:
        with weights_in(work.options.weights), _limited(options.limit_s, interrupts) as over:
            _train(study, work, reporter)
    except KeyboardInterrupt:
        if over.is_set():
            reporter.say(f"the {duration(options.limit_s or 0)} of this worker are over; its trials are queued again")
            return WorkerResult(study, out_of_time=True)
        reporter.say("stopped: this worker's trials are queued again with their checkpoints; rejoin with")
        reporter.say(f"  {joining(study)}")
        raise
    return WorkerResult(study)


@contextmanager
def _limited(limit_s: float | None, interrupts: Interrupts) -> Iterator[threading.Event]:
    """Stop as by Ctrl-C some time before the limit; the event tells that this is why."""
    over = threading.Event()

    def stop() -> None:
        over.set()
        interrupts.request()

    if limit_s is None:
        yield over
        return
    timer = threading.Timer(limit_s - min(MARGIN_S, limit_s / 10), stop)
    timer.daemon = True
    timer.start()
    try:
        yield over
    finally:
        timer.cancel()
        timer.join()
        if over.is_set():  # perhaps as the last trial ended
            interrupts.withdraw()


def _train(study: Study, work: Work, reporter: Reporter) -> None:
    study.queue.reclaim()
    reporter.say(
        f"joined study {study.name}: {progress_text(study, study.counts().finished)}, "
        f"{study.queue.waiting()} waiting; {work.placement.described()}"
    )
    if study.storage_url != str(study.paths.journal):
        reporter.say(f"its checkpoints and weights go to {study.paths.dir.resolve()}")
    with reporter.study(study) as view:
        while study.queue.claimable() or study.queue.requeue_lost():
            if not work.run(view):
                return
            study.queue.reclaim()
