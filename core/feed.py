"""Batches of images from device memory, or streamed from the host, bitwise equal.

A larger data set stays on the host, memory-mapped: a thread gathers the next batch into pinned memory and sends it.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch
from torch import Tensor


class Feed(ABC):
    """Source of image batches on a device."""

    images: Tensor  # (N, C, H, W) uint8, on the device or the host
    device: torch.device  # Of the batches

    @abstractmethod
    def take(self, rows: Tensor) -> Tensor:
        """Copy the images at rows (B,) int64 on the device."""

    @abstractmethod
    def batches(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the images at each batch of rows. A batch may be modified, and is valid until the next request."""


class Resident(Feed):
    """Images in device memory. Never waits."""

    def __init__(self, images: Tensor, device: torch.device) -> None:
        self.images = images.to(device)
        self.device = self.images.device

    def take(self, rows: Tensor) -> Tensor:
        return self.images[rows]

    def batches(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        return map(self.take, rows)


class Streamed(Feed):
    """Images on the host, sent batch by batch.

    Each iterator has a thread, which ends with it and whose errors are raised with the batch. Truncating a mapped file
    kills the process (SIGBUS).
    """

    def __init__(self, images: Tensor, device: torch.device) -> None:
        if images.device.type != "cpu":
            raise ValueError(f"only images on the host can be streamed, these are on {images.device}")
        self.images, self.device = images, device
        # Kept, since allocating pinned memory takes longer than filling it.
        self._idle: deque[tuple[_Buffer, _Buffer]] = deque(maxlen=1)

    def take(self, rows: Tensor) -> Tensor:
        """See `Feed`. Waits."""
        return torch.index_select(self.images, 0, rows.cpu()).to(self.device)

    def batches(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """See `Feed`. Waits at the first batch only."""
        if not rows:
            return
        sizes = [len(batch) for batch in rows]
        to_gather = iter(torch.split(torch.cat(list(rows)).cpu(), sizes))
        buffers = self._idle.pop() if self._idle else (self._buffer(), self._buffer())
        for buffer in buffers:
            buffer.reserve(max(sizes))
        # Forwards exceptions, and ends its thread also at interpreter exit.
        thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        try:
            ahead = deque(
                (buffer, thread.submit(buffer.fill, batch)) for buffer, batch in zip(buffers, to_gather, strict=False)
            )
            for size in sizes:
                buffer, filled = ahead.popleft()
                filled.result()
                try:
                    yield buffer.acquire(size)
                finally:
                    buffer.release()
                ahead.extend((buffer, thread.submit(buffer.fill, batch)) for batch in islice(to_gather, 1))
        finally:
            thread.shutdown(cancel_futures=True)  # waits for the running gather only
            self._idle.append(buffers)

    def _buffer(self) -> _Buffer:
        return _PinnedBuffer(self.images, self.device) if self.device.type == "cuda" else _Buffer(self.images)


def open_feed(images: Tensor, device: torch.device, *, streamed: bool | None = None) -> Feed:
    """Create the feed of images (N, C, H, W) uint8; None streams those that are not on the device."""
    if streamed is None:
        streamed = images.device != _with_index(device)
    return Streamed(images, device) if streamed else Resident(images, device)


def _with_index(device: torch.device) -> torch.device:
    """The device as `Tensor.device` has it."""
    if device.type == "cpu":
        return torch.device("cpu")
    return torch.device(device.type, torch.cuda.current_device()) if device.index is None else device


class _Buffer:
    """Host memory for one batch, used in place by a CPU."""

    def __init__(self, images: Tensor) -> None:
        self._images = images
        self._host = self._room(0)

    def reserve(self, size: int) -> None:
        if len(self._host) < size:
            self._host = self._room(size)

    def fill(self, rows: Tensor) -> None:
        torch.index_select(self._images, 0, rows, out=self._host[: len(rows)])

    def acquire(self, size: int) -> Tensor:
        return self._host[:size]

    def release(self) -> None:
        """Mark the batch as used by launched work."""

    @torch.inference_mode(False)  # inference tensors cannot be written to elsewhere
    def _room(self, size: int, *, device: torch.device | None = None, pin_memory: bool = False) -> Tensor:
        shape = (size, *self._images.shape[1:])
        return torch.empty(shape, dtype=self._images.dtype, device=device, pin_memory=pin_memory)


class _PinnedBuffer(_Buffer):
    """Pinned memory, CUDA memory, and the copy between them on its own stream."""

    def __init__(self, images: Tensor, device: torch.device) -> None:
        super().__init__(images)
        self._stream = _copy_stream(_with_index(device))
        # `blocking` lets the thread sleep.
        self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._used = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._used_by = self._stream
        with torch.cuda.stream(self._stream):
            self._device = self._room(0, device=self._stream.device)

    def reserve(self, size: int) -> None:
        if len(self._host) < size:
            with torch.cuda.stream(self._stream):  # memory belongs to the stream it was allocated on
                host = self._room(size, pin_memory=True)
                self._device = self._room(size, device=self._stream.device)
            self._host = host  # last, in case the device's allocation fails

    def fill(self, rows: Tensor) -> None:
        self._copied.synchronize()
        super().fill(rows)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used)
            self._device[: len(rows)].copy_(self._host[: len(rows)], non_blocking=True)
            self._copied.record(self._stream)

    def acquire(self, size: int) -> Tensor:
        self._used_by = torch.cuda.current_stream(self._stream.device)
        self._used_by.wait_event(self._copied)
        batch = self._device[:size]
        batch.record_stream(self._used_by)  # keeps the memory until this work is done
        return batch

    def release(self) -> None:
        stream = torch.cuda.current_stream(self._stream.device)
        self._used.record(stream)
        if stream != self._used_by:  # garbage collection may close an iterator on any stream
            self._stream.wait_stream(self._used_by)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Stream of copies, shared so that its freed memory is too. A high-priority one is never used for a capture."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
