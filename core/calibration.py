"""Temperature scaling of a model's confidence (arXiv 1706.04599).

Logits are divided by the temperature that minimizes the negative log-likelihood of held-out images, which is convex in
1/T. If all are classified correctly, it falls without limit; then the result is a bound.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from scipy.optimize import brentq
from torch import Tensor

# On digits (40 epochs, 4 seeds, 360 and 144 validation images): 0.6 to 1.1 without label smoothing, 0.2 to 0.5 with
# 0.1, which makes a network underconfident.
LOWEST, HIGHEST = 0.05, 20.0


def calibrated_loss(logits: Tensor, labels: Tensor) -> float:
    """Return the cross-entropy of logits (N, K) at their best temperature, in nats; NaN if some are not finite.

    It ranks networks by their predictions and not by their confidence, which label smoothing and mixed images lower.
    """
    if not bool(logits.isfinite().all()):
        return math.nan
    return float(F.cross_entropy(scaled(logits.double(), fit_temperature(logits, labels)), labels))


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Return calibrated log-probabilities of logits (N, K), or these if the temperature is 1."""
    return logits if temperature == 1 else F.log_softmax(logits / temperature, dim=-1)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature in [`LOWEST`, `HIGHEST`] that maximizes the likelihood; 1 if none makes a difference.

    Raises:
        ValueError: some logits are not finite.
    """
    logits = logits.double() - logits.double().amax(1, keepdim=True)
    if not bool(logits.isfinite().all()):
        raise ValueError("a temperature needs finite logits")
    of_label = logits.gather(1, labels.unsqueeze(1)).mean()

    def slope(log_temperature: float) -> float:
        """Derivative of the mean negative log-likelihood by 1/T; decreases with T."""
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
