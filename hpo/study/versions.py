"""The versions that a result depends on, read from the packages' metadata without importing them."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("hpo-vision", "torch", "torchvision", "timm", "optuna", "numpy")


def versions() -> dict[str, str]:
    """Return the versions by name, Python's included."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
