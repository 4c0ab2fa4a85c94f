"""Workers as actors of a Ray cluster, on all nodes that have room.

Ray places them and reports when one has died or its node is lost. Their results go to the storage; the head reads
their log, and asks for it again where a reply was lost with a connection. Ray restarts nothing: the pool replaces dead
workers, and a trial resumes from its checkpoint wherever it is claimed next.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock

from core.data import load_dataset
from hpo.errors import StudyError
from hpo.paths import StudyPaths, cache_root, data_root, studies_root
from hpo.search.interrupts import Interrupts
from hpo.storage import is_journal, mask
from hpo.storage.lease import host
from hpo.workers.capacity import CONTEXT_BYTES
from hpo.workers.engine import (
    STOPPED,
    Engine,
    Exit,
    Failure,
    Output,
    Resources,
    Worker,
    WorkerSlot,
    WorkerSpec,
)
from hpo.workers.worker import failure_of, work_on

logger = logging.getLogger(__name__)

# Seconds until an address without an answer is given up. Ray itself tries for a quarter of an hour.
_CONNECT_TIMEOUT_S = 5.0
# Seconds between two requests to a worker that cannot be reached at the moment.
_ASK_AGAIN_S = 0.5
# Seconds until a worker that has no node yet is mentioned: a node needs some to start its process.
_PLACING_S = 30.0
# Seconds until a killed worker counts as dead if its node no longer reports it.
_DYING_S = 5.0
# These keep Ray's messages out of the head's terminal. Ray documents each, and reads it when it is imported. The
# pattern drops every line that its nodes report: we report the same in one line.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^",
    "RAY_NUM_REDIS_GET_RETRIES": "1",
    # Under `uv run` Ray would send this folder to the nodes and start each worker with `uv run` there.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


# On the head


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    id: str
    host: str
    cpus: float
    gpus: float


class RayEngine(Engine):
    """Starts workers on a Ray cluster, to which it is connected until it is closed.

    Args:
        address: the head's `host:port`, or `auto` for the cluster that this machine belongs to.

    Raises:
        StudyError: Ray is not installed, or no cluster answers.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.num_cpus = 1.0
        """CPUs of each worker on its node, and its threads."""
        self.num_gpus = 0.0
        """GPUs of each worker; a fraction lets several share one."""
        self._ray = _connected(address)
        self._node_id = _node_id()
        self._actor_class = self._ray.remote(
            max_restarts=0,  # the pool replaces dead workers
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            concurrency_groups={"control": 1, "log": 1},
        )(_Actor)

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
        """Return how many workers the nodes hold at once if nothing else runs on them.

        Raises:
            StudyError: not even one.
        """
        nodes = self.nodes()
        room = sum(self._room_on(node) for node in nodes)
        if not room:
            each = f"{self.num_cpus:g} CPUs" + (f" and {self.num_gpus:g} GPUs" if self.num_gpus else "")
            largest = "; ".join(f"{node.host} has {node.cpus:g} and {node.gpus:g}" for node in nodes)
            raise StudyError(
                f"--engine ray: no node of the cluster has room for a worker, which takes {each} ({largest}); "
                "give another --device, or add a node"
            )
        return room

    def _room_on(self, node: Node) -> int:
        bounds = [node.cpus / self.num_cpus]
        bounds += [self._gpu_room(node.gpus)] if self.num_gpus else []
        return int(min(bounds))

    def _gpu_room(self, gpus: float) -> float:
        """Workers share one GPU or have several whole ones: Ray does not take a fraction from two."""
        return gpus * int(1 / self.num_gpus) if self.num_gpus < 1 else gpus / self.num_gpus

    def resources(self) -> Resources:
        """Return each worker's part of its node."""
        return Resources(max(1, int(self.num_cpus)), self.num_gpus if 0 < self.num_gpus < 1 else None)

    def check(self, spec: WorkerSpec) -> None:
        """Refuse a storage that other machines cannot reach.

        Whether they share a journal's folder is checked by each worker.

        Raises:
            StudyError: it is SQLite, and some node is another machine.
        """
        elsewhere = sorted({node.host for node in self.nodes()} - {socket.gethostname()})
        if elsewhere and spec.storage_url.startswith("sqlite"):
            raise StudyError(
                f"--storage {mask(spec.storage_url)}: several machines cannot share an SQLite file, and there are "
                f"nodes on {', '.join(elsewhere)}; give --storage postgresql+psycopg://…"
            )

    def start(self, spec: WorkerSpec, slot: WorkerSlot, resources: Resources) -> RayWorker:
        device = "cuda:0" if slot.device.startswith("cuda") else slot.device  # Ray shows a worker its own GPU only
        actor = self._actor_class.options(num_cpus=self.num_cpus, num_gpus=self.num_gpus).remote()
        assignment = _Assignment(_everywhere(spec), device, resources, _studies_of(spec))
        return RayWorker(self, self._ray, actor, slot.name, assignment)

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

    def __init__(self, engine: RayEngine, ray: Any, actor: Any, name: str, assignment: _Assignment) -> None:
        self._engine, self._ray, self._actor, self._name = engine, ray, actor, name
        self._started_at, self._warned = time.monotonic(), False
        self._log: list[Output] = []
        self._received = 0
        """Number of items that have arrived."""
        self._place: _Placed | None = None
        """Where it runs; None before it does."""
        self._exit: Exit | None = None
        self._work = actor.work.remote(assignment)
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
        """Ask for the items that have not arrived; the reply comes when there are some."""
        self.reply = self._actor.items_from.options(concurrency_group="log").remote(self._received)

    def _take_reply(self, timeout_s: float = 0.0) -> None:
        if self._exit is not None or not self._ray.wait([self.reply], timeout=timeout_s)[0]:
            return
        try:
            items: list[_Item] = self._ray.get(self.reply)
        except self._ray.exceptions.ActorUnavailableError:
            time.sleep(_ASK_AGAIN_S)
            items = []
        except self._ray.exceptions.RayActorError as error:
            self._end(self._death(error))
            return
        self._received += len(items)
        for item in items:
            match item:
                case _Placed():
                    self._place = item
                case _Done():
                    self._end(self._regular(item.status))
                    return
                case _:
                    self._log.append(item)
        self._ask()

    def warn_if_not_placed(self) -> None:
        """Warn once if the cluster has no room for it."""
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
        # Ray ends a process with some delay, and its trials are requeued next.
        self._ray.wait([self._work], timeout=_DYING_S)
        assert self._exit is not None
        return self._exit

    def _end(self, exited: Exit) -> None:
        """Free the actor's resources on its node."""
        if self._exit is None:
            self._exit = exited
            self._ray.kill(self._actor, no_restart=True)

    def _regular(self, status: int) -> Exit:
        assert self._place is not None, "a worker reports its place first"
        how = "was stopped" if status == STOPPED else f"ended with exit status {status}"
        return Exit(clean=status == 0, words=f"{how} on {self._place.host}", blameless=status == STOPPED)

    def _death(self, error: Any) -> Exit:
        """How an actor ended that Ray reports dead."""
        where = "" if self._place is None else f" {self._place.host}"
        if error.preempted:
            return Exit(clean=False, words=f"was preempted with its node{where}", blameless=True)
        if self._place is not None and self._engine.is_lost(self._place.node_id):
            return Exit(clean=False, words=f"was lost with its node{where}", blameless=True)
        words = "was killed" + (f" on{where}" if where else "")
        if error.actor_init_failed:
            words = f"did not start ({_last_line(error)}): hpo has to be installed on every node, as it is here"
        elif "memory" in str(error) and "OOM" not in str(error):
            words = f"was killed: its node{where} ran out of memory"
        return Exit(clean=False, words=words)


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2].strip()


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
    _check_reachable(os.environ.get("RAY_ADDRESS") or address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StudyError(f"--address {address}: {_no_cluster(error)}") from error
    finally:
        if threading.current_thread() is threading.main_thread():  # Ray installs its own handler
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return ray


def _check_reachable(address: str) -> None:
    """Raise StudyError if nothing listens at `host:port`; Ray resolves other kinds of addresses."""
    head, colon, port = address.rpartition(":")
    if not colon:
        if address != "auto":
            raise StudyError(f"--address {address}: give the head's host:port, or auto")
        return
    try:
        socket.create_connection((head.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise StudyError(f"--address {address}: {_no_cluster(error)}") from error


def _no_cluster(error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"no Ray cluster answers there ({words}); start one with: ray start --head"


def _everywhere(spec: WorkerSpec) -> WorkerSpec:
    """Return the spec with paths that are valid in any working directory."""
    url = spec.storage_url
    return replace(
        spec,
        data_path=spec.data_path and spec.folder / spec.data_path,
        storage_url=str(spec.folder / url) if is_journal(url) else url,
    )


def _studies_of(spec: WorkerSpec) -> Path:
    return spec.folder / studies_root()


# Values that cross


@dataclass(frozen=True)
class _Assignment:
    """An actor's work."""

    spec: WorkerSpec
    device: str
    """As the worker's process names it."""
    resources: Resources
    studies: Path
    """The folder of all studies on the head, and on every machine that shares it."""


@dataclass(frozen=True)
class _Placed:
    """The worker runs there."""

    node_id: str
    host: str
    process_host: str
    """As its trials' leases name it."""
    pid: int


@dataclass(frozen=True)
class _Done:
    """The worker has ended; its last item."""

    status: int


_Item = Output | _Placed | _Done


# On a node


class _Items:
    """A worker's items that the head may not have received yet."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._kept: deque[_Item] = deque()
        self._dropped = 0

    def add(self, item: _Item) -> None:
        with self._changed:
            self._kept.append(item)
            self._changed.notify_all()

    def start_from(self, number: int) -> list[_Item]:
        """Return all but the first `number` items, as soon as there are any, and drop those."""
        with self._changed:
            while self._dropped < number:
                self._kept.popleft()
                self._dropped += 1
            self._changed.wait_for(lambda: self._kept)
            return list(self._kept)


class _Actor:
    """A worker's process. Ray runs its methods in threads other than the main one."""

    def __init__(self) -> None:
        self._items = _Items()
        self._interrupts = Interrupts()
        self._items.add(_Placed(_node_id(), socket.gethostname(), host(), os.getpid()))
        # A preempted node terminates its processes. Ray creates an actor in the main thread, which alone may do this.
        signal.signal(signal.SIGTERM, lambda *_: self._interrupts.request())

    def work(self, assignment: _Assignment) -> None:
        """Train until no trial waits."""
        status = 1
        try:
            status = _work(assignment, self._items.add, self._interrupts)
        finally:
            self._items.add(_Done(status))

    def stop(self) -> None:
        self._interrupts.request()

    def items_from(self, number: int) -> list[_Item]:
        return self._items.start_from(number)


def _node_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _work(assignment: _Assignment, add: Callable[[Output], None], interrupts: Interrupts) -> int:
    """Train waiting trials; returns the worker's exit status."""
    spec, device = assignment.spec, torch.device(assignment.device)

    def emit(output: Output) -> None:
        failed = isinstance(output, Failure)
        add(replace(output, text=f"{socket.gethostname()}: {output.text}") if failed else output)

    try:
        with _in_its_folder(assignment):
            _fill_cache(spec)
            resources = _less_context(assignment.resources, device)
            return work_on(spec, device=device, resources=resources, emit=emit, interrupts=interrupts)
    except KeyboardInterrupt:
        return STOPPED
    except Exception as error:  # an actor's exceptions are not read
        failure = failure_of(error, spec)
        emit(failure)
        return 2 if failure.trace is None else 1


def _less_context(resources: Resources, device: torch.device) -> Resources:
    """Subtract the memory that CUDA itself takes of the GPU, whose size only its node knows."""
    if resources.memory_fraction is None or device.type != "cuda":
        return resources
    total = torch.cuda.mem_get_info(device)[1]
    return replace(resources, memory_fraction=resources.memory_fraction - CONTEXT_BYTES / total)


@contextlib.contextmanager
def _in_its_folder(assignment: _Assignment) -> Iterator[None]:
    """Use the study's folder that all machines share; or a temporary one if the artifact store keeps the files.

    Raises:
        StudyError: the folder is not on this machine, and there is no artifact store.
    """
    spec, studies = assignment.spec, assignment.studies
    if spec.folder.is_dir():
        os.chdir(spec.folder)
    if StudyPaths(studies / spec.study).study_yaml.is_file():
        os.environ["HPO_STUDIES"] = str(studies)
        yield
    elif spec.store_url is None or is_journal(spec.storage_url):
        raise StudyError(
            f"the study's folder {studies / spec.study} is not on this machine; run where all nodes share it, "
            "or give --artifacts a URL that all of them reach, and --storage a database"
        )
    else:
        with tempfile.TemporaryDirectory(prefix="hpo-", ignore_cleanup_errors=True) as scratch:
            os.environ["HPO_STUDIES"] = scratch
            yield


def _fill_cache(spec: WorkerSpec) -> None:
    """Decode the images into this machine's cache, in one worker at a time."""
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".filling"):
        load_dataset(
            spec.space.baseline.data,
            data_path=spec.data_path,
            data_root=data_root(),
            cache_dir=root,
            skip_broken=spec.skip_broken,
        )
