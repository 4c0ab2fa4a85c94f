"""The marks and axes that the report's figures share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from hpo.analysis.values import distinct, is_grouped
from hpo.confirmation.statistics import Interval
from hpo.dashboard.pictures import BLUE, GREEN, GREY, ORANGE
from hpo.text import number, short
from hpo.trials import trial_index_of

STATES = ("complete", "pruned", "failed", "running")
"""The states of trials that have begun: names of properties of `StudyData`."""
STATE_WORDS = {"complete": "complete", "pruned": "pruned", "failed": "failed to train", "running": "running"}
STATE_MARKS: dict[str, dict[str, Any]] = {
    "complete": {"color": BLUE, "symbol": "circle", "dash": "solid", "opacity": 0.75},
    "pruned": {"color": GREY, "symbol": "x-thin", "dash": "solid", "opacity": 0.4},
    "failed": {"color": ORANGE, "symbol": "triangle-down", "dash": "dash", "opacity": 0.9},
    "running": {"color": GREEN, "symbol": "diamond-open", "dash": "dot", "opacity": 0.9},
}
"""The look of each state in all figures: no two differ by color alone."""

# Multiples of these, modulo one, cover the plane evenly: 1 / g and 1 / g², where g³ = g + 1 (Roberts 2018).
_TURNS = (0.7548776662, 0.5698402910)


class Look(NamedTuple):
    """The look of a mark."""

    color: str = BLUE
    symbol: str = "circle"
    size: float = 8
    """In pixels."""
    outline: float = 0
    """Its width in pixels; open and thin symbols need one."""
    edge: str | None = None
    """The color of the outline; None for the mark's own."""


def marks(x: Sequence[Any], y: Sequence[Any], hover: str, look: Look, **more: Any) -> go.Scatter:
    """A series of marks; `hover` is the template of their label at the pointer, empty for none."""
    line = {"width": look.outline, "color": look.edge or look.color}
    marker = {"color": look.color, "symbol": look.symbol, "size": look.size, "line": line}
    label = {"hovertemplate": f"{hover}<extra></extra>"} if hover else {"hoverinfo": "skip"}
    return go.Scatter(x=list(x), y=list(y), mode="markers", marker=marker, **label, **more)


def error_bars(half_widths: Sequence[float | None], **look: Any) -> dict[str, Any]:
    """Horizontal error bars; none where the half width is None or infinite."""
    array = [half if half is not None and math.isfinite(half) else 0 for half in half_widths]
    return {"type": "data", "array": array, "thickness": 2, "width": 5, **look}


def add_interval(fig: go.Figure, row: str, interval: Interval, hover: str, *, color: str, baseline: bool) -> None:
    """Add a confirmed mean with its 95 % interval in a row of its own; the baseline is a square."""
    look = Look(color, "square" if baseline else "circle", 11)
    fig.add_trace(marks([interval.mean], [row], hover, look, error_x=error_bars([interval.half_width])))


def set_interval_axes(fig: go.Figure, metric: str, rows: Sequence[str]) -> None:
    """Set the axes of a figure of intervals, with the first row on top."""
    fig.update_xaxes(title_text=f"confirmed {metric}", nticks=5)
    fig.update_yaxes(autorange="reversed", type="category", categoryorder="array", categoryarray=list(rows))
    fig.update_layout(showlegend=False)


def whole_numbers(last: int) -> dict[str, Any]:
    """An axis from 0 to `last` with ticks at whole numbers only."""
    margin = max(0.5, 0.02 * last)
    return {"range": [-margin, last + margin], **({"dtick": 1} if last <= 10 else {}), "tickformat": "d"}


def log_axis(low: float, high: float) -> dict[str, Any]:
    """A logarithmic axis with whole values at its ticks: Plotly's own are bare 2s and 5s within a decade."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = len(exponents) - 1
    factors = (1,) if decades > 2 else (1, 3) if decades == 2 else (1, 2, 5)
    ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)] or [low, high]
    margin = 0.05 * math.log10(high / low) or 0.1
    return {
        "type": "log",
        "range": [math.log10(low) - margin, math.log10(high) + margin],
        "tickvals": ticks,
        "ticktext": list(map(number, ticks)),
    }


def time_unit(seconds: float) -> tuple[str, float]:
    """(name, seconds) of the unit in which a time of so many seconds has a number of few digits."""
    return ("s", 1.0) if seconds < 120 else ("min", 60.0) if seconds < 7200 else ("h", 3600.0)


def cut(name: str, longest: int) -> str:
    """A name that is cut to so many characters."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


# The axis of a parameter: a scale, or a column for each of few values ----------------------------------------------


def set_axis(fig: go.Figure, path: str, values: Sequence[Any], distribution: BaseDistribution) -> list[Any]:
    """Set the horizontal axis to a parameter. Returns the values with a column; none on a scale."""
    fig.update_xaxes(title=path)
    if is_grouped(values):
        columns = distinct(values)
        ends = [-0.6, len(columns) - 0.4]
        fig.update_xaxes(tickvals=list(range(len(columns))), ticktext=list(map(short, columns)), range=ends)
        return columns
    if getattr(distribution, "log", False):
        fig.update_xaxes(**log_axis(min(values), max(values)))
    return []


def spread(trial: FrozenTrial, *, turn: int = 1) -> float:
    """The offset of a trial's mark in its column or row, in [-0.5, 0.5), so that marks do not hide each other.

    Args:
        trial: its index decides.
        turn: 1 or 2, independent of each other: for a column and a row at the same time.
    """
    return (trial_index_of(trial) * _TURNS[turn - 1]) % 1 - 0.5


def place(trial: FrozenTrial, value: Any, columns: Sequence[Any]) -> float:
    """The position of a trial's mark on the axis made by `set_axis`."""
    return columns.index(value) + 0.4 * spread(trial) if columns else float(value)
