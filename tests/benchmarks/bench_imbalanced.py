"""Whether `hpo run imbalanced` beats what the imbalanced diary did by hand, each recipe at its own best rate.

Both sides go through the command line, on the same images, the same split and the same number of epochs. A recipe gets
a study of its own: its learning rate alone is searched, by TPE, `--recipe-trials` times around the recipe's rate; that
is more than its author had. The space gets `--trials` trials with its own pruner. Each side's best trial, by the
validation images, is refitted, and the refitted models are compared on the test images, which nothing was chosen by.
Every seed is another split, another study and other weights. Studies that the file of `--json` has already, of the same
settings, are not run again: it takes an hour, and a longer one can be cut off.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, finish, machine, mean_and_deviation, parser, positive, table
from trainings import SHARED, paired

from hpo.space import list_spaces, load_recipe, load_space

SPACE = "imbalanced"
# The rates that a recipe's own is multiplied by. The diary's 1e-6 is so low that its author saw almost nothing happen:
# upwards there is more to find.
BELOW, ABOVE = 0.1, 1e4
MOST, LEAST = 0.3, 1e-6


# The recipes' networks begin with 64 channels, the space's with 32: at these multiples of --width, with as many.
SPACE_WIDTH, RECIPE_WIDTH = 2, 1


@dataclass(frozen=True)
class Side:
    """One study and its refit."""

    name: str
    space: str
    trials: int
    width: float


def recipe_space(recipe: str, folder: Path, trials: int, width: float) -> Side:
    """A space that searches a recipe's learning rate and nothing else."""
    lr = load_recipe(recipe).config.optim.peak_lr(load_recipe(recipe).config.batch_size)
    low, high = max(LEAST, lr * BELOW), min(MOST, lr * ABOVE)
    file = folder / f"{recipe}.yaml"
    file.write_text(
        f"description: the learning rate of {recipe}\nobjective: {{metric: macro_f1}}\ntrials: {trials}\n"
        f"sampler: {{name: tpe, startup_trials: 3}}\npruner: {{name: none}}\nbase: recipes/{recipe}.yaml\n"
        f"search:\n  optim.lr: {{low: {low:g}, high: {high:g}, log: true}}\n"
    )
    return Side(recipe, str(file), trials, width * RECIPE_WIDTH)


