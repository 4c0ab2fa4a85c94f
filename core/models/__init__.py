"""`build_model`: the network that a configuration names, one family a file; `check_model_name`: whether there is one;
`check_smaller_images`: whether it takes those; `weights_fingerprint`: which weights a file holds; `head_parameters`:
its classifier.

The families are imported when one of theirs is built: they need timm, whose import costs half a second over torch's
and the optimizers', and twice as much without them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable

import torch
from torch import nn

from core.config import ModelConfig
from core.errors import ConfigError, UserError
from core.runtime import is_out_of_memory


def check_model_name(name: str) -> None:
    """Looks a `model.name` up, without building the network or asking for its weights, in the hub or in a file.

    Raises:
        UserError: timm has no model of this name, or no weights of its tag; the nearest names are said.
    """
    if name.startswith("timm/"):
        from core.models import timm_models

        timm_models.find_card(name)


def weights_fingerprint(pretrained_file: str) -> str:
    """The hex SHA-256 of the file that `model.pretrained_file` names.

    Raises:
        UserError: there is no such file.
    """
    from core.models.weight_files import locate_weights

    with locate_weights(pretrained_file).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_model(config: ModelConfig, *, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    """Builds the network, on the CPU, in training mode, channels_last, its weights drawn from torch's global generator.

    It maps normalised images, (N, in_channels, H, W) floats, to logits, (N, num_classes). `image_size` is (H, W) in
    pixels.

    Raises:
        ConfigError: the network cannot take images of this size, refuses a field that is set, or is not the one that
            `model.pretrained_file` was saved from.
        UserError: timm has no model of this name, or its pretrained weights are not at hand, or not readable.
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
    """Refuses a size of images that a built network cannot take, where a training shows it smaller ones.

    Args:
        model: what `build_model` made of `config`; its mode is restored.
        images: (N, C, H, W) floats on its device.

    Raises:
        ConfigError: the network cannot take images of this size.
    """
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
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"model: {config.name} cannot take images of {height}×{width}") from error
    finally:
        model.train(training)


def compiled(model: nn.Module, backend: str = "inductor") -> Callable[[torch.Tensor], torch.Tensor]:
    """The network compiled by torch.compile, which shares its weights: for training steps on batches of few shapes.

    What is compiled is kept in torch's cache on disk, by the architecture and the shapes, and in the process for the
    next network of the same architecture.

    Raises:
        UserError: the network lies on the CPU, and there is no compiler.
    """
    global _architecture
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if (
        backend == "inductor"
        and on_cpu
        and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))
    ):
        raise UserError("precision.compile: on a CPU torch.compile needs a C++ compiler; install g++, or leave it off")
    # All networks share the code that torch keeps its compilations of, at most 8, and it would run the rest uncompiled.
    # A run has up to 16 shapes: eight sizes through which images grow, and two batches of each.
    torch._dynamo.config.recompile_limit = 32
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if str(model) != _architecture:
        torch.compiler.reset()
        _architecture = str(model)
    return torch.compile(model, dynamic=False, backend=backend)


_architecture = ""
"""Of the network that was compiled last."""


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the classifier, which alone begins untrained when the rest is pretrained.

    That is our networks' last linear layer, `fc`, and what timm calls a model's classifier: nearly always its last
    linear layer too; two of them in a distilled model, and in a few with a norm of its own.

    Raises:
        ConfigError: the model has no classifier apart from its backbone.
    """
    find = getattr(model, "get_classifier", None)
    heads = find() if find is not None else getattr(model, "fc", None)
    modules = [head for head in (heads if isinstance(heads, tuple | list) else [heads]) if isinstance(head, nn.Module)]
    parameters = dict.fromkeys(parameter for module in modules for parameter in module.parameters())
    if not parameters:
        raise ConfigError(
            "optim.backbone_lr_scale, optim.head_only_fraction and optim.name: muon tell the classifier from the rest, "
            f"and {type(model).__name__} has no classifier of its own; leave them out, or choose another model.name"
        )
    return list(parameters)
