"""Policies that select operations and levels for each image of a batch.

RandAugment: arXiv 1909.13719. TrivialAugment: arXiv 2103.10158. AutoAugment: arXiv 1805.09501.

Geometry is applied before photometry; AutoAugment has the opposite order only for a whole-pixel shift after `Color`,
where the result is the same. A second operation can move pixels back that torchvision loses at the border.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from core.augment.draws import assign_evenly, random_sign, uniform
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
    """One operation per image: `name` changes the images `rows[name]` (k,), at `levels` (slots,)."""

    rows: dict[str, Tensor]
    levels: Tensor

    def level_of(self, name: str) -> Tensor:
        """Return the levels of `rows[name]`."""
        return self.levels.index_select(0, self.rows[name])

    @cached_property
    def order(self) -> Tensor:
        """The images (slots,) sorted by operation."""
        return torch.cat(list(self.rows.values()))


class Policy(Protocol):
    """Assigns operations to the images of a batch."""

    @property
    def ranges(self) -> Ranges:
        """Magnitudes of level 1."""

    @property
    def choices(self) -> int:
        """Number of alternatives, which divides the number of slots."""

    @property
    def ops(self) -> int:
        """Operations per image; 0 is off."""

    def assign(self, slots: int, generator: torch.Generator) -> list[Assignment]:
        """Draw `ops` assignments, in order."""

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

    def assign(self, slots: int, generator: torch.Generator) -> list[Assignment]:
        assignments = []
        for _ in range(self.ops):
            groups = assign_evenly(slots, self.choices, generator)
            assignments.append(Assignment(dict(zip(self.names, groups, strict=True)), self._levels(slots, generator)))
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

    def assign(self, slots: int, generator: torch.Generator) -> list[Assignment]:
        rows = dict(zip(OPS, assign_evenly(slots, self.choices, generator), strict=True))
        levels = uniform(slots, generator, 0, _TRIVIAL_BINS).floor_().div_(_TRIVIAL_BINS - 1)
        levels.mul_(random_sign(slots, generator))
        for name in IN_FULL:
            levels.index_fill_(0, rows[name], 1)
        return [Assignment(rows, levels)]

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

    def assign(self, slots: int, generator: torch.Generator) -> list[Assignment]:
        groups = assign_evenly(slots, self.choices, generator)
        places = groups.flatten()
        assignments = []
        for step, table in zip(self._steps, self._table, strict=True):
            probability, level = table[:, 0:1], table[:, 1:2]
            applied = uniform(groups.shape, generator, 0, 1) < probability
            by_group = applied * level * random_sign(slots, generator).view_as(groups)
            levels = torch.empty_like(by_group).view(-1).index_copy_(0, places, by_group.view(-1))
            by_name: dict[str, list[Tensor]] = {}
            for (name, _, _), group in zip(step, groups, strict=True):
                by_name.setdefault(name, []).append(group)
            assignments.append(Assignment({name: torch.cat(parts) for name, parts in by_name.items()}, levels))
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
