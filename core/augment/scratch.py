"""Reusable memory for a CPU's augmentation, and block sizes that fit its cache.

Returning blocks of ten megabytes to the system and faulting them in again took up to a third of a CPU's time. On a GPU
torch's allocator caches memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Float32 images that a core processes at once, so that they and results stay in its cache.
_CORE_BLOCK_BYTES = 1100 * 2**10


def blocks(count: int, images: Tensor) -> list[int]:
    """Return the block sizes, which do not affect results, for `count` images (…, C, H, W); one block on a GPU."""
    if images.device.type != "cpu":
        return [count]
    block_bytes = _CORE_BLOCK_BYTES * torch.get_num_threads()  # threads share a block
    parts = max(math.ceil(4 * count * math.prod(images.shape[-3:]) / block_bytes), 1)
    size = math.ceil(count / parts)
    return [min(size, count - start) for start in range(0, count, size)] if count else [0]


class Scratch:
    """Blocks of memory by name and shape, valid until requested again."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def zeroed_once(self, name: str, layout: Sequence[int], like: Tensor) -> Tensor:
        """Return a block like `like` in dtype and device, zero except for earlier writes."""
        key = (name, tuple(layout))
        if like.device.type != "cpu":
            return like.new_zeros(key[1])
        if key not in self._blocks:
            with torch.inference_mode(False):  # inference tensors cannot be written to elsewhere
                self._blocks[key] = like.new_zeros(key[1])
        return self._blocks[key]
