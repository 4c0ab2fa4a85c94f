"""Workers as actors of a Ray cluster, on whatever nodes have room.

Ray places them, says when one has died or its node is lost, and carries what is said. A worker trains in one thread of
its actor, while two others answer the head: one takes orders, one hands out what the worker has said. The head asks for
that from a number on, and the worker keeps what it has not been asked beyond: a reply that is lost with a connection is
asked for again, so that nothing is lost while the worker lives, and the order stays.

Ray restarts nothing by itself: the pool fills a seat again, and a trial goes on from its checkpoint wherever it is
claimed next.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from core.data import load_dataset
from hpo.errors import StudyError
from hpo.paths import StudyPaths, cache_root, data_root, studies_root
from hpo.search.interrupts import Interrupts
from hpo.storage import is_journal, mask
from hpo.workers.capacity import CONTEXT_BYTES
from hpo.workers.engine import STOPPED, Ending, Engine, Seat, Worker
from hpo.workers.messages import Event, Failed, Job, Order, Retire, Share, Stop
from hpo.workers.worker import Orders, failure_of, work_on

logger = logging.getLogger(__name__)

# Until an address where nothing answers is given up. Ray itself goes on for a quarter of an hour.
_CONNECT_TIMEOUT_S = 5.0
# Between two questions to a worker that cannot be reached for the moment.
_ASK_AGAIN_S = 0.5
# Until a worker that is not placed is mentioned: a node needs some seconds to start its process.
_PLACING_S = 30.0
# Until a killed worker is taken for dead, where its node does not say so any more.
_DYING_S = 5.0
# What keeps the head's terminal to our own words; each is documented by Ray, and read when it is imported. The pattern
# leaves out every line of what its nodes report, which says at length what we say in a line.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^",
    "RAY_NUM_REDIS_GET_RETRIES": "1",
    # Under `uv run` Ray would pack this folder, send it to the nodes, and begin every worker by `uv run` there.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


# On the head


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, as it stands."""

    id: str
    host: str
    cpus: float
    gpus: float


