"""Random erasing: a rectangle of an image is covered with the mean (Zhong et al. 2017, arXiv 1708.04896)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from core.augment.draws import uniform

# torchvision's defaults, which are the paper's: share of the image, and height over width.
_AREA = (0.02, 0.33)
_ASPECT = (0.3, 3.3)
_TRIES = 10


def draw_erased(shape: Sequence[int], probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A rectangle for some images of a batch of `shape` (N, C, H, W), each with `probability` in [0, 1].

    Returns rows (N, H) and columns (N, W), float32 of 0 and 1, whose product is 1 where an image is erased.
    """
    count, _, height, width = shape
    tries = (_TRIES, count)
    # torchvision draws again while the rectangle is too large, at most ten times. Here all ten are drawn at once.
    area = uniform(tries, generator, *_AREA) * (height * width)
    aspect = uniform(tries, generator, math.log(_ASPECT[0]), math.log(_ASPECT[1])).exp_()
    high, wide = (area * aspect).sqrt_().round_(), (area / aspect).sqrt_().round_()
    fits = (high < height) & (wide < width)
    first = fits.to(torch.uint8).argmax(0, keepdim=True)
    high, wide = high.gather(0, first).view(-1, 1), wide.gather(0, first).view(-1, 1)
    erased = fits.any(0) & (uniform(count, generator, 0, 1) < probability)
    top = (uniform((count, 1), generator, 0, 1) * (height - high + 1)).floor_()
    left = (uniform((count, 1), generator, 0, 1) * (width - wide + 1)).floor_()
    y = torch.arange(height, device=top.device)
    x = torch.arange(width, device=top.device)
    rows = (y >= top) & (y < top + high) & erased[:, None]
    columns = (x >= left) & (x < left + wide)
    return rows.float(), columns.float()
