"""What a study costs over its trainings: at most 50 ms a trial, pictures apart.

A study of the digits runs as `hpo run` runs it, on the journal file, with the default sampler and pruner and the
progress display, but with a network so small that the rest shows, and one thread. The clock runs around the whole
study, around every training, and around a trial's artifacts and note for the dashboard. What is left of
the first is the driver: claiming a slot, suggesting, reporting every epoch, judging rungs, writing `config.yaml` and
`metrics.jsonl`, keeping the best weights.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import optuna
import torch
from common import finish, machine, parser, positive, spread, table

import hpo.dashboard.artifacts
import hpo.search.objective
from core.data import folds, load_dataset
from core.runtime import select_device
from hpo.cli.progress import StudyProgress
from hpo.search.interrupts import Interrupts
from hpo.search.loop import run_study
from hpo.space import load_space
from hpo.study import open_study

LIMIT_MS = 50  # the promise, a trial
PARTS = {
    "training": [(hpo.search.objective, "train")],
    "pictures": [(hpo.dashboard.artifacts, "record")],
}


@contextlib.contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Adds up the seconds that each part takes, exceptions included: a pruned trial leaves its training by one."""
    spent: dict[str, float] = defaultdict(float)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **keywords)
            finally:
                spent[part] += time.perf_counter() - started

        return call

    with contextlib.ExitStack() as stack:
        for part, places in PARTS.items():
            for module, name in places:
                stack.enter_context(mock.patch.object(module, name, timed(part, getattr(module, name))))
        yield spent


@contextlib.contextmanager
def reports_apart(spent: dict[str, float]) -> Iterator[None]:
    """Takes the callback after each epoch, which `train` calls, out of the training's time: it is the driver's."""
    epoch_ended = hpo.search.objective._Attempt.epoch_ended

    def timed(attempt: Any, epoch: Any) -> None:
        started = time.perf_counter()
        try:
            epoch_ended(attempt, epoch)
        finally:
            spent["training"] -= time.perf_counter() - started

    with mock.patch.object(hpo.search.objective._Attempt, "epoch_ended", timed):
        yield


def run_once(trials: int, assignments: list[str], folder: Path) -> dict[str, float]:
    """Seconds of one study, by part."""
    os.environ["HPO_STUDIES"] = str(folder / "studies")
    os.environ["HPO_CACHE"] = str(folder / "cache")
    device = select_device("cpu")
    space = load_space("digits", assignments)
    dataset = load_dataset(space.baseline.data, cache_dir=folder / "cache")
    splits = folds(dataset, space.baseline.data)
    study = open_study(space, name="bench", dataset=dataset, seed=0)
    study.queue.ensure_trials(trials)
    shown = contextlib.redirect_stdout(io.StringIO())
    with shown, StudyProgress(study) as progress, clocks() as spent, reports_apart(spent):
        started = time.perf_counter()
        with Interrupts() as interrupts:
            run_study(study, space, splits, device=device, progress=progress, interrupts=interrupts)
        spent["study"] = time.perf_counter() - started
    epochs = sum(len(trial.intermediate_values) for trial in study.optuna.get_trials(deepcopy=False))
    return dict(spent) | {"driver": spent["study"] - spent["training"] - spent["pictures"], "epochs": epochs}


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(repeats=3)
    options.add_argument("--trials", type=positive, default=40, help="trials of the study")
    options.add_argument("--epochs", type=positive, default=20, help="epochs of a trial that is not pruned")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    described = machine()
    logging.disable(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    tiny = [f"epochs={arguments.epochs}", "model.widths=[8]", "model.blocks=[1]", "model.width=1.0", "batch_size=128"]
    runs = []
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as name:
            runs.append(run_once(arguments.trials, tiny, Path(name)))
    milliseconds = {
        part: [1000 * run[part] / arguments.trials for run in runs] for part in ("training", "pictures", "driver")
    }
    print(table(["a trial", "ms"], [[part, spread(values)] for part, values in milliseconds.items()]))
    reports = statistics.median(run["epochs"] for run in runs) / arguments.trials
    print(f"\n{arguments.trials} trials, {reports:.1f} reports each; the driver's promise is at most {LIMIT_MS} ms")
    finish("driver", arguments.json, described, trials=arguments.trials, runs=runs)


if __name__ == "__main__":
    main()
