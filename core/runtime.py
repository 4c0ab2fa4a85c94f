"""The machine that a training runs on: its device, its arithmetic, its randomness."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from core.errors import UserError


def select_device(name: str | None = None) -> torch.device:
    """The device of that name, or the first CUDA device, or the CPU.

    Raises:
        UserError: the name is no device, or this machine lacks it.
    """
    if name is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such device; give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: give cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UserError(f"--device {name}: this machine has {count} CUDA device(s); give cpu or leave it out")
        return torch.device("cuda", device.index or 0)
    return device


def describe_device(device: torch.device) -> str:
    """The device in words: its name and, for the CPU, the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given, so that a clock read next tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def autocast(mode: str, device: torch.device) -> torch.autocast:
    """The context for `precision.autocast`: `auto` is bf16 on CUDA and off elsewhere."""
    enabled = mode == "bf16" or (mode == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device could not give what was asked for. The CPU's allocator says so in a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on all parts: (study seed, trial), (trial seed, "epoch", 7)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(device: torch.device, *parts: int | str) -> torch.Generator:
    """A generator on the device, seeded by `derive_seed(*parts)`."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


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
    # One constant a channel, laid out as an image: addcmul walks along with it, and broadcasts to no stride.
    shape = (1, *images.shape[1:])
    scale, shift = (
        constants.expand(shape).contiguous(memory_format=torch.channels_last)
        for constants in _scale_and_shift(mean, std, images.device)
    )
    pixels = images.to(torch.float32, memory_format=torch.channels_last)
    return torch.addcmul(shift, pixels, scale)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # whoever asks first: what is made in inference mode can take part in nothing else
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(1, C, 1, 1) each, kept: to copy numbers from the host to the device waits for it."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
