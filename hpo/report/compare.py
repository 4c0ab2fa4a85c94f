"""Several studies side by side: which found the better configuration, how soon, and at what cost.

Scores can only be compared if they have the same meaning: the same metric, on the same images, split alike. Otherwise
the page begins with a warning, and metrics without a common axis have figures of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, cycle
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup
from optuna.trial import FrozenTrial

from hpo.analysis.costs import own, saved
from hpo.analysis.study_data import StudyData, value_of
from hpo.confirmation.result import BASELINE
from hpo.report.answer import confirmed_text, tested_text, verdict
from hpo.report.charts import add_interval, set_interval_axes, time_unit
from hpo.report.page import (  # fmt: skip
    COLORS,
    DASHES,
    SYMBOLS,
    Section,
    figure,
    heading,
    listing,
    paragraph,
    section,
    side_by_side,
    table,
)
from hpo.report.words import metric_label, trial_name
from hpo.space import diff
from hpo.text import difference, duration, gap, number, score

_ALONG = {"trials": "trials", "epochs": "epochs trained", "time": "training time"}


def comparison(studies: Sequence[StudyData]) -> list[Section]:
    """The sections of the page; the others are compared with the first study."""
    made = (_answers(studies), _progress(studies), _confirmed(studies), _ranges(studies), _differences(studies))
    return [section for section in made if section is not None]


# Side by side -------------------------------------------------------------------------------------------------------


def _answers(studies: Sequence[StudyData]) -> Section:
    rows: dict[str, Callable[[StudyData], object]] = {
        "objective": lambda data: f"{data.metric}, to {data.study.direction}",
        "the search's best": _best_text,
        "over its baseline": _gain_text,
        "confirmed": confirmed_text,
        "on the test images": tested_text,
        "trials finished": lambda data: data.finished,
        "complete / pruned / failed": lambda data: " / ".join(
            str(len(trials)) for trials in (data.complete, data.pruned, data.failed)
        ),
        "epochs trained": lambda data: f"{sum(map(data.epochs, own(data.trials))):,}",
        "epochs saved by pruning": lambda data: f"{saved(data).epochs:,}",
        "training time": lambda data: duration(sum(map(data.elapsed_s, own(data.trials)))),
        "device": lambda data: ", ".join(data.devices),
    }
    names = [data.study.name for data in studies]
    return section(
        "answer",
        "Side by side",
        _headline(studies),
        [paragraph(words, kind="warning") for words in warnings_of(studies)],
        table(["", *names], [(name, *map(cell, studies)) for name, cell in rows.items()]),
        listing([f"{data.study.name}: {verdict(data)}" for data in studies]),
        short="Answer",
    )


def _headline(studies: Sequence[StudyData]) -> str:
    """The study that leads, if there is one."""
    if warnings_of(studies):
        return "These studies' scores cannot be compared directly."
    confirmed = all(_confirmed_mean(data) is not None for data in studies)
    value = _confirmed_mean if confirmed else _search_value
    scored = [(found, data.study.name) for data in studies if (found := value(data)) is not None]
    if len(scored) < len(studies):
        return "Not every study has a complete trial yet."
    scored.sort(key=lambda pair: studies[0].gain(pair[0], 0.0), reverse=True)
    (first, leader), (second, _) = scored[:2]
    gain = studies[0].gain(first, second)
    what = "confirmed winner" if confirmed else "search's best"
    if gain == 0:
        return f"The {what}s score the same: {score(first)}."
    the = "The" if confirmed else "Not confirmed: the"
    return f"{the} {what} of {leader} is ahead by {gap(studies[0].metric, gain)}: {score(first)}."


def warnings_of(studies: Sequence[StudyData]) -> list[str]:
    """Why the scores cannot be compared, a sentence each."""
    first, found = studies[0], []
    for other in studies[1:]:
        names = f"{first.study.name} and {other.study.name}"
        if other.metric != first.metric:
            found.append(f"{names} have other objectives: {first.metric} and {other.metric}.")
        ours, theirs = first.study.metadata["data"], other.study.metadata["data"]
        if ours["fingerprint"] != theirs["fingerprint"]:
            images = " and ".join(f"{each['name']} ({each['fingerprint'][:12]})" for each in (ours, theirs))
            found.append(f"{names} were run on other images: {images}.")
        elif split := [line for line in _space_diff(first, other) if line.startswith("data.")]:
            found.append(f"{names} split or read the images differently: {'; '.join(split)}.")
    return found


def _best_text(data: StudyData) -> str:
    return "no complete trial" if data.best is None else f"{score(data.best.value)}, {trial_name(data.best)}"


def _gain_text(data: StudyData) -> str:
    if data.best_gain is None:
        return "the baseline is not trained"
    if data.best is data.baseline:
        return "nothing: the baseline is best"
    return difference(data.metric, data.best_gain)


def _search_value(data: StudyData) -> float | None:
    return None if data.best is None else data.best.value


def _confirmed_mean(data: StudyData) -> float | None:
    if data.confirmation is None:
        return None
    interval = data.confirmation.contender(data.confirmation.winner).interval
    return None if interval is None else interval.mean


# Progress -----------------------------------------------------------------------------------------------------------


def _progress(studies: Sequence[StudyData]) -> Section | None:
    """The best so far of each study, by trials, by epochs and by time."""
    shown = [data for data in studies if data.complete]
    if not shown:
        return None
    metrics = list(dict.fromkeys(data.metric for data in shown))
    body: list[Markup] = []
    for metric in metrics:
        alike = [data for data in shown if data.metric == metric]
        body += [heading(metric_label(metric))] if len(metrics) > 1 else []
        figures = {along: progress_figure(alike, along) for along in _ALONG}
        body.append(
            side_by_side(
                [figure(fig, alt=f"Best {metric} so far, by {along}", height=340) for along, fig in figures.items()]
            )
        )
    lead = "The best complete trial so far, after so many trials, so many epochs, and so much training time."
    return section("progress", "Progress", lead, body)


def progress_figure(studies: Sequence[StudyData], along: str) -> go.Figure:
    """A line per study: the best value so far, with a mark at each complete trial, up to all that was spent.

    Args:
        studies: with complete trials and one metric.
        along: `trials`, `epochs` or `time`, added up in the order in which the trials began.
    """
    fig = go.Figure()
    longest = max(sum(map(data.elapsed_s, data.trials)) for data in studies)
    unit, size = time_unit(longest) if along == "time" else ("", 1.0)
    looks = zip(cycle(COLORS), cycle(DASHES), cycle(SYMBOLS), strict=False)
    for data, (color, dash, symbol) in zip(studies, looks, strict=False):
        spent, best, numbers, end = progress(data, along)
        if end > spent[-1]:
            spent, best, numbers = [*spent, end], [*best, best[-1]], [*numbers, numbers[-1]]
        fig.add_trace(
            go.Scatter(
                x=[each / size for each in spent],
                y=best,
                text=numbers,
                name=data.study.name,
                mode="lines+markers",
                line={"shape": "hv", "dash": dash, "color": color, "width": 2},
                marker={"symbol": symbol, "size": 7},
                hovertemplate=f"{data.study.name}, trial %{{text}}<br>best so far %{{y:.4f}}<extra></extra>",
            )
        )
    fig.update_xaxes(title_text=_ALONG[along] + (f" ({unit})" if unit else ""), rangemode="tozero")
    fig.update_yaxes(title_text=f"validation {metric_label(studies[0].metric)}")
    return fig


def progress(data: StudyData, along: str) -> tuple[list[float], list[float], list[int], float]:
    """(spent so far, best so far, trial number) at each complete trial, and all that was spent."""
    costs: Mapping[str, Callable[[FrozenTrial], float]] = {
        "trials": lambda _: 1.0,
        "epochs": lambda trial: float(data.epochs(trial)),
        "time": data.elapsed_s,
    }
    begun = sorted((trial for trial in data.trials if trial not in data.waiting), key=lambda trial: trial.number)
    spent = list(accumulate(map(costs[along], begun)))
    ended = [(so_far, trial) for so_far, trial in zip(spent, begun, strict=True) if trial in data.complete]
    best = list(accumulate((value_of(trial) for _, trial in ended), max if data.maximize else min))
    return [so_far for so_far, _ in ended], best, [trial.number for _, trial in ended], spent[-1]


# Confirmed ----------------------------------------------------------------------------------------------------------


def _confirmed(studies: Sequence[StudyData]) -> Section | None:
    """The confirmed winner and baseline of each study, with their intervals."""
    shown = [data for data in studies if _confirmed_mean(data) is not None]
    if not shown:
        return None
    body = []
    for metric in dict.fromkeys(data.metric for data in shown):
        alike = [data for data in shown if data.metric == metric]
        alt = f"Confirmed {metric} of each study's winner and baseline, with 95 % intervals"
        body.append(figure(confirmed_figure(alike), alt=alt, height=90 + 80 * len(alike)))
    missing = [data.study.name for data in studies if data not in shown]
    if missing:
        body.append(paragraph(f"Not confirmed, and so not here: {', '.join(missing)}.", kind="note"))
    lead = "Each study's winner and baseline on other seeds and splits, with 95 % intervals; squares are baselines."
    return section("confirmed", "Confirmed", lead, body)


def confirmed_figure(studies: Sequence[StudyData]) -> go.Figure:
    """A row for each study's winner, and one for its baseline."""
    fig, rows = go.Figure(), []
    for data, color in zip(studies, cycle(COLORS), strict=False):
        made = data.confirmation
        assert made is not None, "only confirmed studies are drawn"
        for contender in made.contenders:
            if contender.key not in (made.winner, BASELINE) or contender.interval is None:
                continue
            name = "the baseline" if contender.key == BASELINE else contender.key
            hover = f"%{{y}}<br>%{{x:.4f}}, n = {contender.interval.n}"
            rows.append(f"{data.study.name}:<br>{name}")
            is_base = contender.key == BASELINE
            add_interval(fig, rows[-1], contender.interval, hover, color=color, baseline=is_base)
    set_interval_axes(fig, metric_label(studies[0].metric), rows)
    return fig