class RayEngine(Engine):
    """Starts workers on a Ray cluster, to which it is connected until it is closed.

    Args:
        address: the head's `host:port`; `auto` finds the cluster that this machine belongs to.

    Raises:
        StudyError: Ray is not installed, or no cluster is there.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.num_cpus = 1.0
        """What each worker takes of its node; it trains with so many threads."""
        self.num_gpus = 0.0
        """As well; a fraction lets several share a GPU."""
        self._ray = _connected(address)
        self._node_id = _node_id()
        self._actor_class = self._ray.remote(
            max_restarts=0,  # the pool fills the seat again
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            concurrency_groups={"orders": 1, "events": 1},
        )(_Actor)

    def nodes(self) -> list[Node]:
        """The nodes that are alive."""
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
        """How many workers the nodes hold at once, were nothing else on them.

        Raises:
            StudyError: not even one.
        """
        nodes = self.nodes()
        room = sum(self._room_on(node) for node in nodes)
        if not room:
            each = f"{self.num_cpus:g} CPUs" + (f" and {self.num_gpus:g} GPUs" if self.num_gpus else "")
            largest = "; ".join(f"{node.host} has {node.cpus:g} and {node.gpus:g}" for node in nodes)
            raise StudyError(
                f"--engine ray: no node of the cluster holds a worker, which takes {each} ({largest}); "
                "give another --device, or add a node"
            )
        return room

    def _room_on(self, node: Node) -> int:
        bounds = [node.cpus / self.num_cpus]
        bounds += [self._gpu_room(node.gpus)] if self.num_gpus else []
        return int(min(bounds))

    def _gpu_room(self, gpus: float) -> float:
        """Workers share one GPU, or have several whole ones: Ray does not cut a fraction out of two."""
        return gpus * int(1 / self.num_gpus) if self.num_gpus < 1 else gpus / self.num_gpus

    def share(self, _: int = 1) -> Share:
        """What a worker has of its node, however many there are: Ray places by it."""
        fraction = self.num_gpus if 0 < self.num_gpus < 1 else None
        return Share(max(1, int(self.num_cpus)), fraction)

    def check(self, job: Job) -> None:
        """Refuses a storage that the workers of other machines cannot reach. Whether they share the folder of a
        journal is for each of them to see.

        Raises:
            StudyError: it is SQLite, and not every node is this machine.
        """
        elsewhere = sorted({node.host for node in self.nodes()} - {socket.gethostname()})
        if elsewhere and job.storage_url.startswith("sqlite"):
            raise StudyError(
                f"--storage {mask(job.storage_url)}: several machines cannot share an SQLite file, and there are nodes "
                f"on {', '.join(elsewhere)}; give --storage postgresql+psycopg://…"
            )

    def start(self, job: Job, seat: Seat, share: Share) -> RayWorker:
        device = "cuda:0" if seat.device.startswith("cuda") else seat.device  # Ray shows a worker its own GPU only
        actor = self._actor_class.options(num_cpus=self.num_cpus, num_gpus=self.num_gpus).remote(share)
        return RayWorker(self, self._ray, actor, seat.name, _Assignment(_everywhere(job), device, _studies_of(job)))

    def wait(self, workers: Collection[Worker], timeout_s: float) -> list[Worker]:
        asked = cast("Collection[RayWorker]", workers)
        if not (ready := [worker for worker in asked if worker.listen(0.0)]):
            replies = [worker.reply for worker in asked]
            self._ray.wait(replies, num_returns=1, timeout=timeout_s)
            ready = [worker for worker in asked if worker.listen(0.0)]
        if not ready:
            self._look_around(asked)
        return list(ready)

    def _look_around(self, workers: Collection[RayWorker]) -> None:
        """Where nothing is heard: says who still waits for a place, and gives up where this machine's Ray is gone."""
        for worker in workers:
            worker.say_if_not_placed()
        if not self.is_lost(self._node_id):
            return
        for worker in workers:
            worker.kill()
        raise StudyError(
            f"--engine ray: Ray on this machine, {socket.gethostname()}, is gone, and its workers with it; "
            "what is finished is safe: start Ray again, and run the same command"
        )

    def is_lost(self, node_id: str) -> bool:
        """Whether the cluster has given up the node."""
        return node_id not in {node.id for node in self.nodes()}

    def close(self) -> None:
        self._ray.shutdown()


