"""`build_model`: the network that a configuration names, one family a file; `check_model_name`: whether there is one.

The families are imported when one of theirs is built: they need timm, whose import costs half a second over torch's
and the optimizers', and twice as much without them.
"""

from __future__ import annotations

import torch
from torch import nn

from core.config import ModelConfig


def check_model_name(name: str) -> None:
    """Looks a `model.name` up, without building the network or asking for its weights.

    Raises:
        UserError: timm has no model of this name, or no weights of its tag; the nearest names are said.
    """
    if name != "resnet":
        from core.models import timm_models

        timm_models.find_card(name)


def build_model(config: ModelConfig, *, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    """Builds the network, on the CPU, in training mode, channels_last, its weights drawn from torch's global generator.

    It maps normalised images, (N, in_channels, H, W) floats, to logits, (N, num_classes). `image_size` is (H, W) in
    pixels.

    Raises:
        ConfigError: the network cannot take images of this size, or refuses a field that is set.
        UserError: timm has no model of this name, or its pretrained weights are not at hand.
    """
    if config.name == "resnet":
        from core.models import resnet

        model: nn.Module = resnet.build_resnet(
            config, num_classes=num_classes, in_channels=in_channels, image_size=image_size
        )
    else:
        from core.models import timm_models

        model = timm_models.build_timm_model(
            config, num_classes=num_classes, in_channels=in_channels, image_size=image_size
        )
    return model.to(memory_format=torch.channels_last)
