"""What a rung should rank trials by: a replay of searches whose trainings kept their validation logits.

Random configurations of a shipped space are trained once, with the logits of `MOST` validation images after every epoch
and the accuracy on other images at the end. They are kept in `--folder`; another run trains those that are missing.

A search is `--trials` of them in random order, on random validation images, with rungs as `RungPruner` has them. Its
result is the test accuracy of the complete trial with the best validation accuracy, of equals with the lowest loss. All
statistics see the same searches. Standard errors allow for the choice of configurations: a jackknife over ten groups.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import optuna
import torch
from common import finish, machine, parser, positive, table
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy import stats
from trainings import SHARED, judge

from core.calibration import calibrated_loss
from core.config import DataConfig
from core.data import Splits, load_dataset
from core.errors import DivergedError
from core.loop import EpochMetrics, train
from core.loop.run import Run
from core.metrics import Scores
from hpo.space import load_space
from hpo.space.pruner import rung_epochs

MOST = 400
"""Validation images."""
KEEP = 0.33
RUNGS = {
    "default": (0.03, 0.1, 0.3),
    "later": (0.1, 0.25, 0.5),
    "from 1/6": (1 / 6, 1 / 2),
}
GROUPS = 10
CALIBRATED = "calibrated loss"
ALSO = f"{CALIBRATED}, also the choice"
GAINS = ("in full", "accuracy, then loss", "loss", CALIBRATED, ALSO)


@dataclass(frozen=True)
class Task:
    """Images, and a space whose configurations are trained on them."""

    data: str
    train: int
    test: int
    space: str
    pinned: tuple[str, ...] = ()
    """Overrides of the space: what makes a training short."""


TASKS = {
    "digits": Task("digits", 400, 900, "digits"),
    "cifar10": Task(
        str(SHARED / "cifar10_jpeg.tar.xz"),
        1000,
        2000,
        "scratch",
        ("epochs=20", "model.width=0.5", "model.depth=1.0", "model.stem_stride=2", "batch_size=64"),
    ),
}


def splits_of(task: Task, cache: Path) -> tuple[Splits, Splits]:
    """Draw the images: training and validation images, and the same with other images in place of the latter."""
    dataset = load_dataset(DataConfig(name=task.data), cache_dir=cache)
    test = dataset.open_test()  # a benchmark compares methods, and no model is chosen by it
    images, labels = torch.cat([dataset.images, test.images]), torch.cat([dataset.labels, test.labels])
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    drawn = drawn[: task.train + MOST + task.test]
    pixels = images[drawn[: task.train]].float() / 255
    rows = torch.arange(len(drawn))
    splits = Splits(
        images=images[drawn],
        labels=labels[drawn],
        train=rows[: task.train],
        val=rows[task.train : task.train + MOST],
        classes=dataset.classes,
        mean=tuple(pixels.mean((0, 2, 3)).tolist()),
        std=tuple(pixels.std((0, 2, 3)).tolist()),
    )
    return splits, Splits(**{**vars(splits), "val": rows[task.train + MOST :]})


def record(config: Any, splits: Splits, held_out: Splits) -> dict[str, torch.Tensor]:
    """Train, and return the counted logits (E, M, K) of every epoch and the accuracy on the held-out images.

    Both are empty if the training diverges.
    """
    made: list[tuple[Scores, torch.Tensor]] = []
    kept: list[torch.Tensor] = []
    score = Run._score

    def recorded(run: Run, model: torch.nn.Module) -> Scores:
        found = score(run, model)
        assert run.last_logits is not None
        made.append((found, run.last_logits))
        return found

    def ended(epoch: EpochMetrics) -> None:
        kept.append(next(logits for scores, logits in made if scores is epoch.counted()))
        made.clear()

    with mock.patch.object(Run, "_score", recorded):
        try:
            result = train(config, splits, device=torch.device("cpu"), on_epoch_end=ended)
        except DivergedError:
            return {"logits": torch.empty(0), "test": torch.empty(0)}
    return {"logits": torch.stack(kept), "test": torch.tensor([judge(held_out, result.model).accuracy])}


def train_missing(task: Task, folder: Path, cache: Path, *, count: int, seconds: float) -> None:
    """Train the configurations that the folder lacks, until the time is over."""
    files = [folder / f"{number:03d}.safetensors" for number in range(count)]
    if all(file.exists() for file in files):
        return
    space = load_space(task.space, task.pinned)
    splits, held_out = splits_of(task, cache)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    began = time.perf_counter()
    for number, file in enumerate(files):
        config = space.config(space.suggest(study.ask())).override({"seed": number})
        if file.exists():
            continue
        if time.perf_counter() - began > seconds:
            print(f"trained {number} of {count}; the same command trains the rest")
            return
        started = time.perf_counter()
        found = record(config, splits, held_out)
        save_file({**found, "labels": splits.labels[splits.val]}, file)
        shown = f"{found['test'].item():.4f}" if found["test"].numel() else "diverged"
        print(f"{number} {shown}, {time.perf_counter() - started:.1f} s", flush=True)


@dataclass(frozen=True)
class Trainings:
    """What a search reads of each of C trainings, at E epochs, on S draws of validation images."""

    statistics: Mapping[str, NDArray[np.float64]]
    """(S, C, E) by name; larger is better."""
    tests: NDArray[np.float64]
    """(C,) accuracy on the held-out images."""
    epochs: tuple[int, ...]
    """The E epochs, of which the last is that of the end."""

    def rows(self, chosen: NDArray[np.bool_]) -> Trainings:
        """Keep some of the trainings."""
        found = {name: values[:, chosen] for name, values in self.statistics.items()}
        return Trainings(found, self.tests[chosen], self.epochs)


def read(folder: Path, images: int, draws: int) -> Trainings:
    """Read the trainings of a folder, and score them on random validation images."""
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    files = [file for file in files if file["test"].numel()]
    length = len(files[0]["logits"])
    epochs = (*sorted({epoch for rungs in RUNGS.values() for epoch in rung_epochs(rungs, length)}), length)
    rng, found = np.random.default_rng(0), []
    for _ in range(draws if images < MOST else 1):
        rows = torch.from_numpy(rng.permutation(MOST)[:images])
        labels = files[0]["labels"][rows]
        found.append([[_scores(file["logits"][epoch - 1][rows], labels) for epoch in epochs] for file in files])
    accuracy, loss, calibrated = np.moveaxis(np.array(found), -1, 0)
    statistics = {
        "accuracy": accuracy,
        "accuracy, then loss": 1e6 * accuracy - loss,  # a step of accuracy is more than any loss
        "loss": -loss,
        CALIBRATED: -calibrated,
    }
    return Trainings(statistics, np.array([file["test"].item() for file in files]), epochs)


def _scores(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float, float]:
    """Accuracy, loss, and loss at the best temperature."""
    loss = torch.nn.functional.cross_entropy(logits.double(), labels)
    right = (logits.argmax(1) == labels).double().mean()
    return float(right), float(loss), calibrated_loss(logits, labels)


def survivors(goodness: NDArray[np.float64], keep: float) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Replay `RungPruner` with one worker.

    Args:
        goodness: (R, T, L) of the trials of R searches, in order, at L rungs.

    Returns:
        Whether each trial (R, T) passed all rungs, and the number of rungs that it reached.
    """
    searches, trials, rungs = goodness.shape
    alive, reached = np.ones((searches, trials), bool), np.zeros((searches, trials), int)
    for rung in range(rungs):
        here, passed = goodness[..., rung], np.zeros_like(alive)
        for trial in range(trials):
            earlier = alive[:, :trial]
            rank = 1 + (earlier & (here[:, :trial] > here[:, trial, None])).sum(1)
            passed[:, trial] = rank <= np.ceil(keep * (earlier.sum(1) + 1) - 1e-9)
        reached += alive
        alive &= passed
    return alive, reached


