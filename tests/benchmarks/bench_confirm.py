"""What confirming is worth: the confirmed winner against the search's own best and against the base, on test images.

Each repeat is a whole study as a person runs it: `hpo run`, `hpo confirm`, and then three refits by the same command:
of the confirmed winner (`hpo refit best`); of the trial that the search scored best (`--no-confirm`), which is what one
would have taken without confirming; and of the base, trial 0. All three are judged by the locked test images, which
nothing was chosen by. Where two of the three are the same configuration, it is refitted once, and they do not differ.

Every repeat has another study seed, another split and other weights; on the long-tailed set other training and test
images too. So differences are paired, and their interval is Student's, over the repeats. On `digits` and TrashNet all
repeats share their test images, whose own chance the intervals do not hold.

A repeat that the file of `--json` has already is not run again, and one that was cut off goes on where it was: it is in
`--folder` until it is written down.

With `--simulate`, what a budget of trainings proves and picks is simulated instead, see `races.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from bench_longtail import profile
from common import ROOT, finish, machine, mean_and_deviation, parser, positive, table
from races import simulations
from trainings import SHARED, RandomCut, paired

from hpo.confirmation.result import BASELINE, Confirmation, read_confirmation
from hpo.paths import StudyPaths

# The sides of every comparison.
WINNER, NAIVE, BASE = "confirmed winner", "search's best", "base"

# The cut of `bench_longtail.py`: images of the largest class, that over those of the smallest, test images of a class.
LARGEST, RATIO, JUDGED = 1000, 100, 500

TRASHNET = """
description: TrashNet at 32², a small network for two cores
data: {name: path/to/images, image_size: 32}
objective: {metric: macro_f1}
trials: 24
sampler: {name: tpe, startup_trials: 8}
pruner: {name: rungs, rungs: [0.1, 0.25, 0.5], keep: 0.33}
base:
  epochs: 12
  batch_size: 64
  data: {name: path/to/images, image_size: 32}
  augment: {flip: 0.5, crop_pad_fraction: 0.125}
  model: {name: resnet, widths: [8, 16, 32], blocks: [1, 1, 1]}
  loss: {smoothing: 0.1}
  optim: {name: adamw, lr_scale: 2.0, weight_decay: 5.0e-5}
  schedule: {name: cosine, warmup_fraction: 0.1}
search:
  optim.name: {choices: [sgd, adamw, muon]}
  optim.lr_scale: {low: 0.3, high: 30, log: true}
  optim.weight_decay: {low: 1e-6, high: 1e-3, log: true}
  batch_size: {choices: [32, 64, 128]}
  augment.ops: {low: 0, high: 2}
  augment.strength: {low: 0.1, high: 0.9}
  augment.cutmix: {low: 0.0, high: 1.0, step: 0.5}
  loss.smoothing: {low: 0.0, high: 0.2}
  model.width: {low: 0.5, high: 1.5, step: 0.25}
"""

# The same search, and the remedies for imbalance that `bench_longtail.py` compares.
LONGTAIL = (
    TRASHNET.replace("TrashNet at 32²", "a long-tailed CIFAR-10")
    + """\
  sampling.name: {choices: [shuffled, balanced]}
  loss.logit_adjustment: {low: 0.0, high: 1.5, step: 0.5}
  loss.class_weights: {choices: [none, inverse, effective]}
