"""What a device has to give, and what each of several trials gets of it."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from core.errors import UserError
from hpo.packing import Limit
from hpo.workers.messages import Share

# What a process holds of a GPU beside torch's allocator: CUDA's context and the kernels that it has loaded, 0.3 to
# 0.6 GB on GPUs from Volta to Hopper (nvidia-smi beside torch.cuda.memory_reserved).
CONTEXT_BYTES = 600 * 2**20


@dataclass(frozen=True)
class Capacity:
    """What a device had free before the first worker began."""

    threads: int
    """That torch uses in a process that is alone: the cores, unless OMP_NUM_THREADS says otherwise."""
    cores: int
    memory_bytes: int
    """Free, of the device; of the machine, where the device is its CPU."""
    gpu_bytes: int | None
    """The GPU's whole memory; None without one."""

    def share(self, trials: int) -> Share:
        """What each of so many trials at once may have.

        On a GPU torch keeps each to its share of the memory, so that what runs out of it is a configuration that is
        too large, which the sampler is to learn, and never one whose neighbour was. Threads beyond the cores would
        only get into each other's way.

        Raises:
            UserError: a share of the GPU's memory is not even enough for a process.
        """
        threads = max(1, self.threads // trials)
        if self.gpu_bytes is None:
            return Share(threads, None)
        fraction = (self.memory_bytes / trials - CONTEXT_BYTES) / self.gpu_bytes
        if fraction <= 0:
            most = self.memory_bytes // (2 * CONTEXT_BYTES)
            raise UserError(f"--per-device {trials}: so many do not fit the GPU's memory; give at most {most}")
        return Share(threads, min(fraction, 1.0))

    def limit(self) -> Limit:
        """What bounds the number of trials at once that is worth trying: on a CPU its cores, and the memory."""
        if self.gpu_bytes is not None:
            return Limit(self.memory_bytes)
        why = f"the CPU has {self.cores} core{'' if self.cores == 1 else 's'}"
        return Limit(self.memory_bytes, self.cores, why)


def free_capacity(device: torch.device) -> Capacity:
    """What the device has now, beside what this process and others hold of it."""
    threads, cores = torch.get_num_threads(), _cores()
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return Capacity(threads, cores, free, whole)
    return Capacity(threads, cores, _free_memory_bytes(), None)


def occupy(share: Share, device: torch.device) -> None:
    """Keeps this process to its share from now on.

    What torch's allocator holds beyond it is given back before anything is refused.
    """
    torch.set_num_threads(share.threads)
    if share.memory_fraction is not None:
        torch.cuda.set_per_process_memory_fraction(share.memory_fraction, device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory of the device that this process has held; of the machine, where the device is its CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) + CONTEXT_BYTES
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) of macOS counts bytes, that of Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _free_memory_bytes() -> int:
    """What the kernel says can be had without swapping, or what a container leaves of its limit."""
    group = Path("/sys/fs/cgroup")
    bounds = []
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        bounds.append(int(fields["MemAvailable"].split()[0]) * 1024)
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            bounds.append(int(most) - int((group / "memory.current").read_text()))
    except (OSError, KeyError, ValueError):
        pass  # no Linux, or no such group
    return min(bounds) if bounds else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
