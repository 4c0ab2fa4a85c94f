"""Order of the images in one epoch, computed on the device without host synchronization.

A class of n images has min(k · n, cap) visits per epoch, where k is `oversample` and cap is the fraction `undersample`
of the largest class (compare Buda et al. 2018, arXiv 1710.05381). `shuffled` spreads them evenly over its images.
`balanced` draws with replacement with every class equally likely (Shen et al. 2016, arXiv 1512.05830).
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.config import SamplingConfig


def epoch_length(labels: Tensor, config: SamplingConfig) -> int:
    """Return the number of visits per epoch for labels (n,) int64 in [0, n). Waits for the device."""
    if _visits_each_once(config):
        return len(labels)
    return int(_visits(_class_counts(labels), config).sum())


def epoch_order(labels: Tensor, config: SamplingConfig, generator: torch.Generator, length: int) -> Tensor:
    """Draw the order of one epoch: (length,) int64 positions in labels (n,), on their device."""
    n, device = len(labels), labels.device
    if config.name == "balanced":
        weights = _class_counts(labels)[labels].double().reciprocal()
        return torch.multinomial(weights, length, replacement=True, generator=generator)
    shuffled = torch.randperm(n, generator=generator, device=device)
    if _visits_each_once(config):
        return shuffled
    counts = _class_counts(labels)
    # Images by class, in random order within it: the first `visits % count` of a class are shown once more.
    by_class = shuffled[torch.sort(labels[shuffled], stable=True).indices]
    classes = labels[by_class]
    rank = torch.arange(n, device=device) - (counts.cumsum(0) - counts)[classes]  # rank within the class
    visits, count = _visits(counts, config)[classes], counts[classes]
    times = visits // count + (rank < visits % count)
    # Without `output_size` this would wait for the device to compute the sum of `times`.
    visited = by_class.repeat_interleave(times, output_size=length)
    return visited[torch.randperm(length, generator=generator, device=device)]


def repeats(order: Tensor) -> Tensor:
    """Mark the visits after the first one of each position in the order of an epoch: (length,) bool."""
    grouped, visits = torch.sort(order, stable=True)  # stable: keeps the visits of a position in order
    again = torch.zeros_like(order, dtype=torch.bool)
    again[1:] = grouped[1:] == grouped[:-1]
    return torch.empty_like(again).scatter_(0, visits, again)


def _visits_each_once(config: SamplingConfig) -> bool:
    return config.oversample == 1 and config.undersample == 1


def _class_counts(labels: Tensor) -> Tensor:
    """Count the images of each class: (n,) int64, zero beyond the last class.

    Uses scatter instead of bincount, which would wait for the device to determine the number of bins.
    """
    return torch.zeros_like(labels).scatter_add_(0, labels, torch.ones_like(labels))


def _visits(counts: Tensor, config: SamplingConfig) -> Tensor:
    cap = (counts.max().double() * config.undersample).round().clamp(min=1).long()
    return torch.minimum(counts * config.oversample, cap)
