"""The lock on a journal: it holds among processes of ours and of Optuna's, and a killed one's is recognised at once.

Optuna's lock is a symbolic link beside the journal. Whoever finds it cannot ask whether its maker lives, and so waits
30 s before taking it away. Processes of ours first take a lock of the kernel (flock), which dies with its holder, and
make Optuna's link inside it, spelt so that it names this machine. A link of this machine's that the holder of the
kernel's lock finds was left by a dead process, for certain. Any other link is Optuna's, or that of another machine,
with which the file system may not share its flock; it is waited for as Optuna does.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
import zlib
from functools import cache
from pathlib import Path

from optuna.storages.journal._file import BaseJournalFileLock

from hpo.storage.lease import machine

# Seconds without a write after which a link is taken for a dead process's, as by Optuna's JournalFileSymlinkLock.
GRACE_S = 30
# Seconds between two looks at a link: Optuna's processes hold theirs for as long as a write and a sync take, some ms.
_PAUSE_S = 0.002


class JournalLock(BaseJournalFileLock):
    """Excludes every other process that writes the journal, from `acquire` to `release`.

    Waiting ends with whatever exception a signal's handler raises. The kernel serves who wait on this machine in turn,
    so that none starves.

    Args:
        path: the journal. Beside it lie `PATH.flock`, which stays, and while the lock is held `PATH.lock`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._flock = path.with_name(path.name + ".flock")
        self._link = path.with_name(path.name + ".lock")
        self._held: int | None = None

    def acquire(self) -> bool:
        """Waits for the lock.

        Raises:
            OSError: the file system has no such lock, or no room for it.
        """
        # A descriptor of its own for every time: one that is kept would be shared with the processes that are forked.
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
        assert self._held is not None, "the lock is held"
        descriptor, self._held = self._held, None
        try:
            if self.is_left_by_the_dead():  # it is ours, else it was taken for a dead process's
                self._link.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def is_left_by_the_dead(self) -> bool:
        """Whether a link of this machine's is there: for who holds the kernel's lock, which then its maker does not."""
        return self._holder() == _spelling(self._path.name)

    def _make_link(self) -> None:
        own = _spelling(self._path.name)
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
                self._take_away()
            else:
                time.sleep(_PAUSE_S)

    def _holder(self) -> str | None:
        """What the link says; None where there is none."""
        try:
            return os.readlink(self._link)  # noqa: PTH115 — a Path would lose the spelling
        except FileNotFoundError:
            return None

    def _written_at(self) -> int | None:
        # Not of what the link leads to, as Optuna does: one that was made by a relative path leads nowhere.
        try:
            return self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _take_away(self) -> None:
        # Renamed first, as Optuna does: of two that take the same link for dead, one gets it.
        taken = self._link.with_name(f"{self._link.name}{uuid.uuid4()}.rename")
        try:
            self._link.rename(taken)
        except FileNotFoundError:
            return
        taken.unlink()


@cache
def _spelling(name: str) -> str:
    """A path of the file from its own folder that names this machine: `./` and `.//` lead to the same place.

    Optuna looks at the file that the link leads to. Sixteen bits keep it below the 60 bytes that ext4 stores without a
    block of its own, which a full disk would not have.
    """
    bits = zlib.crc32(machine().encode()) & 0xFFFF
    return "".join(".//" if bits >> place & 1 else "./" for place in range(16)) + name
