"""Whole-batch, per-sample augmentation on the device: one geometric pass, one photometric pass, then mixing.

Its key choice: every shape is known beforehand, so nothing waits for the device, and still each operation touches only
the images that need it. RandAugment's operations are *dealt like cards*: a batch is padded to a multiple of the
number of operations, shuffled, and cut into equal hands. For one image each operation is as likely as any other, and
magnitudes, signs and everything else are drawn independently for each image; only the operations of two images of a
batch (on a CPU, of a chunk of it) are a little less alike than by chance. The alternatives are all operations on all
images, at fourteen times the work, or asking the device which images to work on, at a wait for each operation, and no
CUDA graph.

Geometry is composed into one affine matrix an image, that maps places of the output to places of the input. Flips
and whole-pixel shifts are copied, exact to the bit; only shears and rotations are interpolated. Photometry works on
float32 that holds whole numbers from 0 to 255 and rounds as torchvision does on uint8.

RandAugment: Cubuk et al. 2020, arXiv 1909.13719; ranges and definitions are those of torchvision's v2 transforms.
Mixup: Zhang et al. 2018, arXiv 1710.09412. CutMix: Yun et al. 2019, arXiv 1905.04899. One draw a batch, as in timm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.config import AugmentConfig
from core.runtime import normalize

# Luma weights of ITU-R BT.601 as torchvision rounds them.
_LUMA = (0.2989, 0.587, 0.114)
# RandomErasing's defaults: share of the image, and height over width (Zhong et al. 2017, and torchvision).
_ERASE_AREA = (0.02, 0.33)
_ERASE_ASPECT = (0.3, 3.3)
_ERASE_TRIES = 10
# Working memory of a CPU's chunk. Blocks much above it are given back to the system and faulted in again, batch after
# batch, which took a third of the time.
_CPU_CHUNK_BYTES = 10 * 2**20
# RandAugment's greatest magnitudes, torchvision's `RandAugment._AUGMENTATION_SPACE`.
_MAX_SHEAR = 0.3
_MAX_TRANSLATE = 150.0 / 331.0
_MAX_DEGREES = 30.0
_MAX_FACTOR_CHANGE = 0.9
_MAX_BITS_LOST = 4


# --- geometry: (n, 2, 3) matrices that map output places to input places, in pixels from the image's centre ----------


def affine(like: Tensor, a: Tensor | float = 1.0, b: Tensor | float = 0.0, x: Tensor | float = 0.0,
           c: Tensor | float = 0.0, d: Tensor | float = 1.0, y: Tensor | float = 0.0) -> Tensor:  # fmt: skip
    """[[a, b, x], [c, d, y]] for each element of `like` (n,): (n, 2, 3). A number must be 0 or 1."""
    constant = {0.0: torch.zeros_like(like), 1.0: torch.ones_like(like)}
    entries = [entry if isinstance(entry, Tensor) else constant[entry] for entry in (a, b, x, c, d, y)]
    return torch.stack(entries, dim=1).view(-1, 2, 3)


def then(first: Tensor, second: Tensor) -> Tensor:
    """The matrices (n, 2, 3) of the images that `first` makes, changed once more by `second`."""
    # Written out: a matrix product would follow the caller's autocast and TF32 settings, and lose whole pixels.
    product = first[:, :, 0:1] * second[:, 0:1, :] + first[:, :, 1:2] * second[:, 1:2, :]
    product[:, :, 2] += first[:, :, 2]
    return product


def rotation(degrees: Tensor) -> Tensor:
    """Rotates counter-clockwise about the centre by `degrees` (n,): (n, 2, 3)."""
    angle = torch.deg2rad(degrees)
    cos, sin = angle.cos(), angle.sin()
    return affine(degrees, a=cos, b=-sin, c=sin, d=cos)


def shear_x(slope: Tensor, size: tuple[int, int]) -> Tensor:
    """Shears along rows by `slope` (n,) about the top left corner, as torchvision's RandAugment does: (n, 2, 3)."""
    return affine(slope, b=slope, x=slope * (size[0] / 2))


def shear_y(slope: Tensor, size: tuple[int, int]) -> Tensor:
    """Shears along columns by `slope` (n,) about the top left corner: (n, 2, 3)."""
    return affine(slope, c=slope, y=slope * (size[1] / 2))


def translate_x(pixels: Tensor) -> Tensor:
    """Moves to the right by whole `pixels` (n,): (n, 2, 3)."""
    return affine(pixels, x=-pixels)


