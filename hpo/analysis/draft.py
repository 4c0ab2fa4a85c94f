"""The file of a suggestion: the study's space with the changes and their reasons."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.text import count
from hpo.analysis.evidence import CHANCE, Evidence
from hpo.analysis.verdicts import Verdict, yaml_line
from hpo.errors import SpaceError
from hpo.paths import search_space_dirs
from hpo.space import SearchSpace, dump_yaml, load_yaml, parse_yaml, space_from_yaml, space_to_yaml
from hpo.space.document import flow
from hpo.study import Study
from hpo.study.metadata import config_of

SUGGESTED = "# Suggested from study"
"""The beginning of a suggestion's file."""

_WIDTH = 116  # characters per line of comments


@dataclass(frozen=True)
class Draft:
    """A suggestion before it is written."""

    study: Study
    space: SearchSpace
    evidence: Evidence
    verdicts: Mapping[str, Verdict]

    def search(self) -> str:
        """Write the YAML without recipes and header, to be checked."""
        return self._written(self._tree(), head=[], recipes=[])

    def whole(self, checked: SearchSpace) -> str:
        """Write the whole file.

        Args:
            checked: the space that `search` is read as.
        """
        tree, head, fitting = self._tree(), self._sources(), self._fitting(checked)
        if self.evidence.too_few:
            head += f" Nothing is changed: {self.evidence.too_few}."
        else:
            new = math.ceil((self.study.total or self.space.trials) / 2)
            tree["trials"] = fitting + new
            head += (
                f" The best trials are the best of each fifth of the study, {len(self.evidence.best)} in all; changes "
                f"are made only if they are less probable by chance than once in {round(1 / CHANCE)} times. The total "
                f"is {new} new trials and the {fitting} that fit this space, with which a study on it can begin: "
                f"--take-over {self.study.name}"
            )
        return self._written(tree, head=[*_comment(head), ""], recipes=self._recipes())

    def _written(self, tree: Mapping[str, Any], *, head: list[str], recipes: list[str]) -> str:
        lines = [*head, *(f"{key}: {flow(value)}" for key, value in tree.items() if key not in ("base", "search"))]
        lines += [*dump_yaml({"base": tree["base"]}).splitlines(), "search:"]
        for path, verdict in self.verdicts.items():
            why = verdict.why if verdict.found is not None else f"{path}: {verdict.why}"
            lines += [f"  {line}" for line in _comment(why)]
            lines += [] if verdict.found is None else [f"  {yaml_line(verdict.found)}"]
        lines += ["recipes:", *(f"  - {flow(name)}" for name in recipes)] if recipes else []
        return "\n".join(lines) + "\n"

    def _sources(self) -> str:
        complete, finished = self.evidence.complete, len(self.evidence.finished)
        begin = SUGGESTED.removeprefix("# ")
        return f"{begin} {self.study.name}: {count(complete, 'trial')} complete, {finished - complete} pruned."

    def _fitting(self, checked: SearchSpace) -> int:
        configs = (config_of(self.study.metadata, trial.params) for trial in self.evidence.finished)
        return sum(checked.express(config) is not None for config in configs)

    def _tree(self) -> dict[str, Any]:
        """The study's space as plain data, in its file's short form if that still means the same."""
        document, _ = parse_yaml(space_to_yaml(self.space), self.space.name)
        assert document is not None, "a written space can be read"
        tree: dict[str, Any] = document.content
        written = _file_of(self.study)
        if written is None:
            return tree
        file, content = written
        base, data = content.get("base", {}), {"data": content["data"]} if "data" in content else {}
        as_written = {"base": _nameable(file.parent, base) if isinstance(base, str) else base}
        short = {"description": tree["description"], **data, **tree, **as_written}
        try:
            same = space_from_yaml(dump_yaml(short), self.space.name).baseline == self.space.baseline
        except SpaceError:
            return tree
        return short if same else tree

    def _recipes(self) -> list[str]:
        if self.space.recipes:
            return [_nameable(recipe.path.parent, recipe.path.name) for recipe in self.space.recipes]
        written = _file_of(self.study)  # the study does not store them
        if written is None:
            return []
        file, content = written
        return [_nameable(file.parent, name) for name in content.get("recipes") or [] if isinstance(name, str)]


def _file_of(study: Study) -> tuple[Path, dict[str, Any]] | None:
    """The file of the study's search space, and its content; None if it is missing."""
    begun_with = study.metadata.get("space_file")
    named = [folder / f"{study.space_name}.yaml" for folder in search_space_dirs()]
    for file in [*([Path(begun_with)] if begun_with else []), *named]:
        if file.is_file():
            content = load_yaml(file)
            return (file, content) if isinstance(content, dict) else None
    return None


def _nameable(folder: Path, name: str) -> str:
    """The path of a recipe for any space: relative to a folder of spaces, or absolute."""
    known = [where.resolve() for where in search_space_dirs()]
    file = next((at / name for at in (folder, *known) if (at / name).is_file()), folder / name).resolve()
    within = next((where for where in known if file.is_relative_to(where)), None)
    return str(file) if within is None else file.relative_to(within).as_posix()


def _comment(words: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(words, _WIDTH, break_long_words=False, break_on_hyphens=False)]
