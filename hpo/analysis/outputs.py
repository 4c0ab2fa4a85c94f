"""Outputs of trained networks on images: the stored validation outputs of a trial, and the test scores of a refit.

The best trials store the logits of their validation images, with folds those of each fold's own network, so that no
image was seen in training. Both the images and the outputs may be on another machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.analysis.study_data import StudyData
from hpo.confirmation.result import Contender


@dataclass(frozen=True)
class Choice:
    """A trial whose outputs may be shown."""

    trial: int
    winner: Contender | None
    """The confirmed winner, of this or another trial; None without a confirmation."""

    @property
    def is_winner(self) -> bool:
        """Whether the trial is the confirmed winner."""
        return self.winner is not None and self.winner.trial == self.trial


@dataclass(frozen=True)
class Outputs:
    """The class probabilities of a trial's validation images."""

    choice: Choice
    probabilities: NDArray[np.float32]
    """(M, K)"""
    labels: NDArray[np.int64]
    """(M,)"""
    indices: NDArray[np.int64]
    """(M,), positions in `Dataset.images`."""
    classes: tuple[str, ...]

    @property
    def predicted(self) -> NDArray[np.int64]:
        """Predicted classes, (M,)."""
        return np.asarray(self.probabilities.argmax(1), dtype=np.int64)

    @property
    def confusion(self) -> NDArray[np.int64]:
        """(K, K) counts, rows are true classes."""
        size = len(self.classes)
        return np.bincount(self.labels * size + self.predicted, minlength=size * size).reshape(size, size)


@dataclass(frozen=True)
class RefitScores:
    """The `test` part of a refit's `metrics.json`."""

    label: str
    report: Mapping[str, Any]

    @property
    def confusion(self) -> NDArray[np.int64] | None:
        """(K, K) counts; None if written by an older version."""
        counts = self.report.get("confusion")
        return None if counts is None else np.asarray(counts, dtype=np.int64)

    @property
    def per_class(self) -> list[dict[str, Any]]:
        """The rows of `core.metrics.per_class`."""
        return list(self.report["with_tta"]["per_class"])


def choices(data: StudyData) -> list[Choice]:
    """The trials whose outputs may be shown, in order of preference: the confirmed winner, then the best trial."""
    winner = None if data.confirmation is None else data.confirmation.contender(data.confirmation.winner)
    numbers = [None if winner is None else winner.trial, None if data.best is None else data.best.number]
    return [Choice(number, winner) for number in dict.fromkeys(numbers) if number is not None]


def read_outputs(data: StudyData) -> Outputs | None:
    """Read the outputs of the first of `choices` whose files exist; None without images or files."""
    from safetensors.numpy import load_file

    if data.dataset is None:
        return None
    for choice in choices(data):
        files = [data.study.paths.trial_validation(choice.trial, fold) for fold in range(1, data.folds + 1)]
        if all(file.exists() for file in files):
            parts = [load_file(file) for file in files]
            logits = np.concatenate([part["logits"] for part in parts]).astype(np.float64)
            indices = np.concatenate([part["indices"] for part in parts])
            exp = np.exp(logits - logits.max(1, keepdims=True))
            probabilities = (exp / exp.sum(1, keepdims=True)).astype(np.float32)
            labels = data.dataset.labels.numpy()[indices]
            return Outputs(choice, probabilities, labels, indices, data.dataset.classes)
    return None


def refit_scores(data: StudyData) -> RefitScores | None:
    """The test scores of the refit of the best trial, or of the first refit; None without a refit."""
    label = min(data.refits, key=lambda label: (label != "best", label), default=None)
    return None if label is None else RefitScores(label, data.refits[label]["test"])
