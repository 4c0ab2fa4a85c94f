"""Where pixels go: affine matrices, one an image, and the two ways of looking through them.

A matrix (n, 2, 3) maps places of the output to places of the input, in pixels from the image's centre, so that however
many changes an image gets, its pixels are read once. Flips and whole-pixel shifts are copied, exact to the bit; only
shears and rotations are interpolated. Definitions are those of torchvision's v2 transforms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from core.augment.photometry import whole
from core.augment.scratch import Scratch, blocks


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


def warp(
    images: Tensor,
    matrices: Tensor,
    frames: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    scratch: Scratch | None = None,
) -> Tensor:
    """Images (n, C, H, W) seen through any matrices (n, 2, 3): bilinear, black outside, whole numbers in `dtype`.

    `frames` (n, 2, 2) are the first and last pixel across, then down, from the image's centre, of a part of each image
    that has an edge of its own: what lies up to half a pixel outside their centres, and so within the part's pixels, is
    not mixed with what is beyond, but is those pixels' own colour. So torchvision enlarges a crop. `scratch` holds the
    images in between.
    """
    count, channels, height, width = images.shape
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device) - (height - 1) / 2
    # The images get a black frame of one pixel, beyond which nothing else is seen: so grid_sample needs no masks, a
    # third of its time on a CPU. It counts from -1 to 1 between the frame's edges. (n, 2, 1, W) + (n, 2, H, 1): a
    # hundred times faster on a CPU than affine_grid, whose matrix product has an inner length of 3.
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
                # Beyond the part's last half pixel places move inwards by so much, that nothing is torn apart there.
                places -= (places - torch.clamp(places, low, high)).clamp_(-unit / 2, unit / 2)
        grid = grid.permute(0, 2, 3, 1)
        values = F.grid_sample(room[: len(part)], grid, padding_mode="border", align_corners=False)
        its_seen.copy_(whole(values.round_(), dtype))
    return seen


def shift(images: Tensor, sources: Tensor, matrices: Tensor, *, reach: int, mirrored: bool, scratch: Scratch) -> Tensor:
    """Images (n, C, H, W) uint8 flipped and moved by whole pixels, black outside: (m, C, H, W) uint8, exact.

    Output k shows image `sources[k]` (m,) through `matrices[k]` (m, 2, 3), of which only the signs of the diagonal and
    the whole-pixel shift are read. `reach` is the farthest sideways shift in pixels that the matrices hold, and
    `mirrored` whether any of them flips sideways. `scratch` holds the images in between.
    """
    count, channels, height, width = images.shape
    reach = min(reach, width)
    # Rows lie one after the other with `reach` black pixels between, and once more mirrored. So a shifted row is
    # `width` pixels in a line from some start: one copy of memory, where an index a pixel would cost ten times that.
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
    starts = (first[:, :, None] + down[:, None, :]).clamp_(max=end)  # past the end all is black
    return windows.index_select(0, starts.view(-1)).view(-1, channels, height, width)
