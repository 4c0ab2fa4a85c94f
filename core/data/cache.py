"""A decoded data set on disk: plain .npy files that are memory-mapped, so that a second start takes no time.

What a search may see and what the test set holds are separate files: a search never maps the test images. A cache is
built in a temporary folder and renamed when it is complete, so one that is there is whole; that its files have the
length that its description states is checked all the same, since disks fill up and copies break off.
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

# Raised whenever the files or the decoding change: older caches are then left alone and new ones built.
FORMAT = 2

META = "meta.json"

# What a cache's folder is called while it is built: a dot, its `cache_key`, and what `tempfile` adds.
UNFINISHED = re.compile(r"\.[A-Za-z0-9_.-]+-[0-9a-f]{20}-[a-z0-9_]{8}")
# Seconds after its last change when an unfinished cache is one of a killed process. A build writes all the time.
ABANDONED_S = 24 * 3600.0


def cache_key(name: str, *parts: Any) -> str:
    """The name of a cache's folder: readable at its start, and different whenever one of the parts is."""
    digest = hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:20]
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[:40]}-{digest}"


def cached(root: Path, key: str, build: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """The folder of the cache `key` under `root`, and its description; built by `build` where it is not there whole.

    `build` writes files into the folder it is given and returns the description. Several processes may build the same
    cache at once: the first to finish wins.

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
            if not _placed(fresh, folder):  # a torn one is in the way
                with contextlib.suppress(FileNotFoundError):
                    folder.rename(Path(temporary) / "torn")
                if not _placed(fresh, folder):
                    raise FileExistsError(errno.EEXIST, "a damaged cache cannot be replaced", str(folder))
    except OSError as error:
        raise UserError(
            f"{root}: cannot write the cache of decoded images there ({error.strerror or error}); "
            "free some space, or give another folder for it"
        ) from error
    meta = read_meta(folder)
    assert meta is not None
    return folder, meta


def _placed(fresh: Path, folder: Path) -> bool:
    """Whether `folder` is a whole cache after an attempt to rename `fresh` to it.

    Tried before looking: what lies there may be another process's, finished a moment ago and as good as this one.
    """
    try:
        fresh.rename(folder)
    except OSError:
        if not folder.exists():
            raise
    return read_meta(folder) is not None


def _sweep(root: Path) -> None:
    """Removes what killed processes left half built under `root`, and nothing that may still be written to."""
    for folder in root.iterdir():
        if UNFINISHED.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            with contextlib.suppress(OSError):  # another process may be sweeping too
                last_change = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
                if time.time() - last_change > ABANDONED_S:
                    shutil.rmtree(folder, ignore_errors=True)


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Writes the description, with the length of each file, and makes sure that all of it has reached the disk."""
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    (folder / META).write_text(json.dumps({**meta, "format": FORMAT, "files": files}), encoding="utf-8")
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())


def read_meta(folder: Path) -> dict[str, Any] | None:
    """The description of a whole cache; None where there is none, or a torn one."""
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
    """Turns what is wrong with the files of a cache, whose lengths are as its description says, into one line.

    A crash leaves no such cache: someone wrote into it. Nothing in it can run code, whatever it holds.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder}: the cache of decoded images is damaged ({one_line(error)}); delete that folder and run again"
        ) from error


def write_images(path: Path, shape: tuple[int, int, int, int], images: Iterable[Pixels]) -> None:
    """Writes images (C, H, W) as one .npy of `shape` (N, C, H, W), one at a time.

    Through a file and not a map: on a full disk this raises, where a map would kill the process.
    """
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for image in images:
            file.write(np.ascontiguousarray(image).data)


def open_array(path: Path, mapped: bool, dtype: type[np.generic], shape: tuple[int | None, ...]) -> Tensor:
    """The tensor in an .npy; mapped copy-on-write, since torch has no read-only tensors, or read into memory.

    Args:
        dtype: what its numbers must be.
        shape: what its shape must be, None where any length will do.

    Raises:
        ValueError: it is another array, or none.
    """
    # Mapped in either case: numpy then holds the length that the header claims against the file's, and never makes room
    # for one that is not there.
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except ValueError as error:  # whose words, of a pickle, say how to run it
        raise ValueError(f"{path.name} is no array of plain numbers") from error
    fits = len(array.shape) == len(shape) and all(
        want in (None, have) for want, have in zip(shape, array.shape, strict=True)
    )
    if array.dtype != dtype or not fits:
        raise ValueError(f"{path.name} has {array.dtype} of shape {array.shape}")
    return torch.from_numpy(array if mapped else np.array(array))
