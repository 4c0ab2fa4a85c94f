"""Fingerprints of the user's own code, which a study and a model record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.config import OWN_PARTS, TrainConfig, is_own


def own_code(config: TrainConfig) -> dict[str, str]:
    """Return the import paths of the user's code in a configuration, each with its field."""
    names = {f"{part}.name": getattr(config, part).name for part in OWN_PARTS}
    return {name: field for field, name in names.items() if is_own(name)}


def code_of(named: Mapping[str, str]) -> dict[str, Any]:
    """Return the folder and the SHA-256 of the source files of each import path, as plain JSON.

    Args:
        named: Import paths, each with the field that names it.

    Raises:
        UserError: one cannot be imported.
    """
    found = {}
    for name, field in named.items():
        from core.imports import sources  # imports torch

        folder, files = sources(name, field)
        found[name] = {"folder": folder, "files": files}
    return found


def changed_files(known: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the files that differ between two entries of `code_of`."""
    before, after = known["files"], now["files"]
    return sorted(file for file in {**before, **after} if before.get(file) != after.get(file))
