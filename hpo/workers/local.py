"""Workers as processes of this machine, spawned, each pinned to its device before torch is imported.

A process that sees one GPU cannot take memory of another by accident, as a first `torch.cuda` call does with the first
one. When the parent is gone, which the pipe between them says, whatever killed it, a worker finishes its epoch, gives
its trial back and leaves.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING, cast

from hpo.search.interrupts import SIGNALS, Interrupts
from hpo.workers.engine import STOPPED, Ending, Engine, Seat, Worker
from hpo.workers.messages import Event, Job, Order, Share

if TYPE_CHECKING:
    from hpo.workers.worker import Orders

VISIBLE = "CUDA_VISIBLE_DEVICES"

# A worker whose parent is gone finishes its epoch first. Where that takes longer it leaves all the same: the next run
# waits for it, and then goes on from its checkpoint.
_ORPHAN_S = 20.0


class LocalProcesses(Engine):
    """Starts workers as processes of this machine."""

    def start(self, job: Job, seat: Seat, share: Share) -> _Process:
        context = multiprocessing.get_context("spawn")
        events, theirs = context.Pipe(duplex=False)
        taken, orders = context.Pipe(duplex=False)
        visible = visible_to(seat.device)
        device = seat.device if visible is None else "cuda:0"
        process = context.Process(target=main, args=(job, device, share, theirs, taken), name=f"hpo {seat.name}")
        # A signal that comes while the worker is still importing waits until the worker can give its trial back. The
        # tracker is started before, since starting it lifts the block.
        multiprocessing.resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            with _environment(VISIBLE, visible):
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
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

    def __init__(self, process: SpawnProcess, events: Connection, orders: Connection) -> None:
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


@contextlib.contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """The variable is so for processes that are started in here; None leaves it as it is."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if value is not None:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


# In the worker's process


def main(job: Job, device: str, share: Share, events: Connection, taken: Connection) -> None:
    """Runs in the worker's process. It begins with `SIGNALS` blocked, so that none comes before it can be heeded."""
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
