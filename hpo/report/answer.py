"""The first screen: is it better, how sure is that, and what did it cost.

The best of many noisy scores is partly luck, so that the search's own best score is no answer: without a confirmation
the page says that there is none yet, and how to get one.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from core.config import TrainConfig
from hpo.analysis.facts import Facts, interval_words, name_of, value_of
from hpo.analysis.summary import unproven
from hpo.confirmation.result import BASE, NO_EVIDENCE, Confirmation, Contender
from hpo.dashboard.pictures import BLUE, GREY, INK, ORANGE
from hpo.report.costs import Cost, saved, spent
from hpo.report.page import Section, code, columns, figure, folded, heading, listing, paragraph, table, tiles
from hpo.storage import is_masked
from hpo.text import count, difference, duration, gap, number, score

Tile = tuple[str, str, Sequence[str]]
"""A question, its answer in large letters, and what there is to say of it."""

MOST_NOTES = 4
"""Notes below the confirmed scores that are shown at once."""


def answer(facts: Facts) -> Section:
    """The answer, with what it rests on, and the next commands."""
    body = [paragraph(words, kind="warning") for words in warnings_of(facts)]
    body.append(tiles([_better(facts), _sure(facts), _cost(facts), *_test(facts)]))
    body.append(columns(_contenders(facts), _configuration(facts), _costs_table(facts), _refits_table(facts)))
    if commands := next_commands(facts):
        body += [heading("Next"), code("\n".join(commands))]
    return Section("answer", "The answer", verdict(facts), "\n".join(body))


def verdict(facts: Facts) -> str:
    """The answer in one sentence."""
    words = facts.metric_words
    if facts.confirmation is not None:
        text = facts.confirmation.verdict
        return f"Tuning helped: {words} {text}." if facts.confirmation.evidence else f"{_sentence(text)}."
    if facts.best is None:
        return "No trial is complete yet, so there is nothing to compare."
    best = f"{name_of(facts.best)} scores best, validation {words} {score(facts.best.value)}"
    if facts.best is facts.baseline:
        return f"The search found nothing better than the base: validation {words} {score(facts.best.value)}."
    return f"Not confirmed: {best}, {_lead_over_base(facts)}."


def _sentence(words: str) -> str:
    """The same with a capital letter, and the rest as it is."""
    return words[:1].upper() + words[1:]


def _gain(facts: Facts) -> float | None:
    """By how much the search's best leads the base; None where one of them has no value."""
    if facts.best is None or facts.baseline is None or facts.baseline not in facts.complete:
        return None
    return facts.gain(value_of(facts.best), value_of(facts.baseline))


def _lead_over_base(facts: Facts) -> str:
    gain = _gain(facts)
    if gain is None:
        return "and the base is not trained to compare it with"
    return f"{difference(facts.metric, gain)} over the base" if gain else "the same as the base"


def warnings_of(facts: Facts) -> list[str]:
    """What a reader has to know before the answer: that the study still runs, or the answer is older than the study."""
    found = []
    if facts.running or facts.unfinished:
        total = max(facts.study.total or 0, facts.finished)
        state = f"{count(len(facts.running), 'trial')} running" if facts.running else "none running now"
        found.append(f"The search is not over: {facts.finished} of {count(total, 'trial')} finished, {state}.")
    if facts.confirmation is not None and not facts.confirmed:
        found.append(
            f"The confirmation was made when {count(facts.confirmation.search_trials, 'trial')} were finished, and now "
            f"{facts.finished} are; `hpo confirm {facts.study.name}` makes it anew."
        )
    model = facts.refits.get("best")
    if model is not None and facts.confirmation is not None and facts.confirmed:
        winner = facts.confirmation.contender(facts.confirmation.winner)
        by = "recipe" if winner.trial is None else "trial"
        if model.get(by) != getattr(winner, by):
            found.append(
                f"The submission model `best` is of {_refitted(model)}, and the winner is {winner.name}; "
                f"`{_command(facts, 'refit best --study')}` makes it anew."
            )
    return found


# The tiles ----------------------------------------------------------------------------------------------------------


