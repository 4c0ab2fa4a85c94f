"""The free memory and threads of a device, and their division among several trials."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import psutil
import torch

from core.errors import UserError
from core.runtime import free_memory
from hpo.workers.engine import Resources

# Memory of a GPU that a process holds beside torch's allocator: CUDA's context and loaded kernels, 0.3 to 0.6 GB on
# GPUs from Volta to Hopper (nvidia-smi minus torch.cuda.memory_reserved).
CONTEXT_BYTES = 600 * 2**20
# Resident memory of a worker that trains a small network on the CPU, on Linux.
WORKER_BYTES = 900 * 10**6


@dataclass(frozen=True)
class Limit:
    """Bounds on the number of trials at once."""

    memory_bytes: int
    """Free on the device before the first trial."""
    trials: int | None = None
    """The largest number that makes sense; None for any."""
    why: str = ""
    """The reason for `trials`: `the CPU has 2 cores`."""


@dataclass(frozen=True)
class Capacity:
    """The free resources of a device before the first worker started."""

    threads: int
    """torch's, in a process that is alone: the cores, unless OMP_NUM_THREADS is set."""
    cores: int
    memory_bytes: int
    """Free on the device; free on the machine if the device is its CPU."""
    gpu_bytes: int | None
    """The GPU's total memory; None without one."""

    def share(self, trials: int) -> Resources:
        """Divide the device evenly among so many trials, which `check` has accepted.

        torch limits each process to its part of the GPU's memory, so that only a configuration that is too large runs
        out of it, which the sampler has to learn, and never one with a large neighbour. More threads than cores would
        slow each other down.
        """
        threads = max(1, self.threads // trials)
        if self.gpu_bytes is None:
            return Resources(threads, None)
        fraction = (self.memory_bytes / trials - CONTEXT_BYTES) / self.gpu_bytes
        return Resources(threads, min(fraction, 1.0))

    @property
    def most(self) -> int:
        """The number of trials at once that fit if each needs little memory; at least 1.

        On a GPU each is given as much for its tensors as its process takes for itself.
        """
        each = WORKER_BYTES if self.gpu_bytes is None else 2 * CONTEXT_BYTES
        return max(1, self.memory_bytes // each)

    def check(self, trials: int, *, asked: str) -> None:
        """Check that so many processes fit.

        Args:
            trials: number of trials at once.
            asked: the option that asked for them: `--per-device auto`.

        Raises:
            UserError: the free memory is too small.
        """
        free = f"{self.memory_bytes / 1e9:.1f} GB"
        if self.gpu_bytes is None:
            if trials > max(1, self.most):  # a single one may need less than the estimate
                raise UserError(
                    f"{asked}: {trials} processes do not fit the {free} of free memory, "
                    f"at about {WORKER_BYTES / 1e9:.1f} GB each; give at most {self.most}"
                )
        elif self.memory_bytes <= CONTEXT_BYTES:
            raise UserError(
                f"{asked}: not even one process fits the GPU's free memory, {free}; "
                "end other programs that use it, or give another --device"
            )
        elif self.memory_bytes <= trials * CONTEXT_BYTES:
            raise UserError(
                f"{asked}: {trials} processes do not fit the {free} of free GPU memory; give at most {self.most}"
            )

    def limit(self) -> Limit:
        """Return the bounds on the number of trials that is worth trying: the memory, and on a CPU its cores."""
        if self.gpu_bytes is not None:
            return Limit(self.memory_bytes)
        return Limit(self.memory_bytes, self.cores, f"the CPU has {self.cores} core{'' if self.cores == 1 else 's'}")


def free_capacity(device: torch.device) -> Capacity:
    """Measure what the device has free now."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
    return Capacity(torch.get_num_threads(), cores, free_memory(device), total)


def occupy(resources: Resources, device: torch.device) -> None:
    """Limit this process to its resources.

    torch's allocator returns unused memory beyond the limit before it refuses an allocation.
    """
    torch.set_num_threads(resources.threads)
    if resources.memory_fraction is not None:
        torch.cuda.set_per_process_memory_fraction(resources.memory_fraction, device)


def used_memory_bytes(device: torch.device) -> int:
    """Memory of the device that this process uses: its peak on a GPU, its resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) + CONTEXT_BYTES
    return int(psutil.Process().memory_info().rss)
