"""The versions that a result depends on, read from the packages' metadata: nothing is imported for it."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("hpo-vision", "torch", "torchvision", "timm", "optuna", "numpy")


def versions() -> dict[str, str]:
    """Python's version, and that of each package that is installed, by name."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
