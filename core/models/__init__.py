"""Construction of networks. A family is imported when used, since importing timm takes half a second."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch
from torch import nn

from core.config import OWN, ModelConfig, family_of
from core.errors import ConfigError
from core.models.heads import head_parameters as head_parameters
from core.models.heads import layer_scales as layer_scales
from core.models.heads import probed_classifier as probed_classifier
from core.runtime import may_be_out_of_memory, resize


def check_model_name(name: str) -> None:
    """Raise UserError if there is no such `model.name`, without building the network."""
    if name.startswith("timm/"):
        from core.models import timm_models

        timm_models.find_model(name)
    elif family_of(name) == OWN:
        from core.models import own_models

        own_models.own_model(name)


def check_kwargs(name: str, kwargs: Collection[str]) -> None:
    """Raise ConfigError if the network of the user's own at this `model.name` does not take these `model.kwargs`."""
    from core.models import own_models

    own_models.check_own_model(name, kwargs)


def has_weights(name: str) -> bool:
    """Return whether the pretrained weights of a `model.name` are on this machine, or their server answers.

    Takes at most a few seconds, and those once per process. UserError if there is no such network.
    """
    from core.models import timm_models

    return name.startswith("timm/") and timm_models.has_weights(name)


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
    resizing = None if config.input_size is None else ResizeInput(image_size, config.input_size)
    if resizing is not None:
        image_size = resizing.size
    if config.name == "resnet":
        from core.models import resnet

        model = resnet.build_resnet(config, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    elif config.name == "vgg":
        from core.models import vgg

        model = vgg.build_vgg(config, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    elif family_of(config.name) == OWN:
        from core.models import own_models

        model = own_models.build_own_model(
            config, num_classes=num_classes, in_channels=in_channels, image_size=image_size
        )
    else:
        from core.models import timm_models

        model = timm_models.build_timm_model(
            config, num_classes=num_classes, in_channels=in_channels, image_size=image_size
        )
    if resizing is not None:
        model.register_forward_pre_hook(resizing)
    return model.to(memory_format=torch.channels_last)


class ResizeInput:
    """Resizes a network's input by a factor, so that images of the data set's size have `input_size` (height)."""

    def __init__(self, image_size: tuple[int, int], input_size: int) -> None:
        self._image_size = image_size
        self._input_size = input_size
        self.size = self._resized(image_size)
        """(H, W) of the resized images of the data set."""

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = (max(1, round(side * self._input_size / self._image_size[0])) for side in size)
        return height, width

    def __call__(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        """Resize (N, C, H, W); smaller or larger images than the data set's by the same factor."""
        height, width = inputs[0].shape[-2:]
        return (resize(inputs[0], self._resized((height, width))),)


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
