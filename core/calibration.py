"""Temperature scaling of a model's confidence (Guo et al. 2017, arXiv 1706.04599).

All logits are divided by the temperature that minimizes the negative log-likelihood of held-out images, which is convex
in 1/T. If every image is classified correctly, the likelihood grows without limit as T falls, so the search is bounded;
a result at a bound means that there is no fit.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from scipy.optimize import brentq
from torch import Tensor

# Measured on digits (40 epochs, 4 seeds, 360 and 144 validation images): 0.6 to 1.1 without label smoothing, 0.2 to 0.5
# with smoothing 0.1, which makes a network underconfident.
LOWEST, HIGHEST = 0.05, 20.0


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Return calibrated log-probabilities of logits (N, K); a temperature of 1 returns the input unchanged."""
    return logits if temperature == 1 else F.log_softmax(logits / temperature, dim=-1)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature in [`LOWEST`, `HIGHEST`] that maximizes the likelihood of the labels.

    Args:
        logits: (N, K) logits or log-probabilities of images that were not used for training; N at least 1.
        labels: (N,) int64 in [0, K), on the same device.

    Returns:
        1 if no temperature makes a difference; a bound if all predictions are correct, or worse than uniform ones.

    Raises:
        ValueError: some logits are not finite.
    """
    logits = logits.double() - logits.double().amax(1, keepdim=True)  # exactly 0 for equal logits
    if not bool(logits.isfinite().all()):
        raise ValueError("a temperature needs finite logits")
    of_label = logits.gather(1, labels.unsqueeze(1)).mean()

    def slope(log_temperature: float) -> float:
        """Derivative of the mean negative log-likelihood by 1/T."""
        expected = ((logits * math.exp(-log_temperature)).softmax(1) * logits).sum(1).mean()
        return float(expected - of_label)

    # The slope decreases with T.
    low, high = math.log(LOWEST), math.log(HIGHEST)
    at_low, at_high = slope(low), slope(high)
    if at_low == at_high == 0:
        return 1.0
    if at_low <= 0:
        return LOWEST
    if at_high >= 0:
        return HIGHEST
    return math.exp(float(brentq(slope, low, high)))
