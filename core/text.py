"""Numbers and text from outside in messages."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """Escape the characters that can change how a terminal or a page shows the rest, such as ESC or a new line."""
    if text.isprintable():
        return text
    kept = (one.isprintable() or unicodedata.category(one) == "Zs" for one in text)  # spaces that do not break lines
    return "".join(one if keep else one.encode("unicode_escape").decode() for one, keep in zip(text, kept, strict=True))


def printable_lines(text: str) -> str:
    """Escape control characters except for ends of lines. Text from outside is shown by this or `printable` alone."""
    return "\n".join(map(printable, text.split("\n")))


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Format a number with its noun: `1 trial`, `1,320 epochs`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
