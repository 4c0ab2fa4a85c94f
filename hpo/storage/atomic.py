"""Atomic replacement of files, and locks of work that only one process may do."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from hpo.errors import HpoError, StudyError

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


def write_file(path: Path, text: str) -> None:
    """Write a text file in one step; unlike `Path.write_text`, it replaces a symbolic link and leaves its target."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_output(file: Path | None, text: str, *, folders: bool = False) -> None:
    """Write a text file, if one is given, in one step; a pipe or a device is written to directly.

    Args:
        folders: Whether to create missing folders.

    Raises:
        HpoError: The file cannot be written.
    """
    if file is None:
        return
    try:
        if file.is_dir():
            raise HpoError(f"{file} is a folder; give -o the name of a file")
        if file.exists() and not file.is_file():
            file.write_text(text, encoding="utf-8")
            return
        if folders:
            file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file.resolve()) as temporary:  # a symbolic link stays one
            temporary.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: no file can have this name
        words = (error.strerror if isinstance(error, OSError) else None) or error
        raise HpoError(f"{file}: cannot be written ({words}); give -o a file in a folder that exists") from error


def lock_of(file: Path) -> FileLock:
    """Return the lock of a file, which a thread that holds it may take again."""
    return FileLock(file, is_singleton=True)


@contextlib.contextmanager
def exclusive(file: Path, busy: str) -> Iterator[None]:
    """Hold the lock of a file within the block; StudyError, which begins with `busy`, if another process has it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = lock_of(file).acquire(timeout=0)
    except Timeout as error:
        raise StudyError(f"{busy} by another process; wait for its end") from error
    with held:
        yield
