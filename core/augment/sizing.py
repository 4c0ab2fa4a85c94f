"""Progressive resizing (arXiv 2104.00298): at half the side an epoch costs a quarter."""

from __future__ import annotations

from core.config import AugmentConfig

# Few, since each shape is compiled and tuned separately. Eighths of 32, 64, 96, … are multiples of 4 pixels, which two
# strides of 2 divide evenly.
_STEPS = 8
_PIXELS_A_STEP = 4


def size_at(config: AugmentConfig, progress: float, size: tuple[int, int]) -> tuple[int, int]:
    """Return the size (H, W) of the training images at this progress of the run in [0, 1], up to `size`.

    The side grows in eighths, or in pixels of the shorter side if an eighth is less than 4 pixels.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress {progress} is outside [0, 1]")
    if progress >= config.full_size_from_fraction:
        return size
    grown = progress / config.full_size_from_fraction
    fraction = config.start_size_fraction + (1 - config.start_size_fraction) * grown
    shorter = min(size)
    steps = _STEPS if shorter >= _STEPS * _PIXELS_A_STEP else shorter
    step = max(int(fraction * steps + 0.5), 1)
    height, width = (int(side * step / steps + 0.5) for side in size)
    return height, width