class RayWorker(Worker):
    """An actor, seen from the head."""

    def __init__(self, engine: RayEngine, ray: Any, actor: Any, name: str, assignment: _Assignment) -> None:
        self._engine, self._ray, self._actor, self._name = engine, ray, actor, name
        self._asked_at = time.monotonic()
        self._said_waiting = False
        self._said: deque[Event] = deque()
        self._heard = 0
        """How many things it has said so far that reached us."""
        self._place: _Placed | None = None
        """Where it runs; None before it does."""
        self._ending: Ending | None = None
        self._work = actor.work.remote(assignment)
        self._ask()

    def _ask(self) -> None:
        """Asks for what the worker says beyond what we know."""
        self.reply = self._actor.said.options(concurrency_group="events").remote(self._heard)

    def say_if_not_placed(self) -> None:
        """Tells a person, once, that the cluster has no room for it."""
        if self._place is None and not self._said_waiting and time.monotonic() - self._asked_at > _PLACING_S:
            self._said_waiting = True
            logger.warning("%s waits for a node with room for it; ray status says what the cluster has", self._name)

    def order(self, order: Order) -> None:
        if self._place is None and isinstance(order, Retire | Stop):
            # It may never be placed, and has claimed nothing: a worker claims when it is told to.
            self._over(Ending(clean=True, words="was not placed"))
        elif self._ending is None:
            self._actor.order.options(concurrency_group="orders").remote(order)

    def listen(self, timeout_s: float | None) -> bool:
        """Whether there is something to hear, be it the end."""
        if not self._said and self._ending is None:
            ready, _ = self._ray.wait([self.reply], timeout=timeout_s)
            if ready:
                self._take_reply()
        return bool(self._said) or self._ending is not None

    def _take_reply(self) -> None:
        try:
            said: list[_Said] = self._ray.get(self.reply)
        except self._ray.exceptions.ActorUnavailableError:
            time.sleep(_ASK_AGAIN_S)
        except self._ray.exceptions.RayActorError as error:
            self._over(self._death(error))
            return
        else:
            self._heard += len(said)
            for event in said:
                match event:
                    case _Placed():
                        self._place = event
                    case _Over():
                        self._over(self._ended(event.status))
                        return
                    case _:
                        self._said.append(event)
        self._ask()

    def hear(self) -> Event:
        while not self.listen(None):
            pass
        if self._said:
            return self._said.popleft()
        raise EOFError

    def kill(self) -> None:
        self._over(Ending(clean=False, words="was killed"))

    def end(self, patience_s: float) -> Ending:
        deadline = time.monotonic() + patience_s
        while self._ending is None and (left := deadline - time.monotonic()) > 0:
            self.listen(left)
            self._said.clear()
        if self._ending is None:
            self.kill()
        # Ray ends a process some moments after it was told to, and what that one held is looked for behind this.
        self._ray.wait([self._work], timeout=_DYING_S)
        assert self._ending is not None
        return self._ending

    def _over(self, ending: Ending) -> None:
        """Lets the actor go, and with it what it holds of its node."""
        if self._ending is None:
            self._ending = ending
            self._ray.kill(self._actor, no_restart=True)

    def _ended(self, status: int) -> Ending:
        """How it ended by itself, by what its process would have exited with."""
        assert self._place is not None, "a worker says where it is before anything else"
        asked_to = "was asked to leave" if status == STOPPED else f"ended with exit status {status}"
        return Ending(clean=status == 0, words=f"{asked_to} on {self._place.host}", blameless=status == STOPPED)

    def _death(self, error: Any) -> Ending:
        """What Ray knows of an actor's death."""
        where = "" if self._place is None else f" {self._place.host}"
        if error.preempted:
            return Ending(clean=False, words=f"was preempted with its node{where}", blameless=True)
        if self._place is not None and self._engine.is_lost(self._place.node_id):
            return Ending(clean=False, words=f"was lost with its node{where}", blameless=True)
        words = "was killed" + (f" on{where}" if where else "")
        if error.actor_init_failed:
            words = f"did not start ({_last_line(error)}): hpo has to be installed on every node, as it is here"
        elif "memory" in str(error) and "OOM" not in str(error):
            words = f"was killed: its node{where} ran out of memory"
        return Ending(clean=False, words=words)


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2].strip()


def _connected(address: str) -> Any:
    """The module `ray`, connected to the cluster."""
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
        if threading.current_thread() is threading.main_thread():  # Ray puts a handler of its own there
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return ray


def _check_reachable(address: str) -> None:
    """Raises StudyError where nothing listens at `host:port`; other kinds of addresses are Ray's to find."""
    host, colon, port = address.rpartition(":")
    if not colon:
        if address != "auto":
            raise StudyError(f"--address {address}: give the head's host:port, or auto")
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise StudyError(f"--address {address}: {_no_cluster(error)}") from error


