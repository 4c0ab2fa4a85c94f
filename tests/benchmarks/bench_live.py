"""Searches by real trainings at equal epochs: the test accuracy of what each chooses.

The space is `scratch` with a narrower network, 32² images and shorter trainings. Every side may train an eighth of the
epochs of 60 configurations in full, then stops as by Ctrl-C. The sides by this project run `hpo.search.loop.run_study`
with its queue, samplers and pruners, the baseline first; Optuna's run `Study.optimize` with the same space. Each
training is scored at its end on test images that no search sees, and a search on

- naive: the best trial by its validation score, as `Study.best_trial` chooses;
- confirmed: of the two best and the baseline, each trained on two other seeds and splits, the one with the best mean
  of these. Their epochs come on top, the same for every side.

`baseline, once` trains the baseline for all of the epochs. A repeat draws other training, validation and test images
for all sides alike. `--json` has every finished side at once; `--join` makes one table of several such files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import optuna
import torch
from bench_search import FULL, SIDES, Own, study_of
from common import finish, machine, mean_and_deviation, parser, table
from optuna.pruners import BasePruner
from optuna.samplers import TPESampler
from sklearn.model_selection import StratifiedShuffleSplit
from trainings import SHARED, RandomCut, judge, paired

import hpo.search.objective
from core.config import TrainConfig
from core.data import Splits
from core.errors import DivergedError
from core.loop import EpochMetrics, TrainResult, train
from core.seeds import derive_seed
from hpo.search.interrupts import Interrupts
from hpo.search.loop import run_study
from hpo.space import SearchSpace, load_space
from hpo.space.samplers import build_sampler

CPU = torch.device("cpu")
ONCE = "baseline, once"
ALL = "all"
COMPARED = [ONCE, "Optuna: TPE, Hyperband", *(name for name in SIDES if not name.startswith("Optuna"))]
SETTINGS = ("model.widths=[8,16,32]",)
SIDE = 32
VAL_FRACTION = 0.2
CONFIGURATIONS, SHARE = 60, 8
FINALISTS, REPLICATES = 2, 2


@dataclass(frozen=True)
class Subject:
    """A set, cut to a size for one core."""

    file: str
    counts: tuple[int, ...]
    """Training and validation images of each class."""
    judged: int
    """Test images of each class."""
    epochs: int = 24


SUBJECTS = {
    "trashnet": Subject("trashnet96.zip", (100,) * 6, 80),
    "scenes": Subject("scenes5k.zip", (84,) * 6, 200),
    "cifar10, long tail": Subject(
        "cifar10_jpeg.tar.xz", tuple(round(150 * 10 ** (-place / 9)) for place in range(10)), 100
    ),
}


class SpentError(KeyboardInterrupt):
    """All epochs are used."""


@dataclass(frozen=True)
class Ended:
    """A training that ended."""

    config: TrainConfig
    val: float
    loss: float
    """Of the validation images."""
    test: float

    @property
    def key(self) -> str:
        return self.config.override({"seed": 0}).model_dump_json()


@dataclass
class Live:
    """One search: its images, the epochs that it may use and has used, and its trainings."""

    splits: Splits
    test: Splits
    """Its validation images are the test images."""
    budget: float
    spent: int = 0
    ended: dict[str, Ended] = field(default_factory=dict)
    """By configuration."""

    def train(self, config: TrainConfig, splits: Splits, **options: Any) -> TrainResult:
        """Train as `core.loop.train`, until the epochs of the search are used."""
        on_epoch_end: Callable[[EpochMetrics], None] = options.pop("on_epoch_end", lambda _: None)

        def counted(now: EpochMetrics) -> None:
            self.spent += 1
            on_epoch_end(now)
            if self.spent >= self.budget and now.epoch < config.epochs:
                raise SpentError

        result = train(config, splits, on_epoch_end=counted, **options)
        found = result.kept.counted("accuracy")
        test = judge(self.test, result.model).accuracy
        self.ended[config.model_dump_json()] = Ended(config, found.accuracy, found.loss, test)
        if self.spent >= self.budget:
            raise SpentError
        return result

    @property
    def best(self) -> list[Ended]:
        """The trainings that ended, the best first, by their validation images."""
        return sorted(self.ended.values(), key=lambda one: (-one.val, one.loss))


def space_of(side: Own, epochs: int) -> SearchSpace:
    settings = [*SETTINGS, f"epochs={epochs}", f"sampler={{name: {side.sampler}}}", f"pruner={{name: {side.pruner}}}"]
    return load_space("scratch", settings)


def run_own(side: Own, live: Live, epochs: int, seed: int) -> None:
    """Search by `hpo`, the baseline first."""
    space = space_of(side, epochs)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        own = study_of(space, build_sampler(space.sampler, seed=seed), folder, seed)
        own.queue.ensure_trials(space.trials)
        stack.enter_context(mock.patch.object(hpo.search.objective, "train", live.train))
        interrupts = stack.enter_context(Interrupts())
        try:
            run_study(own, space, [live.splits], device=CPU, interrupts=interrupts)
        except KeyboardInterrupt:  # also as which the search reports the other
            if live.spent < live.budget:
                raise


def run_plain(pruner: Callable[[int], BasePruner], live: Live, epochs: int, seed: int) -> None:
    """Search by Optuna."""
    space = space_of(Own("random", "none"), epochs)
    study = optuna.create_study(direction="maximize", sampler=TPESampler(seed=seed), pruner=pruner(epochs))

    def objective(trial: optuna.Trial) -> float:
        config = space.baseline.override(space.suggest(trial))

        def report(now: EpochMetrics) -> None:
            trial.report(now.score("accuracy"), now.epoch)
            if now.epoch < epochs and trial.should_prune():
                raise optuna.TrialPruned

        result = live.train(config, live.splits, device=CPU, on_epoch_end=report)
        return result.kept.score("accuracy")

    with contextlib.suppress(SpentError):
        study.optimize(objective, n_trials=space.trials, catch=(DivergedError,))


def run_once(config: TrainConfig, live: Live) -> None:
    """Train one configuration to its end."""
    with contextlib.suppress(SpentError):
        live.train(config, live.splits, device=CPU)


def confirmed(live: Live, baseline: Ended, whole: Splits, seed: int, known: dict[str, float]) -> Ended:
    """The best of the finalists by the mean of trainings on other seeds and splits, of which some are known."""
    finalists = (*live.best[:FINALISTS], baseline)
    for one in finalists:
        if one.key not in known:
            known[one.key] = statistics.fmean(replicates(one.config, whole, seed))
    return max(finalists, key=lambda one: known[one.key])


def replicates(config: TrainConfig, whole: Splits, seed: int) -> Iterator[float]:
    """Validation scores of trainings on other seeds and splits."""
    for number in range(1, REPLICATES + 1):
        other = derive_seed(seed, "replicate", number)
        divided = divide(whole, other)
        try:
            result = train(config.override({"seed": other}), divided, device=CPU)
        except DivergedError:
            yield 0.0
        else:
            yield result.kept.score("accuracy")


def divide(splits: Splits, seed: int) -> Splits:
    """Take validation images from the training images."""
    labels = splits.labels[splits.train].numpy()
    by_class = StratifiedShuffleSplit(1, test_size=VAL_FRACTION, random_state=seed % 2**32)
    kept, held = (torch.from_numpy(rows) for rows in next(by_class.split(labels, labels)))
    return replace(splits, train=splits.train[kept], val=splits.train[held])


def measure(name: str, seed: int, sides: Sequence[str], cache: Path) -> Iterator[dict[str, Any]]:
    """Run the sides on one draw of the images."""
    subject = SUBJECTS[name]
    cut = RandomCut(SHARED / subject.file, subject.counts, subject.judged, seed, SIDE, cache)()
    splits = divide(cut, seed)
    epochs = subject.epochs
    budget = CONFIGURATIONS * epochs // SHARE
    first = space_of(Own("random", "none"), epochs).baseline.override({"seed": seed})
    baseline = Live(splits, cut, math.inf)
    run_once(first, baseline)
    (alone,) = baseline.best
    means: dict[str, float] = {}
    yield {"side": "baseline", "naive": alone.test, "confirmed": alone.test, "epochs": baseline.spent, "ended": 1}
    for side in sides:
        began, live = time.perf_counter(), Live(splits, cut, budget)
        if side == ONCE:
            run_once(first.override({"epochs": budget}), live)
        elif isinstance(kind := SIDES[side], Own):
            run_own(kind, live, epochs, seed)
        else:
            run_plain(kind, live, epochs, seed)
        naive = live.best[0]
        winner = naive if side == ONCE else confirmed(live, alone, cut, seed, means)
        yield {
            "side": side,
            "naive": naive.test,
            "confirmed": winner.test,
            "epochs": live.spent,
            "ended": len(live.ended),
            "seconds": time.perf_counter() - began,
        }


def rows(found: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """One row per set and side, and per side over all pairs of a set and a seed that have it and random in full.

    Differences are paired with random draws trained in full.
    """
    of = {(one["data"], one["side"], one["seed"]): one for one in found}
    sides = list(dict.fromkeys(one["side"] for one in found))
    for name, side in product((*dict.fromkeys(one["data"] for one in found), ALL), sides):
        pairs = [(data, seed) for data, other, seed in of if other == side and name in (data, ALL)]
        compared = [pair for pair in pairs if (pair[0], FULL, pair[1]) in of]
        if not pairs:
            continue
        cells = [name, side, str(len(pairs))]
        for which in ("naive", "confirmed"):
            ours, theirs = ([of[data, one, seed][which] for data, seed in compared] for one in (side, FULL))
            better = paired(ours, theirs) if side != FULL and compared else ""
            cells += [mean_and_deviation([of[data, side, seed][which] for data, seed in pairs], 3), better]
        yield [*cells, f"{statistics.fmean(of[data, side, seed]['ended'] for data, seed in pairs):.1f}"]


COLUMNS = ["data", "side", "n", "naive", "less random in full", "confirmed", "less random in full", "in full"]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", default=[*SUBJECTS], choices=[*SUBJECTS], help="data sets")
    options.add_argument("--sides", nargs="+", default=COMPARED, choices=[ONCE, *SIDES], metavar="SIDE")
    options.add_argument("--first", type=int, default=0, help="seed of the first repeat")
    options.add_argument("--join", nargs="+", type=Path, metavar="PATH", help="measure nothing; the table of these")
    given = options.parse_args()
    if given.join is not None:
        joined = [one for path in given.join for one in json.loads(path.read_text())["found"]]
        print(table(COLUMNS, list(rows(joined))))
        return
    described, found = machine(), []
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory() as cache:
        for seed, name in product(range(given.first, given.first + given.repeats), given.only):
            for one in measure(name, seed, given.sides, Path(cache)):
                found.append({"data": name, "seed": seed, **one})
                print(found[-1], flush=True)
                finish("live", given.json, described, found=found)
    print("\n" + table(COLUMNS, list(rows(found))))


if __name__ == "__main__":
    main()
