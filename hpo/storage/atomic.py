"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = ".tmp"
"""What the name of a file ends with while it is written; a killed writer leaves it behind."""


@contextlib.contextmanager
def replacing(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """A path beside `path` to write a file to. When the block ends it takes the place of what was there, in one step.

    After an exception it is gone, and what was there still is. Two that write the same file do not meet, though they be
    processes of one number on two machines; the later one's stays. `synced` waits until the disk has it, so that it
    outlives the machine's power.

    Raises:
        OSError: the folder is not there, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{UNFINISHED}")
    try:
        yield temporary
        if synced:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
