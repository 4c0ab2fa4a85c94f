"""Near-duplicate images: re-encoded, resized, slightly cropped or shifted copies, and frames of one scene.

Low frequencies of each image, and of five crops of it, select candidate pairs, as a perceptual hash does, but compared
by correlation. The images of a pair are then aligned by scale and shift (Lucas and Kanade 1981, coarse to fine), and
are near-duplicates if their fine detail correlates.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from core.data.decode import Pixels

MIN_SIDE = 32
"""Smaller images have too few pixels to tell a copy from a similar image."""

SIDE = 48
"""Side to which images are reduced for the comparison."""

CROP = 0.94
"""Side of the five crops that are compared with other images as a whole, as a fraction of the image."""

CANDIDATE = 0.93
"""Minimum correlation of the low frequencies of a candidate pair."""

LEVELS = ((16, 4, 0.7), (24, 4, 0.8), (48, 4, 0.8))
"""Side, iterations, and minimum correlation of fine detail after them, of each level of the alignment."""

MAX_SHIFT = 0.15
"""Maximum change of scale and shift, relative to the image side and half of it."""

MAX_CANDIDATES = 300_000
"""Pairs that are aligned, the most similar first. Sets of up to 15,000 photographs have fewer candidates."""

_BLOCK = 1 << 20  # pairs compared at once
_PAIRS = 2048  # pairs aligned, and images resized, at once


def reduced(images: Iterable[Pixels], count: int) -> Tensor:
    """Return images (C, H, W) uint8 as grey (N, 48, 48) uint8; empty if a side is below `MIN_SIDE`."""
    small = torch.empty((count, SIDE, SIDE), dtype=torch.uint8)
    for index, pixels in enumerate(images):
        if min(pixels.shape[1:]) < MIN_SIDE:
            return small[:0]
        grey = torch.from_numpy(pixels.mean(axis=0, dtype=np.float64))
        small[index] = F.interpolate(grey[None, None], size=(SIDE, SIDE), mode="area")[0, 0].round().byte()
    return small


def near_duplicates(small: Tensor) -> NDArray[np.int64]:
    """Find pairs of near-duplicates. The time is quadratic in their number: 8,000 take half a minute on one core.

    Args:
        small: (N, 48, 48) uint8, from `reduced`.

    Returns:
        (K, 2) pairs of indices, the smaller first, in order.
    """
    if len(small) < 2:
        return np.empty((0, 2), dtype=np.int64)
    pairs, moves = _candidates(small)
    for side, iterations, least in LEVELS:
        kept = torch.empty(len(pairs), dtype=torch.bool)
        for start in range(0, len(pairs), _PAIRS):
            part = slice(start, start + _PAIRS)
            first, second = (_resized(small[chosen], side) for chosen in pairs[part].unbind(1))
            moves[part] = _align(first, second, moves[part], iterations)
            moved, inside = _move(second, moves[part])
            kept[part] = _correlation(_detail(first), _detail(moved), inside) >= least
        pairs, moves = pairs[kept], moves[kept]
    found: NDArray[np.int64] = np.unique(pairs.sort(dim=1).values.numpy(), axis=0)
    return found


def _candidates(small: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (K, 2) of images with similar parts, and scale and shift (K, 4) from the first's part to the second's.

    The parts are the whole of one and the whole or a crop of the other, or opposite corners of both.
    """
    margin = 1 - CROP
    whole, middle = (0.0, 0.0, 1.0), (margin / 2, margin / 2, CROP)
    corners = [(x, y, CROP) for x in (0.0, margin) for y in (0.0, margin)]
    views = {crop: _low_frequencies(_crop(small, *crop)) for crop in (whole, middle, *corners)}
    compared = [(whole, crop) for crop in views] + list(zip(corners, reversed(corners), strict=True))
    moves = torch.tensor([_move_between(first, second) for first, second in compared], dtype=torch.float64)
    parts = []
    rows = min(len(small), max(1, _BLOCK // len(small)))
    block = torch.empty((2, rows, len(small)), dtype=torch.float64)  # reused: the heap grows with large temporaries
    choice = torch.empty((rows, len(small)), dtype=torch.uint8)
    for start in range(0, len(small), rows):
        part = slice(start, start + rows)
        count = len(small[part])
        (best, similar), which = block[:, :count], choice[:count]
        best.fill_(-1)
        for number, (fixed, moved) in enumerate(compared):
            torch.matmul(views[moved][part], views[fixed].T, out=similar)
            which.masked_fill_(similar > best, number)
            torch.maximum(best, similar, out=best)
        second, first = (best >= CANDIDATE).nonzero(as_tuple=True)
        parts.append((first, second + start, which[second, first].long(), best[second, first]))
    first, second, which, similarity = (torch.cat(part) for part in zip(*parts, strict=True))
    order = similarity.argsort(descending=True, stable=True)
    order = order[first[order] != second[order]]
    key = torch.minimum(first, second)[order] * len(small) + torch.maximum(first, second)[order]
    _, kept = np.unique(key.numpy(), return_index=True)  # of both directions, the more similar one
    order = order[torch.from_numpy(np.sort(kept)[:MAX_CANDIDATES])]
    return torch.stack([first, second], dim=1)[order], moves[which[order]]


def _move_between(first: tuple[float, float, float], second: tuple[float, float, float]) -> tuple[float, ...]:
    """Scale and shift of coordinates in [-1, 1] that take one crop (left, top, side) to another."""
    scale = second[2] / first[2]
    centers = [[2 * corner + crop[2] - 1 for corner in crop[:2]] for crop in (first, second)]
    return (scale - 1, scale - 1, *(there - scale * here for here, there in zip(*centers, strict=True)))


def _low_frequencies(small: Tensor) -> Tensor:
    """The 8 × 8 lowest frequencies but the mean, as unit vectors (N, 63)."""
    parts = []
    for start in range(0, len(small), _PAIRS):
        images = _resized(small[start : start + _PAIRS], 32)[:, 0].numpy()
        spectrum = scipy.fft.dctn(images, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(images), 64)
        parts.append(F.normalize(torch.from_numpy(spectrum[:, 1:]), dim=1))
    return torch.cat(parts)


def _crop(small: Tensor, left: float, top: float, side: float) -> Tensor:
    x, y, length = (round(fraction * SIDE) for fraction in (left, top, side))
    return small[:, y : y + length, x : x + length]


def _resized(small: Tensor, side: int) -> Tensor:
    """Images as (N, 1, side, side) float64 in [0, 1]: rounding must not decide differently on another machine."""
    return F.interpolate(small[:, None].double() / 255, size=(side, side), mode="area")


def _align(fixed: Tensor, moving: Tensor, moves: Tensor, iterations: int) -> Tensor:
    """Improve scale and shift (K, 4) by Gauss-Newton steps, together with gain and offset of the brightness."""
    count, _, side, _ = fixed.shape
    x, y = _grid(side)
    for _ in range(iterations):
        moved, inside = _move(moving, moves)
        slope_y, slope_x = torch.gradient(moved, spacing=2 / side, dim=(2, 3))
        columns = [slope_x * x, slope_y * y, slope_x, slope_y, moved, torch.ones_like(moved)]
        jacobian = (torch.stack(columns, dim=-1) * inside[..., None]).view(count, -1, 6)
        error = ((fixed - moved) * inside).view(count, -1, 1)
        normal = jacobian.mT @ jacobian + 1e-3 * torch.eye(6, dtype=torch.float64)
        step = torch.linalg.solve(normal, jacobian.mT @ error)[:, :4, 0]
        moves = (moves + step).clamp(-MAX_SHIFT, MAX_SHIFT)
    return moves


def _move(images: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
    """Images scaled and shifted, and a mask of the pixels that come from inside of them."""
    x, y = _grid(images.shape[-1])
    scale_x, scale_y, shift_x, shift_y = (part[:, None, None] for part in moves.unbind(1))
    grid = torch.stack([(1 + scale_x) * x + shift_x, (1 + scale_y) * y + shift_y], dim=-1)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved, (grid.abs().amax(-1) <= 1).double()[:, None]


def _grid(side: int) -> tuple[Tensor, Tensor]:
    """Coordinates x and y (side, side) of the pixel centres in [-1, 1]."""
    line = (torch.arange(side, dtype=torch.float64) + 0.5) / side * 2 - 1
    x, y = torch.meshgrid(line, line, indexing="xy")
    return x, y


def _detail(images: Tensor) -> Tensor:
    """Images minus their local means over 9 × 9 pixels."""
    return images - F.avg_pool2d(F.pad(images, (4, 4, 4, 4), mode="reflect"), 9, stride=1)


def _correlation(first: Tensor, second: Tensor, inside: Tensor) -> Tensor:
    """Correlation coefficients (K,) of two batches of images where `inside` is 1; 0 for constant images."""
    weight = inside / inside.sum((1, 2, 3), keepdim=True).clamp_min(1)
    first, second = (image - (image * weight).sum((1, 2, 3), keepdim=True) for image in (first, second))
    products = [(a * b * weight).sum((1, 2, 3)) for a, b in ((first, second), (first, first), (second, second))]
    return products[0] / (products[1] * products[2]).sqrt().clamp_min(1e-8)
