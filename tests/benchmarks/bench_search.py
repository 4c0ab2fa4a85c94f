"""Searches by the product's own code on a table of finished trainings: the score of the chosen configuration by cost.

`hpo.search.loop.run_study` runs with its queue, samplers and pruners, on a storage in memory and without the records
for readers (`RECORDS`); `core.loop.train` is replaced by a lookup in `TABLE` (`curves.py` has its format). The plain
sides are `optuna.Study.optimize` with Optuna's defaults. A cost is a fraction of the epochs of all trials in full. At
each, the search chooses as `Study.best_trial` does; before its first complete trial, the best of the furthest. The
score is the test accuracy of that row: of a refit, not of what the search has seen.

A sampler proposes points of the box that contains the rows; the nearest row that the search has not trained yet takes
its place before it is recorded, so that a trial has the parameters of its curve. All sides do so, also random draws, by
which a row with more room around it is drawn more often. Every parameter contributes the same to the squared distance
on average over the rows; a choice is the same or different. A nearest row in seven dimensions is not near, and the rows
are few and drawn once, so this compares pruners; the gain of a sampler needs real trainings. There is no baseline: its
training in full would be 1/100 of the cost.

`--draw` replaces the validation scores by those of N images with binomial noise; `--shuffle` exchanges the scores of
the first epochs between the rows; `--slow` keeps SGD's rows, which start slowly; a search of 100 trains all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import optuna
import torch
from common import finish, machine, parser, positive, table
from curves import CURVES, Curves, read
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial
from pydantic import TypeAdapter
from trainings import paired

import hpo.search.loop
import hpo.search.objective
from core.config import TrainConfig
from core.data import Splits
from core.loop import EpochMetrics, TrainResult
from core.metrics import Scores
from hpo.paths import StudyPaths
from hpo.search.interrupts import Interrupts
from hpo.search.loop import run_study
from hpo.space.grammar import Confirm, Objective, Pruner, Sampler
from hpo.space.pruner import build_pruner
from hpo.space.samplers import build_sampler
from hpo.space.space import Categorical, Parameter, Real, SearchSpace
from hpo.study import Study

COSTS = (Fraction(1, 20), Fraction(1, 15), Fraction(1, 12), Fraction(1, 8), Fraction(1, 6))
LOG = ("optim.lr_scale", "optim.weight_decay")
FULL = "random in full"
RECORDS: tuple[tuple[Any, str, Callable[..., str | None]], ...] = (
    (hpo.search.loop.artifacts, "record", lambda *_, **__: None),
    (hpo.search.objective, "append_line", lambda *_: None),
    (hpo.search.objective, "to_yaml", lambda _: ""),
)
"""Pictures, notes, `metrics.jsonl` and `config.yaml`, which no search reads: half of its time here."""

Plain = Callable[[int], BasePruner]
"""Optuna's pruner for trials of so many epochs."""


@dataclass(frozen=True)
class Own:
    """A side by this project: the settings of a search space."""

    sampler: str
    pruner: str


SIDES: dict[str, Own | Plain] = {
    FULL: Own("random", "none"),
    "Optuna: TPE, median": lambda _: MedianPruner(),
    "Optuna: TPE, Hyperband": lambda epochs: HyperbandPruner(max_resource=epochs),
    "Optuna: TPE, successive halving": lambda _: SuccessiveHalvingPruner(),
    "rungs, random": Own("random", "rungs"),
    "rungs, TPE": Own("tpe", "rungs"),
    "promote, random": Own("random", "promote"),
    "promote, TPE": Own("tpe", "promote"),
}


@dataclass(frozen=True)
class TableSpace(SearchSpace):
    """The box of a table's rows, without a baseline."""

    @property
    def trains_baseline(self) -> bool:
        return False


def space_of(curves: Curves, side: Own) -> TableSpace:
    """Build the space that contains all rows."""
    search: dict[str, Parameter] = {}
    for path in curves.configs[0]:
        values = sorted({config[path] for config in curves.configs})
        if is_choice(values):
            search[path] = Categorical(path, {}, tuple(values))
        else:
            search[path] = Real(path, {}, values[0], values[-1], log=path in LOG)
    sampler: Sampler = TypeAdapter(Sampler).validate_python({"name": side.sampler})
    pruner: Pruner = TypeAdapter(Pruner).validate_python({"name": side.pruner})
    baseline = TrainConfig().override({"epochs": curves.val.shape[1], **curves.configs[0]})
    return TableSpace(
        "table", Path("table"), "", Objective(), len(curves.tests), sampler, pruner, Confirm(), baseline, (), search
    )


