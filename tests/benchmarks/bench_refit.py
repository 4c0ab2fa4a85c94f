"""What the choices of a refit are worth: average and views chosen on held-out images, against plain refit.

For each set and seed, a configuration without averaging is trained three times on three quarters of the images, as the
replicates of a confirmation, with the EMAs that a refit tries. `hpo.submission` decides on the predictions of the rest.
Then the same configuration is trained once on all images. Plain refit is that training's own weights with one view; the
choice is the same training's chosen average with the chosen views. Both are scored on test images that no training saw
and no choice was made by. Every seed draws other training and test images and other weights.

`best of all` is the candidate with the best test score, chosen by the test images: no method can reach it reliably.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import cores, finish, machine, mean_and_deviation, parser, positive, table
from sklearn.model_selection import StratifiedShuffleSplit
from trainings import SHARED, RandomCut, paired

from core.config import TrainConfig
from core.data import Splits
from core.loop import train
from core.metrics import scores
from core.seeds import derive_seed
from hpo.search.held_out import half_lives
from hpo.submission.decision import decide
from hpo.submission.evidence import Evidence
from hpo.submission.networks import Network

CPU = torch.device("cpu")
REPLICATES = 3
HELD_OUT = 0.25


@dataclass(frozen=True)
class Subject:
    """A set, cut to a size for two cores, and its configuration."""

    path: Path
    classes: int
    images: int
    """Of each class, in training and validation together; a class that has fewer gives all that it has."""
    judged: int
    """Test images of each class."""
    side: int
    epochs: int
    changes: dict[str, Any]


SMALL = {"batch_size": 64, "model.widths": (16, 32, 64), "model.blocks": (1, 1, 1), "optim.lr_scale": 4.0}
SUBJECTS = {
    "digits": Subject(Path("digits"), 10, 100, 30, 8, 30, {"augment.flip": 0.0, "model.widths": (16, 32)}),
    "cifar10": Subject(SHARED / "cifar10_jpeg.tar.xz", 10, 100, 200, 32, 24, {}),
    "trashnet": Subject(SHARED / "trashnet96.zip", 6, 150, 100, 48, 24, {}),
    "scenes": Subject(SHARED / "scenes5k.zip", 6, 150, 300, 48, 24, {}),
}


@dataclass(frozen=True)
class Measured:
    """One seed on one set; scores are test accuracies."""

    subject: str
    seed: int
    average: str
    views: str
    plain: float
    chosen: float
    everything: dict[str, float]
    """Score of each average with each choice of views: `ema_0.03, flip`."""


def measure(name: str, seed: int, cache: Path) -> Measured:
    """Train the replicates, decide, and train on all images."""
    torch.set_num_threads(1)
    subject = SUBJECTS[name]
    counts = (subject.images,) * subject.classes
    cut = RandomCut(subject.path, counts, subject.judged, seed, subject.side, cache)()
    changes = {"epochs": subject.epochs, "seed": seed, **SMALL, **subject.changes}
    if "model.widths" in subject.changes:
        changes["model.blocks"] = (1,) * len(subject.changes["model.widths"])
    config = TrainConfig().override(changes)
    decision = decide(
        Evidence.of_networks([replicate(config, cut, number) for number in range(REPLICATES)]), "accuracy"
    )
    whole = train(config, replace(cut, val=cut.val[:0]), device=CPU, averages=half_lives(config))
    final = Network(whole.model, config, cut, (), averages=whole.averages)
    found = Evidence.of_networks([final])  # whose validation images are the test images
    everything = {
        f"{average}, {views}": scores(logits, found.labels).accuracy
        for average, by_views in found.logits.items()
        for views, logits in by_views.items()
    }
    chosen = everything[f"{decision.average}, {decision.views}"]
    return Measured(name, seed, decision.average, decision.views, everything["own, none"], chosen, everything)


def replicate(config: TrainConfig, cut: Splits, number: int) -> Network:
    """Train on a random part of the training images, the rest being held out."""
    seed = derive_seed(config.seed, "replicate", number)
    divide = StratifiedShuffleSplit(1, test_size=HELD_OUT, random_state=seed % 2**32)
    labels = cut.labels[cut.train].numpy()
    rows, held = (torch.from_numpy(each) for each in next(divide.split(labels, labels)))
    divided = replace(cut, train=cut.train[rows], val=cut.train[held])
    result = train(config.override({"seed": seed}), divided, device=CPU, averages=half_lives(config))
    return Network(result.model, config, divided, (), averages=result.averages)


def row_of(name: str, found: list[Measured]) -> list[str]:
    plain, chosen = [one.plain for one in found], [one.chosen for one in found]
    best = [max(one.everything.values()) for one in found]
    taken = Counter(f"{one.average}, {one.views}" for one in found)
    return [
        name,
        mean_and_deviation(plain),
        mean_and_deviation(chosen),
        paired(chosen, plain),
        f"{min(c - p for c, p in zip(chosen, plain, strict=True)):+.4f}",
        f"{statistics.fmean(best) - statistics.fmean(plain):+.4f}",
        "; ".join(f"{choice} ({count})" for choice, count in taken.most_common()),
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), help="sets")
    options.add_argument("--workers", type=positive, default=cores(), help="trainings at once, one thread each")
    given = options.parse_args()
    described = machine()
    jobs = [(name, seed) for name in given.subjects for seed in range(given.repeats)]
    done: list[Measured] = []
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(given.workers, mp_context=context) as pool:
            for future in as_completed([pool.submit(measure, *job, Path(folder)) for job in jobs]):
                one = future.result()
                done.append(one)
                gain = f"{one.chosen - one.plain:+.4f}"
                print(
                    f"{len(done)}/{len(jobs)} {one.subject}, seed {one.seed}: {one.average}, {one.views}: {gain}",
                    flush=True,
                )
    done.sort(key=lambda one: (given.subjects.index(one.subject), one.seed))
    rows = [row_of(name, [one for one in done if one.subject == name]) for name in given.subjects]
    rows.append(row_of("all", done))
    print()
    header = ["test accuracy", "plain refit", "refit's choices", "gain", "worst", "best of all", "taken"]
    print(table(header, rows))
    finish("refit", given.json, described, measured=[asdict(one) for one in done])


if __name__ == "__main__":
    main()
