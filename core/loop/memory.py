"""Whether a step fits the device's memory, found out before the training begins, and what is done where it does not.

One step's forward and backward pass is tried on the largest batch at the images' whole size, with room held for what
the optimizer will keep. Where that is too much, the batch goes through the network in two halves, four quarters, and so
on: the gradients, and so the step, are the whole batch's. Only batch norm then sees fewer images at once, which is
recorded with the result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from core.runtime import is_out_of_memory

logger = logging.getLogger(__name__)

# Batch norm over fewer images than this is another network (Wu and He 2018, arXiv 1803.08494, figure 1: its error
# climbs below 8 images).
SMALLEST_MICRO_BATCH = 8


def micro_batch_that_fits(
    try_step: Callable[[int | None], None],
    model: nn.Module,
    *,
    batch_size: int,
    moments: int,
) -> int | None:
    """The largest micro-batch, halving from the whole batch, whose step the device has memory for; None: the whole.

    The model is left as it was, without gradients.

    Args:
        try_step: goes forward and back through a whole batch, in micro-batches of that size.
        batch_size: the whole batch's.
        moments: how many tensors of the parameters' sizes the optimizer will keep.

    Raises:
        torch.OutOfMemoryError: not even `SMALLEST_MICRO_BATCH` images fit, or a plain RuntimeError on a CPU.
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
            _let_go()
        return size
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        _let_go()


def batch_that_fits(try_batch: Callable[[int], object], *, batch_size: int) -> int:
    """The largest number of images, halving from `batch_size`, that `try_batch` has memory for.

    Raises:
        torch.OutOfMemoryError: not even one image fits, or a plain RuntimeError on a CPU.
    """
    while (error := _out_of_memory(partial(try_batch, batch_size))) is not None:
        if batch_size == 1:
            raise error
        batch_size //= 2
        _let_go()
    return batch_size


def _out_of_memory(attempt: Callable[[], object]) -> BaseException | None:
    """What the attempt dies of, if it is a lack of memory."""
    try:
        attempt()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # Its traceback holds the attempt's tensors, which the next one needs the room of.
        return error.with_traceback(None)
    return None


def _let_go() -> None:
    """Gives back what torch's allocator keeps, so that the next attempt finds it in one piece."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
