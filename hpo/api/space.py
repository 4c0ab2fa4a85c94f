"""`hpo space` and `hpo data`: search spaces, recipes and data sets."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.api.options import CheckOptions, RunOptions, SchemaOptions, SuggestOptions
from hpo.errors import HpoError, StudyError
from hpo.paths import StudyPaths
from hpo.space import Recipe, SearchSpace, diff, json_schema, load_file, load_space
from hpo.space.grammar import OwnPruner, OwnSampler
from hpo.storage.atomic import write_output
from hpo.study.code import own_code

if TYPE_CHECKING:
    from hpo.study import Study


@dataclass(frozen=True)
class Suggestion:
    """A search space derived from a finished study."""

    study: Study
    text: str
    """The space as YAML, with its reasons as comments."""
    changed: Sequence[str] = ()
    """How it differs from the study's space, if it was written to a file."""
    command: str = ""
    """The command that searches the written file."""


def check(options: CheckOptions) -> None:
    """Check a search space or recipe, and import the user's own code that it names.

    Raises:
        SpaceError: It has faults, all of which are in the message.
        CoreError: That code fails, or lacks an argument.
    """
    found = load_file(options.file)
    if own_code(found.config) if isinstance(found, Recipe) else found.own_code():
        from hpo.api.networks import check_own_code  # with torch

        check_own_code(found)
    if isinstance(found, SearchSpace) and {type(found.sampler), type(found.pruner)} & {OwnSampler, OwnPruner}:
        from hpo.space.own_parts import check_own_parts  # with Optuna

        check_own_parts(found.sampler, found.pruner)


def schema(options: SchemaOptions) -> str:
    """Return the JSON Schema of search spaces and recipes, and write it to `options.output`."""
    text = json.dumps(json_schema(), indent=2) + "\n"
    write_output(options.output, text)
    return text


def suggest(options: SuggestOptions) -> Suggestion:
    """Suggest a narrowed or widened search space, and write it to `options.output`.

    Raises:
        HpoError: There is no such study, it has too few trials, or the file cannot be written.
    """
    from hpo.analysis.suggest import SUGGESTED
    from hpo.analysis.suggest import suggest as suggested
    from hpo.study import find_study

    study, output = find_study(options.study, storage_url=options.storage), options.output
    space = study.space()
    text = suggested(study, space)
    if output is None:
        return Suggestion(study, text)
    if output.is_file() and not output.read_text(encoding="utf-8", errors="replace").startswith(SUGGESTED):
        raise HpoError(f"{output} exists and is no suggestion of hpo's; give -o another file")
    write_output(output, text)
    changed = [line for line in diff(space.identity(), load_space(output).identity()) if line.startswith("search.")]
    return Suggestion(study, text, [line.removeprefix("search.") for line in changed], _next_command(study, output))


def _next_command(study: Study, file: Path) -> str:
    """The command that searches the suggested space, starting with the trials that fit it."""
    names = chain([file.stem], (f"{study.name}-{number}" for number in count(2)))
    name = next(name for name in names if _is_free(name))
    options = RunOptions(
        space=str(file),
        study=None if name == file.stem else name,
        data=study.data_path,
        skip_broken=study.skip_broken,
    )
    return f"{options.command()} {shlex.join(['--take-over', study.name])}"


def _is_free(name: str) -> bool:
    from hpo.study import check_search_name

    try:
        check_search_name(name)
    except StudyError:
        return False
    return not StudyPaths.of(name).dir.exists()
