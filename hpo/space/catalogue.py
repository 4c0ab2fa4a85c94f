"""Finds `search_spaces/NAME.yaml` and `search_spaces/recipes/NAME.yaml` by name.

A `search_spaces` folder in the working directory takes precedence over the installed one.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Literal, NamedTuple

from hpo.errors import Fault, SpaceError
from hpo.paths import search_space_dirs
from hpo.space.document import Document, read, shown
from hpo.space.fields import did_you_mean

Kind = Literal["space", "recipe"]
KINDS: tuple[Kind, ...] = ("space", "recipe")


class Listed(NamedTuple):
    """A line of `hpo space list`."""

    name: str
    kind: Kind
    path: Path
    description: str
    result: str = ""
    """The figure that a recipe's author reported; empty for a space."""


def list_spaces() -> list[Listed]:
    """List all spaces, then all recipes; of several with one name, the one that the name resolves to."""
    found: dict[tuple[Kind, str], Path] = {}
    for kind in KINDS:
        for folder in _folders(kind):
            for path in sorted(folder.glob("*.yaml")):
                found.setdefault((kind, path.stem), path)
    return [_listed(kind, path) for (kind, _), path in found.items()]


def _listed(kind: Kind, path: Path) -> Listed:
    document, _ = read(path)
    content = None if document is None else document.content
    if not isinstance(content, dict) or not content:
        return Listed(path.stem, kind, path, "cannot be read: hpo space check")
    texts = (content.get(key) for key in ("description", "result"))
    description, result = (text if isinstance(text, str) else "" for text in texts)
    # The figure alone: "89 %" of "89 % on their validation set; …".
    figure = re.split(r"[,;:(]|\s(?:as|for|in|of|on)\s", result, maxsplit=1)[0].strip()
    return Listed(path.stem, kind, path, description, figure)


def _folders(kind: Kind) -> list[Path]:
    return [folder if kind == "space" else folder / "recipes" for folder in search_space_dirs()]


def find(name: str, kind: Kind) -> Path:
    """Find the file of a name or path; SpaceError with the nearest name if there is none."""
    path = Path(name).expanduser()
    if path.is_file() and not _holds_images(path):
        return path
    if path.suffix in (".yaml", ".yml"):
        raise SpaceError([Fault(name, f"no such file{_elsewhere(path.stem, kind)}")])
    for folder in _folders(kind):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    if path.is_dir() or path.is_file():
        raise SpaceError([Fault(name, _not_a_space(path, kind))])
    folders = ", ".join(map(shown, _folders(kind)))
    noun = "search space" if kind == "space" else "recipe"
    raise SpaceError([Fault(name, f"no such {noun} in {folders}{_elsewhere(name, kind)}")])


def _holds_images(path: Path) -> bool:
    from core.data.layout import ARCHIVE_SUFFIXES, HUB_SUFFIXES, TABLE_SUFFIXES

    return path.name.lower().endswith((*ARCHIVE_SUFFIXES, *HUB_SUFFIXES, *TABLE_SUFFIXES, ".npz"))


def _not_a_space(path: Path, kind: Kind) -> str:
    """Message for images given as a space, with the right command."""
    what = "a folder" if path.is_dir() else "a file"
    command, noun, listed = ("run", "search space", "SPACE") if kind == "space" else ("train", "recipe", "RECIPE")
    return (
        f"{what} of images, not a {noun}: hpo {command} {listed} --data {shlex.quote(str(path))}, "
        f"with a {listed} from hpo space list"
    )


def _elsewhere(name: str, kind: Kind) -> str:
    other: Kind = "recipe" if kind == "space" else "space"
    if any((folder / f"{name}.yaml").is_file() for folder in _folders(other)):
        return f"; {name} is a recipe: hpo train {name}" if kind == "space" else f"; {name} is a space: hpo run {name}"
    names = [path.stem for folder in _folders(kind) for path in sorted(folder.glob("*.yaml"))]
    return did_you_mean(name, names)


def is_space(document: Document) -> bool:
    """Whether a file is a space: a recipe has no keys of the search."""
    keys = document.content if isinstance(document.content, dict) else ()
    return any(key in keys for key in ("search", "base", "trials", "objective", "recipes"))
