"""`--engine ray`: the workers of a run on a Ray cluster, which places them itself."""

from __future__ import annotations

from core.errors import UserError
from hpo.cli.console import say
from hpo.workers import Crew, Engine, Job
from hpo.workers.packing import Limit
from hpo.workers.placement import is_count
from hpo.workers.ray import RayEngine


def check_options(*, device: str | None, devices: str | None, per_device: str | None) -> None:
    """Refuses what a cluster that places workers itself cannot heed.

    Raises:
        UserError: an option means this machine's devices, or is no number.
    """
    if devices is not None:
        raise UserError("--devices names GPUs of one machine; with --engine ray leave it out, and give --workers")
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device}: with --engine ray give cpu or cuda: Ray chooses which")
    if per_device is not None and (not is_count(per_device)):
        raise UserError(f"--per-device {per_device}: with --engine ray give a whole number from 1 on")
    if device == "cpu" and per_device is not None:
        raise UserError("--per-device: on CPUs Ray gives each worker a core of its own; give --workers instead")


def engine_and_crew(
    job: Job, *, address: str, device: str | None, per_device: str | None, workers: int | None
) -> tuple[Engine, Crew]:
    """Connects to the cluster; the workers take what there is, or as many places as were asked for.

    Args:
        device: `cpu` or `cuda`; None is a GPU for each worker where the cluster has one, and else a core.
        per_device: how many workers share a GPU.
    """
    engine = RayEngine(address)
    nodes = engine.nodes()
    on_gpus = any(node.gpus for node in nodes) if device is None else device == "cuda"
    if on_gpus:
        engine.num_gpus = 1 / int(per_device or 1)
    engine.check(job)
    room = engine.room()
    size = min(workers or room, room)
    kind = "GPU" if on_gpus else "core"
    share = f" (a GPU for {per_device})" if on_gpus and per_device not in (None, "1") else ""
    say(f"Ray: {len(nodes)} nodes with room for {room} workers, each on a {kind}{share}; {size} of them")
    if workers is not None and workers > room:
        say(f"--workers {workers}: there is no more room now; the others are not started")
    return engine, Crew("cuda:0" if on_gpus else "cpu", "ray", size, engine.share, Limit(0))
