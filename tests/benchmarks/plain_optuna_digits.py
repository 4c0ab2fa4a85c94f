"""A plain Optuna search on the digits, as a competent person writes it today: what `hpo run digits` is compared with.

DataLoader, torchvision transforms image by image, SQLite, MedianPruner, a report every epoch; then the best
configuration again on training and validation images, and the test set once. It searches what
`search_spaces/digits.yaml` searches, from the same base (`bench_digits.py` checks that), with as many trials and
epochs, on the same network: `build_model` is all that it borrows. Nothing in it is slow on purpose: fused optimizers
where torch has them, channels_last, validation images transformed once, no gradients in evaluation, and of the
DataLoader's settings the fastest (docs/benchmarks.md).

Prints one JSON object on its last line.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from core.config import ModelConfig
from core.models import build_model

EPOCHS = 20
MODEL = {"widths": (32, 64), "blocks": (1, 1)}
BASE: dict[str, Any] = {
    "optim.name": "adamw",
    "optim.lr_scale": 8.0,
    "optim.weight_decay": 5e-5,
    "batch_size": 64,
    "augment.crop_pad_fraction": 0.0,
    "augment.rotation_degrees": 8.0,
    "loss.smoothing": 0.1,
    "model.width": 1.0,
}
WARMUP = 0.1
SWATS_SWITCH = 0.25  # the fraction of the run at which Adam becomes SGD
REFERENCE_LR = {"sgd": (0.1, 1.0), "adamw": (1e-3, 0.5), "nadam": (1e-3, 0.5)}  # at batch 256, and its power


def suggest(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """The search space of `search_spaces/digits.yaml`."""
    return {
        "optim.name": trial.suggest_categorical("optim.name", ["sgd", "adamw", "nadam", "swats"]),
        "optim.lr_scale": trial.suggest_float("optim.lr_scale", 1, 30, log=True),
        "optim.weight_decay": trial.suggest_float("optim.weight_decay", 1e-6, 1e-3, log=True),
        "batch_size": trial.suggest_categorical("batch_size", [32, 64, 128]),
        "augment.crop_pad_fraction": trial.suggest_float("augment.crop_pad_fraction", 0.0, 0.25, step=0.125),
        "augment.rotation_degrees": trial.suggest_float("augment.rotation_degrees", 0, 15),
        "loss.smoothing": trial.suggest_float("loss.smoothing", 0.0, 0.2),
        "model.width": trial.suggest_float("model.width", 0.5, 1.5, step=0.25),
    }


class Digits(Dataset[tuple[torch.Tensor, int]]):
    """Images (N, 8, 8) uint8, each through the transform on its own."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: v2.Transform) -> None:
        self.images = torch.from_numpy(images).unsqueeze(1)  # (N, 1, 8, 8)
        self.labels = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def transforms(config: dict[str, Any], images: np.ndarray) -> v2.Transform:
    """What training images go through; normalised by their own statistics. Without `config`, what the others do."""
    steps: list[v2.Transform] = []
    if pixels := round(8 * config.get("augment.crop_pad_fraction", 0)):
        steps.append(v2.RandomCrop(8, padding=pixels))
    if degrees := config.get("augment.rotation_degrees", 0):
        steps.append(v2.RandomRotation(degrees, v2.InterpolationMode.BILINEAR))
    normalize = v2.Normalize([images.mean() / 255], [images.std() / 255])
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), normalize])


