"""The folder of pretrained weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from core.errors import UserError

_given: ContextVar[Path | None] = ContextVar("weights", default=None)


@contextmanager
def weights_in(folder: Path | None) -> Iterator[None]:
    """Look for pretrained weights in this folder, within the context; None keeps the folder that is in effect.

    Raises:
        UserError: There is no such folder.
    """
    if folder is None:
        yield
        return
    token = _given.set(_existing(folder, "--weights"))
    try:
        yield
    finally:
        _given.reset(token)


def weights_folder() -> Path | None:
    """Return the folder of `weights_in`, else that in $HPO_WEIGHTS, if any.

    Raises:
        UserError: There is no such folder.
    """
    given, named = _given.get(), os.environ.get("HPO_WEIGHTS")
    return _existing(Path(named), "HPO_WEIGHTS") if given is None and named else given


def _existing(folder: Path, source: str) -> Path:
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"{source}: {folder}: no such folder; give another one")
    return folder
