"""Helpers of the tests of networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core.config import ModelConfig
from core.models import build_model


def build(
    *, num_classes: int = 10, in_channels: int = 1, image_size: tuple[int, int] = (8, 8), **fields: Any
) -> nn.Module:
    """Build a network with weights of seed 0."""
    torch.manual_seed(0)
    return build_model(ModelConfig(**fields), num_classes=num_classes, in_channels=in_channels, image_size=image_size)


def images(*shape: int) -> Tensor:
    """Draw normalized images of seed 1, channels_last."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return drawn.contiguous(memory_format=torch.channels_last)


def parameters(model: nn.Module) -> int:
    """Count the parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
