"""Several studies side by side: which found the better configuration, how soon, and at what cost.

Scores can only be compared if they have the same meaning: the same metric, on the same images, split alike. Otherwise
the page begins with a warning, and metrics without a common axis have figures of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

import plotly.graph_objects as go
from markupsafe import Markup

from hpo.analysis.costs import own, progress, saved
from hpo.analysis.study_data import StudyData
from hpo.confirmation.result import BASELINE
from hpo.report.answer import confirmed_text, tested_text, verdict
from hpo.report.charts import Look, best_so_far, error_bars, marks, time_unit
from hpo.report.page import (
    COLORS,
    DASHES,
    SYMBOLS,
    Section,
    figure,
    heading,
    listing,
    note,
    paragraph,
    section,
    side_by_side,
    table,
)
from hpo.report.words import metric_label, trial_name
from hpo.space import diff
from hpo.space.document import flow
from hpo.text import difference, duration, gap, score, short

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


def _by_metric(studies: Sequence[StudyData]) -> Iterator[tuple[str, list[StudyData]]]:
    """The studies of each metric, which can share an axis."""
    for metric in dict.fromkeys(data.metric for data in studies):
        yield metric, [data for data in studies if data.metric == metric]


# Progress -----------------------------------------------------------------------------------------------------------


def _progress(studies: Sequence[StudyData]) -> Section | None:
    groups = list(_by_metric([data for data in studies if data.complete]))
    if not groups:
        return None
    body: list[Markup] = []
    for metric, alike in groups:
        body += [heading(metric_label(metric))] if len(groups) > 1 else []
        body.append(
            side_by_side(
                figure(progress_figure(alike, along), alt=f"Best {metric} so far, by {along}", height=340)
                for along in _ALONG
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
        costs = {"trials": lambda _: 1.0, "epochs": data.epochs, "time": data.elapsed_s}
        found = progress(data, costs[along])
        ends = [found.total] if found.total > found.spent[-1] else []
        fig.add_trace(
            best_so_far(
                [spent / size for spent in [*found.spent, *ends]],
                [*found.best, *found.best[-1:] * len(ends)],
                text=[*found.trials, *found.trials[-1:] * len(ends)],
                name=data.study.name,
                mode="lines+markers",
                line={"dash": dash, "color": color},
                marker={"symbol": symbol, "size": 7},
                hovertemplate=f"{data.study.name}, trial %{{text}}<br>best so far %{{y:.4f}}<extra></extra>",
            )
        )
    fig.update_xaxes(title_text=_ALONG[along] + (f" ({unit})" if unit else ""), rangemode="tozero")
    fig.update_yaxes(title_text=f"validation {metric_label(studies[0].metric)}")
    return fig


# Confirmed ----------------------------------------------------------------------------------------------------------


def _confirmed(studies: Sequence[StudyData]) -> Section | None:
    shown = [data for data in studies if _confirmed_mean(data) is not None]
    if not shown:
        return None
    alt = "Confirmed {} of each study's winner and baseline, with 95 % intervals"
    body = [
        figure(confirmed_figure(alike), alt=alt.format(metric), height=90 + 80 * len(alike))
        for metric, alike in _by_metric(shown)
    ]
    missing = [data.study.name for data in studies if data not in shown]
    if missing:
        body.append(note(f"Not confirmed, and so not here: {', '.join(missing)}."))
    lead = "Each study's winner and baseline on other seeds and splits, with 95 % intervals; squares are baselines."
    return section("confirmed", "Confirmed", lead, body)


def confirmed_figure(studies: Sequence[StudyData]) -> go.Figure:
    """A row for each study's winner, and one for its baseline."""
    fig = go.Figure()
    for data, color in zip(studies, cycle(COLORS), strict=False):
        made = data.confirmation
        assert made is not None, "only confirmed studies are drawn"
        for one in made.contenders:
            if one.key not in (made.winner, BASELINE) or one.interval is None:
                continue
            row = f"{data.study.name}:<br>{'the baseline' if one.key == BASELINE else one.key}"
            look = Look(color, "square" if one.key == BASELINE else "circle", 11)
            bars, hover = error_bars([one.interval.half_width]), f"%{{y}}<br>%{{x:.4f}}, n = {one.interval.n}"
            fig.add_trace(marks([one.interval.mean], [row], hover, look, error_x=bars))
    fig.update_xaxes(title_text=f"confirmed {metric_label(studies[0].metric)}", nticks=5)
    fig.update_yaxes(autorange="reversed", type="category")
    fig.update_layout(showlegend=False)
    return fig


# Differences --------------------------------------------------------------------------------------------------------


def _ranges(studies: Sequence[StudyData]) -> Section | None:
    ranges = [
        {
            key.removeprefix("search."): found
            for key, found in data.study.metadata["identity"].items()
            if "search." in key
        }
        for data in studies
    ]
    paths = dict.fromkeys(path for each in ranges for path in each)
    if not paths:
        return None
    columns, rows = ["parameter"], [[path] for path in paths]
    for data, searched in zip(studies, ranges, strict=True):
        columns += [f"{data.study.name}: range", "best"]
        best = {} if data.best is None else data.best.params
        for row in rows:
            path = row[0]
            row += [f"`{flow(searched[path])}`" if path in searched else "–"]
            row += [short(best[path]) if path in best else "–"]
    lead = "The searched ranges, and the values of the best trials; a dash: the parameter is not searched."
    body = table(columns, rows, right=range(2, len(columns), 2))
    return section("ranges", "Parameter ranges", lead, body, short="Ranges")


def _differences(studies: Sequence[StudyData]) -> Section:
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
