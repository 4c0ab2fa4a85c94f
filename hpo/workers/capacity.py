"""What a device has to give, and what each of several trials gets of it."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from core.errors import UserError
from core.runtime import free_memory
from hpo.workers.messages import Share
from hpo.workers.packing import Limit

# What a process holds of a GPU beside torch's allocator: CUDA's context and the kernels that it has loaded, 0.3 to
# 0.6 GB on GPUs from Volta to Hopper (nvidia-smi beside torch.cuda.memory_reserved).
CONTEXT_BYTES = 600 * 2**20
# What a worker holds of the machine where it trains a small network on the CPU: Python, torch and its buffers, about
# 0.9 GB of resident memory on Linux.
WORKER_BYTES = 900 * 10**6


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
        only get into each other's way. So many have to fit: `check` says so before.
        """
        threads = max(1, self.threads // trials)
        if self.gpu_bytes is None:
            return Share(threads, None)
        fraction = (self.memory_bytes / trials - CONTEXT_BYTES) / self.gpu_bytes
        return Share(threads, min(fraction, 1.0))

    @property
    def most(self) -> int:
        """How many trials at once the memory holds where each needs little: at least 1, which needs no other process.

        On a GPU, each with as much for its tensors as its process takes for itself.
        """
        each = WORKER_BYTES if self.gpu_bytes is None else 2 * CONTEXT_BYTES
        return max(1, self.memory_bytes // each)

    def check(self, trials: int, *, asked: str) -> None:
        """Refuses more trials at once than there can be processes.

        Args:
            trials: so many at once.
            asked: the option that said so, as it was given: `--per-device auto`.

        Raises:
            UserError: the free memory is too small for them.
        """
        free = f"{self.memory_bytes / 1e9:.1f} GB"
        if self.gpu_bytes is None:
            # One alone is never refused: it takes what is there, and how little it needs is not known here.
            if trials > self.most:
                raise UserError(
                    f"{asked}: {trials} processes do not fit the {free} of free memory, "
                    f"at about {WORKER_BYTES / 1e9:.1f} GB each; give at most {self.most}"
                )
        elif self.memory_bytes <= CONTEXT_BYTES:
            raise UserError(
                f"{asked}: not even one process fits what the GPU has free, {free}; "
                "end what else holds its memory, or give another --device"
            )
        elif self.memory_bytes <= trials * CONTEXT_BYTES:
            raise UserError(
                f"{asked}: {trials} processes do not fit the {free} of free GPU memory; give at most {self.most}"
            )

    def limit(self) -> Limit:
        """What bounds the number of trials at once that is worth trying: on a CPU its cores, and the memory."""
        if self.gpu_bytes is not None:
            return Limit(self.memory_bytes)
        why = f"the CPU has {self.cores} core{'' if self.cores == 1 else 's'}"
        return Limit(self.memory_bytes, self.cores, why)


def free_capacity(device: torch.device) -> Capacity:
    """What the device has now, beside what this process and others hold of it."""
    threads, cores = torch.get_num_threads(), _cores()
    whole = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
    return Capacity(threads, cores, free_memory(device), whole)


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
    if sys.platform == "linux":
        # Not ru_maxrss, which survives fork and exec there: a worker would begin with its parent's peak.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) of macOS counts bytes, those of the BSDs KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
