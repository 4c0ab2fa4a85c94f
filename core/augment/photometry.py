"""What happens to pixels where they are: torchvision's photometric operations, with a magnitude for each image.

Pixels are (n, C, H, W) float32 that hold whole numbers from 0 to 255, and magnitudes (n,). Every operation rounds as
torchvision does on uint8, and leaves its input alone. One or three channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Luma weights of ITU-R BT.601 as torchvision rounds them.
_LUMA = (0.2989, 0.587, 0.114)


def _each(magnitude: Tensor) -> Tensor:
    return magnitude.view(-1, 1, 1, 1)


def _quantize(pixels: Tensor) -> Tensor:
    """In place, as a cast to uint8 cuts off the fraction."""
    return pixels.clamp_(0, 255).floor_()


def _grey(pixels: Tensor) -> Tensor:
    """(n, 1, H, W)."""
    if pixels.shape[1] == 1:
        return pixels
    red, green, blue = pixels.unbind(1)
    grey = red.mul(_LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
    return grey.floor_().unsqueeze(1)


def brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Scales by `factor` >= 0; 0 is black, 1 the image itself."""
    return _quantize(pixels * _each(factor))


def contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Moves away from the mean grey by `factor` >= 0; 0 is flat grey, 1 the image itself."""
    mean = _grey(pixels).mean(dim=(1, 2, 3), keepdim=True)
    return _quantize((pixels * _each(factor)).add_(mean * (1 - _each(factor))))


def saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    """Moves away from grey by `factor` >= 0; 0 is greyscale, 1 the image itself. A greyscale image stays as it is."""
    if pixels.shape[1] == 1:
        return pixels
    return _quantize((pixels * _each(factor)).add_(_grey(pixels) * (1 - _each(factor))))


def sharpness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Moves away from a smoothed copy by `factor` >= 0; 1 is the image itself. The outermost pixels stay."""
    inner = pixels[:, :, 1:-1, 1:-1]
    down = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    box = down[..., :-2] + down[..., 1:-1] + down[..., 2:]
    # PIL's SMOOTH kernel: ones around a five, over 13. Sums of whole numbers, so exact in any order.
    smooth = box.add_(inner, alpha=4).mul_(1 / 13).round_()
    sharp = pixels.clone()
    sharp[:, :, 1:-1, 1:-1] = _quantize(smooth.sub_(inner).mul_(1 - _each(factor)).add_(inner))
    return sharp


def posterize(pixels: Tensor, bits: Tensor) -> Tensor:
    """Keeps the highest `bits` of each pixel, whole numbers 0 … 8; 8 is the image itself."""
    # A power of two by a shift of bits: exp2 need not be exact on every device.
    step = (1 << (8 - _each(bits)).int()).float()
    return (pixels / step).floor_().mul_(step)


def solarize(pixels: Tensor, threshold: Tensor) -> Tensor:
    """Inverts pixels at or above `threshold`; 256 is the image itself."""
    # 1 at or above the threshold and 0 below, for whole numbers, without the comparison that is slow on a CPU.
    inverted = (pixels - (_each(threshold).ceil() - 1)).clamp_(0, 1)
    return inverted.mul_(255 - 2 * pixels).add_(pixels)


def invert(pixels: Tensor, amount: Tensor) -> Tensor:
    """Goes `amount`, 0 … 1, of the way to the negative."""
    return (255 - 2 * pixels).mul_(_each(amount)).add_(pixels).round_()


def autocontrast(pixels: Tensor, amount: Tensor) -> Tensor:
    """Goes `amount`, 0 … 1, of the way to each channel stretched from 0 to 255; a flat channel stays."""
    low, high = pixels.amin(dim=(2, 3), keepdim=True), pixels.amax(dim=(2, 3), keepdim=True)
    flat = low == high
    span = torch.where(flat, 1.0, (high - low) * (1 / 255))
    stretched = _quantize((pixels - torch.where(flat, 0.0, low)).div_(span))
    return stretched.sub_(pixels).mul_(_each(amount)).add_(pixels).round_()


def equalize(pixels: Tensor, amount: Tensor) -> Tensor:
    """Goes `amount`, 0 … 1, of the way to each channel with an even histogram, by PIL's integer rule."""
    count, channels, height, width = pixels.shape
    index = pixels.view(count, channels, height * width).long()
    histogram = torch.zeros(count, channels, 256, dtype=torch.int32, device=pixels.device)
    histogram.scatter_add_(2, index, histogram.new_ones(1).expand_as(index))
    total = histogram.cumsum(2, dtype=torch.int32)
    brightest = histogram.gather(2, total.argmax(2, keepdim=True))  # how many pixels have the highest value
    step = (height * width - brightest).div_(255, rounding_mode="floor")
    table = (total - histogram + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(0, 255)
    levels = torch.arange(256, dtype=torch.float32, device=pixels.device)
    table = torch.where(step == 0, levels, table.float())  # too few pixels to spread
    table = torch.lerp(levels.expand_as(table), table, amount.view(-1, 1, 1)).round_()
    return table.gather(2, index).view_as(pixels)
