"""The course of the search: its history, learning curves, importances, and the effect of each parameter.

Optuna's own figures are used where it has them (history, importances, slices, parallel coordinates). They show complete
trials only, so pruned, failed and running ones are added. Learning curves are drawn anew: Optuna's have a trace per
trial, and do not distinguish states.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import optuna
import plotly.graph_objects as go
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from hpo.analysis.study_data import StudyData, value_of
from hpo.dashboard.pictures import BLUE, GREY, INK, ORANGE
from hpo.report.charts import STATE_MARKS, STATE_WORDS, STATES, Look, log_axis, marks, whole_numbers
from hpo.report.page import SHADES, Section, figure, paragraph, section, side_by_side
from hpo.report.words import metric_label, trial_name
from hpo.text import count, joined, score
from hpo.trials import FAILURE

_FEW = 20  # complete trials; PED-ANOVA looks at a tenth of them, which would be less than two
_MANY = 1000  # points of learning curves, which are drawn smaller, so that the lines can be seen
_STRIPS = {"pruned": 0.15, "failed": 0.25, "running": 0.35}
"""How far below the worst value trials without a value are drawn, as a fraction of the values' range."""


def states(data: StudyData) -> dict[str, tuple[FrozenTrial, ...]]:
    """The trials that have begun, by state."""
    return {state: getattr(data, state) for state in STATES}


def _states_text(data: StudyData) -> str:
    return ", ".join(f"{len(trials)} {STATE_WORDS[state]}" for state, trials in states(data).items() if trials)


# History ------------------------------------------------------------------------------------------------------------


def history(data: StudyData) -> Section | None:
    """The value of every trial and the best so far; below, the number of trained epochs."""
    if not any(states(data).values()):
        return None
    lead = "Every complete trial's validation score, and the best so far. Below: the number of trained epochs."
    if not data.complete:
        lead = "No trial is complete yet: the number of epochs trained so far."
    waiting = f"; {count(len(data.waiting), 'waiting trial')} not shown" if data.waiting else ""
    alt = f"Optimization history: {_states_text(data)}; {lead}"
    body = figure(history_figure(data), alt=alt, height=520 if data.complete else 260)
    return section("history", "History", f"{lead} Shown: {_states_text(data)}{waiting}.", body)


def history_figure(data: StudyData) -> go.Figure:
    """Optuna's optimization history, and below it the epochs of all trials that have begun."""
    rows = 2 if data.complete else 1
    heights = [0.68, 0.32] if rows == 2 else [1.0]
    fig = make_subplots(rows=rows, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=heights)
    last = max(trial.number for trial in data.trials)
    if data.complete:
        _add_values(fig, data, last)
    for state, trials in states(data).items():
        if trials:
            epochs = [data.epochs(trial) for trial in trials]
            fig.add_trace(
                _state_marks(data, state, trials, [trial.number for trial in trials], epochs), row=rows, col=1
            )
    fig.update_yaxes(title_text="epochs trained", rangemode="tozero", row=rows, col=1)
    fig.update_xaxes(title_text="trial", row=rows, col=1, **whole_numbers(last))
    return fig


def _add_values(fig: go.Figure, data: StudyData, last: int) -> None:
    label = metric_label(data.metric)
    with _quiet():
        points, best = optuna.visualization.plot_optimization_history(data.snapshot, target_name=label).data[:2]
    look = STATE_MARKS["complete"]
    points.update(
        showlegend=False,  # the same symbol is in the legend for the lower figure
        marker={"color": look["color"], "symbol": look["symbol"], "size": 7, "opacity": look["opacity"]},
        hovertemplate="trial %{x}<br>%{y:.4f}<extra></extra>",
    )
    best.update(name="best so far", line={"color": INK, "width": 2, "shape": "hv"}, hoverinfo="skip")
    fig.add_traces([best, points], rows=[1, 1], cols=[1, 1])
    if data.baseline in data.complete:
        line = go.Scatter(
            x=[0, last],
            y=[value_of(data.baseline)] * 2,
            mode="lines",
            name="baseline",
            line={"color": ORANGE, "width": 1.5, "dash": "dash"},
            hovertemplate="baseline<br>%{y:.4f}<extra></extra>",
        )
        fig.add_trace(line, row=1, col=1)
    fig.update_yaxes(title_text=f"validation {label}", row=1, col=1)