def stack(dataset: Digits) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and labels of a set that is never augmented, transformed once."""
    images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    return images.contiguous(memory_format=torch.channels_last), torch.tensor(dataset.labels)


def train(
    config: dict[str, Any],
    images: np.ndarray,
    labels: np.ndarray,
    val: tuple[torch.Tensor, torch.Tensor] | None,
    workers: int,
    trial: optuna.Trial | None,
) -> tuple[nn.Module, float, list[float]]:
    """Trains one configuration; returns the network, its last validation accuracy, and each epoch's images a second."""
    dataset = Digits(images, labels, transforms(config, images))
    loader = DataLoader(
        dataset, config["batch_size"], shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    model = build_model(
        ModelConfig(**MODEL, width=config["model.width"]), num_classes=10, in_channels=1, image_size=(8, 8)
    )
    name = "adamw" if config["optim.name"] == "swats" else config["optim.name"]
    optimizer, lr = build_optimizer(name, config, model)
    criterion = nn.CrossEntropyLoss(label_smoothing=config["loss.smoothing"])
    total_steps, step = EPOCHS * len(loader), 0
    accuracy, speeds = 0.0, []
    for epoch in range(1, EPOCHS + 1):
        started = time.perf_counter()
        model.train()
        for batch, targets in loader:
            progress = step / total_steps
            if config["optim.name"] == "swats" and name == "adamw" and progress >= SWATS_SWITCH:
                name = "sgd"
                optimizer, lr = build_optimizer(name, config, model)
            for group in optimizer.param_groups:
                group["lr"] = lr * factor(progress)
            optimizer.zero_grad()
            loss = criterion(model(batch.to(memory_format=torch.channels_last)), targets)
            loss.backward()
            optimizer.step()
            step += 1
        speeds.append(len(dataset) / (time.perf_counter() - started))
        if val is not None:
            accuracy = evaluate(model, *val)
        if trial is not None:
            trial.set_user_attr("speeds", speeds)
            trial.report(accuracy, epoch)
            if epoch < EPOCHS and trial.should_prune():
                raise optuna.TrialPruned
    return model, accuracy, speeds


def build_optimizer(name: str, config: dict[str, Any], model: nn.Module) -> tuple[torch.optim.Optimizer, float]:
    """SGD, AdamW or NAdam and its peak learning rate; norms and biases are not decayed."""
    reference, power = REFERENCE_LR[name]
    lr = config["optim.lr_scale"] * reference * (config["batch_size"] / 256) ** power
    decay = config["optim.weight_decay"] / lr  # the space's weight decay is the share that a step takes off
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True), lr
    if name == "nadam":
        return torch.optim.NAdam(groups, lr=lr, decoupled_weight_decay=True), lr
    return torch.optim.AdamW(groups, lr=lr, fused=True), lr


def factor(progress: float) -> float:
    """Warm-up, then half a cosine."""
    if progress < WARMUP:
        return 0.01 + 0.99 * progress / WARMUP
    return (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))) / 2


@torch.inference_mode()
def evaluate(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy."""
    model.eval()
    return int((model(images).argmax(1) == labels).sum()) / len(labels)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--trials", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--workers", type=int, default=0, help="the DataLoader's processes")
    options.add_argument("--storage", type=Path, required=True, help="the SQLite file to write")
    arguments = options.parse_args()
    started = time.perf_counter()
    torch.manual_seed(arguments.seed)

    pixels, labels = load_digits(return_X_y=True)
    images = (pixels.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    rest, test_x, rest_y, test_y = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train_x, val_x, train_y, val_y = train_test_split(rest, rest_y, test_size=0.25, stratify=rest_y, random_state=0)
    val = stack(Digits(val_x, val_y, transforms({}, train_x)))

    def objective(trial: optuna.Trial) -> float:
        return train(suggest(trial), train_x, train_y, val, arguments.workers, trial)[1]

    study = optuna.create_study(
        storage=f"sqlite:///{arguments.storage}",
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=arguments.seed),
        pruner=optuna.pruners.MedianPruner(),
    )
    study.enqueue_trial(BASE)
    study.optimize(objective, n_trials=arguments.trials)
    searched = time.perf_counter()

    model, _, _ = train(study.best_params, rest, rest_y, None, arguments.workers, None)
    test_accuracy = evaluate(model, *stack(Digits(test_x, test_y, transforms({}, rest))))
    refitted = time.perf_counter()

    trials = study.get_trials(deepcopy=False)
    speeds = [speed for trial in trials for speed in trial.user_attrs["speeds"]]
    result = {
        "search_s": searched - started,
        "refit_s": refitted - searched,
        "epochs": len(speeds),
        "images_per_s": statistics.median(speeds),
        "base_val_accuracy": trials[0].value,
        "best_val_accuracy": study.best_value,
        "test_accuracy": test_accuracy,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
