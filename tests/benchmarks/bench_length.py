"""Whether a short run of a configuration predicts the accuracy of longer ones.

Truth: annealed trainings of 1 to 128 epochs, scored on other images than those that the predictions use. Predictions of
the gain of twice and four times E epochs, for E = 8, 16 and 32, by three methods:

- constant: one run of E epochs at a constant rate with an exponential average (Hägele et al. 2024, arXiv 2405.18392),
  and a power law through the averaged scores of its epochs;
- annealed: trainings of E/8, E/4, E/2 and perhaps E epochs, and a power law through their scores;
- direct: a training of E and one of 2E epochs; the next doubling is predicted to gain half as much.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import finish, machine, parser, positive, table
from trainings import SHARED

from core.config import DataConfig, TrainConfig
from core.data import Dataset, Splits, load_dataset
from core.loop import train
from core.metrics import scores
from core.runtime import normalize
from core.tta import predict_logits
from hpo.search.length import FROM_FRACTION, fit_length

CPU = torch.device("cpu")
LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128)
PROBED = (8, 16, 32)
HALF_LIVES = (0.02, 0.06)


def digits(seed: int) -> tuple[TrainConfig, Splits]:
    """The baseline of `digits.yaml`; half of the images that it does not train on are the others."""
    config = TrainConfig().override(
        {
            "seed": seed,
            "batch_size": 64,
            "augment.flip": 0.0,
            "augment.crop_pad_fraction": 0.0,
            "augment.rotation_degrees": 8.0,
            "model.widths": (32, 64),
            "model.blocks": (1, 1),
            "loss.smoothing": 0.1,
            "optim.lr_scale": 8.0,
            "schedule.warmup_fraction": 0.1,
        }
    )
    return config, cut(load_dataset(DataConfig()), seed, {"train": 1078, "val": 359, "others": 360})


def photographs(file: Path, side: int, sizes: Mapping[str, int], seed: int) -> tuple[TrainConfig, Splits]:
    """A small residual network, AdamW with a cosine, flips and crops."""
    config = TrainConfig().override(
        {
            "seed": seed,
            "batch_size": 32,
            "model.widths": (16, 32, 64),
            "model.stem_stride": 2,
            "model.blocks": (1, 1, 1),
            "loss.smoothing": 0.1,
        }
    )
    return config, cut(load_dataset(DataConfig(image_size=side), data_path=file), seed, sizes)


def cut(dataset: Dataset, seed: int, sizes: Mapping[str, int]) -> Splits:
    """Draw training images and, as validation images, those to predict by and then the others."""
    test = dataset.open_test()
    images, labels = torch.cat([dataset.images, test.images]), torch.cat([dataset.labels, test.labels])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[: sum(sizes.values())]
    images, labels, train = images[order], labels[order], sizes["train"]
    pixels = images[:train].float() / 255
    return Splits(
        images=images,
        labels=labels,
        train=torch.arange(train),
        val=torch.arange(train, len(order)),
        classes=dataset.classes,
        mean=tuple(pixels.mean((0, 2, 3)).tolist()),
        std=tuple(pixels.std((0, 2, 3)).tolist()),
    )


def trained(config: TrainConfig, splits: Splits, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Train, validated on the images to predict by; scores of its epochs on them, and at the end on the others."""
    known = replace(splits, val=splits.val[: sizes["val"]])
    result = train(config, known, device=CPU)
    others = splits.val[sizes["val"] :]
    logits = predict_logits(
        result.model, splits.images[others], prepare=lambda images: normalize(images, mean=splits.mean, std=splits.std)
    )
    found = scores(logits, splits.labels[others])
    return {
        "epochs": config.epochs,
        "history": [{"accuracy": e.counted().accuracy, "loss": e.counted().loss} for e in result.history],
        "others": {"accuracy": found.accuracy, "loss": found.loss},
        "seconds": result.history[-1].elapsed_s,
    }


