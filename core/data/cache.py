"""Cache of decoded data sets: plain .npy files, memory-mapped.

Test images are in separate files, which a search never maps. A cache is built in a temporary folder and renamed when
complete. File sizes are still verified, since copies may be incomplete.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.data.decode import Pixels
from core.data.source import one_line
from core.errors import UserError

# Incremented when the files or the decoding change; older caches are then ignored.
FORMAT = 4

META = "meta.json"

# Name of a cache's folder while it is built: a dot, its `cache_key`, and a suffix of `tempfile`.
UNFINISHED = re.compile(r"\.[A-Za-z0-9_.-]+-[0-9a-f]{20}-[a-z0-9_]{8}")
# Seconds since the last change after which an unfinished cache counts as abandoned. A build writes continuously.
ABANDONED_S = 24 * 3600.0


def cache_key(name: str, *parts: Any) -> str:
    """Return the folder name of a cache: readable prefix and a digest of all parts."""
    digest = hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:20]
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[:40]}-{digest}"


def cached(root: Path, key: str, build: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """Return the folder and description of a cache, built by `build(folder)` if it is missing or damaged.

    Several processes may build the same cache at once; the first to finish wins.

    Raises:
        UserError: the cache cannot be written.
    """
    folder = root / key
    meta = read_meta(folder)
    if meta is not None:
        return folder, meta
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        with tempfile.TemporaryDirectory(prefix=f".{key}-", dir=root, ignore_cleanup_errors=True) as temporary:
            fresh = Path(temporary) / key
            fresh.mkdir()
            write_meta(fresh, build(fresh))
            if not _placed(fresh, folder):  # replace a damaged one
                with contextlib.suppress(FileNotFoundError):
                    folder.rename(Path(temporary) / "torn")
                if not _placed(fresh, folder):
                    raise FileExistsError(errno.EEXIST, "a damaged cache cannot be replaced", str(folder))
    except OSError as error:
        raise UserError(
            f"{root}: cannot write the cache of decoded images there ({error.strerror or error}); "
            "free some space, or give another folder for it by HPO_CACHE"
        ) from error
    meta = read_meta(folder)
    assert meta is not None
    return folder, meta


def _placed(fresh: Path, folder: Path) -> bool:
    """Try to rename `fresh` to `folder`; return whether it is complete now, possibly from another process."""
    try:
        fresh.rename(folder)
    except OSError:
        if not folder.exists():
            raise
    return read_meta(folder) is not None


def _sweep(root: Path) -> None:
    """Remove unfinished caches of killed processes under `root`."""
    for folder in root.iterdir():
        if UNFINISHED.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            with contextlib.suppress(OSError):  # another process may do the same
                last_change = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
                if time.time() - last_change > ABANDONED_S:
                    shutil.rmtree(folder, ignore_errors=True)


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write the description with the size of each file, and sync all files to disk."""
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    (folder / META).write_text(json.dumps({**meta, "format": FORMAT, "files": files}), encoding="utf-8")
    for file in folder.iterdir():
        with file.open("r+b") as written:
            os.fsync(written.fileno())


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Return the description of a complete cache; None if it is missing or damaged."""
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
        whole = meta["format"] == FORMAT and all(
            (folder / name).stat().st_size == size for name, size in meta["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return meta if whole else None


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Raise UserError for errors while reading a cache's files, which are only caused by changes to them."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder}: the cache of decoded images is damaged ({one_line(error)}); delete that folder and run again"
        ) from error


def write_images(path: Path, shape: tuple[int, int, int, int], images: Iterable[Pixels]) -> None:
    """Write images (C, H, W) to one .npy of `shape` (N, C, H, W), one at a time.

    Uses a file instead of a memory map: on a full disk this raises, where a map would kill the process.
    """
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for image in images:
            file.write(np.ascontiguousarray(image).data)


def open_array(path: Path, mapped: bool, dtype: type[np.generic], shape: tuple[int | None, ...]) -> Tensor:
    """Open an .npy of that dtype and shape (None: any length) as a tensor, memory-mapped copy-on-write or read.

    Raises:
        ValueError: it is not such an array.
    """
    # Mapped in either case, so that numpy checks the declared size against the file before allocating memory.
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except ValueError as error:  # numpy's message recommends allow_pickle
        raise ValueError(f"{path.name} is not an array of plain numbers") from error
    fits = len(array.shape) == len(shape) and all(
        want in (None, have) for want, have in zip(shape, array.shape, strict=True)
    )
    if array.dtype != dtype or not fits:
        raise ValueError(f"{path.name} has {array.dtype} of shape {array.shape}")
    return torch.from_numpy(array if mapped else np.array(array))
