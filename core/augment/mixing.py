"""Mixing two images of a batch, and their labels alike: mixup and CutMix, one draw a batch, as in timm.

Mixup: Zhang et al. 2018, arXiv 1710.09412. CutMix: Yun et al. 2019, arXiv 1905.04899.
"""

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
    """How one batch is mixed: mixup keeps `keep` of each image, cutmix all but `box`, whose share is 1 - `keep`.

    Where steps are captured in a CUDA graph, `keep` and `box` are tensors on the images' device, whose values each
    replay reads; plain numbers would be those of the capture for ever.
    """

    kind: Literal["mixup", "cutmix"]
    keep: float | Tensor
    """In [0, 1]; a tensor is () float32."""
    box: tuple[int, int, int, int] | Tensor | None = None
    """Of cutmix: top, bottom, left, right in pixels; a tensor is (4,) float32 of whole numbers."""


def mixes(config: AugmentConfig, progress: float) -> bool:
    """Whether batches may be mixed at this fraction of the run, in [0, 1]."""
    return (config.mixup > 0 or config.cutmix > 0) and progress < config.mix_off_fraction


def plan_mix(config: AugmentConfig, generator: torch.Generator, shape: Sequence[int]) -> MixPlan | None:
    """Draws how the next batch of that shape (N, C, H, W) is mixed, or None: not at all.

    The generator is the CPU's, so that the device is not asked.
    """
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
    # The box is cut off at the border and rounded, so the targets follow its real area.
    return MixPlan("cutmix", 1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def apply_mix(
    images: Tensor, labels: Tensor, num_classes: int, plan: MixPlan, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mixes each of the images (N, C, H, W) float with another of the batch, and their labels (N,) int64 alike.

    Returns the mixed images, channels_last, in the images' dtype, and soft targets (N, K) float32 whose rows sum to 1.
    The generator is the device's; nothing waits for the device.
    """
    partner = torch.rand(len(images), generator=generator, device=images.device).argsort()
    # one_hot would ask the device for the largest label.
    own = torch.zeros(len(labels), num_classes, device=labels.device).scatter_(1, labels[:, None], 1.0)
    targets = torch.lerp(own.index_select(0, partner), own, plan.keep)
    if plan.box is None:
        # In float32 whatever the images are: a weight that is a tensor would have to be rounded to their dtype.
        others = images.index_select(0, partner).float()
        mixed = torch.lerp(others, images.float(), plan.keep).to(images.dtype)
    else:
        mixed = _paste(images, partner, plan.box)
    return mixed.contiguous(memory_format=torch.channels_last), targets


def _paste(images: Tensor, partner: Tensor, box: tuple[int, int, int, int] | Tensor) -> Tensor:
    """Images (N, C, H, W) with the box taken from those at `partner` (N,), a new tensor."""
    if isinstance(box, Tensor):
        top, bottom, left, right = box.unbind()
        y = torch.arange(images.shape[-2], device=images.device)[:, None]
        x = torch.arange(images.shape[-1], device=images.device)
        inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
        return torch.where(inside, images.index_select(0, partner), images)
    # Numbers of the host's say which part to copy, and the rest is left alone.
    part = (..., slice(*box[:2]), slice(*box[2:]))
    mixed = images.clone()
    mixed[part] = images[part].index_select(0, partner)
    return mixed


def symmetric_beta(alpha: float, generator: torch.Generator) -> float:
    """A draw from Beta(alpha, alpha), alpha > 0, from a CPU generator.

    It is g / (g + h) with g and h from Gamma(alpha). Both are kept as logarithms, log Gamma(alpha) =
    log Gamma(alpha + 1) + log(U) / alpha (Marsaglia and Tsang 2000, section 6): a small alpha's own draws would
    underflow to 0 / 0.
    """
    shape = torch.full((2,), alpha + 1, dtype=torch.float64)
    gamma = torch._standard_gamma(shape, generator=generator)
    uniform = 1 - torch.rand(2, generator=generator, dtype=torch.float64)  # in (0, 1]
    first, second = gamma.log() + uniform.log() / alpha
    return float(torch.sigmoid(first - second))
