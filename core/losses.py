"""Training losses for class labels and for mixtures of classes, computed in float32.

Focal loss (arXiv 1708.02002) is sum over k of t_k (1 - p_k)^gamma (-log p_k). `bce` is summed over classes, where timm
averages. Label smoothing applies to class labels only.

Logit adjustment adds tau · log(class frequency) to each logit (arXiv 2007.07314, equation 10). The weighted sum of a
batch is divided by the sum of its weights, also for mixtures, where torch divides by the number of images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config import LossConfig, is_own
from core.errors import ConfigError
from core.imports import blaming, built, kind_of

# Best on the long-tailed CIFAR-10 of arXiv 1901.05555, section 5; also used by arXiv 1906.07413.
EFFECTIVE_BETA = 0.9999


def smoothing_at(config: LossConfig, progress: float, *, saturated: bool = False) -> float:
    """Return the label smoothing at this progress of the run, in [0, 1].

    Args:
        saturated: whether `smoothing_patience_fraction` has passed without a lower validation loss.
    """
    if config.smoothing_final is None:
        return config.smoothing
    if config.smoothing_patience_fraction is not None:
        return config.smoothing_final if saturated else config.smoothing
    if config.smoothing_final_from is not None:
        return config.smoothing_final if progress >= config.smoothing_final_from else config.smoothing
    return config.smoothing + (config.smoothing_final - config.smoothing) * progress


def class_weights(config: LossConfig, class_counts: Tensor) -> Tensor | None:
    """Return the weight of each class, (K,) of mean 1, or None if equal. An empty class counts as one image."""
    if config.class_weights == "none":
        return None
    images = class_counts.clamp(min=1).double()
    if config.class_weights == "inverse":
        weights = images.reciprocal()
    else:  # (1 - beta) / (1 - beta^n), with expm1 for precision
        weights = (EFFECTIVE_BETA - 1) / torch.expm1(images * math.log(EFFECTIVE_BETA))
    return (weights / weights.mean()).float()


class Stage(NamedTuple):
    """Settings that depend on the progress of the run."""

    smoothing: float | Tensor  # A scalar on the device if it changes between captured steps
    weighted: bool  # Whether class weights apply


class Criterion:
    """The loss of a training with `class_counts` (K,) images. Never waits for the device.

    `mixes` is whether there are mixtures, which a loss of the user's own is then tried with.
    """

    def __init__(self, config: LossConfig, class_counts: Tensor, *, mixes: bool = False) -> None:
        self.config = config
        self.weights = class_weights(config, class_counts)  # (K,) float32
        self._own: Callable[[Tensor, Tensor], Tensor] | None = None
        if is_own(config.name):
            self._own = own_loss(config, class_counts, mixes=mixes)
        self.saturated = False
        """See `smoothing_at`; set by the loop before each epoch."""
        self.adjustment: Tensor | None = None  # (K,) float32, added to the logits
        if config.logit_adjustment > 0:
            images = class_counts.clamp(min=1).double()
            self.adjustment = (config.logit_adjustment * (images / images.sum()).log()).float()

    def stage(self, progress: float) -> Stage:
        """Return the settings at this progress of the run."""
        weighted = self.weights is not None and progress >= self.config.class_weights_from_fraction
        return Stage(smoothing_at(self.config, progress, saturated=self.saturated), weighted)

    def __call__(self, logits: Tensor, labels: Tensor, stage: Stage) -> Tensor:
        """Return the mean loss of logits (N, K) for labels (N,)."""
        if self._own is not None:
            return self._own(logits.float(), labels).mean()
        smoothing, weights = stage.smoothing, self.weights if stage.weighted else None
        logits = self._adjusted(logits)
        # torch's form does not accept smoothing as a tensor, and with weights and smoothing it waits for the device.
        if self.config.name == "cross_entropy" and weights is None and isinstance(smoothing, float):
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        if self.config.name == "cross_entropy":
            terms = -F.log_softmax(logits, dim=1) if weights is None else -F.log_softmax(logits, dim=1) * weights
            losses = torch.lerp(terms.gather(1, labels.unsqueeze(1)).squeeze(1), terms.mean(1), smoothing)
            return losses.mean() if weights is None else losses.sum() / self._weight(labels)
        classes = torch.zeros_like(logits).scatter_(1, labels.unsqueeze(1), 1.0)
        targets = (1 - smoothing) * classes + smoothing / classes.shape[1]
        losses = self._losses(logits, targets, classes, weights)
        return losses.mean() if weights is None else losses.sum() / self._weight(labels)

    def mixed(self, logits: Tensor, targets: Tensor, stage: Stage) -> Tensor:
        """Return the mean loss of logits (N, K) for targets (N, K) whose rows sum to 1."""
        if self._own is not None:
            return self._own(logits.float(), targets.float()).mean()
        targets, smoothing, weights = targets.float(), stage.smoothing, self.weights if stage.weighted else None
        logits = self._adjusted(logits)
        smoothed = targets
        if isinstance(smoothing, Tensor) or smoothing:
            smoothed = (1 - smoothing) * targets + smoothing / targets.shape[1]
        if self.config.name == "cross_entropy":
            losses = F.cross_entropy(logits, smoothed, weight=weights, reduction="none")
        else:
            losses = self._losses(logits, smoothed, targets, weights)
        # A matrix product would depend on the TF32 settings.
        return losses.mean() if weights is None else losses.sum() / self._weight(targets)

    def share(self, part: Tensor, whole: Tensor, stage: Stage) -> Tensor | float:
        """Return the weight of a part of a batch in the loss, by labels (n,) or mixtures (n, K)."""
        if not stage.weighted:
            return len(part) / len(whole)
        return self._weight(part) / self._weight(whole)

    def _weight(self, targets: Tensor) -> Tensor:
        assert self.weights is not None
        return self.weights[targets].sum() if targets.ndim == 1 else (targets.float() * self.weights).sum()

    def _adjusted(self, logits: Tensor) -> Tensor:
        return logits.float() if self.adjustment is None else logits.float() + self.adjustment

    def _losses(self, logits: Tensor, targets: Tensor, classes: Tensor, weights: Tensor | None) -> Tensor:
        """Focal or binary loss of each image. `classes` are the targets before smoothing."""
        if self.config.name == "focal":
            losses = focal_terms(logits, self.config.gamma) * targets
            return losses.sum(1) if weights is None else (losses * weights).sum(1)
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
        return losses if weights is None else losses * (classes * weights).sum(1)


def own_loss(config: LossConfig, class_counts: Tensor, *, mixes: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Build the loss of the user's own, and try it on two images.

    It takes logits (N, K) float32, and labels (N,) or, if it `mixes`, mixtures (N, K).

    Args:
        class_counts: (K,) on the training's device; given if the callable has a parameter of this name.

    Raises:
        ConfigError: it fails, has parameters of its own, or returns no loss that depends on the logits.
        UserError: it cannot be imported.
    """
    classes = len(class_counts)
    loss = built(config.name, "loss", config.kwargs, {"num_classes": classes, "class_counts": class_counts})
    if not callable(loss):
        raise ConfigError(f"loss.name: {config.name} returns {kind_of(loss)}, not a function of logits and labels")
    if isinstance(loss, nn.Module):
        loss.to(class_counts.device)
        if any(True for _ in loss.parameters()):
            raise ConfigError(f"loss.name: {config.name} has parameters of its own, which no optimizer trains")
    labels = torch.arange(2, device=class_counts.device) % classes
    _try(loss, config.name, labels, classes)
    if mixes:
        _try(loss, config.name, F.one_hot(labels, classes).float(), classes)
    return loss  # type: ignore[no-any-return]


