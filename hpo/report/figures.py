"""How the search went: its history, its learning curves, what mattered, and what each parameter did.

Optuna's own figures are taken where it has them (history, importances, slices, parallel coordinates), in the house's
template; what they leave out is added: Optuna draws complete trials only, and here most trials are pruned. Learning
curves are drawn anew, a trace a state with gaps between trials, since Optuna's take a trace a trial and know no states.

Every section says which trials it shows. Trials that wait have nothing to be shown yet.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import optuna
import plotly.graph_objects as go
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial
from plotly.subplots import make_subplots

from hpo.analysis.facts import Facts, name_of, value_of
from hpo.dashboard.pictures import BLUE, GREEN, GREY, INK, ORANGE
from hpo.report.page import Section, figure, paragraph, shades, side_by_side
from hpo.text import count, number, score
from hpo.trials import FAILURE

STATES = ("complete", "pruned", "failed", "running")
"""The states that a trial with something to show can have: names of properties of `Facts`."""
MARKS: dict[str, dict[str, Any]] = {
    "complete": {"color": BLUE, "symbol": "circle", "dash": "solid", "opacity": 0.75},
    "pruned": {"color": GREY, "symbol": "x-thin", "dash": "solid", "opacity": 0.4},
    "failed": {"color": ORANGE, "symbol": "triangle-down", "dash": "dash", "opacity": 0.9},
    "running": {"color": GREEN, "symbol": "diamond-open", "dash": "dot", "opacity": 0.9},
}
"""How a state is drawn, in every figure alike: no two by colour alone."""
WORDS = {"complete": "complete", "pruned": "pruned", "failed": "failed to train", "running": "running"}

FEW = 20
"""Complete trials below which importances are not to be relied on: a tenth of them, which PED-ANOVA asks about, is less
than two."""


MANY = 1000
"""Points above which those of learning curves are small, so that the lines between are seen."""


def states(facts: Facts) -> dict[str, tuple[FrozenTrial, ...]]:
    """The trials that have begun, by state."""
    return {state: getattr(facts, state) for state in STATES}


# The history --------------------------------------------------------------------------------------------------------


def history(facts: Facts) -> Section | None:
    """The value of every trial and the best so far; below, how far each was trained."""
    drawn = sum(map(len, states(facts).values()))
    if not drawn:
        return None
    lead = (
        "Every complete trial's validation score, and the best so far. Below: how many epochs each trial was trained."
    )
    if not facts.complete:
        lead = "No trial is complete yet: how many epochs each trial was trained so far."
    alt = f"Optimization history: {_in_words(facts)}; {lead}"
    body = figure(history_figure(facts), alt=alt, height=520 if facts.complete else 260)
    return Section("history", "History", f"{lead} {_counted(facts)}", body)


def history_figure(facts: Facts) -> go.Figure:
    """Optuna's optimization history, and below it the epochs of all trials that have begun."""
    rows = 2 if facts.complete else 1
    heights = [0.68, 0.32] if rows == 2 else [1.0]
    fig = make_subplots(rows=rows, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=heights)
    if facts.complete:
        with _silent():
            theirs = optuna.visualization.plot_optimization_history(facts.still, target_name=facts.metric_words)
        points, best = theirs.data[0], theirs.data[1]
        mark = MARKS["complete"]
        points.update(
            showlegend=False,  # the same symbol stands for them below
            marker={"color": mark["color"], "symbol": mark["symbol"], "size": 7, "opacity": mark["opacity"]},
            hovertemplate="trial %{x}<br>%{y:.4f}<extra></extra>",
        )
        best.update(name="best so far", line={"color": INK, "width": 2, "shape": "hv"}, hoverinfo="skip")
        fig.add_traces([best, points], rows=[1, 1], cols=[1, 1])
        _add_base(fig, facts)
        fig.update_yaxes(title_text=f"validation {facts.metric_words}", row=1, col=1)
    for state, trials in states(facts).items():
        if trials:
            fig.add_trace(_epochs_trace(facts, state, trials), row=rows, col=1)
    fig.update_yaxes(title_text="epochs trained", rangemode="tozero", row=rows, col=1)
    fig.update_xaxes(title_text="trial", row=rows, col=1, **whole_numbers(max(t.number for t in facts.trials)))
    return fig


