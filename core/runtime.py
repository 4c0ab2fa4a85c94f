"""The machine that a training runs on: its device, its arithmetic, its randomness."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from core.errors import UserError


def select_device(name: str | None = None, *, option: str = "--device") -> torch.device:
    """The device of that name, or the first CUDA device, or the CPU.

    Args:
        option: the one that the name was given by, for what is said of it.

    Raises:
        UserError: the name is no device, or this machine lacks it.
    """
    if name is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{option} {name}: no such device; give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"{option} {name}: give cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            has = f"{count} CUDA device(s)" if count else "no GPU"
            raise UserError(f"{option} {name}: this machine has {has}; give cpu or leave it out")
        return torch.device("cuda", device.index or 0)
    return device


def describe_device(device: torch.device) -> str:
    """The device in words: its name and, for the CPU, the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'' if threads == 1 else 's'}"


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given, so that a clock read next tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> float:
    """Seconds, read once the device has caught up; only their differences mean something."""
    synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """On CUDA, runs what is inside on a stream of its own, after all that was asked of the device, before what will be.

    A CUDA graph can be captured on any stream but torch's default one, and what it shares memory with has to run on the
    same. It is always the same stream, so that memory which one training leaves can be had by the next.
    """
    if device.type != "cuda":
        yield
        return
    stream, outer = _stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outer.wait_stream(stream)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def forbidden_waits(device: torch.device) -> Iterator[None]:
    """On CUDA, raises RuntimeError where torch would make the host wait for the device; elsewhere nothing waits."""
    if device.type != "cuda":
        yield
        return
    with _sync_debug_mode("error"):
        yield


@contextlib.contextmanager
def allowed_waits() -> Iterator[None]:
    """Lifts `forbidden_waits` inside of it, on CUDA."""
    with _sync_debug_mode("default"):
        yield


@contextlib.contextmanager
def _sync_debug_mode(mode: str) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def autocast(mode: str, device: torch.device) -> torch.autocast:
    """The context for `precision.autocast`: `auto` is bf16 on CUDA and off elsewhere."""
    enabled = compute_dtype(mode, device) == torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def compute_dtype(mode: str, device: torch.device) -> torch.dtype:
    """What a network computes in there under that `precision.autocast`: bfloat16 or float32."""
    return torch.bfloat16 if mode == "bf16" or (mode == "auto" and device.type == "cuda") else torch.float32


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device could not give what was asked for.

    The CPU's allocator says so in a plain RuntimeError, and so do CUDA and its libraries, which ask for memory of their
    own beside torch's allocator.
    """
    said = ("can't allocate memory", "CUDA error: out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


def free_memory(device: torch.device) -> int:
    """The bytes that tensors may still take on the device. An upper bound: memory can be free in pieces too small.

    On CUDA, what the driver has left, as far as `torch.cuda.set_per_process_memory_fraction` lets this process go, and
    what torch's allocator holds without using it (a live CUDA graph's pool included, which only that graph can use).

    On the CPU, the least of what the machine can give without swapping and of what the process's control groups (v1
    or v2, at their usual mount points) leave it. A system that does not tell what is available, as macOS, counts whole.

    Raises:
        OSError: the system does not even tell how much memory it has.
    """
    if device.type == "cpu":
        return _free_host_memory(Path("/"))
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return max(min(free, allowed - reserved), 0) + reserved - allocated


def _free_host_memory(root: Path) -> int:
    """`free_memory` of the CPU, by the files under `root`, which is / but in tests."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        machine = _whole_host_memory()
    return max(min([machine, *_left_by_control_groups(root)]), 0)


def _whole_host_memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError) as error:
        raise OSError("this system does not tell how much memory it has") from error


def _left_by_control_groups(root: Path) -> Iterator[int]:
    """What the limit of each group that this process is in leaves, its own and all above it.

    The cache of files that are not in use counts as used there, and is given up on demand. A container may see its own
    group as the root, and yet be told the path from outside; what does not exist there is passed over.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for controllers, path in (line.split(":", 2)[1:] for line in groups):
        if controllers == "":
            mount, limit, usage, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, usage = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        own = PurePosixPath(path)
        for group in (own, *own.parents):
            folder = root / mount / group.relative_to("/")
            with contextlib.suppress(OSError):
                allowed = (folder / limit).read_text(encoding="ascii").strip()
                if allowed != "max":
                    stat = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
                    yield int(allowed) - int((folder / usage).read_text("ascii")) + int(stat.get(cache, 0))


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on all parts: (study seed, trial), (trial seed, "epoch", 7)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(device: torch.device, *parts: int | str) -> torch.Generator:
    """A generator on the device, seeded by `derive_seed(*parts)`."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


def seed_global(device: torch.device, *parts: int | str) -> None:
    """Seeds torch's global generators of the CPU and of the device by `derive_seed(*parts)`.

    torch.manual_seed seeds every kind of device that torch knows, which takes a millisecond.
    """
    seed = derive_seed(*parts)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextlib.contextmanager
def isolated_rng(device: torch.device) -> Iterator[None]:
    """Lets a training seed torch's global generators, which initialisation and dropout use, and restores them."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Turns pixels into network input: (N, C, H, W) uint8 to float32 channels_last, zero mean and unit deviation.

    `mean` and `std` are of pixels in [0, 1], one a channel.
    """
    return normalize_by(images, *scale_and_shift(mean, std, images.device))


def normalize_by(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`normalize`, by what `scale_and_shift` made of its mean and std."""
    pixels = images.to(torch.float32, memory_format=torch.channels_last)
    scale, shift = (spread(constants, images.shape, torch.channels_last) for constants in (scale, shift))
    return torch.addcmul(shift, pixels, scale)


def spread(constants: Tensor, shape: Sequence[int], layout: torch.memory_format) -> Tensor:
    """One constant a channel, (1, C, 1, 1), as one image (1, C, H, W) of a batch of `shape` (N, C, H, W), laid out so.

    addcmul walks along with it, where it broadcasts to no stride: ten times as fast on a CPU.
    """
    return constants.expand(1, *shape[1:]).contiguous(memory_format=layout)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # whoever asks first: what is made in inference mode can take part in nothing else
def scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """What a pixel is multiplied by, and what is then added: (1, C, 1, 1) each.

    Kept, since to copy numbers from the host to the device waits for it. What a CUDA graph reads has to be held by
    whoever captures it: here it may be displaced.
    """
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
