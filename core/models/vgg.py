"""VGG (arXiv 1409.1556) for small images: stages of 3×3 convolutions, each followed by a max-pool, and a classifier.

With `hidden: 4096` this is torchvision's `vgg16` (`norm: none`) or `vgg16_bn`, with its initialization and parameter
names, except that `hidden1`, `hidden2` and `fc` are `classifier.0`, `.3` and `.6` there.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from core.config import ModelConfig
from core.models.stages import ACTIVATIONS, NORMS, check_image_size, scale_width, stage_blocks, stage_widths

POOLED_SIDE = 7  # of the features before the hidden layers: 224 after five halvings
# torchvision's. Section 3.1 of the paper calls 0.01 the variance.
LINEAR_STD = 0.01


def build_vgg(config: ModelConfig, *, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Sequential:
    """Build the network; see `core.models.build_model`."""
    check_vgg_size(config, image_size)
    widths = stage_widths(config)

    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["features"] = _features(config, in_channels, widths)
    if config.hidden is None:
        parts["pool"] = nn.AdaptiveAvgPool2d(1)
        parts["flatten"] = nn.Flatten()
        units = widths[-1]
    else:
        parts["pool"] = nn.AdaptiveAvgPool2d(POOLED_SIDE)
        parts["flatten"] = nn.Flatten()
        units = scale_width(config.hidden, config.width)
        parts["hidden1"] = nn.Linear(widths[-1] * POOLED_SIDE**2, units)
        parts["act1"] = ACTIVATIONS[config.activation](inplace=True)
        parts["dropout1"] = nn.Dropout(config.dropout)
        parts["hidden2"] = nn.Linear(units, units)
        parts["act2"] = ACTIVATIONS[config.activation](inplace=True)
    parts["dropout"] = nn.Dropout(config.dropout)
    parts["fc"] = nn.Linear(units, num_classes)

    network = nn.Sequential(parts)
    _initialise(network)
    return network


def check_vgg_size(config: ModelConfig, image_size: tuple[int, int]) -> None:
    """Raise ConfigError if a max-pool would apply to a side of one pixel."""
    pools = [f"the max-pool of stage {stage} of model.widths" for stage in range(1, len(config.widths) + 1)]
    check_image_size(image_size, pools, halve=lambda side: side // 2)


def _features(config: ModelConfig, in_channels: int, widths: list[int]) -> nn.Sequential:
    """The stages in sequence, numbered as in torchvision."""
    layers: list[nn.Module] = []
    channels = in_channels
    for width, count in zip(widths, stage_blocks(config), strict=True):
        for _ in range(count):
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            if config.norm != "none":
                layers.append(NORMS[config.norm](width))
            layers.append(ACTIVATIONS[config.activation](inplace=True))
            channels = width
        layers.append(nn.MaxPool2d(2, stride=2))
    return nn.Sequential(*layers)


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=LINEAR_STD)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
