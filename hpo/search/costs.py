"""Costs of a trained network, which are measured beside the score."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence

import torch
from torch import nn

from core.config import TrainConfig
from core.runtime import autocast, clock

BATCH, PASSES = 64, 7
"""Images of a pass that is timed, and passes of which the median counts, after one to warm up."""


def measured(
    costs: Sequence[str], network: nn.Module, config: TrainConfig, image: Sequence[int], device: torch.device
) -> dict[str, float]:
    """Return the costs of a network by name.

    Args:
        costs: `params`, the number of parameters; `latency`, milliseconds an image on the device in batches of `BATCH`;
            `size`, megabytes of parameters and buffers.
        image: (C, H, W) of the images.
    """
    found = {
        "params": float(sum(parameter.numel() for parameter in network.parameters())),
        "size": sum(tensor.nbytes for tensor in network.state_dict().values()) / 1e6,
    }
    if "latency" in costs:
        found["latency"] = 1000 * _seconds(network, config, image, device) / BATCH
    return {name: found[name] for name in costs}


def _seconds(network: nn.Module, config: TrainConfig, image: Sequence[int], device: torch.device) -> float:
    """Seconds of a forward pass."""
    model = copy.deepcopy(network).to(device).eval()
    images = torch.zeros(BATCH, *image, device=device).to(memory_format=torch.channels_last)
    took: list[float] = []
    with torch.inference_mode(), autocast(config.precision.autocast, device):
        for _ in range(1 + PASSES):
            began = clock(device)
            model(images)
            took.append(clock(device) - began)
    return statistics.median(took[1:])
