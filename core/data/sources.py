"""Selection of the source type for a path."""

from __future__ import annotations

import difflib
from pathlib import Path

from core.data import builtin, hub
from core.data.arrays import NpzSource
from core.data.files import FolderSource, TarSource, ZipSource
from core.data.layout import HUB_SUFFIXES, TABLE_SUFFIXES, is_image
from core.data.source import TAR_SUFFIXES, Reading, Source
from core.data.table_source import open_table
from core.errors import UserError

KNOWN_KINDS = "a folder, .zip, .tar, .tar.gz, .tar.xz, .tar.bz2, .npz, .csv or .parquet"


def check_source(name: str, data_path: Path | None) -> None:
    """Check that a data set exists: a built-in one, or images at a path. Needs no torch.

    Args:
        name: `DataConfig.name`.
        data_path: As in `core.data.load_dataset`.

    Raises:
        UserError: there is nothing at the path.
    """
    if data_path is not None:
        _check_path(data_path.expanduser())
    elif name not in builtin.NAMES and not Path(name).expanduser().exists():
        near = difflib.get_close_matches(name, builtin.NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"data.name: {name} is neither a built-in data set ({', '.join(builtin.NAMES)}) "
            f"nor a path that exists{hint or '; give your images with --data'}"
        )


def _check_path(path: Path) -> None:
    try:
        path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder; give {KNOWN_KINDS} of images") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def open_source(path: Path, reading: Reading | None = None) -> Source:
    """Open the source at a path: a folder, or a file with a known suffix.

    Args:
        path: where it is; `~` is the user's folder.
        reading: how to read it; None reads what is clear without options.

    Raises:
        UserError: the path does not exist, cannot be read, or is of an unknown type.
    """
    path, reading = path.expanduser(), reading or Reading()
    _check_path(path)
    if path.is_dir():
        files = hub.files_in(path)
        return hub.HubSource(path, files, reading) if files else FolderSource(path, reading)
    name = path.name.lower()
    if name.endswith(".zip"):
        return ZipSource(path, reading)
    if name.endswith(TAR_SUFFIXES):
        return TarSource(path, reading)
    if name.endswith(".npz"):
        return NpzSource(path)
    if name.endswith(TABLE_SUFFIXES):
        return open_table(path, reading)
    if name.endswith(HUB_SUFFIXES):
        return hub.HubSource(path, [path], reading)
    if is_image(name):
        return FolderSource(path.parent, reading, only=path.name)
    raise UserError(f"{path}: not a known kind of data; give {KNOWN_KINDS} of images")