def translate_y(pixels: Tensor) -> Tensor:
    """Moves down by whole `pixels` (n,): (n, 2, 3)."""
    return affine(pixels, y=-pixels)


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Images (n, C, H, W) seen through any matrices (n, 2, 3): bilinear, black outside, whole numbers in float32."""
    count, _, height, width = images.shape
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device) - (height - 1) / 2
    # grid_sample counts from -1 to 1 between the image's edges. (n, 2, 1, W) + (n, 2, H, 1): a hundred times
    # faster on a CPU than affine_grid, whose matrix product has an inner length of 3.
    matrices = torch.cat([matrices[:, :1] * (2 / width), matrices[:, 1:] * (2 / height)], dim=1)
    across = matrices[:, :, 0:1] * x
    down = matrices[:, :, 1:2] * y + matrices[:, :, 2:3]
    grid = across.view(count, 2, 1, width) + down.view(count, 2, height, 1)
    return F.grid_sample(images.float(), grid.permute(0, 2, 3, 1), align_corners=False).round_()


def shift(images: Tensor, sources: Tensor, matrices: Tensor, *, reach: int, mirrored: bool) -> Tensor:
    """Images (n, C, H, W) uint8 flipped and moved by whole pixels, black outside: (m, C, H, W) uint8, exact.

    Output k shows image `sources[k]` (m,) through `matrices[k]` (m, 2, 3), of which only the signs of the diagonal and
    the whole-pixel shift are read. `reach` is the farthest sideways shift in pixels that the matrices hold, and
    `mirrored` whether any of them flips sideways.
    """
    count, channels, height, width = images.shape
    reach = min(reach, width)
    # Rows lie one after the other with `reach` black pixels between, and once more mirrored. So a shifted row is
    # `width` pixels in a line from some start: one copy of memory, where an index a pixel would cost ten times that.
    stride = width + reach
    copies = 2 if mirrored else 1
    end = copies * count * channels * height * stride
    line = images.new_zeros(end + stride)
    body = line[:end].view(copies, count, channels, height, stride)
    body[0, ..., reach:] = images
    if mirrored:
        body[1, ..., reach:] = images.flip(-1)
    windows = line.as_strided((end + reach + 1, width), (1, 1))

    flip_x, flip_y = matrices[:, 0, 0] < 0, matrices[:, 1, 1] < 0
    move = matrices[:, :, 2].round().long()  # (m, 2)
    move_x = torch.where(flip_x, -move[:, 0], move[:, 0]).clamp(-reach, reach)
    image = (flip_x * count if mirrored else 0) + sources  # (m,)
    plane = image[:, None] * channels + torch.arange(channels, device=images.device)  # (m, C)
    row = torch.arange(height, device=images.device)
    row = torch.where(flip_y[:, None], height - 1 - row, row) + move[:, 1:2]  # (m, H)
    starts = (plane[:, :, None] * height + row[:, None, :]) * stride + (reach + move_x)[:, None, None]
    inside = (row >= 0) & (row < height)
    starts = torch.where(inside[:, None, :], starts, end)  # past the end all is black
    return windows.index_select(0, starts.flatten()).view(-1, channels, height, width)


def put_rows(pixels: Tensor, rows: Tensor, values: Tensor) -> None:
    """pixels[rows] = values, in place; both (…, C, H, W) contiguous, and rows that occur twice have equal values."""
    # A CPU moves one element at a time here, so the widest element there is makes it four times as fast.
    values = values.contiguous()
    wide = torch.complex128 if pixels[0].numel() % 4 == 0 else pixels.dtype
    pixels.view(len(pixels), -1).view(wide).index_copy_(0, rows, values.view(len(values), -1).view(wide))


# --- photometry: pixels (n, C, H, W) float32 that hold whole numbers 0 … 255, with a magnitude (n,) for each image ----


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
    step = torch.exp2(8 - _each(bits))
    return (pixels / step).floor_().mul_(step)


def solarize(pixels: Tensor, threshold: Tensor) -> Tensor:
    """Inverts pixels at or above `threshold`; 256 is the image itself."""
    # 1 at or above the threshold and 0 below, for whole numbers, without the comparison that is slow on a CPU.
    inverted = (pixels - (_each(threshold).ceil() - 1)).clamp_(0, 1)
    return inverted.mul_(255 - 2 * pixels).add_(pixels)


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


# --- RandAugment: operations by torchvision's names, of a signed level (n,) in [-1, 1] -------------------------------

GEOMETRIC_OPS: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "ShearX": lambda level, size: shear_x(_MAX_SHEAR * level, size),
    "ShearY": lambda level, size: shear_y(_MAX_SHEAR * level, size),
    "Rotate": lambda level, _size: rotation(_MAX_DEGREES * level),
    "TranslateX": lambda level, size: translate_x((_MAX_TRANSLATE * size[1] * level).trunc()),
    "TranslateY": lambda level, size: translate_y((_MAX_TRANSLATE * size[0] * level).trunc()),
}
INTERPOLATED_OPS = ("ShearX", "ShearY", "Rotate")
PHOTOMETRIC_OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": lambda pixels, level: brightness(pixels, 1 + _MAX_FACTOR_CHANGE * level),
    "Color": lambda pixels, level: saturation(pixels, 1 + _MAX_FACTOR_CHANGE * level),
    "Contrast": lambda pixels, level: contrast(pixels, 1 + _MAX_FACTOR_CHANGE * level),
    "Sharpness": lambda pixels, level: sharpness(pixels, 1 + _MAX_FACTOR_CHANGE * level),
    "Posterize": lambda pixels, level: posterize(pixels, 8 - (_MAX_BITS_LOST * level.abs()).round()),
    # 256 and not torchvision's 255, as AutoAugment has it (arXiv 1805.09501), so that a low level leaves white white.
    "Solarize": lambda pixels, level: solarize(pixels, 256 * (1 - level.abs())),
    # torchvision applies these two in full whatever the magnitude. Here they grow with it, so that 0 is no change.
    "AutoContrast": lambda pixels, level: autocontrast(pixels, level.abs()),
    "Equalize": lambda pixels, level: equalize(pixels, level.abs()),
}
OPS = ("Identity", *GEOMETRIC_OPS, *PHOTOMETRIC_OPS)


@dataclass(frozen=True)
class _Round:
    """One operation for each image: `rows[name]` (n / 14,) are the images that `name` changes, `levels` (n,)."""

    rows: dict[str, Tensor]
    levels: Tensor


@dataclass(frozen=True)
class MixPlan:
    """How one batch is mixed: mixup keeps `keep` of each image, cutmix all but `box`, whose share is 1 - `keep`."""

    keep: float
    box: tuple[int, int, int, int] | None
    """Top, bottom, left, right in pixels; None is mixup."""


class Augment:
    """Turns uint8 training images into augmented, normalised network input, and mixes them.

    `mean` and `std` are of pixels in [0, 1], one a channel; one or three channels. All random numbers come from the
    generators that are passed in: the same state gives the same bits. Nothing waits for the device.
    """

    def __init__(
        self, config: AugmentConfig, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
    ) -> None:
        self.config = config
        self._mean, self._std = mean, std
        self._scale = torch.tensor([1 / (255 * s) for s in std], device=device).view(1, -1, 1, 1)
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(1, -1, 1, 1)
        self._rounds = config.ops if config.strength > 0 else 0
        self._moves = bool(
            config.flip or config.vertical_flip or config.crop_pad_fraction or config.rotation_degrees or self._rounds
        )

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images (N, C, H, W) uint8 to float32 (N, C, H, W) channels_last, each augmented on its own, normalised.

        The order is crop, flips, rotation, RandAugment's geometry, colour jitter, RandAugment's photometry, erasing.
        """
        if not (self._moves or self.config.color_jitter or self.config.erase):
            return normalize(images, self._mean, self._std)
        out = torch.empty(images.shape, device=images.device, memory_format=torch.channels_last)
        chunk = self._chunk(images)
        erased = self._draw_erased(images.shape, generator) if self.config.erase else None
        for start in range(0, len(images), chunk):
            part = slice(start, start + chunk)
            pixels = self._change(images[part].contiguous(), generator)
            # The arithmetic of core.runtime.normalize to the bit, with its constants spread over one image: ten times
            # as fast on a CPU as one constant a channel.
            scale, shift = (c.expand(1, *pixels.shape[1:]).contiguous() for c in (self._scale, self._shift))
            torch.addcmul(shift, pixels, scale, out=pixels)
            if erased is not None:
                rows, columns = erased
                pixels.mul_(1 - rows[part, None, :, None] * columns[part, None, None, :])
            out[part] = pixels
        return out

    def _chunk(self, images: Tensor) -> int:
        """How many images are worked on at a time: all on a GPU, and on a CPU what stays in its cache."""
        if images.device.type != "cpu":
            return len(images)
        chunks = math.ceil(4 * images.numel() / _CPU_CHUNK_BYTES)
        return math.ceil(len(images) / max(chunks, 1) / len(OPS)) * len(OPS)

    def _change(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """All but erasing and normalising: (n, C, H, W) uint8 to float32 of whole numbers from 0 to 255."""
        count = len(images)
        rounds = self._deal(count, generator)
        pixels = self._move(images, rounds, generator) if self._moves else images.float()
        if self.config.color_jitter:
            pixels = self._jitter(pixels, generator)
        for one in rounds:
            for name, operation in PHOTOMETRIC_OPS.items():
                rows = one.rows[name]
                values = operation(pixels.index_select(0, rows), one.levels.index_select(0, rows))
                put_rows(pixels, rows, values)
        return pixels[:count]

    def _uniform(self, shape: int | Sequence[int], generator: torch.Generator, low: float, high: float) -> Tensor:
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        return torch.rand(size, generator=generator, device=self._scale.device).mul_(high - low).add_(low)

    def _deal(self, count: int, generator: torch.Generator) -> list[_Round]:
        """Which operations each image gets, and how strongly: one hand of equal size for each operation."""
        slots = math.ceil(count / len(OPS)) * len(OPS)  # the images past the last are worked on and dropped
        rounds = []
        for _ in range(self._rounds):
            hands = self._uniform(slots, generator, 0, 1).argsort().view(len(OPS), -1)
            sign = self._uniform(slots, generator, -1, 1).sign_()
            rounds.append(_Round(dict(zip(OPS, hands, strict=True)), sign * self.config.strength))
        return rounds

    def _move(self, images: Tensor, rounds: list[_Round], generator: torch.Generator) -> Tensor:
        """The geometric pass: (n, C, H, W) float32 of whole numbers, as many rows as the rounds have."""
        config = self.config
        count, _, height, width = images.shape
        size = (height, width)
        slots = len(rounds[0].levels) if rounds else count
        pad_y, pad_x = (int(config.crop_pad_fraction * side + 0.5) for side in size)
        matrices = affine(self._scale.new_empty(slots))
        if pad_x or pad_y:
            x = self._uniform(slots, generator, 0, 2 * pad_x + 1).floor_() - pad_x
            y = self._uniform(slots, generator, 0, 2 * pad_y + 1).floor_() - pad_y
            matrices = affine(x, x=x, y=y)
        if config.flip or config.vertical_flip:
            x = 1 - 2 * (self._uniform(slots, generator, 0, 1) < config.flip).float()
            y = 1 - 2 * (self._uniform(slots, generator, 0, 1) < config.vertical_flip).float()
            matrices = then(matrices, affine(x, a=x, d=y))
        if config.rotation_degrees:
            degrees = self._uniform(slots, generator, -config.rotation_degrees, config.rotation_degrees)
            matrices = then(matrices, rotation(degrees))
        for one in rounds:
            step = affine(one.levels)
            for name, operation in GEOMETRIC_OPS.items():
                rows = one.rows[name]
                step.index_copy_(0, rows, operation(one.levels.index_select(0, rows), size))
            matrices = then(matrices, step)

        sources = torch.arange(slots, device=images.device).clamp_(max=count - 1)
        if config.rotation_degrees:
            return warp(images.index_select(0, sources), matrices)
        reach = pad_x + len(rounds) * int(_MAX_TRANSLATE * width * config.strength)
        pixels = shift(images, sources, matrices, reach=reach, mirrored=config.flip > 0).float()
        if rounds:
            # An image that two rounds interpolate is listed, and written, twice, with the same values.
            rows = torch.cat([one.rows[name] for one in rounds for name in INTERPOLATED_OPS])
            put_rows(
                pixels,
                rows,
                warp(images.index_select(0, sources.index_select(0, rows)), matrices.index_select(0, rows)),
            )
        return pixels

    def _jitter(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Colour jitter of every image, in torchvision's listed order: brightness, contrast, saturation."""
        low, high = 1 - self.config.color_jitter, 1 + self.config.color_jitter
        factors = self._uniform((3, len(pixels)), generator, low, high)
        return saturation(contrast(brightness(pixels, factors[0]), factors[1]), factors[2])

    def _draw_erased(self, shape: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows (N, H) and columns (N, W), float32 of 0 and 1, whose product is 1 where an image is erased."""
        count, _, height, width = shape
        tries = (_ERASE_TRIES, count)
        # torchvision draws again while the rectangle is too large, at most ten times. Here all ten are drawn at once.
        area = self._uniform(tries, generator, *_ERASE_AREA) * (height * width)
        aspect = self._uniform(tries, generator, math.log(_ERASE_ASPECT[0]), math.log(_ERASE_ASPECT[1])).exp_()
        high, wide = (area * aspect).sqrt_().round_(), (area / aspect).sqrt_().round_()
        fits = (high < height) & (wide < width)
        first = fits.to(torch.uint8).argmax(0, keepdim=True)
        high, wide = high.gather(0, first).view(-1, 1), wide.gather(0, first).view(-1, 1)
        erased = fits.any(0) & (self._uniform(count, generator, 0, 1) < self.config.erase)
        top = (self._uniform((count, 1), generator, 0, 1) * (height - high + 1)).floor_()
        left = (self._uniform((count, 1), generator, 0, 1) * (width - wide + 1)).floor_()
        y = torch.arange(height, device=top.device)
        x = torch.arange(width, device=top.device)
        rows = (y >= top) & (y < top + high) & erased[:, None]
        columns = (x >= left) & (x < left + wide)
        return rows.float(), columns.float()

    # --- mixing ------------------------------------------------------------------------------------------------------

    def mixes(self, progress: float) -> bool:
        """Whether batches may be mixed at this fraction of the run, in [0, 1]."""
        config = self.config
        return (config.mixup > 0 or config.cutmix > 0) and progress < config.mix_off_fraction

    def plan_mix(self, generator: torch.Generator, shape: Sequence[int]) -> MixPlan | None:
        """Draws how the next batch of that shape (N, C, H, W) is mixed, or None: not at all.

        One draw a batch, as in timm. The generator is the CPU's, so that the device is not asked.
        """
        config = self.config
        chance, choice, row, column = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        if chance >= config.mix_probability or not (config.mixup or config.cutmix):
            return None
        cut = bool(config.cutmix) and (not config.mixup or choice < 0.5)
        keep = symmetric_beta(config.cutmix if cut else config.mixup, generator)
        if not cut:
            return MixPlan(keep, None)
        height, width = shape[-2:]
        side = math.sqrt(1 - keep)
        half_height, half_width = int(height * side) // 2, int(width * side) // 2
        y, x = int(row * height), int(column * width)
        top, bottom = max(y - half_height, 0), min(y + half_height, height)
        left, right = max(x - half_width, 0), min(x + half_width, width)
        # The box is cut off at the border and rounded, so the targets follow its real area.
        return MixPlan(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))

    def apply_mix(
        self, images: Tensor, labels: Tensor, num_classes: int, plan: MixPlan, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Mixes each of the images (N, C, H, W) float32 with another of the batch, and their labels (N,) int64 alike.

        Returns the mixed images, and soft targets (N, K) float32 whose rows sum to 1.
        """
        partner = torch.rand(len(images), generator=generator, device=images.device).argsort()
        if plan.box is None:
            mixed = torch.lerp(images.index_select(0, partner), images, plan.keep)
        else:
            top, bottom, left, right = plan.box
            mixed = images.clone()
            mixed[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].index_select(0, partner)
        # one_hot would ask the device for the largest label.
        targets = torch.zeros(len(labels), num_classes, device=labels.device).scatter_(1, labels[:, None], plan.keep)
        other = labels.index_select(0, partner)[:, None]
        targets.scatter_add_(1, other, torch.full_like(other, 1 - plan.keep, dtype=targets.dtype))
        return mixed.contiguous(memory_format=torch.channels_last), targets


def symmetric_beta(alpha: float, generator: torch.Generator) -> float:
    """A draw from Beta(alpha, alpha), alpha > 0, from a CPU generator.

    It is g / (g + h) with g and h from Gamma(alpha). Both are kept as logarithms, log Gamma(alpha) =
    log Gamma(alpha + 1) + log(U) / alpha (Marsaglia and Tsang 2000, section 6): a small alpha's own draws would
    underflow to 0 / 0.
    """
    shape = torch.full((2,), alpha + 1, dtype=torch.float64)
    gamma = torch._standard_gamma(shape, generator=generator)
    uniform = 1 - torch.rand(2, generator=generator, dtype=torch.float64)  # in (0, 1]
    first, second = gamma.log() + uniform.log() / alpha
    return float(torch.sigmoid(first - second))
