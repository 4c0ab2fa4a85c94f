"""The values of a parameter in a study's trials."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

_GROUPED_UP_TO = 8  # numbers with so few different values are treated as groups, as choices are


def is_grouped(values: Sequence[Any]) -> bool:
    """Whether the values form groups: choices, or numbers with few different values."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return not numbers or len(distinct(values)) <= _GROUPED_UP_TO


def distinct(values: Iterable[Any]) -> list[Any]:
    """The different values, sorted."""
    found = list(dict.fromkeys(values))
    try:
        return sorted(found)
    except TypeError:  # values of several types have no order
        return sorted(found, key=repr)
