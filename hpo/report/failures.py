"""What could not be trained, why, and where in the space it lies.

A parameter that tells failures apart from other trials is looked for cause by cause, numbers by the rank-sum test of
Mann and Whitney, choices by Fisher's exact test of each against the rest. Many parameters are looked at, so a finding
is only told where it holds after Bonferroni's correction; of fewer than three failures nothing is told at all.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from hpo.analysis.facts import Facts, name_of
from hpo.dashboard.pictures import BLUE, GREEN, GREY, ORANGE, PINK, SKY, YELLOW
from hpo.report.axes import place, set_axis, spread
from hpo.report.page import Section, figure, heading, paragraph, table
from hpo.text import count, percent, short
from hpo.trials import CRASHES, FAILURE, INTERRUPTED, RESUMED_EPOCH

CAUSES = {
    "diverged": "the loss was no number any more: most often too high a learning rate",
    "oom": "the device's memory was too small, even for a small part of a batch",
    "invalid": "these parameters make no configuration together",
    "crashed": "the process that trained it died, again and again",
}
"""A failure's name -> what it means."""
FEWEST = 3
"""Failures of a cause below which a pattern may be luck whatever a test says."""
LEVEL = 0.05


@dataclass(frozen=True)
class Pattern:
    """The parameter that best tells the failures of one cause from the other trials."""

    cause: str
    path: str
    words: str
    p: float
    """After Bonferroni's correction for all that was looked at."""


def failures(facts: Facts) -> Section | None:
    """Failures by cause, attempts that were cut off, and where failures lie; None before any trial has ended."""
    if not facts.finished:
        return None
    causes = by_cause(facts)
    lost = {name: str(result["failure"]) for name, result in facts.references.items() if "failure" in result}
    cut_off = interrupted(facts)
    resumed = [trial for trial in facts.trials if RESUMED_EPOCH in trial.user_attrs]
    patterns = [pattern for cause in causes if (pattern := where(facts, cause)) is not None]
    title = "Failures"
    lead = " ".join(filter(None, (_lead(facts, causes, lost), *(f"{pattern.words}." for pattern in patterns[:1]))))
    body = []
    if causes or lost:
        body.append(_causes_table(facts, causes, lost))
    if patterns:
        body.append(heading("Where they lie"))
        for pattern in patterns:
            body.append(paragraph(f"{pattern.words} (p = {pattern.p:.2g}, corrected for all parameters looked at)."))
            body.append(_strip(facts, pattern))
    elif any(len(trials) >= FEWEST for trials in causes.values()):
        body.append(paragraph("No parameter tells them from the other trials for sure.", kind="note"))
    if cut_off or resumed:
        body += [heading("Attempts that were cut off"), paragraph(_cut_off_words(facts, cut_off, resumed))]
    return Section("failures", title, lead, "\n".join(body))


# What is computed --------------------------------------------------------------------------------------------------


def by_cause(facts: Facts) -> dict[str, list[FrozenTrial]]:
    """Cause -> the trials that failed by it, the most frequent first; what no version of ours names is a cause too."""
    found: dict[str, list[FrozenTrial]] = {}
    for trial in facts.failed:
        found.setdefault(str(trial.user_attrs[FAILURE]), []).append(trial)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def interrupted(facts: Facts) -> list[FrozenTrial]:
    """The attempts that were cut off, by a person or a crash; another one stands for their slot."""
    every = facts.study.optuna.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    return [trial for trial in every if trial.user_attrs.get(INTERRUPTED)]


def where(facts: Facts, cause: str) -> Pattern | None:
    """The parameter that best tells the trials that failed so from those that did not fail; None where none does."""
    bad = [trial for trial in facts.failed if trial.user_attrs[FAILURE] == cause]
    good = [*facts.complete, *facts.pruned]
    if len(bad) < FEWEST or len(good) < FEWEST:
        return None
    found: list[tuple[float, str, str]] = []
    tests = 0
    for path in sorted({path for trial in bad for path in trial.params}):
        theirs = [trial.params[path] for trial in bad if path in trial.params]
        others = [trial.params[path] for trial in good if path in trial.params]
        if len(theirs) < FEWEST or len(others) < FEWEST or len({*map(repr, theirs), *map(repr, others)}) < 2:
            continue
        if isinstance(bad[0].distributions.get(path), CategoricalDistribution):
            for choice in sorted(set(theirs), key=repr):
                tests += 1
                found.append((*_choice_apart(path, choice, theirs, others),))
        else:
            tests += 1
            found.append((*_number_apart(path, theirs, others),))
    if not found:
        return None
    p, path, words = min(found)
    corrected = min(1.0, p * tests)
    return Pattern(cause, path, f"Trials that {_verb(cause)} {words}", corrected) if corrected < LEVEL else None


def _number_apart(path: str, theirs: Sequence[float], others: Sequence[float]) -> tuple[float, str, str]:
    """(p, path, words) of a number's difference."""
    from scipy.stats import mannwhitneyu

    p = float(mannwhitneyu(theirs, others).pvalue)
    a, b = statistics.median(theirs), statistics.median(others)
    return p, path, f"have {'a higher' if a > b else 'a lower'} `{path}`: median {a:.3g}, others {b:.3g}"


