"""Tries the passes of the largest batch, and splits batches that do not fit the device's memory into 2, 4, … parts.

Gradients are still those of the whole batch; only batch norm sees fewer images at once.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from core.runtime import is_out_of_memory, may_be_out_of_memory

logger = logging.getLogger(__name__)

# The error of batch norm climbs below 8 images (Wu and He 2018, arXiv 1803.08494, figure 1).
SMALLEST_MICRO_BATCH = 8
PASS = "a pass of %d images"


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
    sizes = [batch_size]
    while (smaller := -(-sizes[-1] // 2)) >= SMALLEST_MICRO_BATCH:
        sizes.append(smaller)
    with _undone(model):
        fitting = _first_that_fits(
            lambda size: _attempt(lambda: try_step(None if size == batch_size else size), model, moments), sizes
        )
    return None if fitting == batch_size else fitting


def batches_that_fit(try_step: Callable[[int], None], model: nn.Module, *, most: int, moments: int) -> int:
    """Return the largest number of batches that can be augmented together, halving from `most`.

    `try_step` augments that many and runs the passes of one; otherwise like `micro_batch_that_fits`.
    """
    with _undone(model):
        return batch_that_fits(
            lambda batches: _attempt(lambda: try_step(batches), model, moments),
            batch_size=most,
            what="augmenting %d batches at once",
        )


def kept_bytes(passes: Callable[[], None], model: nn.Module) -> int:
    """Run the passes of a step, and return the bytes of the tensors that they keep for the backward pass.

    Parameters and buffers do not count, nor does what is freed at once.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with _undone(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        try:
            passes()
        finally:
            model.zero_grad(set_to_none=True)
    return sum(kept.values())


def _attempt(try_step: Callable[[], None], model: nn.Module, moments: int) -> None:
    held = [torch.empty_like(parameter) for parameter in model.parameters() for _ in range(moments)]
    try:
        try_step()
    finally:
        model.zero_grad(set_to_none=True)
    del held


@contextlib.contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """Restore buffers, and free cached memory."""
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        free_cache()


def batch_that_fits(try_batch: Callable[[int], object], *, batch_size: int, what: str = PASS) -> int:
    """Return the largest batch that fits, halving from `batch_size`; raises the error if not even one image fits."""
    sizes = [batch_size]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return _first_that_fits(try_batch, sizes, what)


def _first_that_fits(attempt: Callable[[int], object], sizes: Sequence[int], what: str = PASS) -> int:
    """Return the first of these falling sizes whose attempt fits in memory.

    An error that may have other reasons counts as a lack of memory only if a smaller size works.
    """
    errors: list[RuntimeError] = []
    for size in sizes:
        try:
            error = error_of_memory(partial(attempt, size))
        except RuntimeError:
            if errors:
                break
            raise
        if error is None:
            return size
        logger.info("%s does not fit the device's memory", what % size)
        errors.append(error)
        free_cache()
    raise next(filter(is_out_of_memory, errors), errors[0])


def error_of_memory(attempt: Callable[[], object]) -> RuntimeError | None:
    """Run the attempt, and return an error that may be a lack of memory, without the tensors of its traceback."""
    try:
        attempt()
    except RuntimeError as error:
        if not may_be_out_of_memory(error):
            raise
        if not is_out_of_memory(error):
            error.add_note("".join(traceback.format_tb(error.__traceback__)))
        return error.with_traceback(None)
    return None


def free_cache() -> None:
    """Return cached memory to the device."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
