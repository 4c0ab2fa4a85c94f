"""Ctrl-C and SIGTERM: the first waits for the end of the epoch, the second does not.

A first one asks: the running epoch is finished and saved, the trial goes back to the queue, and nothing is repeated
later. Whoever cannot wait presses again. Neither is raised where something is half done: a KeyboardInterrupt can appear
between any two instructions, and in the middle of a storage's replay or of a lock's release it leaves them in a state
that the clean-up behind it then trips over. A third one ends the process as if nobody listened.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # a person's, and a batch queue's polite one


class _Manners(Enum):
    """What an interrupt may disturb."""

    HELD = "nothing: it waits for `check`, or for other manners"
    PATIENT = "an epoch, if it is the second one; the first waits for `check`"
    OPEN = "everything: it is raised at once"


class Interrupts:
    """As a context, holds interrupts back but where they are let through. Outside the main thread, which alone gets
    signals, only `request` asks.

    Args:
        signals: those that ask; the others of `SIGNALS` are ignored, as a worker ignores a terminal's Ctrl-C, which its
            parent hears as well.
        told: called when a first signal has come, in a thread of its own.
    """

    def __init__(self, signals: Sequence[signal.Signals] = SIGNALS, *, told: Callable[[], None] = lambda: None) -> None:
        self._signals, self._told = tuple(signals), told
        self._manners = _Manners.HELD
        self._thread: int | None = None
        """The one that trains, which the manners are of."""
        self._asked = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                heard = self._arrived if number in self._signals else signal.SIG_IGN
                self._before[number] = signal.signal(number, heard)
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
        """Whether the run is to stop."""
        return self._asked > 0

    def request(self) -> None:
        """Asks to stop, as a first Ctrl-C does; from any thread."""
        self._asked = max(self._asked, 1)

    def check(self) -> None:
        """Raises KeyboardInterrupt if somebody asked to stop."""
        if self.asked:
            raise KeyboardInterrupt

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Interrupts are raised at once in here: there is nothing to lose."""
        self._thread = threading.get_ident()
        with self._mannered(_Manners.OPEN):
            yield

    @contextmanager
    def patient(self) -> Iterator[None]:
        """A first interrupt waits in here until `check`, which whoever trains calls after an epoch; a second one is
        raised at once."""
        self._thread = threading.get_ident()
        with self._mannered(_Manners.PATIENT):
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """Interrupts wait until the end of this, inside of others; for other threads than theirs this is nothing."""
        if self._thread not in (None, threading.get_ident()):
            yield
            return
        with self._mannered(_Manners.HELD):
            yield
        self._raise_where_due()

    @contextmanager
    def _mannered(self, manners: _Manners) -> Iterator[None]:
        before, self._manners = self._manners, manners
        try:
            self._raise_where_due()
            yield
        finally:
            self._manners = before

    def _raise_where_due(self) -> None:
        if self._asked >= {_Manners.OPEN: 1, _Manners.PATIENT: 2, _Manners.HELD: 3}[self._manners]:
            raise KeyboardInterrupt

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        self._asked += 1
        if self._manners is _Manners.HELD and self._asked >= 3:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self._asked == 1:  # in a thread, since the main one may be in the middle of printing
            threading.Thread(target=self._told, name="interrupted").start()
        self._raise_where_due()
