"""What a source of images is: something that can be listed, stamped and read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from core.data.decode import Pixels
from core.data.layout import Entry

Payload = bytes | Pixels | Exception
"""An encoded image, an array (H, W) or (H, W, C), or why it could not be read."""

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")


class Readable(Protocol):
    """Whatever gives the images of entries, as `Source.payloads` does."""

    def payloads(self, entries: Sequence[Entry]) -> Iterator[tuple[int, Payload]]: ...


class Source(ABC):
    """A set of images that can be listed and read."""

    classes: tuple[str, ...] | None = None
    """Class names in their official order, where the set has one."""

    in_memory: bool = False
    """Whether the set is so small and so quick to load that no cache is kept of it."""

    def __init__(self, name: str, where: str) -> None:
        self.name = name
        self.where = where

    @abstractmethod
    def stamp(self) -> str:
        """Changes whenever the files that the images are read from change."""

    @abstractmethod
    def labelled(self) -> list[Entry]:
        """All images with their classes, in an order that depends on the data alone."""

    @abstractmethod
    def unlabelled(self) -> list[Entry]:
        """All images, whatever the folders that they lie in."""

    @abstractmethod
    def payloads(self, entries: Sequence[Entry]) -> Iterator[tuple[int, Payload]]:
        """The images of these entries as (position in `entries`, payload), in any order; a later one replaces an
        earlier one of the same position."""


def plain_name(path: Path) -> str:
    """`photos` of `/data/photos.tar.gz`."""
    name = path.resolve().name
    for suffix in sorted((*TAR_SUFFIXES, ".zip", ".npz", ".csv"), key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def file_stamp(path: Path) -> str:
    """Changes whenever the file at the path does, as far as its size and time of change tell."""
    try:
        status = path.stat()
    except OSError:
        return f"{path.resolve()}|missing"
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"


def one_line(error: BaseException) -> str:
    """What an error of another library says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
