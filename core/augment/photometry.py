"""torchvision's photometric operations, with a magnitude (n,) per image and its rounding of uint8.

Pixels (n, C, H, W) are uint8 or whole float32, with one or three channels, and not modified.
"""

from __future__ import annotations

import torch
from torch import Tensor

# ITU-R BT.601, as torchvision rounds it.
_LUMA = (0.2989, 0.587, 0.114)


def _each(magnitude: Tensor) -> Tensor:
    return magnitude.view(-1, 1, 1, 1)


def _floats(pixels: Tensor) -> Tensor:
    return pixels.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def whole(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Truncate values in [0, 256) to `dtype`; may modify them."""
    if dtype == values.dtype:
        return values.floor_()
    # A CPU's direct cast to uint8 is not vectorized and takes 2.5 times as long.
    return values.to(torch.int16).to(dtype)


def _quantize(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Clamp and truncate; modifies `values`."""
    return whole(values.clamp_(0, 255), dtype)


def _grey(pixels: Tensor) -> Tensor:
    if pixels.shape[1] == 1:
        return pixels
    red, green, blue = pixels.unbind(1)
    grey = red.mul(_LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
    return grey.floor_().unsqueeze(1)


def brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Scale; 0 is black, 1 the identity."""
    return _quantize(_floats(pixels).mul_(_each(factor)), pixels.dtype)


def contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean grey; 0 is flat grey, 1 the identity."""
    values = _floats(pixels)
    mean = _grey(values).mean(dim=(1, 2, 3), keepdim=True)
    return _quantize(values.mul_(_each(factor)).add_(mean * (1 - _each(factor))), pixels.dtype)


def saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with greyscale; 1 is the identity."""
    if pixels.shape[1] == 1:
        return pixels
    values = _floats(pixels)
    grey = _grey(values).mul_(1 - _each(factor))
    return _quantize(values.mul_(_each(factor)).add_(grey), pixels.dtype)


def sharpness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with a smoothed copy except at the border; 1 is the identity."""
    values = _floats(pixels)
    smooth = torch.zeros_like(values)
    # PIL's SMOOTH kernel: ones around a five, over 13. Sums along the batch as one line of memory are three times as
    # fast as row by row.
    line, width = values.view(-1), values.shape[-1]
    down = line[: -2 * width] + line[width:-width]
    down += line[2 * width :]
    box = torch.add(down[:-2], down[1:-1], out=smooth.view(-1)[width + 1 : -width - 1])
    box.add_(down[2:]).add_(line[width + 1 : -width - 1], alpha=4).mul_(1 / 13).round_()
    sharp = _quantize(smooth.lerp_(values, _each(factor)), pixels.dtype)
    down_to, across_to = (max(side - 1, 1) for side in pixels.shape[2:])
    sharp[:, :, ::down_to] = pixels[:, :, ::down_to]  # first and last row
    sharp[..., ::across_to] = pixels[..., ::across_to]
    return sharp


def posterize(pixels: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest `bits`, whole numbers 0 … 8."""
    kept = (256 - (1 << (8 - _each(bits)).int())).to(torch.uint8)
    return (pixels.to(torch.uint8) & kept).to(pixels.dtype)


def solarize(pixels: Tensor, threshold: Tensor) -> Tensor:
    """Invert pixels at or above `threshold`, 0 … 256."""
    levels = pixels.to(torch.uint8)
    least = _each(threshold).ceil()
    any_level = (least < 256).to(torch.uint8).mul_(255)
    # On a CPU a comparison would take ten times as long, and `where` a hundred times.
    below = torch.maximum(levels, least.clamp(max=255).to(torch.uint8)).sub_(levels).clamp_(max=1)  # 0 or 1
    inverted = below.sub_(1).bitwise_and_(any_level)  # 255 or 0
    return inverted.bitwise_xor_(levels).to(pixels.dtype)


def invert(pixels: Tensor, amount: Tensor) -> Tensor:
    """Blend with the negative by `amount`."""
    values = _floats(pixels)
    return whole((255 - 2 * values).mul_(_each(amount)).add_(values).round_(), pixels.dtype)


def autocontrast(pixels: Tensor, amount: Tensor) -> Tensor:
    """Blend with each channel, unless constant, stretched to 0 … 255."""
    values = _floats(pixels)
    low, high = (extreme.float() for extreme in (pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)))
    flat = low == high
    span = torch.where(flat, 1.0, (high - low) * (1 / 255))
    stretched = (values - torch.where(flat, 0.0, low)).div_(span).floor_()
    return whole(values.lerp_(stretched, _each(amount)).round_(), pixels.dtype)


def equalize(pixels: Tensor, amount: Tensor) -> Tensor:
    """Blend with histogram equalization of each channel by PIL's integer rule."""
    count, channels, height, width = pixels.shape
    index = pixels.view(count, channels, height * width).long()
    histogram = torch.zeros(count, channels, 256, dtype=torch.int32, device=pixels.device)
    histogram.scatter_add_(2, index, histogram.new_ones(1).expand_as(index))
    total = histogram.cumsum(2, dtype=torch.int32)
    brightest = histogram.gather(2, total.argmax(2, keepdim=True))
    step = (height * width - brightest).div_(255, rounding_mode="floor")
    table = (total - histogram + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(0, 255)
    levels = torch.arange(256, dtype=torch.float32, device=pixels.device)
    table = torch.where(step == 0, levels, table.float())  # too few pixels
    table = torch.lerp(levels.expand_as(table), table, amount.view(-1, 1, 1)).round_()
    return table.to(pixels.dtype).gather(2, index).view_as(pixels)
