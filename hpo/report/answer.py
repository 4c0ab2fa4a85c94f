"""The first section: is it better than the baseline, how certain is that, and what did it cost?

The best of many noisy scores is partly luck, so the search's own best score is no answer: without a confirmation, the
section states that there is none, with the command for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from core.config import TrainConfig
from core.text import count
from hpo.analysis.costs import saved, totals
from hpo.analysis.kinds import best_of_kinds
from hpo.analysis.outputs import Refit, refits
from hpo.analysis.study_data import StudyData
from hpo.confirmation.result import BASELINE
from hpo.confirmation.words import NO_GAIN
from hpo.confirmation.words import score as interval_score
from hpo.report.page import Section, code, columns, heading, note, paragraph, section, table, tiles
from hpo.report.words import command, kinds_text, metric_label, outdated, resuming, trial_name, unproven
from hpo.text import changed_fields, difference, duration, gap, number, percent, score, sentence, together

Tile = tuple[str, str, Sequence[str]]
"""A question, its answer in large letters, and lines below."""


def answer(data: StudyData) -> Section:
    """The answer, its evidence, and the next commands."""
    commands = next_commands(data)
    return section(
        "answer",
        "The answer",
        verdict(data).replace(" ± ", together(" ± ")),
        [paragraph(words, kind="warning") for words in warnings_of(data)],
        _kinds(data),
        tiles([_better(data), _certain(data), _cost(data), *_test(data)]),
        columns(_configuration(data), _refits(data)),
        [heading("Next"), code("\n".join(commands))] if commands else [],
    )


def verdict(data: StudyData) -> str:
    """The answer in one sentence."""
    label = metric_label(data.metric)
    if data.confirmation is not None:
        made = data.confirmation
        if made.leader != made.winner:
            return f"{sentence(made.verdict)}."
        lead = "Tuning helped" if made.evidence else sentence(made.contender(made.winner).name)
        return f"{lead}: {label} {made.verdict}."
    if data.best is None:
        return "No trial is complete yet, so there is nothing to compare."
    best = f"validation {label} {score(data.best.value)}"
    if data.best is data.baseline:
        alone = data.finished == 1
        nothing = "Only the baseline was trained" if alone else "The search found nothing better than the baseline"
        return f"{nothing}: {best}."
    gain = data.best_gain
    if gain is None:
        lead = "and the baseline is not trained, so there is no comparison"
    else:
        lead = f"{difference(data.metric, gain)} over the baseline" if gain else "the same as the baseline"
    return f"Not confirmed: {trial_name(data.best)} scores best, {best}, {lead}."


def warnings_of(data: StudyData) -> list[str]:
    """Warnings to read before the answer: that the study is running, or results are older than its last trials."""
    found, made = [], data.confirmation
    if data.running or data.unfinished:
        total = max(data.study.total or 0, data.finished)
        counts = data.study.counts()
        alive = counts.running - counts.dead
        state = f"{count(alive, 'trial')} running" if alive else "none running now"
        paused = f", {len(data.paused):,} paused at a rung" if data.paused else ""
        found.append(f"The search is not over: {data.finished} of {count(total, 'trial')} finished{paused}, {state}.")
    if made is not None and not data.confirmed:
        found.append(outdated(data.study, made, data.finished))
    model = data.refits.get("best")
    if model is not None and made is not None and data.confirmed:
        winner = made.contender(made.winner)
        by = "recipe" if winner.trial is None else "trial"
        if model.get(by) != getattr(winner, by):
            found.append(
                f"The submission model `best` is of {Refit('best', model).origin}, and the winner is {winner.name}; "
                f"`{command(data.study, 'refit best --study')}` replaces it."
            )
    return found


def next_commands(data: StudyData) -> list[str]:
    """The commands that are missing for a complete answer, ready to copy."""
    found = [resuming(data.study)] if data.unfinished else []
    if data.complete and not data.confirmed:
        found.append(command(data.study, "confirm"))
    if data.complete and not data.refits:
        found.append(command(data.study, "refit best --study"))
    if data.confirmation is not None and data.confirmed:
        found += unproven(data.study, data.confirmation)
    return found


def confirmed_text(data: StudyData) -> str:
    """The confirmed winner's score, for a cell of a table."""
    if data.confirmation is None:
        return "not confirmed"
    winner = data.confirmation.contender(data.confirmation.winner)
    stale = "" if data.confirmed else "; older than the study"
    return f"{interval_score(winner.interval)}, {winner.name}{stale}"


