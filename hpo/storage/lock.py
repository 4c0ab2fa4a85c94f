"""The lock of a journal file, which excludes processes of ours and of Optuna, and does not outlast a killed holder.

Optuna's lock is a symbolic link beside the journal, whose holder cannot be checked, so Optuna waits 30 s before it
breaks one. Our processes first take a lock of the kernel (flock), which ends with its holder, and create Optuna's link
while they have it. The link's text names this machine. If the holder of the kernel's lock finds a link of this machine,
its maker is dead for certain. Any other link belongs to Optuna or to another machine, with which the file system may
not share its flock; such a link is waited for as Optuna does.

filelock is not used here: it polls, while flock serves the waiting processes in turn, so that none of many starves.
"""

from __future__ import annotations

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
"""Seconds without a write after which a link counts as a dead process's, as in Optuna's JournalFileSymlinkLock."""
_PAUSE_S = 0.002  # between two checks of a link; Optuna holds its link for a write and a sync, some milliseconds


class JournalLock(BaseJournalFileLock):
    """Excludes every other process that writes the journal, from `acquire` to `release`.

    An exception of a signal handler ends the waiting. While the lock is held there is a file `PATH.lock`. `PATH.flock`
    stays.

    Args:
        path: The journal.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._flock = path.with_name(path.name + ".flock")
        self._link = path.with_name(path.name + ".lock")
        self._held: int | None = None
        self._optunas = JournalFileOpenLock(str(path)) if fcntl is None else None

    def acquire(self) -> bool:
        """Wait for the lock.

        Raises:
            OSError: The file system has no such lock, or no space for it.
        """
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
        """Release the lock, which must be held."""
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
        """Wait for the lock."""
        self.acquire()

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        self.release()

    def is_left_by_dead(self) -> bool:
        """Return whether `PATH.lock` was left by a dead process, as far as this machine can check."""
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
            try:
                self._link.symlink_to(own)
            except FileExistsError:
                pass
            else:
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
        """The link's text; None if there is no link."""
        try:
            return os.readlink(self._link)  # noqa: PTH115 — a Path would normalize the text
        except FileNotFoundError:
            return None

    def _written_at(self) -> int | None:
        # The journal's own time. Optuna takes that of the link's target, which a relative link may not lead to.
        try:
            return self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _break_link(self) -> None:
        # Renamed first, as Optuna does, so that only one of several processes breaks it.
        broken = self._link.with_name(f"{self._link.name}{uuid.uuid4()}.rename")
        try:
            self._link.rename(broken)
        except FileNotFoundError:
            return
        broken.unlink()


@cache
def _link_text(name: str) -> str:
    """A path of the file from its own folder that names this machine, in `./` and `.//` for the bits of a checksum.

    Optuna reads the time of the file that the link leads to. With 16 bits the text stays below 60 bytes, which ext4
    stores without a block of its own that a full disk would not have.
    """
    bits = zlib.crc32(machine().encode()) & 0xFFFF
    return "".join(".//" if bits >> place & 1 else "./" for place in range(16)) + name
