"""The fields of `TrainConfig` by dotted path, for spaces, recipes and `--set`."""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic.fields import FieldInfo

from core.config import OWN_PARTS, Kwarg, TrainConfig, part_of_argument


@dataclass(frozen=True)
class ConfigField:
    """A leaf field of `TrainConfig`."""

    path: str
    info: FieldInfo

    @cached_property
    def kind(self) -> Literal["int", "float", "str", "any", "other"]:
        """The field's type; only `int`, `float` and `any` can have a range."""
        annotation = self.info.annotation
        if get_origin(annotation) in (Union, types.UnionType):
            annotation, *more = [arm for arm in get_args(annotation) if arm is not type(None)]
            if more:
                return "other"
        return {int: "int", float: "float", str: "str", Any: "any"}.get(annotation, "other")  # type: ignore[arg-type, return-value]

    @property
    def annotated(self) -> Any:
        """The field's type with its bounds, as pydantic takes it."""
        return Annotated[(self.info.annotation, *self.info.metadata)] if self.info.metadata else self.info.annotation

    @cached_property
    def adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.annotated, config=ConfigDict(strict=True))

    def validate(self, value: Any) -> Any:
        """Return the value as stored, a float for an int; pydantic.ValidationError if it is refused."""
        return self.adapter.validate_python(value)


@cache
def config_fields() -> dict[str, ConfigField]:
    """All fields of `TrainConfig` by dotted path, in declaration order, without the arguments in `kwargs`."""
    return {field.path: field for field in _leaves(TrainConfig, "")}


def field_at(path: str) -> ConfigField | None:
    """Return the field at a dotted path, such as the argument `model.kwargs.NAME`; None if there is no such."""
    if part_of_argument(path) is not None:
        return ConfigField(path, FieldInfo.from_annotation(Kwarg))
    return config_fields().get(path)


def _leaves(model: type[BaseModel], prefix: str) -> Iterable[ConfigField]:
    for name, info in model.model_fields.items():
        if name == "kwargs":
            continue
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _leaves(info.annotation, f"{prefix}{name}.")
        else:
            yield ConfigField(f"{prefix}{name}", info)


MOST_COMPARED = 120
"""Words of one file that are compared with all names, at up to 10 ms each: about those of 20 faults."""
_compared: ContextVar[int] = ContextVar("compared", default=0)


def begin_suggestions() -> None:
    """Begin to count the words of a file towards `MOST_COMPARED`."""
    _compared.set(0)


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The closest spelling; preferably one that starts with the word, as adamw with adam. None after many faults."""
    if _compared.get() >= MOST_COMPARED:
        return None
    _compared.set(_compared.get() + 1)
    close = difflib.get_close_matches(word, list(names), n=3, cutoff=0.6)  # 0.6 is difflib's own
    return next((name for name in close if name.startswith(word)), close[0] if close else None)


def nearest_field(path: str, names: Iterable[str]) -> str | None:
    """A field with the same last part, or the closest spelling."""
    names = list(names)
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(names)}
    leaf = path.rpartition(".")[2]
    if leaf in by_leaf:
        return by_leaf[leaf]
    near = nearest(leaf, by_leaf)
    return nearest(path, names) or (None if near is None else by_leaf[near])


def did_you_mean(word: Any, names: Iterable[str], find: Callable[[str, Iterable[str]], str | None] = nearest) -> str:
    """`; did you mean optim.lr?`, or nothing."""
    found = find(word, names) if isinstance(word, str) else None
    return "" if found is None else f"; did you mean {found}?"


def no_such_field(path: str, more: Iterable[str] = ()) -> str:
    """The message; `more` are other names to suggest."""
    if path in [f"{part}.kwargs" for part in OWN_PARTS]:
        return f"is a group of fields; name one of them, such as {path}.width"
    if inside := [field for field in config_fields() if field.startswith(f"{path}.")]:
        return f"is a group of fields; name one of them: {', '.join(inside)}"
    return f"no such field{did_you_mean(path, [*config_fields(), *more], nearest_field)}"
