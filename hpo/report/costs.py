"""What a study cost: where the time went, what pruning saved of it, and what makes an epoch dear.

Time is that of the trainings themselves, `elapsed_s` of each, added up; beside it stands the wall clock, which is less
where trials ran side by side. What pruning saved is counted in epochs that were not trained, and in hours at the pace
that each pruned trial had. Trials that were taken over from another study are left out: their time was spent there.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from optuna.trial import FrozenTrial

from hpo.analysis.facts import Facts, name_of
from hpo.dashboard.pictures import BLUE, GREEN, GREY, INK, ORANGE, PINK, SKY, YELLOW
from hpo.report.axes import distinct, grouped, place, set_axis
from hpo.report.figures import log_axis
from hpo.report.page import Section, figure, heading, paragraph, side_by_side, table
from hpo.text import count, duration, percent, short, together
from hpo.trials import TAKEN_FROM

FEWEST = 8
"""Trials below which nothing is said of what makes an epoch dear."""
MATTERS = 0.1
"""A parameter that explains less of the order of the times than this share is not shown."""
SHOWN = 2
"""Parameters that are shown."""
LOG_FROM = 20.0
"""Times that differ by more than this factor are drawn on a logarithmic axis."""


# What is computed --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What one kind of training took."""

    what: str
    trainings: int
    epochs: int | None
    """None where it is not known here."""
    in_full: int | None
    """The epochs that these trainings would have had to their end."""
    seconds: float | None
    """None where it is not known here."""


@dataclass(frozen=True)
class Saved:
    """What pruned trials did not train."""

    epochs: int
    seconds: float
    """At each trial's own pace."""


def spent(facts: Facts) -> list[Cost]:
    """What each kind of training took, in the order in which a study does them; kinds without any are left out."""
    kinds: tuple[tuple[str, Iterable[FrozenTrial]], ...] = (
        ("complete trials", facts.complete),
        ("pruned trials", facts.pruned),
        ("failed trials", facts.failed),
        ("running trials", facts.running),
    )
    found = [_of_trials(facts, what, own(trials)) for what, trials in kinds]
    found += [_of_references(facts), *_of_confirmation(facts), *_of_refits(facts)]
    return [cost for cost in found if cost.trainings]


