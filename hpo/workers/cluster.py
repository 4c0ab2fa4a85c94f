"""`--engine ray`: the workers of a run on a Ray cluster, which places them itself."""

from __future__ import annotations

from collections.abc import Callable

from core.errors import UserError
from hpo.workers.engine import Engine, WorkerSlot, WorkerSpec, worker_slots
from hpo.workers.placement import is_count
from hpo.workers.ray import RayEngine


def check_options(*, device: str | None, devices: str | None, per_device: str | None) -> None:
    """Raise UserError for options that contradict the cluster's own placement of workers."""
    if devices is not None:
        raise UserError("--devices names GPUs of one machine; with --engine ray leave it out, and give --workers")
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device}: with --engine ray give cpu or cuda: Ray chooses which")
    if per_device is not None and not is_count(per_device):
        raise UserError(f"--per-device {per_device}: with --engine ray give a whole number from 1 on")
    if device == "cpu" and per_device is not None:
        raise UserError("--per-device: on CPUs Ray gives each worker a core of its own; give --workers instead")


def engine_and_slots(
    spec: WorkerSpec,
    *,
    address: str,
    device: str | None,
    per_device: str | None,
    workers: int | None,
    say: Callable[[str], None],
) -> tuple[Engine, list[WorkerSlot]]:
    """Connect to the cluster. The workers take all its room, or as much as was asked for.

    Args:
        spec: the study.
        address: the head's `host:port`, or `auto`.
        device: `cpu` or `cuda`; None for a GPU per worker if the cluster has one, else a core.
        per_device: how many workers share a GPU.
        workers: their largest number.
        say: shows the user one line.
    """
    engine = RayEngine(address)
    nodes = engine.nodes()
    on_gpus = any(node.gpus for node in nodes) if device is None else device == "cuda"
    if on_gpus:
        engine.num_gpus = 1 / int(per_device or 1)
    engine.check(spec)
    room = engine.room()
    size = min(workers or room, room)
    kind = "GPU" if on_gpus else "core"
    share = f" (a GPU for {per_device})" if on_gpus and per_device not in (None, "1") else ""
    say(f"Ray: {len(nodes)} nodes with room for {room} workers, each on a {kind}{share}; starting {size}")
    if workers is not None and workers > room:
        say(f"--workers {workers}: the cluster has no more room now; the others are not started")
    return engine, worker_slots("cuda" if on_gpus else "cpu", size, engine.resources())
