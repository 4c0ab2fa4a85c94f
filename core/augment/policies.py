"""Policies that select operations and levels for each image of a batch.

RandAugment: arXiv 1909.13719. TrivialAugment: arXiv 2103.10158. AutoAugment: arXiv 1805.09501.

Geometry is applied before photometry; AutoAugment has the opposite order only for a whole-pixel shift after `Color`,
where the result is the same. A second operation can move pixels back that torchvision loses at the border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from core.augment.draws import random_sign, runs, shuffle, uniform
from core.augment.operations import OPS, STANDARD, WIDE, Ranges
from core.config import AugmentConfig

SIX = ("Rotate", "ShearX", "TranslateX", "TranslateY", "Brightness", "Contrast")
"""Plain operations that also affect grey images."""

IN_FULL = ("AutoContrast", "Equalize")
"""Operations that TrivialAugment applies in full."""

# torchvision's
_TRIVIAL_BINS = 31
_AUTO_BINS = 10

SubPolicy = tuple[tuple[str, float, int | None], ...]
"""Operations in order: name, probability, magnitude bin if any."""

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
class Assignment:
    """One operation per image: `name` changes the images `rows[name]` (k,), at `levels` (slots,).

    Each unit of images is divided evenly among the choices, so numbers of rows do not depend on the draws.
    """

    names: tuple[str, ...]
    """Operation of each choice."""
    units: tuple[int, ...]
    """Slots per unit."""
    shuffled: Tensor
    """(slots,) int64: the positions in each unit, sorted by choice."""
    levels: Tensor

    def of_units(self, first: int, end: int) -> Assignment:
        """Return the assignment of the units from `first` to before `end`."""
        slots = slice(sum(self.units[:first]), sum(self.units[:end]))
        return Assignment(self.names, self.units[first:end], self.shuffled[slots], self.levels[slots])

    def level_of(self, name: str) -> Tensor:
        """Return the levels of `rows[name]`."""
        return self.levels.index_select(0, self.rows[name])

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """The images of each operation."""
        by_name: dict[str, list[Tensor]] = {}
        for name, group in zip(self.names, grouped(self.shuffled, self.units, len(self.names)), strict=True):
            by_name.setdefault(name, []).append(group)
        return {name: groups[0] if len(groups) == 1 else torch.cat(groups) for name, groups in by_name.items()}

    @cached_property
    def order(self) -> Tensor:
        """The images (slots,) sorted by operation."""
        return torch.cat(list(self.rows.values()))


def grouped(shuffled: Tensor, units: Sequence[int], choices: int) -> Tensor:
    """Return the images of each choice: (choices, slots / choices) int64."""
    groups, start = [], 0
    for size, count in runs(units):
        end = start + count * size
        firsts = torch.arange(start, end, size, device=shuffled.device).view(count, 1, 1)
        by_unit = shuffled[start:end].view(count, choices, -1) + firsts
        groups.append(by_unit.transpose(0, 1).reshape(choices, -1))
        start = end
    return torch.cat(groups, dim=1)


class Policy(Protocol):
    """Assigns operations to the images of a batch."""

    @property
    def ranges(self) -> Ranges:
        """Magnitudes of level 1."""

    @property
    def choices(self) -> int:
        """Number of alternatives, which divides the number of slots of each unit."""

    @property
    def ops(self) -> int:
        """Operations per image; 0 is off."""

    def assign(self, units: Sequence[int], generator: torch.Generator) -> list[Assignment]:
        """Draw `ops` assignments, in order, for units of this many slots."""

    def reach(self, width: int) -> int:
        """Return the maximum sideways shift in pixels of all operations together."""


@dataclass(frozen=True)
class RandAugment:
    """Assigns `ops` of `names`, at `strength` in (0, 1] with a random sign."""

    ops: int
    strength: float
    names: tuple[str, ...] = OPS
    ranges: Ranges = STANDARD

    @property
    def choices(self) -> int:
        return len(self.names)

    def assign(self, units: Sequence[int], generator: torch.Generator) -> list[Assignment]:
        assignments = []
        for _ in range(self.ops):
            shuffled = shuffle(units, generator)
            levels = self._levels(len(shuffled), generator)
            assignments.append(Assignment(self.names, tuple(units), shuffled, levels))
        return assignments

    def _levels(self, slots: int, generator: torch.Generator) -> Tensor:
        return random_sign(slots, generator) * self.strength

    def reach(self, width: int) -> int:
        return self.ops * int(self.ranges.translate(width) * self.strength)


class SixPlain(RandAugment):
    """Assigns `ops` of `SIX`, at uniform levels from minus to plus `strength`."""

    def _levels(self, slots: int, generator: torch.Generator) -> Tensor:
        return uniform(slots, generator, -self.strength, self.strength)


@dataclass(frozen=True)
class TrivialAugment:
    """Assigns one of `OPS`, at one of 31 levels from 0 to 1 with a random sign."""

    ranges: Ranges = WIDE
    choices: int = len(OPS)
    ops: int = 1

    def assign(self, units: Sequence[int], generator: torch.Generator) -> list[Assignment]:
        shuffled = shuffle(units, generator)
        slots = len(shuffled)
        levels = uniform(slots, generator, 0, _TRIVIAL_BINS).floor_().div_(_TRIVIAL_BINS - 1)
        levels.mul_(random_sign(slots, generator))
        assignment = Assignment(OPS, tuple(units), shuffled, levels)
        for name in IN_FULL:
            levels.index_fill_(0, assignment.rows[name], 1)
        return [assignment]

    def reach(self, width: int) -> int:
        return int(self.ranges.translate(width))


class AutoAugment:
    """Assigns a sub-policy of `table`; operations that are not drawn have level 0, the identity."""

    ranges = STANDARD

    def __init__(self, table: tuple[SubPolicy, ...], device: torch.device) -> None:
        self.choices = len(table)
        self.ops = len(table[0])
        self._steps = tuple(zip(*table, strict=True))
        by_step = [[(p, 1.0 if k is None else k / (_AUTO_BINS - 1)) for _, p, k in step] for step in self._steps]
        self._table = torch.tensor(by_step, device=device)  # (ops, choices, 2): probability, level

    def assign(self, units: Sequence[int], generator: torch.Generator) -> list[Assignment]:
        shuffled = shuffle(units, generator)
        groups = grouped(shuffled, units, self.choices)
        places = groups.flatten()
        assignments = []
        for step, table in zip(self._steps, self._table, strict=True):
            probability, level = table[:, 0:1], table[:, 1:2]
            applied = uniform(groups.shape, generator, 0, 1) < probability
            by_group = applied * level * random_sign(len(places), generator).view_as(groups)
            levels = torch.empty_like(by_group).view(-1).index_copy_(0, places, by_group.view(-1))
            names = tuple(name for name, _, _ in step)
            assignments.append(Assignment(names, tuple(units), shuffled, levels))
        return assignments

    def reach(self, width: int) -> int:
        sideways = [max((k or 0 for name, _, k in step if name == "TranslateX"), default=0) for step in self._steps]
        return sum(int(self.ranges.translate(width) * k / (_AUTO_BINS - 1)) for k in sideways)


def build_policy(config: AugmentConfig, device: torch.device) -> Policy:
    """Create the policy of `augment.policy`."""
    if config.policy == "trivialaugment":
        return TrivialAugment()
    if config.policy == "autoaugment_cifar10":
        return AutoAugment(AUTOAUGMENT_CIFAR10, device)
    ops = config.ops if config.strength > 0 else 0
    if config.policy == "six":
        return SixPlain(ops, config.strength, SIX)
    return RandAugment(ops, config.strength)
