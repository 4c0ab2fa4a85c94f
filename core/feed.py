"""Images on their way to the device, whether they lie there or stream to it from the host.

A set that fits lies on the device, and a batch is one gather there. A larger one stays on the host, memory-mapped from
its cache: while the device works on one batch, a thread gathers the next into pinned memory and sends it. Two buffers
take turns, filled and emptied in a fixed order, so that both feeds give bitwise the same batches. The host waits for
the device once an epoch, to learn the order of the rows; the rest of the waiting is the thread's.
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
    """Images on their way to the device."""

    images: Tensor
    """(N, C, H, W) uint8, where they lie"""
    device: torch.device
    """Where they are handed out"""

    @abstractmethod
    def take(self, rows: Tensor) -> Tensor:
        """The images of these rows, to keep: (B, C, H, W) uint8 on the device.

        Args:
            rows: (B,) int64 on the device, in [0, N), in any order and as often as wanted.
        """

    @abstractmethod
    def batches(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """In turn the images of each: (B, C, H, W) uint8 on the device, with B of its own for each batch.

        A batch may be written to, and is valid until the next one is asked for.

        Args:
            rows: for each batch (B,) int64 on the device, in [0, N), in any order and as often as wanted.
        """


class Resident(Feed):
    """Images that lie on the device whole; moved there if they do not. Nothing waits for the device."""

    def __init__(self, images: Tensor, device: torch.device) -> None:
        self.images = images.to(device)
        self.device = self.images.device

    def take(self, rows: Tensor) -> Tensor:
        return self.images[rows]

    def batches(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        return map(self.take, rows)


class Streamed(Feed):
    """Images that stay on the host, in memory or memory-mapped, and are sent batch by batch.

    Each iterator that `batches` returns has a thread and two buffers of its own, so that several may run at once, and
    `take` beside them. The thread ends with the iterator: when the last batch has been used, when the iterator is
    closed or forgotten, or when an exception leaves the loop over it. The buffers are kept for the next one.

    What goes wrong in the thread is raised where the batch is asked for: an IndexError for a row out of range, an
    OSError, a MemoryError. But a map whose file is cut short under it ends the process (SIGBUS), as maps do.

    Args:
        images: (N, C, H, W) uint8 on the CPU. Only read, so that several processes may map one file.
        device: where batches are handed out; on a CPU, where they were gathered.

    Raises:
        ValueError: the images do not lie on the host.
    """

    def __init__(self, images: Tensor, device: torch.device) -> None:
        if images.device.type != "cpu":
            raise ValueError(f"images that stream lie on the host, and these on {images.device}")
        self.images, self.device = images, device
        # One pair at most: to allocate pinned memory takes longer than to fill it.
        self._idle: deque[tuple[_Buffer, _Buffer]] = deque(maxlen=1)

    def take(self, rows: Tensor) -> Tensor:
        """See `Feed`. Waits for the device, and again for the images."""
        return torch.index_select(self.images, 0, rows.cpu()).to(self.device)

    def batches(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """See `Feed`. Waits for the device when the first batch is asked for, and then never."""
        if not rows:
            return
        sizes = [len(batch) for batch in rows]
        to_gather = iter(torch.split(torch.cat(list(rows)).cpu(), sizes))
        buffers = self._idle.pop() if self._idle else (self._buffer(), self._buffer())
        for buffer in buffers:
            buffer.reserve(max(sizes))
        # A thread an iterator: the executor hands its exceptions on, and ends it, also when the interpreter ends.
        thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        try:
            ahead = deque(
                (buffer, thread.submit(buffer.fill, batch)) for buffer, batch in zip(buffers, to_gather, strict=False)
            )
            for size in sizes:
                buffer, filled = ahead.popleft()
                filled.result()
                try:
                    yield buffer.lend(size)
                finally:
                    buffer.give_back()
                ahead.extend((buffer, thread.submit(buffer.fill, batch)) for batch in islice(to_gather, 1))
        finally:
            thread.shutdown(cancel_futures=True)  # waits for the gather that is under way, and for no other
            self._idle.append(buffers)

    def _buffer(self) -> _Buffer:
        return _PinnedBuffer(self.images, self.device) if self.device.type == "cuda" else _Buffer(self.images)


def open_feed(images: Tensor, device: torch.device, *, streamed: bool | None = None) -> Feed:
    """The feed of these images to that device.

    Args:
        images: (N, C, H, W) uint8.
        device: where batches are wanted.
        streamed: whether images stay where they are, which has to be the host, or are moved to the device. None: they
            stay where they are, and stream where that is not the device.

    Raises:
        ValueError: they are to stream, and do not lie on the host.
    """
    if streamed is None:
        streamed = images.device != _with_index(device)
    return Streamed(images, device) if streamed else Resident(images, device)


def _with_index(device: torch.device) -> torch.device:
    """The device as tensors name theirs: `cuda` is one of several, and `cpu` has no number."""
    if device.type == "cpu":
        return torch.device("cpu")
    return torch.device(device.type, torch.cuda.current_device()) if device.index is None else device


class _Buffer:
    """Room for one batch in the host's memory, where a CPU works on it."""

    def __init__(self, images: Tensor) -> None:
        self._images = images
        self._host = self._room(0)

    def reserve(self, size: int) -> None:
        """Makes room for that many images, if there is less."""
        if len(self._host) < size:
            self._host = self._room(size)

    def fill(self, rows: Tensor) -> None:
        """Gathers the images of these rows (B,), in the thread."""
        torch.index_select(self._images, 0, rows, out=self._host[: len(rows)])

    def lend(self, size: int) -> Tensor:
        """The batch of that many images, for the work that the caller now launches."""
        return self._host[:size]

    def give_back(self) -> None:
        """Says that all work on the batch has been launched: it may be overwritten after that."""

    @torch.inference_mode(False)  # what is made in inference mode could not be written to outside
    def _room(self, size: int, *, device: torch.device | None = None, pin_memory: bool = False) -> Tensor:
        shape = (size, *self._images.shape[1:])
        return torch.empty(shape, dtype=self._images.dtype, device=device, pin_memory=pin_memory)


