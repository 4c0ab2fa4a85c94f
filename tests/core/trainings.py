"""Configurations of trainings, and comparison of their results."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from core.loop import TrainResult
from core.runtime import noticed_waits

CPU = torch.device("cpu")

# Configurations with state that a resumed run could lose.
STATEFUL: dict[str, dict[str, Any]] = {
    "adamw, ema, mixup, dropout": {
        "averaging.name": "ema", "averaging.half_life_fraction": 0.1, "augment.mixup": 0.4, "augment.cutmix": 1.0,
        "model.dropout": 0.3, "model.drop_path": 0.2, "augment.ops": 2,
    },
    "sgd, swa": {"optim.name": "sgd", "averaging.name": "swa", "averaging.swa_start_fraction": 0.25},
    "nadam, clipped, balanced": {"optim.name": "nadam", "optim.grad_clip": 0.5, "sampling.name": "balanced"},
    "swats at a fraction": {"optim.name": "swats", "optim.swats.switch_fraction": 0.5},
    "swats by its criterion": {
        "optim.name": "swats", "optim.swats.switch": "criterion", "optim.swats.tolerance": 1.0,
    },
    "early stopping": {"early_stop.patience_fraction": 0.75},
    "muon, copies, alternating flips, growing": {
        "optim.name": "muon", "sampling.oversample": 3, "augment.apply_to": "repeats", "augment.flip": 0.5,
        "augment.alternate_flip": True, "augment.start_size_fraction": 0.5, "augment.policy": "autoaugment_cifar10",
    },
    "the head first, on a plateau": {
        "optim.head_only_fraction": 0.4, "optim.backbone_lr_scale": 0.1, "schedule.name": "plateau",
        "schedule.patience_fraction": 0.2, "loss.class_weights": "effective", "loss.class_weights_from_fraction": 0.5,
    },
}  # fmt: skip

CASES: dict[str, dict[str, Any]] = STATEFUL | {
    "smoothing that changes, focal": {
        "loss.smoothing": 0.2, "loss.smoothing_final": 0.0, "loss.name": "focal", "optim.name": "sgd",
    },
    "smoothing that changes, clipped": {"loss.smoothing": 0.2, "loss.smoothing_final": 0.0, "optim.grad_clip": 0.3},
    "mixed half of the time, then no more": {
        "augment.cutmix": 1.0, "augment.mix_probability": 0.5, "augment.mix_off_fraction": 0.6, "averaging.name": "ema",
        "loss.smoothing": 0.1,
    },
    "no momentum, erased, turned": {
        "optim.name": "sgd", "optim.momentum": 0.0, "augment.erase": 0.5, "augment.rotation_degrees": 20.0,
    },
}  # fmt: skip


def same(one: TrainResult, other: TrainResult) -> bool:
    """Compare weights and the scores of every epoch, bitwise."""
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    timeless = [
        [dataclasses.replace(epoch, images_per_s=0.0, elapsed_s=0.0) for epoch in result.history]
        for result in (one, other)
    ]
    return all(torch.equal(ours[name], theirs[name]) for name in ours) and timeless[0] == timeless[1]


@contextlib.contextmanager
def forbidden_waits(device: torch.device) -> Iterator[None]:
    """Raise RuntimeError if the host has waited for a CUDA device within the body."""
    with noticed_waits(device) as places:
        yield
    if places:
        raise RuntimeError(f"synchronizing at {places}")


class EveryStepByPython:
    """A capture whose replays call the function, with values on the device."""

    @staticmethod
    def capture(function: Callable[[], None]) -> Callable[[], None]:
        function()
        return function
