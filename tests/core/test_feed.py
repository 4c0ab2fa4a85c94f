"""Resident and streamed feeds deliver equal batches, and streaming leaves no threads or memory."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import queue
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core.feed import Feed, Resident, Streamed, _Buffer, _copy_stream, _PinnedBuffer, open_feed
from tests.core.trainings import forbidden_waits

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
N, SHAPE = 500, (3, 9, 7)
SIZES = (64, 64, 1, 32, 64, 17)  # a last, smaller batch, and smaller ones before it


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (N, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def file(images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "images.npy"
    np.save(path, images.numpy())
    return path


def mapped(file: Path) -> Tensor:
    """The file's images, memory-mapped copy-on-write."""
    return torch.from_numpy(np.load(file, mmap_mode="c"))


def draw(sizes: tuple[int, ...] = SIZES, seed: int = 0) -> list[Tensor]:
    """Random rows of batches of these sizes, with repeats."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, N, (size,), generator=generator) for size in sizes]


def clones(batches: Iterator[Tensor]) -> list[Tensor]:
    return [batch.clone() for batch in batches]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [batch.shape for batch in found] == [batch.shape for batch in expected]
    assert all(batch.dtype == torch.uint8 for batch in found)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def threads_of_feeds() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("feed")]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert threads_of_feeds() == []


class Watched(Tensor):
    """Images that call `after_gather` in the thread after each gathered batch."""

    after_gather: Callable[[], None]

    @classmethod
    def of(cls, images: Tensor, after_gather: Callable[[], None]) -> Watched:
        watched = images.as_subclass(cls)
        watched.after_gather = after_gather
        return watched

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.index_select:
            args[0].after_gather()
        return result


# ---- Equal batches


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("where", ["in memory", "mapped"])
def test_streamed_and_resident_batches_are_equal(images: Tensor, file: Path, where: str, seed: int) -> None:
    rows = draw(seed=seed)
    assert len(torch.cat(rows).unique()) < sum(SIZES)  # there are repeats
    source = images if where == "in memory" else mapped(file)
    expected = [images[batch] for batch in rows]
    for feed in (Streamed(source, CPU), Resident(source, CPU)):
        assert_same(clones(feed.batches(rows)), expected)
        assert_same([feed.take(batch) for batch in rows], expected)


@pytest.mark.parametrize("sizes", [(), (5,), (5, 3), (0, 4, 0)], ids=str)
def test_any_number_of_batches_of_any_size(images: Tensor, sizes: tuple[int, ...]) -> None:
    rows = draw(sizes)
    assert_same(clones(Streamed(images, CPU).batches(rows)), [images[batch] for batch in rows])


def test_non_contiguous_images_can_be_streamed(images: Tensor) -> None:
    rows = draw()
    strided = images.transpose(2, 3)[:, 1:]
    assert_same(clones(Streamed(strided, CPU).batches(rows)), [strided[batch] for batch in rows])


def test_epochs_of_larger_and_smaller_batches_follow_one_another(images: Tensor) -> None:
    feed = Streamed(images, CPU)
    for epoch, sizes in enumerate([(8, 8, 3), (64, 64), (16, 16, 16), (128,)]):
        rows = draw(sizes, seed=epoch)
        assert_same(clones(feed.batches(rows)), [images[batch] for batch in rows])


def test_modifying_a_batch_does_not_change_images_or_file(images: Tensor, file: Path) -> None:
    before = file.read_bytes()
    source = mapped(file)
    for feed in (Streamed(source, CPU), Resident(source, CPU)):
        for batch in feed.batches(draw()):
            batch.zero_()
    assert torch.equal(source, images)
    assert file.read_bytes() == before


def test_a_feed_works_across_inference_mode(images: Tensor) -> None:
    rows = draw()
    expected = [images[batch] for batch in rows]
    with torch.inference_mode():
        feed = Streamed(images, CPU)
        assert_same(clones(feed.batches(draw())), expected)
    for batch, reference in zip(feed.batches(rows), expected, strict=True):
        weight = torch.ones(SHAPE, requires_grad=True)
        (batch * weight).sum().backward()
        assert weight.grad is not None
        assert torch.equal(weight.grad, reference.sum(0).float())
    with torch.inference_mode():
        assert_same(clones(feed.batches(rows)), expected)


# ---- Validity of batches


@pytest.mark.parametrize("held", range(len(SIZES)))
def test_a_batch_is_valid_until_the_next_is_requested(images: Tensor, held: int) -> None:
    """The thread has gathered the next batch when the current one is checked."""
    gathered: queue.SimpleQueue[None] = queue.SimpleQueue()
    rows = draw()
    batches = Streamed(Watched.of(images, lambda: gathered.put(None)), CPU).batches(rows)
    for _ in range(held):
        next(batches)
    batch = next(batches)
    for _ in range(min(held + 2, len(rows))):  # the delivered ones and the next
        gathered.get(timeout=60)
    assert torch.equal(batch, images[rows[held]])
    batches.close()  # type: ignore[attr-defined]
    assert gathered.empty()  # nothing further was gathered
    assert torch.equal(batch, images[rows[held]])


def test_two_buffers_alternate_and_are_reused(images: Tensor) -> None:
    feed = Streamed(images, CPU)
    first, second, smaller = (
        [batch.data_ptr() for batch in feed.batches(draw(sizes))] for sizes in (SIZES, SIZES, (32, 32, 5))
    )
    assert len(set(first)) == 2
    assert first == first[:2] * 3
    assert set(first) == set(second) == set(smaller)


def test_concurrent_iterators_are_independent(images: Tensor) -> None:
    feed = Streamed(images, CPU)
    ours, theirs, single = draw(seed=1), draw(seed=2), draw(seed=3)
    both = zip(feed.batches(ours), feed.batches(theirs), strict=True)
    for (one, other), mine, its, row in zip(both, ours, theirs, single, strict=True):
        taken = feed.take(row)
        assert torch.equal(one, images[mine])
        assert torch.equal(other, images[its])
        assert torch.equal(taken, images[row])


# ---- End of iteration


def test_the_thread_ends_after_the_last_batch(images: Tensor) -> None:
    batches = Streamed(images, CPU).batches(draw())
    assert threads_of_feeds() == []
    for _ in batches:
        assert len(threads_of_feeds()) == 1
    assert threads_of_feeds() == []


@pytest.mark.parametrize("taken", [1, 2, len(SIZES)])
def test_closing_early_ends_the_thread(images: Tensor, taken: int) -> None:
    feed = Streamed(images, CPU)
    batches = feed.batches(draw())
    for _ in range(taken):
        next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert threads_of_feeds() == []
    assert_same(clones(feed.batches(draw())), [images[rows] for rows in draw()])


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_exception_in_the_loop_over_batches_ends_the_thread(images: Tensor, kind: type[BaseException]) -> None:
    with pytest.raises(kind) as caught:
        for _ in Streamed(images, CPU).batches(draw()):
            raise kind
    assert threads_of_feeds() == []
    assert caught.tb is not None  # the traceback keeps the iterator alive


def test_a_deleted_iterator_frees_thread_and_buffers(images: Tensor) -> None:
    feed = Streamed(images, CPU)
    batches = feed.batches(draw())
    memory = weakref.ref(next(batches)._base)
    assert memory() is not None
    gone = weakref.ref(feed)
    del feed, batches
    assert threads_of_feeds() == []
    assert gone() is None
    assert memory() is None


@pytest.mark.parametrize("faulty", [0, 1, 3, len(SIZES) - 1])
def test_an_invalid_row_raises_indexerror_at_its_batch(images: Tensor, faulty: int) -> None:
    rows = draw()
    rows[faulty][-1] = N
    feed = Streamed(images, CPU)
    batches = feed.batches(rows)
    assert_same([next(batches).clone() for _ in range(faulty)], [images[batch] for batch in rows[:faulty]])
    with pytest.raises(IndexError):
        next(batches)
    assert threads_of_feeds() == []
    assert next(batches, None) is None
    assert_same(clones(feed.batches(draw())), [images[batch] for batch in draw()])


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError("no room")], ids=repr)
def test_errors_in_the_thread_are_raised_in_the_loop(images: Tensor, error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        next(Streamed(Watched.of(images, fail), CPU).batches(draw()))
    assert caught.value is error
    assert threads_of_feeds() == []


def test_interpreter_exit_between_batches_does_not_hang(file: Path) -> None:
    code = f"""
