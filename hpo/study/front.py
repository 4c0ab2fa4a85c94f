"""The trials that no other beats in score and costs, and the choice of one by its costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optuna.trial import TrialState

from hpo.errors import StudyError
from hpo.space.grammar import COSTS as KNOWN
from hpo.space.grammar import cost_bound
from hpo.study.study import Study
from hpo.text import joined
from hpo.trials import COSTS, best_first, effective_trials


@dataclass(frozen=True)
class Point:
    """A complete trial with its score and costs."""

    trial: int
    value: float
    costs: dict[str, float]

    def beats(self, other: Point, sign: int) -> bool:
        """Return whether it is as good as another in everything and better in something."""
        ours, theirs = ([-sign * each.value, *each.costs.values()] for each in (self, other))
        return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


def points(study: Study) -> list[Point]:
    """Return the complete trials whose costs were measured, the best score first, with the costs that all have."""
    trials = effective_trials(study.optuna.get_trials(deepcopy=False)).values()
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.user_attrs.get(COSTS)]
    names = [name for name in KNOWN if all(name in trial.user_attrs[COSTS] for trial in complete)]
    ranked = sorted(complete, key=lambda trial: best_first(trial, study.sign))
    return [
        Point(trial.number, trial.value, {name: trial.user_attrs[COSTS][name] for name in names})
        for trial in ranked
        if trial.value is not None and names
    ]


def front(found: Sequence[Point], sign: int) -> list[Point]:
    """Return the Pareto front: the points that no other beats, in the given order."""
    return [point for point in found if not any(other.beats(point, sign) for other in found)]


@dataclass(frozen=True)
class FrontTable:
    """The Pareto front of a study as text."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """The number, score and costs of each trial, the best score first."""


def front_table(study: Study) -> FrontTable | None:
    """Return the Pareto front; None without measured costs."""
    found = front(points(study), study.sign)
    if not found:
        return None
    names = tuple(found[0].costs)
    return FrontTable(
        f"Pareto front: no trial beats these in {joined([study.metric, *names])}",
        ("trial", study.metric, *names),
        tuple((str(p.trial), f"{p.value:.4f}", *(shown(name, p.costs[name]) for name in names)) for p in found),
    )


def select(study: Study, words: str, within: float | None) -> Point:
    """Return the best trial below a bound, or the cheapest of those `within` a distance of the best score.

    The cheapest is that of the first measured cost, of `params`, `latency` and `size`.

    Raises:
        StudyError: No trial has measured costs, or none is below the bound.
    """
    found, bound = points(study), cost_bound(words)
    name = bound[0] if bound else next(iter(found[0].costs)) if found else KNOWN[0]
    if not found or name not in found[0].costs:
        raise StudyError(
            f"hpo refit {words}: {name} was not measured in study {study.name}; give the space "
            f"objective: {{metrics: [{study.metric}, {name}]}}, and run more trials"
        )
    if bound:
        below = [point for point in found if point.costs[name] < bound[1]]
        if not below:
            least = min(point.costs[name] for point in found)
            raise StudyError(f"hpo refit {words}: no complete trial is below; the least is {shown(name, least)}")
        return below[0]
    assert within is not None, "the command checks it"
    near = [point for point in found if study.sign * (found[0].value - point.value) <= within + 1e-12]
    return min(near, key=lambda point: point.costs[name])


def shown(name: str, cost: float) -> str:
    """Format a cost with its unit: `12,345`, `0.12 ms`, `3.4 MB`."""
    return f"{cost:,.0f}" if name == "params" else f"{cost:.3g} {'ms' if name == 'latency' else 'MB'}"
