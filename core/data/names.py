"""Names of classes and files: order, normal form, and the checks of a label."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from core.text import printable

_DIGITS = re.compile(r"([0-9]+)")
_NUMBER = re.compile(r"\d+(\.\d+)?")
_NOT_A_CLASS = {"nan", "inf", "infinity"}
"""Labels that a table has where a number is missing or went wrong."""


def listed(names: Sequence[str], most: int = 5) -> str:
    """At most five names in one line, so that messages stay short: `a, b, c, d, e and 3 more`."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more


def natural_key(path: str) -> tuple[list[list[Any]], str]:
    """Return a key that sorts paths with numbers by value: `2.png` before `10.png`."""
    parts = [_DIGITS.split(part) for part in path.split("/")]  # text and digits in turn
    return [[_value(piece) if i % 2 else piece for i, piece in enumerate(part)] for part in parts], path


def _value(digits: str) -> tuple[int, str]:
    """Key that sorts digits by their value; `int` refuses very long ones."""
    plain = digits.lstrip("0")
    return len(plain), plain


def class_name(label: str) -> str:
    """Return the label in Unicode normal form C, so that it is the same on every file system."""
    return unicodedata.normalize("NFC", label)


def fault_of_label(label: str, *, from_table: bool = True) -> str | None:
    """Why a text cannot be a class, or None. Only tables contain `nan` or `inf` by mistake."""
    if not label:
        return "no label"
    if any(unicodedata.category(character) == "Cc" for character in label):
        return f"its label {label!a} has control characters"
    if from_table and label.lstrip("+-").casefold() in _NOT_A_CLASS:
        return f"its label is {label}, which is no class"
    return None


def class_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort class names: by value if all are numbers, else alphabetically. Equal numbers are in alphabetical order."""
    names = sorted(set(labels))
    if all(_NUMBER.fullmatch(name) for name in names):
        names.sort(key=Decimal)
    return tuple(names)


def look_alikes(classes: Iterable[str], written: Mapping[str, Iterable[str]] | None = None) -> list[str]:
    """Describe classes that may be one class by mistake.

    Args:
        classes: names in normal form.
        written: each name's spellings in the source, if known.

    Returns:
        One phrase per group of classes that differ only by case or leading zeros, or spellings that differ only by
        their Unicode normal form.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        groups[re.sub(r"(?<![\d.])0+(?=\d)", "", name.casefold())].append(name)
    found = [
        f"the classes {listed(sorted(names))} differ only by case or leading zeros"
        for names in groups.values()
        if len(names) > 1
    ]
    for name, spellings in (written or {}).items():
        if len(set(spellings)) > 1:
            found.append(f"the class {printable(name)} is written in {len(set(spellings))} Unicode normal forms")
    return sorted(found)
