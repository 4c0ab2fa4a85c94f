"""Ctrl-C and SIGTERM, let through only where nothing is half done.

A KeyboardInterrupt can appear between any two instructions. In the middle of a storage's replay or of a lock's release
it leaves them in a state that the clean-up behind it then trips over. So while a study runs, an interrupt is held back
until the training itself goes on, which has nothing to lose: at most some seconds, the time to finish a trial.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # a person's, and a batch queue's polite one


class Interrupts:
    """As a context, holds interrupts back but inside `let_through`. Outside the main thread, which alone gets
    signals, it does nothing."""

    def __init__(self) -> None:
        self._open = False
        self._pending = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._arrived) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is None:
            self.check()

    def check(self) -> None:
        """Raises KeyboardInterrupt if one was held back."""
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Interrupts are raised at once in here."""
        with self._set(open_=True):
            self.check()
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """Interrupts wait until the end of this, inside a `let_through`."""
        with self._set(open_=False):
            yield
        if self._open:
            self.check()

    @contextmanager
    def _set(self, *, open_: bool) -> Iterator[None]:
        before, self._open = self._open, open_
        try:
            yield
        finally:
            self._open = before

    def _arrived(self, _number: int, _frame: FrameType | None) -> None:
        self._pending = True
        if self._open:
            self.check()
