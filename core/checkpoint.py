"""Everything that a training needs to go on after it was killed, in one file that is whole or absent.

Written to a temporary name, synced and renamed, and the folder synced too, so a crash or a power cut at any moment
leaves the old file or the new one. The temporary name is always the same, so that what a killed writer left is
overwritten by the next one. Loaded with `weights_only`, so a checkpoint can carry tensors and plain values, and no
code.
"""

from __future__ import annotations

import contextlib
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

# However much a save costs, one is due after these seconds. A disk that stalled once for half a minute would otherwise
# not be written to again for the next 25. It is about the best interval for a save of 12 s where a machine is taken
# away every hour: the root of 2 · 12 s · 3600 s (Young 1974, "A first order approximation to the optimum checkpoint
# interval").
LONGEST_INTERVAL_S = 300.0


class Checkpoints:
    """The checkpoints of one training, each in the place of the one before; saved when it is cheap, and when asked.

    Args:
        path: the file.
        state: what is to be saved, read anew each time.
        on_saved: called with the path after each is whole and in place.
        share: of the training's time, in (0, inf]: how much of it saving may take. One is due as soon as the time since
            the last makes that a share of what the last has cost, or is `LONGEST_INTERVAL_S`; and due at once before
            the first, whose cost nobody knows.
    """

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
        """Whether saving has become cheap again."""
        return time.perf_counter() - self._saved_at >= self._interval_s

    def save(self) -> None:
        """Saves, whether it is due or not.

        Raises:
            OSError: the disk is full, or gone. The checkpoint before is still there, whole.
        """
        began = time.perf_counter()
        save_checkpoint(self._path, self._state())
        self._saved_at = time.perf_counter()
        self._interval_s = min((self._saved_at - began) / self._share, LONGEST_INTERVAL_S)
        if self._on_saved is not None:
            self._on_saved(self._path)


def unfinished(path: Path) -> Path:
    """What a checkpoint is called while it is written; a killed writer leaves it behind."""
    return path.with_name(f"{path.name}.tmp")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes the state atomically; tensors on any device. A file has one writer at a time.

    Raises:
        OSError: the disk is full, or gone. What was at `path` is still there, whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished(path)
    try:
        with temporary.open("wb") as file, _told_as_it_was():
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)  # the rename is the folder's content, and may otherwise be lost with the power


@contextlib.contextmanager
def _told_as_it_was() -> Iterator[None]:
    """Raises what stopped a save, the disk's error or an interrupt, where torch then fails over the file's length."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError | KeyboardInterrupt):
            raise error.__context__ from None
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """The state as it was saved, its tensors on `device`.

    Raises:
        CheckpointError: the file is torn, damaged, no checkpoint, or one of another format; or it would run code, or
            unpack to more than it is.
        OSError: there is no such file, or it cannot be read.
    """
    try:
        _check_archive(path)
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # the disk or the device is at fault, and not what the file says
    except pickle.UnpicklingError as error:
        raise _refusal(path, "it holds more than tensors and plain values") from error
    except Exception as error:  # on torn files zipfile and torch raise anything from KeyError to RuntimeError
        reason = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
        raise _refusal(path, reason) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this version; delete it to train from the beginning")
    return state


def _check_archive(path: Path) -> None:
    """Refuses what torch would load without a word: damaged tensors, and a small file that unpacks to a huge one.

    Raises:
        zipfile.BadZipFile: it is damaged, or no archive.
    """
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise zipfile.BadZipFile("it unpacks to more than it is")
        damaged = archive.testzip()  # compares what torch wrote down of each tensor; a third of a second a gigabyte
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} is damaged")


def _refusal(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a checkpoint ({reason}); delete it to train from the beginning")
