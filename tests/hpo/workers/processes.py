"""Find real processes, and wait for them."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

import psutil

PATIENCE_S = 240.0  # this machine may be busy with other things


def wait_until(
    condition: Callable[[], Any],
    what: str,
    *,
    process: subprocess.Popen[str] | None = None,
    seconds: float = PATIENCE_S,
) -> Any:
    """Return the condition's value once it is true.

    Args:
        condition: checked again and again, a fifth of the time: the processor is others'.
        what: describes it, for the error message.
        process: must not end meanwhile.
        seconds: the longest wait.
    """
    deadline = time.monotonic() + seconds
    while True:
        began = time.monotonic()
        if value := condition():
            return value
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(min(0.5, max(0.02, 4 * (time.monotonic() - began))))


def group_of(head: int) -> set[int]:
    """The living processes of a process group."""
    members = set()
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == head and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                members.add(process.pid)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return members
