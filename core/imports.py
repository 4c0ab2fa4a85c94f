"""The user's own code, named by import path: `PACKAGE.MODULE:NAME`.

Modules are looked for in the working directory, then where Python looks. Nothing is imported that is not named.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib
import inspect
import os
import pkgutil
import sys
import sysconfig
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from core.errors import ConfigError, CoreError, UserError
from core.runtime import isolated_rng, may_be_out_of_memory

# A model's folder of another author names what is called to build its network: torch.hub.load would run their code.
_REFUSED = sys.stdlib_module_names | {"torch"}
_LIBRARIES = ("site-packages", "dist-packages")
_NOT_OWN = (*(str(Path(__file__).parents[1] / name) + os.sep for name in ("core", "hpo")), "<frozen ")


@functools.cache
def imported(path: str, field: str) -> Callable[..., Any]:
    """Import a callable.

    Args:
        path: `PACKAGE.MODULE:NAME`.
        field: the field that names it, for messages.

    Raises:
        UserError: there is no such module or name, it is not callable, or its module fails.
    """
    name, _, attribute = path.partition(":")
    if name.partition(".")[0] in _REFUSED:
        raise UserError(f"{field}: {path} is part of Python or torch; name a callable of your own code")
    return callable_of(_module(name, f"{field}: {path}"), attribute, path, field)


def callable_of(module: ModuleType, attribute: str, path: str, field: str) -> Callable[..., Any]:
    """Return a callable of a module that `path` names; UserError if there is none."""
    if not hasattr(module, attribute):
        named = [each for each, value in vars(module).items() if callable(value)]
        file = getattr(module, "__file__", None) or "a folder"
        raise UserError(f"{field}: module {module.__name__} ({file}) has no {attribute}{_nearest(attribute, named)}")
    found = getattr(module, attribute)
    if not callable(found):
        raise UserError(f"{field}: {path} is of type {type(found).__name__}, which cannot be called")
    return found  # type: ignore[no-any-return]


def _module(name: str, what: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does; a command's own path begins with its folder
    importlib.invalidate_caches()  # a module may be newer than its folder's listing
    try:
        # What it prints would mix with a command's output, and it may seed torch, but only in the first import.
        with isolated_rng(torch.device("cpu")), contextlib.redirect_stdout(sys.stderr):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"{what} cannot be imported: {error} ({_place(error)})") from error
        parent, _, last = error.name.rpartition(".")
        beside = getattr(sys.modules.get(parent), "__path__", []) if parent else [here]
        meant = _nearest(last, [each.name for each in pkgutil.iter_modules(beside)])
        raise UserError(
            f"{what}: there is no module {error.name} in {here}, on PYTHONPATH or among installed packages{meant}"
        ) from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{what} cannot be imported: {_described(error)}") from error


@contextlib.contextmanager
def blaming(what: str) -> Iterator[None]:
    """Run the user's code, and turn its errors into a ConfigError with its file and line; `what` begins the message."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        if isinstance(error, CoreError) or may_be_out_of_memory(error):
            raise
        raise ConfigError(f"{what}: {_described(error)}") from error


def check_arguments(
    found: Callable[..., Any], arguments: Collection[str], given: Collection[str], path: str, field: str
) -> None:
    """Raise ConfigError unless a callable takes these keyword arguments.

    Args:
        arguments: names of those in the configuration.
        given: names of those that it is called with in any case.
        path: its import path.
        field: the field of the arguments, for messages.
    """
    path = f"{field}: {path}"
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):  # of some callables written in C
        return
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [each.name for each in parameters if each.kind in by_name]
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    for name in given:
        if name not in named and not takes_any:
            calls = ", ".join(f"{each}=…" for each in given)
            raise ConfigError(f"{path} has no argument {name}, and is called with {calls}")
    for name in arguments:
        if name not in named and not takes_any:
            meant = _nearest(name, named) or f"; it takes {', '.join(named)}"
            raise ConfigError(f"{path} has no argument {name}{meant}")
    needed = [
        each.name
        for each in parameters
        if each.default is inspect.Parameter.empty
        and each.kind in (*by_name, inspect.Parameter.POSITIONAL_ONLY)
        and (each.name not in {*given, *arguments} or each.kind not in by_name)
    ]
    if needed:
        raise ConfigError(f"{path} needs {needed[0]}, which has no default; give it, or a default")


