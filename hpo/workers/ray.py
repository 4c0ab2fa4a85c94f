"""`--engine ray`: workers as actors of a Ray cluster. This is the head's side; `ray_actor.py` runs on the nodes.

Ray places workers and reports lost ones, but restarts nothing: the pool replaces them. Results go to the storage; the
head reads the workers' log, and requests it again where a reply was lost with a connection.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from core.text import count
from hpo.errors import StudyError
from hpo.paths import studies_root
from hpo.storage import is_journal, mask
from hpo.workers.engine import Engine, Exit, Output, Resources, Worker, WorkerSlot, WorkerSpec, worker_slots
from hpo.workers.local import own_name
from hpo.workers.ray_actor import Actor, Done, Item, Placed, node_id

logger = logging.getLogger(__name__)

# Seconds until connecting fails. Ray itself tries for a quarter of an hour.
_CONNECT_TIMEOUT_S = 5.0
# Seconds between two requests to a worker that is unreachable.
_ASK_AGAIN_S = 0.5
# Seconds until a warning that a worker has no node yet. A node needs some to start its process.
_PLACING_S = 30.0
# Seconds until a killed worker counts as dead if its node no longer reports it.
_DYING_S = 5.0
# Keep Ray's messages out of the head's terminal; read when Ray is imported. The pattern drops every line that its
# nodes report: the pool reports the same in one line.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^",
    "RAY_NUM_REDIS_GET_RETRIES": "1",
    # Under `uv run` Ray would send this folder to the nodes and start each worker with `uv run` there.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


def engine_and_slots(
    spec: WorkerSpec,
    *,
    address: str,
    device: str | None,
    per_device: str | None,
    workers: int | None,
    say: Callable[[str], None],
) -> tuple[Engine, list[WorkerSlot]]:
    """Connect to the cluster, and return slots for all its room, or for `workers`.

    Args:
        address: the head's `host:port`, or `auto`.
        device: `cpu` or `cuda`; None for GPUs if the cluster has any.
        per_device: how many workers share a GPU.
        workers: their largest number.
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
    cluster = f"{count(len(nodes), 'node')} with room for {count(room, 'worker')}"
    say(f"Ray: {cluster}, each on a {kind}{share}; starting {size}")
    if workers is not None and workers > room:
        say(f"--workers {workers}: the cluster has no more room now; the others are not started")
    return engine, worker_slots("cuda" if on_gpus else "cpu", size, engine.resources())


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    id: str
    host: str
    cpus: float
    gpus: float


