"""Errors caused by user input, each one line: the problem, its place and the fix. The command exits with code 2."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from core.errors import PrintableError
from core.text import printable

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Error numbers of a write to a full disk, or beyond the user's quota."""

SYSTEM_ERRORS = FULL_DISK | {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EMFILE, errno.ENFILE),
}
"""Error numbers of the system that no mistake of this program causes."""


class HpoError(PrintableError):
    """Base class of errors caused by user input."""


class StudyError(HpoError):
    """A study was not found, or cannot be resumed as asked."""


class TimeLimitError(StudyError):
    """A time limit is too short."""


class BundleError(HpoError):
    """A folder holds no valid submission model, or images do not fit the model."""


@dataclass(frozen=True)
class Fault:
    """One fault of a search space or recipe."""

    where: str
    """`file:line`, or `--set key`."""
    message: str

    def __str__(self) -> str:
        return printable(f"{self.where}: {self.message}")


class SpaceError(HpoError):
    """A search space or recipe has faults; the message has one line for each."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = faults
