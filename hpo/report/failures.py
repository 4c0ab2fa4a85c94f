"""The section on trials that could not be trained, and on interrupted attempts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup
from optuna.trial import FrozenTrial

from core.text import count
from hpo.analysis.failures import FEWEST, Pattern, by_cause, interrupted, pattern_of
from hpo.analysis.study_data import StudyData
from hpo.dashboard.pictures import GREEN, ORANGE, PINK, SKY, YELLOW
from hpo.report.charts import LOOKS, ByParameter, Look, named_rows, spread
from hpo.report.page import Section, figure, heading, note, section, table
from hpo.text import percent, some
from hpo.trials import CRASHES, PAUSED, RESUMED_EPOCH


class _Cause(NamedTuple):
    verb: str
    """In the past tense, for sentences about trials."""
    meaning: str
    look: Look


_CAUSES = {
    "diverged": _Cause(
        "diverged", "the loss became infinite or NaN: most often too high a learning rate", Look(ORANGE, "x")
    ),
    "oom": _Cause(
        "ran out of memory", "the device's memory was too small, even for a small part of a batch", Look(PINK, "square")
    ),
    "invalid": _Cause(
        "were invalid", "these parameters make no valid configuration together", Look(YELLOW, "triangle-up")
    ),
    "crashed": _Cause("crashed", "the process that trained it died, again and again", Look(GREEN, "diamond")),
}


def _cause(name: str) -> _Cause:
    return _CAUSES.get(name, _Cause(name, "", Look(SKY, "cross")))


def failures(data: StudyData) -> Section | None:
    """Failures by cause, their patterns, and interrupted attempts; None before any trial has ended."""
    if not data.finished:
        return None
    causes = by_cause(data)
    recipes = {name: str(result["failure"]) for name, result in data.recipe_runs.items() if "failure" in result}
    patterns = [pattern for cause in causes if (pattern := pattern_of(data, cause)) is not None]
    body: list[str] = [_causes_table(data, causes, recipes)] if causes or recipes else []
    if patterns:
        body.append(heading("Where they occur"))
        for each in patterns:
            words = f"{_pattern_text(each)} (p = {each.p:.2g}, corrected for the number of tests)."
            body += [words, _strip(data, each)]
    elif any(len(trials) >= FEWEST for trials in causes.values()):
        body.append(note("No parameter distinguishes them significantly from the other trials."))
    if attempts := _attempts_text(data):
        body += [heading("Interrupted attempts"), attempts]
    lead = [_lead(data, causes, recipes), *(f"{_pattern_text(each)}." for each in patterns[:1])]
    return section("failures", "Failures", " ".join(lead), body)


def _lead(data: StudyData, causes: Mapping[str, Sequence[FrozenTrial]], recipes: Mapping[str, str]) -> str:
    finished = count(data.finished, "finished trial")
    if not causes and not recipes:
        return f"None: each of the {finished} could be trained until its end, or until it was pruned."
    parts = [f"{len(trials)} {_cause(cause).verb}" for cause, trials in causes.items()]
    trials = f"{len(data.failed)} of {finished} could not be trained: {', '.join(parts)}." if parts else ""
    beside = f"{count(len(recipes), 'recipe')} beside the study could not be trained." if recipes else ""
    return f"{trials} {beside}".strip()


def _causes_table(data: StudyData, causes: Mapping[str, Sequence[FrozenTrial]], recipes: Mapping[str, str]) -> Markup:
    rows: list[Sequence[object]] = [
        (
            cause,
            len(trials),
            percent(len(trials) / data.finished),
            _cause(cause).meaning,
            some("trial", [trial.number for trial in trials], most=12),
        )
        for cause, trials in causes.items()
    ]
    rows += [(cause, "–", "–", _cause(cause).meaning, f"recipe {name}") for name, cause in recipes.items()]
    return table(("cause", "trials", "of all", "meaning", "which"), rows, right=(1, 2))


def _pattern_text(pattern: Pattern) -> str:
    trials = f"Trials that {_cause(pattern.cause).verb}"
    if pattern.choice is None:
        (a,), (b,) = pattern.among_failures, pattern.among_others
        return f"{trials} have a {'higher' if a > b else 'lower'} `{pattern.path}`: median {a:.3g}, others {b:.3g}"
    (a, of), (b, rest) = pattern.among_failures, pattern.among_others
    having = f"{a} of {of} have `{pattern.path}` = {pattern.choice}, of the others {b} of {rest}"
    return f"{trials} differ in `{pattern.path}`: {having}"


def _attempts_text(data: StudyData) -> str:
    attempts = len(interrupted(data))
    resumed = [
        int(trial.user_attrs[RESUMED_EPOCH])
        for trial in data.trials
        if RESUMED_EPOCH in trial.user_attrs and PAUSED not in trial.user_attrs
    ]
    crashes = sum(int(trial.user_attrs.get(CRASHES, 0)) for trial in data.trials)
    parts = [f"{count(attempts, 'attempt')} ended before the trial did"] if attempts else []
    parts += [f"{crashes} of them when their process died"] if crashes else []
    if resumed:
        saved = f"which saved {count(sum(resumed), 'epoch')}"
        parts.append(f"{count(len(resumed), 'trial')} resumed from a checkpoint, {saved}")
    return f"{'; '.join(parts)}." if attempts or resumed else ""


def _strip(data: StudyData, pattern: Pattern) -> Markup:
    """Every trial by the parameter, a row per outcome."""
    chart, causes = ByParameter(data, pattern.path), by_cause(data)
    groups = {name: list(data.states[name]) for name in ("complete", "pruned") if data.states[name]} | causes
    for row, (outcome, every) in enumerate(groups.items()):
        trials, look = chart.having(every), LOOKS[outcome] if outcome not in causes else _cause(outcome).look
        # Trials with the same value are spread over the row.
        chart.add(trials, [row + spread(trial, 1) for trial in trials], look, name=outcome)
    rows = [f"{outcome} ({len(trials)})" for outcome, trials in groups.items()]
    chart.fig.update_layout(showlegend=False, yaxis={"title": "outcome", **named_rows(rows)})
    alt = f"Every trial by {pattern.path}, a row for each outcome"
    return figure(chart.fig, alt=alt, height=130 + 60 * len(rows))
