"""`hpo space`: search spaces and recipes."""

from __future__ import annotations

import json
from pathlib import Path

from hpo.console import say, table
from hpo.errors import HpoError, SpaceError
from hpo.search_space import check_file, json_schema, list_spaces, shown


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


def schema_command(output: Path | None) -> None:
    """Writes the JSON Schema that editors complete and check a space with.

    Raises:
        HpoError: the file cannot be written.
    """
    text = json.dumps(json_schema(), indent=2) + "\n"
    if output is None:
        print(text, end="")
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise HpoError(
            f"{output}: cannot be written ({error.strerror or error}); give -o a file in a folder that is there"
        ) from error
    say(f"written to {output}; a space's first line names it: # yaml-language-server: $schema={output.name}")