# Differences --------------------------------------------------------------------------------------------------------


def _ranges(studies: Sequence[StudyData]) -> Section | None:
    """Each study's range of each parameter, and the best trial's value."""
    ranges = [_searched(data.study.metadata["identity"]) for data in studies]
    paths = list(dict.fromkeys(path for each in ranges for path in each))
    if not paths:
        return None
    columns = ["parameter"]
    for data in studies:
        columns += [f"{data.study.name}: range", "best"]
    rows = []
    for path in paths:
        row = [path]
        for data, searched in zip(studies, ranges, strict=True):
            row += [_range_text(searched.get(path)), _best_value(data, path)]
        rows.append(row)
    lead = "The searched ranges, and the values of the best trials; a dash: the parameter is not searched."
    body = table(columns, rows, right=range(2, len(columns), 2))
    return section("ranges", "Parameter ranges", lead, body, short="Ranges")


def _searched(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Parameter -> its range."""
    return {key.removeprefix("search."): value for key, value in identity.items() if key.startswith("search.")}


def _range_text(described: Mapping[str, Any] | None) -> str:
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


def _best_value(data: StudyData, path: str) -> str:
    if data.best is None or path not in data.best.params:
        return "–"
    value = data.best.params[path]
    return number(value) if isinstance(value, float) else str(value)


def _differences(studies: Sequence[StudyData]) -> Section:
    """Other differences between the first study and each other one."""
    first, body = studies[0], []
    for other in studies[1:]:
        ours, theirs = first.study.metadata, other.study.metadata
        pairs = {"seed": (ours["seed"], theirs["seed"])}
        if ours["data"]["fingerprint"] != theirs["data"]["fingerprint"]:
            pairs["images"] = (ours["data"]["name"], theirs["data"]["name"])
        for name in dict.fromkeys([*ours["versions"], *theirs["versions"]]):
            pairs[name] = (ours["versions"].get(name, "none"), theirs["versions"].get(name, "none"))
        lines = [f"`{line}`" for line in _space_diff(first, other)]
        lines += [f"{name}: {a} → {b}" for name, (a, b) in pairs.items() if a != b or name == "images"]
        body.append(heading(f"{first.study.name} → {other.study.name}"))
        body.append(listing(lines) if lines else paragraph("Nothing: space, data, seed and versions are the same."))
    lead = "Differences in the space, the data, the seed and the versions; the number of trials is not compared."
    return section("differences", "Differences", lead, body)


def _space_diff(first: StudyData, other: StudyData) -> list[str]:
    return diff(first.study.metadata["identity"], other.study.metadata["identity"])
