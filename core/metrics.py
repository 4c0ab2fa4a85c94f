"""What a set of predictions is worth: accuracy, balanced accuracy, macro-F1, log loss, calibration, confusion.

The key choice is that all of it is computed where the logits are, without waiting for the device, and comes over in
one transfer. The definitions are scikit-learn's, with which the tests compare them; the expected calibration error is
that of Guo et al. 2017, arXiv 1706.04599.

How much a score owes to the images that happened to be judged is said by the bootstrap (Efron 1979): the images are
drawn again and again, as many, with replacement. Each score is made of sums over images, so that a drawing is a row of
counts, and many drawings are one product of matrices.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# Guo et al. 2017, section 5: 15 bins of equal width.
ECE_BINS = 15
# Images in the drawings that are counted at once: 8 MB of float64; of 8,000 images 125 drawings.
_DRAWN_AT_ONCE = 1_000_000

METRICS: dict[str, Literal["maximize", "minimize"]] = {
    "accuracy": "maximize",
    "balanced_accuracy": "maximize",
    "macro_f1": "maximize",
    "nll": "minimize",
}
"""What a study may search for, and which way."""


@dataclass(frozen=True)
class Scores:
    """How well predictions fit their labels, each an average over the images unless it says otherwise."""

    loss: float
    """Cross-entropy without smoothing, in nats: the negative log-likelihood."""
    accuracy: float
    balanced_accuracy: float
    """The recall averaged over the classes that have images."""
    macro_f1: float
    """F1 averaged over the classes that have images or were predicted."""
    ece: float
    """Expected calibration error: how far confidence and accuracy lie apart, over 15 bins of confidence."""


def scores(logits: Tensor, labels: Tensor) -> Scores:
    """Every score of these predictions.

    Args:
        logits: (N, K) floats, or log-probabilities, N at least 1. Where some are not numbers, neither is the loss.
        labels: (N,) int64 in [0, K), on the same device.
    """
    logits = logits.double()  # sums over many images, compared between epochs and devices
    counts = confusion(logits, labels).double()
    hits, support, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    present, involved = support > 0, support + predicted > 0
    columns = {
        "loss": F.cross_entropy(logits, labels),
        "accuracy": hits.sum() / len(labels),
        "balanced_accuracy": (hits / support.clamp(min=1)).sum() / present.sum(),
        "macro_f1": (2 * hits / (support + predicted).clamp(min=1)).sum() / involved.sum(),
        "ece": _calibration_error(logits, labels),
    }
    values: list[float] = torch.stack(list(columns.values())).tolist()  # the one transfer
    return Scores(**dict(zip(columns, values, strict=True)))


def bootstrap_intervals(
    logits: Tensor,
    labels: Tensor,
    *,
    generator: torch.Generator,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Between which numbers each score lies in that share of the drawings: percentile intervals over images.

    They say how far another draw of as many such images might take the score of these very predictions, and nothing of
    what another training would give. That of the calibration error lies high, and may lie above the error itself: each
    drawing parts confidence and accuracy a little further.

    Args:
        logits: (N, K) floats, or log-probabilities, N at least 1.
        labels: (N,) int64 in [0, K), on the same device.
        generator: draws the images, on its own device.
        resamples: how many drawings.
        confidence: the share, in (0, 1).

    Returns:
        The name of each field of `Scores` -> (low, high).

    Raises:
        ValueError: there are no drawings, or the share is none.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"{resamples} resamples with a confidence of {confidence}")
    images = len(labels)
    terms = _Terms.of(logits.double(), labels)
    drawn: list[Tensor] = []
    at_once = max(1, _DRAWN_AT_ONCE // images)
    for first in range(0, resamples, at_once):
        shape = (min(at_once, resamples - first), images)
        chosen = torch.randint(images, shape, generator=generator, device=generator.device).to(labels.device)
        counts = torch.zeros(chosen.shape, dtype=torch.int64, device=labels.device)
        counts.scatter_add_(1, chosen, torch.ones_like(chosen))  # integers: exact in any order
        drawn.append(terms.scores(counts.double()))
    tail = (1 - confidence) / 2
    ends = torch.cat(drawn).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64, device=labels.device), dim=0)
    names = [field.name for field in fields(Scores)]
    return {name: (low, high) for name, (low, high) in zip(names, ends.T.tolist(), strict=True)}


@dataclass(frozen=True)
class _Terms:
    """What each image adds to the sums that the scores are made of: (N, ·) float64 each."""

    loss: Tensor
    hits: Tensor
    """(N, K): 1 at the label of an image that is right."""
    truth: Tensor
    """(N, K): 1 at the label."""
    predicted: Tensor
    """(N, K): 1 at the first choice."""
    gaps: Tensor
    """(N, 15): hit less confidence, in the bin of the confidence."""

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> _Terms:
        classes = logits.shape[1]
        choice = logits.argmax(1)
        truth, predicted = (F.one_hot(each, classes).double() for each in (labels, choice))
        loss = F.cross_entropy(logits, labels, reduction="none").unsqueeze(1)
        return cls(loss, truth * predicted, truth, predicted, _calibration_gaps(logits, labels))

    def scores(self, counts: Tensor) -> Tensor:
        """(R, 5): the fields of `Scores` in order, of R drawings that have these counts of the images, (R, N)."""
        images = counts.sum(1)
        hits, support, predicted = counts @ self.hits, counts @ self.truth, counts @ self.predicted  # (R, K)
        present, involved = support > 0, support + predicted > 0
        columns = {
            "loss": (counts @ self.loss).squeeze(1) / images,
            "accuracy": hits.sum(1) / images,
            "balanced_accuracy": (hits / support.clamp(min=1)).sum(1) / present.sum(1),
            "macro_f1": (2 * hits / (support + predicted).clamp(min=1)).sum(1) / involved.sum(1),
            "ece": (counts @ self.gaps).abs().sum(1) / images,
        }
        return torch.stack([columns[field.name] for field in fields(Scores)], dim=1)


def value(scores: Scores, metric: str) -> float:
    """The score of this name in `METRICS`; `nll` is the loss."""
    if metric not in METRICS:
        raise ValueError(f"{metric!r} is no metric; there are {', '.join(METRICS)}")
    found: float = getattr(scores, "loss" if metric == "nll" else metric)
    return found


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """How often each class was taken for each: (K, K) int64 on the device, rows true, columns predicted.

    Args:
        logits: (N, K).
        labels: (N,) int64 in [0, K).
    """
    classes = logits.shape[1]
    cells = labels * classes + logits.argmax(1)  # (N,)
    # Not bincount: on CUDA it waits for the device to learn the largest cell. Integer sums are exact in any order.
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=logits.device)
    return counts.index_add_(0, cells, torch.ones_like(cells)).view(classes, classes)


def per_class(confusion: Tensor, classes: tuple[str, ...]) -> list[dict[str, str | float | int]]:
    """Class by class: `class`, `precision`, `recall`, `f1` (0 where they divide by none), and `support`, its images.

    Args:
        confusion: (K, K), as `confusion` makes it.
        classes: the K names.
    """
    rows: list[list[int]] = confusion.tolist()
    table: list[dict[str, str | float | int]] = []
    for index, (name, row, column) in enumerate(zip(classes, rows, zip(*rows, strict=True), strict=True)):
        hits, support, predicted = row[index], sum(row), sum(column)
        table.append(
            {
                "class": name,
                "precision": hits / max(1, predicted),
                "recall": hits / max(1, support),
                "f1": 2 * hits / max(1, support + predicted),
                "support": support,
            }
        )
    return table


def _calibration_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Over bins (0, 1/15], (1/15, 2/15], …: the gap of accuracy and mean confidence, weighted by the bin's images."""
    return _calibration_gaps(logits, labels).sum(0).abs().sum() / len(labels)


def _calibration_gaps(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, 15): 1 where the image is right, less how sure the model is of it, in the bin of that confidence; else 0."""
    confidence, predicted = logits.softmax(1).max(1)  # (N,), (N,)
    gap = (predicted == labels).double() - confidence
    bins = (confidence * ECE_BINS).ceil().clamp(1, ECE_BINS)  # (N,)
    inside = bins.unsqueeze(1) == torch.arange(1, ECE_BINS + 1, device=logits.device)  # (N, 15)
    # A mask to be summed over, since adding floats by index depends on the order of the device's threads.
    return inside * gap.unsqueeze(1)
