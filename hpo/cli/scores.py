"""How trainings are watched, and what they came to, as several commands say it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from core.data import Splits
from core.loop import EpochMetrics
from hpo import text
from hpo.cli.console import TrainProgress, say, table
from hpo.search.interrupts import Interrupts
from hpo.search.training import Watch

METRIC_WORDS = {**text.METRIC_WORDS, "nll": "loss"}
"""Every metric of `core.metrics.METRICS`, as a person calls it."""

# Where the largest class has less than this times the images of the smallest, accuracy says what class by class would.
IMBALANCE = 1.5
# Classes: a longer table is no more to be read at a glance; `result.json` and `metrics.json` have every row.
SHOWN_CLASSES = 30


@contextmanager
def training_bars(name: str, *, epochs: int, metric: str, interrupts: Interrupts) -> Iterator[Watch]:
    """A progress bar for each training, one after the other; what is yielded is told when one begins.

    After each epoch an interrupt that was asked for is raised, where the training saves that epoch.
    """
    with ExitStack() as shown:

        def watch(label: str) -> Callable[[EpochMetrics], None]:
            shown.close()  # the bar of the training before
            title = f"{name}, {label}" if label else name
            bar = shown.enter_context(TrainProgress(title, epochs=epochs, metric=metric))

            def epoch_ended(epoch: EpochMetrics) -> None:
                bar.epoch_ended(epoch)
                interrupts.check()

            return epoch_ended

        yield watch


def say_folds(splits: Sequence[Splits]) -> None:
    """That there are folds, of which the line above told the first one's numbers."""
    if len(splits) > 1:
        say(f"  in the first of {len(splits)} folds; every image validates in one of them")


def say_per_class(rows: Sequence[Mapping[str, Any]], labels: Tensor, *, images: str) -> None:
    """A table class by class, where the data set is imbalanced and has few enough classes to be read.

    Args:
        rows: of `core.metrics.per_class`.
        labels: (N,) int64, of the data set without its test images: what decides whether it is imbalanced.
        images: what the rows were counted on, in words.
    """
    if not is_imbalanced(labels) or len(rows) > SHOWN_CLASSES:
        return
    say(f"class by class, {images}:")
    table(
        ["class", "images", "precision", "recall", "F1"],
        [[row["class"], row["support"], *(f"{row[key]:.4f}" for key in ("precision", "recall", "f1"))] for row in rows],
        right=(1, 2, 3, 4),
    )


def is_imbalanced(labels: Tensor) -> bool:
    """Whether the largest class has at least `IMBALANCE` times the images of the smallest."""
    counts = torch.bincount(labels)
    return bool(counts.max() >= IMBALANCE * counts.min())
