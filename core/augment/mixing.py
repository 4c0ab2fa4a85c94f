"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) within a batch, with one draw per batch as in timm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.config import AugmentConfig


@dataclass(frozen=True)
class MixPlan:
    """Parameters for mixing a batch: numbers, or float32 tensors on the device for captured steps."""

    keep: float | Tensor
    """Fraction of each image that is kept, in [0, 1]."""
    box: tuple[int, int, int, int] | Tensor | None = None
    """For cutmix: top, bottom, left, right in pixels. None for mixup, or a tensor of an empty box."""


def mixes(config: AugmentConfig, progress: float) -> bool:
    """Return whether batches may be mixed at this progress of the run."""
    chosen = (config.mixup > 0 or config.cutmix > 0) and config.mix_probability > 0
    return chosen and progress < config.mix_off_fraction


def plan_mix(config: AugmentConfig, generator: torch.Generator, shape: Sequence[int]) -> MixPlan | None:
    """Draw the mixing, if any, of a batch of `shape` (N, C, H, W), with a CPU generator."""
    chance, choice, row, column = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    if chance >= config.mix_probability or not (config.mixup or config.cutmix):
        return None
    cut = bool(config.cutmix) and (not config.mixup or choice < 0.5)
    keep = symmetric_beta(config.cutmix if cut else config.mixup, generator)
    if not cut:
        return MixPlan(keep)
    height, width = shape[-2:]
    side = math.sqrt(1 - keep)
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    y, x = int(row * height), int(column * width)
    top, bottom = max(y - half_height, 0), min(y + half_height, height)
    left, right = max(x - half_width, 0), min(x + half_width, width)
    # Targets use the area of the clipped and rounded box.
    return MixPlan(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def apply_mix(
    images: Tensor, labels: Tensor, num_classes: int, plan: MixPlan | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mix each image with another one of the batch; return images, channels_last, and targets (N, K) float32.

    A plan of tensors gives any mixture, or none if all is kept. None returns images and labels (N,) as they are; it
    draws the same random numbers, so later ones do not depend on the plan.
    """
    partner = torch.rand(len(images), generator=generator, device=images.device).argsort()
    if plan is None:
        return images, labels
    # one_hot would wait for the device.
    own = torch.zeros(len(labels), num_classes, device=labels.device).scatter_(1, labels[:, None], 1.0)
    targets = torch.lerp(own.index_select(0, partner), own, plan.keep)
    if isinstance(plan.box, tuple):
        mixed = _paste(images, partner, plan.box)
    else:
        # A weight tensor would be rounded to the images' dtype.
        others = images.index_select(0, partner).float()
        weight = plan.keep
        if isinstance(weight, Tensor) and plan.box is not None:
            weight = _weights(weight, plan.box, images.shape)
        mixed = torch.lerp(others, images.float(), weight).to(images.dtype)
    return mixed.contiguous(memory_format=torch.channels_last), targets


def _paste(images: Tensor, partner: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """Copy images with the box taken from those at `partner` (N,)."""
    part = (..., slice(*box[:2]), slice(*box[2:]))
    mixed = images.clone()
    mixed[part] = images[part].index_select(0, partner)
    return mixed


def _weights(keep: Tensor, box: Tensor, shape: Sequence[int]) -> Tensor:
    """Weight (H, W) of each image's own pixels: 0 in the box and 1 elsewhere, or `keep` if the box is empty."""
    top, bottom, left, right = box.unbind()
    y = torch.arange(shape[-2], device=box.device)[:, None]
    x = torch.arange(shape[-1], device=box.device)
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    return torch.maximum(inside.any(), keep) * ~inside


def symmetric_beta(alpha: float, generator: torch.Generator) -> float:
    """Draw from Beta(alpha, alpha) with a CPU generator: g / (g + h) with g and h from Gamma(alpha).

    Small ones would underflow without logarithms: log Gamma(alpha) = log Gamma(alpha + 1) + log(U) / alpha (Marsaglia
    and Tsang 2000, section 6).
    """
    shape = torch.full((2,), alpha + 1, dtype=torch.float64)
    gamma = torch._standard_gamma(shape, generator=generator)
    uniform = 1 - torch.rand(2, generator=generator, dtype=torch.float64)  # in (0, 1]
    first, second = gamma.log() + uniform.log() / alpha
    return float(torch.sigmoid(first - second))