import numpy, torch
from core.feed import Streamed
images = torch.from_numpy(numpy.load({str(file)!r}, mmap_mode="c"))
batches = Streamed(images, torch.device("cpu")).batches([torch.arange(100)] * 9)
print(next(batches).shape[0])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "100\n", "")


# ---- Selection


def test_images_stream_unless_they_are_on_the_device(images: Tensor) -> None:
    assert isinstance(open_feed(images, CPU), Resident)
    assert isinstance(open_feed(images, torch.device("cuda:0"), streamed=None), Streamed)
    assert isinstance(open_feed(images, CPU, streamed=True), Streamed)
    assert isinstance(open_feed(images, CPU, streamed=False), Resident)


def test_a_resident_feed_does_not_copy_images_on_its_device(images: Tensor) -> None:
    assert Resident(images, CPU).images.data_ptr() == images.data_ptr()


def test_only_host_images_can_be_streamed() -> None:
    with pytest.raises(ValueError, match="only images on the host can be streamed, these are on meta"):
        Streamed(torch.empty(1, 1, 1, 1, dtype=torch.uint8, device="meta"), CPU)


# ---- Simulated device


class Stream:
    """A simulated CUDA stream, run by its machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.device, self.launched = machine, CPU, 0
        self.work: list[tuple[Callable[[], object], Callable[[], bool]]] = []

    def launch(self, work: Callable[[], object], ready: Callable[[], bool] = lambda: True) -> None:
        with self.machine.lock:
            self.work.append((work, ready))
            self.launched += 1

    def has_done(self, launched: int) -> bool:
        return self.launched - len(self.work) >= launched

    def wait_event(self, event: Event) -> None:
        self.launch(lambda: None, event.mark())

    def wait_stream(self, other: Stream) -> None:
        event = Event(self.machine)
        event.record(other)
        self.wait_event(event)


class Event:
    """A position in a stream's work; complete if never recorded, as in torch."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.over: Callable[[], bool] = lambda: True

    def record(self, stream: Stream) -> None:
        with self.machine.lock:
            self.over = functools.partial(stream.has_done, stream.launched)

    def mark(self) -> Callable[[], bool]:
        with self.machine.lock:
            return self.over

    def synchronize(self) -> None:
        self.machine.run_until(self.mark())


