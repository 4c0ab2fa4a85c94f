"""Outputs of trained networks on images: the stored validation outputs of a trial, and the scores of a refit.

The best trials store the logits of their validation images, with folds those of each fold's own network. Both the
images and the outputs may be on another machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpo.analysis.study_data import StudyData
from hpo.confirmation.result import Contender


class Choice(NamedTuple):
    """A trial whose outputs may be shown."""

    trial: int
    winner: Contender | None
    """The confirmed winner, of this or another trial; None without a confirmation."""


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
        return np.asarray(self.probabilities.argmax(1), dtype=np.int64)

    @property
    def confusion(self) -> NDArray[np.int64]:
        """(K, K) counts, rows are true classes."""
        size = len(self.classes)
        return np.bincount(self.labels * size + self.predicted, minlength=size * size).reshape(size, size)


@dataclass(frozen=True)
class Refit:
    """A submission model."""

    label: str
    report: Mapping[str, Any]

    @property
    def origin(self) -> str:
        """`trial 12` or `recipe NAME`."""
        trial = self.report.get("trial")
        return f"recipe {self.report.get('recipe')}" if trial is None else f"trial {trial}"

    def score(self, part: str, metric: str) -> float | None:
        """The score on `val` or `test` images."""
        found: float | None = self.report[part]["with_tta"].get(_key(metric))
        return found

    def interval(self, metric: str) -> tuple[float, float] | None:
        """Bootstrap interval of the test score; None from an older version."""
        found: tuple[float, float] | None = self.report["test"]["with_tta"].get("intervals", {}).get(_key(metric))
        return found

    @property
    def confusion(self) -> NDArray[np.int64] | None:
        """(K, K) counts of the test images; None from an older version."""
        counts = self.report["test"].get("confusion")
        return None if counts is None else np.asarray(counts, dtype=np.int64)

    @property
    def per_class(self) -> list[dict[str, Any]]:
        return list(self.report["test"]["with_tta"]["per_class"])


def _key(metric: str) -> str:
    """The metric's name among a refit's scores."""
    return "loss" if metric == "nll" else metric


def refits(data: StudyData) -> list[Refit]:
    """The submission models: the best trial's, its variants, the others."""
    labels = sorted(data.refits, key=lambda label: (label != "best", not label.startswith("best"), label))
    return [Refit(label, data.refits[label]) for label in labels]


def choices(data: StudyData) -> list[Choice]:
    """The trials whose outputs may be shown, in order of preference: the confirmed winner, then the best trial."""
    winner = None if data.confirmation is None else data.confirmation.contender(data.confirmation.winner)
    numbers = [None if winner is None else winner.trial, None if data.best is None else data.best.number]
    return [Choice(number, winner) for number in dict.fromkeys(numbers) if number is not None]


def read_outputs(data: StudyData) -> Outputs | None:
    """Read the outputs of the first of `choices` with files; None without images or files."""
    from safetensors.numpy import load_file
    from scipy.special import softmax

    if data.dataset is None:
        return None
    for choice in choices(data):
        files = [data.study.paths.trial_validation(choice.trial, fold) for fold in range(1, data.folds + 1)]
        if all(file.exists() for file in files):
            parts = [load_file(file) for file in files]
            logits = np.concatenate([part["logits"] for part in parts]).astype(np.float64)
            indices = np.concatenate([part["indices"] for part in parts])
            labels = data.dataset.labels.numpy()[indices]
            return Outputs(choice, softmax(logits, 1).astype(np.float32), labels, indices, data.dataset.classes)
    return None