def _state_marks(
    data: StudyData, state: str, trials: Sequence[FrozenTrial], x: Sequence[Any], y: Sequence[float]
) -> go.Scatter:
    look = Look(STATE_MARKS[state]["color"], STATE_MARKS[state]["symbol"], 7, 1.5)
    labels = [_description(data, trial) for trial in trials]
    return marks(x, y, "%{text}", look, name=STATE_WORDS[state], text=labels)


def _description(data: StudyData, trial: FrozenTrial) -> str:
    """A trial's name, result and epochs, for the label at the pointer."""
    last = None if trial.last_step is None else trial.intermediate_values.get(trial.last_step)
    if trial in data.complete:
        result = f"{metric_label(data.metric)} {score(trial.value)}"
    elif trial in data.failed:
        result = f"failed: {trial.user_attrs[FAILURE]}"
    else:
        state = "pruned" if trial in data.pruned else "running"
        result = state if last is None else f"{state} at {metric_label(data.metric)} {score(last)}"
    return f"{trial_name(trial)}<br>{result}<br>{count(data.epochs(trial), 'epoch')}"


# Learning curves ----------------------------------------------------------------------------------------------------


def learning_curves(data: StudyData) -> Section | None:
    """The validation score of every trial, epoch by epoch."""
    reported = [trial for trial in data.trials if trial.intermediate_values]
    if not reported:
        return None
    fig = curves_figure(data)
    without = sum(map(len, states(data).values())) - len(reported)
    lead = ["The validation score of every trial in training; pruned trials are faint."]
    if data.rungs:
        rungs = joined([f"epoch {epoch}" for epoch in data.rungs])
        lead.append(f"Thin vertical lines are the rungs, where trials are compared: {rungs}.")
    if data.folds > 1:
        lead.append(f"The epochs of the {data.folds} folds follow one another.")
    if fig.layout.yaxis.range is not None:
        lead.append("The axis leaves out the worst values; a double click shows all.")
    lead.append(
        f"Shown: {count(len(reported), 'curve')}" + (f"; {without} trials have no epoch yet." if without else ".")
    )
    alt = f"Learning curves of {count(len(reported), 'trial')}: {_states_text(data)}."
    return section("curves", "Learning curves", " ".join(lead), figure(fig, alt=alt, height=480))


def curves_figure(data: StudyData) -> go.Figure:
    """One trace per state, its trials separated by gaps; on top the baseline and the best trial again."""
    fig = go.Figure()
    size = 5 if sum(len(trial.intermediate_values) for trial in data.trials) < _MANY else 2
    for state in ("pruned", "failed", "complete", "running"):  # the most interesting on top
        trials = [trial for trial in states(data)[state] if trial.intermediate_values]
        look = STATE_MARKS[state]
        if trials:
            # Marks too: a curve of one point has no line, and the last epoch of a failed trial should be seen.
            marker = {"symbol": look["symbol"], "size": size, "line": {"width": 1, "color": look["color"]}}
            line = {"color": look["color"], "dash": look["dash"], "width": 1.4}
            name = f"{STATE_WORDS[state]} ({len(trials)})"
            fig.add_trace(_curves(trials, name, line, mode="lines+markers", marker=marker, opacity=look["opacity"]))
    baseline, best = data.baseline, data.best
    if baseline is not None and baseline.intermediate_values and baseline is not best:
        fig.add_trace(_curves([baseline], trial_name(baseline), {"color": ORANGE, "dash": "dash", "width": 2.5}))
    if best is not None and best.intermediate_values:
        fig.add_trace(_curves([best], f"best: {trial_name(best)}", {"color": INK, "width": 2.5}))
    for rung in data.rungs:
        fig.add_vline(x=rung, line={"color": GREY, "width": 1, "dash": "dot"}, layer="below")
        fig.add_annotation(
            x=rung, y=0, yref="paper", text=f"rung {rung}", textangle=-90, showarrow=False, xanchor="left",
            yanchor="bottom", xshift=1, font={"size": 11, "color": GREY},
        )  # fmt: skip
    last = max(trial.last_step or 0 for trial in data.trials)
    fig.update_xaxes(title_text="epoch", showgrid=False, **whole_numbers(max(last, data.steps)))
    fig.update_yaxes(title_text=f"validation {metric_label(data.metric)}", range=_focus(data))
    return fig


