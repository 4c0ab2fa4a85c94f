"""Classification metrics and their bootstrap intervals over images, computed on the logits' device.

Definitions are scikit-learn's; the expected calibration error is that of arXiv 1706.04599.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ECE_BINS = 15  # section 5 of the paper
_DRAWN_AT_ONCE = 1_000_000  # images over all resamples: 8 MB of float64

METRICS: dict[str, Literal["maximize", "minimize"]] = {
    "accuracy": "maximize",
    "balanced_accuracy": "maximize",
    "macro_f1": "maximize",
    "nll": "minimize",
}
"""Metrics that a study may optimize."""


@dataclass(frozen=True)
class Scores:
    """Scores of predictions."""

    loss: float
    """Cross-entropy without smoothing, in nats."""
    accuracy: float
    balanced_accuracy: float
    """Mean recall of the classes that have images."""
    macro_f1: float
    """Mean F1 of the classes that have images or predictions."""
    ece: float
    """Expected calibration error."""


def scores(logits: Tensor, labels: Tensor) -> Scores:
    """Score logits (N, K), N at least 1, for labels (N,) int64."""
    logits = logits.double()
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
    values: list[float] = torch.stack(list(columns.values())).tolist()  # the only transfer to the host
    return Scores(**dict(zip(columns, values, strict=True)))


def bootstrap_intervals(
    logits: Tensor,
    labels: Tensor,
    *,
    generator: torch.Generator,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Return a percentile bootstrap interval (low, high) over images for each score.

    That of the calibration error is biased upwards, since resampling adds miscalibration. If all predictions are
    correct, or all wrong, resampling shows no variation; accuracies and F1 then have Wilson's interval (Wilson 1927).
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"{resamples} resamples with a confidence of {confidence}")
    images = len(labels)
    names = [field.name for field in fields(Scores)]
    terms = _Terms.of(logits.double(), labels)
    drawn: list[Tensor] = []
    at_once = max(1, _DRAWN_AT_ONCE // images)
    for first in range(0, resamples, at_once):
        shape = (min(at_once, resamples - first), images)
        chosen = torch.randint(images, shape, generator=generator, device=generator.device).to(labels.device)
        counts = torch.zeros(chosen.shape, dtype=torch.int64, device=labels.device)
        weights = counts.scatter_add_(1, chosen, torch.ones_like(chosen)).double()
        drawn.append(torch.stack([terms.score(name, weights) for name in names], dim=1))
    tail = (1 - confidence) / 2
    ends = torch.cat(drawn).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64, device=labels.device), dim=0)
    intervals = {name: (low, high) for name, (low, high) in zip(names, ends.T.tolist(), strict=True)}
    return intervals | _where_all_are_alike(logits, labels, confidence)


@dataclass(frozen=True)
class Gain:
    """How much better one set of predictions scores than another on the same images."""

    value: float
    """Difference of the metric; positive is better."""
    error: float
    """Standard deviation of that difference if both sets are equally good."""
    chance: float
    """Probability of a difference at least as large if both are equally good, one-sided."""


def paired_gain(
    logits: Tensor,
    others: Tensor,
    labels: Tensor,
    metric: str,
    *,
    generator: torch.Generator,
    images: Tensor | None = None,
    draws: int = 1000,
) -> Gain:
    """Test whether logits (N, K) score better than `others` (N, K) by a permutation test.

    Under the null hypothesis the two predictions of an image may be exchanged (Fisher 1935; the probability counts the
    observed difference as one of the draws, after Phipson and Smyth 2010, doi 10.2202/1544-6115.1585).

    Args:
        images: (N,) int64, the image of each prediction, if some have several: theirs are exchanged together, since
            they are not independent.
    """
    name = "loss" if metric == "nll" else metric
    sign = 1 if METRICS[metric] == "maximize" else -1
    terms = _Terms.of(torch.cat([logits, others]).double(), torch.cat([labels, labels]))

    whose = torch.arange(len(labels)) if images is None else images.cpu()
    distinct, unit_of = torch.unique(whose, return_inverse=True)
    units, unit_of = len(distinct), unit_of.to(labels.device)

    def difference(kept: Tensor) -> Tensor:
        """The gain (R,) where the predictions of images (R, N) that are not kept are exchanged."""
        ours, theirs = torch.cat([kept, 1 - kept], dim=1), torch.cat([1 - kept, kept], dim=1)
        return sign * (terms.score(name, ours) - terms.score(name, theirs))

    drawn = []
    at_once = max(1, _DRAWN_AT_ONCE // len(terms.loss))
    for first in range(0, draws, at_once):
        shape = (min(at_once, draws - first), units)
        kept = torch.randint(2, shape, generator=generator, device=generator.device, dtype=torch.float64)
        drawn.append(difference(kept.to(labels.device)[:, unit_of]))
    exchanged, found = torch.cat(drawn), difference(torch.ones(1, len(labels), device=labels.device).double())
    as_large = int((exchanged >= found - 1e-12).sum())
    return Gain(float(found), float(exchanged.std()), (as_large + 1) / (draws + 1))


def _where_all_are_alike(logits: Tensor, labels: Tensor, confidence: float) -> dict[str, tuple[float, float]]:
    """Wilson's intervals if all predictions are correct or all are wrong, which every resample repeats; else nothing.

    Those of balanced accuracy and macro-F1 are means over the classes, and wider than need be.
    """
    hits = int((logits.argmax(1) == labels).sum())
    if 0 < hits < len(labels):
        return {}
    whole = _wilson(hits, len(labels), confidence)
    sizes = [size for size in labels.bincount().tolist() if size]
    bounds = [_wilson(size if hits else 0, size, confidence) for size in sizes]
    low, high = (sum(ends) / len(bounds) for ends in zip(*bounds, strict=True))
    return {"accuracy": whole, "balanced_accuracy": (low, high), "macro_f1": (low, high)}


def _wilson(hits: int, count: int, confidence: float) -> tuple[float, float]:
    from scipy.stats import binomtest

    interval = binomtest(hits, count).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class _Terms:
    """Each image's terms of the sums of scores, for matrix products with resamples: (N, ·) float64."""

    loss: Tensor  # (N, 1)
    hits: Tensor  # (N, K): 1 at the label if the prediction is correct
    truth: Tensor  # (N, K)
    predicted: Tensor  # (N, K)
    gaps: Tensor  # (N, 15)

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> _Terms:
        classes = logits.shape[1]
        choice = logits.argmax(1)
        truth, predicted = (F.one_hot(each, classes).double() for each in (labels, choice))
        loss = F.cross_entropy(logits, labels, reduction="none").unsqueeze(1)
        return cls(loss, truth * predicted, truth, predicted, _calibration_gaps(logits, labels))

    def score(self, name: str, counts: Tensor) -> Tensor:
        """Return a field of `Scores` for resamples with these counts of images (R, N): (R,)."""
        images = counts.sum(1)
        if name == "loss":
            return (counts @ self.loss).squeeze(1) / images
        if name == "accuracy":
            return counts @ self.hits.sum(1) / images
        if name == "ece":
            return (counts @ self.gaps).abs().sum(1) / images
        hits, support = counts @ self.hits, counts @ self.truth  # (R, K)
        if name == "balanced_accuracy":
            return (hits / support.clamp(min=1)).sum(1) / (support > 0).sum(1)
        assert name == "macro_f1", name
        both = support + counts @ self.predicted
        return (2 * hits / both.clamp(min=1)).sum(1) / (both > 0).sum(1)


