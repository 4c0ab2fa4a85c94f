"""Output files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from hpo.errors import HpoError
from hpo.storage.atomic import replacing


def write_output(file: Path | None, text: str) -> None:
    """Write a text file, if one is given, in one step; a pipe or a terminal is written to directly.

    Raises:
        HpoError: The file cannot be written.
    """
    if file is None:
        return
    try:
        if file.exists() and not file.is_file() and not file.is_dir():
            file.write_text(text, encoding="utf-8")
            return
        with replacing(file.resolve()) as temporary:  # a symbolic link stays one
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise HpoError(
            f"{file}: cannot be written ({error.strerror or error}); give -o a file in a folder that exists"
        ) from error