def whole_numbers(last: int) -> dict[str, Any]:
    """An axis from 0 to `last` with ticks at whole numbers only."""
    room = max(0.5, 0.02 * last)
    return {"range": [-room, last + room], **({"dtick": 1} if last <= 10 else {}), "tickformat": "d"}


def _add_base(fig: go.Figure, facts: Facts) -> None:
    """A line at the base's value, from side to side."""
    if facts.baseline is None or facts.baseline.value is None or facts.baseline not in facts.complete:
        return
    last = max(trial.number for trial in facts.trials)
    fig.add_trace(
        go.Scatter(
            x=[0, last],
            y=[facts.baseline.value] * 2,
            mode="lines",
            name="the base",
            line={"color": ORANGE, "width": 1.5, "dash": "dash"},
            hovertemplate="the base<br>%{y:.4f}<extra></extra>",
        ),
        row=1,
        col=1,
    )


def _mark(state: str, *, size: float, line: float) -> dict[str, Any]:
    """A state's marker, in pixels: its symbol and its colour, outline included."""
    mark = MARKS[state]
    return {
        "color": mark["color"],
        "symbol": mark["symbol"],
        "size": size,
        "line": {"width": line, "color": mark["color"]},
    }


def _epochs_trace(facts: Facts, state: str, trials: Sequence[FrozenTrial]) -> go.Scatter:
    return go.Scatter(
        x=[trial.number for trial in trials],
        y=[facts.epochs(trial) for trial in trials],
        mode="markers",
        name=WORDS[state],
        marker=_mark(state, size=7, line=1.5),
        text=[_ending(facts, trial) for trial in trials],
        hovertemplate="%{text}<extra></extra>",
    )


def _ending(facts: Facts, trial: FrozenTrial) -> str:
    """What a trial is and came to, for the label at the pointer."""
    last = trial.intermediate_values.get(trial.last_step) if trial.last_step is not None else None
    if trial in facts.complete:
        came_to = f"{facts.metric_words} {score(trial.value)}"
    elif trial in facts.failed:
        came_to = f"failed: {trial.user_attrs[FAILURE]}"
    else:
        state = "pruned" if trial in facts.pruned else "running"
        came_to = state if last is None else f"{state} at {facts.metric_words} {score(last)}"
    return f"{name_of(trial)}<br>{came_to}<br>{count(facts.epochs(trial), 'epoch')}"


# Learning curves ----------------------------------------------------------------------------------------------------


def learning_curves(facts: Facts) -> Section | None:
    """The validation score of every trial, epoch by epoch."""
    reported = [trial for trial in facts.trials if trial.intermediate_values]
    if not reported:
        return None
    rungs = f" Thin vertical lines are the rungs, where trials are compared: {_rungs(facts)}." if facts.rungs else ""
    along = "" if facts.folds == 1 else f" The epochs of the {facts.folds} folds follow one another."
    fig = curves_figure(facts)
    cut = (
        " The axis leaves out the worst values; a double click shows all." if fig.layout.yaxis.range is not None else ""
    )
    lead = f"The validation score of every trial as it trained; pruned trials are faint.{rungs}{along}{cut}"
    silent = sum(map(len, states(facts).values())) - len(reported)
    more = f", and {count(silent, 'trial')} without a single epoch in none" if silent else ""
    shown = f"{count(len(reported), 'curve')}, one a trial that has begun{more}."
    alt = f"Learning curves of {count(len(reported), 'trial')}: {_in_words(facts)}."
    return Section("curves", "Learning curves", f"{lead} {shown}", figure(fig, alt=alt, height=480))


