"""`hpo worker`: joins a study that was begun elsewhere, or here."""

from __future__ import annotations

from pathlib import Path

from core.data import Division
from hpo.analysis.summary import summarize
from hpo.api.common import joining, open_dataset, say_data, say_patience
from hpo.cli.console import say
from hpo.cli.progress import StudyProgress
from hpo.cli.scores import say_folds
from hpo.search.interrupts import Interrupts
from hpo.search.options import TrialOptions
from hpo.study import join_study
from hpo.workers.placement import place
from hpo.workers.work import Work


def worker_command(
    name: str,
    *,
    storage: str | None,
    data: Path | None,
    device_name: str | None,
    devices: str | None,
    workers: int | None,
    per_device: str | None,
    keep_gb: float | None,
    artifacts: str | None,
) -> None:
    """Runs trials of the study until none waits."""
    placement = place(device_name, devices, workers, per_device)
    joined = join_study(name, storage_url=storage)
    where = data or joined.data_path
    dataset = open_dataset(joined.space.baseline.data, where, skip_broken=joined.skip_broken)
    study = joined.open(dataset, data_path=data)
    study.use_depot(artifacts)
    division = Division(dataset)
    splits = division.here(joined.space.baseline.data)
    say_data(dataset, splits[0])
    say_folds(splits)
    with Interrupts(told=say_patience) as interrupts:
        study.queue.reap()
        now = summarize(study)
        total = study.total or 0
        say(
            f"joined study {study.name}: {now.counts.finished} of {total} trials finished, "
            f"{study.queue.waiting()} wait; {placement.described()}"
        )
        work = Work(
            study,
            joined.space,
            division,
            placement,
            data=where,
            skip_broken=joined.skip_broken,
            options=TrialOptions(keep_gb=keep_gb),
            interrupts=interrupts,
            say=say,
        )
        try:
            with StudyProgress(study) as progress:
                while study.queue.waiting() or study.queue.requeue_lost():
                    work.run(progress)
                    study.queue.reap()
        except KeyboardInterrupt:
            say("stopped: what this worker trained waits again, and goes on from its checkpoint; join again with")
            say(f"  {joining(study)}")
            raise
    counts = study.counts()
    others = f"; {counts.running} run in other workers" if counts.running else ""
    say(f"no trial waits any more: {counts.finished} of {total} are finished{others}")
