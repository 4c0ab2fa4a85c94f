"""What several commands do alike: open a data set, and say what is in it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.config import DataConfig
from core.data import Dataset, Splits, load_dataset
from core.data.layout import printable
from core.errors import UserError
from core.runtime import is_out_of_memory
from hpo.cli.console import say
from hpo.paths import cache_root, data_root
from hpo.study import Study


def open_dataset(config: DataConfig, data: Path | None, *, skip_broken: bool) -> Dataset:
    """The data set that the configuration names, or the images at `data` in its place."""
    return load_dataset(config, data_path=data, data_root=data_root(), cache_dir=cache_root(), skip_broken=skip_broken)


@contextmanager
def memory_told() -> Iterator[None]:
    """Turns a lack of memory, in a training that no study is there to go on without, into a line on what to do."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory: not even a small part of a batch fits the device; lower model.width or data.image_size, "
            "or give another --device"
        ) from error


def say_data(dataset: Dataset, splits: Splits) -> None:
    """Two lines: what there is, and how it is divided."""
    images, channels, height, width = dataset.images.shape
    say(
        f"{dataset.name}: {images + dataset.n_test:,} images of {height}×{width}×{channels}, "
        f"{len(dataset.classes)} classes, fingerprint {dataset.fingerprint[:12]}"
    )
    say(
        f"  {len(splits.train):,} to train, {len(splits.val):,} to validate, "
        f"{dataset.n_test:,} locked away for the test"
    )
    if dataset.report.broken:
        say(f"  {len(dataset.report.broken)} broken files left out, the first: {printable(dataset.report.broken[0])}")


def joining(study: Study) -> str:
    """The command line of a worker that joins the study; a password in it is masked."""
    storage = [] if study.storage_url == str(study.paths.journal) else ["--storage", study.storage_shown]
    return shlex.join(["hpo", "worker", study.name, *storage])


def say_patience() -> None:
    """What a first Ctrl-C does."""
    say("stopping: a running epoch is finished and saved first; Ctrl-C once more stops at once")