def _rungs(facts: Facts) -> str:
    words = [f"epoch {epoch}" for epoch in facts.rungs]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def curves_figure(facts: Facts) -> go.Figure:
    """A trace a state, in it the trials one after the other with gaps between; on top the base and the best again."""
    fig = go.Figure()
    size = 5 if sum(len(trial.intermediate_values) for trial in facts.trials) < MANY else 2
    for state in ("pruned", "failed", "complete", "running"):  # what matters more lies on top
        trials = [trial for trial in states(facts)[state] if trial.intermediate_values]
        if not trials:
            continue
        mark = MARKS[state]
        fig.add_trace(
            _curves(
                trials,
                f"{WORDS[state]} ({len(trials)})",
                {"color": mark["color"], "dash": mark["dash"], "width": 1.4},
                opacity=mark["opacity"],
                # A line of one point is no line, and a failure's last epoch is worth a mark.
                markers={"symbol": mark["symbol"], "size": size, "line": {"width": 1, "color": mark["color"]}},
            )
        )
    if facts.baseline is not None and facts.baseline.intermediate_values and facts.baseline is not facts.best:
        fig.add_trace(
            _curves([facts.baseline], name_of(facts.baseline), {"color": ORANGE, "dash": "dash", "width": 2.5})
        )
    if facts.best is not None and facts.best.intermediate_values:
        fig.add_trace(_curves([facts.best], f"best: {name_of(facts.best)}", {"color": INK, "width": 2.5}))
    for rung in facts.rungs:
        fig.add_vline(x=rung, line={"color": GREY, "width": 1, "dash": "dot"}, layer="below")
        fig.add_annotation(x=rung, y=0, yref="paper", text=f"rung {rung}", textangle=-90, **_BESIDE_A_RUNG)
    last = max(trial.last_step or 0 for trial in facts.trials)
    fig.update_xaxes(title_text="epoch", showgrid=False, **whole_numbers(max(last, facts.steps)))
    fig.update_yaxes(title_text=f"validation {facts.metric_words}", range=_focus(facts))
    return fig


# A rung's name, at the foot of its line and to the right of it.
_BESIDE_A_RUNG: dict[str, Any] = {
    "showarrow": False,
    "xanchor": "left",
    "yanchor": "bottom",
    "xshift": 1,
    "font": {"size": 11, "color": GREY},
}


def _curves(
    trials: Sequence[FrozenTrial],
    name: str,
    line: Mapping[str, Any],
    *,
    opacity: float = 1.0,
    markers: Mapping[str, Any] | None = None,
) -> go.Scatter:
    """Trials as one trace, a gap after each."""
    x: list[int | None] = []
    y: list[float | None] = []
    labels: list[str] = []
    for trial in trials:
        reported = sorted(trial.intermediate_values.items())
        x += [*(step for step, _ in reported), None]
        y += [*(value if math.isfinite(value) else None for _, value in reported), None]
        labels += [name_of(trial)] * (len(reported) + 1)
    return go.Scatter(
        x=x,
        y=y,
        text=labels,
        name=name,
        mode="lines" if markers is None else "lines+markers",
        line=dict(line),
        marker=None if markers is None else dict(markers),
        opacity=opacity,
        connectgaps=False,
        hovertemplate="%{text}<br>epoch %{x}: %{y:.4f}<extra></extra>",
    )


def _focus(facts: Facts) -> list[float] | None:
    """Limits of the score's axis where a few values would flatten all others; None where all of them fit well.

    A network that diverges has a loss of thousands, and one that has learnt nothing an accuracy near zero.
    """
    values = [value for trial in facts.trials for value in trial.intermediate_values.values() if math.isfinite(value)]
    if not values:
        return None
    low, high = min(values), max(values)
    worst = float(np.quantile(values, 0.08 if facts.maximize else 0.92))
    kept = (high - worst) if facts.maximize else (worst - low)
    if kept <= 0 or high - low < 2 * kept:
        return None
    room = 0.05 * kept
    return [worst, high + room] if facts.maximize else [low - room, worst]


