"""Simulated confirmations: what a budget of trainings proves and picks, by rule.

Each begins with a search of 40 trials, whose scores have the noise of one training on one split. The best are the
finalists. In the races after it, scores have the correlations that `effective_share` corrects: 0.2 across the repeats
of a 5-fold, and half of it within one. `hpo.confirmation.statistics` compares them, as in `hpo confirm`.

`before` is the rule of an earlier version: the favourite and the baseline five times each, then more configurations,
each five times, and a challenger leaves by a 90 % test that is not corrected for the number of looks. `from the start`
races five finalists and the baseline at any budget.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import table
from numpy.typing import NDArray

from hpo.confirmation.statistics import (
    FIRST_REPLICATES,
    MAX_CANDIDATES,
    MAX_REPLICATES,
    MIN_REPLICATES,
    Allocation,
    Scores,
    allocate,
    cannot_win,
    compare,
    corrected_interval,
    effective_share,
    paired,
)

BASELINE = "baseline"
TRIALS, NOISE, POINT = 40, 0.02, 0.01
PER_REPEAT, SHARE = 5, 0.25
HOW: dict[str, Any] = {"test_share": SHARE, "maximize": True, "per_repeat": PER_REPEAT}

Draw = Callable[[np.random.Generator], NDArray[np.float64]]
"""True gains over the baseline of all trials of a search."""


def planted(points: float) -> Draw:
    return lambda _: np.r_[points * POINT, np.zeros(TRIALS - 1)]


PRIORS: dict[str, Draw] = {
    "none": planted(0),
    "1 point": planted(1),
    "2 points": planted(2),
    "5 points": planted(5),
    "all normal, -1 ± 2": lambda rng: rng.normal(-POINT, 2 * POINT, TRIALS),
}


def allocate_before(*, budget_trainings: int, candidates: int) -> Allocation:
    chosen = min(2, candidates)
    replicates = max(3, min(5, budget_trainings // chosen))
    if replicates == 5:
        chosen = max(chosen, min(8, candidates, budget_trainings // 5))
        replicates = min(10, budget_trainings // chosen)
    return Allocation(chosen, replicates)


def cannot_win_before(candidate: Scores, others: dict[str, Scores], **_: Any) -> str | None:
    leads = [paired(scores, candidate) for scores in others.values()]
    leads = [lead for lead in leads if lead.replicates >= MIN_REPLICATES]
    if not leads:
        return None
    most = max(leads, key=lambda lead: lead.mean)
    share = effective_share(most.numbers, test_share=SHARE, per_repeat=PER_REPEAT)
    return "behind" if corrected_interval(most.values, test_share=share, confidence=0.8).low > 0 else None


def allocate_all(*, budget_trainings: int, candidates: int) -> Allocation:
    chosen = min(MAX_CANDIDATES, candidates, budget_trainings)
    return Allocation(chosen, min(FIRST_REPLICATES, budget_trainings // chosen))


RULES: dict[str, tuple[Callable[..., Allocation], Callable[..., str | None]]] = {
    "before": (allocate_before, cannot_win_before),
    "now": (allocate, cannot_win),
    "from the start": (allocate_all, cannot_win),
}


@dataclass(frozen=True)
class Outcome:
    """Of one simulated confirmation."""

    claims: bool
    leader: float
    """True gain of the leader; 0 without one."""
    picked: float
    """True gain of what is refitted."""
    best_left: bool
    """Whether the best of those that were trained left the race."""


def correlated() -> NDArray[np.float64]:
    """Cholesky factor (replicates, replicates) of the correlations."""
    across = SHARE / (1 + SHARE)
    repeat = np.arange(MAX_REPLICATES) // PER_REPEAT
    found = np.where(repeat[:, None] == repeat, across / 2, across)
    np.fill_diagonal(found, 1.0)
    return np.linalg.cholesky(found)


FACTOR = correlated()


def finalists(rng: np.random.Generator, draw: Draw, count: int) -> NDArray[np.float64]:
    """True gains (count,) of the best trials of a search, the best score first; a planted gain is among them."""
    while True:
        gains = draw(rng)
        order = np.argsort(-(gains + rng.normal(0, NOISE, TRIALS)))[:count]
        if 0 in order or gains[1:].any() or not gains[0]:
            return gains[order]


def simulate(rng: np.random.Generator, gains: NDArray[np.float64], budget: int, rule: str) -> Outcome:
    allocated, leaves = RULES[rule]
    plan = allocated(budget_trainings=budget, candidates=len(gains) + 1)
    true = np.r_[0.0, gains][: plan.candidates]
    drawn = true[:, None] + NOISE * rng.normal(size=(len(gains) + 1, MAX_REPLICATES))[: len(true)] @ FACTOR.T
    names = [BASELINE, *(f"trial {number}" for number in range(1, len(true)))]
    found: dict[str, dict[int, tuple[float, ...]]] = {name: {} for name in names}
    running, left = names, plan.trainings
    for replicate in range(MAX_REPLICATES):
        if not 2 <= len(running) <= left:
            break
        left -= len(running)
        for name in running:
            found[name][replicate] = (float(drawn[names.index(name), replicate]),)
        rivals = {name: found[name] for name in running}
        running = [
            name
            for name in running
            if name == BASELINE
            or leaves(found[name], {key: one for key, one in rivals.items() if key != name}, **HOW) is None
        ]
    result = compare(found, baseline=BASELINE, stopped=set(names) - set(running), **HOW)
    truth = dict(zip(names, map(float, true), strict=True))
    best = names[int(true.argmax())]
    return Outcome(
        result.evidence, truth.get(result.leader or BASELINE, 0.0), truth[result.winner], best not in running
    )


def row_of(found: list[Outcome]) -> str:
    """`power, false wins, mean true gain`."""
    power = statistics.fmean(one.claims and one.leader > 0 for one in found)
    false = statistics.fmean(one.claims and one.leader <= 0 for one in found)
    return f"{100 * power:.0f} %, {100 * false:.1f} %, {100 * statistics.fmean(one.picked for one in found):+.2f}"


def simulations(repeats: int, counts: list[int], budgets: list[int]) -> tuple[str, float]:
    """Simulate all rules. Returns the table, and how often the rule of today stops the best of several."""
    rows, left = [], []
    for count in counts:
        for prior, draw in PRIORS.items():
            for rule in RULES:
                cells = []
                for budget in budgets:
                    rng = np.random.default_rng(0)  # of every rule the same searches and scores
                    found = [simulate(rng, finalists(rng, draw, count), budget, rule) for _ in range(repeats)]
                    cells.append(row_of(found))
                    left += [one.best_left for one in found if rule == "now" and prior != "none"]
                rows.append([str(count), prior, rule, *cells])
                print(" | ".join(rows[-1]), flush=True)
    header = ["finalists", "gain", "rule", *(f"{budget} trainings" for budget in budgets)]
    return table(header, rows), statistics.fmean(left)
