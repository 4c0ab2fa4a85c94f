"""Atomic replacement of files."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = ".tmp"
"""Suffix of a file while it is written; a killed writer leaves such a file."""


@contextlib.contextmanager
def replacing(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """Replace a file atomically by the one that the block writes; after an exception the old one stays.

    The block gets a unique path in the same folder. If `synced`, the new file survives a power failure.
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
