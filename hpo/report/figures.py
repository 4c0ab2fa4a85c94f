"""The course of the search: its history, learning curves, importances, and the effect of each parameter.

Optuna draws importances and parallel coordinates. Its other figures show complete trials only, or do not distinguish
states; here every trial that has begun is shown.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import optuna
import plotly.graph_objects as go
from optuna.trial import FrozenTrial
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from core.text import count
from hpo.analysis.costs import progress
from hpo.analysis.study_data import StudyData, value_of
from hpo.dashboard.pictures import BLUE, GREY, INK, ORANGE
from hpo.report.charts import LOOKS, ByParameter, Look, around, best_so_far, trial_marks, whole_numbers
from hpo.report.page import SHADES, Section, figure, note, paragraph, section, side_by_side
from hpo.report.words import metric_label, trial_name
from hpo.text import counted, joined

_FEW = 20  # complete trials; PED-ANOVA looks at a tenth of them, which would be less than two
_MANY = 1000  # points of learning curves, which are drawn smaller, so that the lines can be seen
_WORDS = {
    "complete": "complete",
    "pruned": "pruned",
    "failed": "failed to train",
    "paused": "paused",
    "running": "running",
}
_AXIS_WIDTH, _LINE = 100, 13
"""CSS pixels of an axis of the parallel coordinates, and the characters of its name that fit into a line."""
_CURVES = {
    "pruned": ("solid", 0.4),
    "paused": ("dot", 0.6),
    "failed": ("dash", 0.9),
    "complete": ("solid", 0.75),
    "running": ("dot", 0.9),
}
"""Dash and opacity of each state's learning curves, the most interesting on top."""
_STRIPS = {"pruned": 0.15, "paused": 0.2, "failed": 0.25, "running": 0.35}
"""How far below the worst value trials without a value are drawn, as a fraction of the values' range."""


def _states_text(data: StudyData) -> str:
    return counted({_WORDS[state]: len(trials) for state, trials in data.states.items()})


# History ------------------------------------------------------------------------------------------------------------


def history(data: StudyData) -> Section | None:
    """The value of every trial and the best so far; below, the number of trained epochs."""
    if not any(data.states.values()):
        return None
    lead = "Every complete trial's validation score, and the best so far. Below: the number of trained epochs."
    if not data.complete:
        lead = "No trial is complete yet: the number of epochs trained so far."
    waiting = f"; {count(len(data.waiting), 'waiting trial')} not shown" if data.waiting else ""
    alt = f"Optimization history: {_states_text(data)}; {lead}"
    body = figure(history_figure(data), alt=alt, height=520 if data.complete else 260)
    return section("history", "History", f"{lead} Shown: {_states_text(data)}{waiting}.", body)


def history_figure(data: StudyData) -> go.Figure:
    """The values of the complete trials, and below them the epochs of all trials that have begun."""
    rows = 2 if data.complete else 1
    heights = [0.68, 0.32] if rows == 2 else [1.0]
    fig = make_subplots(rows=rows, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=heights)
    last = max(trial.number for trial in data.trials)
    if data.complete:
        found = progress(data)
        line = best_so_far([*found.trials, last], [*found.best, found.best[-1]], line={"color": INK}, hoverinfo="skip")
        # The same symbol is in the legend for the lower figure.
        points = _by_number(data, data.complete, map(value_of, data.complete), "complete", showlegend=False)
        fig.add_traces([line, points], rows=[1, 1], cols=[1, 1])
        if data.baseline in data.complete:
            value = value_of(data.baseline)
            line = {"color": ORANGE, "width": 1.5, "dash": "dash"}
            fig.add_hline(y=value, line=line, name="baseline", showlegend=True, row=1, col=1)
        limits = around([value_of(trial) for trial in data.complete])
        fig.update_yaxes(title_text=f"validation {metric_label(data.metric)}", range=limits, row=1, col=1)
    for state, trials in data.states.items():
        if trials:
            fig.add_trace(_by_number(data, trials, map(data.epochs, trials), state), row=rows, col=1)
    fig.update_yaxes(title_text="epochs trained", rangemode="tozero", row=rows, col=1)
    fig.update_xaxes(title_text="trial", row=rows, col=1, **whole_numbers(0, last))
    return fig


