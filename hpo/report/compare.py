"""Studies side by side: which found the better configuration, how soon, and at what cost.

Scores can only be compared where they mean the same: the same metric, on the same images, divided alike. Where they do
not, the page says so first, and what has no common axis is drawn on axes of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, cycle
from typing import Any

import plotly.graph_objects as go
from optuna.trial import FrozenTrial

from hpo.analysis.facts import Facts, name_of, value_of
from hpo.report.answer import confirmed_words, test_words, verdict
from hpo.report.costs import own, saved
from hpo.report.page import COLORS, DASHES, SYMBOLS, Section, figure, heading, listing, paragraph, side_by_side, table
from hpo.space import diff
from hpo.text import difference, duration, gap, number, score

_APART = ("data.", "objective.")
"""How the parts of a space's identity begin that make two scores something else."""


def title_of(studies: Sequence[Facts]) -> str:
    """The page's title."""
    return " and ".join(each.study.name for each in studies)


def comparison(studies: Sequence[Facts]) -> list[Section]:
    """The sections of the page; the first study is the one that the others are held against."""
    made = (_answers(studies), _progress(studies), _confirmed(studies), _ranges(studies), _differences(studies))
    return [section for section in made if section is not None]


# Side by side -------------------------------------------------------------------------------------------------------


def _answers(studies: Sequence[Facts]) -> Section:
    rows: list[tuple[str, Callable[[Facts], object]]] = [
        ("objective", lambda facts: f"{facts.metric}, to {facts.study.direction}"),
        ("the search's best", _best_words),
        ("over its base", _over_base),
        ("confirmed", confirmed_words),
        ("on the test images", test_words),
        ("trials finished", lambda facts: facts.finished),
        ("complete / pruned / failed", _states),
        ("epochs trained", lambda facts: f"{_epochs(facts):,}"),
        ("epochs saved by pruning", lambda facts: f"{saved(facts).epochs:,}"),
        ("training time", lambda facts: duration(sum(map(facts.elapsed_s, own(facts.trials))))),
        ("device", lambda facts: ", ".join(facts.devices)),
    ]
    body = [paragraph(words, kind="warning") for words in warnings_of(studies)]
    body.append(
        table(["", *(each.study.name for each in studies)], [(name, *map(tell, studies)) for name, tell in rows])
    )
    body.append(listing([f"{each.study.name}: {verdict(each)}" for each in studies]))
    return Section("answer", "Side by side", _headline(studies), "\n".join(body), short="Answer")


def _headline(studies: Sequence[Facts]) -> str:
    """Who leads, as far as that can be said."""
    if warnings_of(studies):
        return "These studies' scores cannot be compared directly."
    by_confirmation = all(_confirmed_mean(each) is not None for each in studies)
    score_of = _confirmed_mean if by_confirmation else _best_value
    scored = [(found, each) for each in studies if (found := score_of(each)) is not None]
    if len(scored) < len(studies):
        return "Not every study has a complete trial yet."
    scored.sort(key=lambda pair: studies[0].gain(pair[0], 0.0), reverse=True)
    (first, leader), (second, _) = scored[:2]
    what = "confirmed winner" if by_confirmation else "search's best"
    gain = studies[0].gain(first, second)
    if gain == 0:
        return f"The {what}s score the same: {score(first)}."
    size = gap(leader.metric, gain)
    ahead = f"The {what} of {leader.study.name} is ahead by {size}: {score(first)}."
    return ahead if by_confirmation else f"Not confirmed: {ahead[:1].lower()}{ahead[1:]}"


def warnings_of(studies: Sequence[Facts]) -> list[str]:
    """What makes two scores something else, a sentence each."""
    first, found = studies[0], []
    for other in studies[1:]:
        names = f"{first.study.name} and {other.study.name}"
        if other.metric != first.metric:
            found.append(f"{names} have other objectives: {first.metric} and {other.metric}.")
        ours, theirs = first.study.metadata["data"], other.study.metadata["data"]
        if ours["fingerprint"] != theirs["fingerprint"]:
            named = f"{ours['name']} ({ours['fingerprint'][:12]}) and {theirs['name']} ({theirs['fingerprint'][:12]})"
            found.append(f"{names} were run on other images: {named}.")
        elif split := [line for line in _identity_diff(first, other) if line.startswith("data.")]:
            found.append(f"{names} divide or read the images otherwise: {'; '.join(split)}.")
    return found


def _best_words(facts: Facts) -> str:
    return "no complete trial" if facts.best is None else f"{score(facts.best.value)}, {name_of(facts.best)}"


def _best_value(facts: Facts) -> float | None:
    return None if facts.best is None else facts.best.value


def _confirmed_mean(facts: Facts) -> float | None:
    if facts.confirmation is None:
        return None
    interval = facts.confirmation.contender(facts.confirmation.winner).interval
    return None if interval is None else interval.mean


def _over_base(facts: Facts) -> str:
    if facts.best is None or facts.baseline is None or facts.baseline not in facts.complete:
        return "the base is not trained"
    if facts.best is facts.baseline:
        return "nothing: the base is best"
    return difference(facts.metric, facts.gain(value_of(facts.best), value_of(facts.baseline)))


