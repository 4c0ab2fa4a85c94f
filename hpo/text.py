"""Formatting shared by all views of a study."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from core.text import count, printable

if TYPE_CHECKING:
    from pydantic import ValidationError

METRIC_WORDS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "nll": "NLL",
}
"""The name of a metric in a figure or a sentence."""

PARTLY_LUCK = "the best of many scores is partly luck"


def duration(seconds: float) -> str:
    """Format a duration: `45 s`, `3 min`, `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def changed_fields(base: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """List (field, value, other value) where two flat configurations differ, except for the seed; None if absent."""
    paths = [path for path in {**base, **other} if path != "seed" and base.get(path) != other.get(path)]
    return [(path, base.get(path), other.get(path)) for path in paths]


def counted(numbers: Mapping[str, int]) -> str:
    """Format the numbers above zero: `12 complete, 3 pruned`."""
    return ", ".join(f"{number:,} {noun}" for noun, number in numbers.items() if number)


def cut(name: str, longest: int) -> str:
    """Cut a name to so many characters."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def gap(metric: str, size: float, half_width: float = math.inf) -> str:
    """Format a difference: `3.10 ± 0.60 points`, or a plain number for `nll`."""
    scale, digits, unit = (1.0, 4, "") if metric == "nll" else (100.0, 2, " points")
    spread = f" ± {scale * half_width:.{digits}f}" if math.isfinite(half_width) else ""
    return f"{scale * size:.{digits}f}{spread}{unit}"


def short(value: Any) -> str:
    """Format a parameter's value with three significant digits."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def assignments(params: Mapping[str, Any]) -> str:
    """Format parameters in one line, rounded."""
    return " ".join(f"{name}={short(value)}" for name, value in params.items())


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Map dotted paths to their shortest unique endings: `optim.lr_scale` to `lr_scale`.

    `name` alone means nothing, and keeps the part before it: `optim.name`.
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
    """Format a metric's value with four decimals; None is a dash."""
    return "–" if value is None else f"{value:.4f}"


def number(value: float) -> str:
    """Format a number with three significant digits: `22.1`, `4.47e-6`, `1e-4`."""
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    if not exponent and 0 < abs(value) < 0.001:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        mantissa = f"{float(mantissa):g}"
    return mantissa + (f"e{int(exponent)}" if exponent else "")


def difference(metric: str, gain: float, half_width: float = math.inf) -> str:
    """Format a gain with its sign: `+3.10 ± 0.60 points`; negative if it is worse."""
    return ("−" if gain < 0 else "+") + gap(metric, abs(gain), half_width)


def in_words(size: float) -> str:
    """Format a number of bytes: `812 B`, `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def some(noun: str, numbers: Sequence[int], *, plural: str | None = None, most: int = 5) -> str:
    """Format the first numbers of a list: `trials 1, 2, 3, 4, 5 and 2 more`."""
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    name = noun if len(numbers) == 1 else plural or f"{noun}s"
    return f"{name} {', '.join(map(str, numbers[:most]))}{more}"


def percent(share: float, digits: int = 0) -> str:
    """Format a fraction of one: `33 %`, not broken between lines."""
    return f"{100 * share:.{digits}f}\u00a0%"


def together(text: str) -> str:
    """Keep a short text on one line."""
    return text.replace(" ", "\u00a0")


def joined(words: Sequence[str]) -> str:
    """Join words in a sentence: `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


def done_and_safe(finished: int, total: int | None, noun: str = "trial") -> str:
    """Reassure after a stop: `3 of 10 trials are done and safe`, `0 of 1 trial is done and safe`."""
    return f"{finished} of {total} {noun}{' is' if total == 1 else 's are'} done and safe"


def held_by(name: str, host: str, since: datetime) -> str:
    """Format `trial 3 is held by a process on b since …`."""
    return f"{name} is held by a process on {host} since {since:%Y-%m-%d %H:%M}"


def first_fault(error: ValidationError) -> str:
    """Describe pydantic's first error: `contenders.0.key: Field required`."""
    fault = error.errors()[0]
    where = ".".join(map(str, fault["loc"]))
    return f"{printable(where)}: {fault['msg']}" if where else str(fault["msg"])


def sentence(words: str) -> str:
    """Capitalize the first letter and leave the rest."""
    return words[:1].upper() + words[1:]


def data_facts(content: Mapping[str, Any], *, most: int | None = None) -> dict[str, str]:
    """Describe how a data set was understood, as texts by their heading.

    Args:
        content: `core.data.DataReport.plain()`; empty for studies of version 0.1.0.
        most: number of classes to name, and then how many more there are; None names all.
    """
    counts: Mapping[str, Mapping[str, int]] = content.get("counts", {})
    named = [f"{printable(name)} {sum(splits.values()):,}" for name, splits in list(counts.items())[:most]]
    if most is not None and len(counts) > most:
        named.append(f"… and {len(counts) - most:,} more")
    totals = {split: sum(splits.get(split, 0) for splits in counts.values()) for split in ("train", "val", "test")}
    given = [f"{number:,} {split}" for split, number in totals.items() if number]
    left_out = {"test images without a class": content.get("unlabelled", 0), **content.get("left_out", {})}
    left_out["broken files"] = content.get("broken", 0)
    facts = {
        "classes": ", ".join(named),
        "given splits": ", ".join(given) if len(given) > 1 else "",
        "pixels": _pixels(content, sum(totals.values())),
        "groups": f"{groups:,}, each on one side of every split" if (groups := content.get("groups", 0)) else "",
        "near-duplicates": _near_duplicates(content),
        "left out": ", ".join(f"{kind}: {number:,}" for kind, number in left_out.items() if number),
        "note": "; ".join(content.get("notes", ())),
    }
    return {heading: text for heading, text in facts.items() if text}


def _near_duplicates(content: Mapping[str, Any]) -> str:
    """The images that are changed copies of others, and those across splits that the data set gives."""
    leaked = {"test": content.get("near_leaked", 0), "val": content.get("near_leaked_val", 0)}
    across = [f"{count(number, f'{split} image')} of an image outside it" for split, number in leaked.items() if number]
    return "; ".join([count(near, "image"), *across]) if (near := content.get("near", 0)) else ""


def _pixels(content: Mapping[str, Any], images: int) -> str:
    """What grey and colour images become, and the range of 16-bit samples where it is the set's own."""
    grey, channels, top = (content.get(key, 0) for key in ("grey", "channels", "top"))
    if not channels:
        return ""
    kinds = {"grey": grey, "in colour": images - grey}
    named = [f"{number:,} {kind}" for kind, number in kinds.items() if number]
    text = f"{joined(named) if len(named) > 1 else f'all {max(kinds, key=kinds.__getitem__)}'}; "
    text += "one channel" if channels == 1 else "three channels"
    return f"{text}; 16-bit samples from 0 to {top:,}" if top else text
