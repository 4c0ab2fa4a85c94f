"""Fingerprints of the user's own code, which a study and a model record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def code_of(models: Iterable[str]) -> dict[str, Any]:
    """Return the folder and the SHA-256 of the source files of each network that is the user's own, as plain JSON.

    Raises:
        UserError: one cannot be imported.
    """
    from core.config import OWN, family_of

    found = {}
    for name in models:
        if family_of(name) == OWN:
            from core.models import own_sources  # imports torch

            folder, files = own_sources(name)
            found[name] = {"folder": folder, "files": files}
    return found


def changed_files(known: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the files that differ between two entries of `code_of`."""
    before, after = known["files"], now["files"]
    return sorted(file for file in {**before, **after} if before.get(file) != after.get(file))
