"""Order of the images in an epoch, drawn on the device without synchronization.

A class of n images has min(k · n, cap, its own cap) visits, where k is `oversample` and cap is the fraction
`undersample` of the largest class (compare arXiv 1710.05381). `balanced` draws classes with equal probability (arXiv
1512.05830).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.config import SamplingConfig
from core.errors import ConfigError


def class_caps(labels: Tensor, config: SamplingConfig, classes: Sequence[str]) -> Tensor | None:
    """Return the maximum visits per epoch of each class, (n,) int64 for labels (n,), or None without `sampling.caps`.

    Raises:
        ConfigError: `sampling.caps` names no class of these.
    """
    if not config.caps:
        return None
    counts = _class_counts(labels)
    caps = torch.full_like(counts, len(labels) * config.oversample)
    for name, cap in config.caps:
        if name not in classes:
            raise ConfigError(f"sampling.caps: {name} is no class of the data; its classes are {', '.join(classes)}")
        place = classes.index(name)
        caps[place] = (counts[place].double() * cap).round().clamp(min=1) if cap <= 1 else int(cap)
    return caps


def epoch_length(labels: Tensor, config: SamplingConfig, caps: Tensor | None = None) -> int:
    """Return the visits per epoch for labels (n,) in [0, n) and their `class_caps`. Waits for the device."""
    if _visits_each_once(config):
        return len(labels)
    return int(_visits(_class_counts(labels), config, caps).sum())


def epoch_order(
    labels: Tensor,
    config: SamplingConfig,
    generator: torch.Generator,
    length: int,
    caps: Tensor | None = None,
) -> Tensor:
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
    visits, count = _visits(counts, config, caps)[classes], counts[classes]
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
    return config.oversample == 1 and config.undersample == 1 and not config.caps


def _class_counts(labels: Tensor) -> Tensor:
    """Count the images of each class: (n,), zero beyond the last. bincount would wait for the device."""
    return torch.zeros_like(labels).scatter_add_(0, labels, torch.ones_like(labels))


def _visits(counts: Tensor, config: SamplingConfig, caps: Tensor | None) -> Tensor:
    largest = (counts if caps is None else torch.minimum(counts, caps)).max()
    cap = (largest.double() * config.undersample).round().clamp(min=1).long()
    visits = torch.minimum(counts * config.oversample, cap)
    return visits if caps is None else torch.minimum(visits, caps)