def _states(facts: Facts) -> str:
    return f"{len(facts.complete)} / {len(facts.pruned)} / {len(facts.failed)}"


def _epochs(facts: Facts) -> int:
    return sum(map(facts.epochs, own(facts.trials)))


# Progress -----------------------------------------------------------------------------------------------------------


def _progress(studies: Sequence[Facts]) -> Section | None:
    """The best so far of each study, by trials, by epochs and by time."""
    shown = [each for each in studies if each.complete]
    if not shown:
        return None
    metrics = list(dict.fromkeys(each.metric for each in shown))
    body = []
    for metric in metrics:
        alike = [each for each in shown if each.metric == metric]
        body += [heading(alike[0].metric_words)] if len(metrics) > 1 else []
        body.append(
            side_by_side(
                [
                    figure(progress_figure(alike, along), alt=f"Best {metric} so far, by {along}", height=340)
                    for along in ("trials", "epochs", "time")
                ]
            )
        )
    lead = "The best complete trial so far, after so many trials, so many epochs, and so much training time."
    return Section("progress", "Progress", lead, "\n".join(body))


_COSTS: Mapping[str, Callable[[Facts], Callable[[FrozenTrial], float]]] = {
    "trials": lambda _: lambda _: 1.0,
    "epochs": lambda facts: lambda trial: float(facts.epochs(trial)),
    "time": lambda facts: facts.elapsed_s,
}
"""What is counted -> what one trial adds to it."""


def progress_figure(studies: Sequence[Facts], along: str) -> go.Figure:
    """A line a study: the best value so far, with a mark at each trial that was complete.

    Args:
        along: `trials`, `epochs` or `time`: what is counted up to each trial, in the order in which they began.
    """
    fig = go.Figure()
    size, unit = _unit_of_time(studies) if along == "time" else (1.0, "")
    looks = zip(cycle(COLORS), cycle(DASHES), cycle(SYMBOLS), strict=False)
    for facts, (color, dash, symbol) in zip(studies, looks, strict=False):
        spent, best, numbers = progress(facts, along)
        spent, best, numbers = _to_the_end(facts, along, spent, best, numbers)
        fig.add_trace(
            go.Scatter(
                x=[each / size for each in spent],
                y=best,
                text=numbers,
                name=facts.study.name,
                mode="lines+markers",
                line={"shape": "hv", "dash": dash, "color": color, "width": 2},
                marker={"symbol": symbol, "size": 7},
                hovertemplate=f"{facts.study.name}, trial %{{text}}<br>best so far %{{y:.4f}}<extra></extra>",
            )
        )
    words = {"trials": "trials", "epochs": "epochs trained", "time": f"training time ({unit})"}
    fig.update_xaxes(title_text=words[along], rangemode="tozero")
    fig.update_yaxes(title_text=f"validation {studies[0].metric_words}")
    return fig


def progress(facts: Facts, along: str) -> tuple[list[float], list[float], list[int]]:
    """(what was spent, the best so far, the trial's number) at each complete trial, in the order of their numbers."""
    begun = sorted((t for t in facts.trials if t not in facts.waiting), key=lambda trial: trial.number)
    spent = list(accumulate(map(_COSTS[along](facts), begun)))
    ended = [(so_far, trial) for so_far, trial in zip(spent, begun, strict=True) if trial in facts.complete]
    best = list(accumulate((value_of(trial) for _, trial in ended), max if facts.maximize else min))
    return [so_far for so_far, _ in ended], best, [trial.number for _, trial in ended]


def _to_the_end(
    facts: Facts, along: str, spent: list[float], best: list[float], numbers: list[int]
) -> tuple[list[float], list[float], list[int]]:
    """The same with a point where the study ended, or has come to, so that its line shows all that was spent."""
    begun = sorted((t for t in facts.trials if t not in facts.waiting), key=lambda trial: trial.number)
    end = sum(map(_COSTS[along](facts), begun))
    return (
        ([*spent, end], [*best, best[-1]], [*numbers, begun[-1].number]) if end > spent[-1] else (spent, best, numbers)
    )


def _unit_of_time(studies: Sequence[Facts]) -> tuple[float, str]:
    """(seconds, name) of the unit in which the longest study has a number of few digits."""
    longest = max(sum(map(each.elapsed_s, each.trials)) for each in studies)
    return (1.0, "s") if longest < 300 else (60.0, "min") if longest < 3 * 3600 else (3600.0, "h")


# Confirmed ----------------------------------------------------------------------------------------------------------


