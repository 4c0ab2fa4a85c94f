"""Random erasing of a rectangle (arXiv 1708.04896)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.augment.draws import rectangles, uniform

# torchvision's defaults and the paper's
_AREA = (0.02, 0.33)
_ASPECT = (0.3, 3.3)


def draw_erased(shape: Sequence[int], probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a rectangle with that probability for each image of `shape` (N, C, H, W).

    Returns:
        Rows (N, H) and columns (N, W), float32: a pixel is erased where both are 0, not 1.
    """
    count, _, height, width = shape
    largest = (height - 1, width - 1)
    high, wide, found = rectangles(count, (height, width), largest, generator, area=_AREA, aspect=_ASPECT)
    erased = found & (uniform(count, generator, 0, 1) < probability)
    high, wide = high.view(-1, 1), wide.view(-1, 1)
    top = (uniform((count, 1), generator, 0, 1) * (height - high + 1)).floor_()
    left = (uniform((count, 1), generator, 0, 1) * (width - wide + 1)).floor_()
    # A distance from the centre needs one comparison per axis.
    y = torch.arange(height, device=top.device) - (top + (high - 1) / 2)
    x = torch.arange(width, device=left.device) - (left + (wide - 1) / 2)
    rows = y.abs_() > torch.where(erased[:, None], high / 2, -1)
    columns = x.abs_() > wide / 2
    return rows.float(), columns.float()
