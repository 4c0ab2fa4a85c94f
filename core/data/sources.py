"""Selection of the source type for a path."""

from __future__ import annotations

from pathlib import Path

from core.data.arrays import NpzSource
from core.data.files import CsvSource, FolderSource, TarSource, ZipSource
from core.data.layout import is_image
from core.data.source import TAR_SUFFIXES, Source
from core.errors import UserError

KNOWN_KINDS = "a folder, .zip, .tar, .tar.gz, .tar.xz, .tar.bz2, .npz or .csv"


def open_source(path: Path) -> Source:
    """Open the source at a path: a folder, or a file with a known suffix.

    Raises:
        UserError: the path does not exist or is of an unknown type.
    """
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give {KNOWN_KINDS} of images")
    name = path.name.lower()
    if name.endswith(".zip"):
        return ZipSource(path)
    if name.endswith(TAR_SUFFIXES):
        return TarSource(path)
    if name.endswith(".npz"):
        return NpzSource(path)
    if name.endswith(".csv"):
        return CsvSource(path)
    if is_image(name):
        return FolderSource(path.parent, only=path.name)
    raise UserError(f"{path}: not a known kind of data; give {KNOWN_KINDS} of images")
