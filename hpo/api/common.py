"""Steps that several commands share: open a data set, watch a training, resume after Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from core.config import DataConfig
from core.data import Dataset, Splits, load_dataset
from core.data.layout import printable
from core.errors import UserError
from core.loop import EpochMetrics
from core.runtime import is_out_of_memory
from hpo.api.options import WorkerOptions
from hpo.paths import cache_root, data_root
from hpo.reporter import Reporter
from hpo.search.interrupts import Interrupts
from hpo.search.training import Watch
from hpo.study import Study


def open_dataset(config: DataConfig, data: Path | None, *, skip_broken: bool) -> Dataset:
    """Load the data set named by the configuration, or the images at `data` instead."""
    return load_dataset(config, data_path=data, data_root=data_root(), cache_dir=cache_root(), skip_broken=skip_broken)


def report_data(dataset: Dataset, splits: Sequence[Splits], reporter: Reporter) -> None:
    """Show the size of a data set and of its splits; with folds, of the first."""
    images, channels, height, width = dataset.images.shape
    reporter.say(
        f"{dataset.name}: {images + dataset.n_test:,} images of {height}×{width}×{channels}, "
        f"{len(dataset.classes)} classes, fingerprint {dataset.fingerprint[:12]}"
    )
    reporter.say(
        f"  {len(splits[0].train):,} for training, {len(splits[0].val):,} for validation, "
        f"{dataset.n_test:,} in the locked test set"
    )
    if dataset.report.broken:
        broken = dataset.report.broken
        reporter.say(f"  {len(broken)} broken files left out, the first: {printable(broken[0])}")
    if len(splits) > 1:
        reporter.say(f"  in the first of {len(splits)} folds; every image is in the validation set of one fold")


@contextmanager
def watching(reporter: Reporter, name: str, *, epochs: int, metric: str, interrupts: Interrupts) -> Iterator[Watch]:
    """Show a progress bar for each of several trainings, one after the other.

    After each epoch, a pending interrupt is raised, where the training saves that epoch.
    """
    with ExitStack() as shown:

        def watch(label: str) -> Callable[[EpochMetrics], None]:
            shown.close()  # the bar of the training before
            title = f"{name}, {label}" if label else name
            show = shown.enter_context(reporter.training(title, epochs=epochs, metric=metric))

            def epoch_ended(epoch: EpochMetrics) -> None:
                show(epoch)
                interrupts.check()

            return epoch_ended

        yield watch


@contextmanager
def explained_memory_errors() -> Iterator[None]:
    """Turn an out-of-memory error of a training outside a study into a `UserError` with advice."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory: not even a small part of a batch fits the device; lower model.width or data.image_size, "
            "or give another --device"
        ) from error


def joining(study: Study) -> str:
    """Return the command line of a worker that joins the study, with its password masked."""
    own = study.storage_url == str(study.paths.journal)
    return WorkerOptions(study=study.name, storage=None if own else study.storage_shown).command()
