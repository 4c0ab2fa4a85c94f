"""`Augment`: everything that happens to a batch of training images between the data set and the network.

Geometry is composed into one affine matrix an image, so that pixels are read once. Between the operations pixels are
uint8, a quarter of float32's memory to move about; within one they are float32 where it needs fractions, and are
rounded as torchvision does. For each round of a policy the images lie in the order of their operations, so that an
operation works on one piece of memory, in place.
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
from core.augment.policies import Round, build_policy
from core.augment.scratch import Scratch, blocks
from core.config import AugmentConfig
from core.runtime import normalize_by, scale_and_shift, spread

# What a CPU's chunk would take as float32: it bounds the working memory, which is a half more. Draws are a chunk's, so
# it is one number everywhere.
_CPU_CHUNK_BYTES = 32 * 2**20


def alternating_flips(first: Tensor, epoch: int) -> Tensor:
    """Which images are flipped in an epoch, (n,) bool, so that two epochs show every image both ways.

    `first` (n,) bool, drawn once a run, says which are flipped in the first epoch. Epochs count from 1: odd ones are
    flipped like the first, even ones the other way round (Jordan 2024, arXiv 2404.00498).
    """
    return first if epoch % 2 == 1 else ~first


def put_rows(pixels: Tensor, rows: Tensor, values: Tensor) -> None:
    """pixels[rows] = values, in place; (…, C, H, W) contiguous, and rows that occur twice have equal values."""
    _wide_rows(pixels).index_copy_(0, rows, _wide_rows(values))


def _wide_rows(images: Tensor) -> Tensor:
    """The memory of images (n, C, H, W) uint8, contiguous, as a row of few wide elements each.

    A CPU moves one element at a time: the widest that there is makes it sixteen times as fast.
    """
    rows = images.view(len(images), -1)
    return rows.view(torch.complex128) if rows.shape[1] % 16 == 0 else rows


def _inverse(order: Tensor) -> Tensor:
    """The place of each number in a permutation (n,) int64."""
    return order.argsort()


class Augment:
    """Turns uint8 training images into augmented, normalised network input.

    `mean` and `std` are of pixels in [0, 1], one a channel; one or three channels. `dtype` is that of the result, which
    is computed in float32 and rounded once. All random numbers come from the generators that are passed in: the same
    state gives the same bits. Nothing waits for the device, and a call can be captured in a CUDA graph.
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
        # Held: a CUDA graph reads them where they lie.
        self._scale, self._shift = scale_and_shift(mean, std, device)
        self._policy = build_policy(config, device)
        self._scratch = Scratch()
        self._moves = bool(
            config.flip
            or config.vertical_flip
            or config.crop_pad_fraction
            or config.crop_area_min < 1
            or config.rotation_degrees
            or self._policy.rounds
        )

    def __call__(
        self,
        images: Tensor,
        generator: torch.Generator,
        *,
        flips: Tensor | None = None,
        repeats: Tensor | None = None,
    ) -> Tensor:
        """Images (N, C, H, W) uint8 to `dtype` (N, C, H, W) channels_last, each augmented on its own, normalised.

        The order is padded crop, crop by area, flips, rotation, the policy's geometry, colour jitter, the policy's
        photometry, erasing.

        Args:
            images: (N, C, H, W) uint8.
            generator: the device's.
            flips: (N,) bool, the images that are flipped sideways this time; read where `alternate_flip` is true, in
                place of a draw.
            repeats: (N,) bool, the visits that are an image's second or later one in the epoch; read where `apply_to`
                is "repeats": the others are only normalised.

        Raises:
            ValueError: the configuration reads `flips` or `repeats`, and it is not given.
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
        # First visits are augmented too, and dropped: how many there are, only the device knows.
        chosen = torch.where(repeats.view(-1, 1, 1, 1), augmented, self._normalize(images))
        return chosen.contiguous(memory_format=torch.channels_last)

    # --- the passes --------------------------------------------------------------------------------------------------

    def _augment(self, images: Tensor, flips: Tensor | None, generator: torch.Generator) -> Tensor:
        """Every image augmented and normalised, chunk by chunk: uint8 to `dtype` (N, C, H, W) channels_last."""
        out = torch.empty(images.shape, dtype=self.dtype, device=images.device, memory_format=torch.channels_last)
        chunk = self._chunk(images)
        # A twentieth of a CPU's time is autograd's look at each operation. `out` is made outside, as a network keeps
        # its input for the backward pass.
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
        """Writes pixels[places], normalised, to `out` (n, C, H, W), and 0 where neither of `shown` is 1.

        `shown` are rows (n, 1, H, 1) and columns (n, 1, 1, W).
        """
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
        """(N, C, H, W) uint8 to `dtype` channels_last."""
        return normalize_by(images, self._scale, self._shift).to(self.dtype)

    def _chunk(self, images: Tensor) -> int:
        """How many images are worked on at a time: all on a GPU, and on a CPU what its memory is to bear."""
        if images.device.type != "cpu":
            return len(images)
        chunks = math.ceil(4 * images.numel() / _CPU_CHUNK_BYTES)
        return self._slots(math.ceil(len(images) / max(chunks, 1)))

    def _slots(self, count: int) -> int:
        """The images that `count` are padded to, so that each card has an equal hand of them."""
        cards = self._policy.cards
        return math.ceil(count / cards) * cards

    def _change(self, images: Tensor, flips: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """All but erasing and normalising: (n, C, H, W) uint8 to more of them, and the places (n,) of the n in it."""
        # The images past the last are worked on and dropped.
        rounds = self._policy.deal(self._slots(len(images)), generator)
        pixels = self._move(images, rounds, flips, generator) if self._moves else images
        if self.config.color_jitter:
            pixels = self._jitter(pixels, rounds, generator)
        places = torch.arange(len(images), device=images.device)
        for k, one in enumerate(rounds):
            if k > 0:
                pixels = pixels.index_select(0, places.index_select(0, one.order))
            self._recolour(pixels, one)
            places = _inverse(one.order)
        return pixels, places[: len(images)]

    def _recolour(self, pixels: Tensor, one: Round) -> None:
        """A round's photometry, in place, of pixels in its order."""
        parts = [(name, size) for name, rows in one.rows.items() for size in blocks(len(rows), pixels)]
        sizes = [size for _, size in parts]
        levels = one.levels.index_select(0, one.order)
        for (name, _), block, its_levels in zip(
            parts, torch.split(pixels, sizes), torch.split(levels, sizes), strict=True
        ):
            if name in PHOTOMETRIC_OPS:
                block.copy_(PHOTOMETRIC_OPS[name](block, its_levels, self._policy.ranges))

    def _move(self, images: Tensor, rounds: list[Round], flips: Tensor | None, generator: torch.Generator) -> Tensor:
        """The geometric pass: (n, C, H, W) uint8, as many as the rounds have, in the order of the first round."""
        config = self.config
        count, _, height, width = images.shape
        slots = len(rounds[0].levels) if rounds else count
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
        for one in rounds:
            matrices = then(matrices, self._step(one, (height, width)))
        if rounds:
            order = rounds[0].order
            sources, matrices = sources.index_select(0, order), matrices.index_select(0, order)
            frames = None if frames is None else frames.index_select(0, order)

        if config.rotation_degrees or frames is not None:
            return warp(images.index_select(0, sources), matrices, frames, dtype=torch.uint8, scratch=self._scratch)
        reach = pad_x + self._policy.reach(width)
        pixels = shift(images, sources, matrices, reach=reach, mirrored=config.flip > 0, scratch=self._scratch)
        # An image that two rounds interpolate is listed, and written, twice, with the same values.
        interpolated = [one.rows[name] for one in rounds for name in INTERPOLATED_OPS if name in one.rows]
        if interpolated:
            places = _inverse(rounds[0].order).index_select(0, torch.cat(interpolated))
            seen = images.index_select(0, sources.index_select(0, places))
            seen = warp(seen, matrices.index_select(0, places), dtype=torch.uint8, scratch=self._scratch)
            put_rows(pixels, places, seen)
        return pixels

    def _step(self, one: Round, size: tuple[int, int]) -> Tensor:
        """The geometry of one round: (slots, 2, 3)."""
        step = affine(one.levels)
        for name, operation in GEOMETRIC_OPS.items():
            if name in one.rows:
                step.index_copy_(0, one.rows[name], operation(one.level_of(name), size, self._policy.ranges))
        return step

    def _jitter(self, pixels: Tensor, rounds: list[Round], generator: torch.Generator) -> Tensor:
        """Colour jitter of every image, in torchvision's listed order: brightness, contrast, saturation."""
        low, high = 1 - self.config.color_jitter, 1 + self.config.color_jitter
        factors = uniform((3, len(pixels)), generator, low, high)
        if rounds:
            factors = factors.index_select(1, rounds[0].order)
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
