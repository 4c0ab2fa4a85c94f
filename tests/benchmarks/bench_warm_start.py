"""What a search gains from configurations that were good on other images.

The same random configurations of `scratch` are trained on each set of `bench_live.py`, with its network, epochs and
numbers of images, each once. A search of the target set then tries, after the baseline:

- random: configurations in random order;
- of one set: the best of the other set by its validation images, the best first, as `--warm-start` queues them;
- portfolio: configurations that cover the other sets, each the one that raises the mean over these sets of the best
  validation accuracy so far the most (greedy coverage), as a shipped list of configurations would be.

Its result is the test accuracy of the best of those tried by validation accuracy. The mean for random order is exact.
Intervals are 95 % of a bootstrap over the configurations. `--json` has every training at once; `--table` reads it.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from bench_live import CPU, SHARED, SIDE, SUBJECTS, Live, divide, space_of
from bench_search import Own
from common import finish, machine, parser, positive, table
from numpy.typing import NDArray
from scipy import stats
from trainings import RandomCut

from core.errors import DivergedError
from hpo.space.samplers import build_sampler

TRIED = (1, 2, 4, 8, 16)
BOOTSTRAPS = 400

Column = NDArray[np.float64]
"""One value per configuration; the baseline is the first."""


def measure(
    name: str, count: int, seed: int, cache: Path, known: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Train the baseline and random configurations on one draw of the images, without the known ones."""
    subject = SUBJECTS[name]
    cut = RandomCut(SHARED / subject.file, subject.counts, subject.judged, seed, SIDE, cache)()
    space = space_of(Own("random", "none"), subject.epochs)
    study = optuna.create_study(sampler=build_sampler(space.sampler, seed=0))
    for number in range(count):
        changes = {} if number == 0 else space.suggest(study.ask())
        if number in {one["configuration"] for one in known}:
            continue
        live = Live(divide(cut, seed), cut, math.inf)
        try:
            live.train(space.baseline.override(changes).override({"seed": seed}), live.splits, device=CPU)
            (ended,) = live.best
            yield {"configuration": number, "val": ended.val, "loss": ended.loss, "test": ended.test}
        except DivergedError:
            yield {"configuration": number, "val": 0.0, "loss": 99.0, "test": 0.0}


def result_of(order: Sequence[int], val: Column, test: Column) -> float:
    """Test accuracy of the best by validation accuracy of the baseline and these configurations."""
    tried = [0, *order]
    return float(test[max(tried, key=lambda one: val[one])])


def random_result(rows: Sequence[int], tried: int, val: Column, test: Column) -> float:
    """The mean of `result_of` over all draws of that many of the rows, in closed form."""
    ranked = sorted((row for row in rows if val[row] > val[0]), key=lambda row: val[row])
    worse = len(rows) - len(ranked)
    draws = math.comb(len(rows), tried)
    mean = math.comb(worse, tried) / draws * float(test[0])
    for place, row in enumerate(ranked):
        mean += math.comb(worse + place, tried - 1) / draws * float(test[row])
    return mean


def best_first(rows: Sequence[int], val: Column) -> list[int]:
    return sorted(dict.fromkeys(rows), key=lambda row: -val[row])


def covering(rows: Sequence[int], tried: int, others: Sequence[Column]) -> list[int]:
    """Configurations chosen by greedy coverage of the other sets."""
    left, chosen = list(dict.fromkeys(rows)), list[int]()
    for _ in range(min(tried, len(left))):
        covered = [max(val[[0, *chosen]]) for val in others]
        # Once no set gains, the one that is best on average.
        added = max(
            left,
            key=lambda row: (
                statistics.fmean(max(best, val[row]) for best, val in zip(covered, others, strict=True)),
                statistics.fmean(val[row] for val in others),
            ),
        )
        left.remove(added)
        chosen.append(added)
    return chosen


def gains(rows: Sequence[int], vals: Mapping[str, Column], tests: Mapping[str, Column]) -> dict[tuple[str, int], float]:
    """(way, configurations tried) -> test accuracy, the mean over the target sets."""
    found: dict[tuple[str, int], list[float]] = {}
    for target, tried in product(vals, TRIED):
        val, test = vals[target], tests[target]
        others = {name: of for name, of in vals.items() if name != target}
        found.setdefault(("random", tried), []).append(random_result(rows, tried, val, test))
        for of in others.values():
            found.setdefault(("of one set", tried), []).append(result_of(best_first(rows, of)[:tried], val, test))
        chosen = covering(rows, tried, list(others.values()))
        found.setdefault(("portfolio", tried), []).append(result_of(chosen, val, test))
    return {key: statistics.fmean(values) for key, values in found.items()}


def rows_of(found: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    sets = list(dict.fromkeys((one["data"], one["seed"]) for one in found))
    names = list(dict.fromkeys(name for name, _ in sets))
    per = {
        of: sorted((o for o in found if (o["data"], o["seed"]) == of), key=lambda o: o["configuration"]) for of in sets
    }
    count = min(map(len, per.values()))
    columns = {
        key: {
            name: np.mean([[one[key] for one in per[of][:count]] for of in sets if of[0] == name], axis=0)
            for name in names
        }
        for key in ("val", "test")
    }
    vals, tests = columns["val"], columns["test"]
    rows = list(range(1, count))
    measured = gains(rows, vals, tests)
    generator = np.random.default_rng(0)
    again = [gains(list(generator.choice(rows, len(rows))), vals, tests) for _ in range(BOOTSTRAPS)]
    for way in ("random", "of one set", "portfolio"):
        cells = [way]
        for tried in TRIED:
            cells.append(f"{measured[way, tried]:.3f}")
            if way != "random":
                low, high = np.quantile([one[way, tried] - one["random", tried] for one in again], [0.025, 0.975])
                cells[-1] += f" {measured[way, tried] - measured['random', tried]:+.3f} ({low:+.3f} to {high:+.3f})"
        yield cells
    for one, other in ((a, b) for i, a in enumerate(names) for b in names[i + 1 :]):
        print(
            f"{one}, {other}: rank correlation of validation accuracy {stats.spearmanr(vals[one], vals[other])[0]:.2f}"
        )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", default=[*SUBJECTS], choices=[*SUBJECTS], help="data sets")
    options.add_argument("--configurations", type=positive, default=40)
    options.add_argument("--seed", type=int, default=7, help="of the images")
    options.add_argument("--table", nargs="+", type=Path, metavar="PATH", help="measure nothing; the table of these")
    given = options.parse_args()
    described, found = machine(), list[dict[str, Any]]()
    for path in given.table or ([given.json] if given.json and given.json.exists() else []):
        found += json.loads(path.read_text())["found"]
    if given.table is None:
        torch.set_num_threads(1)
        logging.disable(logging.WARNING)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with tempfile.TemporaryDirectory() as cache:
            for name in given.only:
                known = [one for one in found if (one["data"], one["seed"]) == (name, given.seed)]
                for one in measure(name, given.configurations, given.seed, Path(cache), known):
                    found.append({"data": name, "seed": given.seed, **one})
                    print(found[-1], flush=True)
                    finish("warm_start", given.json, described, found=found)
    print("\n" + table(["tried after the baseline", *map(str, TRIED)], list(rows_of(found))))


if __name__ == "__main__":
    main()