def search(table_of: Trainings, rungs: Sequence[int], *, trials: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Mean test accuracy of the choice, and fraction of the epochs of all trials in full, by statistic."""
    rng = np.random.default_rng(1)
    final = table_of.statistics["accuracy, then loss"]
    draw = np.arange(repeats)[:, None] % len(final)
    orders = rng.permuted(np.tile(np.arange(len(table_of.tests)), (repeats, 1)), axis=1)[:, :trials]
    ends, length = final[draw, orders, -1], table_of.epochs[-1]
    found = {"in full": (float(table_of.tests[_chosen(orders, ends)].mean()), 1.0)}
    places, steps = [table_of.epochs.index(rung) for rung in rungs], np.array([*rungs, length])
    for name, values in table_of.statistics.items():
        alive, reached = survivors(values[draw, orders][..., places], KEEP)
        cost = float(steps[reached - 1 + alive].mean() / length)
        chosen = _chosen(orders, np.where(alive, ends, -np.inf))
        found[name] = float(table_of.tests[chosen].mean()), cost
        if name == CALIBRATED:
            chosen = _chosen(orders, np.where(alive, values[draw, orders, -1], -np.inf))
            found[ALSO] = float(table_of.tests[chosen].mean()), cost
    return found


def _chosen(orders: NDArray[np.int64], ends: NDArray[np.float64]) -> NDArray[np.int64]:
    return orders[np.arange(len(orders)), ends.argmax(1)]


def compared(table_of: Trainings, rungs: Sequence[int], *, trials: int, repeats: int) -> list[str]:
    """Accuracy's score, the gain of the other statistics with its standard error, and the costs of two of them."""
    run = partial(search, rungs=rungs, trials=trials, repeats=repeats)
    group = np.arange(len(table_of.tests)) % GROUPS
    whole, parts = run(table_of), [run(table_of.rows(group != one)) for one in range(GROUPS)]
    cells = [f"{whole['accuracy'][0]:.4f}"]
    for name in GAINS:
        gains = np.array([part[name][0] - part["accuracy"][0] for part in parts])
        error = ((GROUPS - 1) * gains.var()) ** 0.5
        cells.append(f"{100 * (whole[name][0] - whole['accuracy'][0]):+.2f} ± {100 * error:.2f}")
    return [*cells, *(f"1/{1 / whole[name][1]:.1f}" for name in ("accuracy", CALIBRATED))]


def correlations(table_of: Trainings) -> list[list[str]]:
    """Spearman correlation of each statistic with the test accuracy, by epoch; mean over the draws."""
    rows = []
    for name, values in table_of.statistics.items():
        found = [
            np.mean([stats.spearmanr(draw[:, place], table_of.tests).statistic for draw in values])
            for place in range(len(table_of.epochs))
        ]
        rows.append([name, *(f"{one:.3f}" for one in found)])
    return rows


def main() -> None:
    given = options().parse_args()
    described = machine()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder = given.folder / given.task
    folder.mkdir(parents=True, exist_ok=True)
    train_missing(TASKS[given.task], folder, given.folder / "cache", count=given.count, seconds=60 * given.minutes)
    ranks, rows = [], []
    for images in given.images:
        found = read(folder, images, given.draws)
        ranks += [[str(images), *row] for row in correlations(found)]
        for name, fractions in RUNGS.items():
            rungs = rung_epochs(fractions, found.epochs[-1])
            label = f"{name}: {', '.join(map(str, rungs))}"
            cells = compared(found, rungs, trials=given.trials, repeats=given.repeats)
            rows.append([str(images), label, *cells])
    print(f"\n{len(found.tests)} trainings, test accuracy {found.tests.min():.3f} to {found.tests.max():.3f}\n")
    print(table(["images", "correlation", *(f"epoch {epoch}" for epoch in found.epochs)], ranks))
    print("\n" + table(["images", "rungs", "accuracy", *GAINS, "cost", f"cost, {CALIBRATED}"], rows))
    finish("rungs", given.json, described, correlations=ranks, searches=rows)


def options() -> argparse.ArgumentParser:
    found = parser(__doc__)
    found.set_defaults(repeats=4000)
    found.add_argument("task", choices=TASKS)
    found.add_argument("--folder", type=Path, default=Path("rungs"), help="of the trainings")
    found.add_argument("--count", type=positive, default=80, help="trainings")
    found.add_argument("--minutes", type=float, default=60, help="no training begins later")
    found.add_argument("--trials", type=positive, default=30, help="trials of a search")
    found.add_argument("--images", type=positive, nargs="+", default=[50, 100, MOST], help="validation images")
    found.add_argument("--draws", type=positive, default=100, help="draws of validation images")
    return found


if __name__ == "__main__":
    main()
