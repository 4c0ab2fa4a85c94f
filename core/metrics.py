"""What a set of predictions is worth: accuracy, balanced accuracy, macro-F1, log loss, calibration, confusion.

The key choice is that all of it is computed where the logits are, without waiting for the device, and comes over in
one transfer. The definitions are scikit-learn's, with which the tests compare them; the expected calibration error is
that of Guo et al. 2017, arXiv 1706.04599.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# Guo et al. 2017, section 5: 15 bins of equal width.
ECE_BINS = 15

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
    confidence, predicted = logits.softmax(1).max(1)  # (N,), (N,)
    gap = (predicted == labels).double() - confidence
    bins = (confidence * ECE_BINS).ceil().clamp(1, ECE_BINS)  # (N,)
    inside = bins.unsqueeze(1) == torch.arange(1, ECE_BINS + 1, device=logits.device)  # (N, 15)
    # A sum over a mask, since adding floats by index depends on the order of the device's threads.
    return (inside * gap.unsqueeze(1)).sum(0).abs().sum() / len(labels)
