"""The section on costs: where the time went, what pruning saved, and what decides the time per epoch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import plotly.graph_objects as go
from markupsafe import Markup
from optuna.trial import FrozenTrial

from core.text import count
from hpo.analysis.costs import Cost, costs_of, own, pace, pace_parameters, paced, saved, total, wall_clock
from hpo.analysis.study_data import StudyData
from hpo.dashboard.pictures import BLUE, INK, ORANGE
from hpo.report.charts import ByParameter, Look, log_axis, marks, time_unit
from hpo.report.page import Section, figure, heading, note, section, side_by_side, table
from hpo.text import duration, joined, percent, together
from hpo.trials import TAKEN_FROM

_LOG_FROM = 20.0  # times that differ by more than this factor are drawn on a logarithmic axis


def costs(data: StudyData) -> Section | None:
    """The section; None before any trial has trained."""
    ended = own((*data.complete, *data.pruned, *data.failed))
    if not ended:
        return None
    found, parameters = costs_of(data), pace_parameters(data)
    imported = sum(TAKEN_FROM in trial.user_attrs for trial in data.trials)
    body = [_bars(data, found), _table(found), _clock_text(data, found)]
    if imported:
        body.append(note(f"{count(imported, 'trial')} imported from another study cost nothing here."))
    body += _devices(data)
    if parameters:
        words = joined([f"`{path}` ({percent(share)})" for path, share in parameters])
        body += [
            heading("What makes an epoch slow"),
            f"How much of the order of the times a parameter explains: {words}. Each mark is a trial.",
            side_by_side([_pace_figure(data, path) for path, _ in parameters]),
        ]
    return section("costs", "Costs", _lead(data, ended), body)


def _lead(data: StudyData, ended: Sequence[FrozenTrial]) -> str:
    epochs, full = sum(map(data.epochs, ended)), len(ended) * data.steps
    words = (
        f"The search trained {epochs:,} of the {full:,} epochs that its {count(len(ended), 'trial')} have in full "
        f"({percent(epochs / full)}), in {duration(sum(map(data.elapsed_s, ended)))}."
    )
    if (less := saved(data)).epochs:
        epochs_saved = count(less.epochs, "epoch")
        words += f" Pruning saved {epochs_saved}, about {duration(less.seconds)} at the pace of the pruned trials."
    return words


def _bars(data: StudyData, found: Sequence[Cost]) -> Markup:
    times = {cost.kind: cost.seconds for cost in found if cost.seconds is not None}
    colors = [BLUE] * len(times)
    if (less := saved(data)).epochs:
        times["saved by pruning"] = less.seconds
        colors.append("white")
    longest = max(times.values())
    unit, size = time_unit(longest)
    bars = go.Bar(
        y=list(times),
        x=[seconds / size for seconds in times.values()],
        orientation="h",
        text=list(map(duration, times.values())),
        textposition="outside",
        cliponaxis=False,
        marker={"color": colors, "line": {"color": INK, "width": 1}},
        hovertemplate=f"%{{y}}: %{{x:.3g}} {unit}<extra></extra>",
    )
    layout = {
        "showlegend": False,
        "xaxis": {"title": f"training time ({unit})", "range": [0, 1.2 * longest / size]},  # room for the bar's text
        "yaxis": {"title": "kind of training", "autorange": "reversed"},
        "bargap": 0.35,
    }
    alt = f"Training time by kind, and what pruning saved: {len(times)} bars"
    return figure(go.Figure(bars, layout), alt=alt, height=90 + 38 * len(times))


def _table(found: Sequence[Cost]) -> Markup:
    known = all(cost.epochs is not None and cost.seconds is not None for cost in found)
    rows = [
        (
            together(cost.kind),
            f"{cost.trainings:,}",
            "not known" if cost.epochs is None else f"{cost.epochs:,}",
            f"{cost.full_epochs:,} ({percent(cost.epochs / cost.full_epochs)})"
            if cost.full_epochs and cost.epochs is not None
            else "",
            "not known" if cost.seconds is None else duration(cost.seconds),
        )
        for cost in [*found, *([total("all", found)] if known else [])]
    ]
    return table(("", "trainings", "epochs", "of so many in full", "training time"), rows, right=(1, 2, 3, 4))


def _clock_text(data: StudyData, found: Sequence[Cost]) -> str:
    clock = wall_clock(data)
    if clock is None or not clock[1]:
        return ""
    whole, busy = clock
    trained = sum(cost.seconds or 0.0 for cost in found if cost.kind.endswith(" trials"))
    words = f"By the clock the trials took {duration(busy)}"
    if trained > 1.05 * busy:
        words += f", for {duration(trained)} of training: {trained / busy:.1f} at a time, on average"
    elif trained > 0.95 * busy:
        words += ", nearly all of it training"
    else:
        words += f", {duration(trained)} of it training, the rest pictures, storage and the like"
    if whole > 1.05 * busy:
        words += f"; with pauses, it was {duration(whole)} from the first start to the last end"
    return f"{words}."


def _devices(data: StudyData) -> list[Markup]:
    found: dict[str, list[FrozenTrial]] = {}
    for trial in own((*data.complete, *data.pruned)):
        if "images_per_s" in trial.user_attrs:
            found.setdefault(str(trial.user_attrs.get("device", "not known")), []).append(trial)
    rows = [
        (
            device,
            len(trials),
            _median_and_range([float(trial.user_attrs["images_per_s"]) for trial in trials], ",.0f"),
            _median_and_range([each for trial in trials if (each := pace(data, trial)) is not None], ".3g"),
        )
        for device, trials in found.items()
    ]
    columns = ("device", "trials", "images/s, median (range)", "s per epoch, median (range)")
    return [heading("Speed"), table(columns, rows, right=(1, 2, 3))] if rows else []


def _median_and_range(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _pace_figure(data: StudyData, path: str) -> Markup:
    """Seconds per epoch of every trial by a parameter; in columns, also the median of each."""
    chart = ByParameter(data, path)
    shown = [(trial, seconds) for trial, seconds in paced(data) if path in trial.params]
    trials, times = [trial for trial, _ in shown], [seconds for _, seconds in shown]
    chart.add(trials, times, Look(BLUE, "circle-open", 7, 1.4), "<br>%{y:.3g} s per epoch", name="a trial")
    if chart.step:
        places = sorted(set(map(chart.column, trials)))
        medians = [statistics.median(s for trial, s in shown if chart.column(trial) == at) for at in places]
        look = Look(ORANGE, "line-ew-open", 26, 3)
        chart.fig.add_trace(marks(places, medians, "median %{y:.3g} s per epoch", look, name="median"))
    far_apart = min(times) > 0 and max(times) > _LOG_FROM * min(times)
    axis = log_axis(min(times), max(times)) if far_apart else {"rangemode": "tozero"}
    chart.fig.update_yaxes(title="time per epoch (s)", **axis)
    return figure(chart.fig, alt=f"Seconds per epoch of {count(len(shown), 'trial')} by {path}", height=320)
