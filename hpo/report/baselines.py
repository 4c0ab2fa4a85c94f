"""The section on baselines: the best trial against the baseline and the recipes, in the search and confirmed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup

from hpo.analysis.baselines import Entry, entries_of, key_of, ranked_entries
from hpo.analysis.study_data import StudyData
from hpo.analysis.summary import StudySummary
from hpo.confirmation.words import plus_minus
from hpo.confirmation.words import score as interval_score
from hpo.dashboard.pictures import BLUE, GREY, INK, ORANGE
from hpo.report.charts import Look, error_bars, marks, named_rows
from hpo.report.page import Section, figure, folded, listing, note, paragraph, section, table
from hpo.report.words import command, entry_name, margins, metric_label, outdated
from hpo.text import cut, joined, score, sentence, together

_MOST_NOTES = 4  # candidates left out that are not folded


def baselines(data: StudyData) -> Section | None:
    """The section; None if there is no complete trial, or nothing to compare it with."""
    entries, made, best = ranked_entries(data), data.confirmation, data.best
    if best is None or (len(entries) < 2 and made is None):
        return None
    notes = []
    if made is None:
        words = (
            "All of these are scores on one split, by which the best trial was chosen: they flatter it. "
            f"`{command(data.study, 'confirm')}` trains the best and the baseline again on other seeds and splits."
        )
        notes.append(note(words))
    else:
        left_out = [f"Left out: {words}." for words in made.left_out]
        notes += [] if data.confirmed else [paragraph(outdated(data.study, made, data.finished), kind="warning")]
        notes += map(note, left_out[:_MOST_NOTES])
        notes += [folded("More notes", listing(left_out[_MOST_NOTES:]))] if left_out[_MOST_NOTES:] else []
    plot = figure(entries_figure(data, entries), alt=_alt(data, entries), height=150 + 36 * len(entries))
    rivals = tuple(entries_of((*data.complete, *data.pruned, *data.failed), data.recipe_runs))
    summary = StudySummary(data.study.counts(), best, rivals)
    first, *lines = margins(summary, data.metric, data.study.direction)
    if made is not None:
        lead, lines = f"On other seeds and splits: {made.verdict}.", []
    else:
        lead = f"{sentence(first)}; not confirmed on other seeds and splits."
    body = [listing(list(map(str.strip, lines))) if lines else "", plot, _table(data, entries)]
    return section("baselines", "Baselines", lead, body, notes)


def _table(data: StudyData, entries: Sequence[Entry]) -> Markup:
    baseline = next((entry for entry in entries if entry.is_baseline), None)
    searched, confirmed = (None, None) if baseline is None else (baseline.value, baseline.mean)

    def gain(entry: Entry, value: float | None, over: float | None) -> str:
        return "–" if entry is baseline or value is None or over is None else f"{data.gain(value, over):+.4f}"

    columns = ["", f"{metric_label(data.metric)} in the search", "better than the baseline by"]
    if data.confirmation is not None:
        columns += ["confirmed (95 % interval)", "n", "better than the baseline by"]
    rows = []
    for entry in entries:
        row = [_name(data, entry), score(entry.value), gain(entry, entry.value, searched)]
        if (interval := entry.interval) is not None:
            alone = "" if math.isfinite(interval.half_width) else " (no interval)"
            row += [f"{plus_minus(interval)}{alone}", str(interval.n), gain(entry, interval.mean, confirmed)]
        rows.append([*row, *["–"] * (len(columns) - len(row)), _remark(entry)])
    return table([*columns, ""], rows, right=range(1, len(columns)))


def _name(data: StudyData, entry: Entry) -> str:
    star = ""
    if data.confirmation is not None and entry.key == data.confirmation.winner:
        star = " ★ the winner"
    elif data.best is not None and entry.key == key_of(data.best):
        star = " ★ best of the search"
    return together(entry_name(entry) + star)


def _remark(entry: Entry) -> str:
    if entry.failure:
        return f"could not be trained: {entry.failure}"
    if entry.contender is not None and entry.contender.stopped:
        return entry.contender.stopped
    return "" if entry.state == "complete" else f"is {entry.state}"


def entries_figure(data: StudyData, entries: Sequence[Entry]) -> go.Figure:
    """A row per entry, the best on top: its value in the search; below, its trainings in the confirmation."""
    shown = [entry for entry in reversed(entries) if entry.value is not None or entry.mean is not None]
    names = [cut(entry_name(entry), 22) for entry in shown]
    fig = go.Figure()

    def add(points: Sequence[tuple[float, str, float]], look: Look, name: str, **more: Any) -> None:
        if points:
            rows, text, values = zip(*points, strict=True)
            fig.add_trace(marks(values, rows, "%{text}", look, text=text, name=name, **more))

    searched = [
        (row, f"{entry_name(entry)}: {score(entry.value)} in the search", entry.value)
        for row, entry in enumerate(shown)
        if entry.value is not None
    ]
    add(searched, Look(BLUE, "circle-open", 11, 2), "in the search, one split")
    made = [(row - 0.22, entry.contender) for row, entry in enumerate(shown) if entry.contender is not None]
    confirmed = [(row, one, one.interval) for row, one in made if one.interval is not None]
    points = [
        (row, f"{one.name}: {interval_score(found)}<br>{', '.join(one.chosen_for)}", found.mean)
        for row, one, found in confirmed
    ]
    bars = error_bars([found.half_width for _, _, found in confirmed], color=ORANGE)
    add(points, Look(ORANGE, "square", 10), "confirmed, with its 95 % interval", error_x=bars)
    trainings = [
        (row, f"{one.name}, replicate {replicate}: {score(value)}", value)
        for row, one in made
        for replicate, values in one.scores.items()
        for value in values
    ]
    add(trainings, Look(INK, "line-ns-open", 10, 1.5), "each of its trainings")
    for entry in shown:
        if entry.is_baseline:
            where = entry.value if entry.mean is None else entry.mean
            fig.add_vline(x=where, line={"color": GREY, "dash": "dash", "width": 1})
    fig.update_layout(
        showlegend=True,
        xaxis_title=f"{metric_label(data.metric)} on validation images",
        yaxis={"title": "configuration", "showgrid": True, **named_rows(names)},
    )
    return fig


def _alt(data: StudyData, entries: Sequence[Entry]) -> str:
    names = joined(list(map(entry_name, entries)))
    what = f"validation {metric_label(data.metric)}, the best on top; the dashed line is the baseline"
    return f"{sentence(names)}: {what}"
