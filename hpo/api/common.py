"""Steps that several commands share: open a data set, show trainings, train a study's trials."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from core.config import DataConfig
from core.data import Dataset, Splits, load_dataset
from core.errors import GraphError, UserError
from core.loop import EpochMetrics
from core.runtime import is_out_of_memory
from core.text import count, printable
from hpo.paths import cache_root, data_root
from hpo.reporter import Reporter, Silent, StudyView
from hpo.search.interrupts import Interrupts
from hpo.search.loop import Estimate, estimate, wait_for_others
from hpo.search.training import Watch
from hpo.study import Study
from hpo.text import data_facts, done_and_safe, duration
from hpo.workers.work import Work


def open_dataset(
    config: DataConfig, data: Path | None, *, skip_broken: bool, reporter: Reporter | None = None
) -> Dataset:
    """Load the data set named by the configuration, or the images at `data` instead, and show the progress."""
    with (reporter or Silent()).reading(config.name if data is None else data.name) as on_progress:
        return load_dataset(
            config,
            data_path=data,
            data_root=data_root(),
            cache_dir=cache_root(),
            skip_broken=skip_broken,
            on_progress=on_progress,
        )


def weights_of(study: Study, given: Path | None) -> Path | None:
    """Return the given folder of pretrained weights, or the one that the study was run with."""
    remembered = study.settings.weights
    return Path(remembered) if given is None and remembered is not None else given


_CLASSES_SHOWN = 10


def report_data(dataset: Dataset, splits: Sequence[Splits], reporter: Reporter) -> None:
    """Show how a data set was understood, its size, and that of its splits; with folds, of the first."""
    images, channels, height, width = dataset.images.shape
    reporter.say(
        f"{dataset.name}: {images + dataset.n_test:,} images of {height}×{width}×{channels}, "
        f"{len(dataset.classes)} classes, fingerprint {dataset.fingerprint[:12]}"
    )
    reporter.say(
        f"  {len(splits[0].train):,} for training, {len(splits[0].val):,} for validation, "
        f"{dataset.n_test:,} in the locked test set"
    )
    content = {**dataset.report.plain(), "broken": 0}  # told below, with the first of them
    for heading, text in data_facts(content, most=_CLASSES_SHOWN).items():
        reporter.say(f"  {heading}: {text}")
    if dataset.report.broken:
        reporter.say(broken_files(dataset.report.broken))
    if len(splits) > 1:
        reporter.say(f"  in the first of {len(splits)} folds; every image is in the validation set of one fold")


def broken_files(names: Sequence[str]) -> str:
    """Describe the files that were left out because they cannot be read."""
    return f"  {count(len(names), 'broken file')} left out, the first: {printable(names[0])}"


@contextmanager
def trainings(reporter: Reporter, name: str, *, epochs: int, metric: str, interrupts: Interrupts) -> Iterator[Watch]:
    """Show trainings outside a study, one after the other, and explain how they end early.

    After each epoch, when the training has saved it, a pending interrupt is raised.
    """
    shown = ExitStack()

    def watch(label: str) -> Callable[[EpochMetrics], None]:
        shown.close()  # the bar of the training before
        title = f"{name}, {label}" if label else name
        show = shown.enter_context(reporter.training(title, epochs=epochs, metric=metric))

        def epoch_ended(epoch: EpochMetrics) -> None:
            show(epoch)
            interrupts.check()

        return epoch_ended

    try:
        with interrupts.patient(), shown:
            yield watch
    except KeyboardInterrupt:
        reporter.say("stopped; the same command resumes from the last checkpoint")
        raise
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory: not even a small part of a batch fits the device; lower model.width or data.image_size, "
            "or give another --device"
        ) from error


@contextmanager
def resumable(study: Study, noun: str, command: str, reporter: Reporter) -> Iterator[None]:
    """Report the finished trials of a stopped study, and the command that resumes it."""
    try:
        yield
    except (KeyboardInterrupt, GraphError):
        reporter.say(f"stopped: {done_and_safe(study.counts().finished, study.total, noun)}; resume with")
        reporter.say(f"  {command}")
        raise


def report_estimate(
    work: Work, reporter: Reporter, *, trials: int, recipes: int = 0, noun: str = "trial", ending: str = ""
) -> Estimate:
    """Show the time that waiting trials, and recipes beside the study, take on this device, from a few timed steps."""
    with work.interrupts.let_through():
        found = estimate(work.space, work.images(), trials=trials, recipes=recipes, device=work.device)
    whole = duration(found.in_full_s)
    pruned = found.pruned_s < found.in_full_s
    time = f"about {duration(found.pruned_s)}, {whole} without pruning" if pruned else f"up to {whole}"
    beside = f", including {count(recipes, 'recipe')} trained beside the study" if recipes else ""
    alone = "" if work.inline else f", one {noun} at a time"
    reporter.say(f"this will take {time}{beside}{alone}{ending}")
    reporter.say("Ctrl-C stops it; the same command resumes it")
    return found


def train_all(work: Work, view: StudyView) -> bool:
    """Train a study's trials until none is waiting or running, here or in another process.

    Returns:
        False if the study's deadline or patience does not allow another trial.
    """
    queue = work.study.queue
    while queue.claimable() or wait_for_others(work.study, work.interrupts) or queue.requeue_lost():
        if not work.run(view):
            return False
    return True
