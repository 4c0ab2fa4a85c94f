"""The first section: is it better than the baseline, how certain is that, and what did it cost?

The best of many noisy scores is partly luck, so the search's own best score is no answer: without a confirmation, the
section states that there is none, with the command for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup

from core.config import TrainConfig
from hpo.analysis.costs import saved, totals
from hpo.analysis.study_data import StudyData
from hpo.confirmation.result import BASELINE, Confirmation
from hpo.confirmation.words import NO_GAIN
from hpo.dashboard.pictures import BLUE, GREY, INK, ORANGE
from hpo.report.charts import Look, add_interval, cut, marks, set_interval_axes
from hpo.report.page import (
    Section,
    code,
    columns,
    figure,
    folded,
    heading,
    listing,
    paragraph,
    section,
    table,
    tiles,
)
from hpo.report.words import command, interval_text, metric_label, outdated, run_again, trial_name, unproven
from hpo.text import count, difference, duration, gap, number, percent, score, sentence

Tile = tuple[str, str, Sequence[str]]
"""A question, its answer in large letters, and lines below."""

_MOST_NOTES = 4  # notes below the confirmed scores that are not folded


def answer(data: StudyData) -> Section:
    """The answer, its evidence, and the next commands."""
    commands = next_commands(data)
    return section(
        "answer",
        "The answer",
        verdict(data),
        [paragraph(words, kind="warning") for words in warnings_of(data)],
        tiles([_better(data), _certain(data), _cost(data), *_test(data)]),
        columns(*map(Markup("").join, (_contenders(data), _configuration(data), _costs(data), _refits(data)))),
        [heading("Next"), code("\n".join(commands))] if commands else [],
    )


def verdict(data: StudyData) -> str:
    """The answer in one sentence."""
    label = metric_label(data.metric)
    if data.confirmation is not None:
        text = data.confirmation.verdict
        return f"Tuning helped: {label} {text}." if data.confirmation.evidence else f"{sentence(text)}."
    if data.best is None:
        return "No trial is complete yet, so there is nothing to compare."
    if data.best is data.baseline:
        return f"The search found nothing better than the baseline: validation {label} {score(data.best.value)}."
    gain = data.best_gain
    if gain is None:
        lead = "and the baseline is not trained, so there is no comparison"
    else:
        lead = f"{difference(data.metric, gain)} over the baseline" if gain else "the same as the baseline"
    name = trial_name(data.best)
    return f"Not confirmed: {name} scores best, validation {label} {score(data.best.value)}, {lead}."


def warnings_of(data: StudyData) -> list[str]:
    """Warnings to read before the answer: that the study is running, or results are older than its last trials."""
    found, made = [], data.confirmation
    if data.running or data.unfinished:
        total = max(data.study.total or 0, data.finished)
        state = f"{count(len(data.running), 'trial')} running" if data.running else "none running now"
        found.append(f"The search is not over: {data.finished} of {count(total, 'trial')} finished, {state}.")
    if made is not None and not data.confirmed:
        found.append(outdated(data.study, made, data.finished))
    model = data.refits.get("best")
    if model is not None and made is not None and data.confirmed:
        winner = made.contender(made.winner)
        by = "recipe" if winner.trial is None else "trial"
        if model.get(by) != getattr(winner, by):
            found.append(
                f"The submission model `best` is of {_refitted(model)}, and the winner is {winner.name}; "
                f"`{command(data.study, 'refit best --study')}` replaces it."
            )
    return found


def next_commands(data: StudyData) -> list[str]:
    """The commands that are missing for a complete answer, ready to copy."""
    found = [run_again(data.study)] if data.unfinished else []
    if data.complete and not data.confirmed:
        found.append(command(data.study, "confirm"))
    if data.complete and not data.refits:
        found.append(command(data.study, "refit best --study"))
    if data.confirmation is not None and data.confirmed:
        found += unproven(data.study, data.confirmation)
    return found


# Tiles --------------------------------------------------------------------------------------------------------------


def _better(data: StudyData) -> Tile:
    question, made, gain = "Is it better?", data.confirmation, data.best_gain
    if made is None:
        if not gain:
            return question, "Not known" if gain is None else "Not so far", [verdict(data)]
        lead = f"The search's best leads by {gap(data.metric, gain)}."
        scores = count(len(data.complete), "noisy score")
        return question, "Perhaps", [f"{lead} The best of {scores} is partly luck, so this is flattering."]
    winner = made.contender(made.winner).name
    if made.advantage is None:
        return question, "Not known", [f"The winner is {winner}."]
    size = difference(data.metric, made.advantage.mean, made.advantage.half_width)
    over = f"{made.leader} over the baseline, {metric_label(data.metric)} on validation images"
    if made.evidence:
        return question, f"Yes, {size}", [f"{over}."]
    return question, "Not shown", [f"{size}: {over}. The winner is {winner}."]


def _certain(data: StudyData) -> Tile:
    question, made = "How certain is that?", data.confirmation
    if made is None:
        line = (
            "One split and one seed per trial. Other seeds and splits show whether the lead is real: "
            f"`{command(data.study, 'confirm')}`."
        )
        return question, "Not confirmed", [line]
    if made.advantage is None:
        return question, "Not known", [sentence(made.verdict.removeprefix(f"{NO_GAIN}: ")) + "."]
    n = made.advantage.n
    lines = [f"Each was trained on {count(n, 'other seed')} and {count(n, 'split')}."]
    if n > 1:
        lines.append("± is a 95 % interval, corrected for overlapping splits and for the number of challengers.")
    if made.optimism is not None and (best := made.searched_best) is not None:
        size = gap(data.metric, abs(made.optimism))
        own = f"The search's own best score, {score(best.search_value)},"
        flattering = f"was flattering: confirmed, it is {size} worse."
        lines.append(
            f"{own} {flattering if made.optimism > 0 else f'did not flatter: confirmed, it is {size} better.'}"
        )
    return question, f"95 %, n = {n}" if made.evidence else f"n = {n}", lines


def _cost(data: StudyData) -> Tile:
    costs = totals(data)
    times = [f"{cost.kind} {duration(cost.seconds)}" for cost in costs if cost.seconds is not None]
    trainings = count(sum(cost.trainings for cost in costs), "training")
    epochs = count(sum(cost.epochs or 0 for cost in costs), "epoch")
    lines = [f"{sentence(', '.join(times))}.", f"{trainings}, {epochs} in all{_on_devices(data)}."]
    if (less := saved(data)).epochs:
        share = less.epochs / (less.epochs + (costs[0].epochs or 0))
        lines.append(f"Pruning saved {count(less.epochs, 'epoch')}, {percent(share)} of the search.")
    return "What did it cost?", f"{duration(sum(cost.seconds or 0.0 for cost in costs))} of training", lines


def _on_devices(data: StudyData) -> str:
    return f", on {', '.join(data.devices)}" if data.devices else ""


def _test(data: StudyData) -> list[Tile]:
    if (found := _shown_refit(data)) is None:
        return []
    label, report = found
    test, interval = report["test"], _interval(report, data.metric)
    opened = "once" if test["opened"] == 1 else f"{test['opened']} times"
    what = f"{metric_label(data.metric)} of the refit `{label}`, {_refitted(report)}, on {test['images']:,} images"
    between = f", 95 % between {' and '.join(interval)}" if interval else ""
    lines = [f"{what}{between}.", f"The test set was opened {opened}."]
    return [("On the test images", _refit_score(report, "test", data.metric), lines)]


def _shown_refit(data: StudyData) -> tuple[str, Mapping[str, Any]] | None:
    """`best`, or the first other refit."""
    label = min(data.refits, key=lambda label: (label != "best", not label.startswith("best"), label), default=None)
    return None if label is None else (label, data.refits[label])


def _refitted(report: Mapping[str, Any]) -> str:
    """`trial 12` or `recipe NAME`."""
    return f"trial {report['trial']}" if report.get("trial") is not None else f"recipe {report.get('recipe')}"


def _score_key(metric: str) -> str:
    """The metric's name among a refit's scores."""
    return "loss" if metric == "nll" else metric


def _refit_score(report: Mapping[str, Any], part: str, metric: str) -> str:
    return score(report[part]["with_tta"].get(_score_key(metric)))


def _interval(report: Mapping[str, Any], metric: str) -> list[str]:
    """The bounds of the test score's bootstrap interval; empty if an older version did not compute one."""
    low, high = report["test"]["with_tta"].get("intervals", {}).get(_score_key(metric), (None, None))
    return [] if low is None else [score(low), score(high)]


