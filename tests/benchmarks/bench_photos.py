"""Fine-tuning on few photographs: the base of the space `photos`, changes to it, a plain script, and a probe.

500 training images of the scenes, 100 of them for validation, which decides nothing here, and the set's 2,997 test
images. Each seed draws other training images. The network is EfficientNet-Lite0, with the weights of bench_probe.py.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from bench_probe import MODEL, converted
from common import finish, machine, mean_and_deviation, parser, positive, table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from trainings import SHARED

from core.config import DataConfig, TrainConfig
from core.data import Dataset, Splits, TestSet, load_dataset, split
from core.loop import train
from core.metrics import scores
from core.runtime import normalize
from core.tta import predict_logits
from hpo.space import load_recipe

CPU = torch.device("cpu")
VALIDATION = 100

# side -> changes to the base of `photos`.
CHANGES: dict[str, dict[str, Any]] = {
    "base": {},
    "base, head from the probe": {},
    "base, layer decay 0.85": {"optim.layer_decay": 0.85},
    "base, no EMA": {"averaging.name": "none"},
    "base, normalized as in pretraining": {"data.normalize": "half"},
    "base, backbone × 0.2, head × 2": {"optim.lr_scale": 5.6, "optim.backbone_lr_scale": 0.2},
    "base at 128²": {"model.input_size": 128},
    "base of intel_scenes": {},
}
SIDES = ("probe", "script", *CHANGES)


def plain_script(splits: Splits, weights: Path, seed: int, epochs: int = 15) -> nn.Module:
    """Fine-tune as a script of some 20 lines does: AdamW, one cycle, 1e-3 and 5e-3 for the new classifier, flips."""
    torch.manual_seed(seed)
    model = timm.create_model(MODEL)
    model.load_state_dict(load_file(weights))
    model.reset_classifier(len(splits.classes))
    model.classifier.reset_parameters()
    model = model.to(memory_format=torch.channels_last)
    new = {id(parameter) for parameter in model.classifier.parameters()}
    groups = [[p for p in model.parameters() if (id(p) in new) == is_new] for is_new in (False, True)]
    rates = [1e-3, 5e-3]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], weight_decay=0.01)
    steps = epochs * -(-len(splits.train) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)
    images = normalize(splits.images[splits.train], splits.mean, splits.std)
    labels = splits.labels[splits.train]
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(32):
            flipped = torch.rand(len(rows), 1, 1, 1) < 0.5
            batch = torch.where(flipped, images[rows].flip(-1), images[rows])
            loss = F.cross_entropy(model(batch), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def trained(side: str, splits: Splits, weights: Path, seed: int, arguments: Any) -> nn.Module:
    """Train one side."""
    if side == "script":
        return plain_script(splits, weights, seed)
    lite = {
        "model.name": f"timm/{MODEL}",
        "model.pretrained": True,
        "model.pretrained_file": str(weights),
        "seed": seed,
    }
    probe = TrainConfig().override({**lite, "epochs": 1, "optim.name": "logistic"})
    if side == "probe":
        return train(probe, splits, device=CPU).model
    base = load_recipe("intel_base" if side == "base of intel_scenes" else "photos_base").config
    config = base.override({**lite, "model.input_size": arguments.input_size, **CHANGES[side]})
    if side == "base, head from the probe":
        head = train(probe.override({"model.input_size": config.model.input_size}), splits, device=CPU).model
        file = weights.with_name("probed.safetensors")
        save_file({name: value.contiguous() for name, value in head.state_dict().items()}, file)
        config = config.override({"model.pretrained_file": str(file)})
    return train(config, splits, device=CPU).model


def accuracy(model: nn.Module, splits: Splits, test: TestSet) -> float:
    """Of the test images."""

    def prepare(images: Tensor) -> Tensor:
        return normalize(images, splits.mean, splits.std)

    logits = [predict_logits(model, images, prepare=prepare, batch_size=256) for images in test.images.split(256)]
    return scores(torch.cat(logits), test.labels).accuracy


def drawn(dataset: Dataset, arguments: Any, seed: int, side: str) -> Splits:
    """The training images of a seed, normalized as a side needs them."""
    as_pretrained = side in ("probe", "script", "base, normalized as in pretraining")
    normalization: Literal["half", "imagenet"] = "half" if as_pretrained else "imagenet"
    splits = split(dataset, DataConfig(image_size=arguments.side, split_seed=seed, normalize=normalization))
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(seed))
    rows, count = splits.train[order[: arguments.images]], arguments.images
    return replace(
        splits,
        images=splits.images[rows],
        labels=splits.labels[rows],
        train=torch.arange(count - VALIDATION),
        val=torch.arange(count - VALIDATION, count),
        together=None,
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, default=SHARED, help="folder of scenes5k.zip")
    options.add_argument("--side", type=positive, default=96, help="of the images in pixels")
    options.add_argument("--input-size", type=positive, default=96, help="model.input_size of the base and its changes")
    options.add_argument("--images", type=positive, default=500)
    options.add_argument("--only", nargs="+", default=[*SIDES], choices=SIDES)
    options.set_defaults(repeats=3)
    arguments = options.parse_args()
    described = machine()
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = converted(Path(folder))
        dataset = load_dataset(DataConfig(image_size=arguments.side), data_path=arguments.data / "scenes5k.zip")
        test = dataset.open_test()
        for seed in range(arguments.repeats):
            for side in arguments.only:
                splits = drawn(dataset, arguments, seed, side)
                began = time.perf_counter()
                model = trained(side, splits, weights, seed, arguments)
                seconds = time.perf_counter() - began
                found.setdefault(side, []).append({"accuracy": accuracy(model, splits, test), "seconds": seconds})
                print(seed, side, found[side][-1], flush=True)
    print("\n" + table(["", "accuracy", "minus the base", "seconds"], rows(found)))
    finish("photos", arguments.json, described, results=found)


def rows(found: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """One row per side."""
    of: Callable[[str, str], list[float]] = lambda side, key: [run[key] for run in found[side]]  # noqa: E731
    base = of("base", "accuracy") if "base" in found else []
    return [
        [
            side,
            mean_and_deviation(of(side, "accuracy"), 3),
            ", ".join(f"{a - b:+.3f}" for a, b in zip(of(side, "accuracy"), base, strict=True)) if base else "",
            f"{statistics.median(of(side, 'seconds')):.0f}",
        ]
        for side in found
    ]


if __name__ == "__main__":
    main()
