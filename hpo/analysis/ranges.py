"""The range of a searched number: its scale and levels, and how it is widened or narrowed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
from typing import Literal

from annotated_types import Ge, Gt, Le, Lt

from hpo.space import Integer, Real
from hpo.space.fields import field_at

Bound = Literal["low", "high"]
BOUNDS: tuple[Bound, Bound] = ("low", "high")

_OUTER = 0.25  # fraction of the range that counts as near a bound
_WIDEN = 0.5  # fraction of the range by which a bound is moved out
_MARGIN = 0.1  # fraction of the range left around the values to which it is narrowed
_MOST_LEVELS = 1000  # a range with more steps is treated as continuous
_ROUNDED = {"down": ROUND_FLOOR, "up": ROUND_CEILING, "near": ROUND_HALF_EVEN}


@dataclass(frozen=True)
class Scale:
    """Maps a range to [0, 1], in which values are drawn evenly."""

    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, found: Integer | Real) -> Scale:
        return cls(float(found.low), float(found.high), found.log)

    def place(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def value(self, place: float) -> float:
        """Map a place to its value, also outside [0, 1]."""
        if self.log:
            return self.low * math.exp(place * math.log(self.high / self.low))
        return self.low + place * (self.high - self.low)

    def rounded(self, value: float, way: Literal["down", "up", "near"]) -> float:
        """Round a value to two digits on a logarithmic scale, else to a hundredth of the range.

        In decimal, because 0.1 × 3 is not 0.3 in binary.
        """
        digits = math.floor(math.log10(value)) - 1 if self.log else math.floor(math.log10(self.high - self.low)) - 2
        unit = Decimal(1).scaleb(digits)
        return float((Decimal(repr(value)) / unit).to_integral_value(_ROUNDED[way]) * unit)


def depth(found: Integer | Real, bound: Bound, value: float) -> float:
    """Distance of a value to a bound, as a fraction of the range."""
    place = Scale.of(found).place(value)
    return place if bound == "low" else 1 - place


def is_outer(found: Integer | Real, bound: Bound, value: float) -> bool:
    """Whether a value is in the quarter at a bound."""
    return depth(found, bound, value) <= _OUTER + 1e-9  # tolerates a rounding error


def outer_share(found: Integer | Real, bound: Bound) -> float:
    """The probability that an even draw is in the outer quarter at a bound."""
    levels = _levels(found)
    if levels is None:
        return _OUTER
    # On a logarithmic scale, the probability of an integer is the length of the scale from half below it to half above.
    weights = [math.log((level + 0.5) / (level - 0.5)) if found.log else 1.0 for level in levels]
    outer = [weight for weight, level in zip(weights, levels, strict=True) if is_outer(found, bound, level)]
    return sum(outer) / sum(weights)


def widened(found: Integer | Real, bound: Bound) -> Integer | Real | None:
    """Move a bound out by half the range's length, on its grid of steps; None if the field allows no more."""
    stepwise = not found.log and _levels(found) is not None
    moved = _moved_by_steps(found, bound) if stepwise else _moved(found, bound)
    return None if moved is None else _within(found, **{"low": found.low, "high": found.high, bound: moved})


def narrowed(found: Integer | Real, low: float, high: float) -> Integer | Real:
    """Narrow a range to these values with a margin, of at least one step, rounded outwards within the old range."""
    scale, levels = Scale.of(found), _levels(found)
    first, last = scale.place(low) - _MARGIN, scale.place(high) + _MARGIN
    if levels is None:
        new_low, new_high = scale.rounded(scale.value(first), "down"), scale.rounded(scale.value(last), "up")
        return _within(found, max(found.low, new_low), min(found.high, new_high))
    inside = [place for place, level in enumerate(levels) if low - 1e-9 <= level <= high + 1e-9]
    margin = [place for place, level in enumerate(levels) if first <= scale.place(level) <= last]
    begin, end = min(inside[0] - 1, margin[0]), max(inside[-1] + 1, margin[-1])
    return _within(found, levels[max(0, begin)], levels[min(len(levels) - 1, end)])


def _within(found: Integer | Real, low: float, high: float) -> Integer | Real:
    if isinstance(found, Integer):
        return replace(found, low=round(low), high=round(high))
    return replace(found, low=float(low), high=float(high))


def _levels(found: Integer | Real) -> list[float] | None:
    """All values that can be drawn; None for a continuous range."""
    if found.step is None or (found.high - found.low) / found.step > _MOST_LEVELS:
        return None
    return [_on_grid(found, number) for number in range(_steps(found) + 1)]


def _steps(found: Integer | Real) -> int:
    assert found.step is not None, "the range has steps"
    return round((found.high - found.low) / found.step)


def _on_grid(found: Integer | Real, steps: int) -> float:
    return float(Decimal(str(found.low)) + steps * Decimal(str(found.step)))


def _moved(found: Integer | Real, bound: Bound) -> float | None:
    scale, sign = Scale.of(found), -1 if bound == "low" else 1
    limit = scale.low if bound == "low" else scale.high
    target = scale.rounded(scale.value(-_WIDEN if bound == "low" else 1 + _WIDEN), "near")
    end, included = _field_end(found.path, bound)
    if sign * target >= sign * end:
        # An excluded end of the field can only be approached.
        target = end if included else (limit + end) / 2
    if isinstance(found, Integer):
        target = round(target)
    return target if sign * target > sign * limit else None


def _moved_by_steps(found: Integer | Real, bound: Bound) -> float | None:
    steps, sign = _steps(found), -1 if bound == "low" else 1
    end, included = _field_end(found.path, bound)
    for more in range(math.ceil(_WIDEN * steps), 0, -1):
        value = _on_grid(found, -more if bound == "low" else steps + more)
        if sign * value < sign * end or (included and value == end):
            return value
    return None


def _field_end(path: str, bound: Bound) -> tuple[float, bool]:
    """The field's bound, and whether it is included."""
    field = field_at(path)
    assert field is not None, "it is searched"
    for mark in field.info.metadata:
        match bound, mark:
            case ("low", Ge(ge=end)) | ("high", Le(le=end)):
                return float(end), True  # type: ignore[arg-type]
            case ("low", Gt(gt=end)) | ("high", Lt(lt=end)):
                return float(end), False  # type: ignore[arg-type]
    return (-math.inf if bound == "low" else math.inf), False
