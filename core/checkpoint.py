"""Everything that a training needs to go on after it was killed, in one file that is whole or absent.

Written to a temporary name, synced and renamed, so a crash at any moment leaves the old file or the new one. The
temporary name is always the same, so that what a killed writer left is overwritten by the next one. Loaded with
`weights_only`, so a checkpoint can carry tensors and plain values, and no code.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from core.errors import CheckpointError

FORMAT = 2


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes the state atomically; tensors on any device. A file has one writer at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """The state as it was saved, its tensors on `device`.

    Raises:
        CheckpointError: the file is torn, no checkpoint, or one of another format.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # the disk or the device is at fault, and not what the file says
    except Exception as error:  # on torn files the unpickler raises anything from KeyError to RuntimeError
        reason = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
        raise CheckpointError(f"{path}: not a checkpoint ({reason}); delete it to train from the beginning") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this version; delete it to train from the beginning")
    return state
