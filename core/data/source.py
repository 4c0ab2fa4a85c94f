"""Interface of image sources, which can be listed, stamped and read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from core.config import DataConfig
from core.data.decode import Samples
from core.data.layout import Arrangement, Entry

Content = bytes | Samples | Exception
"""An encoded image, an array (H, W) or (H, W, C), or the error of reading it."""

Payload = Content | Callable[[], Content]
"""A content, or a function that reads it. It is pickled, and called in another process."""

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")


@dataclass(frozen=True)
class Reading:
    """How to read a source."""

    config: DataConfig = field(default_factory=DataConfig)
    skip_broken: bool = False
    """Leave out and count what cannot be read, instead of raising an error."""


class Readable(Protocol):
    """Anything that yields images of entries like `Source.payloads`."""

    where: str

    def payloads(self, entries: Sequence[Entry]) -> Iterator[tuple[int, Payload]]: ...


class Source(ABC):
    """A set of images that can be listed and read."""

    classes: tuple[str, ...] | None = None
    """Class names in their official order, if there is one."""

    in_memory: bool = False
    """Whether the set is so small that it is not cached."""

    def __init__(self, name: str, where: str) -> None:
        self.name = name
        self.where = where

    @abstractmethod
    def stamp(self) -> str:
        """Return a string that changes whenever the source files change."""

    @abstractmethod
    def arranged(self) -> Arrangement:
        """Return the labelled images, in an order that depends on the data alone, and what was left out.

        Raises:
            UserError: the structure is not understood, or something cannot be read.
        """

    @abstractmethod
    def unlabelled(self) -> Arrangement:
        """Return all images without classes, in any folder."""

    @abstractmethod
    def payloads(self, entries: Sequence[Entry]) -> Iterator[tuple[int, Payload]]:
        """Yield (position in `entries`, payload) in any order; later payloads of a position replace earlier ones."""


def plain_name(path: Path) -> str:
    """Return the name without known suffixes: `photos` for `/data/photos.tar.gz`."""
    name = path.resolve().name
    for suffix in sorted((*TAR_SUFFIXES, ".zip", ".npz", ".csv", ".tsv", ".parquet", ".arrow"), key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def file_stamp(path: Path) -> str:
    """Return a string that changes with the file's size or modification time."""
    try:
        status = path.stat()
    except OSError:
        return f"{path.resolve()}|missing"
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"


def one_line(error: BaseException) -> str:
    """Return the message of an error as one line."""
    return " ".join(str(error).split()) or type(error).__name__