def _no_cluster(error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"no Ray cluster answers there ({words}); begin one with: ray start --head"


def _everywhere(job: Job) -> Job:
    """The job with paths that mean the same in whatever folder a worker starts."""
    url = job.storage_url
    return replace(
        job,
        data_path=job.data_path and job.folder / job.data_path,
        storage_url=str(job.folder / url) if is_journal(url) else url,
    )


def _studies_of(job: Job) -> Path:
    return job.folder / studies_root()


# What crosses


@dataclass(frozen=True)
class _Assignment:
    """What an actor is to do."""

    job: Job
    device: str
    """As the worker's process names it."""
    studies: Path
    """The folder of all studies on the head, and on every machine that shares it."""


@dataclass(frozen=True)
class _Placed:
    """The worker runs."""

    node_id: str
    host: str


@dataclass(frozen=True)
class _Over:
    """The worker has said everything."""

    status: int


_Said = Event | _Placed | _Over


# On a node


class _Words:
    """What a worker has said and the head may not have heard yet."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._kept: deque[_Said] = deque()
        self._let_go = 0

    def say(self, said: _Said) -> None:
        with self._changed:
            self._kept.append(said)
            self._changed.notify_all()

    def beyond(self, heard: int) -> list[_Said]:
        """Everything but the first `heard` things, as soon as there is something; those are let go of."""
        with self._changed:
            while self._let_go < heard:
                self._kept.popleft()
                self._let_go += 1
            self._changed.wait_for(lambda: self._kept)
            return list(self._kept)


class _Actor:
    """A worker's process. Ray runs its methods in threads, of which none is the main one."""

    def __init__(self, share: Share) -> None:
        self._words = _Words()
        self._interrupts = Interrupts()
        self._orders = Orders(share, self._interrupts)
        self._words.say(_Placed(_node_id(), socket.gethostname()))
        # A node that is preempted asks its processes to leave: the epoch is finished, the trial given back. Ray makes
        # an actor in the main thread, the only one that may say so.
        signal.signal(signal.SIGTERM, lambda *_: self._interrupts.request())

    def work(self, assignment: _Assignment) -> None:
        """Works until nothing is left, in a thread of its own."""
        status = 1
        try:
            status = _work(assignment, self._orders, self._words, self._interrupts)
        finally:
            self._words.say(_Over(status))

    def order(self, order: Order) -> None:
        self._orders.take(order)

    def said(self, heard: int) -> list[_Said]:
        return self._words.beyond(heard)


def _node_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _work(assignment: _Assignment, orders: Orders, words: _Words, interrupts: Interrupts) -> int:
    """Trains what the study has waiting; returns the worker's exit status."""
    device = torch.device(assignment.device)

    def send(event: Event) -> None:
        words.say(replace(event, text=f"{socket.gethostname()}: {event.text}") if isinstance(event, Failed) else event)

    try:
        with _settled(assignment):
            orders.take(_of_its_gpu(orders.share, device))
            _fill_cache(assignment.job)
            return work_on(assignment.job, device=device, orders=orders, send=send, interrupts=interrupts)
    except KeyboardInterrupt:
        return STOPPED
    except Exception as error:  # while it settles: nobody asks for what an actor's method raises
        failed, status = failure_of(error, assignment.job)
        send(failed)
        return status


def _of_its_gpu(share: Share, device: torch.device) -> Share:
    """The share less what CUDA itself takes of the GPU, which only its node knows the size of."""
    if share.memory_fraction is None or device.type != "cuda":
        return share
    whole = torch.cuda.mem_get_info(device)[1]
    return replace(share, memory_fraction=share.memory_fraction - CONTEXT_BYTES / whole)


@contextlib.contextmanager
def _settled(assignment: _Assignment) -> Iterator[None]:
    """In here the study's folder is the one that all machines share; or one that goes with the worker, where what is to
    stay goes to the depot.

    Raises:
        StudyError: the folder is not here, and there is no depot.
    """
    job, studies = assignment.job, assignment.studies
    if job.folder.is_dir():
        os.chdir(job.folder)
    if StudyPaths(studies / job.study).study_yaml.is_file():
        os.environ["HPO_STUDIES"] = str(studies)
        yield
    elif job.depot is None or is_journal(job.storage_url):
        raise StudyError(
            f"the study's folder {studies / job.study} is not on this machine; run where all nodes share it, "
            "or give --artifacts a URL that all of them reach, and --storage a database"
        )
    else:
        with tempfile.TemporaryDirectory(prefix="hpo-", ignore_cleanup_errors=True) as scratch:
            os.environ["HPO_STUDIES"] = scratch
            yield


def _fill_cache(job: Job) -> None:
    """Decodes the images into this machine's cache, where they are not in it yet: one worker of it at a time, so that
    the others find them there."""
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".filling").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        load_dataset(
            job.space.baseline.data,
            data_path=job.data_path,
            data_root=data_root(),
            cache_dir=root,
            skip_broken=job.skip_broken,
        )
