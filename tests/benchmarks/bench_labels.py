"""How many of the first suspects of `hpo data audit` are wrong labels: planted ones, in a real data set.

A fraction of the labels outside the test set is replaced by another class at random. Networks are trained on the folds
of that set, in a few divisions as a confirmation does, and judge the images that they were not trained on. The
baselines are one network's mistakes sorted by confidence, and chance.

People confuse similar classes, which are harder to find than random ones. Another row replaces the given labels, after
the training, by classes in proportion to the networks' own confusions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from common import finish, machine, mean_and_deviation, parser, positive, table
from safetensors.torch import save_file
from trainings import SHARED

from core.config import DataConfig, TrainConfig
from core.data import Dataset, folds, load_dataset
from core.loop import train
from hpo.analysis.labels import mean_probabilities, suspects

FIRST = (50, 100, 200)
PLANTINGS = 10  # of confused labels, which need no training of their own


def config(epochs: int, side: int, seed: int) -> TrainConfig:
    """A small residual network with AdamW, five folds of the division `seed`."""
    return TrainConfig().override(
        {
            "seed": seed,
            "epochs": epochs,
            "batch_size": 64,
            "data.image_size": side,
            "data.folds": 5,
            "data.split_seed": seed,
            "model.widths": (32, 64, 128),
            "model.stem_stride": 2,
            "model.blocks": (1, 1, 1),
            "augment.crop_pad_fraction": 0.125,
            "loss.smoothing": 0.1,
        }
    )


def with_wrong_labels(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, np.ndarray[Any, Any]]:
    """The data set with so many labels replaced, and whether each was."""
    rng = np.random.default_rng(seed)
    wrong = np.zeros(len(dataset.labels), dtype=bool)
    wrong[rng.choice(len(wrong), round(fraction * len(wrong)), replace=False)] = True
    shift = torch.from_numpy(rng.integers(1, len(dataset.classes), len(wrong)) * wrong)
    return replace(dataset, labels=(dataset.labels + shift) % len(dataset.classes)), wrong


def with_confused_labels(
    labels: np.ndarray[Any, Any], predicted: np.ndarray[Any, Any], fraction: float, seed: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The labels with so many replaced as the predictions confuse their class, and whether each was."""
    rng = np.random.default_rng(seed)
    confusions = np.zeros((labels.max() + 1,) * 2)
    np.add.at(confusions, (labels, predicted), 1)
    np.fill_diagonal(confusions, 0)
    given, wrong = labels.copy(), np.zeros(len(labels), dtype=bool)
    wrong[rng.choice(len(wrong), round(fraction * len(wrong)), replace=False)] = True
    for index in np.flatnonzero(wrong):
        rates = confusions[labels[index]]
        given[index] = rng.choice(len(rates), p=rates / rates.sum())
    return given, wrong


def evaluate(
    files: Sequence[Path], labels: np.ndarray[Any, Any], wrong: np.ndarray[Any, Any], clean: np.ndarray[Any, Any]
) -> dict[str, dict[str, float]]:
    """The precision of each order, by the outputs of all divisions, of which the first has five files."""
    classes = int(clean.max()) + 1
    probabilities, _ = mean_probabilities(files, len(labels), classes)
    first, _ = mean_probabilities(files[:5], len(labels), classes)
    mistaken = np.flatnonzero(first.argmax(1) != labels)
    confident = mistaken[np.argsort(-first.max(1)[mistaken], kind="stable")]
    confused = []
    for seed in range(PLANTINGS):
        given, replaced = with_confused_labels(clean, probabilities.argmax(1), float(wrong.mean()), seed)
        confused.append(precision(suspects(probabilities, given)[0], replaced))
    return {
        "hpo data audit": precision(suspects(probabilities, labels)[0], wrong),
        "hpo data audit, one division": precision(suspects(first, labels)[0], wrong),
        "hpo data audit, confused classes": {key: fmean(run[key] for run in confused) for key in confused[0]},
        "one network's confident mistakes": precision(confident, wrong),
    }


def precision(order: np.ndarray[Any, Any], wrong: np.ndarray[Any, Any]) -> dict[str, float]:
    """The fraction of planted labels among the first suspects."""
    return {f"first {first}": float(wrong[order[:first]].mean()) for first in FIRST}


def main() -> None:
    """Runs the benchmark from the command line."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, default=SHARED / "scenes5k.zip")
    options.add_argument("--wrong", type=float, default=0.05, help="fraction of the labels")
    options.add_argument("--side", type=positive, default=32, help="of the images in pixels")
    options.add_argument("--epochs", type=positive, default=12)
    options.add_argument("--divisions", type=positive, default=2, help="divisions into five folds")
    options.set_defaults(repeats=2)
    arguments = options.parse_args()
    described = machine()
    clean = load_dataset(DataConfig(image_size=arguments.side), data_path=arguments.data)
    runs: list[dict[str, dict[str, float]]] = []
    for seed in range(arguments.repeats):
        dataset, wrong = with_wrong_labels(clean, arguments.wrong, seed)
        with tempfile.TemporaryDirectory() as folder:
            for division in range(arguments.divisions):
                drawn = config(arguments.epochs, arguments.side, division)
                for fold, splits in enumerate(folds(dataset, drawn.data)):
                    trained = train(drawn, splits, device=torch.device("cpu"))
                    assert trained.val_logits is not None
                    outputs = {"logits": trained.val_logits.contiguous(), "indices": splits.val}
                    save_file(outputs, Path(folder) / f"{division}.{fold}.safetensors")
                    accuracy = trained.kept.counted().accuracy
                    print(f"division {division}, fold {fold}: accuracy {accuracy:.3f}", flush=True)
            files = sorted(Path(folder).iterdir())
            runs.append(evaluate(files, dataset.labels.numpy(), wrong, clean.labels.numpy()))
    results = {name: [run[name] for run in runs] for name in runs[0]}
    keys = list(results["hpo data audit"][0])
    rows = [
        [name, *(mean_and_deviation([run[key] for run in found], 3) for key in keys)] for name, found in results.items()
    ]
    rows.append(["chance", *(f"{arguments.wrong:.3f}" for _ in keys)])
    print("\n" + table(["suspects", *keys], rows))
    finish("labels", arguments.json, described, results=results)


if __name__ == "__main__":
    main()
