"""What the benchmarks of accuracy share: real sets cut to a size for two cores, and many trainings side by side.

A training depends on its configuration, its cut and nothing else, so they run in as many processes as there are cores,
each with one thread: the order of their ends makes no difference. Scores are of images that no training saw. Where a
benchmark decides what the shipped spaces search, a score of such a space on the same set is no proof of it.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ROOT

from core.config import DataConfig, TrainConfig
from core.data import Splits, load_dataset
from core.loop import train
from core.metrics import Scores, scores
from core.runtime import normalize
from core.tta import predict_logits

SHARED = ROOT.parent / "shared" / "data"

Cut = Callable[[], Splits]
"""Makes the images of one training, in the process that trains on them."""


@dataclass(frozen=True)
class Job:
    """One training: what it is a sample of, its configuration, its images."""

    name: str
    seed: int
    config: TrainConfig
    cut: Cut


@dataclass(frozen=True)
class Done:
    """What came of it, by the images that were held out, at its end."""

    name: str
    seed: int
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    loss: float
    seconds: float


@dataclass(frozen=True)
class RandomCut:
    """So many images of each class for training, and as many of every class of the set's own test images to judge by.

    Args:
        path: an archive that `core.data` reads, with test images of its own.
        counts: training images of each class, in the order of the classes; a class that has fewer gives all it has.
        judged: test images of each class.
        seed: draws both.
        side: height and width in pixels that the images are resized to.
    """

    path: Path
    counts: tuple[int, ...]
    judged: int
    seed: int
    side: int
    cache: Path

    def __call__(self) -> Splits:
        dataset = load_dataset(DataConfig(name=str(self.path), image_size=self.side), cache_dir=self.cache)
        test = dataset.open_test()  # a benchmark compares methods, and no model is chosen by it
        generator = torch.Generator().manual_seed(self.seed)
        train_rows = _draw(dataset.labels, self.counts, generator)
        test_rows = _draw(test.labels, (self.judged,) * len(dataset.classes), generator)
        pixels = dataset.images[train_rows].float() / 255
        return Splits(
            images=torch.cat([dataset.images[train_rows], test.images[test_rows]]),
            labels=torch.cat([dataset.labels[train_rows], test.labels[test_rows]]),
            train=torch.arange(len(train_rows)),
            val=torch.arange(len(train_rows), len(train_rows) + len(test_rows)),
            classes=dataset.classes,
            mean=tuple(pixels.mean((0, 2, 3)).tolist()),
            std=tuple(pixels.std((0, 2, 3)).tolist()),
        )


def _draw(labels: torch.Tensor, counts: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Rows (sum of the counts,) int64: so many of each class, at random."""
    shuffled = torch.randperm(len(labels), generator=generator)
    rows = [shuffled[labels[shuffled] == label][:count] for label, count in enumerate(counts)]
    return torch.cat(rows)


def run_all(jobs: Sequence[Job], *, workers: int, said: Callable[[Done], str]) -> list[Done]:
    """Trains every job, `workers` at a time with one thread each, and says a line as each ends."""
    done: list[Done] = []
    if not jobs:
        return done
    jobs[0].cut()  # decodes the set once, before the workers would all do it
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        for future in as_completed([pool.submit(_train, job) for job in jobs]):
            done.append(future.result())
            print(f"{len(done)}/{len(jobs)} {said(done[-1])}", flush=True)
    return sorted(done, key=lambda one: ([job.name for job in jobs].index(one.name), one.seed))


def accuracy_line(one: Done) -> str:
    """For `run_all`."""
    return f"{one.name}, seed {one.seed}: accuracy {one.accuracy:.4f}, {one.seconds:.0f} s"


def by_name(done: Iterable[Done]) -> dict[str, list[Done]]:
    """The trainings by what they are a sample of, each list in the order of the seeds."""
    groups: dict[str, list[Done]] = {}
    for one in done:
        groups.setdefault(one.name, []).append(one)
    return groups


def paired(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The mean difference over equal seeds with its 95 % t interval: `+0.031 (0.012 to 0.050)`."""
    import numpy as np
    from scipy import stats

    differences = np.subtract(ours, theirs)
    mean = float(differences.mean())
    if len(differences) < 2:
        return f"{mean:+.4f}"
    half = float(stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5)
    return f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"


def rows_of(done: Iterable[Done]) -> list[dict[str, Any]]:
    """For the JSON."""
    return [vars(one) for one in done]


def _one_thread() -> None:
    torch.set_num_threads(1)


def _train(job: Job) -> Done:
    splits = job.cut()
    started = time.perf_counter()
    # Judged at the end alone: the epochs' own scores would cost as much as the training, and nobody reads them.
    silent = Splits(**{**vars(splits), "val": splits.val[:1]})
    result = train(job.config, silent, device=torch.device("cpu"))
    seconds = time.perf_counter() - started
    found = judge(splits, result.model)
    return Done(
        job.name,
        job.seed,
        found.accuracy,
        found.balanced_accuracy,
        found.macro_f1,
        found.loss,
        seconds,
    )


def judge(splits: Splits, model: torch.nn.Module) -> Scores:
    """The scores of a network on the images that were held out."""
    prepare = partial(normalize, mean=splits.mean, std=splits.std)
    logits = predict_logits(model, splits.images[splits.val], prepare=prepare)
    return scores(logits, splits.labels[splits.val])
