"""Affine transformations by a matrix (n, 2, 3) per image, as defined by torchvision's v2 transforms.

A matrix maps output positions to input positions, in pixels from the centre. Flips and whole-pixel shifts are exact
copies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from core.augment.photometry import whole
from core.augment.scratch import Scratch, blocks


def affine(like: Tensor, a: Tensor | float = 1.0, b: Tensor | float = 0.0, x: Tensor | float = 0.0,
           c: Tensor | float = 0.0, d: Tensor | float = 1.0, y: Tensor | float = 0.0) -> Tensor:  # fmt: skip
    """Return [[a, b, x], [c, d, y]] for each element of `like` (n,). Plain numbers must be 0 or 1."""
    constant = {0.0: torch.zeros_like(like), 1.0: torch.ones_like(like)}
    entries = [entry if isinstance(entry, Tensor) else constant[entry] for entry in (a, b, x, c, d, y)]
    return torch.stack(entries, dim=1).view(-1, 2, 3)


def then(first: Tensor, second: Tensor) -> Tensor:
    """Compose matrices: the images of `first`, transformed by `second`."""
    # A matrix product would follow the autocast and TF32 settings and lose whole pixels.
    product = first[:, :, 0:1] * second[:, 0:1, :] + first[:, :, 1:2] * second[:, 1:2, :]
    product[:, :, 2] += first[:, :, 2]
    return product


def rotation(degrees: Tensor) -> Tensor:
    """Rotate counter-clockwise about the centre."""
    angle = torch.deg2rad(degrees)
    cos, sin = angle.cos(), angle.sin()
    return affine(degrees, a=cos, b=-sin, c=sin, d=cos)


def zoom_and_shear(scale: Tensor, degrees: Tensor) -> Tensor:
    """Shear the rows by an angle and enlarge by a factor, about the centre, as torchvision's RandomAffine does."""
    return affine(scale, a=1 / scale, b=torch.deg2rad(degrees).tan() / scale, d=1 / scale)


def shear_x(slope: Tensor, size: tuple[int, int]) -> Tensor:
    """Shear along rows about the top left corner, as in torchvision's RandAugment."""
    return affine(slope, b=slope, x=slope * (size[0] / 2))


def shear_y(slope: Tensor, size: tuple[int, int]) -> Tensor:
    """Shear along columns about the top left corner."""
    return affine(slope, c=slope, y=slope * (size[1] / 2))


def translate_x(pixels: Tensor) -> Tensor:
    """Move right by whole pixels."""
    return affine(pixels, x=-pixels)


def translate_y(pixels: Tensor) -> Tensor:
    """Move down by whole pixels."""
    return affine(pixels, y=-pixels)


def warp(
    images: Tensor,
    matrices: Tensor,
    frames: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    scratch: Scratch | None = None,
) -> Tensor:
    """Transform images (n, C, H, W): bilinear, black outside, rounded to whole numbers.

    `frames` (n, 2, 2) are the first and last pixel across, then down, from the centre, of a part of each image. Within
    half a pixel outside of it, its edge is repeated, as torchvision enlarges crops.
    """
    count, channels, height, width = images.shape
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device) - (height - 1) / 2
    # A black border replaces grid_sample's masks, a third of its time on a CPU. (n, 2, 1, W) + (n, 2, H, 1) is a
    # hundred times as fast there as affine_grid.
    units = (2 / (width + 2), 2 / (height + 2))
    matrices = torch.cat([matrices[:, :1] * units[0], matrices[:, 1:] * units[1]], dim=1)
    across = (matrices[:, :, 0:1] * x).view(count, 2, 1, width)
    down = (matrices[:, :, 1:2] * y + matrices[:, :, 2:3]).view(count, 2, height, 1)
    seen = torch.empty(images.shape, dtype=dtype, device=images.device)
    sizes = blocks(count, images)
    room = (scratch or Scratch()).zeroed_once("framed", (sizes[0], channels, height + 2, width + 2), matrices)
    inner = room[:, :, 1:-1, 1:-1]
    edges = [None] * len(sizes) if frames is None else torch.split(frames, sizes)
    parts = zip(
        torch.split(images, sizes),
        torch.split(across, sizes),
        torch.split(down, sizes),
        edges,
        torch.split(seen, sizes),
        strict=True,
    )
    for part, its_across, its_down, its_edges, its_seen in parts:
        inner[: len(part)].copy_(part)
        grid = its_across + its_down
        if its_edges is not None:
            for axis, unit in enumerate(units):
                places = grid[:, axis]
                low, high = (its_edges[:, axis] * unit).view(-1, 2, 1, 1).unbind(1)
                # At most half a pixel, which keeps the mapping continuous.
                places -= (places - torch.clamp(places, low, high)).clamp_(-unit / 2, unit / 2)
        grid = grid.permute(0, 2, 3, 1)
        values = F.grid_sample(room[: len(part)], grid, padding_mode="border", align_corners=False)
        its_seen.copy_(whole(values.round_(), dtype))
    return seen


def shift(images: Tensor, sources: Tensor, matrices: Tensor, *, reach: int, mirrored: bool, scratch: Scratch) -> Tensor:
    """Flip images[sources] uint8 and move them by whole pixels, exactly, black outside: (m, C, H, W).

    `matrices` (m, 2, 3) move at most `reach` pixels sideways, and flip sideways only if `mirrored`.
    """
    count, channels, height, width = images.shape
    reach = min(reach, width)
    # Rows are stored with `reach` black pixels between them, and again mirrored, so a shifted row is one memory copy:
    # ten times as fast as an index per pixel.
    stride = width + reach
    copies = 2 if mirrored else 1
    padded = scratch.zeroed_once("rows", (copies * count * channels * height + 1, stride), images)
    line, end = padded.view(-1), padded.numel() - stride
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
    first = plane * (height * stride) + (reach + move_x)[:, None]
    down = torch.where((row >= 0) & (row < height), row * stride, end)
    starts = (first[:, :, None] + down[:, None, :]).clamp_(max=end)  # black past the end
    return windows.index_select(0, starts.view(-1)).view(-1, channels, height, width)
