"""What the search had to beat: the base and the recipes, beside the best that it found.

A search's own scores favour its best trial, which was chosen for its score on one split. So where a study was
confirmed, the scores on other seeds and splits stand beside them, with their intervals, and these are what counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState

from hpo.analysis.facts import Facts, interval_words, value_of
from hpo.confirmation.result import Confirmation, Contender
from hpo.dashboard.pictures import BLUE, GREY, ORANGE
from hpo.report.page import Section, figure, paragraph, table
from hpo.text import score, together
from hpo.trials import FAILURE, RECIPE, is_baseline


@dataclass(frozen=True)
class Rival:
    """A configuration, with what the search and the confirmation saw of it."""

    key: str
    """`base`, `trial 12` or `recipe NAME`, as a confirmation has it."""
    search: float | None
    """Its value in the search; None where it has none, and then `note` says why."""
    contender: Contender | None = None
    """Of a confirmation."""
    note: str = ""

    @property
    def name(self) -> str:
        return "the base" if self.key == "base" else self.key

    @property
    def mean(self) -> float | None:
        """The confirmed score."""
        one = self.contender
        return None if one is None or one.interval is None else one.interval.mean


def rivals(facts: Facts) -> Section | None:
    """The search's best against the base and the recipes; None where there is no trial to compare, or nothing else."""
    found = compared(facts)
    if facts.best is None or len(found) < 2:
        return None
    body = [_plot(facts, found), _table(facts, found)]
    if facts.confirmation is None:
        body.append(
            paragraph(
                "All of these are scores on one split, which the best trial was chosen by: they flatter it. "
                f"`hpo confirm {facts.study.name}` trains the best and the base again on other seeds and splits.",
                kind="note",
            )
        )
    elif not facts.confirmed:
        body.append(
            paragraph(
                f"The confirmation was made when the search had {facts.confirmation.search_trials} finished trials; "
                f"now it has {facts.finished}. `hpo confirm {facts.study.name}` makes it anew.",
                kind="warning",
            )
        )
    return Section("rivals", "Rivals", _lead(facts, found), "\n".join(body))


# What is computed --------------------------------------------------------------------------------------------------


def compared(facts: Facts) -> list[Rival]:
    """The best trial, the base, the recipes and whatever was confirmed, each once, the best first.

    The confirmed come first, in the order that the confirmation gives them.
    """
    found: dict[str, Rival] = {}
    for trial in facts.trials:
        if trial is facts.best or is_baseline(trial) or RECIPE in trial.user_attrs:
            found[key_of(trial)] = Rival(key_of(trial), *_value_and_note(trial))
    for name, result in facts.references.items():
        failed = f"could not be trained: {result['failure']}" if "failure" in result else ""
        found[f"recipe {name}"] = Rival(f"recipe {name}", result.get("value"), None, failed)
    searched = sorted(found.values(), key=lambda rival: _badness(facts, rival.search))
    if facts.confirmation is None:
        return searched
    confirmed = []
    for one in facts.confirmation.contenders:
        before = found.get(one.key, Rival(one.key, one.search_value))
        failure = f"could not be trained: {one.failure}" if one.failure else ""
        confirmed.append(replace(before, contender=one, note=failure or one.stopped or before.note))
    known = {rival.key for rival in confirmed}
    return [*confirmed, *(rival for rival in searched if rival.key not in known)]


def key_of(trial: FrozenTrial) -> str:
    """What a confirmation calls a trial of the search."""
    if is_baseline(trial):
        return "base"
    return f"recipe {trial.user_attrs[RECIPE]}" if RECIPE in trial.user_attrs else f"trial {trial.number}"


def _value_and_note(trial: FrozenTrial) -> tuple[float | None, None, str]:
    if trial.state == TrialState.COMPLETE:
        return value_of(trial), None, ""
    if FAILURE in trial.user_attrs:
        return None, None, f"could not be trained: {trial.user_attrs[FAILURE]}"
    return None, None, f"is {trial.state.name.lower()}"


def _badness(facts: Facts, value: float | None) -> float:
    if value is None:
        return math.inf
    return -value if facts.maximize else value


# What is shown -----------------------------------------------------------------------------------------------------


def _lead(facts: Facts, found: Sequence[Rival]) -> str:
    if facts.confirmation is not None:
        return _confirmed_words(facts, facts.confirmation)
    best = facts.best
    assert best is not None, "there is something to compare"
    own = key_of(best)
    others = [rival for rival in found if rival.key != own and rival.search is not None]
    if not others:
        return f"The best trial, {best.number}, has {facts.metric_words} {score(best.value)}; nothing else has a value."
    gaps = [f"{_gap(facts, value_of(best), rival)} {rival.name}" for rival in others]
    beaten = ", ".join(gaps[:-1]) + (" and " if gaps[:-1] else "") + gaps[-1]
    what = "the base" if own == "base" else own
    name = f"The best of the search, {what}"
    return f"{name}, has {facts.metric_words} {score(best.value)}: {beaten}. Nothing is confirmed on other splits yet."