def _better(facts: Facts) -> Tile:
    question = "Is it better?"
    made = facts.confirmation
    if made is None:
        gain = _gain(facts)
        if not gain:
            return question, "Not known" if gain is None else "Not so far", [verdict(facts)]
        lead = gap(facts.metric, gain)
        scores = count(len(facts.complete), "noisy score")
        flattering = f"The best of {scores} is partly luck, so this is flattering."
        return question, "Perhaps", [f"The search's best leads by {lead}. {flattering}"]
    if made.advantage is None:
        return question, "Not known", [f"The winner is {made.contender(made.winner).name}."]
    size = difference(facts.metric, made.advantage.mean, made.advantage.half_width)
    over = f"{made.leader} over the base, {facts.metric_words} on validation images"
    if made.evidence:
        return question, f"Yes, {size}", [f"{over}."]
    return question, "No evidence", [f"{size}: {over}. The winner is {made.contender(made.winner).name}."]


def _sure(facts: Facts) -> Tile:
    question, made = "How sure is that?", facts.confirmation
    if made is None:
        return question, "Not confirmed", [
            "One split and one seed a trial. Other seeds and splits say whether the lead is real: "
            f"`{_command(facts, 'confirm')}`."
        ]  # fmt: skip
    if made.advantage is None:
        return question, "Not known", [_sentence(made.verdict.removeprefix(f"{NO_EVIDENCE}: ")) + "."]
    n = made.advantage.n
    lines = (
        ["± is a 95 % interval, corrected for overlapping splits and for the number of challengers."] if n > 1 else []
    )
    if made.optimism is not None and (best := made.searched_best) is not None:
        size = gap(facts.metric, abs(made.optimism))
        own = f"The search's own best score, {score(best.search_value)},"
        if made.optimism > 0:
            lines.append(f"{own} was flattering: confirmed, it is {size} worse.")
        else:
            lines.append(f"{own} did not flatter: confirmed, it is {size} better.")
    large = f"95 %, n = {n}" if made.evidence else f"n = {n}"
    return question, large, [f"Each was trained on {count(n, 'other seed')} and {count(n, 'split')}.", *lines]


def _cost(facts: Facts) -> Tile:
    question, found = "What did it cost?", _in_all(facts)
    times = [f"{each.what} {duration(each.seconds)}" for each in found if each.seconds is not None]
    trainings = count(sum(each.trainings for each in found), "training")
    epochs = count(sum(each.epochs or 0 for each in found), "epoch")
    device = f", on {', '.join(facts.devices)}" if facts.devices else ""
    lines = [f"{_sentence(', '.join(times))}.", f"{trainings}, {epochs} in all{device}."]
    if (less := saved(facts)).epochs:
        whole = less.epochs + (found[0].epochs or 0)
        lines.append(f"Pruning saved {count(less.epochs, 'epoch')}, {100 * less.epochs / whole:.0f} % of the search.")
    return question, f"{duration(sum(each.seconds or 0.0 for each in found))} of training", lines


def _in_all(facts: Facts) -> list[Cost]:
    """What each part took; the search's trials are one of them, the first, whatever became of each."""
    every = spent(facts)
    trials = [cost for cost in every if cost.what.endswith(" trials")]
    search = Cost(
        "search",
        sum(cost.trainings for cost in trials),
        sum(cost.epochs or 0 for cost in trials),
        None,
        sum(cost.seconds or 0.0 for cost in trials),
    )
    return [search, *(cost for cost in every if cost not in trials)]


def _test(facts: Facts) -> list[Tile]:
    found = _winning_refit(facts)
    if found is None:
        return []
    label, report = found
    low, high = _interval(report, facts.metric)
    test = report["test"]
    between = f", 95 % between {score(low)} and {score(high)}" if low is not None else ""
    value = test["with_tta"].get(_key(facts.metric))
    return [
        (
            "On the test images",
            score(value),
            [
                f"{facts.metric_words} of the refit `{label}`, {_refitted(report)}, on {test['images']:,} images"
                f"{between}.",
                f"The test set was opened {'once' if test['opened'] == 1 else str(test['opened']) + ' times'}.",
            ],
        )
    ]


def _winning_refit(facts: Facts) -> tuple[str, Mapping[str, Any]] | None:
    """`best`, or the only kind there is."""
    if not facts.refits:
        return None
    label = min(facts.refits, key=lambda label: (label != "best", not label.startswith("best"), label))
    return label, facts.refits[label]


def _refitted(report: Mapping[str, Any]) -> str:
    """What was refitted: `trial 12`, or `recipe NAME` of a recipe beside the study."""
    return f"trial {report['trial']}" if report.get("trial") is not None else f"recipe {report.get('recipe')}"


