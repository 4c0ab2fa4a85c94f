"""Common parts of the families for small images."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config import ModelConfig
from core.errors import ConfigError

# Best fixed number of channels per group (arXiv 1803.08494, table 3).
GROUP_CHANNELS = 16
# Preferred by tensor cores and vector units.
WIDTH_MULTIPLE = 8

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "mish": nn.Mish}


class FixedGroupNorm(nn.GroupNorm):
    """Group norm with 16 channels per group, or the largest smaller number that divides the channels."""

    def __init__(self, channels: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        size = max(size for size in range(1, GROUP_CHANNELS + 1) if channels % size == 0)
        super().__init__(channels // size, channels, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return the norm of images (N, C, H, W) in their dtype, with statistics in float32."""
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        # On CUDA autocast would compute in float32: ResNet-18 then moves 52 GB forward instead of 20 (256 images, 96²).
        device = input.device.type
        with torch.autocast(device, enabled=False) if device != "meta" else contextlib.nullcontext():
            normed = F.group_norm(input, self.num_groups, weight, bias, self.eps)
        return normed.contiguous(memory_format=torch.channels_last)  # CUDA's kernel returns it contiguous


NORMS: dict[str, type[nn.BatchNorm2d] | type[FixedGroupNorm]] = {"batch": nn.BatchNorm2d, "group": FixedGroupNorm}


def stage_widths(config: ModelConfig) -> list[int]:
    """Return the channels of each stage."""
    return [scale_width(width, config.width) for width in config.widths]


def stage_blocks(config: ModelConfig) -> list[int]:
    """Return the blocks of each stage, rounded half up, at least 1."""
    return [max(1, math.floor(count * config.depth + 0.5)) for count in config.blocks]


def scale_width(width: int, factor: float) -> int:
    """Return the width itself if the factor is 1, else scaled to the nearest multiple of 8."""
    if factor == 1:
        return width
    return WIDTH_MULTIPLE * max(1, math.floor(width * factor / WIDTH_MULTIPLE + 0.5))


def check_image_size(
    image_size: tuple[int, int], steps: Iterable[str], *, halve: Callable[[int], int], remedy: str = ""
) -> None:
    """Raise ConfigError if a step of stride 2 applies to a side of one pixel; `remedy` is another fix."""
    height, width = image_size
    side = min(image_size)
    for step in steps:
        if side == 1:
            raise ConfigError(
                f"model: an image of {height}×{width} is down to a side of 1 pixel before {step}, "
                "which would halve it; name fewer stages in model.widths and model.blocks"
                + (f", or {remedy}" if remedy else "")
                + ", or enlarge the images by data.image_size"
            )
        side = halve(side)
