"""Progressive resolution: small images first, whole ones later (Tan and Le 2021, arXiv 2104.00298).

Most of a run's time goes into its convolutions, whose work grows with the square of the side: at half the side an epoch
costs a quarter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from core.config import AugmentConfig

# Few different shapes, because each is planned and tuned anew. Eighths of 32, 64, 96, … are multiples of 4 pixels,
# which two strides of 2 leave whole; eighths of less than 4 pixels would save little over whole pixels.
_STEPS = 8
_PIXELS_A_STEP = 4


def size_at(config: AugmentConfig, progress: float, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of the images of `size` (H, W) at `progress`, the fraction of the run that is over.

    The side grows evenly from `start_size_fraction` to the whole at `full_size_from_fraction`, in eighths, or where an
    eighth of the shorter side is less than 4 pixels, in whole pixels of it. Both sides shrink alike.

    Raises:
        ValueError: `progress` lies outside [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress {progress} lies outside [0, 1]")
    if progress >= config.full_size_from_fraction:
        return size
    grown = progress / config.full_size_from_fraction
    fraction = config.start_size_fraction + (1 - config.start_size_fraction) * grown
    shorter = min(size)
    steps = _STEPS if shorter >= _STEPS * _PIXELS_A_STEP else shorter
    step = max(int(fraction * steps + 0.5), 1)
    height, width = (int(side * step / steps + 0.5) for side in size)
    return height, width


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (N, C, H, W) float, channels_last, at `size` (h, w), channels_last; the same tensor where it is theirs."""
    if images.shape[-2:] == size:
        return images
    # Antialiased bilinear: every pixel counts, weighted by how near it is. On two cores it took 12 ms for 256 × 3 × 96²
    # to 72², where averaging areas took 17, and it was the faster one at nearly every other size. Areas, besides, are
    # cut at whole pixels: at a ratio that is not whole, some outputs average more of them than others do.
    # In float32: a CPU knows no bf16 here.
    smaller = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
    return smaller.to(images.dtype, memory_format=torch.channels_last)
