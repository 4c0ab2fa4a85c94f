"""Workers as processes of this machine, each pinned to its device before CUDA is initialized.

On Linux they are forked from a server process that has imported torch and timm, so that a worker starts in
milliseconds. The server never touches CUDA, which does not survive a fork. Elsewhere they are spawned: macOS's own
libraries do not survive a fork either.

A process that sees one GPU cannot allocate on another one, as a first `torch.cuda` call does on the first one. When
the parent dies, a worker finishes its epoch, gives its trial back and exits.
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
from collections.abc import Callable, Collection, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, cast

from hpo.search.interrupts import SIGNALS, Interrupts
from hpo.workers.engine import STOPPED, Ending, Engine, Seat, Worker
from hpo.workers.messages import Event, Job, Order, Share

if TYPE_CHECKING:
    from hpo.workers.worker import Orders

VISIBLE = "CUDA_VISIBLE_DEVICES"

_PRELOADED = ["hpo.workers.worker", "timm", "sklearn.datasets", "sklearn.model_selection", "matplotlib.figure"]

# A worker whose parent is gone finishes its epoch first. Where that takes longer it leaves all the same: the next run
# waits for it, and then goes on from its checkpoint.
_ORPHAN_S = 20.0


class LocalProcesses(Engine):
    """Starts workers as processes of this machine."""

    def start(self, job: Job, seat: Seat, share: Share) -> _Process:
        context = start_method()
        events, theirs = context.Pipe(duplex=False)
        taken, orders = context.Pipe(duplex=False)
        visible = visible_to(seat.device)
        device = seat.device if visible is None else "cuda:0"
        # The environment of a fork server is the one that it started with.
        environment = dict(os.environ) if visible is None else {**os.environ, VISIBLE: visible}
        arguments = (environment, job, device, share, theirs, taken)
        process = context.Process(target=enter, args=(main, *arguments), name=f"hpo {seat.name}")  # type: ignore[attr-defined]
        with _signals_blocked():
            process.start()
        theirs.close()  # else the worker's death would not end the pipe
        taken.close()
        return _Process(process, events, orders)

    def wait(self, workers: Collection[Worker], timeout_s: float) -> list[Worker]:
        processes = cast("Collection[_Process]", workers)
        ready = wait([worker.events for worker in processes], timeout_s)
        return [worker for worker in processes if worker.events in ready]

    def close(self) -> None:
        """Holds nothing."""


class _Process(Worker):
    """A worker's process, and the pipes to it."""

    def __init__(self, process: BaseProcess, events: Connection, orders: Connection) -> None:
        self._process, self._orders = process, orders
        self.events = events

    def order(self, order: Order) -> None:
        with contextlib.suppress(OSError):  # it is dying, and its last events are still to be read
            self._orders.send(order)

    def hear(self) -> Event:
        try:
            event: Event = self.events.recv()
        except OSError as error:  # killed in the middle of a message
            raise EOFError from error
        return event

    def kill(self) -> None:
        self._process.kill()

    def end(self, patience_s: float) -> Ending:
        self._process.join(patience_s)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        status = self._process.exitcode
        assert status is not None
        for part in (self.events, self._orders, self._process):
            part.close()
        if status == STOPPED:
            return Ending(clean=False, words="was asked to leave", blameless=True)
        words = f"ended with exit status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"
        return Ending(clean=status == 0, words=words)


def visible_to(device: str) -> str | None:
    """What `CUDA_VISIBLE_DEVICES` has to be for a process to see this GPU alone; None for no GPU: nothing to pin.

    The numbers of this process's GPUs count what it sees itself, which may be a part of the machine's, or names.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return None
    here = os.environ.get(VISIBLE)
    return index or "0" if here is None else here.split(",")[int(index or 0)]


def start_method() -> BaseContext:
    """How processes are started: forked from a server on Linux, spawned elsewhere. Starts the server."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with _signals_blocked():
        multiprocessing.forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Blocks `SIGNALS` in the processes started in here, until they can give a trial back."""
    multiprocessing.resource_tracker.ensure_running()  # here, since starting it lifts the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# In the worker's process


def enter(run: Callable[..., None], environment: Mapping[str, str], *arguments: Any) -> None:
    """Runs a function with the parent's environment, which a fork server's child has not inherited."""
    os.environ.clear()
    os.environ.update(environment)
    run(*arguments)


def main(job: Job, device: str, share: Share, events: Connection, taken: Connection) -> None:
    """Runs in the worker's process. It starts with `SIGNALS` blocked, so that none arrives before it is handled."""
    import torch

    from hpo.workers.worker import Orders, work_on

    os.chdir(job.folder)
    # A terminal's Ctrl-C reaches the parent too, which then says what is to be done.
    interrupts = Interrupts([signal.SIGTERM])
    orders = Orders(share, interrupts)
    # Begun while signals are blocked: they are the main thread's.
    threading.Thread(target=_listen, args=(taken, orders, interrupts), name="orders", daemon=True).start()

    def send(event: Event) -> None:
        with contextlib.suppress(OSError):  # a parent that is gone is for the thread that listens to it
            events.send(event)

    try:
        with interrupts:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            try:
                status = work_on(job, device=torch.device(device), orders=orders, send=send, interrupts=interrupts)
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a later one finds nothing more to stop
    except KeyboardInterrupt:  # one that was held to the end
        status = STOPPED
    sys.exit(status)


def _listen(taken: Connection, orders: Orders, interrupts: Interrupts) -> None:
    """Takes orders, until the parent is gone."""
    try:
        while True:
            orders.take(taken.recv())
    except (EOFError, OSError):
        interrupts.request()
        time.sleep(_ORPHAN_S)
        os._exit(1)
