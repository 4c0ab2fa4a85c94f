"""An axis of a parameter's values: a scale where there are many, a column for each where there are few or no order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from hpo.report.figures import log_axis
from hpo.text import short
from hpo.trials import trial_index_of

GROUPED_UP_TO = 8
"""Numbers of so few different values stand in columns, as choices do."""

# Multiples of these, modulo one, cover the plane evenly: 1 / g and 1 / g², where g³ = g + 1 (Roberts 2018).
_TURNS = (0.7548776662, 0.5698402910)


def grouped(values: Sequence[Any]) -> bool:
    """Whether values stand in a column each."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return not numbers or len(distinct(values)) <= GROUPED_UP_TO


def distinct(values: Iterable[Any]) -> list[Any]:
    """The different values, numbers in their order."""
    found = list(dict.fromkeys(values))
    try:
        return sorted(found)
    except TypeError:  # values of several kinds have no order
        return sorted(found, key=repr)


def spread(trial: FrozenTrial, *, turn: int = 1) -> float:
    """Where in its column or row a mark stands, in [-0.5, 0.5): by its slot, so that trials do not hide each other.

    Args:
        turn: another one places them independently: in a column and a row at the same time.
    """
    return (trial_index_of(trial) * _TURNS[turn - 1]) % 1 - 0.5


def set_axis(fig: go.Figure, path: str, values: Sequence[Any], distribution: BaseDistribution) -> list[Any]:
    """Makes the horizontal axis that of a parameter; returns the values of its columns, none where it is a scale."""
    fig.update_xaxes(title=path)
    if grouped(values):
        columns = distinct(values)
        fig.update_xaxes(
            tickvals=list(range(len(columns))), ticktext=list(map(short, columns)), range=[-0.6, len(columns) - 0.4]
        )
        return columns
    if getattr(distribution, "log", False):
        fig.update_xaxes(**log_axis(min(values), max(values)))
    return []


def place(trial: FrozenTrial, value: Any, columns: Sequence[Any]) -> float:
    """Where a trial's mark stands on the axis that `set_axis` made."""
    return columns.index(value) + 0.4 * spread(trial) if columns else float(value)
