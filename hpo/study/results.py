"""The result files of trainings: `result.json` and the lines of `metrics.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from hpo.errors import StudyError
from hpo.paths import StudyPaths, TrainingPaths
from hpo.storage.atomic import replacing

Row = dict[str, Any]
"""A line of `metrics.jsonl`."""


def write_result(paths: TrainingPaths, result: dict[str, Any]) -> None:
    """Write `result.json` atomically: its `value`, or `failure` if it could not be trained, and more."""
    with replacing(paths.result) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")


def read_result(paths: TrainingPaths) -> dict[str, Any] | None:
    """Read `result.json`; None if the training has not ended, StudyError if it is damaged."""
    if not paths.result.exists():
        return None
    try:
        result = json.loads(paths.result.read_text())
    except ValueError as error:  # not JSON, or not UTF-8
        raise StudyError(f"{paths.result}: damaged ({error}); delete it to train again") from error
    if not isinstance(result, dict):
        raise StudyError(f"{paths.result}: damaged (it is no object); delete it to train again")
    return result


def read_recipe_runs(paths: StudyPaths) -> dict[str, dict[str, Any]]:
    """Read the results of recipes trained beside a study."""
    results = {reference.dir.name: read_result(reference) for reference in paths.references()}
    return {name: result for name, result in results.items() if result is not None}


def json_line(row: dict[str, Any]) -> str:
    """Format a JSON object as a line."""
    return json.dumps(row) + "\n"


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append a JSON object as a line; StudyError if the file is a symbolic link, whose target may be another's."""
    if path.is_symlink():
        raise StudyError(f"{path} is a symbolic link; remove it")
    with path.open("a") as file:
        file.write(json_line(row))


def read_rows(path: Path) -> list[Row]:
    """Read the complete lines, if any; the last may be being written. StudyError about a damaged one."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise StudyError(f"{path}:{number}: damaged; restore it from a backup, or delete the file") from error
    return rows


def finite(content: Any) -> Any:
    """Convert to JSON's types; NaN and infinity become None."""
    return to_jsonable_python(content, inf_nan_mode="null")
