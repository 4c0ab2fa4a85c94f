"""What to refit after a confirmation: only what is proven, or the best bet?

Confirmations are simulated: a replicate's score is the configuration's true score, a part that all replicates share by
the overlap of their splits, and noise of its own. `hpo.confirmation` compares them. `proven` refits the leader if its
interval is above zero, `best bet` if its expected gain is, and otherwise the baseline. `moments` refits it if a moment
estimate of the spread of the true scores is above zero (as in empirical Bayes). `perfect` knows the true scores.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from common import finish, machine, parser, positive, table
from numpy.typing import NDArray

from hpo.confirmation.statistics import compare

BASELINE = "baseline"
SHARE = 0.25
"""Validation images / training images."""
POINT = 0.01
RULES = ("proven", "best bet", "moments", "perfect")

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]
"""True gains over the baseline of so many challengers."""

PRIORS: dict[str, Draw] = {
    "all equal": lambda _, k: np.zeros(k),
    "one is 2 points better, the others equal": lambda _, k: np.r_[2 * POINT, np.zeros(k - 1)],
    "normal, 0 ± 1 points": lambda rng, k: rng.normal(0, POINT, k),
    "normal, 0 ± 3 points": lambda rng, k: rng.normal(0, 3 * POINT, k),
    "normal, +2 ± 2 points": lambda rng, k: rng.normal(2 * POINT, 2 * POINT, k),
    "normal, -2 ± 2 points": lambda rng, k: rng.normal(-2 * POINT, 2 * POINT, k),
}


@dataclass(frozen=True)
class Outcome:
    """Of one simulated confirmation."""

    true: dict[str, float]
    """True gain of what each rule refits."""
    expected: float
    """Stated gain of the leader."""
    leader: float
    """True gain of the leader."""


def simulate(rng: np.random.Generator, gains: NDArray[np.float64], replicates: int, noise: float) -> Outcome:
    true = np.r_[0.0, gains]
    shared = true + rng.normal(0, noise * np.sqrt(SHARE), len(true))
    scores = shared[:, None] + rng.normal(0, noise, (len(true), replicates))
    names = [BASELINE, *(f"trial {number}" for number in range(1, len(true)))]
    found = compare(
        {name: {i: (float(one),) for i, one in enumerate(row)} for name, row in zip(names, scores, strict=True)},
        baseline=BASELINE,
        stopped=(),
        test_share=SHARE,
        maximize=True,
    )
    assert found.leader is not None
    assert found.expected is not None
    leader, bet = (true[names.index(name)] for name in (found.leader, found.winner))
    residuals = scores - scores.mean(1, keepdims=True) - scores.mean(0) + scores.mean()
    own = (residuals**2).sum() / (len(true) - 1) / (replicates - 1) * (1 / replicates + SHARE)
    spread = scores.mean(1).var(ddof=1) > own
    refitted = {
        "proven": leader if found.evidence else 0.0,
        "best bet": bet,
        "moments": bet if spread else 0.0,
        "perfect": true.max(),
    }
    return Outcome({rule: float(gain) for rule, gain in refitted.items()}, found.expected, float(leader))


def row_of(prior: str, challengers: int, replicates: int, found: list[Outcome]) -> list[str]:
    cells = [prior, str(challengers), str(replicates)]
    for rule in RULES:
        gains = [one.true[rule] for one in found]
        worse = statistics.fmean(gain <= -POINT for gain in gains)
        cells.append(f"{100 * statistics.fmean(gains):+.2f}" + (f", {100 * worse:.0f} %" if rule != "perfect" else ""))
    stated, true = (statistics.fmean(getattr(one, name) for one in found) for name in ("expected", "leader"))
    return [*cells, f"{100 * stated:+.2f} / {100 * true:+.2f}"]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--noise", type=float, default=0.02, help="standard deviation of a replicate's score")
    options.add_argument("--challengers", type=positive, nargs="+", default=[1, 4])
    options.add_argument("--replicates", type=positive, nargs="+", default=[5], help="of a configuration")
    options.add_argument("--seed", type=int, default=0)
    options.set_defaults(repeats=2000)
    given = options.parse_args()
    described, rows = machine(), []
    for prior, draw in PRIORS.items():
        for challengers in given.challengers:
            for replicates in given.replicates:
                rng = np.random.default_rng(given.seed)
                found = [simulate(rng, draw(rng, challengers), replicates, given.noise) for _ in range(given.repeats)]
                rows.append(row_of(prior, challengers, replicates, found))
    header = ["true gains over the baseline", "challengers", "n", *RULES, "leader's gain, stated / true"]
    print("mean true gain in points of what is refitted, and how often it is worse than the baseline by a point\n")
    print(table(header, rows))
    finish("bet", given.json, described, rows=rows)


if __name__ == "__main__":
    main()
