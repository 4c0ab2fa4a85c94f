"""The small residual network for small images: timm's residual blocks behind a stem that keeps the resolution.

The key choice is that every part which ResNet-18 fixes is a field. The default stem is 3×3 with stride 1 and no
pooling, since 7×7 with stride 2 and pooling leaves one position in 16 before the first block. Set as He et al. set it
(`stem_kernel: 7, stem_stride: 2, max_pool: true`) this is their ResNet-18, parameter for parameter, under the names of
torchvision's and timm's.

He et al. 2015, arXiv 1512.03385. Convolutions begin Kaiming normal over their fan-out (arXiv 1502.01852), and each
block's last norm begins at zero, so that every block begins as its shortcut (Goyal et al. 2017, arXiv 1706.02677).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.squeeze_excite import SEModule
from timm.models.resnet import BasicBlock, Bottleneck, downsample_conv
from torch import nn

from core.config import ModelConfig
from core.errors import ConfigError

# Wu and He 2018, arXiv 1803.08494, table 3: the best of their fixed numbers of channels a group.
GROUP_CHANNELS = 16
# oneDNN 3.13 (torch 2.15) crashes in the backward pass of 1×1 convolutions of stride 2 in channels_last with fewer
# input channels than an AVX-512 register has floats: a segmentation fault with 4, 8 and 12 channels of 48×48, none
# with 16.
FEWEST_STRIDED_CHANNELS = 16
# Tensor cores and vector units want channels in eights.
WIDTH_MULTIPLE = 8

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "mish": nn.Mish}
_BLOCKS: dict[str, type[BasicBlock | Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class SubsampledConv(nn.Conv2d):
    """A 1×1 convolution of stride s as one of stride 1 on every s-th pixel: the same numbers, by another kernel."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows, columns = self.stride
        return F.conv2d(input[:, :, ::rows, ::columns], self.weight, self.bias)


class FixedGroupNorm(nn.GroupNorm):
    """Group norm by the size of a group: 16 channels, or the largest number below it that divides them."""

    def __init__(self, channels: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        size = max(size for size in range(1, GROUP_CHANNELS + 1) if channels % size == 0)
        super().__init__(channels // size, channels, device=device, dtype=dtype)


def build_resnet(
    config: ModelConfig, *, num_classes: int, in_channels: int, image_size: tuple[int, int]
) -> nn.Sequential:
    """Builds the network: (N, in_channels, H, W) floats to logits (N, num_classes). `image_size` is (H, W) in pixels.

    Raises:
        ConfigError: a step of stride 2 would meet a side of one pixel.
    """
    widths, blocks = stage_widths(config), stage_blocks(config)
    _check_image_size(config, image_size, stages=len(widths))
    rates = drop_path_rates(config.drop_path, sum(blocks))

    parts: OrderedDict[str, nn.Module] = OrderedDict()
    kernel = config.stem_kernel
    parts["conv1"] = nn.Conv2d(in_channels, widths[0], kernel, config.stem_stride, kernel // 2, bias=False)
    parts["bn1"] = _norm(config)(widths[0])
    parts["act1"] = _ACTIVATIONS[config.activation](inplace=True)
    if config.max_pool:
        parts["maxpool"] = nn.MaxPool2d(3, stride=2, padding=1)
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


def stage_widths(config: ModelConfig) -> list[int]:
    """Channels of each stage: `widths` as they stand at `width` 1, else scaled to the nearest multiple of 8."""
    if config.width == 1:
        return list(config.widths)
    eights = (math.floor(width * config.width / WIDTH_MULTIPLE + 0.5) for width in config.widths)
    return [WIDTH_MULTIPLE * max(1, count) for count in eights]


def stage_blocks(config: ModelConfig) -> list[int]:
    """Blocks of each stage: `blocks` scaled by `depth`, a half rounded up, at least 1."""
    return [max(1, math.floor(count * config.depth + 0.5)) for count in config.blocks]


def drop_path_rates(last: float, blocks: int) -> list[float]:
    """The probability that each block is dropped: linearly from 0 at the first to `last` at the last (or only) one."""
    return [last * index / (blocks - 1) for index in range(blocks)] if blocks > 1 else [last]


def _block(config: ModelConfig, channels: int, width: int, stride: int, *, drop_path: float) -> nn.Module:
    """One residual block, with a 1×1 projection as its shortcut where the shape changes."""
    kind, norm, activation = _BLOCKS[config.block], _norm(config), _ACTIVATIONS[config.activation]
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
        drop_path=DropPath(drop_path) if drop_path > 0 else None,
    )


def _norm(config: ModelConfig) -> type[nn.BatchNorm2d] | type[FixedGroupNorm]:
    return nn.BatchNorm2d if config.norm == "batch" else FixedGroupNorm


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, BasicBlock | Bottleneck):
            module.zero_init_last()


def _check_image_size(config: ModelConfig, image_size: tuple[int, int], *, stages: int) -> None:
    """Refuses a network with a step of stride 2 that meets a side of one pixel: it would compute nothing of worth."""
    stem = ["model.stem_stride: 2"] if config.stem_stride == 2 else []
    stem += ["model.max_pool: true"] if config.max_pool else []
    side = min(image_size)
    for step in [*stem, *(f"stage {stage} of model.widths" for stage in range(2, stages + 1))]:
        if side == 1:
            height, width = image_size
            raise ConfigError(
                f"model: an image of {height}×{width} is down to a side of 1 pixel before {step}, "
                "which would halve it; name fewer stages in model.widths and model.blocks"
                + (f", or leave out {' and '.join(stem)}" if stem else "")
                + ", or enlarge the images by data.image_size"
            )
        side = math.ceil(side / 2)
