"""Random resized crops (arXiv 1409.4842; torchvision's RandomResizedCrop)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from core.augment.draws import rectangles, uniform
from core.augment.geometry import affine
from core.config import AugmentConfig

# torchvision's default and the paper's
_ASPECT = (3 / 4, 4 / 3)


class Crops(NamedTuple):
    """A rectangle per image, in pixels: (n,) float32 each."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor

    def matrices(self, size: tuple[int, int]) -> Tensor:
        """Return the matrices that enlarge each rectangle to `size` (H, W)."""
        height, width = size
        x = self.left + (self.width - width) / 2
        y = self.top + (self.height - height) / 2
        return affine(x, a=self.width / width, x=x, d=self.height / height, y=y)

    def frames(self, size: tuple[int, int]) -> Tensor:
        """Return the rectangles as `frames` of `geometry.warp`."""
        left, top = self.left - (size[1] - 1) / 2, self.top - (size[0] - 1) / 2
        frames = torch.stack([left, left + self.width - 1, top, top + self.height - 1], dim=1)
        return frames.view(-1, 2, 2)


def padding(config: AugmentConfig, side: int) -> int:
    """Return the pixels that are added at both ends of a side."""
    return int(config.crop_pad_fraction * side + 0.5)


def largest_shift(config: AugmentConfig, side: int) -> int:
    """Return the pixels by which crops move an image along a side at most."""
    return padding(config, side) + int(side * (1 - math.sqrt(config.crop_area_min)) / 2)


def draw_crops(count: int, size: tuple[int, int], area_min: float, generator: torch.Generator) -> Crops:
    """Draw a rectangle in each image; if none of ten draws fits, the largest centred one."""
    height, width = size
    high, wide, found = rectangles(count, size, size, generator, area=(area_min, 1), aspect=_ASPECT)
    low, most = _ASPECT
    high = torch.where(found, high, min(height, round(width / low)))
    wide = torch.where(found, wide, min(width, round(height * most)))
    top, left = (
        torch.where(found, (uniform(count, generator, 0, 1) * (room + 1)).floor_(), (room / 2).floor())
        for room in (height - high, width - wide)
    )
    return Crops(top, left, high, wide)