def is_choice(values: Sequence[Any]) -> bool:
    """Whether a field's values, without repetition, are choices and no samples of a range."""
    return len(values) < 10


class Rows:
    """Finds rows of the table."""

    def __init__(self, curves: Curves) -> None:
        self._blocks: dict[str, tuple[Callable[[Any], NDArray[np.float64]], NDArray[np.float64]]] = {}
        self._numbers = {tuple(config.values()): row for row, config in enumerate(curves.configs)}
        self._fields = tuple(curves.configs[0])
        for path in self._fields:
            values = [config[path] for config in curves.configs]
            place = _placed(path, values)
            self._blocks[path] = place, np.array([place(value) for value in values])

    def number(self, config: Mapping[str, Any]) -> int:
        """The row with these values of its fields."""
        return self._numbers[tuple(config[path] for path in self._fields)]

    def nearest(self, params: Mapping[str, Any], taken: set[int]) -> int:
        """The row nearest to a point, of those not taken."""
        squares = sum(((block - place(params[path])) ** 2).sum(1) for path, (place, block) in self._blocks.items())
        squares[list(taken)] = np.inf
        return int(squares.argmin())


def _placed(path: str, values: Sequence[Any]) -> Callable[[Any], NDArray[np.float64]]:
    """Coordinates of a field's value, whose squared distance between two random rows has the mean 1."""
    known = sorted(set(values))
    if is_choice(known):
        shares = [values.count(one) / len(values) for one in known]
        scale = (2 * (1 - sum(share**2 for share in shares))) ** 0.5 or 1.0  # 0 of a field with one value
        return lambda value: np.array([one == value for one in known]) / scale
    of = np.log if path in LOG else float
    scale = (2 * np.var([of(value) for value in values])) ** 0.5
    return lambda value: np.array([of(value) / scale])


@dataclass
class Replay:
    """One search on the table: what it has trained and chosen so far."""

    curves: Curves
    rows: Rows
    taken: set[int] = field(default_factory=set)
    spent: int = 0
    """Epochs."""
    chosen: list[tuple[int, int]] = field(default_factory=list)
    """After so many epochs, the search would choose this row."""
    choose: Callable[[], FrozenTrial | None] = lambda: None

    def look(self) -> None:
        """Record what the search would choose now."""
        if (trial := self.choose()) is not None:
            self.chosen.append((self.spent, self.rows.number(trial.params)))

    def scores(self, row: int, done: int = 0) -> Iterator[float]:
        """Train a row's epochs after the first `done`, and yield their scores."""
        self.look()
        self.taken.add(row)
        for score in self.curves.val[row, done:]:
            self.spent += 1
            yield float(score)

    def test_at(self, epochs: Fraction | int) -> float:
        """Test accuracy of the choice after so many epochs; NaN before there is one."""
        made = [row for spent, row in self.chosen if spent <= epochs]
        return float(self.curves.tests[made[-1]]) if made else float("nan")

    def train(
        self,
        config: TrainConfig,
        splits: Splits,
        *,
        device: torch.device,
        on_epoch_end: Callable[[EpochMetrics], None],
        on_resume: Callable[[tuple[EpochMetrics, ...]], None],
        resume_from: Path,
        checkpoint_to: Path,
        checkpoint_at: frozenset[int],
        checkpoint_at_end: bool,
        calibrate_at: frozenset[int],
        on_checkpoint: Callable[[Path], None],
        metric: str,
        averages: Sequence[float],
    ) -> TrainResult:
        """Replay a training as `core.loop.train` would have run. A checkpoint has its number of epochs."""
        row = self.rows.number(config.flat())
        done = int(resume_from.read_text()) if resume_from.exists() else 0
        history = [_epoch(epoch, float(score)) for epoch, score in enumerate(self.curves.val[row, :done], 1)]
        if history:
            on_resume(tuple(history))
        checkpoint_to.parent.mkdir(parents=True, exist_ok=True)
        for epoch, score in enumerate(self.scores(row, done), done + 1):
            history.append(_epoch(epoch, score))
            try:
                on_epoch_end(history[-1])
            except KeyboardInterrupt:
                checkpoint_to.write_text(str(epoch))
                raise
            if epoch in checkpoint_at:
                checkpoint_to.write_text(str(epoch))
        return TrainResult(torch.nn.Identity(), tuple(history), history[-1], _logits(splits, history[-1]))


