"""`hpo space`: search spaces and recipes."""

from __future__ import annotations

import json
from pathlib import Path

from hpo.console import say, table
from hpo.errors import SpaceError
from hpo.search_space import check_file, json_schema, list_spaces, shown


def list_command() -> None:
    """A line a space, then a line a recipe."""
    table(
        ["name", "kind", "file", "description"],
        [[entry.name, entry.kind, shown(entry.path), entry.description] for entry in list_spaces()],
    )


def check_command(name: str) -> None:
    """Lists every fault of a file, or says that there is none."""
    faults = check_file(name)
    if faults:
        raise SpaceError(faults)
    say(f"{name}: no fault found")


def schema_command(output: Path | None) -> None:
    """Writes the JSON Schema that editors complete and check a space with."""
    text = json.dumps(json_schema(), indent=2) + "\n"
    if output is None:
        print(text, end="")
    else:
        output.write_text(text)
        say(f"written to {output}; a space's first line names it: # yaml-language-server: $schema={output.name}")
