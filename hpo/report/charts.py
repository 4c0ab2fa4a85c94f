"""The marks and axes that the report's figures share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial

from hpo.analysis.study_data import StudyData
from hpo.dashboard.pictures import BLUE, GREEN, GREY, ORANGE
from hpo.report.words import describe
from hpo.text import number, short
from hpo.trials import trial_index_of

# Multiples of these, modulo one, cover the plane evenly: 1 / g and 1 / g², where g³ = g + 1 (Roberts 2018).
_TURNS = (0.7548776662, 0.5698402910)


class Look(NamedTuple):
    """The look of a mark."""

    color: str = BLUE
    symbol: str = "circle"
    size: float = 8
    outline: float = 0
    """Its width in pixels; open and thin symbols need one."""
    edge: str | None = None
    """The color of the outline; None for the mark's own."""


LOOKS = {
    "complete": Look(BLUE, "circle", 7),
    "pruned": Look(GREY, "x-thin", 7, 1.5),
    "failed": Look(ORANGE, "triangle-down", 7),
    "paused": Look(GREY, "line-ew-open", 7, 1.5),
    "running": Look(GREEN, "diamond-open", 7, 1.5),
}
"""The look of each state in all figures: no two differ by color alone."""


def marks(x: Iterable[Any], y: Iterable[Any], hover: str, look: Look, **more: Any) -> go.Scatter:
    """A series of marks; `hover` is the template of their label at the pointer."""
    line = {"width": look.outline, "color": look.edge or look.color}
    marker = {"color": look.color, "symbol": look.symbol, "size": look.size, "line": line}
    return go.Scatter(
        x=list(x), y=list(y), mode="markers", marker=marker, hovertemplate=f"{hover}<extra></extra>", **more
    )


def trial_marks(
    data: StudyData, trials: Sequence[FrozenTrial], x: Iterable[Any], y: Iterable[Any], look: Look, more: str = "",
    **trace: Any,
) -> go.Scatter:  # fmt: skip
    """A mark for each trial, whose label names it; `more` is added to the label's template."""
    return marks(x, y, f"%{{text}}{more}", look, text=[describe(data, trial) for trial in trials], **trace)


def best_so_far(x: Sequence[float], y: Sequence[float], **trace: Any) -> go.Scatter:
    """A line of steps."""
    trace = {"mode": "lines", "name": "best so far", **trace}
    return go.Scatter(x=x, y=y, line={"shape": "hv", "width": 2, **trace.pop("line", {})}, **trace)


def error_bars(half_widths: Sequence[float], **look: Any) -> dict[str, Any]:
    """Horizontal error bars; none where the half width is infinite."""
    array = [half if math.isfinite(half) else 0 for half in half_widths]
    return {"type": "data", "array": array, "thickness": 2, "width": 5, **look}


def around(values: Sequence[float], below: float = 0.1, above: float = 0.1) -> list[float]:
    """The limits of an axis, with margins as fractions of the values' range; equal values have a range too."""
    low, high = min(values), max(values)
    span = (high - low) or 0.05 * (abs(low) or 1.0)
    return [low - below * span, high + above * span]


def whole_numbers(first: int, last: int) -> dict[str, Any]:
    """An axis with ticks at whole numbers only."""
    margin = max(0.5, 0.02 * last)
    ends = [first - min(margin, 0.9), last + margin]  # without the whole number before the first
    return {"range": ends, **({"dtick": 1} if last <= 10 else {}), "tickformat": "d"}


def named_rows(names: Sequence[str]) -> dict[str, Any]:
    """An axis with a name at each whole number."""
    return {"tickvals": list(range(len(names))), "ticktext": list(names), "range": [-0.6, len(names) - 0.4]}


def log_axis(low: float, high: float) -> dict[str, Any]:
    """A logarithmic axis with whole values at its ticks: Plotly's own are bare 2s and 5s within a decade."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = len(exponents) - 1
    factors = (1,) if decades > 2 else (1, 3) if decades == 2 else (1, 2, 5)
    ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)] or [low, high]
    margin = 0.05 * math.log10(high / low) or 0.1
    ends = [math.log10(low) - margin, math.log10(high) + margin]
    return {"type": "log", "range": ends, "tickvals": ticks, "ticktext": list(map(number, ticks))}


def time_unit(seconds: float) -> tuple[str, float]:
    """(name, seconds) of the unit in which a time of so many seconds has a number of few digits."""
    return ("s", 1.0) if seconds < 120 else ("min", 60.0) if seconds < 7200 else ("h", 3600.0)


def spread(trial: FrozenTrial, turn: int) -> float:
    """The offset of a trial's mark in its column or row, in [-0.15, 0.15), so that marks do not hide each other.

    It depends on the trial's index; turns 0 and 1 are independent of each other, for columns and rows.
    """
    return 0.3 * ((trial_index_of(trial) * _TURNS[turn] + 0.5) % 1 - 0.5)


class ByParameter:
    """A figure over a parameter of a study's trials: its whole range, or a column for each choice."""

    def __init__(self, data: StudyData, path: str) -> None:
        self.data, self.path, self.fig = data, path, go.Figure()
        self.distribution: Any = self.having(data.trials)[-1].distributions[path]
        self.fig.update_xaxes(title_text=path, **self._axis())

    def _axis(self) -> dict[str, Any]:
        found = self.distribution
        if isinstance(found, CategoricalDistribution):
            return named_rows(list(map(short, found.choices)))
        if found.log:
            return log_axis(found.low, found.high)
        margin = max(0.05 * (found.high - found.low), 0.6 * self.step) or 0.5
        return {"range": [found.low - margin, found.high + margin]}

    @property
    def step(self) -> float:
        """The distance between two columns, in which marks are spread; 0 on a scale."""
        if isinstance(self.distribution, CategoricalDistribution):
            return 1.0
        return 0.0 if self.distribution.log else float(self.distribution.step or 0.0)

    def having(self, trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
        """The trials that have the parameter."""
        return [trial for trial in trials if self.path in trial.params]

    def column(self, trial: FrozenTrial) -> float:
        """The place of the trial's value."""
        return float(self.distribution.to_internal_repr(trial.params[self.path]))

    def add(self, trials: Sequence[FrozenTrial], y: Iterable[float], look: Look, more: str = "", **trace: Any) -> None:
        """Add a mark for each trial, all of which have the parameter."""
        x = [self.column(trial) + self.step * spread(trial, 0) for trial in trials]
        trace = trial_marks(self.data, trials, x, y, look, f"<br>{self.path} = %{{customdata}}{more}", **trace)
        self.fig.add_trace(trace.update(customdata=[short(trial.params[self.path]) for trial in trials]))