def confirmed_text(data: StudyData) -> str:
    """The confirmed winner's score, for a cell of a table."""
    if data.confirmation is None:
        return "not confirmed"
    winner = data.confirmation.contender(data.confirmation.winner)
    if winner.interval is None:
        return "no score"
    stale = "" if data.confirmed else "; older than the study"
    return f"{interval_text(winner.interval)} (n = {winner.interval.n}), {winner.name}{stale}"


def tested_text(data: StudyData) -> str:
    """The refit's score on the test images, for a cell of a table."""
    if (found := _shown_refit(data)) is None:
        return "no refit"
    label, report = found
    interval = _interval(report, data.metric)
    between = f" ({' to '.join(interval)})" if interval else ""
    return f"{_refit_score(report, 'test', data.metric)}{between}, refit {label}"


# Evidence -----------------------------------------------------------------------------------------------------------


def _contenders(data: StudyData) -> list[Markup]:
    made = data.confirmation
    if made is None or not any(contender.interval for contender in made.contenders):
        return []
    notes = [f"{each.name}: {each.failure}." for each in made.contenders if each.failure]
    notes += [f"{each.name} was stopped early: {each.stopped}." for each in made.contenders if each.stopped]
    notes += [f"Left out: {words}." for words in made.left_out]
    scores = [f"{each.name} {score(each.interval.mean)}" for each in made.contenders if each.interval]
    alt = f"Confirmed scores with 95 % intervals. {'; '.join(scores)}"
    fig = contenders_figure(made, metric_label(data.metric))
    legend = "A dot is a mean with its 95 % interval, a small ring one training; the square is the baseline."
    more = notes[_MOST_NOTES:]
    return [
        heading("Confirmed on other seeds and splits"),
        figure(fig, alt=alt, height=100 + 40 * len(made.contenders)),
        *(paragraph(words, kind="note") for words in [legend, *notes[:_MOST_NOTES]]),
        *([folded("More notes", listing(more))] if more else []),
    ]