def _curves(trials: Sequence[FrozenTrial], name: str, line: Mapping[str, Any], **more: Any) -> go.Scatter:
    """Trials as one trace, with a gap after each."""
    x: list[int | None] = []
    y: list[float | None] = []
    labels: list[str] = []
    for trial in trials:
        reported = sorted(trial.intermediate_values.items())
        x += [*(step for step, _ in reported), None]
        y += [*(value if math.isfinite(value) else None for _, value in reported), None]
        labels += [trial_name(trial)] * (len(reported) + 1)
    hover = "%{text}<br>epoch %{x}: %{y:.4f}<extra></extra>"
    more = {"mode": "lines", "connectgaps": False, "hovertemplate": hover, **more}
    return go.Scatter(x=x, y=y, text=labels, name=name, line=dict(line), **more)


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
    body = [figure(fig, alt=f"Importance of each parameter. {lead}", height=90 + 30 * len(fig.data[0].y))]
    if len(data.complete) < _FEW:
        body.append(paragraph(f"With fewer than {_FEW} complete trials these fractions are little more than chance."))
    return section("importances", "Importances", lead, body, [paragraph(f"Optuna: {n}", kind="note") for n in notes])


def importances_figure(data: StudyData) -> tuple[go.Figure | None, list[str]]:
    """Optuna's figure with Optuna's warnings; or None with the reason."""
    searched = {path for trial in data.complete for path in trial.params}
    if len(data.complete) < 2:
        return None, [f"it takes two complete trials, and there is {len(data.complete) or 'none'}"]
    if len(searched) < 2:
        return None, ["one parameter is searched" if searched else "no parameter is searched"]
    if len({value_of(trial) for trial in data.complete}) == 1:
        return None, ["all complete trials have the same value"]
    with _quiet(record=True) as caught:
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
        "failed (▽), running (◇)."
    )
    body = [figure(fig, alt=f"Validation score over {path}", height=280) for path, fig in figures.items()]
    absent = [p for p in figures if not all(p in trial.params for trial in data.trials if trial.params)]
    note = f"A trial is shown where it has the parameter; these exist only sometimes: {', '.join(absent)}."
    notes = [paragraph(note, kind="note")] if absent else []
    return section("slices", "Slices", lead, side_by_side(body), notes)


def slice_figures(data: StudyData) -> dict[str, go.Figure]:
    """Parameter -> Optuna's slice of it, in the space's order; for parameters of complete trials."""
    distributions: dict[str, BaseDistribution] = {}
    for trial in data.trials:
        distributions |= trial.distributions
    if data.space is not None:
        known = {path: distributions[path] for path in data.space.distributions if path in distributions}
        distributions = known | distributions
    scored = {path for trial in data.complete for path in trial.params}
    return {path: _slice(data, path, found) for path, found in distributions.items() if path in scored}


