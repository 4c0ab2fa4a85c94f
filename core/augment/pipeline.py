"""`Augment`: augmentation and normalization of a batch of training images.

Geometry is one affine matrix per image. Images are uint8 and sorted by their operation, which works in place on
contiguous memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from core.augment import photometry
from core.augment.cropping import draw_crops
from core.augment.draws import uniform
from core.augment.erasing import draw_erased
from core.augment.geometry import affine, rotation, shift, then, warp
from core.augment.operations import GEOMETRIC_OPS, INTERPOLATED_OPS, PHOTOMETRIC_OPS
from core.augment.policies import Assignment, build_policy
from core.augment.scratch import Scratch, blocks
from core.config import AugmentConfig
from core.runtime import normalize_by, scale_and_shift, spread

# Limits the working memory to 1.5 times this. The same on all machines, since random numbers are drawn per chunk.
_CPU_CHUNK_BYTES = 32 * 2**20


def alternating_flips(first: Tensor, epoch: int) -> Tensor:
    """Return the flipped images of an epoch: those of `first` (n,) bool in odd ones, else the others."""
    return first if epoch % 2 == 1 else ~first


def put_rows(pixels: Tensor, rows: Tensor, values: Tensor) -> None:
    """Assign pixels[rows] = values in place; repeated rows must have equal values."""
    _wide_rows(pixels).index_copy_(0, rows, _wide_rows(values))


def _wide_rows(images: Tensor) -> Tensor:
    """View of images (n, C, H, W) uint8 as wide elements, which a CPU copies sixteen times as fast."""
    rows = images.view(len(images), -1)
    return rows.view(torch.complex128) if rows.shape[1] % 16 == 0 else rows


def _inverse(order: Tensor) -> Tensor:
    return order.argsort()


class Augment:
    """Turns uint8 training images into augmented, normalized network input. Can be captured in a CUDA graph.

    `mean` and `std` are those of pixels in [0, 1] per channel. Results are rounded once from float32 to `dtype`.
    """

    def __init__(
        self,
        config: AugmentConfig,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.dtype = dtype
        # CUDA graphs read them.
        self._scale, self._shift = scale_and_shift(mean, std, device)
        self._policy = build_policy(config, device)
        self._scratch = Scratch()
        self._moves = bool(
            config.flip
            or config.vertical_flip
            or config.crop_pad_fraction
            or config.crop_area_min < 1
            or config.rotation_degrees
            or self._policy.ops
        )

    def __call__(
        self,
        images: Tensor,
        generator: torch.Generator,
        *,
        flips: Tensor | None = None,
        repeats: Tensor | None = None,
    ) -> Tensor:
        """Augment and normalize images: (N, C, H, W) uint8 to `dtype`, channels_last.

        The order is padded crop, crop by area, flips, rotation, the policy's geometry, colour jitter, the policy's
        photometry, erasing.

        `alternate_flip` needs `flips` (N,) bool, and `apply_to: repeats` needs `repeats` (N,) bool.
        """
        config = self.config
        if config.alternate_flip and flips is None:
            raise ValueError("augment.alternate_flip is true: give `flips`, the images that are flipped this time")
        if config.apply_to == "repeats" and repeats is None:
            raise ValueError("augment.apply_to is repeats: give `repeats`, the visits that are not an image's first")
        if not (self._moves or config.color_jitter or config.erase):
            return self._normalize(images)
        augmented = self._augment(images, flips if config.alternate_flip else None, generator)
        if config.apply_to == "all" or repeats is None:
            return augmented
        # First visits are augmented too, since only the device knows their number.
        chosen = torch.where(repeats.view(-1, 1, 1, 1), augmented, self._normalize(images))
        return chosen.contiguous(memory_format=torch.channels_last)

    def _augment(self, images: Tensor, flips: Tensor | None, generator: torch.Generator) -> Tensor:
        out = torch.empty(images.shape, dtype=self.dtype, device=images.device, memory_format=torch.channels_last)
        chunk = self._chunk(images)
        # Saves 5 % of a CPU's time; the backward pass needs `out` from outside of it.
        with torch.inference_mode():
            erased = draw_erased(images.shape, self.config.erase, generator) if self.config.erase else None
            for start in range(0, len(images), chunk):
                part = slice(start, start + chunk)
                its_flips = None if flips is None else flips[part]
                pixels, places = self._change(images[part].contiguous(), its_flips, generator)
                shown = None if erased is None else (erased[0][part, None, :, None], erased[1][part, None, None])
                self._finish(pixels, places, shown, out[part])
        return out

    def _finish(self, pixels: Tensor, places: Tensor, shown: tuple[Tensor, Tensor] | None, out: Tensor) -> None:
        """Write pixels[places], normalized, to `out`, and 0 where row and column of `shown` are 0."""
        sizes = blocks(len(out), out)
        scale, shift = (spread(c, out.shape, torch.contiguous_format) for c in (self._scale, self._shift))
        room = self._scratch.zeroed_once("normalised", (sizes[0], *out.shape[1:]), self._scale)
        masks = (
            [()] * len(sizes)
            if shown is None
            else list(zip(*(torch.split(lines, sizes) for lines in shown), strict=True))
        )
        for part, mask, there in zip(torch.split(places, sizes), masks, torch.split(out, sizes), strict=True):
            values = room[: len(part)].copy_(pixels.index_select(0, part))
            torch.addcmul(shift, values, scale, out=values)
            if mask:
                values.mul_(torch.maximum(*mask))
            there.copy_(values)

    def _normalize(self, images: Tensor) -> Tensor:
        return normalize_by(images, self._scale, self._shift).to(self.dtype)

    def _chunk(self, images: Tensor) -> int:
        if images.device.type != "cpu":
            return len(images)
        chunks = math.ceil(4 * images.numel() / _CPU_CHUNK_BYTES)
        return self._slots(math.ceil(len(images) / max(chunks, 1)))

    def _slots(self, count: int) -> int:
        """`count` padded to a multiple of the policy's choices."""
        choices = self._policy.choices
        return math.ceil(count / choices) * choices

    def _change(self, images: Tensor, flips: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return padded uint8 images before erasing, and the places (n,) of the n images in them."""
        assignments = self._policy.assign(self._slots(len(images)), generator)
        pixels = self._move(images, assignments, flips, generator) if self._moves else images
        if self.config.color_jitter:
            pixels = self._jitter(pixels, assignments, generator)
        places = torch.arange(len(images), device=images.device)
        for k, assignment in enumerate(assignments):
            if k > 0:
                pixels = pixels.index_select(0, places.index_select(0, assignment.order))
            self._recolour(pixels, assignment)
            places = _inverse(assignment.order)
        return pixels, places[: len(images)]

    def _recolour(self, pixels: Tensor, assignment: Assignment) -> None:
        parts = [(name, size) for name, rows in assignment.rows.items() for size in blocks(len(rows), pixels)]
        sizes = [size for _, size in parts]
        levels = assignment.levels.index_select(0, assignment.order)
        for (name, _), block, its_levels in zip(
            parts, torch.split(pixels, sizes), torch.split(levels, sizes), strict=True
        ):
            if name in PHOTOMETRIC_OPS:
                block.copy_(PHOTOMETRIC_OPS[name](block, its_levels, self._policy.ranges))

    def _move(
        self, images: Tensor, assignments: list[Assignment], flips: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        """Return padded images (slots, C, H, W) uint8 in the order of the first assignment."""
        config = self.config
        count, _, height, width = images.shape
        slots = len(assignments[0].levels) if assignments else count
        sources = torch.arange(slots, device=images.device).clamp_(max=count - 1)
        pad_y, pad_x = (int(config.crop_pad_fraction * side + 0.5) for side in (height, width))
        matrices = affine(self._scale.new_empty(slots))
        if pad_x or pad_y:
            x = uniform(slots, generator, 0, 2 * pad_x + 1).floor_() - pad_x
            y = uniform(slots, generator, 0, 2 * pad_y + 1).floor_() - pad_y
            matrices = affine(x, x=x, y=y)
        frames = None
        if config.crop_area_min < 1:
            crops = draw_crops(slots, (height, width), config.crop_area_min, generator)
            frames = crops.frames((height, width)) + matrices[:, :, 2:]
            matrices = then(matrices, crops.matrices((height, width)))
        if config.flip or config.vertical_flip:
            across = uniform(slots, generator, 0, 1) < config.flip if flips is None else flips.index_select(0, sources)
            down = uniform(slots, generator, 0, 1) < config.vertical_flip
            x, y = 1 - 2 * across.float(), 1 - 2 * down.float()
            matrices = then(matrices, affine(x, a=x, d=y))
        if config.rotation_degrees:
            degrees = uniform(slots, generator, -config.rotation_degrees, config.rotation_degrees)
            matrices = then(matrices, rotation(degrees))
        for assignment in assignments:
            matrices = then(matrices, self._step(assignment, (height, width)))
        if assignments:
            order = assignments[0].order
            sources, matrices = sources.index_select(0, order), matrices.index_select(0, order)
            frames = None if frames is None else frames.index_select(0, order)

        if config.rotation_degrees or frames is not None:
            return warp(images.index_select(0, sources), matrices, frames, dtype=torch.uint8, scratch=self._scratch)
        reach = pad_x + self._policy.reach(width)
        pixels = shift(images, sources, matrices, reach=reach, mirrored=config.flip > 0, scratch=self._scratch)
        # Images interpolated by two assignments are written twice, with equal values.
        interpolated = [
            assignment.rows[name] for assignment in assignments for name in INTERPOLATED_OPS if name in assignment.rows
        ]
        if interpolated:
            places = _inverse(assignments[0].order).index_select(0, torch.cat(interpolated))
            seen = images.index_select(0, sources.index_select(0, places))
            seen = warp(seen, matrices.index_select(0, places), dtype=torch.uint8, scratch=self._scratch)
            put_rows(pixels, places, seen)
        return pixels

    def _step(self, assignment: Assignment, size: tuple[int, int]) -> Tensor:
        step = affine(assignment.levels)
        for name, operation in GEOMETRIC_OPS.items():
            if name in assignment.rows:
                step.index_copy_(
                    0, assignment.rows[name], operation(assignment.level_of(name), size, self._policy.ranges)
                )
        return step

    def _jitter(self, pixels: Tensor, assignments: list[Assignment], generator: torch.Generator) -> Tensor:
        low, high = 1 - self.config.color_jitter, 1 + self.config.color_jitter
        factors = uniform((3, len(pixels)), generator, low, high)
        if assignments:
            factors = factors.index_select(1, assignments[0].order)
        jittered = torch.empty_like(pixels)
        sizes = blocks(len(pixels), pixels)
        for block, its_factors, its_jittered in zip(
            torch.split(pixels, sizes), torch.split(factors, sizes, dim=1), torch.split(jittered, sizes), strict=True
        ):
            values = photometry.brightness(block.float(), its_factors[0])
            values = photometry.contrast(values, its_factors[1])
            values = photometry.saturation(values, its_factors[2])
            its_jittered.copy_(photometry.whole(values, pixels.dtype))
        return jittered
