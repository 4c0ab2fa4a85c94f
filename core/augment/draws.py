"""Random numbers for a batch, from the generator that is passed in, on its device, without a wait for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def uniform(shape: int | Sequence[int], generator: torch.Generator, low: float, high: float) -> Tensor:
    """Draws from [low, high): a tensor float32 of that shape, or of that length."""
    size = (shape,) if isinstance(shape, int) else tuple(shape)
    return torch.rand(size, generator=generator, device=generator.device).mul_(high - low).add_(low)


def random_sign(count: int, generator: torch.Generator) -> Tensor:
    """1 or -1, as often: (count,) float32."""
    return uniform(count, generator, -1, 1).sign_()


def deal_hands(slots: int, cards: int, generator: torch.Generator) -> Tensor:
    """The places 0 … slots - 1, shuffled and cut into equal hands, one a card: (cards, slots / cards) int64.

    `slots` is a multiple of `cards`.
    """
    return uniform(slots, generator, 0, 1).argsort().view(cards, -1)
