"""Construction of networks. A family is imported when used, since importing timm takes half a second."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from core.config import ModelConfig
from core.errors import ConfigError
from core.models.heads import head_parameters as head_parameters
from core.models.heads import probed_classifier as probed_classifier
from core.runtime import may_be_out_of_memory


def check_model_name(name: str) -> None:
    """Raise UserError if there is no such `model.name`, without building the network."""
    if name.startswith("timm/"):
        from core.models import timm_models

        timm_models.find_model(name)


def weights_fingerprint(pretrained_file: str) -> str:
    """Return the hex SHA-256 of `model.pretrained_file`, or raise UserError if it does not exist."""
    from core.models.weight_files import locate_weights

    with locate_weights(pretrained_file).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_model(config: ModelConfig, *, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    """Build the network on the CPU, in training mode, channels_last, with weights from torch's global generator.

    It maps normalized images (N, in_channels, H, W) to logits (N, num_classes).

    Raises:
        ConfigError: the network does not support this `image_size` (H, W) or a field that is set, or the weights are
            another model's.
        UserError: there is no such model, or its weights are unavailable or unreadable.
    """
    model: nn.Module
    if config.name == "resnet":
        from core.models import resnet

        model = resnet.build_resnet(config, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    elif config.name == "vgg":
        from core.models import vgg

        model = vgg.build_vgg(config, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    else:
        from core.models import timm_models

        model = timm_models.build_timm_model(
            config, num_classes=num_classes, in_channels=in_channels, image_size=image_size
        )
    return model.to(memory_format=torch.channels_last)


def check_smaller_images(model: nn.Module, config: ModelConfig, images: torch.Tensor) -> None:
    """Raise ConfigError if the network does not support images (N, C, H, W) of this size."""
    height, width = images.shape[-2:]
    if config.name == "resnet":
        from core.models import resnet

        resnet.check_resnet_size(config, (height, width))
    elif config.name == "vgg":
        from core.models import vgg

        vgg.check_vgg_size(config, (height, width))
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(images)
    except (ArithmeticError, AssertionError, RuntimeError, ValueError) as error:
        if may_be_out_of_memory(error):
            raise
        raise ConfigError(f"model: {config.name} cannot take images of {height}×{width}") from error
    finally:
        model.train(training)
