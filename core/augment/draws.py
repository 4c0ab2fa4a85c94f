"""Random numbers for a batch, from the generator that is passed in, on its device, without a wait for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_TRIES = 10


def uniform(shape: int | Sequence[int], generator: torch.Generator, low: float, high: float) -> Tensor:
    """Draws from [low, high): a tensor float32 of that shape, or of that length."""
    size = (shape,) if isinstance(shape, int) else tuple(shape)
    return torch.rand(size, generator=generator, device=generator.device).mul_(high - low).add_(low)


def random_sign(count: int, generator: torch.Generator) -> Tensor:
    """1 or -1, as often: (count,) float32."""
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
    """Sizes of rectangles in images of `size` (H, W), as torchvision draws them for a crop and for erasing.

    `area` is the range of shares of an image, drawn evenly; `aspect` that of height over width, its logarithm drawn
    evenly. Returns heights and widths (count,) float32 of whole pixels, and whether there is one (count,) bool: none of
    ten tries was within `largest` (h, w).
    """
    # torchvision draws again while a rectangle is too large, at most ten times. Here all ten are drawn at once.
    tries = (_TRIES, count)
    pixels = uniform(tries, generator, *area) * (size[0] * size[1])
    ratio = uniform(tries, generator, math.log(aspect[0]), math.log(aspect[1])).exp_()
    high, wide = (pixels * ratio).sqrt_().round_(), (pixels / ratio).sqrt_().round_()
    fits = (high <= largest[0]) & (wide <= largest[1])
    first = fits.to(torch.uint8).argmax(0, keepdim=True)
    return high.gather(0, first)[0], wide.gather(0, first)[0], fits.any(0)


def deal_hands(slots: int, cards: int, generator: torch.Generator) -> Tensor:
    """The places 0 … slots - 1, shuffled and cut into equal hands, one a card: (cards, slots / cards) int64.

    `slots` is a multiple of `cards`.
    """
    return uniform(slots, generator, 0, 1).argsort().view(cards, -1)
