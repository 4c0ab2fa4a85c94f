"""Residual network for small images, from timm's blocks and a stem that keeps the resolution.

With `stem_kernel: 7, stem_stride: 2, max_pool: true` this is ResNet-18 with the parameter names of torchvision and
timm; with `anti_alias`, timm's `resnetblur18`. Convolutions are initialized Kaiming normal over fan-out (arXiv
1502.01852), and each block's last norm at zero, so that blocks start as identities (arXiv 1706.02677).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers.blur_pool import BlurPool2d
from timm.layers.drop import DropPath
from timm.layers.squeeze_excite import SEModule
from timm.models.resnet import BasicBlock, Bottleneck, downsample_conv
from torch import nn

from core.config import ModelConfig
from core.models.stages import ACTIVATIONS, NORMS, check_image_size, stage_blocks, stage_widths

# oneDNN 3.13 (torch 2.15) segfaults in the backward pass of 1×1 convolutions of stride 2 in channels_last with 4, 8 and
# 12 input channels of 48×48, fewer than an AVX-512 register has floats.
FEWEST_STRIDED_CHANNELS = 16

_BLOCKS: dict[str, type[BasicBlock | Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class SubsampledConv(nn.Conv2d):
    """A 1×1 convolution of stride s, computed with stride 1 on every s-th pixel."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the convolution of (N, C, H, W)."""
        rows, columns = self.stride
        return F.conv2d(input[:, :, ::rows, ::columns], self.weight, self.bias)


def build_resnet(
    config: ModelConfig, *, num_classes: int, in_channels: int, image_size: tuple[int, int]
) -> nn.Sequential:
    """Build the network; see `core.models.build_model`."""
    check_resnet_size(config, image_size)
    widths, blocks = stage_widths(config), stage_blocks(config)
    rates = drop_path_rates(config.drop_path, sum(blocks), config.drop_path_shape)

    parts: OrderedDict[str, nn.Module] = OrderedDict()
    kernel = config.stem_kernel
    parts["conv1"] = nn.Conv2d(in_channels, widths[0], kernel, config.stem_stride, kernel // 2, bias=False)
    parts["bn1"] = NORMS[config.norm](widths[0])
    parts["act1"] = ACTIVATIONS[config.activation](inplace=True)
    if config.max_pool:
        parts["maxpool"] = _max_pool(config, widths[0])
    channels = widths[0]
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        layers: list[nn.Module] = []
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            layers.append(_block(config, channels, width, stride, drop_path=rates.pop(0)))
            channels = width * _BLOCKS[config.block].expansion
        parts[f"layer{stage + 1}"] = nn.Sequential(*layers)
    parts["pool"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten()
    parts["dropout"] = nn.Dropout(config.dropout)
    parts["fc"] = nn.Linear(channels, num_classes)

    network = nn.Sequential(parts)
    _initialise(network)
    return network


def drop_path_rates(last: float, blocks: int, shape: str = "linear") -> list[float]:
    """Return the drop probability of each block, by `model.drop_path_shape`."""
    if shape == "uniform" or blocks == 1:
        return [last] * blocks
    return [last * index / (blocks - 1) for index in range(blocks)]


def _max_pool(config: ModelConfig, channels: int) -> nn.Module:
    if config.anti_alias:
        return nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), BlurPool2d(channels, stride=2))
    return nn.MaxPool2d(3, stride=2, padding=1)


def _block(config: ModelConfig, channels: int, width: int, stride: int, *, drop_path: float) -> nn.Module:
    """A residual block, with a 1×1 projection as shortcut if the shape changes."""
    kind, norm, activation = _BLOCKS[config.block], NORMS[config.norm], ACTIVATIONS[config.activation]
    out_channels = width * kind.expansion
    shortcut: nn.Module | None = None
    if stride != 1 and channels < FEWEST_STRIDED_CHANNELS:
        shortcut = nn.Sequential(SubsampledConv(channels, out_channels, 1, stride, bias=False), norm(out_channels))
    elif stride != 1 or channels != out_channels:
        shortcut = downsample_conv(channels, out_channels, kernel_size=1, stride=stride, norm_layer=norm)
    attention = cast("type[nn.Module]", partial(SEModule, act_layer=activation)) if config.se else None
    return kind(
        channels,
        width,
        stride,
        shortcut,
        act_layer=activation,
        norm_layer=norm,
        attn_layer=attention,
        aa_layer=BlurPool2d if config.anti_alias else None,
        drop_block=cast("type[nn.Module]", partial(nn.Dropout, config.block_dropout)) if config.block_dropout else None,
        drop_path=DropPath(drop_path) if drop_path > 0 else None,
    )


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, BasicBlock | Bottleneck):
            module.zero_init_last()


def check_resnet_size(config: ModelConfig, image_size: tuple[int, int]) -> None:
    """Raise ConfigError if a step of stride 2 would apply to a side of one pixel."""
    stem = ["model.stem_stride: 2"] if config.stem_stride == 2 else []
    stem += ["model.max_pool: true"] if config.max_pool else []
    later = (f"stage {stage} of model.widths" for stage in range(2, len(config.widths) + 1))
    check_image_size(
        image_size,
        [*stem, *later],
        halve=lambda side: math.ceil(side / 2),
        remedy=f"leave out {' and '.join(stem)}" if stem else "",
    )
