"""Formatting of numbers, names and durations for people. Every view of a study formats them with these functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

METRIC_WORDS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "nll": "NLL",
}
"""A metric's name as a picture says it."""


def duration(seconds: float) -> str:
    """A length of time as a person says it: 45 s, 3 min, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def count(number: int, noun: str) -> str:
    """A number with its noun: 1 trial, 1,320 epochs."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def gap(metric: str, size: float, half_width: float = math.inf) -> str:
    """By how much two scores differ: 3.10 ± 0.60 points, of scores that are shares of one; of a loss, a number.

    Args:
        half_width: of its interval; infinite where it has none.
    """
    scale, digits, unit = (1.0, 4, "") if metric == "nll" else (100.0, 2, " points")
    spread = f" ± {scale * half_width:.{digits}f}" if math.isfinite(half_width) else ""
    return f"{scale * size:.{digits}f}{spread}{unit}"


def short(value: Any) -> str:
    """A parameter's value in few characters."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def assignments(params: Mapping[str, Any]) -> str:
    """Parameters in one line, rounded for the eye."""
    return " ".join(f"{name}={short(value)}" for name, value in params.items())


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Dotted paths by as few of their last parts as tell them apart: `optim.lr_scale` is `lr_scale`.

    A last part that says nothing alone keeps the one before: `optim.name`.
    """
    names = list(paths)
    found = {}
    for path in names:
        parts = path.split(".")
        fewest = 2 if parts[-1] == "name" else 1
        tails = [".".join(parts[-count:]) for count in range(fewest, len(parts) + 1)]
        others = [other for other in names if other != path]
        alone = (tail for tail in tails if not any(f".{other}".endswith(f".{tail}") for other in others))
        found[path] = next(alone, path)
    return found


def score(value: float | None) -> str:
    """A metric's value, as every table and sentence of the report shows it."""
    return "–" if value is None else f"{value:.4f}"


def number(value: float) -> str:
    """A number in few characters: `22.1`, `4.47e-6`, `1e-4`."""
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    if not exponent and 0 < abs(value) < 0.001:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        mantissa = f"{float(mantissa):g}"
    return mantissa + (f"e{int(exponent)}" if exponent else "")


def difference(metric: str, gain: float, half_width: float = math.inf) -> str:
    """By how much something is better: `+3.10 ± 0.60 points`; where it is worse, with a minus."""
    return ("−" if gain < 0 else "+") + gap(metric, abs(gain), half_width)


def in_words(size: float) -> str:
    """Bytes as a person says them: 812 B, 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def some(noun: str, numbers: list[int]) -> str:
    """Up to five numbers."""
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"{noun}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:5]))}{more}"


def percent(share: float, digits: int = 0) -> str:
    """A share of one as `33 %`, its number and its sign on one line."""
    return f"{100 * share:.{digits}f}\u00a0%"


def together(text: str) -> str:
    """A short text that is not broken into lines, for the first column of a table on a narrow screen."""
    return text.replace(" ", "\u00a0")
