"""The devices that train a run's trials, and the number of workers on each.

`--per-device K` is the number per device, `--workers N` the total. One trial at a time on one device runs in the
parent's process, unless `--workers 1` is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from core.errors import UserError
from core.runtime import describe_device, select_device
from core.text import count


@dataclass(frozen=True)
class Placement:
    """Devices, and the workers on each."""

    devices: tuple[torch.device, ...]
    workers: tuple[int | None, ...]
    """By device; None if the number has to be measured."""
    in_processes: bool
    """Whether even a single worker has a process of its own."""
    asked: str
    """The option that set the number, for messages."""

    @property
    def none(self) -> bool:
        """Whether no worker runs here."""
        return not any(number is None or number > 0 for number in self.workers)

    def described(self) -> str:
        """Describe the devices, each once."""
        return ", ".join(dict.fromkeys(map(describe_device, self.devices)))

    def __iter__(self) -> Iterator[tuple[torch.device, int | None]]:
        return zip(self.devices, self.workers, strict=True)


def place(device: str | None, devices: str | None, workers: int | None, per_device: str | None) -> Placement:
    """Resolve the options `--device`, `--devices`, `--workers` and `--per-device`.

    Raises:
        UserError: they contradict each other, or this machine lacks a device.
    """
    found = _devices(device, devices)
    each = _per_device(per_device)
    if workers == 0:
        return Placement(found, (0,) * len(found), in_processes=True, asked="--workers 0")
    if per_device == "auto":
        if workers is not None:
            raise UserError(f"--workers {workers}: --per-device auto measures the number; leave one of the two out")
        return Placement(found, (None,) * len(found), in_processes=len(found) > 1, asked="--per-device auto")
    if workers is None:
        number = each or 1
        asked = f"--per-device {number}"
        return Placement(found, (number,) * len(found), in_processes=len(found) * number > 1, asked=asked)
    if workers < len(found):
        raise UserError(f"--workers {workers}: fewer than the {len(found)} devices; give as many, or fewer --devices")
    if each is not None and workers > each * len(found):
        raise UserError(
            f"--workers {workers}: {count(len(found), 'device')} with --per-device {each} take {each * len(found)}; "
            "leave one of the two out"
        )
    whole, rest = divmod(workers, len(found))
    sizes = tuple(whole + (number < rest) for number in range(len(found)))
    return Placement(found, sizes, in_processes=True, asked=f"--workers {workers}")


def place_on_cluster(device: str | None, devices: str | None, workers: int | None, per_device: str | None) -> Placement:
    """Check the same options for a Ray cluster, which places its workers itself. Returns this machine's placement.

    Raises:
        UserError: an option names this machine's devices, or is not a number.
    """
    if devices is not None:
        raise UserError("--devices names GPUs of one machine; with --engine ray leave it out, and give --workers")
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device}: with --engine ray give cpu or cuda: Ray chooses which")
    if per_device is not None and not _is_count(per_device):
        raise UserError(f"--per-device {per_device}: with --engine ray give a whole number from 1 on")
    if device == "cpu" and per_device is not None:
        raise UserError("--per-device: on CPUs Ray gives each worker a core of its own; give --workers instead")
    return place(None, None, 0 if workers == 0 else None, None)


def _devices(device: str | None, devices: str | None) -> tuple[torch.device, ...]:
    if devices is None:
        return (select_device(device),)
    if device is not None:
        raise UserError("--device and --devices: give one of the two")
    if devices == "all":
        if not torch.cuda.device_count():
            raise UserError("--devices all: this machine has no GPU; leave it out for the CPU")
        return tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    names = [name.strip() for name in devices.split(",")]
    if not all(names):
        raise UserError(f"--devices {devices}: a name is missing; give cuda:0,cuda:1, or all")
    found = tuple(select_device(name, option="--devices") for name in names)
    twice = [name for name, number in zip(names, found, strict=True) if found.count(number) > 1]
    if twice:
        raise UserError(f"--devices {devices}: {twice[0]} is there twice; --per-device sets how many trials it takes")
    return found


def _is_count(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def _per_device(per_device: str | None) -> int | None:
    if per_device is None or per_device == "auto":
        return None
    if not _is_count(per_device):
        raise UserError(f"--per-device {per_device}: give a whole number from 1 on, or auto")
    return int(per_device)