def run_side(side: Side, seed: int, data: Path, settings: list[str], root: Path) -> dict[str, Any]:
    """Searches and refits in processes of one thread; returns the scores."""
    environment = os.environ | {
        "HPO_STUDIES": str(root / "studies"),
        "HPO_CACHE": str(root / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    study = f"{side.name}-{seed}"
    settings = [*settings, f"model.width={side.width:g}", f"data.split_seed={seed}"]
    sets = [word for setting in settings for word in ("--set", setting)]
    hpo = [sys.executable, "-m", "hpo.cli"]
    started = time.perf_counter()
    search = ["run", side.space, "--trials", str(side.trials), "--seed", str(seed), "--data", str(data), *sets]
    for command in ([*hpo, *search, "--study", study], [*hpo, "refit", "best", "--no-confirm", "--study", study]):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    folder = root / "studies" / study
    metrics = json.loads((folder / "refit" / "best" / "metrics.json").read_text())
    epochs = sum(len(file.read_text().splitlines()) for file in folder.glob("trials/*/metrics.jsonl"))
    found = {
        "name": side.name,
        "seed": seed,
        "trial": metrics["trial"],
        "epochs": epochs,
        "val_macro_f1": metrics["val"]["without_tta"]["macro_f1"],
        "test_macro_f1": metrics["test"]["with_tta"]["macro_f1"],
        "test_accuracy": metrics["test"]["with_tta"]["accuracy"],
        "test_balanced_accuracy": metrics["test"]["with_tta"]["balanced_accuracy"],
        "config": (folder / "trials" / f"{metrics['trial']:05d}" / "config.yaml").read_text(),
        "seconds": time.perf_counter() - started,
    }
    print(f"{study}: test macro-F1 {found['test_macro_f1']:.4f}, {epochs} epochs, {found['seconds']:.0f} s", flush=True)
    return found


def known_studies(path: Path | None, budget: list[str]) -> list[dict[str, Any]]:
    """The studies that an earlier run wrote down."""
    if path is None or not path.exists():
        return []
    written = json.loads(path.read_text())
    if written["settings"] != budget:
        raise SystemExit(f"{path} was measured with {written['settings']}, not {budget}; give another file")
    found: list[dict[str, Any]] = written["studies"]
    return found


def keep(path: Path | None, budget: list[str], found: list[dict[str, Any]]) -> None:
    """Writes down what has been measured so far."""
    if path is not None:
        path.write_text(json.dumps({"settings": budget, "studies": found}))


def main() -> None:
    """Runs the benchmark from the command line."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, default=SHARED / "trashnet96.zip", help="an imbalanced set")
    options.add_argument("--trials", type=positive, default=50, help="of the space")
    options.add_argument("--recipe-trials", type=positive, default=5, help="of each recipe's learning rate")
    options.add_argument("--epochs", type=positive, default=12)
    options.add_argument("--side", type=positive, default=32, help="pixels that images are resized to")
    options.add_argument("--width", type=float, default=0.125, help="of every network, for two cores")
    options.add_argument("--workers", type=positive, default=2, help="studies at a time, one thread each")
    options.set_defaults(repeats=3)
    arguments = options.parse_args()
    described = machine()
    settings = [f"epochs={arguments.epochs}", f"data.image_size={arguments.side}"]
    base = load_space(SPACE).path.parent / "recipes" / f"{SPACE}_base.yaml"
    budget = [*settings, f"width={arguments.width}", f"trials={arguments.trials},{arguments.recipe_trials}"]
    named = [entry for entry in list_spaces() if entry.kind == "recipe" and entry.name.startswith(f"{SPACE}_")]
    recipes = [entry.name for entry in named if entry.name != base.stem]
    root = Path(tempfile.mkdtemp(prefix="hpo-bench-"))
    try:
        # The recipes that the space would train beside its trials are measured here on their own: a copy without them.
        space = root / f"{SPACE}.yaml"
        text = Path(load_space(SPACE).path).read_text()
        space.write_text(text.partition("\nrecipes:")[0] + "\n")
        ours = Side(SPACE, str(space), arguments.trials, arguments.width * SPACE_WIDTH)
        theirs = [recipe_space(recipe, root, arguments.recipe_trials, arguments.width) for recipe in recipes]
        sides = [ours, *theirs]
        found = known_studies(arguments.json, budget)
        done = {(study["name"], study["seed"]) for study in found}
        jobs = [(side, seed) for side in sides for seed in range(arguments.repeats) if (side.name, seed) not in done]
        with ThreadPoolExecutor(arguments.workers) as pool:
            for study in pool.map(lambda job: run_side(*job, arguments.data, settings, root), jobs):
                found.append(study)
                keep(arguments.json, budget, found)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    groups = {side.name: [one for one in found if one["name"] == side.name] for side in sides}
    best = [one["test_macro_f1"] for one in groups[SPACE]]
    rows = []
    for name, group in groups.items():
        scores = [one["test_macro_f1"] for one in group]
        rows.append(
            [
                name,
                mean_and_deviation(scores),
                mean_and_deviation([one["test_balanced_accuracy"] for one in group]),
                mean_and_deviation([one["test_accuracy"] for one in group]),
                "" if name == SPACE else paired(best, scores),
                f"{sum(one['epochs'] for one in group) / len(group):.0f}",
            ]
        )
    header = ["", "test macro-F1", "balanced accuracy", "accuracy", "the space better by (95 %)", "epochs"]
    print("\n" + table(header, rows))
    finish("imbalanced", arguments.json, described, settings=budget, studies=found)


if __name__ == "__main__":
    main()