class _PinnedBuffer(_Buffer):
    """Room for one batch in pinned memory and on the CUDA device, and the copy from the one to the other.

    The copy waits on the device, in a stream of its own, for the work on the batch that lay there before; the thread
    waits for the copy before it gathers anew into pinned memory; the caller's stream waits for the copy.
    """

    def __init__(self, images: Tensor, device: torch.device) -> None:
        super().__init__(images)
        self._stream = _copy_stream(_with_index(device))
        # `blocking` lets the thread sleep while it waits, instead of spinning on a core that the training needs.
        self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._used = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._lent_to = self._stream
        with torch.cuda.stream(self._stream):
            self._device = self._room(0, device=self._stream.device)

    def reserve(self, size: int) -> None:
        if len(self._host) < size:
            with torch.cuda.stream(self._stream):  # which the memory then belongs to: no other work may still use it
                host = self._room(size, pin_memory=True)
                self._device = self._room(size, device=self._stream.device)
            self._host = host  # last, so that a buffer which the device has no memory for is not taken for whole

    def fill(self, rows: Tensor) -> None:
        self._copied.synchronize()
        super().fill(rows)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used)
            self._device[: len(rows)].copy_(self._host[: len(rows)], non_blocking=True)
            self._copied.record(self._stream)

    def lend(self, size: int) -> Tensor:
        self._lent_to = torch.cuda.current_stream(self._stream.device)
        self._lent_to.wait_event(self._copied)
        batch = self._device[:size]
        batch.record_stream(self._lent_to)  # its memory, once freed, is given to nobody before this work is done
        return batch

    def give_back(self) -> None:
        stream = torch.cuda.current_stream(self._stream.device)
        self._used.record(stream)
        if stream != self._lent_to:  # a forgotten iterator may be closed in any thread, and on any stream
            self._stream.wait_stream(self._lent_to)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Always the same one, so that memory which one feed leaves can be had by the next.

    Of high priority, which torch keeps in a pool of its own: so it is never one of those that steps are captured on.
    """
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
