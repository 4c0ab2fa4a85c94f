"""Typer commands from options models: a field becomes an argument or an option."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from hpo.api.options import DetailOptions, JsonOption, Options, bounds, flags, words
from hpo.cli.console import detail

OptionsT = TypeVar("OptionsT", bound=Options)
_METAVARS: Mapping[type, str] = {int: "N", float: "X", Path: "PATH"}
_SHOWN: Mapping[str, type[Options] | None] = {"course": DetailOptions, "result": JsonOption, "nothing": None}


@dataclass(frozen=True)
class Answer:
    """The result of a command."""

    document: Callable[[], Mapping[str, Any]]
    """Makes the document of `--json`, by `hpo.cli.documents`."""
    exit_code: int = 0


def command(
    group: typer.Typer,
    options: type[OptionsT],
    name: str | None = None,
    *,
    shows: Literal["course", "result", "nothing"] = "result",
) -> Callable[[Callable[[OptionsT], Answer | None]], Callable[[OptionsT], Answer | None]]:
    """Add the decorated function to a group as a command whose parameters are the fields of its model.

    Args:
        shows: A course, which `--quiet` and `--verbose` change, and a result, which `--json` prints; or less.
    """
    more = {} if (model := _SHOWN[shows]) is None else model.fields()

    def register(function: Callable[[OptionsT], Answer | None]) -> Callable[[OptionsT], Answer | None]:
        def run(**values: Any) -> None:
            shown = {key: bool(values.pop(key)) for key in more}
            given = {key: value for key, value in values.items() if value is not None}
            with detail(**shown):
                answer = function(options.of(**given))
                document = answer.document() if answer is not None and shown.get("as_json") else None
            if document is not None:
                from hpo.cli.documents import as_text

                sys.stdout.write(as_text(document))
            if answer is not None and answer.exit_code:
                raise typer.Exit(answer.exit_code)

        parameters = [_parameter(key, field) for key, field in (options.fields() | more).items()]
        parameters.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__ = function.__doc__
        group.command(name or function.__name__, short_help=_first_sentence(function))(run)
        return function

    return register


def _first_sentence(function: Callable[..., Any]) -> str:
    """For the list of commands, where typer would cut the text."""
    return " ".join(str(inspect.getdoc(function)).split()).partition(". ")[0].rstrip(".") + "."


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    repeats = get_origin(field.annotation) is tuple or field.default == ()
    kind: Any = list[str] | None if repeats else field.annotation
    shown: dict[str, Any] = {"help": field.description, "metavar": words(field, "metavar") or _metavar(name, field)}
    if field.is_required() or field.default in (None, ()):
        shown["show_default"] = False
    limits = {{"ge": "min", "le": "max"}[key]: value for key, value in bounds(field).items()}
    if words(field, "argument"):
        info: Any = typer.Argument(**shown)
    else:
        option: Any = typer.Option
        info = option(*flags(name, field), **shown, **limits)
    default = inspect.Parameter.empty if field.is_required() else None if repeats else field.default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _metavar(name: str, field: FieldInfo) -> str | None:
    """The word for a value in the help; None for a switch, which has no value."""
    kinds = get_args(field.annotation) or (field.annotation,)
    if bool in kinds:
        return None
    return next((word for kind, word in _METAVARS.items() if kind in kinds), name.upper())
