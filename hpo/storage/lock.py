"""The lock of a journal file, which also excludes processes of Optuna, and does not outlast a killed holder.

A process takes the kernel's flock, which ends with its holder, and then creates Optuna's lock: a symbolic link, here
with a text that names this machine. Such a link under a free flock is that of a dead process. Links of Optuna and of
other machines, which may not share the flock, are waited for.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
import zlib
from functools import cache
from pathlib import Path

from optuna.storages.journal import JournalFileOpenLock
from optuna.storages.journal._file import BaseJournalFileLock

from hpo.storage.lease import machine

try:
    import fcntl
except ImportError:  # Windows, where Optuna's own lock is used
    fcntl = None  # type: ignore[assignment]

GRACE_S = 30
"""Seconds without a write until a link counts as a dead process's, as in Optuna's JournalFileSymlinkLock."""
_PAUSE_S = 0.002  # between two checks of a link; Optuna holds its own for some milliseconds


class JournalLock(BaseJournalFileLock):
    """Excludes every other writer of the journal. An exception of a signal handler ends the waiting."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._flock = path.with_name(path.name + ".flock")
        self._link = path.with_name(path.name + ".lock")
        self._held: int | None = None
        self._optunas = JournalFileOpenLock(str(path)) if fcntl is None else None

    def acquire(self) -> bool:
        """Wait for the lock; OSError if the file system has none, or no space for it."""
        if self._optunas is not None:
            return self._optunas.acquire()
        # A new descriptor each time, because forked processes would share an open one.
        descriptor = os.open(self._flock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._make_link()
        except BaseException:
            os.close(descriptor)
            raise
        self._held = descriptor
        return True

    def release(self) -> None:
        if self._optunas is not None:
            self._optunas.release()
            return
        assert self._held is not None, "the lock is held"
        descriptor, self._held = self._held, None
        try:
            if self._holder() == _link_text(self._path.name):  # else Optuna has broken it
                self._link.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def is_left_by_dead(self) -> bool:
        if fcntl is not None and self._flock.exists():
            descriptor = os.open(self._flock, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._holder() == _link_text(self._path.name):
                    return True
            except BlockingIOError:
                return False
            finally:
                os.close(descriptor)
        try:
            last = max(self._link.lstat().st_mtime, self._path.stat().st_mtime)
        except FileNotFoundError:  # its holder has just released it
            return False
        return time.time() - last > GRACE_S

    def _make_link(self) -> None:
        own = _link_text(self._path.name)
        written, since = self._written_at(), time.monotonic()
        while True:
            with contextlib.suppress(FileExistsError):
                self._link.symlink_to(own)
                return
            if self._holder() == own:
                self._link.unlink(missing_ok=True)
                continue
            if (now := self._written_at()) != written:
                written, since = now, time.monotonic()
            if time.monotonic() - since > GRACE_S:
                self._break_link()
            else:
                time.sleep(_PAUSE_S)

    def _holder(self) -> str | None:
        try:
            return os.readlink(self._link)  # noqa: PTH115 — a Path would normalize the text
        except FileNotFoundError:
            return None

    def _written_at(self) -> int | None:
        # Optuna takes the time of the link's target, which a relative link may not lead to.
        with contextlib.suppress(FileNotFoundError):
            return self._path.stat().st_mtime_ns
        return None

    def _break_link(self) -> None:
        # Renamed first, so that only one of several processes breaks it.
        broken = self._link.with_name(f"{self._link.name}{uuid.uuid4()}.rename")
        with contextlib.suppress(FileNotFoundError):
            self._link.rename(broken)
            broken.unlink()


@cache
def _link_text(name: str) -> str:
    """A path to the journal that names this machine, in `./` and `.//` for the bits of a checksum.

    Optuna reads the time of the link's target. ext4 stores up to 60 bytes without using a block.
    """
    bits = zlib.crc32(machine().encode()) & 0xFFFF
    return "".join(".//" if bits >> place & 1 else "./" for place in range(16)) + name
