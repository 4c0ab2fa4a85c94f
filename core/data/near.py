"""Near-duplicate images: re-encoded, resized, slightly cropped or shifted copies, and frames of one scene.

Low frequencies of each image, and of five crops of it, select candidate pairs, as a perceptual hash does, but compared
by correlation. The images of a pair are then aligned by scale and shift (Lucas and Kanade 1981, coarse to fine, in the
inverse form of Baker and Matthews 2004), and are near-duplicates if their fine detail correlates.

The result is part of a data set's fingerprint: rounding must not decide differently on another machine or with another
number of threads. Candidates are therefore selected in exact arithmetic, and aligned in float64.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from core.data.decode import Pixels

logger = logging.getLogger(__name__)

MIN_SIDE = 32
"""Smaller images have too few pixels to tell a copy from a similar image."""

SIDE = 48
"""Side to which images are reduced for the comparison."""

CROP = 0.94
"""Side of the five crops that are compared with other images as a whole, as a fraction of the image."""

CANDIDATE = 0.93
"""Minimum correlation of the low frequencies of a candidate pair."""

LEVELS = ((16, 2, 0.7), (24, 2, 0.8), (48, 4, 0.8))
"""Side, iterations, and minimum correlation of fine detail after them, of each level of the alignment."""

MAX_SHIFT = 0.15
"""Maximum change of scale and shift, relative to the image side and half of it."""

PAIRS_PER_IMAGE = 100
"""Pairs that are aligned, the most similar first, as a mean over `_ROWS` images. 8,000 photographs have at most 70."""

LARGE = 100_000
"""Images whose comparison takes minutes, which is announced."""

_ROWS, _COLUMNS = 512, 2048  # images compared with images at once, in the processor's cache
_AT_ONCE = 1 << 14  # pairs of views multiplied at once
_PIXELS = 1 << 17  # of images transformed or aligned at once

_MARGIN = 1 - CROP
_CORNERS = [(x, y, CROP) for x in (0.0, _MARGIN) for y in (0.0, _MARGIN)]
_VIEWS = [(0.0, 0.0, 1.0), (_MARGIN / 2, _MARGIN / 2, CROP), *_CORNERS]  # left, top, side
_COMPARED = [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (2, 5), (3, 4)]  # the whole with all, opposite corners

_FREQUENCIES = 8  # in each direction
_BY_FREQUENCY = np.argsort(np.hypot(*np.mgrid[:_FREQUENCIES, :_FREQUENCIES]).ravel(), kind="stable")[1:]
_FIRST = 24  # frequencies by which most pairs are excluded
_STEP = 2.0**-12  # sums of products of its multiples are exact in float32 up to 1, in any order


def reduced(images: Iterable[Pixels], count: int) -> Tensor:
    """Return images (C, H, W) uint8 as grey (N, 48, 48) uint8; empty if a side is below `MIN_SIDE`."""
    small = torch.empty((count, SIDE, SIDE), dtype=torch.uint8)
    for index, pixels in enumerate(images):
        if min(pixels.shape[1:]) < MIN_SIDE:
            return small[:0]
        total = torch.from_numpy(pixels.sum(axis=0, dtype=np.float32))
        mean = F.interpolate(total[None, None], size=(SIDE, SIDE), mode="area")[0, 0] / len(pixels)
        small[index] = mean.round().byte()
    return small


def near_duplicates(small: Tensor, on_progress: Callable[[int, int], None] | None = None) -> NDArray[np.int64]:
    """Find pairs of near-duplicates. The time is quadratic in the number of images.

    Args:
        small: (N, 48, 48) uint8, from `reduced`.
        on_progress: called now and then with the number of images, of all, that are compared with all others.

    Returns:
        (K, 2) pairs of indices, the smaller first, in order.
    """
    count = len(small)
    if count > LARGE:
        logger.info(
            "comparing %s images for near-duplicates, once; this takes minutes, "
            "and --set data.near_duplicates=ignored leaves it out",
            f"{count:,}",
        )
    found = [torch.empty((0, 2), dtype=torch.int64)]
    left_out = 0
    with _one_thread_each() as pool:
        views = _views(small)
        rest = views[..., _FIRST:].norm(dim=2)
        starts = range(0, count, _ROWS)
        for start, (pairs, more) in zip(starts, pool.map(partial(_search, small, views, rest), starts), strict=True):
            found.append(pairs)
            left_out += more
            if on_progress is not None:
                remaining = max(0, count - start - _ROWS)  # images that are not compared with each other yet
                on_progress(count - remaining**2 // count, count)
    if left_out:
        logger.info("near-duplicates: the %s least similar pairs of candidates were not compared", f"{left_out:,}")
    unique: NDArray[np.int64] = np.unique(torch.cat(found).sort(dim=1).values.numpy(), axis=0)
    return unique


@contextmanager
def _one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """Replace torch's threads by a pool: threads that share each operation are many times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # inherited by new threads
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _search(small: Tensor, views: Tensor, rest: Tensor, start: int) -> tuple[Tensor, int]:
    """Near-duplicates (K, 2) among `_ROWS` images and later ones, and the number of candidates that were left out."""
    pairs, moves, left_out = _candidates(views, rest, start)
    return _aligned(small, pairs, moves), left_out


