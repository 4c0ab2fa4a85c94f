"""What one epoch visits, and in what order: decided on the device, without a word to the host.

A class of n images has min(k · n, cap) visits in an epoch. The cap is the share `undersample` of the largest class's
images, and k is `oversample`: so the classes above the cap are cut to it, and the smaller ones raised towards it, no
image more than k times (over- and undersampling as Buda et al. 2018, arXiv 1710.05381, compare them). With both off,
every image has one visit.

`shuffled` spreads a class's visits evenly: v visits show every image floor(v / n) times, and another random part of
the images once more in each epoch. `balanced` makes as many draws with replacement, every class equally likely: an
image of a class of n is drawn in proportion to 1 / n, the resampling of Shen et al. 2016 (arXiv 1512.05830).
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.config import SamplingConfig


def epoch_length(labels: Tensor, config: SamplingConfig) -> int:
    """How many visits an epoch makes, the same for every epoch. Waits for the device: ask once a run.

    Args:
        labels: (n,) int64, the training images' classes, each in [0, n).
        config: how far classes are repeated and cut.
    """
    if _visits_each_once(config):
        return len(labels)
    return int(_visits(_class_counts(labels), config).sum())


def epoch_order(labels: Tensor, config: SamplingConfig, generator: torch.Generator, length: int) -> Tensor:
    """The order of one epoch.

    Args:
        labels: (n,) int64, the training images' classes, each in [0, n).
        config: which order.
        generator: on the labels' device.
        length: what `epoch_length` says of these labels and this config.

    Returns:
        (length,) int64 positions in [0, n), on the labels' device.
    """
    n, device = len(labels), labels.device
    if config.name == "balanced":
        weights = _class_counts(labels)[labels].double().reciprocal()
        return torch.multinomial(weights, length, replacement=True, generator=generator)
    shuffled = torch.randperm(n, generator=generator, device=device)
    if _visits_each_once(config):
        return shuffled
    counts = _class_counts(labels)
    # The images again, by class and at random within it: the first `visits % count` of a class are shown once more.
    by_class = shuffled[torch.sort(labels[shuffled], stable=True).indices]
    classes = labels[by_class]
    rank = torch.arange(n, device=device) - (counts.cumsum(0) - counts)[classes]  # within the class, from 0
    visits, count = _visits(counts, config)[classes], counts[classes]
    times = visits // count + (rank < visits % count)
    # Without `output_size`, it would wait for the device to learn the sum of `times`.
    visited = by_class.repeat_interleave(times, output_size=length)
    return visited[torch.randperm(length, generator=generator, device=device)]


def repeats(order: Tensor) -> Tensor:
    """Which visits show an image that the epoch has shown before.

    Args:
        order: (length,) int64 positions, as `epoch_order` gives them.

    Returns:
        (length,) bool, on the order's device: False at the first visit of each position, True at its later ones.
    """
    grouped, visits = torch.sort(order, stable=True)  # stable: the visits of a position stay in their order
    again = torch.zeros_like(order, dtype=torch.bool)
    again[1:] = grouped[1:] == grouped[:-1]
    return torch.empty_like(again).scatter_(0, visits, again)


def _visits_each_once(config: SamplingConfig) -> bool:
    return config.oversample == 1 and config.undersample == 1


def _class_counts(labels: Tensor) -> Tensor:
    """(n,) int64, how many of the n labels each class has; the bins beyond the classes stay empty.

    By scatter into n bins and not by bincount, which would wait for the device to learn how many it needs.
    """
    return torch.zeros_like(labels).scatter_add_(0, labels, torch.ones_like(labels))


def _visits(counts: Tensor, config: SamplingConfig) -> Tensor:
    """(n,) int64, an epoch's visits to each class of so many images: min(k · count, cap), the cap at least 1.

    A class above the cap needs no case of its own: k times its images are above the cap too.
    """
    cap = (counts.max().double() * config.undersample).round().clamp(min=1).long()
    return torch.minimum(counts * config.oversample, cap)
