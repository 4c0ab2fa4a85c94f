"""Predicted time of a training step on a GPU, from the bytes and operations of its kernels.

    python tests/benchmarks/roofline.py   # the table of predictions in README.md

A kernel takes the longest of three times: its bytes at the memory's bandwidth, its operations at 70 % of the peak (the
best that cuDNN's convolutions reach), and the shortest time between two kernels of a CUDA graph. Every tensor that it
reads or writes counts once; `PASSES` has the exceptions. No GPU is needed: the network runs on tensors without memory,
the augmentation on a few images on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from common import table
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from core.augment import Augment
from core.config import AugmentConfig, ModelConfig, TrainConfig
from core.models import build_model
from tests.core.recorded import Operations

aten = torch.ops.aten

PASSES = {  # passes over the kernel's input beyond the first: statistics before normalizing, sums before the gradient
    aten._native_batch_norm_legit: 1,
    aten.native_group_norm: 1,
    aten.native_batch_norm_backward: 2,
    aten.native_group_norm_backward: 2,
}
KINDS = {  # of the table; other kernels are "other"
    "convolutions": (aten.convolution, aten.convolution_backward),
    "norms": tuple(PASSES),
    "activations": (aten.relu, aten.relu_, aten.threshold_backward),
    "additions": (aten.add, aten.add_),
}
NORMALIZED = ((0.5,) * 3, (0.25,) * 3)
COUNTED_IMAGES = 28  # two for each of RandAugment's fourteen operations
BYTES_PER_WEIGHT = 4 * (7 + 3)  # float32: AdamW reads w, g, m, v and writes w, m, v; EMA reads w and a, writes a


@dataclass(frozen=True)
class Device:
    """What bounds a kernel."""

    flops: float
    """Per second, of matrix products in bfloat16."""
    bytes_per_s: float
    kernel_s: float = 2.5e-6
    """Between two small kernels of a CUDA graph."""
    share_of_peak: float = 0.7
    """Reached by convolutions."""


H200 = Device(flops=790e12, bytes_per_s=4.8e12)


@dataclass(frozen=True)
class Kernel:
    """One operation."""

    operation: Any
    bytes: int
    flops: int

    def seconds(self, device: Device, times: float = 1) -> float:
        """Seconds of `times` as many images."""
        arithmetic = self.flops * times / (device.share_of_peak * device.flops)
        return max(arithmetic, self.bytes * times / device.bytes_per_s, device.kernel_s)


class Kernels(Operations):
    """Collects the kernels that run; views and uninitialized memory are none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Kernel] = []

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        aliases = [result.alias_info for result in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases) or "empty" in str(func):
            return out
        operation = func.overloadpacket
        # An operation in place returns what it writes to, so that counts as read and written.
        sizes = [
            leaf.numel() * leaf.element_size() for leaf in tree_leaves((args, kwargs, out)) if torch.is_tensor(leaf)
        ]
        traffic = sum(sizes) + PASSES.get(operation, 0) * max(sizes)
        flops = flop_registry[operation](*args, **kwargs, out_val=out) if operation in flop_registry else 0
        self.found.append(Kernel(operation, traffic, flops))
        return out


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step."""

    network: dict[str, float]
    """Forward and backward pass, by the kinds of `KINDS`."""
    augment: float
    optimizer: float
    """With averaging."""
    images: int

    @property
    def seconds(self) -> float:
        return sum(self.network.values()) + self.augment + self.optimizer

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds


def predict(config: TrainConfig, image: tuple[int, int, int], device: Device, classes: int = 10) -> Prediction:
    """Predict a step of full batches on images (C, H, W) in bfloat16, with AdamW and EMA."""
    batch = config.batch_size
    kernels, weights = network_kernels(config.model.model_dump_json(), (batch, *image), classes)
    network = dict.fromkeys([*KINDS, "other"], 0.0)
    for kernel in kernels:
        kind = next((kind for kind, operations in KINDS.items() if kernel.operation in operations), "other")
        network[kind] += kernel.seconds(device)
    together = batch * Augment(config.augment, *NORMALIZED, torch.device("meta")).batches_at_once(batch, image)
    kernels = augment_kernels(config.augment.model_dump_json(), image)
    augment = sum(kernel.seconds(device, together / COUNTED_IMAGES) for kernel in kernels) * batch / together
    return Prediction(network, augment, BYTES_PER_WEIGHT * weights / device.bytes_per_s, batch)


@cache
def network_kernels(model: str, images: tuple[int, int, int, int], classes: int) -> tuple[list[Kernel], int]:
    """Return the kernels of both passes of a batch (N, C, H, W), and the number of weights."""
    config = ModelConfig.model_validate_json(model)
    network = build_model(config, num_classes=classes, in_channels=images[1], image_size=images[2:])
    network = network.to("meta", torch.bfloat16)
    with Kernels() as kernels:
        logits = network(torch.empty(images, dtype=torch.bfloat16, device="meta"))
        labels = torch.empty(len(logits), dtype=torch.int64, device="meta")
        torch.nn.functional.cross_entropy(logits, labels).backward()
    return kernels.found, sum(parameter.numel() for parameter in network.parameters())


@cache
def augment_kernels(config: str, image: tuple[int, int, int]) -> list[Kernel]:
    """Return the kernels of augmenting images; their random numbers are drawn once an epoch, and left out."""
    parsed = AugmentConfig.model_validate_json(config)
    augment = Augment(parsed, *NORMALIZED, torch.device("cpu"), dtype=torch.bfloat16)
    images = torch.zeros(COUNTED_IMAGES, *image, dtype=torch.uint8)
    draws = augment.draw([COUNTED_IMAGES], image, torch.Generator().manual_seed(0))
    with Kernels() as kernels:
        augment.apply(images, draws[0])
    return kernels.found


RESNET18 = TrainConfig().override(
    {"augment.ops": 2, "augment.strength": 0.4, "optim.name": "adamw", "averaging.name": "ema"}
)
CASES = {  # name -> (side, changes)
    "96², batch 256": (96, {"batch_size": 256}),
    "96², batch 64": (96, {"batch_size": 64}),
    "32², batch 256": (32, {"batch_size": 256}),
}


def predictions() -> list[list[str]]:
    """Rows of README.md's table: name, then milliseconds and at last images/s by case."""
    found = [predict(RESNET18.override(changes), (3, side, side), H200) for side, changes in CASES.values()]
    times = {kind: [each.network[kind] for each in found] for kind in (*KINDS, "other")}
    times["forward and backward"] = [sum(each.network.values()) for each in found]
    times["augmentation"] = [each.augment for each in found]
    times["optimizer and averaging"] = [each.optimizer for each in found]
    rows = [[f"{name}, ms", *(f"{1000 * seconds:.2f}" for seconds in row)] for name, row in times.items()]
    return [*rows, ["images/s", *(f"{each.images_per_s:,.0f}" for each in found)]]


if __name__ == "__main__":
    print(table(["", *CASES], predictions()))
