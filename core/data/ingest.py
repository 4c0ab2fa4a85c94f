"""Parallel decoding of all images of a source into one spool file.

Uses the worker processes of torch's DataLoader: for small images, most of the time is spent in Python code, which
threads do not speed up.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from core.data.decode import (
    PLAIN,
    TWELVE_BITS,
    BrokenImageError,
    Decoded,
    Pixels,
    UnknownBandError,
    Values,
    decode,
    range_of,
)
from core.data.layout import Entry
from core.data.source import Payload, Readable, Source, one_line
from core.errors import SizesError, UserError
from core.text import printable

# Images, and encoded bytes, per task: sending a single 32² image to a process costs more than decoding it.
BATCH, BATCH_BYTES = 64, 1 << 20

# Batches in flight per process.
IN_FLIGHT = 2

# Images for which no process is started.
FEW = 256

# Images to decode after the first of another size, to report the smallest and largest.
LOOK_ON = 500

# Broken files listed in an error message.
NAMED = 5


Progress = Callable[[str, int, int], None]
"""Called with the step, `reading` or `comparing`, the number of images done, and of all."""


@dataclass(slots=True)
class Spooled:
    """A decoded image whose pixels are in the spool file."""

    entry: Entry
    offset: int
    shape: tuple[int, int, int]
    digest: bytes
    moments: NDArray[np.int64]
    look: int = -1
    """Equal for identical images and near-duplicates, once they are known."""


@dataclass(frozen=True)
class Ingested:
    """The images of a source in the spool file."""

    images: list[Spooled]
    """In the order of the entries."""
    broken: tuple[str, ...]
    """Ids of images that cannot be read."""
    values: Values
    """What their samples mean, with the range of 16-bit samples that was found."""


@contextmanager
def without_old_objects() -> Iterator[None]:
    """Leave the objects that exist already out of garbage collections, which took a fifth of the time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


Result = tuple[int, Decoded | Exception]
"""Position in the entries, and the image or its error."""


def decode_all(
    source: Readable, entries: Sequence[Entry], size: tuple[int, int] | None, values: Values = PLAIN
) -> Iterator[Result]:
    """Yield (position in `entries`, image or its error) in the order in which the source reads them."""
    Image.init()  # once, not in each process
    payloads = source.payloads(entries)
    first = list(islice(payloads, 1))
    encoded = not any(isinstance(payload, np.ndarray) for _, payload in first)  # arrays take longer to send
    workers = _processes() if encoded and len(entries) > FEW else 0
    with warnings.catch_warnings():
        # Pillow warns about unusual metadata of readable images, Python about a fork beside other threads.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.filterwarnings("ignore", message=r".*multi-threaded, use of fork", category=DeprecationWarning)
        loader = DataLoader(
            _Decoder(size, values),
            batch_sampler=_batches(chain(first, payloads)),  # the images themselves, not their numbers
            collate_fn=list,
            num_workers=workers,
            prefetch_factor=IN_FLIGHT if workers else None,
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_start if workers else None,
            generator=torch.Generator(),  # or it draws a seed from the global one
        )
        try:
            with _held_signals():
                batches = iter(loader)
            for batch in batches:
                yield from batch
        except RuntimeError as error:  # torch's, for any process that ends by a signal
            if "exited unexpectedly" not in str(error):
                raise
            raise UserError(
                f"{source.where}: a process that reads its images was killed, as happens when the memory is full; "
                "close other programs, or give smaller images"
            ) from error


_SIGNALS = {signal.SIGINT, signal.SIGTERM}


@contextmanager
def _held_signals() -> Iterator[None]:
    """Hold back signals, so that a forked process cannot receive one before `_start`."""
    if sys.platform != "linux":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(_: int) -> None:
    """Leave signals to the parent process, which ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _processes() -> int:
    """Number of processes to decode in; 0 if this one should, where others cannot be forked or would start anew."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 0
    return len(os.sched_getaffinity(0))


def _batches(payloads: Iterator[tuple[int, Payload]]) -> Iterator[list[tuple[int, Payload]]]:
    batch: list[tuple[int, Payload]] = []
    size = 0
    for position, payload in payloads:
        batch.append((position, payload))
        size += 0 if isinstance(payload, Exception) or callable(payload) else len(payload)
        if len(batch) == BATCH or size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Decoder(Dataset[Result]):
    """Decodes the images that it is asked for; a DataLoader sends it to its processes."""

    def __init__(self, size: tuple[int, int] | None, values: Values) -> None:
        self._size = size
        self._values = values

    def __getitem__(self, item: tuple[int, Payload]) -> Result:
        position, payload = item
        if callable(payload):
            payload = payload()
        if isinstance(payload, Exception):
            return position, payload
        try:
            return position, decode(payload, self._size, self._values)
        except BrokenImageError as error:
            return position, error


