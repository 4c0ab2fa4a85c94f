"""Small words that several sections share."""

from __future__ import annotations


def percent(share: float, digits: int = 0) -> str:
    """A share of one as `33 %`, its number and its sign on one line."""
    return f"{100 * share:.{digits}f}\u00a0%"


def together(text: str) -> str:
    """A short text that is not broken into lines, for the first column of a table on a narrow screen."""
    return text.replace(" ", "\u00a0")
