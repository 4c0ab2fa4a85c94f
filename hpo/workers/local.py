"""Workers as processes of this machine, each pinned to its device before CUDA is initialized.

On Linux they are forked in milliseconds from a server process that has imported torch and timm, but never uses CUDA,
which does not survive a fork. Elsewhere they are spawned: macOS's libraries do not survive a fork either.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, cast

from hpo.search.interrupts import SIGNALS, Interrupts
from hpo.storage.lease import host
from hpo.workers.engine import Engine, Exit, Output, Resources, Worker, WorkerSlot, WorkerSpec

VISIBLE = "CUDA_VISIBLE_DEVICES"

PRELOADED = [
    *("hpo.workers.calibration", "hpo.workers.worker"),
    *("optuna_dashboard", "sklearn.datasets", "sklearn.model_selection", "timm"),
]
# Seconds that a worker without a parent has to finish its epoch. After that its trial resumes from its last checkpoint.
_ORPHAN_S = 20.0


class LocalProcesses(Engine):
    """Starts workers as processes of this machine."""

    def start(self, spec: WorkerSpec, slot: WorkerSlot) -> LocalWorker:
        context = start_method()
        output, theirs = context.Pipe(duplex=False)
        entry = in_child(slot.device, main, spec, own_name(slot.device), slot.resources, theirs)
        process = context.Process(target=run_in_child, args=entry, name=f"hpo {slot.name}")  # type: ignore[attr-defined]
        with signals_blocked():
            process.start()
        theirs.close()  # else the worker's death would not end the pipe
        return LocalWorker(process, output)

    def wait(self, workers: Collection[Worker], timeout_s: float) -> None:
        wait([source for worker in cast("Collection[LocalWorker]", workers) for source in worker.sources], timeout_s)

    def close(self) -> None:
        """Do nothing: the server ends with this process."""


class LocalWorker(Worker):
    """A worker's process, and the pipe for its log."""

    def __init__(self, process: BaseProcess, output: Connection) -> None:
        self._process, self._output = process, output
        self._open = True
        assert process.pid is not None
        self._pid = process.pid

    @property
    def sources(self) -> list[Connection | int]:
        """Become ready when the worker has output or has ended."""
        return [*([self._output] if self._open else []), self._process.sentinel]

    @property
    def process(self) -> tuple[str, int]:
        return host(), self._pid

    @property
    def ended(self) -> bool:
        return self._process.exitcode is not None

    def output(self) -> list[Output]:
        found: list[Output] = []
        try:
            while self._open and self._output.poll():
                found.append(self._output.recv())
        except (EOFError, OSError):  # OSError: killed in the middle of a record
            self._open = False
        return found

    def stop(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def close(self, patience_s: float) -> Exit:
        self._process.join(patience_s)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        status = self._process.exitcode
        assert status is not None
        self._output.close()
        self._process.close()
        if status < 0:
            return Exit(clean=False, words=f"was killed by {signal.Signals(-status).name}")
        return Exit.with_status(status)


# Starting processes


def visible_to(device: str) -> str | None:
    """The `CUDA_VISIBLE_DEVICES` with which a process sees this GPU alone; None on a CPU.

    Indices count the GPUs visible to this process, which may be some of the machine's, or have names.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return None
    here = os.environ.get(VISIBLE)
    return index or "0" if here is None else here.split(",")[int(index or 0)]


def own_name(device: str) -> str:
    """The name of the device in a process that sees it alone."""
    return "cuda:0" if device.startswith("cuda") else device


def in_child(device: str, run: Callable[..., None], *arguments: Any) -> tuple[Any, ...]:
    """The arguments of `run_in_child` to call `run(*arguments)` where only `device` is visible."""
    visible = visible_to(device)
    environment = dict(os.environ) if visible is None else {**os.environ, VISIBLE: visible}
    return (environment, run, *arguments)


def start_method() -> BaseContext:
    """Return how processes are started, after starting the fork server on Linux."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with signals_blocked():
        multiprocessing.forkserver.ensure_running()
    return context


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes that start inside begin with `SIGNALS` blocked, until they can give a trial back."""
    if sys.platform == "win32":
        yield
        return
    multiprocessing.resource_tracker.ensure_running()  # here: starting it lifts the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# In the worker's process


def run_in_child(environment: dict[str, str], run: Callable[..., None], *arguments: Any) -> None:
    """Run a function in this environment: a fork server's children inherit the server's."""
    os.environ.clear()
    os.environ.update(environment)
    run(*arguments)


def main(spec: WorkerSpec, device: str, resources: Resources, output: Connection) -> None:
    """Run a worker, in its process, until it exits."""
    import torch

    from hpo.workers.worker import work_on

    os.chdir(spec.folder)
    interrupts = Interrupts()
    signal.signal(signal.SIGTERM, lambda *_: interrupts.request())
    enter_child(interrupts.request, _ORPHAN_S)
    writing = threading.Lock()

    def emit(record: Output) -> None:
        with writing, contextlib.suppress(OSError):  # the parent is gone
            output.send(record)

    sys.exit(work_on(spec, device=torch.device(device), resources=resources, emit=emit, interrupts=interrupts))


def enter_child(request_stop: Callable[[], None], patience_s: float) -> None:
    """Unblock the signals, now that SIGTERM is handled.

    When the parent dies, `request_stop` is called, and this process exits after `patience_s` seconds.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)  # the parent gets it too, and stops this process
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_for_its_end() -> None:
        parent.join()
        request_stop()
        time.sleep(patience_s)
        os._exit(1)

    threading.Thread(target=wait_for_its_end, name="parent watch", daemon=True).start()
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
