"""`hpo data`: the built-in data sets."""

from __future__ import annotations

from core.data import catalogue
from hpo.cli.console import say, table
from hpo.paths import data_root


def list_command() -> None:
    """A line a data set."""
    rows = []
    for info in catalogue(data_root()):
        where = "built in" if info.path is None else f"{info.path}" if info.on_disk else f"not in {info.path}"
        download = f"{info.download_bytes / 1e6:,.0f} MB" if info.download_bytes else ""
        rows.append([info.name, f"{info.images:,}", info.size, info.classes, where, download])
    table(["name", "images", "size", "classes", "where", "download"], rows, right=(1, 3, 5))
    say("your own: --data with a folder, .zip, .tar.*, .npz or .csv")