def own(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Those that this study trained itself."""
    return [trial for trial in trials if TAKEN_FROM not in trial.user_attrs]


def saved(facts: Facts) -> Saved:
    """What pruning saved."""
    missing = [(facts.steps - facts.epochs(trial), pace(facts, trial)) for trial in own(facts.pruned)]
    return Saved(sum(epochs for epochs, _ in missing), sum(epochs * (each or 0.0) for epochs, each in missing))


def pace(facts: Facts, trial: FrozenTrial) -> float | None:
    """A trial's seconds per epoch; None where it trained none, or how long is not known."""
    epochs, seconds = facts.epochs(trial), facts.elapsed_s(trial)
    return seconds / epochs if epochs and seconds else None


def wall_clock(facts: Facts) -> tuple[float, float] | None:
    """Seconds from the first start to the last end of a trial, and those of them in which any ran; None of none.

    Attempts that were cut off count: they took time as well.
    """
    every = own(facts.study.optuna.get_trials(deepcopy=False))
    spans = [(t.datetime_start, t.datetime_complete) for t in every if t.datetime_start and t.datetime_complete]
    if not spans:
        return None
    spans.sort()
    busy, (begun, until) = 0.0, spans[0]
    for start, end in spans[1:]:
        if start > until:
            busy += _seconds(begun, until)
            begun = start
        until = max(until, end)
    return _seconds(spans[0][0], until), busy + _seconds(begun, until)


def explained(values: Sequence[Any], seconds: Sequence[float]) -> float:
    """The share, in [0, 1], of the variance of the seconds' ranks that the values explain.

    Of numbers with many values it is the square of Spearman's correlation; of groups it is the correlation ratio
    between them, less what so many groups explain of any numbers by chance (epsilon squared, Kelley 1935).
    """
    from scipy.stats import rankdata, spearmanr

    if len(set(map(repr, values))) < 2 or len(set(seconds)) < 2:
        return 0.0
    if not grouped(values):
        return float(spearmanr(values, seconds).statistic) ** 2
    ranks = rankdata(seconds)
    groups = [[r for r, value in zip(ranks, values, strict=True) if value == one] for one in distinct(values)]
    mean, n, k = float(ranks.mean()), len(ranks), len(groups)
    within = sum(sum((r - statistics.fmean(group)) ** 2 for r in group) for group in groups)
    whole = float(((ranks - mean) ** 2).sum())
    return max(0.0, 1 - within / whole * (n - 1) / (n - k)) if n > k else 0.0


def dearest(facts: Facts) -> list[tuple[str, float]]:
    """(parameter, share explained) of what makes an epoch dear, the strongest first, of those that matter."""
    trained = _paced(facts)
    if len(trained) < FEWEST:
        return []
    found = []
    for path in sorted({path for trial, _ in trained for path in trial.params}):
        pairs = [(trial.params[path], seconds) for trial, seconds in trained if path in trial.params]
        if len(pairs) >= FEWEST:
            found.append((path, explained([value for value, _ in pairs], [seconds for _, seconds in pairs])))
    found.sort(key=lambda each: -each[1])
    return [each for each in found if each[1] >= MATTERS][:SHOWN]


def _paced(facts: Facts) -> list[tuple[FrozenTrial, float]]:
    """The trials with their seconds per epoch."""
    ended = own((*facts.complete, *facts.pruned))
    return [(trial, each) for trial in ended if (each := pace(facts, trial)) is not None]


def _seconds(start: datetime, end: datetime) -> float:
    return (end - start).total_seconds()


def _of_trials(facts: Facts, what: str, trials: Sequence[FrozenTrial]) -> Cost:
    epochs = sum(map(facts.epochs, trials))
    return Cost(what, len(trials), epochs, len(trials) * facts.steps, sum(map(facts.elapsed_s, trials)))


def _of_references(facts: Facts) -> Cost:
    """The recipes beside the study: what their lines of `metrics.jsonl` say, where these are here."""
    every = [_lines(facts.study.paths.reference(name).metrics) for name in facts.references]
    known = [rows for rows in every if rows]
    return Cost(
        "recipes beside the study",
        len(every),
        sum(map(len, known)) if known else None,
        len(every) * facts.steps,
        sum(float(rows[-1]["elapsed_s"]) for rows in known) if known else None,
    )


def _lines(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def _of_confirmation(facts: Facts) -> list[Cost]:
    one = facts.confirmation
    return [] if one is None else [Cost("confirmation", one.trainings, one.epochs, None, one.elapsed_s)]


def _of_refits(facts: Facts) -> list[Cost]:
    return [_of_refit(f"refit {label}", report) for label, report in facts.refits.items()]


def _of_refit(what: str, report: dict[str, Any]) -> Cost:
    """A submission model: its `epochs` are one number for each network, or one for all."""
    # Members whose weights were averaged are one network, and were several trainings.
    epochs, networks = report.get("epochs"), int(report.get("members") or report.get("networks", 1))
    total = sum(epochs) if isinstance(epochs, list) else None if epochs is None else networks * int(epochs)
    return Cost(what, networks, total, None, report.get("elapsed_s"))


# What is shown -----------------------------------------------------------------------------------------------------


def costs(facts: Facts) -> Section | None:
    """Where the time went, what pruning saved, and what makes an epoch dear; None before any trial has trained."""
    if not own((*facts.complete, *facts.pruned, *facts.failed)):
        return None
    found = spent(facts)
    body = [_bars(found, saved(facts)), _spent_table(found)]
    if (clock := _clock_words(facts, found)) is not None:
        body.append(paragraph(clock))
    body += _taken_over(facts)
    body += _devices(facts)
    matters = dearest(facts)
    if matters:
        words = " and ".join(f"`{path}` ({percent(share)})" for path, share in matters)
        body += [
            heading("What makes an epoch dear"),
            paragraph(f"How much of the order of the times a parameter explains: {words}. Each mark is a trial."),
            side_by_side([_pace_figure(facts, path) for path, _ in matters]),
        ]
    return Section("costs", "Costs", _lead(facts), "\n".join(body))


def _lead(facts: Facts) -> str:
    ended = own((*facts.complete, *facts.pruned, *facts.failed))
    epochs, in_full = sum(map(facts.epochs, ended)), len(ended) * facts.steps
    seconds = sum(map(facts.elapsed_s, ended))
    words = (
        f"The search trained {epochs:,} of the {in_full:,} epochs that its {count(len(ended), 'trial')} have in full "
        f"({percent(epochs / in_full)}), in {duration(seconds)}."
    )
    less = saved(facts)
    if less.epochs:
        words += (
            f" Pruning saved {count(less.epochs, 'epoch')}, about {duration(less.seconds)} at the pace of the trials "
            "that were cut."
        )
    return words


_COLORS = {
    "complete trials": (BLUE, ""),
    "pruned trials": (SKY, "/"),
    "failed trials": (ORANGE, "x"),
    "running trials": (GREY, "."),
    "recipes beside the study": (GREEN, "-"),
    "confirmation": (PINK, "\\"),
}


def _bars(found: Sequence[Cost], less: Saved) -> str:
    """A bar for each kind of training, and an empty one for what pruning saved."""
    known = [(cost.what, cost.seconds) for cost in found if cost.seconds is not None]
    unit, size = _unit(max([seconds for _, seconds in known] + [less.seconds]))
    fig = go.Figure()
    for what, seconds in known:
        color, pattern = _COLORS.get(what, (YELLOW, "+"))
        fig.add_trace(_bar(what, seconds, size, unit, color=color, pattern=pattern))
    if less.epochs:
        fig.add_trace(_bar("saved by pruning", less.seconds, size, unit, color="white", pattern="", edge=INK))
    rows, longest = len(fig.data), max(float(bar.x[0]) for bar in fig.data)
    fig.update_layout(
        showlegend=False,
        xaxis={"title": f"training time ({unit})", "range": [0, 1.2 * longest]},  # room for what is written behind it
        yaxis={"title": "what was trained", "autorange": "reversed"},
        bargap=0.35,
    )
    return figure(fig, alt=f"Training time by kind, and what pruning saved: {rows} bars", height=90 + 38 * rows)


def _bar(
    what: str, seconds: float, size: float, unit: str, *, color: str, pattern: str, edge: str | None = None
) -> go.Bar:
    return go.Bar(
        y=[what],
        x=[seconds / size],
        orientation="h",
        text=[duration(seconds)],
        textposition="outside",
        cliponaxis=False,
        marker={
            "color": color,
            "pattern": {"shape": pattern, "fgcolor": "white", "fillmode": "overlay"},
            "line": {"color": edge or color, "width": 1},
        },
        hovertemplate=f"{what}: %{{x:.3g}} {unit}<extra></extra>",
    )


def _unit(seconds: float) -> tuple[str, float]:
    """The unit that the longest bar is said in, and its seconds."""
    return next((each for each in (("h", 3600.0), ("min", 60.0)) if seconds >= 2 * each[1]), ("s", 1.0))


def _spent_table(found: Sequence[Cost]) -> str:
    rows = [_row(cost) for cost in found]
    if all(cost.epochs is not None and cost.seconds is not None for cost in found):
        total = Cost(
            "all",
            sum(cost.trainings for cost in found),
            sum(cost.epochs or 0 for cost in found),
            None,
            sum(cost.seconds or 0.0 for cost in found),
        )
        rows.append(_row(total))
    return table(("", "trainings", "epochs", "of so many in full", "training time"), rows, right=(1, 2, 3, 4))


def _row(cost: Cost) -> tuple[object, ...]:
    return (
        together(cost.what),
        f"{cost.trainings:,}",
        "not known" if cost.epochs is None else f"{cost.epochs:,}",
        ""
        if cost.in_full is None or cost.epochs is None
        else f"{cost.in_full:,} ({percent(cost.epochs / cost.in_full)})",
        "not known" if cost.seconds is None else duration(cost.seconds),
    )


def _clock_words(facts: Facts, found: Sequence[Cost]) -> str | None:
    clock = wall_clock(facts)
    if clock is None or not clock[1]:
        return None
    whole, busy = clock
    trained = sum(cost.seconds or 0.0 for cost in found if cost.what.endswith(" trials"))
    words = f"By the clock the trials took {duration(busy)}"
    if trained > 1.05 * busy:
        words += f", for {duration(trained)} of training: {trained / busy:.1f} at a time, on average"
    else:
        words += f", {duration(trained)} of it training, the rest pictures, storing and the like"
    if whole > 1.05 * busy:
        words += f"; with the pauses in which none ran, it was {duration(whole)} from the first start to the last end"
    return f"{words}."


def _taken_over(facts: Facts) -> list[str]:
    taken = [trial for trial in facts.trials if TAKEN_FROM in trial.user_attrs]
    if not taken:
        return []
    return [paragraph(f"{count(len(taken), 'trial')} taken over from another study cost nothing here.", kind="note")]


def _devices(facts: Facts) -> list[str]:
    """How fast the devices were."""
    found: dict[str, list[FrozenTrial]] = {}
    for trial in own((*facts.complete, *facts.pruned)):
        if "images_per_s" in trial.user_attrs:
            found.setdefault(str(trial.user_attrs.get("device", "not known")), []).append(trial)
    if not found:
        return []
    rows = []
    for device, trials in found.items():
        speeds = [float(trial.user_attrs["images_per_s"]) for trial in trials]
        paces = [each for trial in trials if (each := pace(facts, trial)) is not None]
        rows.append(
            (
                device,
                len(trials),
                f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})",
                "–" if not paces else f"{_s(statistics.median(paces))} ({_s(min(paces))} to {_s(max(paces))})",
            )
        )
    return [
        heading("How fast it went"),
        table(("device", "trials", "images/s, median (range)", "s per epoch, median (range)"), rows, right=(1, 2, 3)),
    ]