"""
)


@dataclass(frozen=True)
class Subject:
    """A data set, and how it is searched."""

    name: str
    space: str | None
    """A space as text; None: the shipped one of this name."""
    metric: str
    repeats: int

    def data(self, seed: int, folder: Path) -> Path | None:
        """The images of a repeat; None: they come with the space."""
        if self.name == "trashnet":
            return SHARED / "trashnet96.zip"
        if self.name == "longtail":
            return long_tail(folder / "longtail.npz", seed, cache=folder / "cache")
        return None


SUBJECTS = (
    Subject("digits", None, "accuracy", repeats=5),
    Subject("trashnet", TRASHNET, "macro_f1", repeats=3),
    Subject("longtail", LONGTAIL, "macro_f1", repeats=3),
)


def long_tail(path: Path, seed: int, *, cache: Path) -> Path:
    """Writes a long-tailed CIFAR-10 with balanced test images, as `bench_longtail.py` cuts it, unless it is there."""
    if not path.exists():
        counts = profile(LARGEST, RATIO, classes=10)
        cut = RandomCut(SHARED / "cifar10_jpeg.tar.xz", counts, JUDGED, seed, side=32, cache=cache)()
        parts = {"train": cut.train, "test": cut.val}
        arrays = {f"{name}_images": cut.images[rows].permute(0, 2, 3, 1).numpy() for name, rows in parts.items()}
        labels = {
            f"{name}_labels": np.array([cut.classes[label] for label in cut.labels[rows].tolist()])
            for name, rows in parts.items()
        }
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, allow_pickle=False, **arrays, **labels)
        temporary.replace(path)
    return path


class Repeat:
    """One study of a subject, in a folder of its own, from the search to the three refits."""

    def __init__(self, subject: Subject, seed: int, folder: Path, *, trials: int | None, budget: float | None) -> None:
        self.subject, self.seed = subject, seed
        self.folder = folder / f"{subject.name}-{seed}"
        self.study = f"{subject.name}-{seed}"
        self.paths = StudyPaths(self.folder / "studies" / self.study)
        self._trials, self._budget = trials, budget
        self._seconds_file = self.folder / "seconds.json"

    def go(self) -> dict[str, Any]:
        """Runs what is missing of it; returns what is written down."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stage("search", *self._search())
        self._stage("confirm", "confirm", self.study, *([] if self._budget is None else [f"--budget={self._budget:g}"]))
        confirmation = read_confirmation(self.paths.confirmation)
        assert confirmation is not None, "hpo confirm writes it"
        naive = confirmation.searched_best
        assert naive is not None, "a complete search has a best trial"
        scores = self._refitted(confirmation, naive.trial)
        found = {
            "subject": self.subject.name,
            "seed": self.seed,
            "metric": self.subject.metric,
            "test": scores,
            "winner": confirmation.winner,
            "leader": confirmation.leader,
            "evidence": confirmation.evidence,
            "verdict": confirmation.verdict,
            "search_best": naive.key,
            "search_best_value": naive.search_value,
            "search_best_confirmed": None if naive.interval is None else naive.interval.mean,
            "optimism": confirmation.optimism,
            "replicates": confirmation.replicates,
            "trainings": confirmation.trainings,
            "search_epochs": confirmation.search_epochs,
            "confirm_epochs": confirmation.epochs,
            "seconds": self._seconds(),
            "lines": confirmation.lines(),
        }
        print(f"{self.study}: {found['verdict']}; test {scores}", flush=True)
        return found

    def _search(self) -> list[str]:
        space = self.subject.name
        if self.subject.space is not None:
            file = self.folder / f"{self.subject.name}.yaml"
            file.write_text(self.subject.space, encoding="utf-8")
            space = str(file)
        data = self.subject.data(self.seed, self.folder)
        return [
            *("run", space, "--study", self.study, "--seed", str(self.seed)),
            *("--set", f"data.split_seed={self.seed}"),
            *([] if data is None else ["--data", str(data)]),
            *([] if self._trials is None else ["--trials", str(self._trials)]),
        ]

    def _refitted(self, confirmation: Confirmation, naive: int | None) -> dict[str, float]:
        """The test scores of the three sides."""
        numbers = {
            WINNER: confirmation.contender(confirmation.winner).trial,
            NAIVE: naive,
            BASE: confirmation.contender(BASELINE).trial,
        }
        scores: dict[str, float] = {}
        for side, number in numbers.items():
            assert number is not None, "there are no recipes here, and the base is a trial"
            alike = next((other for other in scores if numbers[other] == number), None)
            if alike is not None:
                scores[side] = scores[alike]
                continue
            trial = ["best"] if side == WINNER else [str(number), "--no-confirm"]
            self._stage(f"refit {side}", "refit", *trial, "--study", self.study)
            label = "best" if side == WINNER else f"{number:05d}"
            report = json.loads((self.paths.refit(label) / "metrics.json").read_text(encoding="utf-8"))
            scores[side] = report["test"]["with_tta"][self.subject.metric]
        return scores

    def _stage(self, name: str, *command: str) -> None:
        """Runs a command unless it is over, in a process of one thread, and notes its seconds.

        Of a stage that was cut off, the seconds are those since it went on, and it says so.
        """
        seconds = self._seconds()
        if name in seconds and not str(seconds[name]).startswith("begun"):
            return
        again = name in seconds
        self._note({**seconds, name: "begun"})
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment |= {
            "HPO_STUDIES": str(self.folder / "studies"),
            "HPO_CACHE": str(self.folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        started = time.perf_counter()
        whole = [sys.executable, "-m", "hpo.cli", *command, "--device", "cpu"]
        done = subprocess.run(whole, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(whole)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        taken = round(time.perf_counter() - started, 1)
        self._note({**seconds, name: taken, **({f"{name}, cut off before": True} if again else {})})

    def _seconds(self) -> dict[str, Any]:
        if not self._seconds_file.exists():
            return {}
        found: dict[str, Any] = json.loads(self._seconds_file.read_text(encoding="utf-8"))
        return found

    def _note(self, seconds: dict[str, Any]) -> None:
        temporary = self._seconds_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(seconds), encoding="utf-8")
        temporary.replace(self._seconds_file)


class Written:
    """What has been measured so far, in the file of `--json`: a repeat is added as soon as it is over."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self._path, self._settings, self._lock = path, settings, Lock()
        self.repeats: list[dict[str, Any]] = []
        if path is not None and path.exists():
            written = json.loads(path.read_text(encoding="utf-8"))
            if written["settings"] != settings:
                raise SystemExit(f"{path} was measured with {written['settings']}, not {settings}; give another file")
            self.repeats = written["repeats"]

    def has(self, subject: str, seed: int) -> bool:
        return any((one["subject"], one["seed"]) == (subject, seed) for one in self.repeats)

    def add(self, found: dict[str, Any]) -> None:
        with self._lock:
            self.repeats.append(found)
            self.repeats.sort(
                key=lambda one: ([subject.name for subject in SUBJECTS].index(one["subject"]), one["seed"])
            )
            if self._path is not None:
                temporary = self._path.with_suffix(".tmp")
                content = {"settings": self._settings, "repeats": self.repeats}
                temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
                temporary.replace(self._path)


def accuracy_table(repeats: Iterable[dict[str, Any]]) -> str:
    """The test scores of the three sides, and by how much the winner is better, a line a subject."""
    rows = []
    for name, group in by_subject(repeats).items():
        sides = {side: [one["test"][side] for one in group] for side in (WINNER, NAIVE, BASE)}
        rows.append(
            [
                f"{name}, {group[0]['metric']}",
                *(mean_and_deviation(scores) for scores in sides.values()),
                paired(sides[WINNER], sides[NAIVE]),
                paired(sides[WINNER], sides[BASE]),
            ]
        )
    return table(["test score", WINNER, NAIVE, BASE, f"winner - {NAIVE} (95 %)", f"winner - {BASE} (95 %)"], rows)


def cost_table(repeats: Iterable[dict[str, Any]]) -> str:
    """What the confirmations said and cost, a line a subject."""
    rows = []
    for name, group in by_subject(repeats).items():
        optimism = [one["optimism"] for one in group if one["optimism"] is not None]
        # Seconds of a stage that was cut off are not all of them.
        whole = [
            one["seconds"]
            for one in group
            if not any(f"{stage}, cut off before" in one["seconds"] for stage in ("search", "confirm"))
        ]
        rows.append(
            [
                name,
                f"{sum(one['evidence'] for one in group)} of {len(group)}",
                f"{sum(one['winner'] == one['search_best'] for one in group)} of {len(group)}",
                mean_and_deviation(optimism) if optimism else "",
                "/".join(str(one["replicates"]) for one in group),
                f"{statistics.fmean(one['search_epochs'] for one in group):.0f}",
                f"{statistics.fmean(one['confirm_epochs'] for one in group):.0f}",
                *(
                    f"{statistics.fmean(one[key] for one in whole):.0f}" if whole else ""
                    for key in ("search", "confirm")
                ),
            ]
        )
    header = ["", "evidence", "winner is the search's best", "optimism of the search's best", "n"]
    return table([*header, "search, epochs", "confirm, epochs", "search, s", "confirm, s"], rows)


def verdict_table(repeats: Iterable[dict[str, Any]]) -> str:
    """What each confirmation said, and the test scores that it led to."""
    rows = [
        [
            f"{one['subject']}-{one['seed']}",
            one["winner"],
            one["search_best"],
            one["verdict"],
            *(f"{one['test'][side]:.4f}" for side in (WINNER, NAIVE, BASE)),
        ]
        for one in repeats
    ]
    return table(
        ["study", "winner", "search's best", "verdict", *(f"test, {side}" for side in (WINNER, NAIVE, BASE))], rows
    )


def by_subject(repeats: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The repeats of each subject, in the order of the seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in repeats:
        groups.setdefault(one["subject"], []).append(one)
    return groups


def simulate(arguments: Namespace, described: dict[str, Any]) -> None:
    """Prints what simulated races prove and pick."""
    found, left = simulations(arguments.repeats or 1000, arguments.finalists, arguments.trainings)
    print(f"\npower, false wins, mean true gain in points of what is refitted\n\n{found}")
    print(f"\nthe rule of today stops the best of several in {100 * left:.1f} %")
    finish("confirm", arguments.json, described, table=found, best_stopped=left)


def main() -> None:
    """Runs the benchmark from the command line."""
    options = parser(__doc__)
    options.set_defaults(repeats=None)
    names = [subject.name for subject in SUBJECTS]
    options.add_argument("--only", nargs="+", choices=names, default=names, help="data sets")
    options.add_argument("--trials", type=positive, help="of each search, in place of its space's")
    options.add_argument("--budget", type=float, help="of each confirmation, in place of its space's confirm.budget")
    options.add_argument("--workers", type=positive, default=2, help="studies at a time, one thread each")
    options.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "hpo-bench-confirm",
        help="of the studies, until each is written down",
    )
    options.add_argument("--keep", action="store_true", help="keep the studies")
    options.add_argument("--simulate", action="store_true", help="simulate races, --repeats of each setting")
    options.add_argument("--finalists", type=positive, nargs="+", default=[3, 5, 10], help="of a simulated search")
    options.add_argument(
        "--trainings", type=positive, nargs="+", default=[10, 12, 16, 24, 36], help="simulated budgets"
    )
    arguments = options.parse_args()
    described = machine()
    if arguments.simulate:
        simulate(arguments, described)
        return
    written = Written(arguments.json, {"trials": arguments.trials, "budget": arguments.budget})

    def run(repeat: Repeat) -> None:
        written.add(repeat.go())
        if not arguments.keep:
            shutil.rmtree(repeat.folder, ignore_errors=True)

    missing = [
        Repeat(subject, seed, arguments.folder, trials=arguments.trials, budget=arguments.budget)
        for subject in SUBJECTS
        if subject.name in arguments.only
        for seed in range(arguments.repeats or subject.repeats)
        if not written.has(subject.name, seed)
    ]
    with ThreadPoolExecutor(arguments.workers) as pool:
        for _ in pool.map(run, missing):
            pass
    for found in (accuracy_table, cost_table, verdict_table):
        print("\n" + found(written.repeats))
    settings = {"trials": arguments.trials, "budget": arguments.budget}
    finish("confirm", arguments.json, described, settings=settings, repeats=written.repeats)


if __name__ == "__main__":
    main()
