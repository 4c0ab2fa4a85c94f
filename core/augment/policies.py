"""Which operations each image of a batch gets, and how strongly. A policy deals its cards in equal hands.

RandAugment: Cubuk et al. 2020, arXiv 1909.13719. TrivialAugment: Müller and Hutter 2021, arXiv 2103.10158. AutoAugment:
Cubuk et al. 2019, arXiv 1805.09501, whose table for CIFAR-10 is that of torchvision.

The pipeline composes all of an image's geometry, and does it before the photometry. AutoAugment's table says another
order once only, a whole-pixel shift after `Color`, which comes out the same. What one move pushes over the border, a
second one can bring back, where torchvision has lost it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from core.augment.draws import deal_hands, random_sign, uniform
from core.augment.operations import OPS, STANDARD, WIDE, Ranges
from core.config import AugmentConfig

SIX = ("Rotate", "ShearX", "TranslateX", "TranslateY", "Brightness", "Contrast")
"""The plain operations, of which each means something on any image, also a grey one."""

IN_FULL = ("AutoContrast", "Equalize")
"""What of `OPS` TrivialAugment applies in full, whatever it draws."""

# torchvision's `TrivialAugmentWide(num_magnitude_bins=31)`, and the 10 of `AutoAugment`.
_TRIVIAL_BINS = 31
_AUTO_BINS = 10

SubPolicy = tuple[tuple[str, float, int | None], ...]
"""Operations in turn: name, probability, magnitude bin of 10, or None where the operation has no magnitude."""

AUTOAUGMENT_CIFAR10: tuple[SubPolicy, ...] = (
    (("Invert", 0.1, None), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, None), ("Equalize", 0.9, None)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, None), ("Equalize", 0.5, None)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, None), ("AutoContrast", 0.4, None)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, None)),
    (("Equalize", 0.2, None), ("AutoContrast", 0.6, None)),
    (("Equalize", 0.2, None), ("Equalize", 0.6, None)),
    (("Color", 0.9, 9), ("Equalize", 0.6, None)),
    (("AutoContrast", 0.8, None), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, None)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, None), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, None), ("Invert", 0.1, None)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, None)),
)
"""torchvision's `AutoAugmentPolicy.CIFAR10`."""


@dataclass(frozen=True)
class Round:
    """One operation for each image: `rows[name]` (k,) are the images that `name` changes, `levels` (slots,)."""

    rows: dict[str, Tensor]
    levels: Tensor

    def level_of(self, name: str) -> Tensor:
        """The levels (k,) of the images that `name` changes."""
        return self.levels.index_select(0, self.rows[name])

    @cached_property
    def order(self) -> Tensor:
        """The images, those of one operation after those of another: (slots,) int64."""
        return torch.cat(list(self.rows.values()))


class Policy(Protocol):
    """Deals operations to the images of a batch."""

    @property
    def ranges(self) -> Ranges:
        """What the levels that it deals stand for."""

    @property
    def cards(self) -> int:
        """A batch has a multiple of this many slots."""

    @property
    def rounds(self) -> int:
        """How many operations an image gets; 0 is off."""

    def deal(self, slots: int, generator: torch.Generator) -> list[Round]:
        """Draws a batch's operations, in their order: `rounds` of them, each for (slots,) images."""

    def reach(self, width: int) -> int:
        """The farthest that the rounds together move an image of so many pixels sideways, in pixels."""


@dataclass(frozen=True)
class RandAugment:
    """Each round gives every image one of `OPS`, at `strength` in (0, 1] with a random sign."""

    rounds: int
    strength: float
    ranges: Ranges = STANDARD
    cards: int = len(OPS)

    def deal(self, slots: int, generator: torch.Generator) -> list[Round]:
        rounds = []
        for _ in range(self.rounds):
            hands = deal_hands(slots, self.cards, generator)
            levels = random_sign(slots, generator) * self.strength
            rounds.append(Round(dict(zip(OPS, hands, strict=True)), levels))
        return rounds

    def reach(self, width: int) -> int:
        return self.rounds * int(self.ranges.translate(width) * self.strength)


