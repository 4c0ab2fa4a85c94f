"""Checkpoints: a training's state in one file.

It is written to a temporary name, synced and renamed, so a crash leaves either the old or the new file. Loading cannot
run code.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import pickle
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from core.errors import CheckpointError

FORMAT = 3

# About the optimum for a save of 12 s on a machine that is preempted every hour, sqrt(2 · 12 s · 3600 s) (Young 1974,
# "A first order approximation to the optimum checkpoint interval").
LONGEST_INTERVAL_S = 300.0


class Checkpoints:
    """Saves checkpoints of a training, in at most the fraction `share` in (0, inf] of its time."""

    def __init__(
        self,
        path: Path,
        state: Callable[[], dict[str, Any]],
        *,
        on_saved: Callable[[Path], None] | None = None,
        share: float,
    ) -> None:
        self._path, self._state, self._on_saved, self._share = path, state, on_saved, share
        self._interval_s = 0.0
        self._saved_at = -math.inf

    @property
    def due(self) -> bool:
        """Whether enough time has passed since the last save; True at first."""
        return time.perf_counter() - self._saved_at >= self._interval_s

    def save(self) -> None:
        """Save now, as `save_checkpoint`."""
        began = time.perf_counter()
        save_checkpoint(self._path, self._state())
        self._saved_at = time.perf_counter()
        self._interval_s = min((self._saved_at - began) / self._share, LONGEST_INTERVAL_S)
        if self._on_saved is not None:
            self._on_saved(self._path)


def unfinished(path: Path) -> Path:
    """Return the name of a checkpoint while it is being written, which a killed process may leave behind."""
    return path.with_name(f"{path.name}.tmp")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values atomically; one process at a time.

    Raises:
        OSError: writing failed; the previous file is intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished(path)
    temporary.unlink(missing_ok=True)  # of a killed process, or a symbolic link to another file
    try:
        with temporary.open("xb") as file, _original_error():
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)  # a rename is lost in a power cut otherwise


@contextlib.contextmanager
def _original_error() -> Iterator[None]:
    """Raise the cause of an error of torch about the file's length."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError | KeyboardInterrupt):
            raise error.__context__ from None
        raise


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Load a saved state with its tensors on `device`.

    Raises:
        CheckpointError: the file is damaged, not a checkpoint, of another format, contains code, or is compressed.
        OSError: the file does not exist or cannot be read.
    """
    try:
        _check_archive(path)
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError) as error:
        if isinstance(error, OSError) and error.errno == errno.EINVAL:  # a place before the file's start
            raise _refusal(path, "a part of it is missing") from error
        raise  # caused by the disk or the device, not by the file
    except pickle.UnpicklingError as error:
        raise _refusal(path, "it holds more than tensors and plain values") from error
    except Exception as error:  # zipfile and torch raise many types on damaged files
        reason = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
        raise _refusal(path, reason) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this version; delete it to train from the beginning")
    return state


def _check_archive(path: Path) -> None:
    """Raise BadZipFile for damaged tensors and decompression bombs, which torch would load."""
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise zipfile.BadZipFile("it unpacks to more than it is")
        damaged = archive.testzip()  # verifies checksums; 0.3 s per GB
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} is damaged")


def _refusal(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a checkpoint ({reason}); delete it to train from the beginning")
