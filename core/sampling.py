"""Order of the images in an epoch, drawn on the device without synchronization.

A class of n images has min(k · n, cap) visits, where k is `oversample` and cap is the fraction `undersample` of the
largest class (compare arXiv 1710.05381). `balanced` draws classes with equal probability (arXiv 1512.05830).
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.config import SamplingConfig


def epoch_length(labels: Tensor, config: SamplingConfig) -> int:
    """Return the visits per epoch for labels (n,) in [0, n). Waits for the device."""
    if _visits_each_once(config):
        return len(labels)
    return int(_visits(_class_counts(labels), config).sum())


def epoch_order(labels: Tensor, config: SamplingConfig, generator: torch.Generator, length: int) -> Tensor:
    """Draw the order of an epoch: (length,) int64 positions in labels (n,)."""
    n, device = len(labels), labels.device
    if config.name == "balanced":
        weights = _class_counts(labels)[labels].double().reciprocal()
        return torch.multinomial(weights, length, replacement=True, generator=generator)
    shuffled = torch.randperm(n, generator=generator, device=device)
    if _visits_each_once(config):
        return shuffled
    counts = _class_counts(labels)
    # The first `visits % count` of a class, in random order, are shown once more.
    by_class = shuffled[torch.sort(labels[shuffled], stable=True).indices]
    classes = labels[by_class]
    rank = torch.arange(n, device=device) - (counts.cumsum(0) - counts)[classes]
    visits, count = _visits(counts, config)[classes], counts[classes]
    times = visits // count + (rank < visits % count)
    # Without `output_size` this would wait for the device.
    visited = by_class.repeat_interleave(times, output_size=length)
    return visited[torch.randperm(length, generator=generator, device=device)]


def repeats(order: Tensor) -> Tensor:
    """Mark all visits of a position but the first: (length,) bool."""
    grouped, visits = torch.sort(order, stable=True)
    again = torch.zeros_like(order, dtype=torch.bool)
    again[1:] = grouped[1:] == grouped[:-1]
    return torch.empty_like(again).scatter_(0, visits, again)


def _visits_each_once(config: SamplingConfig) -> bool:
    return config.oversample == 1 and config.undersample == 1


def _class_counts(labels: Tensor) -> Tensor:
    """Count the images of each class: (n,), zero beyond the last. bincount would wait for the device."""
    return torch.zeros_like(labels).scatter_add_(0, labels, torch.ones_like(labels))


def _visits(counts: Tensor, config: SamplingConfig) -> Tensor:
    cap = (counts.max().double() * config.undersample).round().clamp(min=1).long()
    return torch.minimum(counts * config.oversample, cap)
