"""Cross-entropy against classes and against mixtures of classes, in float32 whatever the network computes in.

Smoothing (Szegedy et al. 2016, arXiv 1512.00567) applies to classes only: mixed targets are soft already.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from core.config import LossConfig


def smoothing_at(config: LossConfig, progress: float) -> float:
    """The label smoothing when this share of the run, in [0, 1], is over: on the line between its two ends."""
    if config.smoothing_final is None:
        return config.smoothing
    return config.smoothing + (config.smoothing_final - config.smoothing) * progress


def hard_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """The batch's mean cross-entropy against one class an image.

    Args:
        logits: (N, K) of any floating type.
        labels: (N,) int64 in [0, K).
        smoothing: the share of each target, in [0, 1], that is spread evenly over all K classes, its own included.

    Returns:
        A float32 scalar.
    """
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def soft_target_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The batch's mean cross-entropy against a distribution over the classes for each image.

    Args:
        logits: (N, K) of any floating type.
        targets: (N, K), each row at least 0 and of sum 1.

    Returns:
        A float32 scalar.
    """
    return F.cross_entropy(logits.float(), targets.float())
