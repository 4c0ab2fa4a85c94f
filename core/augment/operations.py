"""Operations of torchvision's v2 transforms, unless noted, with a signed level (n,) in [-1, 1]; 0 is the identity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from core.augment import geometry, photometry


@dataclass(frozen=True)
class Ranges:
    """Magnitudes at level 1."""

    shear: float  # Slope
    translate_fraction: float  # Of the image's side
    translate_pixels: float  # Maximum
    degrees: float
    factor_change: float  # Brightness, saturation, contrast and sharpness are scaled by 1 ± this
    bits_lost: int  # Posterize keeps 8 minus this

    def translate(self, side: int) -> float:
        """Return the shift in pixels at level 1."""
        return min(self.translate_fraction * side, self.translate_pixels)

    def factor(self, level: Tensor) -> Tensor:
        """Return the factor of brightness and similar operations."""
        return 1 + self.factor_change * level

    def bits(self, level: Tensor) -> Tensor:
        """Return the bits that posterize keeps."""
        return 8 - (self.bits_lost * level.abs()).round()


# Of `RandAugment` and `AutoAugment`.
STANDARD = Ranges(
    shear=0.3,
    translate_fraction=150.0 / 331.0,
    translate_pixels=math.inf,
    degrees=30.0,
    factor_change=0.9,
    bits_lost=4,
)
# Of `TrivialAugmentWide`, with shifts limited to the image's side.
WIDE = Ranges(
    shear=0.99,
    translate_fraction=1.0,
    translate_pixels=32.0,
    degrees=135.0,
    factor_change=0.99,
    bits_lost=6,
)

GEOMETRIC_OPS: dict[str, Callable[[Tensor, tuple[int, int], Ranges], Tensor]] = {
    "ShearX": lambda level, size, ranges: geometry.shear_x(ranges.shear * level, size),
    "ShearY": lambda level, size, ranges: geometry.shear_y(ranges.shear * level, size),
    "Rotate": lambda level, _size, ranges: geometry.rotation(ranges.degrees * level),
    "TranslateX": lambda level, size, ranges: geometry.translate_x((ranges.translate(size[1]) * level).trunc()),
    "TranslateY": lambda level, size, ranges: geometry.translate_y((ranges.translate(size[0]) * level).trunc()),
}
"""(level (n,), size (H, W), ranges) -> matrices (n, 2, 3)."""

INTERPOLATED_OPS = ("ShearX", "ShearY", "Rotate")

PHOTOMETRIC_OPS: dict[str, Callable[[Tensor, Tensor, Ranges], Tensor]] = {
    "Brightness": lambda pixels, level, ranges: photometry.brightness(pixels, ranges.factor(level)),
    "Color": lambda pixels, level, ranges: photometry.saturation(pixels, ranges.factor(level)),
    "Contrast": lambda pixels, level, ranges: photometry.contrast(pixels, ranges.factor(level)),
    "Sharpness": lambda pixels, level, ranges: photometry.sharpness(pixels, ranges.factor(level)),
    "Posterize": lambda pixels, level, ranges: photometry.posterize(pixels, ranges.bits(level)),
    # 256 as in AutoAugment's paper, not torchvision's 255, so that low levels do not change white.
    "Solarize": lambda pixels, level, _ranges: photometry.solarize(pixels, 256 * (1 - level.abs())),
    # torchvision ignores the magnitude of these three.
    "AutoContrast": lambda pixels, level, _ranges: photometry.autocontrast(pixels, level.abs()),
    "Equalize": lambda pixels, level, _ranges: photometry.equalize(pixels, level.abs()),
    "Invert": lambda pixels, level, _ranges: photometry.invert(pixels, level.abs()),
}
"""(pixels (n, C, H, W) float32, level (n,), ranges) -> pixels."""

OPS = ("Identity", *GEOMETRIC_OPS, *(name for name in PHOTOMETRIC_OPS if name != "Invert"))
"""The fourteen operations of RandAugment and TrivialAugment."""