def _s(seconds: float) -> str:
    return f"{seconds:.3g}"


def _pace_figure(facts: Facts, path: str) -> str:
    """Seconds per epoch of every trial by a parameter, and the median of each value where these are few."""
    shown = [(trial, seconds) for trial, seconds in _paced(facts) if path in trial.params]
    seconds = [each for _, each in shown]
    fig = go.Figure()
    columns = set_axis(fig, path, [trial.params[path] for trial, _ in shown], shown[0][0].distributions[path])
    fig.add_trace(
        go.Scatter(
            x=[place(trial, trial.params[path], columns) for trial, _ in shown],
            y=seconds,
            mode="markers",
            name="a trial",
            marker={"color": BLUE, "symbol": "circle-open", "size": 7, "line": {"width": 1.4}},
            text=[f"{name_of(trial)}, {path} = {short(trial.params[path])}" for trial, _ in shown],
            hovertemplate="%{text}<br>%{y:.3g} s per epoch<extra></extra>",
        )
    )
    if columns:
        fig.add_trace(
            go.Scatter(
                x=list(range(len(columns))),
                y=[statistics.median(s for trial, s in shown if trial.params[path] == each) for each in columns],
                mode="markers",
                name="median",
                marker={"color": ORANGE, "symbol": "line-ew-open", "size": 26, "line": {"width": 3}},
                hovertemplate="median %{y:.3g} s per epoch<extra></extra>",
            )
        )
    apart = min(seconds) > 0 and max(seconds) > LOG_FROM * min(seconds)
    fig.update_yaxes(
        title="time per epoch (s)", **(log_axis(min(seconds), max(seconds)) if apart else {"rangemode": "tozero"})
    )
    return figure(fig, alt=f"Seconds per epoch of {count(len(shown), 'trial')} by {path}", height=320)