@dataclass(frozen=True)
class SixPlain:
    """Each round gives every image one of `SIX`, at a level drawn evenly from minus to plus `strength`."""

    rounds: int
    strength: float
    ranges: Ranges = STANDARD
    cards: int = len(SIX)

    def deal(self, slots: int, generator: torch.Generator) -> list[Round]:
        rounds = []
        for _ in range(self.rounds):
            hands = deal_hands(slots, self.cards, generator)
            levels = uniform(slots, generator, -self.strength, self.strength)
            rounds.append(Round(dict(zip(SIX, hands, strict=True)), levels))
        return rounds

    def reach(self, width: int) -> int:
        return self.rounds * int(self.ranges.translate(width) * self.strength)


@dataclass(frozen=True)
class TrivialAugment:
    """Gives every image one of `OPS`, at one of 31 levels from 0 to 1 with a random sign, in the wide ranges."""

    ranges: Ranges = WIDE
    cards: int = len(OPS)
    rounds: int = 1

    def deal(self, slots: int, generator: torch.Generator) -> list[Round]:
        rows = dict(zip(OPS, deal_hands(slots, self.cards, generator), strict=True))
        levels = uniform(slots, generator, 0, _TRIVIAL_BINS).floor_().div_(_TRIVIAL_BINS - 1)
        levels.mul_(random_sign(slots, generator))
        for name in IN_FULL:
            levels.index_fill_(0, rows[name], 1)
        return [Round(rows, levels)]

    def reach(self, width: int) -> int:
        return int(self.ranges.translate(width))


class AutoAugment:
    """Gives every image one sub-policy of `table`: its operations in turn, each with its probability.

    An image that the probability leaves out gets the operation at level 0, which is the identity.
    """

    ranges = STANDARD

    def __init__(self, table: tuple[SubPolicy, ...], device: torch.device) -> None:
        self.cards = len(table)
        self.rounds = len(table[0])
        self._turns = tuple(zip(*table, strict=True))  # of each round, the operation of each card
        in_turn = [[(p, 1.0 if k is None else k / (_AUTO_BINS - 1)) for _, p, k in turn] for turn in self._turns]
        self._table = torch.tensor(in_turn, device=device)  # (rounds, cards, 2): probability, level

    def deal(self, slots: int, generator: torch.Generator) -> list[Round]:
        hands = deal_hands(slots, self.cards, generator)
        places = hands.flatten()
        rounds = []
        for turn, table in zip(self._turns, self._table, strict=True):
            probability, level = table[:, 0:1], table[:, 1:2]
            applied = uniform(hands.shape, generator, 0, 1) < probability
            by_hand = applied * level * random_sign(slots, generator).view_as(hands)
            levels = torch.empty_like(by_hand).view(-1).index_copy_(0, places, by_hand.view(-1))
            held: dict[str, list[Tensor]] = {}
            for (name, _, _), hand in zip(turn, hands, strict=True):
                held.setdefault(name, []).append(hand)
            rounds.append(Round({name: torch.cat(parts) for name, parts in held.items()}, levels))
        return rounds

    def reach(self, width: int) -> int:
        sideways = [max((k or 0 for name, _, k in turn if name == "TranslateX"), default=0) for turn in self._turns]
        return sum(int(self.ranges.translate(width) * k / (_AUTO_BINS - 1)) for k in sideways)


def build_policy(config: AugmentConfig, device: torch.device) -> Policy:
    """The policy that `augment.policy` names; its `rounds` are 0 where `ops` or `strength` are and apply."""
    if config.policy == "trivialaugment":
        return TrivialAugment()
    if config.policy == "autoaugment_cifar10":
        return AutoAugment(AUTOAUGMENT_CIFAR10, device)
    rounds = config.ops if config.strength > 0 else 0
    if config.policy == "six":
        return SixPlain(rounds, config.strength)
    return RandAugment(rounds, config.strength)