def _key(metric: str) -> str:
    """The metric's name among a refit's scores."""
    return "loss" if metric == "nll" else metric


def _interval(report: Mapping[str, Any], metric: str) -> tuple[float, float] | tuple[None, None]:
    """The bootstrap interval of the test score; None where an older version has not computed one."""
    low, high = report["test"]["with_tta"].get("intervals", {}).get(_key(metric), (None, None))
    return low, high


def confirmed_words(facts: Facts) -> str:
    """The confirmed winner's score and its lead, in a cell of a table."""
    made = facts.confirmation
    if made is None:
        return "not confirmed"
    winner = made.contender(made.winner)
    if winner.interval is None:
        return "no score"
    stale = "" if facts.confirmed else "; older than the study"
    return f"{interval_words(winner.interval)} (n = {winner.interval.n}), {winner.name}{stale}"


def test_words(facts: Facts) -> str:
    """The refit's score on the test images, in a cell of a table."""
    found = _winning_refit(facts)
    if found is None:
        return "no refit"
    label, report = found
    low, high = _interval(report, facts.metric)
    between = "" if low is None else f" ({score(low)} to {score(high)})"
    return f"{score(report['test']['with_tta'].get(_key(facts.metric)))}{between}, refit {label}"


# The contenders -----------------------------------------------------------------------------------------------------


def _contenders(facts: Facts) -> str:
    made = facts.confirmation
    if made is None or not any(contender.interval for contender in made.contenders):
        return ""
    said = [f"{each.name}: {each.failure}" for each in made.contenders if each.failure]
    said += [f"{each.name} was stopped early: {each.stopped}" for each in made.contenders if each.stopped]
    said += [f"Left out: {words}" for words in made.left_out]
    fig = contenders_figure(made, facts.metric_words)
    alt = "Confirmed scores with 95 % intervals. " + "; ".join(
        f"{each.name} {score(each.interval.mean)}" for each in made.contenders if each.interval
    )
    return (
        heading("Confirmed on other seeds and splits")
        + figure(fig, alt=alt, height=100 + 40 * len(made.contenders))
        + paragraph(
            "A dot is a mean with its 95 % interval, a small ring one training; the square is the base.", kind="note"
        )
        + "".join(paragraph(f"{words}.", kind="note") for words in said[:MOST_NOTES])
        + (folded("More of this", listing(said[MOST_NOTES:])) if len(said) > MOST_NOTES else "")
    )


def contenders_figure(made: Confirmation, metric_words: str) -> go.Figure:
    """A row a contender, the best on top: every score, their mean and its 95 % interval."""
    rows = [contender for contender in made.contenders if contender.scores]
    labels = {each.key: f"{_short(each.name)}<br>n = {len(each.scores)}" for each in rows}
    fig = go.Figure()
    fig.add_trace(
        go.Scatter(
            x=[value for each in rows for values in each.scores.values() for value in values],
            y=[labels[each.key] for each in rows for values in each.scores.values() for _ in values],
            text=[f"replicate {key}" for each in rows for key, values in each.scores.items() for _ in values],
            mode="markers",
            marker={"symbol": "circle-open", "size": 6, "color": GREY},
            hovertemplate="%{y}<br>%{text}: %{x:.4f}<extra></extra>",
        )
    )
    for each in rows:
        if each.interval is None:
            continue
        base = each.key == BASE
        half = each.interval.half_width
        fig.add_trace(
            go.Scatter(
                x=[each.interval.mean],
                y=[labels[each.key]],
                mode="markers",
                marker={
                    "symbol": "square" if base else "circle",
                    "size": 11,
                    "color": ORANGE if base else INK if each.key == made.winner else BLUE,
                },
                error_x={"type": "data", "array": [half if math.isfinite(half) else 0], "thickness": 2, "width": 5},
                hovertemplate=f"{_interval_words(each)}<extra></extra>",
            )
        )
        if base:
            fig.add_vline(x=each.interval.mean, line={"color": ORANGE, "dash": "dash", "width": 1.2}, layer="below")
    fig.update_xaxes(title_text=f"validation {metric_words}, confirmed", nticks=5)
    fig.update_yaxes(autorange="reversed", type="category", categoryorder="array", categoryarray=list(labels.values()))
    fig.update_layout(showlegend=False)
    return fig


