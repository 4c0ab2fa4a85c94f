"""Device, precision, memory and random number generators of a training."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor, nn

from core.errors import ConfigError, UserError
from core.seeds import derive_seed
from core.text import count


def select_device(name: str | None = None, *, option: str = "--device") -> torch.device:
    """Return the named device, by default the first GPU or else the CPU.

    Raises:
        UserError: there is no such device; the message names `option`.
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
        devices = torch.cuda.device_count()
        if (device.index or 0) >= devices:
            has = count(devices, "CUDA device") if devices else "no GPU"
            raise UserError(f"{option} {name}: this machine has {has}; give cpu or omit it")
        return torch.device("cuda", device.index or 0)
    return device


def describe_device(device: torch.device) -> str:
    """Return the GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {count(torch.get_num_threads(), 'thread')}"


@functools.cache
def keep_freed_memory() -> None:
    """Keep freed memory in this process for the next tensors. For CPUs, and the GNU C library only.

    By default it takes large blocks from the system, page by page, and returns them at once. EfficientNet-Lite0 at 128²
    spends 60 % of its time on that in evaluation, and 20 % in training at 96² (batches of 512 and 64, one thread).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return
    for parameter in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        mallopt(parameter, 2**31 - 1)


def release_freed_memory() -> None:
    """Return to the system what `keep_freed_memory` has kept."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> float:
    """Wait for the device, and return a time in seconds for differences."""
    synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """On CUDA, run the body on a stream that can be captured, reused so that its freed memory is too."""
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
def noticed_waits(device: torch.device) -> Iterator[list[str]]:
    """On CUDA, collect the places in Python (`file.py:line`) where the host waits for the device within the body."""
    found: list[str] = []
    if device.type != "cuda":
        yield found
        return
    with warnings.catch_warnings(record=True) as caught, _sync_debug_mode("warn"):
        warnings.simplefilter("always")
        yield found
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            found.append(f"{Path(warning.filename).name}:{warning.lineno}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@contextlib.contextmanager
def allowed_waits() -> Iterator[None]:
    """Suspend `noticed_waits`."""
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
    """Return the context of `precision.autocast`."""
    enabled = compute_dtype(mode, device) == torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def compute_dtype(mode: str, device: torch.device) -> torch.dtype:
    """Return the dtype of `precision.autocast`: bfloat16 or float32."""
    automatic = mode == "auto" and device.type == "cuda" and _computes_in_bfloat16(device)
    return torch.bfloat16 if mode == "bf16" or automatic else torch.float32


def check_autocast(mode: str, device: torch.device) -> None:
    """Raise ConfigError if a GPU would only emulate the dtype of `precision.autocast`."""
    if mode == "bf16" and device.type == "cuda" and not _computes_in_bfloat16(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise ConfigError(
            f"precision.autocast: bf16 needs a GPU of compute capability 8.0 or higher, and {describe_device(device)} "
            f"has {major}.{minor}; set it to auto"
        )


def _computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the GPU does not only emulate it, which `torch.cuda.is_bf16_supported` also counts."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@contextlib.contextmanager
def tuned_convolutions(device: torch.device) -> Iterator[None]:
    """On CUDA, let cuDNN time its algorithms when it meets a convolution for the first time, in this process."""
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        yield
    finally:
        cudnn.benchmark = before


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device is out of memory. The CPU and CUDA's libraries raise a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or _names_any(error, _OUT_OF_MEMORY)


def may_be_out_of_memory(error: BaseException) -> bool:
    """Return whether the cause may be a lack of memory. Then a part of the batch may work."""
    return is_out_of_memory(error) or (isinstance(error, RuntimeError) and _names_any(error, _PERHAPS_OUT_OF_MEMORY))


def _names_any(error: BaseException, words: Sequence[str]) -> bool:
    text = str(error).lower()
    return any(word in text for word in words)


_OUT_OF_MEMORY = (
    "can't allocate memory", "cuda error: out of memory", "cuda ran out of memory",
    "alloc_failed",  # of cuBLAS, cuFFT, cuSOLVER
    "allocation_failed",  # of cuDNN
)  # fmt: skip
# Messages of cuDNN without room for a workspace, and of libraries without room for their kernels. Other causes are
# possible (github.com/pytorch/pytorch/issues/17774 and 81620).
_PERHAPS_OUT_OF_MEMORY = (
    "unable to find an engine", "unable to find a valid cudnn algorithm",
    "status_not_initialized", "status_internal_error", "status_execution_failed",
)  # fmt: skip


def free_memory(device: torch.device) -> int:
    """Return an upper bound of the bytes that tensors may still use, within the process's limits."""
    if device.type == "cpu":
        return _free_host_memory(Path("/"))
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return max(min(free, allowed - reserved), 0) + reserved - allocated


def _free_host_memory(root: Path) -> int:
    """Free CPU memory; `root` is / except in tests."""
    return max(min([_available(root), *_left_by_control_groups(root)]), 0)


def _available(root: Path) -> int:
    """Free CPU memory of the machine. Without psutil under Linux: a training there needs no other library."""
    if sys.platform == "linux":
        lines = (root / "proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    import psutil

    return int(psutil.virtual_memory().available)


def _left_by_control_groups(root: Path) -> Iterator[int]:
    """Memory left by each control group (v1 or v2). In a container, listed paths may be the host's and missing."""
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


def make_generator(device: torch.device, *parts: int | str) -> torch.Generator:
    """Return a generator seeded with `derive_seed(*parts)`."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


def seed_global(device: torch.device, *parts: int | str) -> None:
    """Seed the global generators of CPU and device. `torch.manual_seed` seeds all devices, in a millisecond."""
    seed = derive_seed(*parts)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode in the body, then restore each module's mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def isolated_rng(device: torch.device) -> Iterator[None]:
    """Restore torch's global generators after the body."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images (N, C, H, W) float, channels_last."""
    if images.shape[-2:] == size:
        return images
    # On two cores 12 ms for 256 × 3 × 96² to 72². Area averaging took 17 ms, and weights pixels unevenly at fractional
    # ratios. Not implemented for bf16 on a CPU.
    smaller = torch.nn.functional.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
    return smaller.to(images.dtype, memory_format=torch.channels_last)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalize (N, C, H, W) uint8 to float32 channels_last, by the mean and std of pixels in [0, 1] per channel."""
    return normalize_by(images, *scale_and_shift(mean, std, images.device))


def normalize_by(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`normalize` with the result of `scale_and_shift`."""
    pixels = images.to(torch.float32, memory_format=torch.channels_last)
    scale, shift = (spread(constants, images.shape, torch.channels_last) for constants in (scale, shift))
    return torch.addcmul(shift, pixels, scale)


def spread(constants: Tensor, shape: Sequence[int], layout: torch.memory_format) -> Tensor:
    """Expand constants (1, C, 1, 1) to an image of a batch's `shape`: a CPU's addcmul is then ten times as fast."""
    return constants.expand(1, *shape[1:]).contiguous(memory_format=layout)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # inference tensors cannot be used elsewhere
def scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the factor and offset (1, C, 1, 1) that normalize a pixel.

    Cached, since copying to the device waits. The owner of a CUDA graph must keep a reference.
    """
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
