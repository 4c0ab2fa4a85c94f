"""Lines that are longer than a terminal is wide."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.cells import cell_len

_HANGING = "  "
_PROGRAMS = ("hpo ", "optuna-dashboard ")
_COMMAND = re.compile(rf"(?<!\S)(?:{'|'.join(_PROGRAMS)})[^;,()]*[^;,().\s]")  # in a sentence, up to its punctuation
_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|\S)+""")


def wrapped(line: str, width: int) -> str:
    """Break a line between words, and one that is a command so that a shell continues it.

    A command within a sentence stays whole, since it may be copied. So does a word that is longer than the width.

    Args:
        line: Without ends of lines.
        width: Columns of the terminal.
    """
    if cell_len(line) <= width:
        return line
    text = line.lstrip(" ")
    indent = line[: len(line) - len(text)]
    if indent and text.startswith(_PROGRAMS):
        command, mark, comment = text.partition("  # ")  # a comment goes on to the end of its line
        return _filled(indent, _options(command), width, end=" \\") + mark + comment
    words = _COMMAND.sub(lambda command: command[0].replace(" ", "\0"), text).split(" ")
    return _filled(indent, [word.replace("\0", " ") for word in words], width)


def _options(command: str) -> list[str]:
    """The words of a command, an option together with its value."""
    words: list[str] = []
    for word in _WORD.findall(command):
        if words and words[-1].startswith("-") and " " not in words[-1] and not word.startswith("-"):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words


def _filled(indent: str, words: Sequence[str], width: int, *, end: str = "") -> str:
    lines = [indent + words[0]]
    for word in words[1:]:
        if cell_len(f"{lines[-1]} {word}{end}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(indent + _HANGING + word)
    return f"{end}\n".join(lines)