class Machine:
    """A simulated device that works only when a thread waits, in a random valid order."""

    def __init__(self, seed: int) -> None:
        self.lock = threading.RLock()
        self.random = random.Random(seed)
        self.local = threading.local()
        self.default, self.copies, self.other = Stream(self), Stream(self), Stream(self)
        # One stream may be slow: it runs only if no other can.
        self.slow = self.random.choice([None, self.default, self.copies])

    def current(self, device: object = None) -> Stream:
        return getattr(self.local, "stream", self.default)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        outer = self.current()
        self.local.stream = stream
        try:
            yield
        finally:
            self.local.stream = outer

    def run_until(self, over: Callable[[], bool]) -> None:
        with self.lock:
            while not over():
                streams = [s for s in (self.default, self.copies, self.other) if s.work and s.work[0][1]()]
                quick = [s for s in streams if s is not self.slow]
                self.random.choice(quick or streams).work.pop(0)[0]()

    def is_idle(self) -> bool:
        return not (self.default.work or self.copies.work or self.other.work)


class OnDevice(Tensor):
    """Memory of the simulated device; copies to it are deferred."""

    machine: Machine

    def copy_(self, source: Tensor, non_blocking: bool = False) -> OnDevice:
        assert non_blocking
        self.machine.current().launch(functools.partial(self.as_subclass(Tensor).copy_, source))
        return self

    def __getitem__(self, index: Any) -> OnDevice:
        part = super().__getitem__(index).as_subclass(OnDevice)
        part.machine = self.machine
        return part

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        """Do nothing: memory is never freed."""


