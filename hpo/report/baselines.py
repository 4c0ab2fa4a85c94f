"""The section on baselines: the best trial against the baseline and the recipes, in the search and confirmed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import plotly.graph_objects as go
from markupsafe import Markup

from hpo.analysis.baselines import Entry, key_of, ranked_entries
from hpo.analysis.study_data import StudyData, value_of
from hpo.dashboard.pictures import BLUE, GREY, ORANGE
from hpo.report.charts import Look, error_bars, marks
from hpo.report.page import Section, figure, paragraph, section, table
from hpo.report.words import entry_name, interval_text, metric_label, outdated
from hpo.text import joined, score, sentence, together


def baselines(data: StudyData) -> Section | None:
    """The section; None if there is no complete trial, or nothing to compare it with."""
    entries = ranked_entries(data)
    if data.best is None or len(entries) < 2:
        return None
    notes = []
    if data.confirmation is None:
        note = (
            "All of these are scores on one split, by which the best trial was chosen: they flatter it. "
            f"`hpo confirm {data.study.name}` trains the best and the baseline again on other seeds and splits."
        )
        notes.append(paragraph(note, kind="note"))
    elif not data.confirmed:
        notes.append(paragraph(outdated(data.study, data.confirmation, data.finished), kind="warning"))
    return section("baselines", "Baselines", _lead(data, entries), _plot(data, entries), _table(data, entries), notes)


def _lead(data: StudyData, entries: Sequence[Entry]) -> str:
    label, made, best = metric_label(data.metric), data.confirmation, data.best
    if made is not None:
        if not made.evidence:
            return f"On other seeds and splits: {made.verdict}."
        winner = next(entry_name(entry) for entry in entries if entry.key == made.winner)
        return f"On other seeds and splits, {winner} has {label} {made.verdict}."
    assert best is not None, "there is something to compare"
    value = value_of(best)
    name = "the baseline" if best is data.baseline else key_of(best)
    head = f"The best of the search, {name}, has {label} {score(value)}"
    gains = {
        entry_name(entry): data.gain(value, entry.value)
        for entry in entries
        if entry.key != key_of(best) and entry.value is not None
    }
    if not gains:
        return f"{head}; nothing else has a value."
    words = [
        f"{score(gain)} better than {name}" if gain > 0 else f"no better than {name}" for name, gain in gains.items()
    ]
    return f"{head}: {joined(words)}. Nothing is confirmed on other splits yet."


def _table(data: StudyData, entries: Sequence[Entry]) -> Markup:
    baseline = next((entry for entry in entries if entry.is_baseline), None)

    def gain(entry: Entry, score: Callable[[Entry], float | None]) -> str:
        value, over = score(entry), None if baseline in (None, entry) else score(baseline)
        return "–" if value is None or over is None else f"{data.gain(value, over):+.4f}"

    rows = []
    for entry in entries:
        row = [
            _name(data, entry),
            score(entry.value),
            gain(entry, lambda entry: entry.value),
        ]
        interval = None if entry.contender is None else entry.contender.interval
        if data.confirmation is not None and interval is None:
            row += ["–", "–", "–"]
        elif interval is not None:
            alone = " (no interval)" if entry.half_width is None else ""
            row += [f"{interval_text(interval)}{alone}", str(interval.n), gain(entry, lambda entry: entry.mean)]
        rows.append([*row, _note(entry)])
    columns = ["", f"{metric_label(data.metric)} in the search", "better than the baseline by"]
    if data.confirmation is not None:
        columns += ["confirmed (95 % interval)", "n", "better than the baseline by"]
    return table([*columns, ""], rows, right=range(1, len(columns)))


def _name(data: StudyData, entry: Entry) -> str:
    star = ""
    if data.confirmation is not None and entry.key == data.confirmation.winner:
        star = " ★ the winner"
    elif data.best is not None and entry.key == key_of(data.best):
        star = " ★ best of the search"
    return together(entry_name(entry) + star)


def _note(entry: Entry) -> str:
    if entry.failure:
        return f"could not be trained: {entry.failure}"
    if entry.contender is not None and entry.contender.stopped:
        return entry.contender.stopped
    return "" if entry.state == "complete" else f"is {entry.state}"


def _plot(data: StudyData, entries: Sequence[Entry]) -> Markup:
    """A row per entry, the best on top: a circle for its value in the search, a square for the confirmed one."""
    shown = [entry for entry in reversed(entries) if entry.value is not None or entry.mean is not None]
    rows = {entry.key: place for place, entry in enumerate(shown)}
    names = list(map(entry_name, shown))
    fig = go.Figure()
    searched = [(entry, entry.value) for entry in shown if entry.value is not None]
    confirmed = [(entry, entry.mean) for entry in shown if entry.mean is not None]
    bars = error_bars([entry.half_width for entry, _ in confirmed], color=ORANGE)
    for series, name, look, below, error_x in (
        (searched, "in the search, one split", Look(BLUE, "circle-open", 11, 2), 0.0, None),
        (confirmed, "confirmed, with its 95 % interval", Look(ORANGE, "square", 10), 0.22, bars),
    ):
        if series:
            y, text = [rows[entry.key] - below for entry, _ in series], [entry_name(entry) for entry, _ in series]
            hover = f"%{{text}}: %{{x:.4f}} {name.partition(',')[0]}"
            fig.add_trace(marks([x for _, x in series], y, hover, look, error_x=error_x, text=text, name=name))
    for entry in shown:
        if entry.is_baseline:
            where = entry.value if entry.mean is None else entry.mean
            fig.add_vline(x=where, line={"color": GREY, "dash": "dash", "width": 1})
    label = metric_label(data.metric)
    axis = {"tickvals": list(rows.values()), "ticktext": names, "range": [-0.6, len(shown) - 0.4]}
    fig.update_layout(
        showlegend=True,
        xaxis_title=f"{label} on validation images",
        yaxis={"title": "configuration", "showgrid": True, **axis},
    )
    alt = f"{sentence(joined(names))}: validation {label}, the best on top; the dashed line is the baseline"
    return figure(fig, alt=alt, height=120 + 36 * len(shown))
