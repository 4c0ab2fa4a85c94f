"""`--output`: a file that is there whole or not at all, or one line that says why it is not."""

from __future__ import annotations

import os
from pathlib import Path

from hpo.errors import HpoError


def write_output(file: Path, text: str) -> None:
    """Writes a text file in one step, in place of what was there.

    What is no file, a pipe or a terminal, is written to.

    Raises:
        HpoError: it cannot be written.
    """
    try:
        if file.exists() and not file.is_file() and not file.is_dir():
            file.write_text(text, encoding="utf-8")
            return
        target = file.resolve()  # a link stays one
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise HpoError(
            f"{file}: cannot be written ({error.strerror or error}); give -o a file in a folder that is there"
        ) from error
