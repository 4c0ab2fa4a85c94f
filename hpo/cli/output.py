"""`--output`: a file that is there whole or not at all, or one line that says why it is not."""

from __future__ import annotations

from pathlib import Path

from hpo.errors import HpoError
from hpo.storage.atomic import replacing


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
        with replacing(file.resolve()) as temporary:  # resolved: a link stays one
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise HpoError(
            f"{file}: cannot be written ({error.strerror or error}); give -o a file in a folder that is there"
        ) from error