def _try(loss: Callable[[Tensor, Tensor], Tensor], name: str, targets: Tensor, classes: int) -> None:
    kind = "labels" if targets.ndim == 1 else "mixtures of classes, since augment mixes images,"
    logits = torch.zeros(2, classes, device=targets.device, requires_grad=True)
    with blaming(f"loss.name: {name} fails with logits {tuple(logits.shape)} and {kind} {tuple(targets.shape)}"):
        losses = loss(logits, targets)
    if not isinstance(losses, Tensor) or losses.shape not in ((), (2,)):
        found = f"a tensor {tuple(losses.shape)}" if isinstance(losses, Tensor) else kind_of(losses)
        raise ConfigError(f"loss.name: {name} returns {found} for 2 images, not their mean loss or one for each")
    if not losses.requires_grad:
        raise ConfigError(f"loss.name: the loss of {name} does not depend on the logits")


def focal_terms(logits: Tensor, gamma: float) -> Tensor:
    """Return (1 - p)^gamma (-log p) of each class for float32 logits: (N, K)."""
    log_p = F.log_softmax(logits, dim=1)
    wrong = -torch.expm1(log_p)  # 1 - p, exact where p is near 1
    # The gradient at p = 1 is NaN for gamma below 1.
    return wrong.clamp(min=torch.finfo(torch.float32).tiny) ** gamma * -log_p