def as_lists(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a configuration as they are written, lists as lists."""

    def plain(value: Any) -> Any:
        return list(map(plain, value)) if isinstance(value, tuple) else value

    return {name: plain(value) for name, value in kwargs.items()}


def built(path: str, section: str, kwargs: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """Call the `name` of a section with its `kwargs`, and with those of the `given` arguments that it takes by name.

    Raises:
        UserError: it cannot be imported.
        ConfigError: it does not take its arguments, or fails.
    """
    found = imported(path, f"{section}.name")
    taken = {name: value for name, value in given.items() if takes(found, name)}
    check_arguments(found, kwargs, tuple(taken), path, f"{section}.kwargs")
    with blaming(f"{section}.name: {path} fails"):
        return found(**as_lists(kwargs), **taken)


def check_part(path: str, section: str, kwargs: Collection[str], given: Collection[str]) -> None:
    """Raise UserError unless the `name` of a section can be imported, and takes its arguments; see `built`."""
    found = imported(path, f"{section}.name")
    check_arguments(found, kwargs, [name for name in given if takes(found, name)], path, f"{section}.kwargs")


def kind_of(value: Any) -> str:
    """Name the type of what the user's code returns, for messages."""
    return "None" if value is None else f"a {type(value).__name__}"


def takes(found: Callable[..., Any], name: str) -> bool:
    """Return whether a callable has a parameter of this name."""
    with contextlib.suppress(TypeError, ValueError):
        return name in inspect.signature(found).parameters
    return False


@functools.cache
def sources(path: str, field: str) -> tuple[str, dict[str, str]]:
    """Return the folder of the source of a callable, and the SHA-256 of each file by its path in there.

    These are the file of its module and those of other modules below that folder, not of installed packages, from
    which it takes modules, classes or functions by name, and so on. Blank lines and lines of comments do not count.

    Raises:
        UserError: it cannot be imported.
    """
    imported(path, field)
    first = sys.modules[path.partition(":")[0]]
    top = sys.modules[first.__name__.partition(".")[0]]
    places = list(getattr(top, "__path__", [])) or [top.__file__ or ""]
    folder = Path(places[0]).resolve().parent
    found: dict[str, str] = {}
    waiting, seen = [first], {""}
    while waiting:
        module = waiting.pop()
        file = Path(getattr(module, "__file__", None) or "").resolve()
        if module.__name__ in seen or not _is_source(file, folder, top.__name__):
            continue
        seen.add(module.__name__)
        found[file.relative_to(folder).as_posix()] = _hash(file.read_text(encoding="utf-8", errors="replace"))
        for value in list(vars(module).values()):
            name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(name, str) and name in sys.modules:
                waiting.append(sys.modules[name])
    return str(folder), dict(sorted(found.items()))


def _is_source(file: Path, folder: Path, top: str) -> bool:
    if file.suffix != ".py" or not file.is_relative_to(folder) or str(file).startswith(_NOT_OWN):
        return False
    parts = file.relative_to(folder).parts
    installed = not {*folder.parts}.isdisjoint(_LIBRARIES)
    return Path(parts[0]).stem == top if installed else {*parts}.isdisjoint(_LIBRARIES)


def _hash(source: str) -> str:
    lines = (line.rstrip() for line in source.splitlines())
    code = "\n".join(line for line in lines if line and not line.lstrip().startswith("#"))
    return hashlib.sha256(code.encode()).hexdigest()


def _described(error: BaseException) -> str:
    """The error in a line, with the file and line of the user's code."""
    if isinstance(error, SystemExit):
        text = "it ends the process; what it runs as a script belongs under if __name__ == '__main__':"
    else:
        words = error.msg if isinstance(error, SyntaxError) else str(error).strip().partition("\n")[0]
        text = f"{type(error).__name__}: {words}".removesuffix(": ")
    place = _place(error)
    return f"{text} ({place})" if place else text


def _place(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith(_NOT_OWN)]
    standard = sysconfig.get_path("stdlib")
    own = [
        each
        for each in frames
        if not each.filename.startswith(standard) and {*Path(each.filename).parts}.isdisjoint(_LIBRARIES)
    ]
    frame = next(reversed(own or frames), None)
    return "" if frame is None else f"{frame.filename}:{frame.lineno}"


def _nearest(word: str, names: list[str]) -> str:
    found = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {found[0]}?" if found else ""
