"""Splits by name: `train`, `Training_set`, `seg_test`, `val2017` and the like."""

from __future__ import annotations

import re
from typing import Literal

Split = Literal["train", "val", "test"]

TRAIN: Split = "train"
VAL: Split = "val"
TEST: Split = "test"

_WORDS: dict[str, Split] = {
    "train": TRAIN, "training": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "test": TEST, "testing": TEST,
}  # fmt: skip
_JOINED = re.compile(rf"({'|'.join(sorted(_WORDS, key=len, reverse=True))})(set|data|images?|imgs?|labels?)?")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")


def split_of(name: str) -> Split | None:
    """Return the split that a name contains as a word, alone or joined to others; None if it has none or several."""
    words = re.findall(r"[^\W\d_]+", _CAMEL.sub(" ", name).casefold())
    found = {_WORDS[match[1]] for word in words if (match := _JOINED.fullmatch(word))}
    return found.pop() if len(found) == 1 else None


def is_split_word(name: str) -> bool:
    """Return whether the name is such a word alone, which hardly is the name of a class."""
    return name.casefold() in _WORDS