def _confirmed(studies: Sequence[Facts]) -> Section | None:
    """The confirmed winner and base of each study, with their intervals."""
    shown = [each for each in studies if each.confirmation is not None and _confirmed_mean(each) is not None]
    if not shown:
        return None
    missing = [each.study.name for each in studies if each not in shown]
    metrics = list(dict.fromkeys(each.metric for each in shown))
    body = "".join(
        figure(
            confirmed_figure([each for each in shown if each.metric == metric]),
            alt=f"Confirmed {metric} of each study's winner and base, with 95 % intervals",
            height=90 + 80 * sum(each.metric == metric for each in shown),
        )
        for metric in metrics
    )
    if missing:
        body += paragraph(f"Not confirmed, and so not here: {', '.join(missing)}.", kind="note")
    lead = "Each study's winner and base on other seeds and splits, with 95 % intervals; squares are bases."
    return Section("confirmed", "Confirmed", lead, body)


def confirmed_figure(studies: Sequence[Facts]) -> go.Figure:
    """A row for each study's winner, and one for its base."""
    fig = go.Figure()
    for place, facts in enumerate(studies):
        made = facts.confirmation
        assert made is not None, "only confirmed studies are drawn"
        for key in dict.fromkeys((made.winner, "base")):
            contender = next((each for each in made.contenders if each.key == key), None)
            if contender is None or contender.interval is None:
                continue
            half = contender.interval.half_width
            fig.add_trace(
                go.Scatter(
                    x=[contender.interval.mean],
                    y=[f"{facts.study.name}:<br>{'the base' if key == 'base' else key}"],
                    mode="markers",
                    marker={
                        "symbol": "square" if key == "base" else "circle",
                        "size": 11,
                        "color": COLORS[place % len(COLORS)],
                    },
                    error_x={"type": "data", "array": [half if math.isfinite(half) else 0], "thickness": 2, "width": 5},
                    hovertemplate=f"%{{y}}<br>%{{x:.4f}}, n = {contender.interval.n}<extra></extra>",
                )
            )
    fig.update_xaxes(title_text=f"validation {studies[0].metric_words}, confirmed", nticks=5)
    fig.update_yaxes(autorange="reversed", type="category")
    fig.update_layout(showlegend=False)
    return fig


# What differs -------------------------------------------------------------------------------------------------------


def _ranges(studies: Sequence[Facts]) -> Section | None:
    """Each study's range of each parameter, and the best trial's value in it."""
    paths = list(dict.fromkeys(path for each in studies for path in _searched(each)))
    if not paths:
        return None
    columns = ["parameter"]
    for each in studies:
        columns += [f"{each.study.name}: range", "best"]
    rows = []
    for path in paths:
        row: list[object] = [path]
        for each in studies:
            row += [_range_words(_searched(each).get(path)), _best_of(each, path)]
        rows.append(row)
    lead = "What each study searched, and the value of its best trial; a dash: the parameter is not searched."
    right = range(2, len(columns), 2)
    return Section("ranges", "Parameter ranges", lead, table(columns, rows, right=right), short="Ranges")


def _searched(facts: Facts) -> dict[str, Mapping[str, Any]]:
    """Parameter -> its range, as the space's identity has it."""
    identity = facts.study.metadata["identity"]
    return {key.removeprefix("search."): value for key, value in identity.items() if key.startswith("search.")}


def _range_words(described: Mapping[str, Any] | None) -> str:
    if described is None:
        return "–"
    if "choices" in described:
        words = ", ".join(map(str, described["choices"]))
    else:
        words = f"{number(described['low'])} to {number(described['high'])}"
        words += ", log" if described.get("log") else ""
        words += f", step {number(described['step'])}" if described.get("step") is not None else ""
    when = "; ".join(f"{path}: {', '.join(map(str, values))}" for path, values in described.get("when", {}).items())
    return f"{words} (when {when})" if when else words


def _best_of(facts: Facts, path: str) -> str:
    if facts.best is None or path not in facts.best.params:
        return "–"
    value = facts.best.params[path]
    return number(value) if isinstance(value, float) else str(value)


def _differences(studies: Sequence[Facts]) -> Section:
    """What else differs between the first study and each other one."""
    first, body = studies[0], []
    for other in studies[1:]:
        lines = [f"`{line}`" for line in _identity_diff(first, other)]
        ours, theirs = first.study.metadata, other.study.metadata
        if ours["seed"] != theirs["seed"]:
            lines.append(f"seed: {ours['seed']} → {theirs['seed']}")
        if ours["data"]["fingerprint"] != theirs["data"]["fingerprint"]:
            lines.append(f"images: {ours['data']['name']} → {theirs['data']['name']}")
        lines += [
            f"{name}: {ours['versions'].get(name, 'none')} → {theirs['versions'].get(name, 'none')}"
            for name in dict.fromkeys([*ours["versions"], *theirs["versions"]])
            if ours["versions"].get(name) != theirs["versions"].get(name)
        ]
        body.append(heading(f"{first.study.name} → {other.study.name}"))
        body.append(listing(lines) if lines else paragraph("Nothing: space, data, seed and versions are the same."))
    lead = "What differs in the space, the data, the seed and the versions; the number of trials is not in it."
    return Section("differences", "Differences", lead, "\n".join(body))


def _identity_diff(first: Facts, other: Facts) -> list[str]:
    return diff(first.study.metadata["identity"], other.study.metadata["identity"])
