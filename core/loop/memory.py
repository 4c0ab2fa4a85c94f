"""Tries the passes of the largest batch, and splits batches that do not fit the device's memory into 2, 4, … parts.

Gradients are still those of the whole batch; only batch norm sees fewer images at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from core.runtime import is_out_of_memory

logger = logging.getLogger(__name__)

# The error of batch norm climbs below 8 images (Wu and He 2018, arXiv 1803.08494, figure 1).
SMALLEST_MICRO_BATCH = 8


def micro_batch_that_fits(
    try_step: Callable[[int | None], None],
    model: nn.Module,
    *,
    batch_size: int,
    moments: int,
) -> int | None:
    """Return the largest micro-batch that fits, halving from the whole batch; None: the whole batch.

    `try_step` runs the passes of a batch in micro-batches of that size; the model's buffers are restored. `moments` is
    the optimizer's number of state tensors per parameter.

    Raises:
        torch.OutOfMemoryError: not even `SMALLEST_MICRO_BATCH` images fit; on a CPU a RuntimeError.
    """
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]

    def attempt(size: int | None) -> None:
        held = [torch.empty_like(parameter) for parameter in model.parameters() for _ in range(moments)]
        try_step(size)
        del held

    size: int | None = None
    try:
        while (error := _out_of_memory(partial(attempt, size))) is not None:
            smaller = -(-(size or batch_size) // 2)
            if smaller < SMALLEST_MICRO_BATCH:
                raise error
            logger.info("a pass of %d images does not fit the device's memory: trying %d", size or batch_size, smaller)
            size = smaller
            model.zero_grad(set_to_none=True)
            free_cache()
        return size
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        free_cache()


def batch_that_fits(try_batch: Callable[[int], object], *, batch_size: int) -> int:
    """Return the largest batch that fits, halving from `batch_size`; raises the error if not even one image fits."""
    while (error := _out_of_memory(partial(try_batch, batch_size))) is not None:
        if batch_size == 1:
            raise error
        batch_size //= 2
        free_cache()
    return batch_size


def _out_of_memory(attempt: Callable[[], object]) -> BaseException | None:
    try:
        attempt()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # The traceback keeps the attempt's tensors alive.
        return error.with_traceback(None)
    return None


def free_cache() -> None:
    """Return cached memory to the device."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
