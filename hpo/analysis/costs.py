"""The cost of a study: training time by kind, what pruning saved, and the parameters that decide the time per epoch.

Time is the sum of the trainings' own `elapsed_s`; the wall clock is shorter if trials ran side by side. Trials imported
from another study are left out: they cost nothing here.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial

from hpo.analysis.study_data import StudyData, read_rows
from hpo.analysis.values import distinct, is_grouped
from hpo.trials import TAKEN_FROM

FEWEST = 8
"""Trials needed to say what decides the time per epoch."""
_MATTERS = 0.1  # a parameter that explains less of the order of the times is not reported
_MOST = 2  # parameters reported


@dataclass(frozen=True)
class Cost:
    """The cost of one kind of training."""

    kind: str
    trainings: int
    epochs: int | None
    """None if unknown here."""
    full_epochs: int | None
    """The epochs of these trainings if none were stopped; None if unknown."""
    seconds: float | None
    """None if unknown here."""


@dataclass(frozen=True)
class Saved:
    """What pruned trials did not train."""

    epochs: int
    seconds: float
    """At each trial's own pace."""


def own(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that this study trained itself."""
    return [trial for trial in trials if TAKEN_FROM not in trial.user_attrs]


def costs_of(data: StudyData) -> list[Cost]:
    """The cost of each kind of training, in the order in which a study runs them; kinds without any are left out."""
    kinds = {state: own(getattr(data, state)) for state in ("complete", "pruned", "failed", "running")}
    found = [_trials_cost(data, f"{state} trials", trials) for state, trials in kinds.items()]
    found.append(_recipes_cost(data))
    if (made := data.confirmation) is not None:
        found.append(Cost("confirmation", made.trainings, made.epochs, None, made.elapsed_s))
    found += [_refit_cost(f"refit {label}", report) for label, report in data.refits.items()]
    return [cost for cost in found if cost.trainings]


def totals(data: StudyData) -> list[Cost]:
    """The same with all trials of the search as one, the first."""
    every = costs_of(data)
    trials = [cost for cost in every if cost.kind.endswith(" trials")]
    return [total("search", trials), *(cost for cost in every if cost not in trials)]


def total(kind: str, costs: Sequence[Cost]) -> Cost:
    """The sum of costs; unknown ones count as 0."""
    return Cost(
        kind,
        sum(cost.trainings for cost in costs),
        sum(cost.epochs or 0 for cost in costs),
        None,
        sum(cost.seconds or 0.0 for cost in costs),
    )


def _trials_cost(data: StudyData, kind: str, trials: Sequence[FrozenTrial]) -> Cost:
    epochs = sum(map(data.epochs, trials))
    return Cost(kind, len(trials), epochs, len(trials) * data.steps, sum(map(data.elapsed_s, trials)))


def _recipes_cost(data: StudyData) -> Cost:
    every = [read_rows(data.study.paths.reference(name).metrics) for name in data.recipe_runs]
    known = [rows for rows in every if rows]
    epochs = sum(map(len, known)) if known else None
    seconds = sum(float(rows[-1]["elapsed_s"]) for rows in known) if known else None
    return Cost("recipes beside the study", len(every), epochs, len(every) * data.steps, seconds)


def _refit_cost(kind: str, report: Mapping[str, Any]) -> Cost:
    # Members with averaged weights are one network, but were several trainings.
    epochs, networks = report.get("epochs"), int(report.get("members") or report.get("networks", 1))
    known = sum(epochs) if isinstance(epochs, list) else None if epochs is None else networks * int(epochs)
    return Cost(kind, networks, known, None, report.get("elapsed_s"))


def saved(data: StudyData) -> Saved:
    """The epochs that pruned trials did not train, and the time that they would have taken."""
    missing = [(data.steps - data.epochs(trial), pace(data, trial)) for trial in own(data.pruned)]
    return Saved(sum(epochs for epochs, _ in missing), sum(epochs * (each or 0.0) for epochs, each in missing))


def pace(data: StudyData, trial: FrozenTrial) -> float | None:
    """A trial's seconds per epoch; None if unknown."""
    epochs, seconds = data.epochs(trial), data.elapsed_s(trial)
    return seconds / epochs if epochs and seconds else None


def paced(data: StudyData) -> list[tuple[FrozenTrial, float]]:
    """The complete and pruned trials with their seconds per epoch, if known."""
    ended = own((*data.complete, *data.pruned))
    return [(trial, each) for trial in ended if (each := pace(data, trial)) is not None]


def wall_clock(data: StudyData) -> tuple[float, float] | None:
    """Seconds from the first start to the last end of a trial, and those in which any ran; None without trials.

    Interrupted attempts count: they took time as well.
    """
    every = own(data.study.optuna.get_trials(deepcopy=False))
    spans = sorted((t.datetime_start, t.datetime_complete) for t in every if t.datetime_start and t.datetime_complete)
    if not spans:
        return None
    busy, until = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, (end - max(start, until)).total_seconds())
        until = max(until, end)
    return (until - spans[0][0]).total_seconds(), busy


def explained(values: Sequence[Any], seconds: Sequence[float]) -> float:
    """The fraction of the variance of the seconds' ranks that the values explain.

    For numbers, the square of Spearman's correlation; for groups, the correlation ratio, less what so many groups
    explain of any numbers by chance (epsilon squared, Kelley 1935).
    """
    from scipy.stats import rankdata, spearmanr

    if len(set(map(repr, values))) < 2 or len(set(seconds)) < 2:
        return 0.0
    if not is_grouped(values):
        return float(spearmanr(values, seconds).statistic) ** 2
    ranks = rankdata(seconds)
    groups = [[r for r, value in zip(ranks, values, strict=True) if value == one] for one in distinct(values)]
    mean, n, k = float(ranks.mean()), len(ranks), len(groups)
    within = sum(sum((r - statistics.fmean(group)) ** 2 for r in group) for group in groups)
    whole = float(((ranks - mean) ** 2).sum())
    return max(0.0, 1 - within / whole * (n - 1) / (n - k)) if n > k else 0.0


def pace_parameters(data: StudyData) -> list[tuple[str, float]]:
    """(parameter, fraction explained) of the parameters that decide the time per epoch, the strongest first."""
    trained = paced(data)
    found = []
    for path in sorted({path for trial, _ in trained for path in trial.params}):
        pairs = [(trial.params[path], seconds) for trial, seconds in trained if path in trial.params]
        if len(pairs) >= FEWEST:
            found.append((path, explained([value for value, _ in pairs], [seconds for _, seconds in pairs])))
    found.sort(key=lambda each: -each[1])
    return [each for each in found if each[1] >= _MATTERS][:_MOST]
