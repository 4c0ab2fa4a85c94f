"""A worker on a node of a Ray cluster, and the values that it sends to the head."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock

from hpo.errors import StudyError
from hpo.paths import StudyPaths, cache_root
from hpo.search.interrupts import Interrupts
from hpo.storage import is_journal
from hpo.storage.lease import host
from hpo.workers.engine import Failure, Output, Resources, WorkerSpec
from hpo.workers.worker import load, work_on


@dataclass(frozen=True)
class Placed:
    """The worker's place; its first item."""

    node_id: str
    host: str
    process_host: str
    """As its trials' leases name it."""
    pid: int


@dataclass(frozen=True)
class Done:
    """The worker's end; its last item."""

    status: int


Item = Output | Placed | Done


class Items:
    """Items that the head may not have received yet."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._kept: deque[Item] = deque()
        self._dropped = 0

    def add(self, item: Item) -> None:
        with self._changed:
            self._kept.append(item)
            self._changed.notify_all()

    def start_from(self, number: int) -> list[Item]:
        """Drop the first `number` items, and return the others as soon as there are any."""
        with self._changed:
            while self._dropped < number:
                self._kept.popleft()
                self._dropped += 1
            self._changed.wait_for(lambda: self._kept)
            return list(self._kept)


class Actor:
    """A worker's process. Ray runs its methods in threads other than the main one."""

    def __init__(self) -> None:
        self._items = Items()
        self._interrupts = Interrupts()
        self._items.add(Placed(node_id(), socket.gethostname(), host(), os.getpid()))
        # A preempted node terminates its processes. Ray creates actors in the main thread, which may set handlers.
        signal.signal(signal.SIGTERM, lambda *_: self._interrupts.request())

    def work(self, spec: WorkerSpec, device: str, resources: Resources, studies: Path) -> None:
        """Train until no trial waits.

        Args:
            spec: with absolute paths.
            device: as this process names it.
            studies: the head's folder of all studies, which this machine may share.
        """
        status = 1
        try:
            status = work_on(
                spec,
                device=torch.device(device),
                resources=resources,
                emit=self._emit,
                interrupts=self._interrupts,
                setting=on_node(spec, studies),
            )
        finally:
            self._items.add(Done(status))

    def _emit(self, output: Output) -> None:
        if isinstance(output, Failure):
            output = replace(output, text=f"{socket.gethostname()}: {output.text}")
        self._items.add(output)

    def stop(self) -> None:
        self._interrupts.request()

    def items_from(self, number: int) -> list[Item]:
        return self._items.start_from(number)


def node_id() -> str:
    """Return Ray's id of this node."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


@contextlib.contextmanager
def on_node(spec: WorkerSpec, studies: Path) -> Iterator[None]:
    """Use the shared folder of the study, or a temporary one if the artifact store keeps the files; fill the cache.

    Raises:
        StudyError: the folder is not on this machine, and there is no artifact store.
    """
    if spec.folder.is_dir():
        os.chdir(spec.folder)
    with contextlib.ExitStack() as stack:
        if not StudyPaths(studies / spec.study).study_yaml.is_file():
            if spec.store_url is None or is_journal(spec.storage_url):
                raise StudyError(
                    f"the study's folder {studies / spec.study} is not on this machine; run where all nodes share it, "
                    "or give --artifacts a URL that all of them reach, and --storage a database"
                )
            scratch = tempfile.TemporaryDirectory(prefix="hpo-", ignore_cleanup_errors=True)
            studies = Path(stack.enter_context(scratch))
        os.environ["HPO_STUDIES"] = str(studies)
        cache_root().mkdir(parents=True, exist_ok=True)
        with FileLock(cache_root() / ".filling"):  # one worker decodes the images
            load(spec, download=True)
        yield
