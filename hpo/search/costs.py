"""Costs of a network, which are measured beside the score."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from core.config import TrainConfig
from core.data import Splits
from core.models import build_model
from core.runtime import autocast, clock

BATCH, PASSES = 64, 7
"""Images of a pass that is timed, and passes of which the median counts, after one to warm up."""


def measured(costs: Sequence[str], config: TrainConfig, splits: Splits, device: torch.device) -> dict[str, float]:
    """Return the costs of a configuration's network by name. Its weights do not matter, so it is not trained.

    Args:
        costs: `params`, the number of parameters; `latency`, milliseconds an image on the device in batches of `BATCH`;
            `size`, megabytes of parameters and buffers.

    Raises:
        ConfigError: The network does not suit the images, as in `core.models.build_model`.
    """
    channels, height, width = splits.images.shape[1:]
    classes = len(splits.classes)
    network = build_model(config.model, num_classes=classes, in_channels=channels, image_size=(height, width))
    found = {
        "params": float(sum(parameter.numel() for parameter in network.parameters())),
        "size": sum(tensor.nbytes for tensor in network.state_dict().values()) / 1e6,
    }
    if "latency" in costs:
        images = torch.zeros(BATCH, channels, height, width, device=device).to(memory_format=torch.channels_last)
        found["latency"] = 1000 * _seconds(network.to(device).eval(), images, config) / BATCH
    return {name: found[name] for name in costs}


def _seconds(network: nn.Module, images: Tensor, config: TrainConfig) -> float:
    """Seconds of a forward pass."""
    took: list[float] = []
    with torch.inference_mode(), autocast(config.precision.autocast, images.device):
        for _ in range(1 + PASSES):
            began = clock(images.device)
            network(images)
            took.append(clock(images.device) - began)
    return statistics.median(took[1:])
