"""Random numbers, drawn without synchronization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

_TRIES = 10

T = TypeVar("T")


def uniform(shape: int | Sequence[int], generator: torch.Generator, low: float, high: float) -> Tensor:
    """Draw float32 from [low, high)."""
    size = (shape,) if isinstance(shape, int) else tuple(shape)
    return torch.rand(size, generator=generator, device=generator.device).mul_(high - low).add_(low)


def random_sign(count: int, generator: torch.Generator) -> Tensor:
    """Draw 1.0 or -1.0 with equal probability."""
    return uniform(count, generator, -1, 1).sign_()


def rectangles(
    count: int,
    size: tuple[int, int],
    largest: tuple[int, int],
    generator: torch.Generator,
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw rectangles in images of `size` (H, W) as torchvision does for crops and erasing.

    `area`, as a fraction of the image, is uniform, and `aspect`, height over width, log-uniform.

    Returns:
        Heights and widths (count,) float32 in pixels, and whether one of ten draws was within `largest` (h, w).
    """
    tries = (_TRIES, count)
    pixels = uniform(tries, generator, *area) * (size[0] * size[1])
    ratio = uniform(tries, generator, math.log(aspect[0]), math.log(aspect[1])).exp_()
    high, wide = (pixels * ratio).sqrt_().round_(), (pixels / ratio).sqrt_().round_()
    fits = (high <= largest[0]) & (wide <= largest[1])
    first = fits.to(torch.uint8).argmax(0, keepdim=True)
    return high.gather(0, first)[0], wide.gather(0, first)[0], fits.any(0)


def shuffle(units: Sequence[int], generator: torch.Generator) -> Tensor:
    """Shuffle the positions 0 … n - 1 of each unit of n: (sum of units,) int64, unit by unit."""
    orders = [uniform((count, size), generator, 0, 1).argsort(dim=1) for size, count in runs(units)]
    return torch.cat([order.flatten() for order in orders])


def runs(units: Sequence[T]) -> list[tuple[T, int]]:
    """Return each value of consecutive equal elements, with their number."""
    return [(value, len(list(equal))) for value, equal in groupby(units)]
