"""VGG for small images: plain 3×3 convolutions in stages, each with a max-pool behind it, and a classifier.

The key choice is the classifier. The published one flattens 7×7 positions into two layers of 4,096 units, which hold
124 of VGG16's 138 million weights: `hidden` builds it, and without it the mean over positions is classified, as
later families do. Set as published (`hidden: 4096, norm: none`, no `width` or `depth`) this is torchvision's
`vgg16`, and with `norm: batch` its `vgg16_bn`, weight for weight under the same names but for the classifier's layers:
theirs are `classifier.0`, `classifier.3` and `classifier.6`, ours `hidden1`, `hidden2` and `fc`.

Simonyan and Zisserman 2015, arXiv 1409.1556. Weights begin as torchvision draws them: convolutions Kaiming normal over
their fan-out (arXiv 1502.01852), linear layers normal with a deviation of 0.01, biases at zero. The
convolutions keep their bias before a norm, where it changes nothing, as in torchvision's.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from core.config import ModelConfig
from core.models.stages import ACTIVATIONS, NORMS, check_image_size, scale_width, stage_blocks, stage_widths

# The side that features are pooled to before the hidden layers: what five halvings leave of the paper's 224.
POOLED_SIDE = 7
# torchvision's. Section 3.1 of the paper draws from a normal distribution too, but calls 0.01 its variance.
LINEAR_STD = 0.01


def build_vgg(config: ModelConfig, *, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Sequential:
    """Builds the network: (N, in_channels, H, W) floats to logits (N, num_classes). `image_size` is (H, W) in pixels.

    Raises:
        ConfigError: a max-pool would meet a side of one pixel.
    """
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
    """Refuses images, (H, W) in pixels, that a max-pool would meet at a side of one pixel.

    Raises:
        ConfigError: so it is.
    """
    pools = [f"the max-pool of stage {stage} of model.widths" for stage in range(1, len(config.widths) + 1)]
    check_image_size(image_size, pools, halve=lambda side: side // 2)


def _features(config: ModelConfig, in_channels: int, widths: list[int]) -> nn.Sequential:
    """The stages in one row, as torchvision numbers them: (N, in_channels, H, W) to (N, widths[-1], H', W')."""
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