def contenders_figure(made: Confirmation, label: str) -> go.Figure:
    """A row per contender, the best on top: every score, their mean and its 95 % interval."""
    rows = {each.key: f"{cut(each.name, 22)}<br>n = {len(each.scores)}" for each in made.contenders if each.scores}
    scored = [each for each in made.contenders if each.scores]
    points = [
        (value, rows[each.key], f"replicate {key}")
        for each in scored
        for key, values in each.scores.items()
        for value in values
    ]
    x, y, text = zip(*points, strict=True)
    hover = "%{y}<br>%{text}: %{x:.4f}"
    fig = go.Figure(marks(x, y, hover, Look(GREY, "circle-open", 6, 1), text=text))
    for each in scored:
        if each.interval is None:
            continue
        is_base = each.key == BASELINE
        color = ORANGE if is_base else INK if each.key == made.winner else BLUE
        hover = f"{each.name}<br>{interval_text(each.interval)}<br>{', '.join(each.chosen_for)}"
        add_interval(fig, rows[each.key], each.interval, hover, color=color, baseline=is_base)
        if is_base:
            fig.add_vline(x=each.interval.mean, line={"color": ORANGE, "dash": "dash", "width": 1.2}, layer="below")
    set_interval_axes(fig, label, list(rows.values()))
    return fig


def _configuration(data: StudyData) -> list[Markup]:
    """The winner's changes of the baseline; if there are none, the leader's as well."""
    base, made = _flat(data.study.metadata["base"]), data.confirmation
    title = heading("The configuration")
    if made is not None:
        shown = [made.contender(key) for key in dict.fromkeys((made.winner, made.leader)) if key is not None]
        body = [_changes(each.name, base, _flat(each.config), wins=each.key == made.winner) for each in shown]
        return [title, *(body if shown[0].key == BASELINE else body[:1])]
    if data.best is None:
        return []
    return [title, _changes(trial_name(data.best), base, data.study.config_of(data.best).flat(), wins=True)]


def _changes(name: str, base: Mapping[str, Any], config: Mapping[str, Any], *, wins: bool) -> Markup:
    rows = changed(base, config)
    subject = f"The best is {name}" if wins else f"The leader, {name}, is not proven better"
    if not rows:
        return paragraph(f"{subject}: the unchanged baseline.")
    lead = paragraph(f"{subject}: the baseline with {count(len(rows), 'changed field')}.")
    return lead + table(["field", "baseline", name], rows, right=(1, 2))


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    return TrainConfig.model_validate_json(json.dumps(config)).flat()


def changed(base: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(field, the baseline's value, the other) where two flat configurations differ, except for the seed."""
    paths = [path for path in base if path != "seed" and base[path] != config[path]]
    return [(path, _shown(base[path]), _shown(config[path])) for path in paths]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return "off" if value is None else str(value)


def _costs(data: StudyData) -> list[Markup]:
    rows = [
        (
            cost.kind,
            cost.trainings,
            None if cost.epochs is None else f"{cost.epochs:,}",
            None if cost.seconds is None else duration(cost.seconds),
        )
        for cost in totals(data)
    ]
    device = f"On {', '.join(data.devices)}. " if data.devices else ""
    note = f"{device}The search's time is the sum of its trials, also if they ran side by side."
    body = table(["", "trainings", "epochs", "time"], rows, right=(1, 2, 3))
    return [heading("What it cost"), body, paragraph(note, kind="note")]


def _refits(data: StudyData) -> list[Markup]:
    rows = [
        (
            label,
            report["networks"],
            _refit_score(report, "val", data.metric),
            _refit_score(report, "test", data.metric),
            " to ".join(_interval(report, data.metric)),
        )
        for label, report in data.refits.items()
    ]
    if not rows:
        return []
    note = f"{sentence(metric_label(data.metric))}, with the test-time augmentation that validation chose."
    body = table(["refit", "networks", "validation", "test", "95 % of the test"], rows, right=(1, 2, 3))
    return [heading("Submission models"), body, paragraph(note, kind="note")]