# What mattered ------------------------------------------------------------------------------------------------------


def importances(facts: Facts) -> Section | None:
    """How much each parameter decides whether a trial is among the best tenth."""
    if not facts.trials:
        return None
    title = "Importances"
    fig, why = importances_figure(facts)
    if fig is None:
        return Section("importances", title, f"How much each parameter matters cannot be told: {why}.", "")
    lead = (
        "How much each parameter decides whether a trial is among the best tenth, as shares of one: PED-ANOVA "
        f"(Watanabe et al. 2023), from the {count(len(facts.complete), 'complete trial')} alone."
    )
    body = figure(fig, alt=f"Importance of each parameter. {lead}", height=90 + 30 * len(fig.data[0].y))
    if len(facts.complete) < FEW:
        body += paragraph(f"With fewer than {FEW} complete trials these shares are little more than chance.")
    return Section(
        "importances", title, lead, body + "".join(paragraph(f"Optuna: {text}", kind="note") for text in why)
    )


def importances_figure(facts: Facts) -> tuple[go.Figure | None, Any]:
    """Optuna's figure with what Optuna warned of; or None, with the reason why there is none, in words."""
    searched = {path for trial in facts.complete for path in trial.params}
    if len(facts.complete) < 2:
        return None, f"it takes two complete trials, and there is {len(facts.complete) or 'none'}"
    if len(searched) < 2:
        return None, "one parameter is searched" if searched else "no parameter is searched"
    if len({value_of(trial) for trial in facts.complete}) == 1:
        return None, "all complete trials have the same value"
    with warnings.catch_warnings(record=True) as caught, _quiet_logger():
        warnings.simplefilter("always")
        fig = optuna.visualization.plot_param_importances(facts.still)
    warned = [str(each.message) for each in caught if not issubclass(each.category, FutureWarning)]
    shares = fig.data[0].x if fig.data else ()
    if not sum(shares) > 0 or not all(map(math.isfinite, shares)):
        return None, "no parameter tells the best trials from the others"
    fig.data[0].update(
        marker={"color": BLUE},
        showlegend=False,
        hovertemplate="%{y}: %{x:.3f}<extra></extra>",
    )
    fig.update_xaxes(title_text="share of one", range=[0, 1.12 * max(shares)])
    fig.update_yaxes(title_text=None)
    return fig, sorted(set(warned))


# What each parameter did --------------------------------------------------------------------------------------------


def slices(facts: Facts) -> Section | None:
    """The score over each parameter."""
    figures = slice_figures(facts)
    if not figures:
        return None
    lead = (
        "The validation score of the complete trials over each parameter; later trials are darker. The star is the "
        "best trial, the open square the base; along the bottom are trials without a final score: pruned (×), "
        "failed (▽), running (◇)."
    )
    body = side_by_side([figure(fig, alt=f"Validation score over {path}", height=280) for path, fig in figures.items()])
    absent = [path for path, fig in figures.items() if not _in_all(path, facts)]
    note = f"A trial is shown where it has the parameter; these exist only sometimes: {', '.join(absent)}."
    return Section("slices", "Slices", lead, body + (paragraph(note, kind="note") if absent else ""))


def _in_all(path: str, facts: Facts) -> bool:
    return all(path in trial.params for trial in facts.trials if trial.params)


def slice_figures(facts: Facts) -> dict[str, go.Figure]:
    """Parameter -> Optuna's slice of it, in the space's order; of parameters that a complete trial has."""
    distributions = searched(facts)
    complete = {path for trial in facts.complete for path in trial.params}
    return {path: _slice(facts, path, distributions[path]) for path in distributions if path in complete}


def searched(facts: Facts) -> dict[str, BaseDistribution]:
    """The searched parameters and their ranges, in the space's order; as the trials have them where it is not known."""
    found: dict[str, BaseDistribution] = {}
    for trial in facts.trials:
        found |= trial.distributions
    if facts.space is not None:
        found = {path: found[path] for path in facts.space.distributions if path in found} | found
    return found


