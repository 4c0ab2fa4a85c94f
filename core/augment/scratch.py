"""Memory that a CPU keeps from batch to batch, and how much of it a core keeps in its cache.

Blocks of ten megabytes, let go and asked for again, are returned to the system and faulted in anew page by page: that
took up to a third of an augmentation's time, now and then, as the heap happened to lie. On a GPU torch's allocator
keeps what it has, and a captured graph has memory of its own, so there every block is a new one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# The float32 images that a core works on at a time: with what an operation makes of them they stay in its cache.
_CORE_BLOCK_BYTES = 1100 * 2**10


def blocks(count: int, images: Tensor) -> list[int]:
    """The sizes of blocks that `count` of such images (…, C, H, W) are worked on in: all at once on a GPU.

    They change no bit of any image.
    """
    if images.device.type != "cpu":
        return [count]
    block_bytes = _CORE_BLOCK_BYTES * torch.get_num_threads()  # the threads of an operation share a block
    parts = max(math.ceil(4 * count * math.prod(images.shape[-3:]) / block_bytes), 1)
    size = math.ceil(count / parts)
    return [min(size, count - start) for start in range(0, count, size)] if count else [0]


class Scratch:
    """Blocks by name and layout. What is written to one is valid until it is asked for again."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def zeroed_once(self, name: str, layout: Sequence[int], like: Tensor) -> Tensor:
        """A block of that layout, of the type and on the device of `like`: zeros, but for what was written to it."""
        key = (name, tuple(layout))
        if like.device.type != "cpu":
            return like.new_zeros(key[1])
        if key not in self._blocks:
            with torch.inference_mode(False):  # whoever asks first: others may write to it outside of that
                self._blocks[key] = like.new_zeros(key[1])
        return self._blocks[key]