def _by_number(data: StudyData, trials: Sequence[FrozenTrial], y: Any, state: str, **more: Any) -> go.Scatter:
    numbers = [trial.number for trial in trials]
    return trial_marks(data, trials, numbers, y, LOOKS[state], name=_WORDS[state], **more)


# Learning curves ----------------------------------------------------------------------------------------------------


def learning_curves(data: StudyData) -> Section | None:
    """The validation score of every trial, epoch by epoch."""
    reported = [trial for trial in data.trials if trial.intermediate_values]
    if not reported:
        return None
    fig = curves_figure(data)
    without = sum(map(len, data.states.values())) - len(reported)
    lead = ["The validation score of every trial in training; pruned trials are faint."]
    if data.rungs:
        rungs = joined([f"epoch {epoch}" for epoch in data.rungs])
        lead.append(f"Thin vertical lines are the rungs, where trials are compared: {rungs}.")
    if data.folds > 1:
        lead.append(f"The epochs of the {data.folds} folds follow one another.")
    if fig.layout.yaxis.range is not None:
        lead.append("The axis leaves out the worst values; a double click shows all.")
    lead.append(
        f"Shown: {count(len(reported), 'curve')}"
        + (f"; {count(without, 'trial')} without an epoch yet." if without else ".")
    )
    alt = f"Learning curves of {count(len(reported), 'trial')}: {_states_text(data)}."
    return section("curves", "Learning curves", " ".join(lead), figure(fig, alt=alt, height=480))


def curves_figure(data: StudyData) -> go.Figure:
    """One trace per state, its trials separated by gaps; on top the baseline and the best trial again."""
    fig = go.Figure()
    size = 5 if sum(len(trial.intermediate_values) for trial in data.trials) < _MANY else 2
    for state, (dash, opacity) in _CURVES.items():
        trials = [trial for trial in data.states[state] if trial.intermediate_values]
        look = LOOKS[state]
        if trials:
            # Marks too: a curve of one point has no line, and the last epoch of a failed trial should be seen.
            marker = {"symbol": look.symbol, "size": size, "line": {"width": 1, "color": look.color}}
            line, name = {"color": look.color, "dash": dash, "width": 1.4}, f"{_WORDS[state]} ({len(trials)})"
            fig.add_trace(_curves(trials, name, line=line, mode="lines+markers", marker=marker, opacity=opacity))
    baseline, best = data.baseline, data.best
    if baseline is not None and baseline.intermediate_values and baseline is not best:
        line = {"color": ORANGE, "dash": "dash", "width": 2.5}
        fig.add_trace(_curves([baseline], trial_name(baseline), line=line, mode="lines"))
    if best is not None and best.intermediate_values:
        line = {"color": INK, "width": 2.5}
        fig.add_trace(_curves([best], f"best: {trial_name(best)}", line=line, mode="lines"))
    for rung in data.rungs:
        fig.add_vline(
            x=rung, line={"color": GREY, "width": 1, "dash": "dot"}, layer="below", annotation_text=f"rung {rung}",
            annotation={"textangle": -90, "y": 0, "yanchor": "bottom", "font": {"size": 11, "color": GREY}},
        )  # fmt: skip
    last = max(trial.last_step or 0 for trial in data.trials)
    fig.update_xaxes(title_text="epoch", showgrid=False, **whole_numbers(1, max(last, data.steps)))
    fig.update_yaxes(title_text=f"validation {metric_label(data.metric)}", range=_focus(data))
    return fig


def _curves(trials: Sequence[FrozenTrial], name: str, **look: Any) -> go.Scatter:
    """Trials as one trace, with a gap after each."""
    points: list[tuple[int | None, float | None, str]] = []
    for trial in trials:
        reported = sorted(trial.intermediate_values.items())
        points += [(step, value if math.isfinite(value) else None, trial_name(trial)) for step, value in reported]
        points.append((None, None, ""))
    x, y, text = zip(*points, strict=True)
    hover = "%{text}<br>epoch %{x}: %{y:.4f}<extra></extra>"
    return go.Scatter(x=x, y=y, text=text, name=name, connectgaps=False, hovertemplate=hover, **look)


