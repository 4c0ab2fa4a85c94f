"""The cost of a study: training time by kind, what pruning saved, and the parameters that decide the time per epoch.

Time is the sum of the trainings' own `elapsed_s`. Trials imported from another study cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from typing import Any, NamedTuple

from optuna.trial import FrozenTrial

from hpo.analysis.study_data import StudyData, value_of
from hpo.study.results import read_rows
from hpo.trials import TAKEN_FROM

FEWEST = 8
"""Trials needed to say what decides the time per epoch."""
_MATTERS = 0.1  # a parameter that explains less of the order of the times is not reported
_MOST = 2  # parameters reported
_GROUPED_UP_TO = 8  # numbers with so few different values are treated as groups, as choices are


@dataclass(frozen=True)
class Cost:
    """The cost of one kind of training; None where it is unknown on this machine."""

    kind: str
    trainings: int
    epochs: int | None
    seconds: float | None
    full_epochs: int | None = None
    """The epochs of these trainings if none were stopped."""


class Saved(NamedTuple):
    """What pruned trials did not train."""

    epochs: int
    seconds: float


class Progress(NamedTuple):
    """The best value so far at each complete trial."""

    trials: list[int]
    """Numbers."""
    spent: list[float]
    """By all trials, up to this one."""
    best: list[float]
    total: float


def own(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that this study trained itself."""
    return [trial for trial in trials if TAKEN_FROM not in trial.user_attrs]


def costs_of(data: StudyData) -> list[Cost]:
    """The cost of each kind of training, in chronological order."""
    found = [_trials_cost(data, f"{state} trials", own(trials)) for state, trials in data.states.items()]
    found.append(_recipes_cost(data))
    if (made := data.confirmation) is not None:
        found.append(Cost("confirmation", made.trainings, made.epochs, made.elapsed_s))
    found += [_refit_cost(f"refit {label}", report) for label, report in data.refits.items()]
    return [cost for cost in found if cost.trainings]


def totals(data: StudyData) -> list[Cost]:
    """The same with all trials of the search as one, the first."""
    every = costs_of(data)
    trials = [cost for cost in every if cost.kind.endswith(" trials")]
    return [total("search", trials), *(cost for cost in every if cost not in trials)]


def total(kind: str, costs: Sequence[Cost]) -> Cost:
    """The sum of costs; unknown ones count as 0."""
    epochs, seconds = sum(cost.epochs or 0 for cost in costs), sum(cost.seconds or 0.0 for cost in costs)
    return Cost(kind, sum(cost.trainings for cost in costs), epochs, seconds)


def _trials_cost(data: StudyData, kind: str, trials: Sequence[FrozenTrial]) -> Cost:
    epochs, seconds = sum(map(data.epochs, trials)), sum(map(data.elapsed_s, trials))
    return Cost(kind, len(trials), epochs, seconds, len(trials) * data.steps)


def _recipes_cost(data: StudyData) -> Cost:
    every = [read_rows(data.study.paths.reference(name).metrics) for name in data.recipe_runs]
    known = [rows for rows in every if rows]
    epochs = sum(map(len, known)) if known else None
    seconds = sum(float(rows[-1]["elapsed_s"]) for rows in known) if known else None
    return Cost("recipes beside the study", len(every), epochs, seconds, len(every) * data.steps)


def _refit_cost(kind: str, report: Mapping[str, Any]) -> Cost:
    # Members with averaged weights are one network, but were several trainings.
    epochs, networks = report.get("epochs"), int(report.get("members") or report.get("networks", 1))
    known = sum(epochs) if isinstance(epochs, list) else None if epochs is None else networks * int(epochs)
    return Cost(kind, networks, known, report.get("elapsed_s"))


def saved(data: StudyData) -> Saved:
    """The epochs that pruned trials did not train, and their time."""
    missing = [(data.steps - data.epochs(trial), pace(data, trial)) for trial in own(data.pruned)]
    return Saved(sum(epochs for epochs, _ in missing), sum(epochs * (each or 0.0) for epochs, each in missing))


def progress(data: StudyData, cost: Callable[[FrozenTrial], float] = lambda _: 1.0) -> Progress:
    """The best value so far over a cost, by default the number of trials."""
    begun = sorted((trial for trials in data.states.values() for trial in trials), key=lambda trial: trial.number)
    spent = list(accumulate(map(cost, begun)))
    ended = [(so_far, trial) for so_far, trial in zip(spent, begun, strict=True) if trial in data.complete]
    best = list(accumulate((value_of(trial) for _, trial in ended), max if data.maximize else min))
    return Progress([trial.number for _, trial in ended], [so_far for so_far, _ in ended], best, spent[-1])


# Time ---------------------------------------------------------------------------------------------------------------


def wall_clock(data: StudyData) -> tuple[float, float] | None:
    """Seconds from the first start to the last end of an attempt, and those in which any ran; None without trials."""
    every = own(data.study.optuna.get_trials(deepcopy=False))
    spans = [(t.datetime_start, t.datetime_complete) for t in every if t.datetime_start and t.datetime_complete]
    if not spans:
        return None
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    return (last - first).total_seconds(), covered_s(spans, first, last)


def covered_s(spans: Iterable[tuple[datetime, datetime]], begin: datetime, end: datetime) -> float:
    """The seconds from `begin` to `end` that the spans cover together."""
    seconds, reached = 0.0, begin
    for start, stop in sorted(spans):
        seconds += max(0.0, (min(stop, end) - max(start, reached)).total_seconds())
        reached = max(reached, stop)
    return seconds


def pace(data: StudyData, trial: FrozenTrial) -> float | None:
    """A trial's seconds per epoch; None if unknown."""
    epochs, seconds = data.epochs(trial), data.elapsed_s(trial)
    return seconds / epochs if epochs and seconds else None


def paced(data: StudyData) -> list[tuple[FrozenTrial, float]]:
    """The complete and pruned trials with their seconds per epoch, if known."""
    ended = own((*data.complete, *data.pruned))
    return [(trial, each) for trial in ended if (each := pace(data, trial)) is not None]


def pace_parameters(data: StudyData) -> list[tuple[str, float]]:
    """(parameter, fraction explained) of the time per epoch, the strongest first."""
    trained = paced(data)
    found = []
    for path in sorted({path for trial, _ in trained for path in trial.params}):
        pairs = [(trial.params[path], seconds) for trial, seconds in trained if path in trial.params]
        if len(pairs) >= FEWEST:
            found.append((path, explained([value for value, _ in pairs], [seconds for _, seconds in pairs])))
    found.sort(key=lambda each: -each[1])
    return [each for each in found if each[1] >= _MATTERS][:_MOST]


def explained(values: Sequence[Any], seconds: Sequence[float]) -> float:
    """The fraction of the variance of the seconds' ranks that the values explain.

    For numbers, the square of Spearman's correlation; for groups, epsilon squared (Kelley 1935) from Kruskal's H.
    """
    from scipy.stats import kruskal, spearmanr

    groups: dict[Any, list[float]] = {}
    for value, each in zip(values, seconds, strict=True):
        groups.setdefault(value, []).append(each)
    n, k = len(seconds), len(groups)
    if k < 2 or len(set(seconds)) < 2:
        return 0.0
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if numbers and k > _GROUPED_UP_TO:
        return float(spearmanr(values, seconds).statistic) ** 2
    return max(0.0, (float(kruskal(*groups.values()).statistic) - k + 1) / (n - k)) if n > k else 0.0
