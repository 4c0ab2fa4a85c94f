"""Everything that a training needs to go on after it was killed, in one file that is whole or absent.

Written to a temporary name, synced and renamed, so a crash at any moment leaves the old file or the new one. Loaded
with `weights_only`, so a checkpoint can carry tensors and plain values, and no code.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from core.errors import UserError

FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes the state atomically; tensors on any device."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """The state as it was saved, its tensors on `device`.

    Raises:
        UserError: the file is no checkpoint, or one of another format.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path}: not a checkpoint ({error}); delete it to train from the beginning") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this version; delete it to train from the beginning")
    return state
