"""Ctrl-C and other signals: the first waits until the epoch is saved, the second does not, the third ends the process.

Neither of the first two is raised in the middle of a storage's read or a lock's release: a KeyboardInterrupt between
any two instructions would leave them in a state that breaks the clean-up.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
"""Of the user, of a batch queue, of a closed terminal, and of a batch queue some time before its limit."""


class _Mode(IntEnum):
    """How many interrupts it takes until one is raised."""

    OPEN = 1
    PATIENT = 2
    HELD = 3


class Interrupts:
    """As a context manager, holds interrupts back except where they are let through.

    Only the main thread receives signals. `told` is called at the first one, in a thread of its own.
    """

    def __init__(self, *, told: Callable[[], None] = lambda: None) -> None:
        self._told = told
        self._mode = _Mode.HELD
        self._thread: int | None = None
        """The thread that trains, which the mode belongs to."""
        self._count = 0
        self.exit_code = 130
        """Of a process that an interrupt ends: 128 and the number of the first signal."""
        self._before: dict[signal.Signals, Any] = {}
        self._terminals: list[int] = []
        """The file descriptors of the output that are a terminal."""

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                    self._before[number] = signal.signal(number, self._arrived)
            self._terminals = [output for output in (1, 2) if os.isatty(output)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is None:
            self.check()

    @property
    def asked(self) -> bool:
        return self._count > 0

    def request(self) -> None:
        """Stop as after a first Ctrl-C. Any thread may call this."""
        self._count = max(self._count, 1)

    def withdraw(self) -> None:
        """Forget what `request` asked for."""
        if self._count == 1:
            self._count = 0

    def check(self) -> None:
        if self.asked:
            raise KeyboardInterrupt

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Raise interrupts at once inside: there is nothing to lose."""
        self._thread = threading.get_ident()
        with self._in_mode(_Mode.OPEN):
            yield

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Leave a first interrupt inside to `check`, called after each epoch; raise a second one."""
        self._thread = threading.get_ident()
        with self._in_mode(_Mode.PATIENT):
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """Delay interrupts until the end of the block, in the trainer's thread."""
        if self._thread not in (None, threading.get_ident()):
            yield
            return
        with self._in_mode(_Mode.HELD):
            yield
        self._raise_if_due()

    @contextmanager
    def _in_mode(self, mode: _Mode) -> Iterator[None]:
        before, self._mode = self._mode, mode
        try:
            self._raise_if_due()
            yield
        finally:
            self._mode = before

    def _raise_if_due(self) -> None:
        if self._count >= self._mode:
            raise KeyboardInterrupt

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        self._count += 1
        self._leave_closed_terminals()
        if self._mode is _Mode.HELD and self._count >= 3:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self._count == 1:
            self.exit_code = 128 + number
            # In a thread, since the main one may be in the middle of printing.
            threading.Thread(target=self._told, name="interrupted").start()
        self._raise_if_due()

    def _leave_closed_terminals(self) -> None:
        """Write nowhere instead: each line to a closed terminal would raise an error."""
        for output in self._terminals:
            if not os.isatty(output):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, output)
                os.close(nowhere)
