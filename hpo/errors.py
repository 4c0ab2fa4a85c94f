"""The mistakes that `hpo` tells a person about, each in one line: what, where, what to do. The command exits with 2."""

from __future__ import annotations

import errno
from dataclasses import dataclass

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What a write ends with where the disk is full, or a person's share of it."""


class HpoError(Exception):
    """The base of every error that a person can mend."""


class StudyError(HpoError):
    """A study that cannot be found, or cannot go on as asked."""


class BundleError(HpoError):
    """A folder that should hold a submission model and does not, or images that do not fit it."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong in a search space or recipe."""

    where: str
    """`file:line`, or `--set key`."""
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class SpaceError(HpoError):
    """A search space or recipe with faults: all of them, each a line."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = faults
