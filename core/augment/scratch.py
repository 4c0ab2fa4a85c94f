"""Reusable memory for a CPU's augmentation, and block sizes that fit its cache.

A CPU's freed blocks of ten megabytes are returned to the system and faulted in again page by page, which took up to a
third of the time. On a GPU torch's allocator caches memory, so every block is newly allocated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Size of the float32 images that a core processes at once, so that they and results stay in its cache.
_CORE_BLOCK_BYTES = 1100 * 2**10


def blocks(count: int, images: Tensor) -> list[int]:
    """Return the sizes of blocks in which `count` images (…, C, H, W) are processed: all at once on a GPU.

    Results do not depend on them.
    """
    if images.device.type != "cpu":
        return [count]
    block_bytes = _CORE_BLOCK_BYTES * torch.get_num_threads()  # threads share a block
    parts = max(math.ceil(4 * count * math.prod(images.shape[-3:]) / block_bytes), 1)
    size = math.ceil(count / parts)
    return [min(size, count - start) for start in range(0, count, size)] if count else [0]


class Scratch:
    """Reusable blocks by name and shape. The content of a block is valid until it is requested again."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def zeroed_once(self, name: str, layout: Sequence[int], like: Tensor) -> Tensor:
        """Return a block with the dtype and device of `like`, zero except for earlier writes."""
        key = (name, tuple(layout))
        if like.device.type != "cpu":
            return like.new_zeros(key[1])
        if key not in self._blocks:
            with torch.inference_mode(False):  # inference tensors cannot be written to elsewhere
                self._blocks[key] = like.new_zeros(key[1])
        return self._blocks[key]
