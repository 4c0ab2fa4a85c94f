"""`hpo space`: search spaces and recipes."""

from __future__ import annotations

import json
import shlex
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.cli.console import say, table
from hpo.cli.output import write_output
from hpo.errors import HpoError, SpaceError, StudyError
from hpo.paths import StudyPaths
from hpo.space import check_file, diff, json_schema, list_spaces, load_space, shown

if TYPE_CHECKING:
    from hpo.study import Study


def list_command() -> None:
    """The spaces, then the recipes with what their authors saw, and where their files lie."""
    entries = list_spaces()
    spaces = [[entry.name, entry.description] for entry in entries if entry.kind == "space"]
    recipes = [[entry.name, entry.result, entry.description] for entry in entries if entry.kind == "recipe"]
    table(["space", "description"], spaces)
    say()
    table(["recipe", "author's result", "description"], recipes)
    say()
    folders = dict.fromkeys(shown(entry.path.parent) for entry in entries)
    say(f"hpo run SPACE searches, hpo train RECIPE trains one; the files are in {', '.join(folders)}")


def check_command(name: str) -> None:
    """Lists every fault of a file, or says that there is none."""
    faults = check_file(name)
    if faults:
        raise SpaceError(faults)
    say(f"{name}: no fault found")


def suggest_command(name: str | None, *, storage: str | None, output: Path | None) -> None:
    """Writes a narrowed or widened space, and says how to search it.

    Raises:
        HpoError: there is no such study, or the file cannot be written.
    """
    # With optuna, which looking at spaces does not need.
    from hpo.analysis.suggest import SUGGESTED, suggest
    from hpo.study import find_study

    study = find_study(name, storage_url=storage)
    space = study.space()
    text = suggest(study, space)
    if output is None:
        print(text, end="")
        return
    if output.is_file() and not output.read_text(encoding="utf-8", errors="replace").startswith(SUGGESTED):
        raise HpoError(f"{output} is there, and is no suggestion of hpo's; give -o another file")
    write_output(output, text)
    changed = [line for line in diff(space.identity(), load_space(output).identity()) if line.startswith("search.")]
    if changed:
        say(f"written to {output}, with its reasons:")
    else:
        say(f"written to {output}: the ranges of study {study.name} as they are; its comments say why")
    for line in changed:
        say(f"  {line.removeprefix('search.')}")
    say("next:")
    say(f"  {_next_command(study, output)}")


def _next_command(study: Study, file: Path) -> str:
    """The command that searches the suggested space, beginning with the trials that fit."""
    words = ["hpo", "run", str(file)]
    names = chain([file.stem], (f"{study.name}-{number}" for number in count(2)))
    new = next(name for name in names if _is_free(name))
    words += [] if new == file.stem else ["--study", new]
    words += [] if study.data_path is None else ["--data", str(study.data_path)]
    words += ["--skip-broken"] if study.skip_broken else []
    return shlex.join([*words, "--take-over", study.name])


def _is_free(name: str) -> bool:
    """Whether a new study may have this name."""
    from hpo.study import check_search_name

    try:
        check_search_name(name)
    except StudyError:
        return False
    return not StudyPaths.of(name).dir.exists()


def schema_command(output: Path | None) -> None:
    """Writes the JSON Schema that editors complete and check a space with.

    Raises:
        HpoError: the file cannot be written.
    """
    text = json.dumps(json_schema(), indent=2) + "\n"
    if output is None:
        print(text, end="")
        return
    write_output(output, text)
    say(f"written to {output}; a space's first line names it: # yaml-language-server: $schema={output.name}")
