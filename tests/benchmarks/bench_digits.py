"""`hpo run digits` and `hpo refit best` against a plain Optuna script of the same search (`plain_optuna_digits.py`).

Both run as a user runs them: processes of their own, start-up counted, nothing cached but compiled Python. They take
turns, `--repeats` times; `hpo` goes on alone up to `--seeds` study seeds, whose test accuracies are averaged. Before
anything is timed, the plain script's search space and base are compared with those of `search_spaces/digits.yaml`.

The promises: at most 150 s on two CPU cores; at most half the plain script's time; a mean test accuracy of at least
0.99; and 0.98 on validation by the base alone, so that the search does not beat a straw man.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import plain_optuna_digits as plain
from common import ROOT, finish, machine, mean_and_deviation, parser, positive, spread, table

from core.config import TrainConfig
from hpo.paths import StudyPaths
from hpo.space import load_space

LIMIT_S, LIMIT_RATIO, LIMIT_TEST, LIMIT_BASE = 150, 0.5, 0.99, 0.98  # the promises


def check_same_search() -> None:
    """The plain script must search what `digits.yaml` searches, from the same base, as often and as long."""
    from optuna.distributions import BaseDistribution
    from optuna.trial import FixedTrial

    space = load_space("digits")
    trial = FixedTrial(plain.BASE)
    plain.suggest(trial)
    theirs: dict[str, BaseDistribution] = trial.distributions
    if theirs != space.distributions:
        raise SystemExit(f"not the same search space:\n{theirs}\n{space.distributions}")
    fixed = {
        "epochs": plain.EPOCHS,
        "schedule.warmup_fraction": plain.WARMUP,
        "optim.swats.switch_fraction": plain.SWATS_SWITCH,
        "augment.flip": 0.0,
        "averaging.name": "none",
        **{f"model.{name}": value for name, value in plain.MODEL.items()},
    }
    differing = TrainConfig().override({**plain.BASE, **fixed}).flat()
    differing = {path: (value, space.baseline.flat()[path]) for path, value in differing.items()}
    differing = {path: pair for path, pair in differing.items() if pair[0] != pair[1]}
    if differing:
        raise SystemExit(f"not the same base (plain script, digits.yaml): {differing}")


def run(command: list[str], folder: Path) -> tuple[float, str]:
    """Runs a command in the folder, with studies and caches of its own; returns its seconds and its output."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"HPO_STUDIES": str(folder / "studies"), "HPO_CACHE": str(folder / "cache")}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return seconds, done.stdout


def run_hpo(trials: int, seed: int) -> dict[str, Any]:
    """The two commands."""
    hpo = str(Path(sys.executable).with_name("hpo"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        search = ["run", "digits", "--study", "bench", "--trials", str(trials), "--seed", str(seed), "--device", "cpu"]
        search_s, _ = run([hpo, *search], folder)
        refit_s, _ = run([hpo, "refit", "best", "--no-confirm", "--study", "bench", "--device", "cpu"], folder)
        paths = StudyPaths(folder / "studies" / "bench")
        report = json.loads((paths.refit("best") / "metrics.json").read_text(encoding="utf-8"))
        rows = {
            int(file.parent.name): [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            for file in sorted(paths.trials.glob(f"*/{paths.trial_metrics(0).name}"))
        }
    return {
        "seed": seed,
        "total_s": search_s + refit_s,
        "search_s": search_s,
        "refit_s": refit_s,
        "epochs": sum(map(len, rows.values())),
        "images_per_s": statistics.median(row["images_per_s"] for trial in rows.values() for row in trial),
        "base_val_accuracy": rows[0][-1]["val_accuracy"],
        "best_val_accuracy": max(trial[-1]["val_accuracy"] for trial in rows.values() if len(trial) == plain.EPOCHS),
        "test_accuracy": report["test"]["with_tta"]["accuracy"],
    }


def run_plain(trials: int, seed: int, workers: int) -> dict[str, Any]:
    """The script; what its process takes before and after is counted as searching."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = str(ROOT / "tests" / "benchmarks" / "plain_optuna_digits.py")
        options = ["--trials", str(trials), "--seed", str(seed), "--workers", str(workers)]
        total_s, output = run([sys.executable, script, *options, "--storage", str(folder / "study.db")], folder)
    found = json.loads(output.splitlines()[-1])
    return found | {"seed": seed, "total_s": total_s, "search_s": total_s - found["refit_s"]}


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(repeats=3)
    options.add_argument("--seeds", type=positive, default=5, help="study seeds of hpo, for the test accuracy's mean")
    options.add_argument("--trials", type=positive, default=20, help="trials of each search")
    options.add_argument("--plain-workers", type=int, default=0, help="loader processes of the plain script")
    arguments = options.parse_args()
    described = machine()
    check_same_search()

    runs: dict[str, list[dict[str, Any]]] = {"hpo": [], "plain": []}
    for seed in range(max(arguments.seeds, arguments.repeats)):
        sides: list[tuple[str, Callable[[int, int], dict[str, Any]]]] = [("hpo", run_hpo)]
        if seed < arguments.repeats:
            sides.append(("plain", partial(run_plain, workers=arguments.plain_workers)))
        for side, once in sides if seed % 2 == 0 else reversed(sides):
            runs[side].append(once(arguments.trials, seed))
            print(f"{side} {json.dumps(runs[side][-1])}", flush=True)

    def column(side: str, key: str) -> list[float]:
        return [found[key] for found in runs[side]]

    rows = [
        [side]
        + [spread(column(side, key)) for key in ("total_s", "search_s", "refit_s")]
        + [spread(column(side, key), 0) for key in ("images_per_s", "epochs")]
        + [mean_and_deviation(column(side, f"{key}_accuracy")) for key in ("base_val", "best_val", "test")]
        for side in runs
    ]
    header = ["", "total, s", "search, s", "refit, s", "images/s", "epochs", "base, val", "best, val", "test"]
    print("\n" + table(header, rows))

    pairs = zip(runs["hpo"], runs["plain"], strict=False)
    ratios = [ours["total_s"] / theirs["total_s"] for ours, theirs in pairs]
    promises = [
        ["total, s", f"{statistics.median(column('hpo', 'total_s')):.1f}", f"at most {LIMIT_S}"],
        ["total over the plain script's", spread(ratios, 2), f"at most {LIMIT_RATIO}"],
        ["test accuracy, mean", mean_and_deviation(column("hpo", "test_accuracy")), f"at least {LIMIT_TEST}"],
        ["base on validation, lowest", f"{min(column('hpo', 'base_val_accuracy')):.4f}", f"at least {LIMIT_BASE}"],
    ]
    print("\n" + table(["promise", "measured", "limit"], promises))
    finish("digits", arguments.json, described, trials=arguments.trials, ratios=ratios, runs=runs)


if __name__ == "__main__":
    main()
