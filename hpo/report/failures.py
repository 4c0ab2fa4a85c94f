"""The section on trials that could not be trained, and on interrupted attempts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from markupsafe import Markup
from optuna.trial import FrozenTrial

from hpo.analysis.failures import FEWEST, Pattern, by_cause, interrupted, pattern_of
from hpo.analysis.study_data import StudyData
from hpo.dashboard.pictures import BLUE, GREEN, GREY, ORANGE, PINK, SKY, YELLOW
from hpo.report.charts import Look, marks, place, set_axis, spread
from hpo.report.page import Section, figure, heading, paragraph, section, table
from hpo.report.words import trial_name
from hpo.text import count, percent, short, some
from hpo.trials import CRASHES, RESUMED_EPOCH

_MEANINGS = {
    "diverged": "the loss became infinite or NaN: most often too high a learning rate",
    "oom": "the device's memory was too small, even for a small part of a batch",
    "invalid": "these parameters make no valid configuration together",
    "crashed": "the process that trained it died, again and again",
}
_VERBS = {"oom": "ran out of memory", "invalid": "were invalid"}
_LOOKS = {
    "complete": (BLUE, "circle"),
    "pruned": (GREY, "line-ns-open"),
    "diverged": (ORANGE, "x"),
    "oom": (PINK, "square"),
    "invalid": (YELLOW, "triangle-up"),
    "crashed": (GREEN, "diamond"),
}


def failures(data: StudyData) -> Section | None:
    """Failures by cause, their patterns, and interrupted attempts; None before any trial has ended."""
    if not data.finished:
        return None
    causes = by_cause(data)
    recipes = {name: str(result["failure"]) for name, result in data.recipe_runs.items() if "failure" in result}
    patterns = [pattern for cause in causes if (pattern := pattern_of(data, cause)) is not None]
    body = [_causes_table(data, causes, recipes)] if causes or recipes else []
    if patterns:
        body.append(heading("Where they occur"))
        for each in patterns:
            words = f"{_pattern_text(each)} (p = {each.p:.2g}, corrected for the number of tests)."
            body += [paragraph(words), _strip(data, each)]
    elif any(len(trials) >= FEWEST for trials in causes.values()):
        body.append(paragraph("No parameter distinguishes them significantly from the other trials.", kind="note"))
    if attempts := _attempts_text(data):
        body += [heading("Interrupted attempts"), paragraph(attempts)]
    lead = [_lead(data, causes, recipes), *(f"{_pattern_text(each)}." for each in patterns[:1])]
    return section("failures", "Failures", " ".join(filter(None, lead)), body)


def _lead(data: StudyData, causes: Mapping[str, Sequence[FrozenTrial]], recipes: Mapping[str, str]) -> str:
    finished = count(data.finished, "finished trial")
    if not causes and not recipes:
        return f"None: each of the {finished} could be trained until its end, or until it was pruned."
    parts = [f"{len(trials)} {_VERBS.get(cause, cause)}" for cause, trials in causes.items()]
    trials = f"{len(data.failed)} of {finished} could not be trained: {', '.join(parts)}." if parts else ""
    beside = f"{count(len(recipes), 'recipe')} beside the study could not be trained." if recipes else ""
    return f"{trials} {beside}".strip()


def _causes_table(data: StudyData, causes: Mapping[str, Sequence[FrozenTrial]], recipes: Mapping[str, str]) -> Markup:
    rows: list[Sequence[object]] = [
        (
            cause,
            len(trials),
            percent(len(trials) / data.finished),
            _MEANINGS.get(cause, ""),
            some("trial", [trial.number for trial in trials], most=12),
        )
        for cause, trials in causes.items()
    ]
    rows += [(cause, "–", "–", _MEANINGS.get(cause, ""), f"recipe {name}") for name, cause in recipes.items()]
    return table(("cause", "trials", "of all", "meaning", "which"), rows, right=(1, 2))


def _pattern_text(pattern: Pattern) -> str:
    trials = f"Trials that {_VERBS.get(pattern.cause, pattern.cause)}"
    if pattern.choice is None:
        (a,), (b,) = pattern.among_failures, pattern.among_others
        return f"{trials} have a {'higher' if a > b else 'lower'} `{pattern.path}`: median {a:.3g}, others {b:.3g}"
    (a, of), (b, rest) = pattern.among_failures, pattern.among_others
    having = f"{a} of {of} have `{pattern.path}` = {pattern.choice}, of the others {b} of {rest}"
    return f"{trials} differ in `{pattern.path}`: {having}"


def _attempts_text(data: StudyData) -> str:
    attempts = len(interrupted(data))
    resumed = [int(trial.user_attrs[RESUMED_EPOCH]) for trial in data.trials if RESUMED_EPOCH in trial.user_attrs]
    if not attempts and not resumed:
        return ""
    crashes = sum(int(trial.user_attrs.get(CRASHES, 0)) for trial in data.trials)
    parts = [f"{count(attempts, 'attempt')} ended before the trial did"] if attempts else []
    parts += [f"{crashes} of them when their process died"] if crashes else []
    if resumed:
        saved = f"which saved {count(sum(resumed), 'epoch')}"
        parts.append(f"{count(len(resumed), 'trial')} resumed from a checkpoint, {saved}")
    return "; ".join(parts) + "."


def _strip(data: StudyData, pattern: Pattern) -> Markup:
    """Every trial by the parameter, a row per outcome."""
    path = pattern.path
    groups: dict[str, Sequence[FrozenTrial]] = {"complete": data.complete, "pruned": data.pruned, **by_cause(data)}
    groups = {outcome: trials for outcome, trials in groups.items() if trials}
    shown = [trial for trials in groups.values() for trial in trials if path in trial.params]
    fig = go.Figure()
    columns = set_axis(fig, path, [trial.params[path] for trial in shown], shown[0].distributions[path])
    for row, (outcome, every) in enumerate(groups.items()):
        trials = [trial for trial in every if path in trial.params]
        color, symbol = _LOOKS.get(outcome, (SKY, "cross"))
        x = [place(trial, trial.params[path], columns) for trial in trials]
        # Trials with the same value are spread over the row; in columns both ways.
        y = [row + 0.5 * spread(trial, turn=2) for trial in trials]
        text = [f"{trial_name(trial)}, {path} = {short(trial.params[path])}" for trial in trials]
        outline = 1.2 if symbol.endswith("open") else 0
        fig.add_trace(marks(x, y, "%{text}", Look(color, symbol, outline=outline), name=outcome, text=text))
    rows = [f"{outcome} ({len(trials)})" for outcome, trials in groups.items()]
    axis = {"title": "outcome", "tickvals": list(range(len(rows))), "ticktext": rows, "range": [-0.6, len(rows) - 0.4]}
    fig.update_layout(showlegend=False, yaxis=axis)
    return figure(fig, alt=f"Every trial by {path}, a row for each outcome", height=130 + 60 * len(rows))