def value(scores: Scores, metric: str) -> float:
    """Return the score of a metric in `METRICS`."""
    if metric not in METRICS:
        raise ValueError(f"{metric!r} is not a metric; choose from {', '.join(METRICS)}")
    found: float = getattr(scores, "loss" if metric == "nll" else metric)
    return found


def standard_error(logits: Tensor, labels: Tensor, metric: str) -> float:
    """Return the standard error of a metric in `METRICS`, by the number of images; positive.

    The error of a proportion counts one more hit and one more miss (Agresti and Coull 1998), so that it is not 0 where
    all predictions are alike. That of macro-F1 is approximated by that of the balanced accuracy.
    """
    if metric == "nll":
        losses = F.cross_entropy(logits.double(), labels, reduction="none")
        return max(float(losses.std(correction=0)) / math.sqrt(len(labels)), math.ulp(1.0))
    counts = confusion(logits, labels).double()
    return _proportion_error(counts.diagonal(), counts.sum(1), metric)


def standard_error_at(level: float, labels: Tensor, metric: str) -> float:
    """Return the standard error of an accuracy, balanced accuracy or macro-F1 of this level, alike in all classes."""
    support = labels.bincount().double()
    return _proportion_error(level * support, support, metric)


def _proportion_error(hits: Tensor, support: Tensor, metric: str) -> float:
    """The standard error of a metric, from the hits and the images of each class (K,)."""
    if metric == "accuracy":
        return float(_proportion_variance(hits.sum(), support.sum()).sqrt())
    present = support > 0
    return float(_proportion_variance(hits[present], support[present]).sum().sqrt() / present.sum())


def _proportion_variance(hits: Tensor, images: Tensor) -> Tensor:
    share = (hits + 1) / (images + 2)
    return share * (1 - share) / images


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Count predictions (columns) of each class (rows): (K, K) int64."""
    classes = logits.shape[1]
    cells = labels * classes + logits.argmax(1)  # (N,)
    # bincount would wait for the device.
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=logits.device)
    return counts.index_add_(0, cells, torch.ones_like(cells)).view(classes, classes)


def per_class(confusion: Tensor, classes: tuple[str, ...]) -> list[dict[str, str | float | int]]:
    """Return the precision, recall, F1 (0 if undefined) and support of each class."""
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
    """Gap of accuracy and mean confidence over bins, weighted by images."""
    return _calibration_gaps(logits, labels).sum(0).abs().sum() / len(labels)


def _calibration_gaps(logits: Tensor, labels: Tensor) -> Tensor:
    """Correctness minus confidence of each image, in its bin (0, 1/15], (1/15, 2/15], …: (N, 15), else 0."""
    confidence, predicted = logits.softmax(1).max(1)  # (N,), (N,)
    gap = (predicted == labels).double() - confidence
    bins = (confidence * ECE_BINS).ceil().clamp(1, ECE_BINS)  # (N,)
    inside = bins.unsqueeze(1) == torch.arange(1, ECE_BINS + 1, device=logits.device)  # (N, 15)
    # index_add_ of floats is not deterministic on CUDA.
    return inside * gap.unsqueeze(1)