def _confirmed_words(facts: Facts, confirmation: Confirmation) -> str:
    if not confirmation.evidence:
        return f"On other seeds and splits: {confirmation.verdict}."
    winner = "the base" if confirmation.winner == "base" else confirmation.winner
    return f"On other seeds and splits, {winner} has {facts.metric_words} {confirmation.verdict}."


def _gap(facts: Facts, best: float, rival: Rival) -> str:
    assert rival.search is not None, "only what has a value is compared"
    gain = facts.gain(best, rival.search)
    return f"{score(gain)} better than" if gain > 0 else "no better than"


def _table(facts: Facts, found: Sequence[Rival]) -> str:
    base = next((rival for rival in found if rival.key == "base"), None)
    confirmed = facts.confirmation is not None
    rows = [
        (*_row(facts, rival, base), *(_confirmed_cells(facts, rival, base) if confirmed else ()), rival.note)
        for rival in found
    ]
    columns = ["", f"{facts.metric_words} in the search", "better than the base by"]
    if confirmed:
        columns += ["confirmed (95 % interval)", "n", "better than the base by"]
    return table([*columns, ""], rows, right=range(1, len(columns)))


def _row(facts: Facts, rival: Rival, base: Rival | None) -> tuple[str, str, str]:
    name = rival.name
    if facts.confirmation is not None and rival.key == facts.confirmation.winner:
        name += " ★ the winner"
    elif facts.best is not None and rival.key == key_of(facts.best):
        name += " ★ best of the search"
    return (
        together(name),
        score(rival.search),
        _over(facts, rival.search, None if base is None or base is rival else base.search),
    )


def _confirmed_cells(facts: Facts, rival: Rival, base: Rival | None) -> tuple[str, str, str]:
    one = rival.contender
    if one is None or one.interval is None:
        return "–", "–", "–"
    alone = "" if math.isfinite(one.interval.half_width) else " (no interval)"
    gain = _over(facts, one.interval.mean, None if base is None or base is rival else base.mean)
    return f"{interval_words(one.interval)}{alone}", str(one.interval.n), gain


def _over(facts: Facts, value: float | None, other: float | None) -> str:
    return "–" if value is None or other is None else f"{facts.gain(value, other):+.4f}"


def _plot(facts: Facts, found: Sequence[Rival]) -> str:
    """A row each, the best above: an open circle is the search's score, a square with its interval the confirmed."""
    shown = [rival for rival in reversed(found) if rival.search is not None or rival.mean is not None]
    rows = {rival.key: place for place, rival in enumerate(shown)}
    fig = go.Figure()
    searched = [rival for rival in shown if rival.search is not None]
    fig.add_trace(
        go.Scatter(
            x=[rival.search for rival in searched],
            y=[rows[rival.key] for rival in searched],
            mode="markers",
            name="in the search, one split",
            marker={"symbol": "circle-open", "size": 11, "color": BLUE, "line": {"width": 2}},
            text=[rival.name for rival in searched],
            hovertemplate="%{text}: %{x:.4f} in the search<extra></extra>",
        )
    )
    confirmed = [rival for rival in shown if rival.mean is not None]
    if confirmed:
        fig.add_trace(_confirmed_marks(confirmed, rows))
    base = next((rival for rival in shown if rival.key == "base"), None)
    if base is not None:
        fig.add_vline(
            x=base.search if base.mean is None else base.mean, line={"color": GREY, "dash": "dash", "width": 1}
        )
    names = [rival.name for rival in shown]
    fig.update_layout(
        showlegend=True,
        xaxis_title=f"{facts.metric_words} on validation images",
        yaxis={
            "title": "configuration",
            "tickvals": list(rows.values()),
            "ticktext": names,
            "range": [-0.6, len(shown) - 0.4],
            "showgrid": True,
        },
    )
    alt = f"{', '.join(names)}: validation {facts.metric_words}, the best above; the dashed line is the base"
    return figure(fig, alt=alt, height=120 + 36 * len(shown))


def _confirmed_marks(confirmed: Sequence[Rival], rows: dict[str, int]) -> go.Scatter:
    halves = [_half_width(rival) for rival in confirmed]
    marker: dict[str, Any] = {"symbol": "square", "size": 10, "color": ORANGE}
    return go.Scatter(
        x=[rival.mean for rival in confirmed],
        y=[rows[rival.key] - 0.22 for rival in confirmed],
        mode="markers",
        name="confirmed, with its 95 % interval",
        marker=marker,
        error_x={"type": "data", "array": halves, "color": ORANGE, "thickness": 2, "width": 6},
        text=[rival.name for rival in confirmed],
        hovertemplate="%{text}: %{x:.4f} confirmed<extra></extra>",
    )


def _half_width(rival: Rival) -> float | None:
    """Of the confirmed score; None where one replicate gives no interval."""
    one = rival.contender
    if one is None or one.interval is None or not math.isfinite(one.interval.half_width):
        return None
    return one.interval.half_width
