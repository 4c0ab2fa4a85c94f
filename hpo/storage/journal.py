"""The journal file: Optuna's, and what a crash, a full disk or a killed writer may do to it.

A record counts once its newline stands. So what a write leaves that fails or is killed is a torn tail, which nobody has
acted upon: whoever holds the lock next cuts it off. Optuna 5.0 itself writes behind it, and then cannot read the
journal any more; that is mended too. Any other damage stops with its line.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState

from hpo.errors import FULL_DISK, StudyError
from hpo.storage.lock import JournalLock

logger = logging.getLogger(__name__)

_FULL = FULL_DISK | {errno.EFBIG}  # of a file that may not grow any more
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def open_journal(path: Path) -> JournalStorage:
    """Opens a journal, made where there is none, and mends what a crash left of it.

    Raises:
        StudyError: the file cannot be opened, or is damaged in another way.
    """
    with _said(path, "opened"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            repair_journal(path)
        return JournalStorage(_Journal(path))


@contextmanager
def _said(path: Path, what: str) -> Iterator[None]:
    """Says in one line what the system does not let us do with the journal."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            hint = "free some space, and run the same command again: nothing that was written is lost"
        elif error.errno in _NO_LOCKS:
            hint = "its file system has no locks (flock); put the study on another, or give --storage a database"
        elif error.errno == errno.EIO:
            hint = "check the disk, and run the same command again"
        else:
            hint = "check the folder"
        raise StudyError(f"storage {path}: cannot be {what} ({error.strerror}); {hint}") from error


class _Journal(JournalFileBackend):
    """Optuna's journal file, safe against a killed writer and a full disk, and synced once a trial, not once a record.

    A killed process loses nothing that it had written, synced or not. A power cut may take the records since the last
    sync, so whatever ends a trial is synced, and all before it with it. What a running trial has reported may go: it is
    cut off anyway. A trial writes about 25 records, and a sync takes 0.5 to 6 ms.
    """

    def __init__(self, path: Path) -> None:
        self._lock: JournalLock
        super().__init__(str(path), JournalLock(path))
        self._path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Appends all of the records or none.

        Raises:
            StudyError: there is no room for them, or the file cannot be written.
        """
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with _said(self._path, "written"), self._lock, _opened(self._path) as descriptor:
            _cut_torn_tail(descriptor, self._path)
            _write_whole(descriptor, text.encode())
            if any(_is_lasting(log) for log in logs):
                # Where this fails, the record stands, for others may have read it: it is not taken back.
                os.fsync(descriptor)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """The records from that number on.

        Raises:
            StudyError: the journal cannot be read, or is damaged, and not by a crash.
        """
        number = log_number_from
        with _said(self._path, "read"):
            try:
                for log in super().read_logs(log_number_from):
                    number += 1
                    yield log
            except ValueError:  # not JSON: a writer was killed, and Optuna's dashboard wrote behind what it left
                repair_journal(self._path)
                self._log_number_offset = {n: at for n, at in self._log_number_offset.items() if n <= number}
                yield from super().read_logs(number)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_whole(descriptor: int, record: bytes) -> None:
    """Appends the bytes; where that fails, the file is as it was."""
    before = os.fstat(descriptor).st_size
    written = 0
    try:
        while written < len(record):  # a disk that is nearly full takes a part first, and then says so
            written += os.write(descriptor, record[written:])
    except BaseException:
        # By the size, not by `written`: an interrupt may come between the system's writing and ours counting it.
        if os.fstat(descriptor).st_size < before + len(record):
            os.ftruncate(descriptor, before)
        raise


def _is_lasting(log: dict[str, Any]) -> bool:
    """Whether a record ends a trial, adds an ended one, or is about the study."""
    match log["op_code"]:
        case JournalOperation.SET_TRIAL_STATE_VALUES | JournalOperation.CREATE_TRIAL:
            return TrialState(log.get("state", TrialState.RUNNING)).is_finished()
        case JournalOperation.SET_TRIAL_PARAM | JournalOperation.SET_TRIAL_INTERMEDIATE_VALUE:
            return False
        case JournalOperation.SET_TRIAL_USER_ATTR | JournalOperation.SET_TRIAL_SYSTEM_ATTR:
            return False
    return True


# What a crash leaves


def _cut_torn_tail(descriptor: int, path: Path) -> None:
    """Cuts off what stands behind the last newline. Who calls it holds the lock, so its writer is dead."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return
    content = path.read_bytes()
    start = content.rfind(b"\n") + 1
    _keep(path, content[start:])
    os.ftruncate(descriptor, start)


def repair_journal(path: Path) -> None:
    """Mends what a crash while writing leaves: a torn last line, or a torn record with a whole one behind it.

    A torn record was never acted upon by anyone, so it is taken out (and kept beside the journal in `*.torn`): the tail
    is cut off, and before a whole record it becomes spaces, which keeps every byte's place for others who are reading.

    Raises:
        StudyError: any other damage; skipping a whole line would re-number every trial behind it.
        OSError: the file cannot be read or written.
    """
    if not torn_records(path.read_bytes(), path):
        return
    with JournalLock(path), _opened(path) as descriptor:
        content = path.read_bytes()  # anew: without the lock, someone may just have been writing
        for start, end in torn_records(content, path):
            _keep(path, content[start:end])
            if end == len(content):
                os.ftruncate(descriptor, start)
            else:
                _blank(path, start, end)


def _keep(path: Path, torn: bytes) -> None:
    with path.with_name(path.name + ".torn").open("ab") as backup:
        backup.write(torn + b"\n")
    logger.warning("%s: a record torn by a crash was taken out, and kept in %s.torn", path, path.name)


def _blank(path: Path, start: int, end: int) -> None:
    # Not by a descriptor that appends: it would write at the end, whatever place it is told.
    with path.open("r+b") as journal:
        journal.seek(start)
        journal.write(b" " * (end - start))


_METADATA = b'{"op_code":'  # how Optuna begins every line


def torn_records(content: bytes, path: Path) -> list[tuple[int, int]]:
    """The torn records: (first byte, byte behind the last)."""
    if content.startswith(b"SQLite format 3"):
        raise StudyError(f"{path} is an SQLite file; give it as --storage sqlite:///{path}")
    torn, start = [], 0
    for number, line in enumerate(content.split(b"\n"), 1):
        end = start + len(line)
        if end == len(content):  # what stands behind the last newline is nothing, or a tail
            torn += [(start, end)] if line else []
        elif not _is_record(line):
            whole = next(
                (at.start() for at in re.finditer(re.escape(_METADATA), line) if _is_record(line[at.start() :])), 0
            )
            if whole:
                torn.append((start, start + whole))
            elif end + 1 == len(content):
                torn.append((start, end + 1))
            else:
                raise StudyError(f"{path}:{number}: damaged, and not by a crash of ours; restore it from a backup")
        start = end + 1
    return torn


def _is_record(line: bytes) -> bool:
    if line.startswith(_METADATA) and line.endswith(b"}") and line.count(_METADATA) == 1:
        return True  # begun and ended by one write; parsing every line would double the time to open a study
    try:
        record = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return False
    return isinstance(record, dict) and "op_code" in record
