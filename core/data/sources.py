"""Selection of the source type for a path."""

from __future__ import annotations

from pathlib import Path

from core.config import DataConfig
from core.data import hub
from core.data.arrays import NpzSource
from core.data.files import FolderSource, TarSource, ZipSource
from core.data.layout import HUB_SUFFIXES, TABLE_SUFFIXES, is_image
from core.data.source import TAR_SUFFIXES, Source
from core.data.table_source import open_table
from core.errors import UserError

KNOWN_KINDS = "a folder, .zip, .tar, .tar.gz, .tar.xz, .tar.bz2, .npz, .csv or .parquet"


def open_source(path: Path, config: DataConfig | None = None) -> Source:
    """Open the source at a path: a folder, or a file with a known suffix.

    Args:
        path: where it is; `~` is the user's folder.
        config: how to read it; None reads what is clear without options.

    Raises:
        UserError: the path does not exist, cannot be read, or is of an unknown type.
    """
    path, config = path.expanduser(), config or DataConfig()
    try:
        path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder; give {KNOWN_KINDS} of images") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if path.is_dir():
        files = hub.files_in(path)
        return hub.HubSource(path, files, config) if files else FolderSource(path, config)
    name = path.name.lower()
    if name.endswith(".zip"):
        return ZipSource(path, config)
    if name.endswith(TAR_SUFFIXES):
        return TarSource(path, config)
    if name.endswith(".npz"):
        return NpzSource(path)
    if name.endswith(TABLE_SUFFIXES):
        return open_table(path, config)
    if name.endswith(HUB_SUFFIXES):
        return hub.HubSource(path, [path], config)
    if is_image(name):
        return FolderSource(path.parent, config, only=path.name)
    raise UserError(f"{path}: not a known kind of data; give {KNOWN_KINDS} of images")
