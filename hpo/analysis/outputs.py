"""What is known of images without a network: a trial's predictions that were kept, and what a refit wrote down.

A trial among the best keeps what its network said of its validation images (`logits` and `indices`), with folds that of
each fold's network of its own, so that every image is judged by one that has not seen it. Test images are never looked
at here: of them there is what a refit wrote down.

Images and predictions may be on another machine. Then `Missing` says what is not here, and how to have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpo.analysis.facts import Facts
from hpo.report.page import code, paragraph

if TYPE_CHECKING:
    from core.data import Dataset


@dataclass(frozen=True)
class Judged:
    """What a trial's network, or those of its folds, said of images that it had not seen."""

    trial: int
    why: str
    """Why this trial, in words: `the winner`, `the best trial`."""
    probabilities: NDArray[np.float32]
    """(M, K)"""
    labels: NDArray[np.int64]
    """(M,)"""
    indices: NDArray[np.int64]
    """(M,), positions in `Dataset.images`."""
    classes: tuple[str, ...]

    @property
    def predicted(self) -> NDArray[np.int64]:
        """(M,)"""
        return np.asarray(self.probabilities.argmax(1), dtype=np.int64)

    @property
    def table(self) -> NDArray[np.int64]:
        """(K, K) counts, rows are true classes."""
        size = len(self.classes)
        return np.bincount(self.labels * size + self.predicted, minlength=size * size).reshape(size, size)


@dataclass(frozen=True)
class Missing:
    """Why there is nothing to show, in words, and what to do."""

    why: str
    commands: tuple[str, ...] = ()

    @property
    def body(self) -> list[str]:
        """The same as HTML."""
        return [paragraph(self.why), *([code("\n".join(self.commands))] if self.commands else [])]


def judged(facts: Facts) -> Judged | Missing:
    """What the winner's trial said of its validation images, or the best trial, where the winner's was not kept."""
    numbers = wanted(facts)
    if not numbers:
        return Missing("No trial is complete yet.")
    dataset = facts.dataset()
    if dataset is None:
        return no_images(facts)
    for number, why in numbers:
        files = [facts.study.paths.trial_validation(number, fold) for fold in range(1, facts.folds + 1)]
        if all(file.exists() for file in files):
            return _read(files, dataset, number, why)
    number, why = numbers[0]
    return Missing(
        f"What {why}, trial {number}, said of its validation images is not here "
        f"(`{facts.study.paths.inside(facts.study.paths.trial_validation(number))}`). It is kept with the weights of "
        "the best trials, on the machine that trained them. Copy the file from there, "
        "or train the trial again as a submission model, whose confusion on the test images is then shown here:",
        (f"hpo refit {number} --study {facts.study.name}",),
    )


def wanted(facts: Facts) -> list[tuple[int, str]]:
    """(trial, why it) to be shown, the first choice first."""
    found: list[tuple[int, str]] = []
    one, why = facts.confirmation, "the best trial of the search"
    if one is not None:
        number = one.contender(one.winner).trial
        if number is not None:
            found.append((number, "the confirmed winner"))
            why += ", for the confirmed winner's predictions were not kept"
        else:
            why += f", for the confirmed winner, {one.winner}, is none of its trials"
    if facts.best is not None and facts.best.number not in [number for number, _ in found]:
        found.append((facts.best.number, why))
    return found


def no_images(facts: Facts) -> Missing:
    """What to say where the images are not at hand."""
    return Missing(
        f"The images are not here: {facts.dataset_missing}. With them, this is shown:",
        (f"hpo report {facts.study.name} --data IMAGES",),
    )


def _read(files: Sequence[Path], dataset: Dataset, number: int, why: str) -> Judged:
    """Every fold's validation images, one after the other: with folds each image once."""
    from safetensors.numpy import load_file

    parts = [load_file(file) for file in files]
    logits = np.concatenate([part["logits"] for part in parts]).astype(np.float64)
    indices = np.concatenate([part["indices"] for part in parts])
    grown = np.exp(logits - logits.max(1, keepdims=True))
    return Judged(
        number,
        why,
        (grown / grown.sum(1, keepdims=True)).astype(np.float32),
        dataset.labels.numpy()[indices],
        indices,
        dataset.classes,
    )


@dataclass(frozen=True)
class Tested:
    """What a refit wrote down of the test images."""

    label: str
    report: Mapping[str, Any]
    """The `test` of its `metrics.json`."""

    @property
    def name(self) -> str:
        return f"refit `{self.label}`"

    @property
    def table(self) -> NDArray[np.int64] | None:
        """(K, K) counts; None in those that older versions wrote."""
        counts = self.report.get("confusion")
        return None if counts is None else np.asarray(counts, dtype=np.int64)

    @property
    def per_class(self) -> list[dict[str, Any]]:
        return list(self.report["with_tta"]["per_class"])

    @property
    def images(self) -> int:
        return int(self.report["images"])


def tested(facts: Facts) -> Tested | None:
    """The refit of the best trial, or the first one that there is; None without a refit."""
    labels = sorted(facts.refits, key=lambda label: (label != "best", label))
    return Tested(labels[0], facts.refits[labels[0]]["test"]) if labels else None