@pytest.fixture(params=range(30))
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A simulated CUDA device that replaces torch's streams, events and memory."""
    machine = Machine(request.param)
    make_room = _Buffer._room

    def room(self: _Buffer, size: int, *, device: object = None, pin_memory: bool = False) -> Tensor:
        made = make_room(self, size)
        if device is not None:
            made = made.as_subclass(OnDevice)
            made.machine = machine
        return made

    monkeypatch.setattr(_Buffer, "_room", room)
    monkeypatch.setattr("core.feed._copy_stream", lambda device: machine.copies)
    monkeypatch.setattr(Streamed, "_buffer", lambda self: _PinnedBuffer(self.images, self.device))
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: Event(machine))
    monkeypatch.setattr(torch.cuda, "current_stream", machine.current)
    monkeypatch.setattr(torch.cuda, "stream", machine.stream)
    return machine


def test_batches_are_intact_for_any_order_of_device_work(images: Tensor, machine: Machine) -> None:
    """Three epochs, some stopped early and on another stream, with all reads pending."""
    feed, draws, read = Streamed(images, CPU), machine.random, []
    for _ in range(3):
        rows = draw(tuple(draws.randint(1, 9) for _ in range(draws.randint(1, 12))), seed=draws.randint(0, 999))
        stop = draws.choice([None, draws.randint(1, len(rows))])
        batches = feed.batches(rows)
        with machine.stream(machine.default if stop is None else machine.other):
            for batch, wanted in zip(itertools.islice(batches, stop), rows, strict=False):
                copy = torch.empty(batch.shape, dtype=torch.uint8)
                machine.current().launch(functools.partial(copy.copy_, batch.as_subclass(Tensor)))
                read.append((copy, images[wanted]))
        batches.close()  # type: ignore[attr-defined]
    machine.run_until(machine.is_idle)
    assert all(torch.equal(copy, wanted) for copy, wanted in read)


# ---- On CUDA