_FEET = {"pruned": 0.15, "failed": 0.25, "running": 0.35}
"""How far below the worst value trials without one are drawn, as a share of the values' range."""


def _slice(facts: Facts, path: str, distribution: BaseDistribution) -> go.Figure:
    with _silent():
        fig = optuna.visualization.plot_slice(facts.still, params=[path], target_name=facts.metric_words)
    points = fig.data[0]
    numbers = list(points.marker.color)
    values = [value_of(trial) for trial in facts.complete if path in trial.params]
    height = (max(values) - min(values)) or 0.05 * (abs(values[0]) or 1.0)
    feet = {state: min(values) - share * height for state, share in _FEET.items()}
    points.update(
        marker={
            "colorscale": shades(),
            "showscale": False,
            "cmin": 0,
            "cmax": max(trial.number for trial in facts.trials),
            "size": 8,
            "line": {"width": 0.5, "color": GREY},
        },
        text=numbers,
        hovertemplate="trial %{text}<br>%{x}<br>%{y:.4f}<extra></extra>",
    )
    if isinstance(distribution, CategoricalDistribution):
        points.x = [_label(distribution, text) for text in points.x]
        fig.update_xaxes(categoryarray=[str(choice) for choice in distribution.choices])
    shown = _shown(distribution)
    lowest = min(values)
    for state, foot in feet.items():
        trials = [trial for trial in states(facts)[state] if path in trial.params]
        if trials:
            fig.add_trace(_feet(facts, state, trials, [shown(trial.params[path]) for trial in trials], foot))
            lowest = min(lowest, foot)
    for trial, symbol, size, color in ((facts.baseline, "square-open", 14, ORANGE), (facts.best, "star", 14, INK)):
        if trial is not None and trial in facts.complete and path in trial.params:
            fig.add_trace(_singled_out(trial, shown(trial.params[path]), symbol, size, color))
    fig.update_yaxes(title_text=facts.metric_words, range=[lowest - 0.1 * height, max(values) + 0.12 * height])
    fig.update_xaxes(**_axis_of(distribution))
    fig.update_layout(showlegend=False, margin={"r": 20})
    return fig


def _label(distribution: CategoricalDistribution, text: str) -> str:
    """The choice that Optuna shows as Python's `repr`."""
    return {repr(choice): str(choice) for choice in distribution.choices}[text]


def _shown(distribution: BaseDistribution) -> Callable[[Any], Any]:
    """How a value stands on its axis."""
    return str if isinstance(distribution, CategoricalDistribution) else lambda value: value


def _feet(facts: Facts, state: str, trials: Sequence[FrozenTrial], x: Sequence[Any], foot: float) -> go.Scatter:
    return go.Scatter(
        x=list(x),
        y=[foot] * len(trials),
        mode="markers",
        name=WORDS[state],
        marker=_mark(state, size=6, line=1),
        text=[_ending(facts, trial) for trial in trials],
        hovertemplate="%{text}<br>%{x}<extra></extra>",
    )


def _singled_out(trial: FrozenTrial, x: Any, symbol: str, size: int, color: str) -> go.Scatter:
    return go.Scatter(
        x=[x],
        y=[value_of(trial)],
        mode="markers",
        name=name_of(trial),
        marker={"symbol": symbol, "size": size, "color": color, "line": {"width": 2, "color": color}},
        hoverinfo="skip",
    )


def _axis_of(distribution: BaseDistribution) -> dict[str, Any]:
    """The whole range of a parameter, so that what was not tried is seen too."""
    if isinstance(distribution, CategoricalDistribution):
        return {"range": [-0.6, len(distribution.choices) - 0.4]}
    low, high = float(distribution.low), float(distribution.high)  # type: ignore[attr-defined]
    if distribution.log:  # type: ignore[attr-defined]
        return log_axis(low, high)
    room = 0.05 * (high - low) or 0.5
    return {"range": [low - room, high + room]}


