"""What `--patience` saves and what it costs, beside a stop after a number of trials without improvement.

Replays finished trainings in random order, as a search of random draws: every rule reads the same orders. The cost is
the difference between the trial that the whole search would have chosen and the one chosen at the stop, in validation
and test score. A second table compares the estimated chance of a better trial with how often there was one. `curves.py`
has the format of `TABLE`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from common import finish, machine, parser, positive, table
from curves import read

from hpo.space.pruner import rung_epochs
from hpo.study import patience

Rule = Callable[[np.ndarray, float], bool]
"""Whether to stop after these scores, -inf for failed trials, given the standard error of the best."""
RUNGS, KEEP = (0.03, 0.1, 0.3), 0.33  # the defaults of `pruner`


def unimproved(trials: int) -> Rule:
    """Stop when so many trials in a row have not improved the best score."""
    return lambda scores, error: len(scores) - 1 - int(scores.argmax()) >= trials


def unlikely(chance: float) -> Rule:
    """Stop as `--patience` does, at this chance of a better trial."""
    return lambda scores, error: patience.chance_of_better(scores.tolist(), error, len(scores)) < chance


RULES: dict[str, Rule] = {
    **{f"{trials} trials without improvement": unimproved(trials) for trials in (20, 30, 40, 50)},
    **{f"chance below {chance:.0%}": unlikely(chance) for chance in (0.2, 0.15, patience.CHANCE, 0.05)},
}


def error_of(score: float, images: int) -> float:
    """The standard error of an accuracy, as `core.metrics.standard_error` has it."""
    share = (score * images + 1) / (images + 2)
    return math.sqrt(share * (1 - share) / images)


def pruned(curves: np.ndarray) -> np.ndarray:
    """The score with which each training (N, epochs) ends: of those pruned at a rung the one there."""
    ends, complete = curves[:, -1].copy(), np.ones(len(curves), bool)
    for rung in rung_epochs(RUNGS, curves.shape[1]):
        seen: list[float] = []
        for trial in np.flatnonzero(complete):
            seen.append(curves[trial, rung - 1])
            if sum(score > seen[-1] for score in seen) >= math.ceil(KEEP * len(seen) - 1e-9):
                ends[trial], complete[trial] = seen[-1], False
    return np.where(complete, ends, np.minimum(ends, ends[complete].max()))


def calibration(ends: Sequence[np.ndarray], images: int) -> list[list[str]]:
    """How often one of the next trials was better by more than the error, by the estimated chance."""
    found = []
    for order in ends:
        for trials in range(20, len(order) - patience.AHEAD + 1, 5):
            best = float(order[:trials].max())
            error = error_of(best, images)
            better = order[trials : trials + patience.AHEAD].max() > best + error
            found.append((patience.chance_of_better(order[:trials].tolist(), error, trials), better))
    chances, better = map(np.array, zip(*found, strict=True))
    rows = []
    for low, high in pairwise((0.0, 0.05, 0.1, 0.15, 0.2, 1.0)):
        chosen = (chances >= low) & (chances < high)
        rows.append([f"{chances[chosen].mean():.3f}", f"{better[chosen].mean():.3f}", f"{chosen.sum():,}"])
    return rows


def replay(rule: Rule, ends: np.ndarray, tests: np.ndarray, images: int) -> tuple[int, float, float]:
    """The trials until the stop, and the losses of validation and test score."""
    stop = len(ends)
    for trials in range(2, len(ends)):
        if rule(ends[:trials], error_of(float(ends[:trials].max()), images)):
            stop = trials
            break
    chosen, best = ends[:stop].argmax(), ends.argmax()
    return stop, float(ends[best] - ends[chosen]), float(tests[best] - tests[chosen])


def main() -> None:
    arguments = options().parse_args()
    trainings = read(arguments.table, arguments.images)
    curves, tests = trainings.val, trainings.tests
    described, generator = machine(), np.random.default_rng(0)
    orders = [generator.permutation(len(curves))[: arguments.trials] for _ in range(arguments.orders)]
    rows, calibrated = [], []
    for pruner in ("none", "rungs"):
        ends = [curves[order, -1] if pruner == "none" else pruned(curves[order]) for order in orders]
        calibrated += [[pruner, *row] for row in calibration(ends, arguments.images)]
        for name, rule in RULES.items():
            found = [replay(rule, *one, arguments.images) for one in zip(ends, (tests[o] for o in orders), strict=True)]
            stops, val, test = map(np.array, zip(*found, strict=True))
            trials = f"{stops.mean():.0f} ({np.quantile(stops, 0.1):.0f} to {np.quantile(stops, 0.9):.0f})"
            error = 100 * test.std() / math.sqrt(len(test))
            rows.append([pruner, name, trials, f"{100 * val.mean():.2f}", f"{100 * test.mean():.2f} ± {error:.2f}"])
    print(table(["pruner", f"stop of {arguments.trials}", "trials (10 % to 90 %)", "val loss", "test loss"], rows))
    print(f"\n{table(['pruner', 'estimated chance', 'happened', 'cases'], calibrated)}")
    finish("bench_patience", arguments.json, described, rows=rows, calibration=calibrated)


def options() -> argparse.ArgumentParser:
    found = parser(__doc__)
    found.add_argument("table", type=Path, metavar="TABLE", help="gzipped JSON lines")
    found.add_argument("--trials", type=positive, default=100, help="trials of the whole search")
    found.add_argument("--orders", type=positive, default=400, help="random orders")
    found.add_argument("--images", type=positive, default=200, help="validation images of the trainings")
    return found


if __name__ == "__main__":
    main()