def measure(config: TrainConfig, splits: Splits, sizes: Mapping[str, int]) -> dict[str, Any]:
    """All trainings of a seed."""
    constant = {"schedule.name": "constant", "averaging.name": "ema"}
    return {
        "annealed": {str(n): trained(config.override({"epochs": n}), splits, sizes) for n in LENGTHS},
        "constant": {
            f"{n} {half}": trained(
                config.override({**constant, "epochs": n, "averaging.half_life_fraction": half}), splits, sizes
            )
            for n in PROBED
            for half in HALF_LIVES
        },
    }


SETS = {
    "digits": (None, {"train": 1078, "val": 359, "others": 360}),
    "scenes": ("scenes5k.zip", {"train": 500, "val": 167, "others": 1000}),
}


def predictions(run: dict[str, Any], epochs: int) -> dict[str, tuple[float, float]]:
    """The gain in accuracy of twice and four times these epochs by method, in points; `truth` on the other images."""
    annealed = run["annealed"]

    def known(length: int) -> float:
        return float(annealed[str(length)]["history"][-1]["accuracy"])

    def law(lengths: Sequence[int], accuracies: Sequence[float]) -> tuple[float, float]:
        probe = fit_length(lengths, accuracies, epochs)
        return (math.nan, math.nan) if probe is None else (100 * probe.gain(2), 100 * probe.gain(4))

    others = [100 * annealed[str(times * epochs)]["others"]["accuracy"] for times in (1, 2, 4)]
    found = {"truth": (others[1] - others[0], others[2] - others[0])}
    for half in HALF_LIVES:
        history = run["constant"][f"{epochs} {half}"]["history"]
        used = [epoch for epoch in range(1, len(history) + 1) if epoch >= FROM_FRACTION * epochs]
        found[f"constant, half-life {half}"] = law(used, [history[epoch - 1]["accuracy"] for epoch in used])
    short = [epochs // 8, epochs // 4, epochs // 2]
    found["annealed E/8, E/4, E/2"] = law(short, list(map(known, short)))
    found["annealed E/8 to E"] = law([*short, epochs], list(map(known, [*short, epochs])))
    direct = 100 * (known(2 * epochs) - known(epochs))
    found["direct, E and 2E"] = (direct, 1.5 * direct)  # the second doubling gains half as much
    return found


def rows(results: Mapping[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Mean gains, and the mean absolute errors of their predictions, by data set, length and method."""
    found = []
    for name, runs in results.items():
        for epochs in PROBED:
            by_seed = [predictions(run, epochs) for run in runs]
            for method in by_seed[0]:
                cells = [name, str(epochs), method]
                for place in (0, 1):
                    gains = [one[method][place] for one in by_seed]
                    errors = [abs(one[method][place] - one["truth"][place]) for one in by_seed]
                    error = "" if method == "truth" else f" (error {statistics.fmean(errors):.1f})"
                    cells.append(f"{statistics.fmean(gains):+.1f}{error}")
                found.append(cells)
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", default=[*SETS], choices=[*SETS], help="data sets")
    options.add_argument("--data", type=Path, default=SHARED, help="folder of the archives")
    options.add_argument("--side", type=positive, default=48, help="of the photographs in pixels")
    options.set_defaults(repeats=3)
    arguments = options.parse_args()
    described = machine()
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(arguments.repeats):
        for name in arguments.only:
            file, sizes = SETS[name]
            if file is None:
                config, splits = digits(seed)
            else:
                config, splits = photographs(arguments.data / file, arguments.side, sizes, seed)
            results.setdefault(name, []).append(measure(config, splits, sizes))
            last = results[name][-1]["annealed"]
            print(name, seed, {n: round(run["others"]["accuracy"], 3) for n, run in last.items()}, flush=True)
    header = ["data", "E", "method", "gain of 2E, points", "gain of 4E, points"]
    print("\n" + table(header, rows(results)))
    finish("length", arguments.json, described, results=results)


if __name__ == "__main__":
    main()