def log_axis(low: float, high: float) -> dict[str, Any]:
    """A logarithmic axis whose ticks are whole numbers written out: Plotly's own are bare 2s and 5s within a decade."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = len(exponents) - 1
    factors = (1,) if decades > 2 else (1, 3) if decades == 2 else (1, 2, 5)
    ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)] or [low, high]
    room = 0.05 * math.log10(high / low) or 0.1
    return {
        "type": "log",
        "range": [math.log10(low) - room, math.log10(high) + room],
        "tickvals": ticks,
        "ticktext": list(map(number, ticks)),
    }


def parallel_coordinates(facts: Facts) -> Section | None:
    """Every complete trial as a line through its parameters."""
    fig = parallel_figure(facts)
    if fig is None:
        return None
    dimensions = len(fig.layout.xaxis.tickvals)
    lead = (
        f"Each of the {count(len(facts.complete), 'complete trial')} is a line through its score and its parameters; "
        "the better, the darker. A line through `None` has not that parameter."
    )
    body = figure(fig, alt=f"Parallel coordinates. {lead}", height=440, min_width=110 * dimensions)
    return Section("parallel", "Parallel coordinates", lead, body)


def parallel_figure(facts: Facts) -> go.Figure | None:
    """Optuna's parallel coordinates; None where fewer than two trials or no parameters are to be compared."""
    if len(facts.complete) < 2 or not any(trial.params for trial in facts.complete):
        return None
    with _silent():
        fig = optuna.visualization.plot_parallel_coordinate(facts.still, target_name=facts.metric_words)
    *lines, bar = fig.data
    equal = len({value_of(trial) for trial in facts.complete}) == 1
    for line in lines:
        # The score is the first axis, whose heights go from 0, the lowest, to 1.
        good = 1.0 if equal else line.y[0] if facts.maximize else 1.0 - line.y[0]
        line.line.color = _shade(good)
        line.line.width = 1.2 + 1.3 * good
        line.opacity = 0.85
        line.meta = good
    lines.sort(key=lambda line: float(line.meta))  # the best on top
    bar.marker.update(colorscale=shades(), reversescale=not facts.maximize)
    bar.marker.colorbar.update(title={"text": facts.metric_words, "side": "right"}, thickness=14, outlinewidth=0)
    fig = go.Figure([*lines, bar], fig.layout)
    # Optuna cuts long names; here each has a line more.
    paths = sorted({path for trial in facts.complete for path in trial.params})
    fig.update_xaxes(ticktext=[name.replace(".", ".<br>") for name in (facts.metric_words, *paths)], tickangle=0)
    fig.update_annotations(bgcolor="rgba(255,255,255,0.8)")  # the numbers stay readable where lines cross them
    return fig


def _shade(share: float) -> str:
    """The colour at a share of the way from the pale end of the scale to the dark one."""
    stops = shades()
    channels = [[int(color[at : at + 2], 16) for _, color in stops] for at in (1, 3, 5)]
    red, green, blue = (round(float(np.interp(share, [stop for stop, _ in stops], each))) for each in channels)
    return f"rgb({red},{green},{blue})"


# What all of them share ---------------------------------------------------------------------------------------------


def _in_words(facts: Facts) -> str:
    return ", ".join(f"{len(trials)} {WORDS[state]}" for state, trials in states(facts).items() if trials)


def _counted(facts: Facts) -> str:
    waiting = f"; {count(len(facts.waiting), 'trial')} that wait are in none" if facts.waiting else ""
    return f"Shown are {_in_words(facts)}{waiting}."


@contextmanager
def _quiet_logger() -> Iterator[None]:
    """Keeps from the terminal what Optuna logs of a study that has little to show: the report says it in its words."""
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _silent() -> Iterator[None]:
    """Optuna's figures without what it says of them being experimental."""
    with warnings.catch_warnings(), _quiet_logger():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