def _epoch(epoch: int, accuracy: float) -> EpochMetrics:
    """The table has no other scores than the accuracy."""
    scores = Scores(loss=1 - accuracy, accuracy=accuracy, balanced_accuracy=accuracy, macro_f1=accuracy, ece=0.0)
    return EpochMetrics(epoch, epoch, 0.1, 1 - accuracy, scores, None, False, 1, 1.0, float(epoch))


def _splits(images: int) -> Splits:
    """Validation images of two classes, which nothing reads."""
    rows = torch.arange(images)
    return Splits(torch.zeros(images, 1, 1, 1, dtype=torch.uint8), rows % 2, rows[:0], rows, ("0", "1"), (0.5,), (0.5,))


def _logits(splits: Splits, epoch: EpochMetrics) -> torch.Tensor:
    """Predictions with the accuracy of the epoch."""
    right = torch.arange(len(splits.val)) < round(epoch.score("accuracy") * len(splits.val))
    predicted = torch.where(right, splits.labels, 1 - splits.labels)
    return torch.nn.functional.one_hot(predicted, 2).float()


class OnRows(BaseSampler):
    """Replaces the proposals of another sampler by rows of the table."""

    def __init__(self, inner: BaseSampler, replay: Replay, space: TableSpace) -> None:
        self._inner, self._replay, self._space = inner, replay, space

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space.distributions

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        known = self._inner.infer_relative_search_space(study, trial)
        params = self._inner.sample_relative(study, trial, known)
        for name, distribution in search_space.items():
            if name not in params:
                params[name] = self._inner.sample_independent(study, trial, name, distribution)
        return self._replay.curves.configs[self._replay.rows.nearest(params, self._replay.taken)]

    def sample_independent(self, *_: Any) -> Any:
        raise AssertionError("every parameter is relative")


def furthest(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The best of the trials that have come furthest."""
    begun = [trial for trial in trials if trial.intermediate_values]
    return max(begun, key=lambda trial: max(trial.intermediate_values.items()), default=None)


def study_of(space: SearchSpace, sampler: BaseSampler, folder: Path, seed: int) -> Study:
    """Begin a study in memory, with the space's pruner."""
    study = optuna.create_study(
        study_name=folder.name,
        storage=InMemoryStorage(),
        direction=space.direction,
        sampler=sampler,
        pruner=build_pruner(space.pruner, space.baseline.epochs),
    )
    metadata = {
        "data": {"path": None},
        "seed": seed,
        "metric": space.metric,
        "direction": space.direction,
        "identity": space.identity(),
    }
    return Study(study, StudyPaths(folder), metadata, "memory", space)


def run_own(side: Own, replay: Replay, *, trials: int, seed: int) -> None:
    """Search by `hpo`."""
    space = space_of(replay.curves, side)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        own = study_of(space, OnRows(build_sampler(space.sampler, seed=seed), replay, space), folder, seed)
        own.queue.ensure_trials(trials)
        replay.choose = lambda: own.best_trial() or furthest(own.optuna.get_trials(deepcopy=False))
        stack.enter_context(mock.patch.object(hpo.search.objective, "train", replay.train))
        for module, name, silent in RECORDS:
            stack.enter_context(mock.patch.object(module, name, silent))
        interrupts = stack.enter_context(Interrupts())
        splits = [_splits(replay.curves.images)]
        run_study(own, space, splits, device=torch.device("cpu"), interrupts=interrupts)


def run_plain(pruner: Plain, replay: Replay, *, trials: int, seed: int) -> None:
    """Search by Optuna."""
    space = space_of(replay.curves, Own("random", "none"))
    sampler = OnRows(TPESampler(seed=seed), replay, space)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner(space.baseline.epochs))

    def choose() -> FrozenTrial | None:
        with contextlib.suppress(ValueError):  # no trial is complete
            return study.best_trial
        return furthest(study.get_trials(deepcopy=False))

    def objective(trial: optuna.Trial) -> float:
        space.suggest(trial)
        score = 0.0
        for epoch, score in enumerate(replay.scores(replay.rows.number(trial.params)), 1):
            trial.report(score, epoch)
            if epoch < space.baseline.epochs and trial.should_prune():
                raise optuna.TrialPruned
        return score

    replay.choose = choose
    study.optimize(objective, n_trials=trials)