def tested_text(data: StudyData) -> str:
    """The refit's score on the test images, for a cell of a table."""
    for refit in refits(data)[:1]:
        interval = _interval(refit, data.metric, " to ")
        return f"{score(refit.score('test', data.metric))}{interval and f' ({interval})'}, refit {refit.label}"
    return "no refit"


def _interval(refit: Refit, metric: str, between: str) -> str:
    """The bounds of the test score's interval; empty if there is none."""
    return between.join(map(score, refit.interval(metric) or ()))


def _kinds(data: StudyData) -> Markup:
    """Which of probe, fine-tuning and training from scratch is best, and by how much."""
    confirmation = data.confirmation if data.confirmed else None
    lines = kinds_text(best_of_kinds(data.study, confirmation), data.metric)
    return paragraph(f"The best of each kind, {'; '.join(lines)}.") if lines else Markup("")


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
    expected = "" if made.expected is None else f" Expected are {difference(data.metric, made.expected)}."
    return question, "Not proven", [f"{size}: {over}.{expected} The winner is {winner}."]


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
        flattering = f"was flattering: confirmed, it is {size} worse"
        honest = f"did not flatter: confirmed, it is {size} better"
        what = f"The search's own best score, {score(best.search_value)},"
        lines.append(f"{what} {flattering if made.optimism > 0 else honest}.")
    return question, f"95 %, n = {n}" if made.evidence else f"n = {n}", lines


def _cost(data: StudyData) -> Tile:
    costs = totals(data)
    times = [f"{cost.kind} {together(duration(cost.seconds))}" for cost in costs if cost.seconds is not None]
    trainings = count(sum(cost.trainings for cost in costs), "training")
    epochs = count(sum(cost.epochs or 0 for cost in costs), "epoch")
    devices = f", on {', '.join(data.devices)}" if data.devices else ""
    lines = [f"{sentence(', '.join(times))}.", f"{trainings}, {epochs} in all{devices}."]
    if (less := saved(data)).epochs:
        share = less.epochs / (less.epochs + (costs[0].epochs or 0))
        lines.append(f"Pruning saved {count(less.epochs, 'epoch')}, {percent(share)} of the search.")
    return "What did it cost?", f"{duration(sum(cost.seconds or 0.0 for cost in costs))} of training", lines


def _test(data: StudyData) -> list[Tile]:
    return [_tested(data, refit) for refit in refits(data)[:1]]


def _tested(data: StudyData, refit: Refit) -> Tile:
    test, interval = refit.report["test"], _interval(refit, data.metric, " and ")
    what = f"{metric_label(data.metric)} of the refit `{refit.label}`, {refit.origin}, on {test['images']:,} images"
    opened = "once" if test["opened"] == 1 else f"{test['opened']} times"
    lines = [f"{what}{interval and f', 95 % between {interval}'}.", f"The test set was opened {opened}."]
    return "On the test images", score(refit.score("test", data.metric)), lines


# Evidence -----------------------------------------------------------------------------------------------------------


def _configuration(data: StudyData) -> Markup:
    """The winner's changes of the baseline; if there are none, the leader's as well."""
    base, made = _flat(data.study.metadata["base"]), data.confirmation
    title = heading("The configuration")
    if made is not None:
        shown = [made.contender(key) for key in dict.fromkeys((made.winner, made.leader)) if key is not None]
        body = [_changes(each.name, base, _flat(each.config), wins=each.key == made.winner) for each in shown]
        return title + Markup("").join(body if shown[0].key == BASELINE else body[:1])
    if data.best is None:
        return Markup("")
    return title + _changes(trial_name(data.best), base, data.study.config_of(data.best).flat(), wins=True)


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
    return [(path, _shown(value), _shown(other)) for path, value, other in changed_fields(base, config)]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return "off" if value is None else str(value)


def _refits(data: StudyData) -> Markup:
    rows = [
        (
            refit.label,
            refit.report["networks"],
            *(score(refit.score(part, data.metric)) for part in ("val", "test")),
            _interval(refit, data.metric, " to "),
        )
        for refit in refits(data)
    ]
    if not rows:
        return Markup("")
    words = f"{sentence(metric_label(data.metric))}, with the test-time augmentation that validation chose."
    body = table(["refit", "networks", "validation", "test", "95 % of the test"], rows, right=(1, 2, 3))
    return heading("Submission models") + body + note(words)
