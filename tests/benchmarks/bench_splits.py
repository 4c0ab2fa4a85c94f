"""Replicates on free splits or on the folds of a repeated k-fold: what the same number of trainings shows.

Data sets of 250 images are drawn from the digits. On each, configurations are trained on both kinds of splits (a fifth
of the images validates), and compared in pairs. The truth is the mean difference on the digits outside the data sets,
over all trainings. `classifiers` are learners of scikit-learn whose result depends on their images alone; `networks`
are small perceptrons, which depend on their initial weights too.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import finish, machine, parser, positive, table
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from torch.nn import functional

from core.config import DataConfig
from core.data.splits import stratified
from hpo.confirmation.statistics import corrected_interval, effective_share

IMAGES = 250
VAL_FRACTION = 0.2
PARTS = 5
SHARE = VAL_FRACTION / (1 - VAL_FRACTION)
MODEST = (0.015, 0.06)
"""True gains whose discovery counts as power."""

CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "ridge 1": lambda: RidgeClassifier(alpha=1.0),
    "ridge 10": lambda: RidgeClassifier(alpha=10.0),
    "1 neighbour": lambda: KNeighborsClassifier(1),
    "5 neighbours": lambda: KNeighborsClassifier(5),
    "SVM": lambda: SVC(C=1.0),
    "SVM, C 0.2": lambda: SVC(C=0.2),
    "LDA": lambda: LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1),
}


@dataclass(frozen=True)
class Network:
    """One hidden layer, or none, trained by AdamW with a one-cycle rate."""

    hidden: int
    rate: float
    dropout: float = 0.0


NETWORKS = {
    "32": Network(32, 0.003),
    "128": Network(128, 0.003),
    "64, dropout": Network(64, 0.003, 0.3),
    "linear": Network(0, 0.01),
    "32, slow": Network(32, 0.001),
}

PIXELS = torch.tensor(load_digits().data / 16 - 0.3, dtype=torch.float32)
LABELS = torch.tensor(load_digits().target)


@dataclass
class Scores:
    """Of one configuration, by kind of split."""

    validated: dict[str, list[float]] = field(default_factory=lambda: {"free": [], "folds": []})
    outside: list[float] = field(default_factory=list)
    """On the images outside the data set, of all trainings."""


Set = dict[str, Scores]


@dataclass(frozen=True)
class Split:
    """Rows of the digits."""

    kind: str
    train: NDArray[np.int64]
    val: NDArray[np.int64]
    outside: NDArray[np.bool_]


def splits(rng: np.random.Generator, trainings: int) -> Iterator[Split]:
    """The splits of a new data set, as a search and a confirmation draw them."""
    rows, _ = train_test_split(np.arange(len(LABELS)), train_size=IMAGES, stratify=LABELS, random_state=seed_of(rng))
    outside = np.ones(len(LABELS), dtype=bool)
    outside[rows] = False
    images = torch.zeros((IMAGES, 1, 8, 8), dtype=torch.uint8)
    data: Any = SimpleNamespace(images=images, labels=LABELS[rows], groups=None, source="digits")
    data.classes, data.twins = tuple(map(str, range(10))), torch.arange(IMAGES)
    for kind in ("free", "folds"):
        for number in range(trainings):
            if kind == "free" or number % PARTS == 0:
                seed = seed_of(rng)
            part = None if kind == "free" else number % PARTS
            config = DataConfig(val_fraction=VAL_FRACTION, split_seed=seed, val_part=part, normalize="half")
            drawn = stratified(data, config)
            yield Split(kind, rows[drawn.train], rows[drawn.val], outside)


def seed_of(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def classifier_sets(sets: int, trainings: int, seed: int) -> Iterator[Set]:
    rng, pixels, labels = np.random.default_rng(seed), PIXELS.numpy(), LABELS.numpy()
    for _ in range(sets):
        found = {name: Scores() for name in CLASSIFIERS}
        for split in splits(rng, trainings):
            for name, build in CLASSIFIERS.items():
                right = build().fit(pixels[split.train], labels[split.train]).predict(pixels) == labels
                note(found[name], split, right)
        yield found


def network_sets(sets: int, trainings: int, seed: int) -> Iterator[Set]:
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    for _ in range(sets):
        found = {name: Scores() for name in NETWORKS}
        drawn = list(splits(rng, trainings))
        for name, network in NETWORKS.items():
            predicted = trained(network, torch.tensor(np.stack([split.train for split in drawn])), generator)
            for split, right in zip(drawn, (predicted == LABELS).numpy(), strict=True):
                note(found[name], split, right)
        yield found


def note(scores: Scores, split: Split, right: NDArray[np.bool_]) -> None:
    scores.validated[split.kind].append(float(right[split.val].mean()))
    scores.outside.append(float(right[split.outside].mean()))


def trained(network: Network, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Predictions (M, N) for all digits of M networks at once, trained on rows (M, n)."""
    models, count = rows.shape

    def layer(inputs: int, outputs: int) -> list[torch.Tensor]:
        bound = math.sqrt(6 / (inputs + outputs))
        weights = (2 * torch.rand(models, inputs, outputs, generator=generator) - 1) * bound
        return [weights.requires_grad_(), torch.zeros(models, 1, outputs, requires_grad=True)]

    layers = [*layer(64, network.hidden), *layer(network.hidden, 10)] if network.hidden else layer(64, 10)

    def outputs(pixels: torch.Tensor, dropout: float) -> torch.Tensor:
        for weights, bias in zip(layers[:-2:2], layers[1:-2:2], strict=True):
            pixels = torch.relu(torch.baddbmm(bias, pixels, weights))
            pixels = pixels * (torch.rand(pixels.shape, generator=generator) >= dropout) / (1 - dropout)
        return torch.baddbmm(layers[-1], pixels, layers[-2])

    epochs, batch = 24, 32
    optimizer = torch.optim.AdamW(layers, lr=network.rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, network.rate, total_steps=epochs * -(-count // batch))
    for _ in range(epochs):
        order = rows.gather(1, torch.rand(models, count, generator=generator).argsort(1))
        for chosen in order.split(batch, dim=1):
            logits = outputs(PIXELS[chosen], network.dropout)
            loss = functional.cross_entropy(logits.flatten(0, 1), LABELS[chosen].flatten(), reduction="sum")
            optimizer.zero_grad()
            (loss / chosen.shape[1]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return outputs(PIXELS.expand(models, -1, -1), 0.0).argmax(-1)


@dataclass(frozen=True)
class Shown:
    """What one kind of splits and of correction shows, over pairs of configurations."""

    variance: float
    """Of the mean difference."""
    half_width: float
    covered: list[float]
    """Of each pair, the share of intervals with the truth."""
    power: list[float]
    """Of each pair with a modest gain, the share of intervals above zero."""


def shown(found: list[Set], kind: str, trainings: int, per_repeat: int) -> Shown:
    share = effective_share(range(trainings), test_share=SHARE, per_repeat=per_repeat)
    variances, widths, covered, power = [], [], [], []
    for a, b in itertools.combinations(found[0], 2):
        truth = statistics.fmean(statistics.fmean(one[a].outside) - statistics.fmean(one[b].outside) for one in found)
        better, worse = (a, b) if truth > 0 else (b, a)
        intervals = [
            corrected_interval(differences(one, kind, better, worse)[:trainings], test_share=share) for one in found
        ]
        variances.append(statistics.fmean((each.mean - abs(truth)) ** 2 for each in intervals))
        widths.append(statistics.fmean(each.half_width for each in intervals if math.isfinite(each.half_width)))
        covered.append(statistics.fmean(each.low <= abs(truth) <= each.high for each in intervals))
        if MODEST[0] <= abs(truth) <= MODEST[1]:
            power.append(statistics.fmean(each.low > 0 for each in intervals))
    return Shown(statistics.fmean(variances), statistics.fmean(widths), covered, power)


def differences(found: Mapping[str, Scores], kind: str, a: str, b: str) -> list[float]:
    return [x - y for x, y in zip(found[a].validated[kind], found[b].validated[kind], strict=True)]


SCHEMES = {
    "free splits": ("free", 1),
    "folds": ("folds", PARTS),
    "folds, corrected like free splits": ("folds", 1),
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=["classifiers", "networks"], default=["classifiers", "networks"])
    options.add_argument("--trainings", type=positive, nargs="+", default=[5, 10], help="of each configuration")
    options.add_argument("--seed", type=int, default=0)
    options.set_defaults(repeats=200)
    given = options.parse_args()
    described, rows = machine(), []
    for learners, draw in (("classifiers", classifier_sets), ("networks", network_sets)):
        if learners not in given.only:
            continue
        found: list[Set] = []
        started = time.perf_counter()
        for one in draw(given.repeats, max(given.trainings), given.seed):
            found.append(one)
            if len(found) % 20 == 0:
                print(f"{learners}: {len(found)} data sets, {time.perf_counter() - started:.0f} s", flush=True)
        for trainings in given.trainings:
            for scheme, (kind, per_repeat) in SCHEMES.items():
                each = shown(found, kind, trainings, per_repeat)
                cells = [learners, str(trainings), scheme, f"{100 * math.sqrt(each.variance):.2f}"]
                cells += [f"{100 * each.half_width:.2f}"]
                cells += [f"{100 * statistics.fmean(each.covered):.1f} % ({100 * min(each.covered):.0f})"]
                rows.append([*cells, f"{100 * statistics.fmean(each.power):.0f} %"])
    header = ["", "trainings", "replicates", "error of a mean", "half width", "covered (of the worst pair)", "power"]
    print("differences of two configurations, in points\n")
    print(table(header, rows))
    finish("splits", given.json, described, rows=rows)


if __name__ == "__main__":
    main()