def _views(small: Tensor) -> Tensor:
    """The lowest frequencies but the mean of each of `_VIEWS`, as unit vectors (6, N, 63) of multiples of `_STEP`."""
    views = torch.empty((len(_VIEWS), len(small), len(_BY_FREQUENCY)))
    for part in _parts(len(small), SIDE):
        images = small[part].double()
        for view, (left, top, side) in zip(views, _VIEWS, strict=True):
            spectrum = _cosines(top, side).T @ (images @ _cosines(left, side))
            unit = F.normalize(spectrum.flatten(1)[:, _BY_FREQUENCY], dim=1)
            view[part] = (unit / _STEP).round() * _STEP
    return views


def _cosines(start: float, length: float) -> Tensor:
    """Matrix (48, 8) that takes a line of pixels to the lowest frequencies of a part of it."""
    first, count = round(start * SIDE), round(length * SIDE)
    part = np.eye(SIDE)[:, first : first + count]
    return torch.from_numpy(scipy.fft.dct(part, norm="ortho")[:, :_FREQUENCIES])


def _candidates(views: Tensor, rest: Tensor, start: int) -> tuple[Tensor, Tensor, int]:
    """Pairs (K, 2) of `_ROWS` images and later ones with similar parts, the most similar first.

    Also returns scale and shift (K, 4) from the first's part to the second's, and the number of pairs beyond the limit.
    """
    count = views.shape[1]
    rows = slice(start, min(start + _ROWS, count))
    blocks = [slice(left, min(left + _COLUMNS, count)) for left in range(start, count, _COLUMNS)]
    parts = [_similar(views, rest, rows, columns) for columns in blocks]
    pairs, similarity, which = (torch.cat(part) for part in zip(*parts, strict=True))
    best = similarity.argsort(descending=True, stable=True)[: PAIRS_PER_IMAGE * _ROWS]
    moves = torch.tensor([_move_between(_VIEWS[a], _VIEWS[b]) for a, b in _COMPARED], dtype=torch.float64)
    return pairs[best], moves[which[best]], len(pairs) - len(best)


