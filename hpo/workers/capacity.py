"""The free memory and threads of a device, and their division among several trials."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from core.errors import UserError
from core.runtime import free_memory
from core.text import count
from hpo.workers.engine import Resources

# GPU memory of a process outside torch's allocator: CUDA's context and kernels, 0.3 to 0.6 GB from Volta to Hopper
# (nvidia-smi minus torch.cuda.memory_reserved). A calibration measures it, with the graphs.
CONTEXT_BYTES = 600 * 2**20
# Resident memory of a worker that trains a small network on the CPU, on Linux.
WORKER_BYTES = 900 * 10**6


@dataclass(frozen=True)
class Capacity:
    """The free resources of a device before the first worker started."""

    threads: int
    """torch's, in a single process: the cores, unless OMP_NUM_THREADS is set."""
    cores: int
    memory_bytes: int
    """Free on the device."""
    gpu_bytes: int | None
    """The GPU's total memory; None on a CPU."""

    def share(self, trials: int) -> Resources:
        """Divide the device evenly, so that no configuration runs out of memory because of its neighbours."""
        fraction = None if self.gpu_bytes is None else self.memory_bytes / trials / self.gpu_bytes
        return Resources(max(1, self.threads // trials), fraction)

    @property
    def fitting(self) -> int:
        """The number of small trials at once that fit; at least 1."""
        each = WORKER_BYTES if self.gpu_bytes is None else 2 * CONTEXT_BYTES  # as much for tensors as for the context
        return max(1, self.memory_bytes // each)

    @property
    def useful(self) -> int | None:
        """The largest sensible number of trials at once: a CPU's cores; None without a bound."""
        return self.cores if self.gpu_bytes is None else None

    @property
    def why_useful(self) -> str:
        return f"the CPU has {count(self.cores, 'core')}"

    def check(self, trials: int, *, asked: str) -> None:
        """Raise UserError if so many trials at once do not fit; `asked` is the option that set the number."""
        free = f"{self.memory_bytes / 1e9:.1f} GB"
        if self.gpu_bytes is None:
            if trials > self.fitting:  # a single one may need less than the estimate
                raise UserError(
                    f"{asked}: {trials} processes do not fit the {free} of free memory, "
                    f"at about {WORKER_BYTES / 1e9:.1f} GB each; give at most {self.fitting}"
                )
        elif self.memory_bytes <= CONTEXT_BYTES:
            raise UserError(
                f"{asked}: not even one process fits the GPU's free memory, {free}; "
                "end other programs that use it, or give another --device"
            )
        elif self.memory_bytes <= trials * CONTEXT_BYTES:
            raise UserError(
                f"{asked}: {trials} processes do not fit the {free} of free GPU memory; give at most {self.fitting}"
            )


def free_capacity(device: torch.device) -> Capacity:
    """Measure what the device has free now."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
    return Capacity(torch.get_num_threads(), cores, free_memory(device), total)


def occupy(resources: Resources, device: torch.device) -> None:
    """Limit this process to its resources on the device."""
    torch.set_num_threads(resources.threads)
    if device.type != "cuda":
        return
    torch.cuda.set_device(device)
    if resources.memory_fraction is not None:
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(resources.memory_fraction - CONTEXT_BYTES / total, device)


def used_memory_bytes(device: torch.device, free_before: int | None = None) -> int:
    """Return this process's memory: its peak on a GPU, or its resident memory on a CPU.

    On a GPU this is the most that torch's allocator held, CUDA graphs' pools included, and the memory outside of it:
    the context, the libraries' kernels and the graphs themselves.

    Args:
        device: of this process.
        free_before: the GPU's free bytes before this process used it, if no other process has started since. None
            estimates the memory outside of the allocator.
    """
    if device.type != "cuda":
        return int(psutil.Process().memory_info().rss)
    outside = CONTEXT_BYTES
    if free_before is not None:
        free, _ = torch.cuda.mem_get_info(device)
        # At least the estimate: another program may have freed memory meanwhile.
        outside = max(outside, free_before - free - torch.cuda.memory_reserved(device))
    return torch.cuda.max_memory_reserved(device) + outside


def runs_mps() -> bool:
    """Return whether NVIDIA's Multi-Process Service runs, without which processes use a GPU in turns."""
    if sys.platform != "linux":
        return False
    # As CUDA finds it. The socket of a daemon that has ended remains, but refuses connections.
    control = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")) / "control"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        try:
            client.connect(str(control))
        except OSError:
            return False
    return True
