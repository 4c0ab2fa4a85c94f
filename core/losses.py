"""What a step minimises, against classes and against mixtures of classes, in float32 whatever the network computes in.

Three losses. Cross-entropy is torch's. Focal loss (Lin et al. 2017, arXiv 1708.02002) discounts each class's term by
how right it is already: sum over k of t_k (1 - p_k)^gamma (-log p_k). `bce` asks of every class by itself whether it is
there (Wightman et al. 2021, arXiv 2110.00476); it sums over the classes, where timm's default is their mean, so that a
learning rate means about what it means to cross-entropy. Smoothing (Szegedy et al. 2016, arXiv
1512.00567) applies to classes only: mixed targets are soft already.

Two remedies for classes of unequal size. Logit adjustment adds tau · log(share of the class) to each logit in training,
so that the logits themselves, which are what is evaluated, stand for balanced classes: Menon et al. 2021 (arXiv
2007.07314), equation 10; with tau 1 it is the balanced softmax of Ren et al. 2020 (arXiv 2007.10740). Class weights are
one over a class's images or over their effective number (Cui et al. 2019, arXiv 1901.05555), and may hold late only
(deferred re-weighting, Cao et al. 2019, arXiv 1906.07413). A class without training images counts as one of one image,
in both.

How weights enter follows torch's `weight=` for hard targets, in all three losses. In cross-entropy and focal loss each
class's term is multiplied by that class's weight; `bce` has no term for a class alone, so there the image is weighed:
by its label, or by the mean of the weights under its mixture. The batch's sum is divided by the sum of its weights,
mixed or not. Here torch differs: it divides mixtures by the number of images, under which a batch of common classes
would have a fraction of the gradient as soon as it is mixed (a twelfth, for inverse weights of 900, 90 and 10 images).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core.config import LossConfig

# The largest beta of Cui et al. 2019, section 5: the best on their long-tailed CIFAR-10, and that of Cao et al. 2019.
EFFECTIVE_BETA = 0.9999


def smoothing_at(config: LossConfig, progress: float) -> float:
    """The label smoothing when this share of the run, in [0, 1], is over: on the line between its two ends."""
    if config.smoothing_final is None:
        return config.smoothing
    return config.smoothing + (config.smoothing_final - config.smoothing) * progress


def class_weights(config: LossConfig, class_counts: Tensor) -> Tensor | None:
    """What an image of each class weighs once class weights hold.

    Args:
        config: `class_weights` says in what way.
        class_counts: (K,) int64, the training images of each class; 0 counts as 1.

    Returns:
        (K,) float32 above 0, on the counts' device; None where all weigh alike. Their mean is 1, as in Cui et al.
        2019, section 4, which is for the reader alone: a batch is divided by the sum of its weights.
    """
    if config.class_weights == "none":
        return None
    images = class_counts.clamp(min=1).double()
    if config.class_weights == "inverse":
        weights = images.reciprocal()
    else:  # (1 - beta) / (1 - beta^n): 1 - beta^n by expm1, which keeps the digits that a difference would lose
        weights = (EFFECTIVE_BETA - 1) / torch.expm1(images * math.log(EFFECTIVE_BETA))
    return (weights / weights.mean()).float()


class Stage(NamedTuple):
    """Where a run stands, as far as its loss is concerned."""

    smoothing: float | Tensor
    """In [0, 1): a number, or, where steps are captured and it changes from step to step, a scalar on the device."""
    weighted: bool
    """Whether class weights hold."""


class Criterion:
    """The loss of a training: called with labels, and by `mixed` with mixtures. No call waits for the device."""

    def __init__(self, config: LossConfig, class_counts: Tensor) -> None:
        """Works out once what depends on the training set alone.

        Args:
            config: which loss.
            class_counts: (K,) int64 on the training's device, how many training images each class has; 0 counts as 1.
        """
        self.config = config
        self.weights = class_weights(config, class_counts)  # (K,) float32
        self.adjustment: Tensor | None = None  # (K,) float32, what is added to the logits
        if config.logit_adjustment > 0:
            images = class_counts.clamp(min=1).double()
            self.adjustment = (config.logit_adjustment * (images / images.sum()).log()).float()

    def stage(self, progress: float) -> Stage:
        """What of the loss depends on the share of the run's steps that are over, in [0, 1]."""
        weighted = self.weights is not None and progress >= self.config.class_weights_from_fraction
        return Stage(smoothing_at(self.config, progress), weighted)

    def __call__(self, logits: Tensor, labels: Tensor, stage: Stage) -> Tensor:
        """The batch's loss against one class an image.

        Args:
            logits: (N, K) of any floating type.
            labels: (N,) int64 in [0, K).
            stage: that of the step.

        Returns:
            A float32 scalar: the mean over the batch, weighted by the labels' weights where they hold.
        """
        smoothing, weights = stage.smoothing, self.weights if stage.weighted else None
        logits = self._adjusted(logits)
        if self.config.name == "cross_entropy" and isinstance(smoothing, float):
            return F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing)
        if self.config.name == "cross_entropy":  # torch's takes no tensor; its definition, written out
            terms = -F.log_softmax(logits, dim=1) if weights is None else -F.log_softmax(logits, dim=1) * weights
            losses = torch.lerp(terms.gather(1, labels.unsqueeze(1)).squeeze(1), terms.mean(1), smoothing)
            return losses.mean() if weights is None else losses.sum() / self._weight(labels)
        classes = torch.zeros_like(logits).scatter_(1, labels.unsqueeze(1), 1.0)
        targets = (1 - smoothing) * classes + smoothing / classes.shape[1]
        losses = self._losses(logits, targets, classes, weights)
        return losses.mean() if weights is None else losses.sum() / self._weight(labels)

    def mixed(self, logits: Tensor, targets: Tensor, stage: Stage) -> Tensor:
        """The batch's loss against a distribution over the classes for each image, which is not smoothed.

        Args:
            logits: (N, K) of any floating type.
            targets: (N, K), each row at least 0 and of sum 1.
            stage: that of the step.

        Returns:
            A float32 scalar: the mean over the batch, weighted by the mixtures' mean weights where they hold.
        """
        targets, weights = targets.float(), self.weights if stage.weighted else None
        logits = self._adjusted(logits)
        if self.config.name == "cross_entropy":
            losses = F.cross_entropy(logits, targets, weight=weights, reduction="none")
        else:
            losses = self._losses(logits, targets, targets, weights)
        # Sums and not a product of matrices, which would follow the caller's TF32 settings.
        return losses.mean() if weights is None else losses.sum() / self._weight(targets)

    def share(self, part: Tensor, whole: Tensor, stage: Stage) -> Tensor | float:
        """How much the loss of a part of a batch counts in that of the whole: the shares of all parts sum to 1.

        Args:
            part: labels (n,) int64 or mixtures (n, K) of some of the batch's images.
            whole: those of all of them.
            stage: that of the step.
        """
        if not stage.weighted:
            return len(part) / len(whole)
        return self._weight(part) / self._weight(whole)

    def _weight(self, targets: Tensor) -> Tensor:
        """What a batch's sum is divided by where weights hold: a scalar, of labels (N,) or mixtures (N, K)."""
        assert self.weights is not None
        return self.weights[targets].sum() if targets.ndim == 1 else (targets.float() * self.weights).sum()

    def _adjusted(self, logits: Tensor) -> Tensor:
        return logits.float() if self.adjustment is None else logits.float() + self.adjustment

    def _losses(self, logits: Tensor, targets: Tensor, classes: Tensor, weights: Tensor | None) -> Tensor:
        """(N,) float32: each image's focal or binary loss against its targets, where `classes` are those unsmoothed."""
        if self.config.name == "focal":
            losses = focal_terms(logits, self.config.gamma) * targets
            return losses.sum(1) if weights is None else (losses * weights).sum(1)
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
        return losses if weights is None else losses * (classes * weights).sum(1)


def focal_terms(logits: Tensor, gamma: float) -> Tensor:
    """(N, K): (1 - p)^gamma (-log p) of each class's probability p, for float32 logits (N, K) and gamma at least 0.

    Where p rounds to 1, the slope of (1 - p)^gamma is infinite for gamma below 1, and the gradient would be not a
    number: 1 - p is therefore never less than the smallest float32.
    """
    log_p = F.log_softmax(logits, dim=1)
    wrong = -torch.expm1(log_p)  # 1 - p, exact where p is near 1
    return wrong.clamp(min=torch.finfo(torch.float32).tiny) ** gamma * -log_p