class RayEngine(Engine):
    """Starts workers, each with one CPU, on a Ray cluster, and is connected to it until closed.

    Raises:
        StudyError: Ray is not installed, or no cluster answers.
    """

    def __init__(self, address: str) -> None:
        self.num_gpus = 0.0
        """GPUs of each worker; a fraction lets several share one."""
        self._ray = _connected(address)
        self._node_id = node_id()
        self._actor_class = self._ray.remote(
            max_restarts=0,  # the pool replaces dead workers
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            concurrency_groups={"control": 1, "log": 1},
        )(Actor)

    def nodes(self) -> list[Node]:
        """Return the nodes that are alive."""
        return [
            Node(
                node["NodeID"],
                node["NodeManagerHostname"],
                node["Resources"].get("CPU", 0.0),
                node["Resources"].get("GPU", 0.0),
            )
            for node in self._ray.nodes()
            if node["Alive"]
        ]

    def room(self) -> int:
        """Return how many workers the empty nodes hold; raise StudyError if none."""
        nodes = self.nodes()
        room = sum(self._room_on(node) for node in nodes)
        if not room:
            each = "1 CPU" + (f" and {self.num_gpus:g} of a GPU" if self.num_gpus else "")
            largest = "; ".join(f"{node.host} has {node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in nodes)
            raise StudyError(
                f"--engine ray: no node of the cluster has room for a worker, which takes {each} ({largest}); "
                "give another --device, or add a node"
            )
        return room

    def _room_on(self, node: Node) -> int:
        if not self.num_gpus:
            return int(node.cpus)
        # Workers share one GPU or have several whole ones: Ray takes no fraction from two.
        on_gpus = node.gpus * int(1 / self.num_gpus) if self.num_gpus < 1 else node.gpus / self.num_gpus
        return int(min(node.cpus, on_gpus))

    def resources(self) -> Resources:
        return Resources(1, self.num_gpus if 0 < self.num_gpus < 1 else None)

    def check(self, spec: WorkerSpec) -> None:
        """Raise StudyError if the storage is SQLite, and some node is another machine.

        Each worker checks that it shares a journal's folder.
        """
        elsewhere = sorted({node.host for node in self.nodes()} - {socket.gethostname()})
        if elsewhere and spec.storage_url.startswith("sqlite"):
            raise StudyError(
                f"--storage {mask(spec.storage_url)}: several machines cannot share an SQLite file, and there are "
                f"nodes on {', '.join(elsewhere)}; give --storage postgresql+psycopg://…"
            )

    def start(self, spec: WorkerSpec, slot: WorkerSlot) -> RayWorker:
        actor = self._actor_class.options(num_cpus=1, num_gpus=self.num_gpus).remote()
        work = actor.work.remote(_everywhere(spec), own_name(slot.device), slot.resources, _studies_of(spec))
        return RayWorker(self, self._ray, actor, work, slot.name)

    def wait(self, workers: Collection[Worker], timeout_s: float) -> None:
        asked = cast("Collection[RayWorker]", workers)
        if any(worker.ended for worker in asked):
            return
        ready, _ = self._ray.wait([worker.reply for worker in asked], num_returns=1, timeout=timeout_s)
        if ready:
            return
        for worker in asked:
            worker.warn_if_not_placed()
        if self.is_lost(self._node_id):
            for worker in asked:
                worker.kill()
            raise StudyError(
                f"--engine ray: Ray on this machine, {socket.gethostname()}, has stopped, and its workers with it; "
                "finished trials are safe: start Ray again, then run the same command"
            )

    def is_lost(self, node_id: str) -> bool:
        """Return whether the cluster has given the node up."""
        return node_id not in {node.id for node in self.nodes()}

    def close(self) -> None:
        self._ray.shutdown()


class RayWorker(Worker):
    """An actor as the head sees it."""

    def __init__(self, engine: RayEngine, ray: Any, actor: Any, work: Any, name: str) -> None:
        self._engine, self._ray, self._actor, self._work, self._name = engine, ray, actor, work, name
        self._started_at, self._warned = time.monotonic(), False
        self._log: list[Output] = []
        self._received = 0
        """Number of items that have arrived."""
        self._place: Placed | None = None
        self._exit: Exit | None = None
        self._ask()

    @property
    def process(self) -> tuple[str, int] | None:
        self._take_reply()
        return None if self._place is None else (self._place.process_host, self._place.pid)

    @property
    def ended(self) -> bool:
        self._take_reply()
        return self._exit is not None

    def output(self) -> list[Output]:
        self._take_reply()
        found, self._log = self._log, []
        return found

    def _ask(self) -> None:
        """Request the items that have not arrived; the reply comes when there are some."""
        self.reply = self._actor.items_from.options(concurrency_group="log").remote(self._received)

    def _take_reply(self, timeout_s: float = 0.0) -> None:
        if self._exit is not None or not self._ray.wait([self.reply], timeout=timeout_s)[0]:
            return
        try:
            items: list[Item] = self._ray.get(self.reply)
        except self._ray.exceptions.ActorUnavailableError:
            time.sleep(_ASK_AGAIN_S)
            items = []
        except self._ray.exceptions.RayActorError as error:
            self._end(self._death(error))
            return
        self._received += len(items)
        for item in items:
            match item:
                case Placed():
                    self._place = item
                case Done():
                    assert self._place is not None, "a worker reports its place first"
                    self._end(Exit.with_status(item.status, f" on {self._place.host}"))
                    return
                case _:
                    self._log.append(item)
        self._ask()

    def warn_if_not_placed(self) -> None:
        """Warn once if the cluster has had no room for it for long."""
        if self._place is None and not self._warned and time.monotonic() - self._started_at > _PLACING_S:
            self._warned = True
            logger.warning("%s waits for a node with room for it; ray status shows what the cluster has", self._name)

    def stop(self) -> None:
        if self.process is None:  # it may never be placed, and has claimed nothing
            self._end(Exit(clean=True, words="was not placed"))
        elif self._exit is None:
            self._actor.stop.options(concurrency_group="control").remote()

    def kill(self) -> None:
        self._end(Exit(clean=False, words="was killed"))

    def close(self, patience_s: float) -> Exit:
        deadline = time.monotonic() + patience_s
        while self._exit is None and (left := deadline - time.monotonic()) > 0:
            self._take_reply(left)
        self.kill()
        # Ray ends a process with some delay, and its trial is requeued next.
        self._ray.wait([self._work], timeout=_DYING_S)
        assert self._exit is not None
        return self._exit

    def _end(self, exited: Exit) -> None:
        if self._exit is None:
            self._exit = exited
            self._ray.kill(self._actor, no_restart=True)

    def _death(self, error: Any) -> Exit:
        """Describe the end of an actor that Ray reports dead."""
        where = "" if self._place is None else f" {self._place.host}"
        if error.preempted:
            return Exit(clean=False, words=f"was preempted with its node{where}", blameless=True)
        if self._place is not None and self._engine.is_lost(self._place.node_id):
            return Exit(clean=False, words=f"was lost with its node{where}", blameless=True)
        words = "was killed" + (f" on{where}" if where else "")
        if error.actor_init_failed:
            reason = str(error).strip().rpartition("\n")[2].strip()
            words = f"did not start ({reason}): hpo has to be installed on every node, as it is here"
        elif "memory" in str(error) and "OOM" not in str(error):
            words = f"was killed: its node{where} ran out of memory"
        return Exit(clean=False, words=words)


def _everywhere(spec: WorkerSpec) -> WorkerSpec:
    """Return the spec with paths that are valid in any working directory."""
    url = spec.storage_url
    return replace(
        spec,
        data_path=spec.data_path and spec.folder / spec.data_path,
        storage_url=str(spec.folder / url) if is_journal(url) else url,
    )


def _studies_of(spec: WorkerSpec) -> Path:
    """The folder of all studies on the head, and on every machine that shares it."""
    return spec.folder / studies_root()


# Connecting


def _connected(address: str) -> Any:
    """Return the module `ray`, connected to the cluster."""
    if address.startswith("ray://"):
        raise StudyError(f"--address {address}: give the head's host:port, and run this on a machine of the cluster")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise StudyError("--engine ray: Ray is not installed; pip install 'hpo-vision[ray]'") from error
    if ray.is_initialized():
        return ray
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _check_reachable(os.environ.get("RAY_ADDRESS") or address)
        ray.init(address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        words = " ".join(str(error).split())
        raise StudyError(
            f"--address {address}: no Ray cluster answers there ({words}); start one with: ray start --head"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():  # Ray installs its own handler
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return ray


def _check_reachable(address: str) -> None:
    """Raise an error if nothing listens at `host:port`."""
    head, colon, port = address.rpartition(":")
    if colon:
        socket.create_connection((head.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    elif address != "auto":  # which Ray resolves
        raise StudyError(f"--address {address}: give the head's host:port, or auto")