def _interval_words(contender: Contender) -> str:
    assert contender.interval is not None, "only what has an interval is drawn"
    return f"{contender.name}<br>{interval_words(contender.interval)}<br>{', '.join(contender.chosen_for)}"


def _short(name: str, longest: int = 22) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


# The configuration --------------------------------------------------------------------------------------------------


def _configuration(facts: Facts) -> str:
    """The winner's configuration as what it changes of the base; where that is nothing, the leader's as well."""
    base = _flat(facts.study.metadata["base"])
    title = heading("The configuration")
    made = facts.confirmation
    if made is not None:
        shown_of = [made.contender(key) for key in dict.fromkeys((made.winner, made.leader)) if key is not None]
        body = [_changes(each.name, base, _flat(each.config), wins=each.key == made.winner) for each in shown_of]
        return title + "".join(body if shown_of[0].key == BASE else body[:1])
    if facts.best is None:
        return ""
    return title + _changes(name_of(facts.best), base, facts.study.config_of(facts.best).flat(), wins=True)


def _changes(name: str, base: Mapping[str, Any], config: Mapping[str, Any], *, wins: bool) -> str:
    """A table of the fields in which a configuration is not the base."""
    rows = changed(base, config)
    who = f"The best is {name}" if wins else f"The leader, {name}, is not proven better"
    if not rows:
        return paragraph(f"{who}: the space's base as it stands.")
    return paragraph(f"{who}: the base, but for {count(len(rows), 'field')}.") + table(
        ["field", "base", name], rows, right=(1, 2)
    )


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    return TrainConfig.model_validate_json(json.dumps(config)).flat()


def changed(base: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(field, the base's value, this one's) where two flat configurations differ, but for the seed."""
    return [
        (path, shown(base[path]), shown(config[path])) for path in base if path != "seed" and base[path] != config[path]
    ]


def shown(value: Any) -> str:
    """A field's value, rounded for the eye."""
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return "off" if value is None else str(value)


# Cost and refits ----------------------------------------------------------------------------------------------------


def _costs_table(facts: Facts) -> str:
    rows = [
        (each.what, each.trainings, _thousands(each.epochs), None if each.seconds is None else duration(each.seconds))
        for each in _in_all(facts)
    ]
    device = f"On {', '.join(facts.devices)}. " if facts.devices else ""
    note = f"{device}The search's time is that of all its trials, one after the other, whatever ran side by side."
    body = table(["", "trainings", "epochs", "time"], rows, right=(1, 2, 3))
    return heading("What it cost") + body + paragraph(note, kind="note")


def _thousands(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _refits_table(facts: Facts) -> str:
    if not facts.refits:
        return ""
    rows = []
    for label, report in facts.refits.items():
        low, high = _interval(report, facts.metric)
        rows.append(
            (
                label,
                report["networks"],
                score(report["val"]["with_tta"].get(_key(facts.metric))),
                score(report["test"]["with_tta"].get(_key(facts.metric))),
                "" if low is None else f"{score(low)} to {score(high)}",
            )
        )
    body = table(["refit", "networks", "validation", "test", "95 % of the test"], rows, right=(1, 2, 3))
    note = f"{facts.metric_words}, with the test-time augmentation that validation chose."
    return heading("Submission models") + body + paragraph(_sentence(note), kind="note")


# What to do next ----------------------------------------------------------------------------------------------------


def next_commands(facts: Facts) -> list[str]:
    """What a person may want to type next, ready to copy."""
    found = []
    if facts.unfinished:
        name = shlex.quote(facts.study.name)
        found.append(facts.study.command or f"hpo run {facts.study.space_name} --study {name}")
    if facts.complete and not facts.confirmed:
        found.append(_command(facts, "confirm"))
    if facts.complete and not facts.refits:
        found.append(_command(facts, "refit best --study"))
    if facts.confirmation is not None and facts.confirmed:
        found += unproven(facts.study, facts.confirmation)
    return found


def _command(facts: Facts, what: str) -> str:
    """A command on the study; a password in it is masked, and has to be given again."""
    storage = facts.study.storage_shown
    password = f" --storage {shlex.quote(storage)}" if is_masked(storage) else ""
    return f"hpo {what} {shlex.quote(facts.study.name)}{password}"