def _slice(data: StudyData, path: str, distribution: BaseDistribution) -> go.Figure:
    with _quiet():
        fig = optuna.visualization.plot_slice(data.snapshot, params=[path], target_name=metric_label(data.metric))
    values = [value_of(trial) for trial in data.complete if path in trial.params]
    lowest, height = min(values), (max(values) - min(values)) or 0.05 * (abs(values[0]) or 1.0)
    categorical = isinstance(distribution, CategoricalDistribution)
    _restyle(fig, data, distribution)

    def position(trial: FrozenTrial) -> Any:
        return str(trial.params[path]) if categorical else trial.params[path]

    for state, share in _STRIPS.items():
        trials = [trial for trial in states(data)[state] if path in trial.params]
        if trials:
            bottom = min(values) - share * height
            fig.add_trace(_state_marks(data, state, trials, list(map(position, trials)), [bottom] * len(trials)))
            lowest = min(lowest, bottom)
    for trial, symbol, color in ((data.baseline, "square-open", ORANGE), (data.best, "star", INK)):
        if trial is not None and trial in data.complete and path in trial.params:
            look = Look(color, symbol, 14, 2)
            fig.add_trace(marks([position(trial)], [value_of(trial)], "", look, name=trial_name(trial)))
    limits = [lowest - 0.1 * height, max(values) + 0.12 * height]
    fig.update_yaxes(title_text=metric_label(data.metric), range=limits)
    fig.update_xaxes(**_parameter_range(distribution))
    fig.update_layout(showlegend=False, margin={"r": 20})
    return fig


def _restyle(fig: go.Figure, data: StudyData, distribution: BaseDistribution) -> None:
    """Color Optuna's points by trial number, and name choices by `str` in place of `repr`."""
    points = fig.data[0]
    numbers = list(points.marker.color)
    marker = {
        "colorscale": SHADES,
        "showscale": False,
        "cmin": 0,
        "cmax": max(trial.number for trial in data.trials),
        "size": 8,
        "line": {"width": 0.5, "color": GREY},
    }
    points.update(marker=marker, text=numbers, hovertemplate="trial %{text}<br>%{x}<br>%{y:.4f}<extra></extra>")
    if isinstance(distribution, CategoricalDistribution):
        names = {repr(choice): str(choice) for choice in distribution.choices}
        points.x = [names[text] for text in points.x]
        fig.update_xaxes(categoryarray=list(names.values()))


def _parameter_range(distribution: BaseDistribution) -> dict[str, Any]:
    """The whole range of a parameter, so that the untried part is visible."""
    if isinstance(distribution, CategoricalDistribution):
        return {"range": [-0.6, len(distribution.choices) - 0.4]}
    low, high = float(distribution.low), float(distribution.high)  # type: ignore[attr-defined]
    if distribution.log:  # type: ignore[attr-defined]
        return log_axis(low, high)
    margin = 0.05 * (high - low) or 0.5
    return {"range": [low - margin, high + margin]}


def parallel_coordinates(data: StudyData) -> Section | None:
    """Every complete trial as a line through its parameters."""
    fig = parallel_figure(data)
    if fig is None:
        return None
    lead = (
        f"Each of the {count(len(data.complete), 'complete trial')} is a line through its score and its parameters; "
        "darker is better. A line through `None` does not have that parameter."
    )
    width = 110 * len(fig.layout.xaxis.tickvals)
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
    # Optuna cuts long names; here they have two lines.
    paths = sorted({path for trial in data.complete for path in trial.params})
    fig.update_xaxes(ticktext=[name.replace(".", ".<br>") for name in (label, *paths)], tickangle=0)
    fig.update_annotations(bgcolor="rgba(255,255,255,0.8)")  # numbers can be read where lines cross them
    return fig


@contextmanager
def _quiet(*, record: bool = False) -> Iterator[list[warnings.WarningMessage]]:
    """Keep Optuna's log and its experimental warnings off the terminal; with `record`, yield all warnings."""
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=record) as caught:
            if record:
                warnings.simplefilter("always")
            else:
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield [] if caught is None else caught
    finally:
        logger.setLevel(level)