def _choice_apart(path: str, choice: Any, theirs: Sequence[Any], others: Sequence[Any]) -> tuple[float, str, str]:
    """(p, path, words) of one choice against the rest."""
    from scipy.stats import fisher_exact

    a, b = theirs.count(choice), others.count(choice)
    p = float(fisher_exact([[a, len(theirs) - a], [b, len(others) - b]]).pvalue)
    often = f"{a} of {len(theirs)} have `{path}` = {choice}, of the others {b} of {len(others)}"
    return p, path, f"differ in `{path}`: {often}"


def _verb(cause: str) -> str:
    return {"oom": "ran out of memory", "invalid": "were invalid"}.get(cause, cause)


# What is shown -----------------------------------------------------------------------------------------------------


def _lead(facts: Facts, causes: Mapping[str, Sequence[FrozenTrial]], lost: Mapping[str, str]) -> str:
    if not causes and not lost:
        return f"None: each of the {count(facts.finished, 'finished trial')} could be trained as far as it was wanted."
    parts = [f"{len(trials)} {_verb(cause)}" for cause, trials in causes.items()]
    failed = sum(map(len, causes.values()))
    words = f"{failed} of {count(facts.finished, 'finished trial')} could not be trained to their end: "
    beside = f"{count(len(lost), 'recipe')} beside the study could not be trained."
    return " ".join(filter(None, (words + ", ".join(parts) + "." if parts else "", beside if lost else "")))


def _causes_table(facts: Facts, causes: Mapping[str, Sequence[FrozenTrial]], lost: Mapping[str, str]) -> str:
    rows: list[Sequence[object]] = [
        (cause, len(trials), percent(len(trials) / facts.finished), CAUSES.get(cause, ""), _numbers(trials))
        for cause, trials in causes.items()
    ]
    rows += [(cause, "–", "–", CAUSES.get(cause, ""), f"recipe {name}") for name, cause in lost.items()]
    return table(("cause", "trials", "of all", "what it means", "which"), rows, right=(1, 2))


def _numbers(trials: Sequence[FrozenTrial], most: int = 12) -> str:
    """The numbers of the first trials."""
    words = ", ".join(str(trial.number) for trial in trials[:most])
    return words + (f" and {len(trials) - most} more" if len(trials) > most else "")


def _cut_off_words(facts: Facts, cut_off: Sequence[FrozenTrial], resumed: Sequence[FrozenTrial]) -> str:
    crashes = sum(int(trial.user_attrs.get(CRASHES, 0)) for trial in facts.trials)
    parts = [f"{count(len(cut_off), 'attempt')} at a trial ended before the trial did"] if cut_off else []
    if crashes:
        parts.append(f"{crashes} of the attempts by the death of their process")
    if resumed:
        epochs = sum(int(trial.user_attrs[RESUMED_EPOCH]) for trial in resumed)
        parts.append(
            f"{count(len(resumed), 'trial')} went on from a checkpoint, which kept {count(epochs, 'epoch')} from being "
            "trained again"
        )
    return "; ".join(parts) + "."


_MARKS = {
    "complete": (BLUE, "circle"),
    "pruned": (GREY, "line-ns-open"),
    "diverged": (ORANGE, "x"),
    "oom": (PINK, "square"),
    "invalid": (YELLOW, "triangle-up"),
    "crashed": (GREEN, "diamond"),
}


def _strip(facts: Facts, pattern: Pattern) -> str:
    """Every trial by the parameter, a row a fate."""
    groups: dict[str, Sequence[FrozenTrial]] = {"complete": facts.complete, "pruned": facts.pruned}
    groups |= by_cause(facts)
    rows = [fate for fate, trials in groups.items() if trials]
    shown = [trial for fate in rows for trial in groups[fate] if pattern.path in trial.params]
    values = [trial.params[pattern.path] for trial in shown]
    fig = go.Figure()
    columns = set_axis(fig, pattern.path, values, shown[0].distributions[pattern.path])
    for row, fate in enumerate(rows):
        color, symbol = _MARKS.get(fate, (SKY, "cross"))
        trials = [trial for trial in groups[fate] if pattern.path in trial.params]
        fig.add_trace(
            go.Scatter(
                x=[place(trial, trial.params[pattern.path], columns) for trial in trials],
                # Another trial of the same value stands beside or below, by its slot; in columns both ways.
                y=[row + 0.5 * spread(trial, turn=2) for trial in trials],
                mode="markers",
                name=fate,
                marker={"color": color, "symbol": symbol, "size": 8},
                text=[f"{name_of(trial)}, {pattern.path} = {short(trial.params[pattern.path])}" for trial in trials],
                hovertemplate="%{text}<extra></extra>",
            )
        )
    fig.update_layout(
        showlegend=False,
        yaxis={
            "title": "what became of the trial",
            "tickvals": list(range(len(rows))),
            "ticktext": [f"{fate} ({len(groups[fate])})" for fate in rows],
            "range": [-0.6, len(rows) - 0.4],
        },
    )
    return figure(fig, alt=f"Every trial by {pattern.path}, a row for each fate", height=130 + 60 * len(rows))