def _focus(data: StudyData) -> list[float] | None:
    """Limits of the score's axis if a few values would flatten all others; None if all fit well.

    A diverged network has a loss of thousands, and an untrained one an accuracy near zero.
    """
    values = [value for trial in data.trials for value in trial.intermediate_values.values() if math.isfinite(value)]
    if not values:
        return None
    low, high = min(values), max(values)
    worst = float(np.quantile(values, 0.08 if data.maximize else 0.92))
    kept = (high - worst) if data.maximize else (worst - low)
    if kept <= 0 or high - low < 2 * kept:
        return None
    margin = 0.05 * kept
    return [worst, high + margin] if data.maximize else [low - margin, worst]


# Importances --------------------------------------------------------------------------------------------------------


def importances(data: StudyData) -> Section | None:
    """How much each parameter decides whether a trial is among the best tenth."""
    if not data.trials:
        return None
    fig, notes = importances_figure(data)
    if fig is None:
        return section("importances", "Importances", f"How much each parameter matters is unknown: {notes[0]}.")
    lead = (
        "How much each parameter decides whether a trial is among the best tenth, as fractions of one: PED-ANOVA "
        f"(Watanabe et al. 2023), from the {count(len(data.complete), 'complete trial')} only."
    )
    few = f"From fewer than {_FEW} complete trials, these fractions are little more than chance."
    return section(
        "importances",
        "Importances",
        lead,
        paragraph(few, kind="warning") if len(data.complete) < _FEW else "",
        figure(fig, alt=f"Importance of each parameter. {lead}", height=90 + 30 * len(fig.data[0].y)),
        [note(f"Optuna: {words}") for words in notes],
    )


def importances_figure(data: StudyData) -> tuple[go.Figure | None, list[str]]:
    """Optuna's figure with Optuna's warnings; or None with the reason."""
    searched = {path for trial in data.complete for path in trial.params}
    if len(data.complete) < 2:
        return None, [f"it takes two complete trials, and there is {len(data.complete) or 'none'}"]
    if len(searched) < 2:
        return None, ["one parameter is searched" if searched else "no parameter is searched"]
    if len({value_of(trial) for trial in data.complete}) == 1:
        return None, ["all complete trials have the same value"]
    with _quiet() as caught:
        fig = optuna.visualization.plot_param_importances(data.snapshot)
    warned = [str(each.message) for each in caught if not issubclass(each.category, FutureWarning)]
    fractions = fig.data[0].x if fig.data else ()
    if not sum(fractions) > 0 or not all(map(math.isfinite, fractions)):
        return None, ["no parameter distinguishes the best trials from the others"]
    fig.data[0].update(marker={"color": BLUE}, showlegend=False, hovertemplate="%{y}: %{x:.3f}<extra></extra>")
    fig.update_xaxes(title_text="fraction of one", range=[0, 1.12 * max(fractions)])
    fig.update_yaxes(title_text=None)
    return fig, sorted(set(warned))


# The effect of each parameter ---------------------------------------------------------------------------------------


def slices(data: StudyData) -> Section | None:
    """The score over each parameter."""
    figures = slice_figures(data)
    if not figures:
        return None
    lead = (
        "The validation score of the complete trials over each parameter; later trials are darker. The star is the "
        "best trial, the open square the baseline; along the bottom are trials without a final score: pruned (×), "
        "failed (▼), running (◇)."
    )
    body = [figure(fig, alt=f"Validation score over {path}", height=280) for path, fig in figures.items()]
    absent = [p for p in figures if not all(p in trial.params for trial in data.trials if trial.params)]
    words = f"A trial is shown where it has the parameter; these exist only sometimes: {', '.join(absent)}."
    return section("slices", "Slices", lead, side_by_side(body), note(words) if absent else "")


def slice_figures(data: StudyData) -> dict[str, go.Figure]:
    """Parameter -> the scores over it, in the space's order; for parameters of complete trials."""
    scored = dict.fromkeys(path for trial in data.complete for path in trial.params)
    known = [] if data.space is None else [path for path in data.space.distributions if path in scored]
    return {path: _slice(data, path) for path in dict.fromkeys([*known, *scored])}


