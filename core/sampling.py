"""What one epoch visits, and in what order: decided on the device, without a word to the host.

`shuffled` visits every image once. `balanced` makes as many draws with replacement, every class equally likely: an
image of a class of n is drawn in proportion to 1 / n, the resampling of Shen et al. 2016 (arXiv 1512.05830).
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.config import SamplingConfig


def epoch_order(labels: Tensor, config: SamplingConfig, generator: torch.Generator) -> Tensor:
    """The order of one epoch.

    Args:
        labels: (n,) int64, the training images' classes, each in [0, n).
        config: which order.
        generator: on the labels' device.

    Returns:
        (n,) int64 positions in [0, n), on the labels' device.
    """
    n = len(labels)
    if config.name == "shuffled":
        return torch.randperm(n, generator=generator, device=labels.device)
    # Counts by scatter into n bins and not by bincount, which would wait for the device to learn how many it needs.
    counts = torch.zeros(n, dtype=torch.int64, device=labels.device).scatter_add_(0, labels, torch.ones_like(labels))
    return torch.multinomial(counts[labels].double().reciprocal(), n, replacement=True, generator=generator)
