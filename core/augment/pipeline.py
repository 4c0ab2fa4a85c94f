"""`Augment`: augmentation and normalization of training images.

Geometry is one affine matrix per image. Images are uint8 and sorted by their operation, which works in place on
contiguous memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from core.augment import photometry
from core.augment.cropping import draw_crops, padding
from core.augment.draws import runs, uniform
from core.augment.erasing import Erased, draw_erased
from core.augment.geometry import affine, rotation, shift, then, warp, zoom_and_shear
from core.augment.operations import GEOMETRIC_OPS, INTERPOLATED_OPS, PHOTOMETRIC_OPS
from core.augment.policies import Assignment, build_policy
from core.augment.scratch import Scratch, blocks
from core.config import AugmentConfig
from core.runtime import normalize_by, scale_and_shift, spread

# Images that are augmented at once. At batch 64 the launches of augmentation are then below 8 % of a step's.
_FEWEST_IMAGES = 2048
# Of these as float32 on a GPU, which needs about three times as much meanwhile.
_GPU_BYTES = 256 * 2**20
# Float32 images that a CPU changes at once; the working memory is up to 1.5 times this. The same on all machines, since
# a larger batch is divided into units.
_CPU_PASS_BYTES = 32 * 2**20


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


@dataclass(frozen=True)
class Draws:
    """All random numbers that augment a sequence of images, in units whose operations are assigned evenly.

    A unit of n images has slots for a multiple of the policy's choices; the last image fills those that are left over.
    """

    units: tuple[int, ...]
    """Images per unit."""
    slots: tuple[int, ...]
    """Slots per unit."""
    assignments: tuple[Assignment, ...] = ()
    matrices: Tensor | None = None
    """(slots, 2, 3): the geometry of all operations together. None moves nothing."""
    frames: Tensor | None = None
    """(slots, 2, 2): crops by area, see `geometry.warp`."""
    factors: Tensor | None = None
    """(slots, 3): of brightness, contrast and saturation."""
    erased: Erased | None = None
    """Of the images."""
    repeats: Tensor | None = None
    """(n,) bool: the images that are augmented. None is all."""

    def of_units(self, first: int, end: int) -> Draws:
        """Return the draws of the units from `first` to before `end`."""
        images = slice(sum(self.units[:first]), sum(self.units[:end]))
        slots = slice(sum(self.slots[:first]), sum(self.slots[:end]))
        matrices, frames, factors = (
            None if each is None else each[slots] for each in (self.matrices, self.frames, self.factors)
        )
        return Draws(
            self.units[first:end],
            self.slots[first:end],
            tuple(assignment.of_units(first, end) for assignment in self.assignments),
            matrices,
            frames,
            factors,
            None if self.erased is None else Erased(*(each[images] for each in self.erased)),
            None if self.repeats is None else self.repeats[images],
        )

    def sources(self, device: torch.device) -> Tensor:
        """Return the image of each slot: (slots,) int64."""
        parts, start = [], 0
        for (images, slots), count in runs(list(zip(self.units, self.slots, strict=True))):
            firsts = torch.arange(start, start + count * images, images, device=device)
            parts.append((firsts[:, None] + torch.arange(slots, device=device).clamp_(max=images - 1)).flatten())
            start += count * images
        return torch.cat(parts)

    def places(self, device: torch.device) -> Tensor:
        """Return the slot of each image: (n,) int64."""
        parts, start = [], 0
        for (images, slots), count in runs(list(zip(self.units, self.slots, strict=True))):
            firsts = torch.arange(start, start + count * slots, slots, device=device)
            parts.append((firsts[:, None] + torch.arange(images, device=device)).flatten())
            start += count * slots
        return torch.cat(parts)


@dataclass(frozen=True)
class DrawnBatches:
    """The random numbers of consecutive batches."""

    draws: Draws
    firsts: tuple[int, ...]
    """First unit of each batch, then the number of units."""

    def __getitem__(self, batches: int | slice) -> Draws:
        """Return the draws of a batch, or of consecutive batches."""
        chosen = range(len(self.firsts) - 1)[batches]
        first, end = (chosen, chosen + 1) if isinstance(chosen, int) else (chosen.start, chosen.stop)
        return self.draws.of_units(self.firsts[first], self.firsts[end])


class Augment:
    """Turns uint8 training images into augmented, normalized network input.

    `mean` and `std` are those of pixels in [0, 1] per channel. Results are rounded once from float32 to `dtype`. The
    random numbers of many batches are drawn together (`draw`), and the batches augmented in any division (`apply`).
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
        self.device = device
        self._scale, self._shift = scale_and_shift(mean, std, device)
        self._policy = build_policy(config, device)
        self._scratch = Scratch()
        self._moves = bool(
            config.flip
            or config.vertical_flip
            or config.crop_pad_fraction
            or config.crop_area_min < 1
            or config.rotation_degrees
            or config.scale
            or config.shear_degrees
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
        """Draw for a single batch, and augment it; see `draw` and `apply`."""
        draws = self.draw([len(images)], images.shape[1:], generator, flips=flips, repeats=repeats)
        return self.apply(images, draws[0])

    def batches_at_once(self, batch: int, image: Sequence[int]) -> int:
        """Return how many batches of images (C, H, W) to augment together: of 2,048 images, if they fit the memory."""
        most = (_CPU_PASS_BYTES if self.device.type == "cpu" else _GPU_BYTES) // (4 * math.prod(image))
        return max(min(math.ceil(_FEWEST_IMAGES / batch), most // batch), 1)

    @torch.inference_mode()
    def draw(
        self,
        batches: Sequence[int],
        image: Sequence[int],
        generator: torch.Generator,
        *,
        flips: Tensor | None = None,
        repeats: Tensor | None = None,
    ) -> DrawnBatches:
        """Draw the random numbers of batches.

        Args:
            batches: images per batch.
            image: channels, height and width of an image.
            generator: the device's.
            flips: (n,) bool, the flipped images of all batches; `alternate_flip` needs them.
            repeats: (n,) bool, the images that are not shown for the first time; `apply_to: repeats` needs them.
        """
        config = self.config
        if config.alternate_flip and flips is None:
            raise ValueError("augment.alternate_flip is true: give `flips`, the images that are flipped this time")
        if config.apply_to == "repeats" and repeats is None:
            raise ValueError("augment.apply_to is repeats: give `repeats`, the visits that are not an image's first")
        units = [self._units(batch, image) for batch in batches]
        flat = tuple(unit for batch in units for unit in batch)
        draws = Draws(flat, tuple(map(self._slots, flat)), repeats=repeats if config.apply_to == "repeats" else None)
        size = (image[1], image[2])
        if config.erase:
            draws = replace(draws, erased=draw_erased(sum(flat), size, config.erase, generator))
        draws = replace(draws, assignments=tuple(self._policy.assign(draws.slots, generator)))
        if self._moves:
            draws = self._draw_moves(draws, size, generator, flips if config.alternate_flip else None)
        if config.color_jitter:
            low, high = 1 - config.color_jitter, 1 + config.color_jitter
            factors = uniform((3, sum(draws.slots)), generator, low, high).T
            draws = replace(draws, factors=factors)
        return DrawnBatches(draws, tuple(accumulate(map(len, units), initial=0)))

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Augment and normalize images: (N, C, H, W) uint8 to `dtype`, channels_last.

        The order is padded crop, crop by area, flips, zoom, shear, rotation, the policy's geometry, colour jitter,
        the policy's photometry, erasing.
        """
        if not (self._moves or self.config.color_jitter or self.config.erase):
            return self._normalize(images)
        out = torch.empty(images.shape, dtype=self.dtype, device=images.device, memory_format=torch.channels_last)
        # Saves 5 % of a CPU's time; the backward pass needs `out` from outside of it.
        with torch.inference_mode():
            start = 0
            for part in self._passes(draws, images):
                seen = slice(start, start + sum(part.units))
                pixels, places = self._change(images[seen].contiguous(), part)
                shown = None
                if part.erased is not None:
                    rows, columns = part.erased.lines((images.shape[2], images.shape[3]))
                    shown = (rows[:, None, :, None], columns[:, None, None])
                self._finish(pixels, places, shown, out[seen])
                start = seen.stop
        if draws.repeats is None:
            return out
        # First visits are augmented too, since only the device knows their number.
        chosen = torch.where(draws.repeats.view(-1, 1, 1, 1), out, self._normalize(images))
        return chosen.contiguous(memory_format=torch.channels_last)

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

    def _units(self, count: int, image: Sequence[int]) -> list[int]:
        """Divide a batch, on a CPU if it is too large for one pass."""
        size = count
        if self.device.type == "cpu":
            parts = math.ceil(4 * count * math.prod(image) / _CPU_PASS_BYTES)
            size = self._slots(math.ceil(count / max(parts, 1)))
        return [min(size, count - start) for start in range(0, count, size)]

    def _slots(self, count: int) -> int:
        """`count` padded to a multiple of the policy's choices."""
        choices = self._policy.choices if self._policy.ops else 1
        return math.ceil(count / choices) * choices

    def _passes(self, draws: Draws, images: Tensor) -> Iterator[Draws]:
        """Divide the units, on a CPU into as many as fit its passes."""
        if images.device.type != "cpu":
            yield draws
            return
        most = _CPU_PASS_BYTES / (4 * math.prod(images.shape[1:]))
        first, size = 0, 0
        for end, unit in enumerate(draws.units):
            if size and size + unit > most:
                yield draws.of_units(first, end)
                first, size = end, 0
            size += unit
        yield draws.of_units(first, len(draws.units))

    def _change(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return uint8 images of all slots before erasing, and the places (n,) of the n images in them."""
        pixels = images if draws.matrices is None else self._move(images, draws, draws.matrices)
        if draws.factors is not None:
            pixels = self._jitter(pixels, draws, draws.factors)
        places = draws.places(images.device)
        arranged = None
        for assignment in draws.assignments:
            if arranged is not None:
                pixels = pixels.index_select(0, arranged.index_select(0, assignment.order))
            self._recolour(pixels, assignment)
            arranged = _inverse(assignment.order)
        return pixels, places if arranged is None else arranged.index_select(0, places)

    def _recolour(self, pixels: Tensor, assignment: Assignment) -> None:
        parts = [(name, size) for name, rows in assignment.rows.items() for size in blocks(len(rows), pixels)]
        sizes = [size for _, size in parts]
        levels = assignment.levels.index_select(0, assignment.order)
        for (name, _), block, its_levels in zip(
            parts, torch.split(pixels, sizes), torch.split(levels, sizes), strict=True
        ):
            if name in PHOTOMETRIC_OPS:
                block.copy_(PHOTOMETRIC_OPS[name](block, its_levels, self._policy.ranges))

    def _draw_moves(
        self, draws: Draws, size: tuple[int, int], generator: torch.Generator, flips: Tensor | None
    ) -> Draws:
        config = self.config
        slots = sum(draws.slots)
        matrices = affine(self._scale.new_empty(slots))
        pad_x, pad_y = self._padding(size)
        if pad_x or pad_y:
            x = uniform(slots, generator, 0, 2 * pad_x + 1).floor_() - pad_x
            y = uniform(slots, generator, 0, 2 * pad_y + 1).floor_() - pad_y
            matrices = affine(x, x=x, y=y)
        frames = None
        if config.crop_area_min < 1:
            crops = draw_crops(slots, size, config.crop_area_min, generator)
            frames = crops.frames(size) + matrices[:, :, 2:]
            matrices = then(matrices, crops.matrices(size))
        if config.flip or config.vertical_flip:
            if flips is None:
                across = uniform(slots, generator, 0, 1) < config.flip
            else:
                across = flips.index_select(0, draws.sources(self.device))
            down = uniform(slots, generator, 0, 1) < config.vertical_flip
            x, y = 1 - 2 * across.float(), 1 - 2 * down.float()
            matrices = then(matrices, affine(x, a=x, d=y))
        if config.scale or config.shear_degrees:
            scale = uniform(slots, generator, 1 - config.scale, 1 + config.scale)
            slants = uniform(slots, generator, -config.shear_degrees, config.shear_degrees)
            matrices = then(matrices, zoom_and_shear(scale, slants))
        if config.rotation_degrees:
            degrees = uniform(slots, generator, -config.rotation_degrees, config.rotation_degrees)
            matrices = then(matrices, rotation(degrees))
        for assignment in draws.assignments:
            matrices = then(matrices, self._step(assignment, size))
        return replace(draws, matrices=matrices, frames=frames)

    def _padding(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the pixels added left and right, and above and below."""
        height, width = (padding(self.config, side) for side in size)
        return width, height

    def _move(self, images: Tensor, draws: Draws, matrices: Tensor) -> Tensor:
        """Return the moved images of all slots (slots, C, H, W) uint8, in the order of the first assignment."""
        sources, frames = draws.sources(images.device), draws.frames
        if draws.assignments:
            order = draws.assignments[0].order
            sources, matrices = sources.index_select(0, order), matrices.index_select(0, order)
            frames = None if frames is None else frames.index_select(0, order)

        config = self.config
        if config.rotation_degrees or config.scale or config.shear_degrees or frames is not None:
            return warp(images.index_select(0, sources), matrices, frames, dtype=torch.uint8, scratch=self._scratch)
        height, width = images.shape[2:]
        reach = self._padding((height, width))[0] + self._policy.reach(width)
        mirrored = self.config.flip > 0
        pixels = shift(images, sources, matrices, reach=reach, mirrored=mirrored, scratch=self._scratch)
        # Images interpolated by two assignments are written twice, with equal values.
        interpolated = [
            assignment.rows[name]
            for assignment in draws.assignments
            for name in INTERPOLATED_OPS
            if name in assignment.rows
        ]
        if interpolated:
            places = _inverse(draws.assignments[0].order).index_select(0, torch.cat(interpolated))
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

    def _jitter(self, pixels: Tensor, draws: Draws, factors: Tensor) -> Tensor:
        if draws.assignments:
            factors = factors.index_select(0, draws.assignments[0].order)
        jittered = torch.empty_like(pixels)
        sizes = blocks(len(pixels), pixels)
        for block, its_factors, its_jittered in zip(
            torch.split(pixels, sizes), torch.split(factors, sizes), torch.split(jittered, sizes), strict=True
        ):
            values = photometry.brightness(block.float(), its_factors[:, 0])
            values = photometry.contrast(values, its_factors[:, 1])
            values = photometry.saturation(values, its_factors[:, 2])
            its_jittered.copy_(photometry.whole(values, pixels.dtype))
        return jittered