def _slice(data: StudyData, path: str) -> go.Figure:
    chart = ByParameter(data, path)
    complete = chart.having(data.complete)
    values = [value_of(trial) for trial in complete]
    chart.add(complete, values, Look(size=7, outline=0.5, edge=GREY), name="complete")
    last = max(trial.number for trial in data.trials)
    shades = {"color": [trial.number for trial in complete], "colorscale": SHADES, "cmin": 0, "cmax": last}
    chart.fig.data[0].update(marker=shades)
    lowest = 0.0
    for state, below in _STRIPS.items():
        if trials := chart.having(data.states[state]):
            lowest = below
            chart.add(trials, around(values, below)[:1] * len(trials), LOOKS[state], name=_WORDS[state])
    for trial, symbol, color in ((data.baseline, "square-open", ORANGE), (data.best, "star", INK)):
        if trial is not None and trial in complete:
            chart.add([trial], [value_of(trial)], Look(color, symbol, 14, 2), name=trial_name(trial))
    chart.fig.update_yaxes(title_text=metric_label(data.metric), range=around(values, lowest + 0.1, 0.12))
    chart.fig.update_layout(showlegend=False, margin={"r": 20})
    return chart.fig


def parallel_coordinates(data: StudyData) -> Section | None:
    """Every complete trial as a line through its parameters."""
    fig = parallel_figure(data)
    if fig is None:
        return None
    lead = (
        f"Each of the {count(len(data.complete), 'complete trial')} is a line through its score and its parameters; "
        "darker is better. A line through `None` does not have that parameter."
    )
    width = _AXIS_WIDTH * len(fig.layout.xaxis.tickvals)
    body = figure(fig, alt=f"Parallel coordinates. {lead}", height=440, min_width=width)
    return section("parallel", "Parallel coordinates", lead, body)


def parallel_figure(data: StudyData) -> go.Figure | None:
    """Optuna's parallel coordinates; None with fewer than two complete trials or without parameters."""
    if len(data.complete) < 2 or not any(trial.params for trial in data.complete):
        return None
    label = metric_label(data.metric)
    with _quiet():
        fig = optuna.visualization.plot_parallel_coordinate(data.snapshot, target_name=label)
    *lines, bar = fig.data
    equal = len({value_of(trial) for trial in data.complete}) == 1
    for line in lines:
        # The score is the first axis, whose heights go from 0, the lowest, to 1.
        good = 1.0 if equal else line.y[0] if data.maximize else 1.0 - line.y[0]
        line.line.color = sample_colorscale(SHADES, min(max(good, 0.0), 1.0))[0]
        line.line.width = 1.2 + 1.3 * good
        line.opacity = 0.85
        line.meta = good
    lines.sort(key=lambda line: float(line.meta))  # the best on top
    bar.marker.update(colorscale=SHADES, reversescale=not data.maximize)
    bar.marker.colorbar.update(title={"text": label, "side": "right"}, thickness=14, outlinewidth=0)
    fig = go.Figure([*lines, bar], fig.layout)
    # Optuna cuts long names; here they have several lines.
    paths = sorted({path for trial in data.complete for path in trial.params})
    fig.update_xaxes(ticktext=list(map(_in_lines, (label, *paths))), tickangle=0, tickfont={"size": 12})
    fig.update_annotations(bgcolor="rgba(255,255,255,0.8)")  # numbers can be read where lines cross them
    return fig


def _in_lines(name: str) -> str:
    """Break a parameter's name after dots, and after underscores where a line would be wider than its axis."""
    lines = [""]
    for part in re.findall(r"[^._ ]+[._ ]?|[._ ]", name):
        if lines[-1].endswith(".") or len(lines[-1] + part) > _LINE:
            lines.append("")
        lines[-1] += part
    return "<br>".join(filter(None, lines))


@contextmanager
def _quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Keep Optuna's log off the terminal, and collect its warnings."""
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    finally:
        logger.setLevel(level)
