"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) within a batch, with one draw per batch as in timm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from core.config import AugmentConfig


@dataclass(frozen=True)
class MixPlan:
    """Parameters for mixing a batch: numbers, or float32 tensors on the device for captured steps."""

    kind: Literal["mixup", "cutmix"]
    keep: float | Tensor
    """Fraction of each image that is kept, in [0, 1]."""
    box: tuple[int, int, int, int] | Tensor | None = None
    """For cutmix: top, bottom, left, right in pixels."""


def mixes(config: AugmentConfig, progress: float) -> bool:
    """Return whether batches may be mixed at this progress of the run."""
    return (config.mixup > 0 or config.cutmix > 0) and progress < config.mix_off_fraction


def plan_mix(config: AugmentConfig, generator: torch.Generator, shape: Sequence[int]) -> MixPlan | None:
    """Draw the mixing, if any, of a batch of `shape` (N, C, H, W), with a CPU generator."""
    chance, choice, row, column = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    if chance >= config.mix_probability or not (config.mixup or config.cutmix):
        return None
    cut = bool(config.cutmix) and (not config.mixup or choice < 0.5)
    keep = symmetric_beta(config.cutmix if cut else config.mixup, generator)
    if not cut:
        return MixPlan("mixup", keep)
    height, width = shape[-2:]
    side = math.sqrt(1 - keep)
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    y, x = int(row * height), int(column * width)
    top, bottom = max(y - half_height, 0), min(y + half_height, height)
    left, right = max(x - half_width, 0), min(x + half_width, width)
    # Targets use the area of the clipped and rounded box.
    return MixPlan("cutmix", 1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def apply_mix(
    images: Tensor, labels: Tensor, num_classes: int, plan: MixPlan, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mix each image with another one of the batch; return images, channels_last, and targets (N, K) float32."""
    partner = torch.rand(len(images), generator=generator, device=images.device).argsort()
    # one_hot would wait for the device.
    own = torch.zeros(len(labels), num_classes, device=labels.device).scatter_(1, labels[:, None], 1.0)
    targets = torch.lerp(own.index_select(0, partner), own, plan.keep)
    if plan.box is None:
        # A weight tensor would be rounded to the images' dtype.
        others = images.index_select(0, partner).float()
        mixed = torch.lerp(others, images.float(), plan.keep).to(images.dtype)
    else:
        mixed = _paste(images, partner, plan.box)
    return mixed.contiguous(memory_format=torch.channels_last), targets


def _paste(images: Tensor, partner: Tensor, box: tuple[int, int, int, int] | Tensor) -> Tensor:
    """Copy images with the box taken from those at `partner` (N,)."""
    if isinstance(box, Tensor):
        top, bottom, left, right = box.unbind()
        y = torch.arange(images.shape[-2], device=images.device)[:, None]
        x = torch.arange(images.shape[-1], device=images.device)
        inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
        return torch.where(inside, images.index_select(0, partner), images)
    # With host numbers, only the box is copied.
    part = (..., slice(*box[:2]), slice(*box[2:]))
    mixed = images.clone()
    mixed[part] = images[part].index_select(0, partner)
    return mixed


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
