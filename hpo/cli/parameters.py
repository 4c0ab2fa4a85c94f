"""Typer commands from options models: a field becomes an argument or an option."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_origin

import typer
from pydantic.fields import FieldInfo

from hpo.api.options import Options, bounds, flags, words

OptionsT = TypeVar("OptionsT", bound=Options)


def command(
    group: typer.Typer, options: type[OptionsT], name: str | None = None
) -> Callable[[Callable[[OptionsT], None]], Callable[[OptionsT], None]]:
    """Add the decorated function to a group as a command whose parameters are the fields of its model."""

    def register(function: Callable[[OptionsT], None]) -> Callable[[OptionsT], None]:
        def run(**values: Any) -> None:
            given = {key: value for key, value in values.items() if value is not None}
            function(options.of(**given))

        parameters = [_parameter(key, field) for key, field in options.fields().items()]
        parameters.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__ = function.__doc__
        group.command(name or function.__name__)(run)
        return function

    return register


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    repeats = get_origin(field.annotation) is tuple or field.default == ()
    kind: Any = list[str] | None if repeats else field.annotation
    shown: dict[str, Any] = {"help": field.description, "metavar": words(field, "metavar")}
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
