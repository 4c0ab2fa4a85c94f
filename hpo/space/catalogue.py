"""Which spaces and recipes there are, by name: `search_spaces/NAME.yaml` and `search_spaces/recipes/NAME.yaml`.

The user's own folder of that name comes before the installed one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

from hpo.errors import Fault, SpaceError
from hpo.paths import search_space_dirs
from hpo.space.document import Document, read, shown
from hpo.space.fields import did_you_mean, nearest

Kind = Literal["space", "recipe"]
KINDS: tuple[Kind, ...] = ("space", "recipe")


class Listed(NamedTuple):
    """A line of `hpo space list`."""

    name: str
    kind: Kind
    path: Path
    description: str
    result: str = ""
    """What a recipe's author saw, shortened to the figure; empty for a space."""


def list_spaces() -> list[Listed]:
    """The spaces, then the recipes, that can be called by name; of two of one name, the one that the name means."""
    found: dict[tuple[Kind, str], Listed] = {}
    for kind in KINDS:
        for folder in _folders(kind):
            for path in sorted(folder.glob("*.yaml")):
                if (kind, path.stem) in found:
                    continue
                document, _ = read(path)
                said = document.plain() if document is not None else None
                if isinstance(said, dict) and said:
                    description, result = (_text(said, key) for key in ("description", "result"))
                else:
                    description, result = "cannot be read: hpo space check", ""
                found[kind, path.stem] = Listed(path.stem, kind, path, description, headline(result))
    return list(found.values())


def headline(result: str) -> str:
    """The figure that a result begins with: `89 %` of "89 % on their validation set; …"."""
    return re.split(r"[,;:(]|\s(?:as|for|in|of|on)\s", result, maxsplit=1)[0].strip()


def _text(said: dict[str, object], key: str) -> str:
    words = said.get(key)
    return words if isinstance(words, str) else ""


def _folders(kind: Kind) -> list[Path]:
    return [folder if kind == "space" else folder / "recipes" for folder in search_space_dirs()]


def find(name: str, kind: Kind) -> Path:
    """The file that a name or path means.

    Raises:
        SpaceError: there is none.
    """
    path = Path(name)
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise SpaceError([Fault(name, f"no such file{_elsewhere(path.stem, kind)}")])
    for folder in _folders(kind):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    looked = ", ".join(shown(folder) for folder in _folders(kind))
    word = "search space" if kind == "space" else "recipe"
    raise SpaceError([Fault(name, f"no such {word} in {looked}{_elsewhere(name, kind)}")])


def _elsewhere(name: str, kind: Kind) -> str:
    other: Kind = "recipe" if kind == "space" else "space"
    if any((folder / f"{name}.yaml").is_file() for folder in _folders(other)):
        return f"; {name} is a recipe: hpo train {name}" if kind == "space" else f"; {name} is a space: hpo run {name}"
    names = [path.stem for folder in _folders(kind) for path in sorted(folder.glob("*.yaml"))]
    return did_you_mean(nearest(name, names))


def kind_of(document: Document) -> Kind:
    """What a file is: only a space has keys of the search."""
    keys = document.root.value if isinstance(document.root.value, dict) else {}
    return "space" if any(key in keys for key in ("search", "base", "trials", "objective", "recipes")) else "recipe"