def run(side: Own | Plain, curves: Curves, *, trials: int, seed: int) -> Replay:
    """Run one search to its end."""
    replay = Replay(curves, Rows(curves))
    if isinstance(side, Own):
        run_own(side, replay, trials=trials, seed=seed)
    else:
        run_plain(side, replay, trials=trials, seed=seed)
    replay.look()
    return replay


def curves_of(given: argparse.Namespace, seed: int) -> Curves:
    """The table as this repeat sees it."""
    curves, rng = read(given.table, given.images), np.random.default_rng(seed)
    if given.slow:
        curves = curves.rows(np.array([config["optim.name"] == "sgd" for config in curves.configs]))
    if given.draw is not None:
        curves = curves.drawn(given.draw, rng)
    return curves.shuffled(given.shuffle, rng) if given.shuffle else curves


def row_of(found: Sequence[Replay], full: Sequence[Replay], at: Fraction) -> list[str]:
    """The scores of a side, mean ± standard error, and its cost; compared with the ends of `full` at a cost."""
    epochs = full[0].spent
    targets = [one.test_at(epochs) for one in full]
    cells = [_mean([one.test_at(end) for one in found]) for end in [*(cost * epochs for cost in COSTS), epochs]]
    cost = statistics.fmean(one.spent for one in found) / epochs
    difference = paired([one.test_at(at * epochs) for one in found], targets)
    return [*cells, f"1/{1 / cost:.1f}", _reached(found, statistics.fmean(targets), epochs), difference]


def _mean(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.4f} ± {error:.4f}"


def _reached(found: Sequence[Replay], target: float, epochs: int) -> str:
    """The cost from which the mean score is at least the target."""
    for spent in range(epochs // 100, epochs + 1, max(1, epochs // 1000)):
        if statistics.fmean(one.test_at(spent) for one in found) >= target:
            return f"1/{epochs / spent:.1f}"
    return "-"


def main() -> None:
    given = options().parse_args()
    described = machine()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sides = [FULL, *(name for name in given.sides if name != FULL)]
    found: dict[str, list[Replay]] = {name: [] for name in sides}
    seconds = dict.fromkeys(sides, 0.0)
    for seed in range(given.repeats):
        curves = curves_of(given, seed)
        for name in sides:
            began = time.perf_counter()
            found[name].append(run(SIDES[name], curves, trials=given.trials, seed=seed))
            seconds[name] += (time.perf_counter() - began) / given.repeats
    header = ["side", *map(str, COSTS), "end", "cost", "as in full at", f"{given.at}, less in full", "s"]
    rows = [[name, *row_of(found[name], found[FULL], given.at), f"{seconds[name]:.2f}"] for name in sides]
    print(table(header, rows))
    print(f"\nmean ± standard error of {given.repeats} searches of {given.trials} trials; differences are paired")
    chosen = {name: [one.chosen for one in searches] for name, searches in found.items()}
    finish("search", given.json, described, rows=rows, chosen=chosen)


def options() -> argparse.ArgumentParser:
    found = parser(__doc__)
    found.set_defaults(repeats=100)
    found.add_argument("table", type=Path, metavar="TABLE", nargs="?", default=CURVES / "digits300.jsonl.gz")
    found.add_argument("--images", type=positive, default=200, help="validation images of the table's trainings")
    found.add_argument("--trials", type=positive, default=100, help="trials of a search")
    found.add_argument("--at", type=Fraction, default=Fraction(1, 12), help="cost to compare with random in full at")
    found.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE")
    found.add_argument("--draw", type=positive, metavar="N", help="validation images to draw scores of")
    found.add_argument("--shuffle", type=int, default=0, metavar="EPOCHS", help="first epochs to shuffle")
    found.add_argument("--slow", action="store_true", help="SGD's rows only")
    return found


if __name__ == "__main__":
    main()