@pytest.mark.gpu
class TestOnCuda:
    @pytest.fixture
    def device(self) -> torch.device:
        return torch.device("cuda:0")

    @pytest.fixture
    def rows(self, device: torch.device) -> list[Tensor]:
        return [batch.to(device) for batch in draw(SIZES * 4)]

    def expected(self, images: Tensor, rows: list[Tensor]) -> list[Tensor]:
        return [images[batch.cpu()] for batch in rows]

    def feeds(self, images: Tensor, device: torch.device) -> tuple[Feed, Feed]:
        return open_feed(images, device), open_feed(images.to(device), device)

    def test_the_same_bytes_from_the_host_and_from_the_device(
        self, images: Tensor, file: Path, device: torch.device, rows: list[Tensor]
    ) -> None:
        expected = self.expected(images, rows)
        for feed, kind in zip(self.feeds(mapped(file), device), (Streamed, Resident), strict=True):
            assert isinstance(feed, kind)
            for _ in range(2):
                found = clones(feed.batches(rows))
                assert all(batch.device == device for batch in found)
                assert_same([batch.cpu() for batch in found], expected)
            assert_same([feed.take(batch).cpu() for batch in rows], expected)

    def test_an_unnumbered_device_is_the_current_one(self, images: Tensor, device: torch.device) -> None:
        unnumbered = torch.device("cuda")
        assert isinstance(open_feed(images.to(device), unnumbered), Resident)
        rows = draw()
        assert_same([b.cpu() for b in clones(Streamed(images, unnumbered).batches(rows))], [images[r] for r in rows])

    def test_after_the_first_batch_nothing_waits_for_the_device(
        self, images: Tensor, device: torch.device, rows: list[Tensor]
    ) -> None:
        for feed in self.feeds(images, device):
            total = torch.zeros((), dtype=torch.int64, device=device)
            batches = feed.batches(rows)
            total += next(batches).sum()
            with forbidden_waits(device):
                for batch in batches:
                    total += batch.sum()
            assert total.item() == sum(batch.sum().item() for batch in self.expected(images, rows))

    def test_the_host_buffers_are_pinned_and_all_buffers_are_kept(
        self, images: Tensor, device: torch.device, rows: list[Tensor]
    ) -> None:
        feed = Streamed(images, device)
        first = {batch.data_ptr() for batch in feed.batches(rows)}
        hosts = [buffer._host for buffer in feed._idle[0]]
        assert all(host.is_pinned() for host in hosts)
        assert {batch.data_ptr() for batch in feed.batches(rows)} == first
        assert len(first) == 2
        assert {buffer._host.data_ptr() for buffer in feed._idle[0]} == {host.data_ptr() for host in hosts}

    @pytest.mark.parametrize("own_stream", [False, True])
    def test_a_slow_consumer_still_sees_its_own_batch(
        self, images: Tensor, device: torch.device, rows: list[Tensor], own_stream: bool
    ) -> None:
        """The device reads each batch long after the host requested the next ones."""
        stream = torch.cuda.Stream(device) if own_stream else torch.cuda.current_stream(device)
        found = []
        with torch.cuda.stream(stream):
            for batch in Streamed(images, device).batches(rows):
                torch.cuda._sleep(5_000_000)  # cycles: some milliseconds
                found.append(batch.clone())
        stream.synchronize()
        assert_same([batch.cpu() for batch in found], self.expected(images, rows))

    def test_a_slow_producer_does_not_corrupt_batches(
        self, images: Tensor, device: torch.device, rows: list[Tensor]
    ) -> None:
        """Copies wait for other work on their stream, so the consumer's kernels are launched first."""

        def delay() -> None:
            with torch.cuda.stream(_copy_stream(device)):
                torch.cuda._sleep(5_000_000)

        found = clones(Streamed(Watched.of(images, delay), device).batches(rows))
        assert_same([batch.cpu() for batch in found], self.expected(images, rows))

    def test_stopping_early_does_not_overwrite_a_batch_in_use(
        self, images: Tensor, device: torch.device, rows: list[Tensor]
    ) -> None:
        feed, stream = Streamed(images, device), torch.cuda.Stream(device)
        batches = feed.batches(rows)
        with torch.cuda.stream(stream):
            batch = next(batches)
            torch.cuda._sleep(50_000_000)
            late = batch.clone()
        batches.close()  # type: ignore[attr-defined]  # on another stream than the batch is read on
        following = clones(feed.batches(rows[1:]))
        stream.synchronize()
        assert torch.equal(late.cpu(), images[rows[0].cpu()])
        assert_same([b.cpu() for b in following], self.expected(images, rows[1:]))

    def test_freed_buffers_are_not_reused_while_in_use(
        self, images: Tensor, device: torch.device, rows: list[Tensor]
    ) -> None:
        found = []
        for _ in range(5):  # each feed frees its memory while reads are pending
            for batch in Streamed(images, device).batches(rows[:3]):
                torch.cuda._sleep(5_000_000)
                found.append(batch.clone())
        assert_same([batch.cpu() for batch in found], self.expected(images, rows[:3]) * 5)

    def test_an_invalid_row_raises_indexerror_on_the_host(
        self, images: Tensor, device: torch.device, rows: list[Tensor]
    ) -> None:
        faulty = [*rows[:2], torch.tensor([N], device=device)]
        with pytest.raises(IndexError):
            clones(Streamed(images, device).batches(faulty))
        torch.cuda.synchronize(device)
