"""Random erasing of a rectangle (arXiv 1708.04896)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from core.augment.draws import rectangles, uniform

# torchvision's defaults and the paper's
_AREA = (0.02, 0.33)
_ASPECT = (0.3, 3.3)


class Erased(NamedTuple):
    """A rectangle per image, in pixels: (n,) float32 each. Half the height is negative if nothing is erased."""

    y: Tensor  # Of the centre
    x: Tensor
    half_height: Tensor
    half_width: Tensor

    def lines(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return rows (n, H) and columns (n, W) of images, float32: a pixel is erased where both are 0, not 1."""
        lines = []
        for side, centre, half in ((size[0], self.y, self.half_height), (size[1], self.x, self.half_width)):
            # A distance from the centre needs one comparison per axis.
            distance = torch.arange(side, device=centre.device) - centre[:, None]
            lines.append((distance.abs_() > half[:, None]).float())
        return lines[0], lines[1]


def draw_erased(count: int, size: tuple[int, int], probability: float, generator: torch.Generator) -> Erased:
    """Draw a rectangle with that probability for each image of `size` (H, W)."""
    height, width = size
    high, wide, found = rectangles(count, size, (height - 1, width - 1), generator, area=_AREA, aspect=_ASPECT)
    erased = found & (uniform(count, generator, 0, 1) < probability)
    top = (uniform(count, generator, 0, 1) * (height - high + 1)).floor_()
    left = (uniform(count, generator, 0, 1) * (width - wide + 1)).floor_()
    return Erased(
        top + (high - 1) / 2,
        left + (wide - 1) / 2,
        torch.where(erased, high / 2, -1),
        torch.where(erased, wide / 2, -1),
    )