def _similar(views: Tensor, rest: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (K, 2) of an image and a later one, their similarity, and which of `_COMPARED` has it.

    The first of a pair is the one whose first view is compared. Most pairs are excluded by an upper bound: the product
    of a few frequencies, plus that of the norms of all others.
    """
    bound = torch.empty((rows.stop - rows.start, columns.stop - columns.start))
    best = torch.full_like(bound, -1)
    for first, second in _COMPARED:
        for a, b in ((first, second), (second, first)):
            torch.outer(rest[a, rows], rest[b, columns], out=bound)
            bound.addmm_(views[a, rows, :_FIRST], views[b, columns, :_FIRST].T)
            torch.maximum(best, bound, out=best)
    place = np.flatnonzero(best.numpy() >= CANDIDATE - 1e-4)  # more than the rounding of the bound
    row, column = torch.from_numpy(np.stack(np.divmod(place, best.shape[1])))
    pairs = torch.stack([row + rows.start, column + columns.start], dim=1)
    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    similarity, which = (
        torch.cat(part) for part in zip(*(_best(views, part) for part in torch.split(pairs, _AT_ONCE)), strict=True)
    )
    pairs = torch.where(which[:, None] % 2 == 0, pairs, pairs.flip(1))
    similar = similarity >= CANDIDATE
    return pairs[similar], similarity[similar], which[similar] // 2


def _best(views: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The best correlation (K,) of views of a pair, and twice its place in `_COMPARED`, plus 1 if they are swapped."""
    here, there = pairs.unbind(1)
    products = [
        (views[first, a] * views[second, b]).sum(dim=1)
        for first, second in _COMPARED
        for a, b in ((here, there), (there, here))
    ]
    best, which = torch.stack(products).max(dim=0)
    return best, which


def _move_between(first: tuple[float, float, float], second: tuple[float, float, float]) -> tuple[float, ...]:
    """Scale and shift of coordinates in [-1, 1] that take one crop (left, top, side) to another."""
    scale = second[2] / first[2]
    centers = [[2 * corner + crop[2] - 1 for corner in crop[:2]] for crop in (first, second)]
    return (scale - 1, scale - 1, *(there - scale * here for here, there in zip(*centers, strict=True)))


def _aligned(small: Tensor, pairs: Tensor, moves: Tensor) -> Tensor:
    """The pairs whose fine detail correlates when they are aligned, starting from `moves`."""
    for side, iterations, least in LEVELS:
        kept = torch.empty(len(pairs), dtype=torch.bool)
        for part in _parts(len(pairs), side):
            first, second = (_resized(small[chosen], side) for chosen in pairs[part].unbind(1))
            moves[part] = _align(first, second, moves[part], iterations)
            moved, inside = _move(second, moves[part])
            kept[part] = _correlation(_detail(first), _detail(moved), inside) >= least
        pairs, moves = pairs[kept], moves[kept]
    return pairs


def _parts(count: int, side: int) -> Iterator[slice]:
    """Divide a number of images into parts of about `_PIXELS`."""
    step = _PIXELS // side**2
    return (slice(start, start + step) for start in range(0, count, step))


def _resized(small: Tensor, side: int) -> Tensor:
    """Images as (N, 1, side, side) float64 in [0, 1]."""
    return F.avg_pool2d(small[:, None].float(), SIDE // side).double() / 255


def _align(fixed: Tensor, moving: Tensor, moves: Tensor, iterations: int) -> Tensor:
    """Improve scale and shift (K, 4) by Gauss-Newton steps, together with gain and offset of the brightness.

    The steps move the fixed image, whose Jacobian stays the same, and their inverse is applied to the moving one.
    """
    count, _, side, _ = fixed.shape
    x, y = _grid(side)
    slope_y, slope_x = torch.gradient(fixed, spacing=2 / side, dim=(2, 3))
    rows = [slope_x * x, slope_y * y, slope_x, slope_y, fixed, torch.ones_like(fixed)]
    jacobian = torch.cat(rows, dim=1).flatten(2)  # (K, 6, side²)
    inverse = torch.linalg.inv(jacobian @ jacobian.mT + 1e-3 * torch.eye(6, dtype=torch.float64))
    for _ in range(iterations):
        moved, inside = _move(moving, moves)
        error = ((moved - fixed) * inside).view(count, -1, 1)
        scale, shift = (inverse @ (jacobian @ error))[:, :4, 0].split(2, dim=1)
        ratio = (1 + moves[:, :2]) / (1 + scale)
        moves = torch.cat([ratio - 1, moves[:, 2:] - ratio * shift], dim=1).clamp(-MAX_SHIFT, MAX_SHIFT)
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
    line = F.pad(torch.eye(images.shape[-1], dtype=torch.float64)[None], (4, 4), mode="reflect")
    means = F.avg_pool1d(line, 9, stride=1)[0]  # of a line of pixels, as a matrix: several times faster than in 2D
    return images - means.T @ (images @ means)


def _correlation(first: Tensor, second: Tensor, inside: Tensor) -> Tensor:
    """Correlation coefficients (K,) of two batches of images where `inside` is 1; 0 for constant images."""
    weight = inside / inside.sum((1, 2, 3), keepdim=True).clamp_min(1)
    first, second = (image - (image * weight).sum((1, 2, 3), keepdim=True) for image in (first, second))
    products = [(a * b * weight).sum((1, 2, 3)) for a, b in ((first, second), (first, first), (second, second))]
    return products[0] / (products[1] * products[2]).sqrt().clamp_min(1e-8)