def ingest(
    source: Source,
    entries: Sequence[Entry],
    size: tuple[int, int] | None,
    skip_broken: bool,
    spool: IO[bytes],
    values: Values = PLAIN,
    on_progress: Progress | None = None,
) -> Ingested:
    """Write the pixels of all images to the spool file, resized to `size` (H, W) if given.

    The range of 16-bit samples is known only at the end. Where it is not the usual one, the images are read again.

    Raises:
        UserError: images are broken and `skip_broken` is off, or their sizes differ, or none is left, or the meaning of
            a band is not known.
    """
    images, broken, highest = _ingest_once(source, entries, size, skip_broken, spool, values, on_progress)
    top = range_of(highest)
    if top != values.top:
        values = replace(values, top=top)
        spool.seek(0)
        spool.truncate()
        images, broken, _ = _ingest_once(source, entries, size, skip_broken, spool, values, on_progress)
    return Ingested(images, broken, values)


def _ingest_once(
    source: Source,
    entries: Sequence[Entry],
    size: tuple[int, int] | None,
    skip_broken: bool,
    spool: IO[bytes],
    values: Values,
    on_progress: Progress | None,
) -> tuple[list[Spooled], tuple[str, ...], int]:
    """Read all images. Returns them, the ids of broken ones, and the largest 16-bit sample."""
    images: list[Spooled | None] = [None] * len(entries)
    broken: dict[int, Exception] = {}
    sizes: dict[tuple[int, int], str] = {}
    after_mismatch = 0
    offset = 0
    highest = 0
    coarse: str | None = None
    for done, (position, result) in enumerate(decode_all(source, entries, size, values)):
        if on_progress is not None and done % BATCH == 0:
            on_progress("reading", min(done, len(entries)), len(entries))
        images[position] = None
        broken.pop(position, None)
        if isinstance(result, UnknownBandError):
            raise _unknown_band(source.where, entries[position], result)
        if isinstance(result, Exception):
            broken[position] = result
            continue
        highest = max(highest, result.top)
        coarse = entries[position].id if result.coarse else coarse
        channels, height, width = result.pixels.shape
        sizes.setdefault((height, width), entries[position].id)
        if len(sizes) > 1:
            after_mismatch += 1
            if after_mismatch > LOOK_ON:
                break
            continue
        spool.write(result.pixels.data)
        images[position] = Spooled(entries[position], offset, (channels, height, width), result.digest, result.moments)
        offset += result.pixels.nbytes
    if len(sizes) > 1:
        raise _different_sizes(source.where, sizes)
    report_broken(source.where, entries, broken, skip_broken)
    if coarse is not None and 0 < highest < TWELVE_BITS:
        raise UserError(
            f"{source.where}: no sample of its 16-bit images reaches {TWELVE_BITS:,}, and of those in colour, such as "
            f"{printable(coarse)}, only the upper 8 bits can be read; save them with 8 bits"
        )
    return [image for image in images if image is not None], tuple(entries[i].id for i in sorted(broken)), highest


def report_broken(where: str, entries: Sequence[Entry], broken: dict[int, Exception], skip_broken: bool) -> None:
    """Raise UserError if images are broken and may not be skipped, or if all of them are."""
    if not broken or (skip_broken and len(broken) < len(entries)):
        return
    named = ", ".join(f"{printable(entries[i].id)} ({_reason(broken[i])})" for i in sorted(broken)[:NAMED])
    more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    advice = "none is left" if skip_broken else "fix them, or skip them with --skip-broken"
    raise UserError(f"{where}: {len(broken)} of {len(entries)} images cannot be read: {named}{more}; {advice}")


def read_spool(spool: Path, images: Sequence[Spooled]) -> Iterator[Pixels]:
    """Yield the pixels (C, H, W) of the images, through a memory map."""
    pixels = np.memmap(spool, dtype=np.uint8, mode="r").view(np.ndarray)  # slices of a map cost more than a copy
    for image in images:
        length = math.prod(image.shape)
        yield pixels[image.offset : image.offset + length].reshape(image.shape)


def _unknown_band(where: str, entry: Entry, error: UnknownBandError) -> UserError:
    return UserError(
        f"{where}: {printable(entry.id)} has {error}; --set data.channels=rgb ignores it, "
        "data.channels=rgba takes it as transparency"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return one_line(error)


def _different_sizes(where: str, sizes: dict[tuple[int, int], str]) -> SizesError:
    def describe(size: tuple[int, int]) -> str:
        return f"{size[1]}×{size[0]} ({printable(sizes[size])})"

    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return SizesError(
        f"{where}: its images differ in size (width×height), from {describe(by_area[0])} to {describe(by_area[-1])}; "
        "resize them to a square with --set data.image_size=96"
    )
