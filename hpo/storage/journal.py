"""Optuna's journal file, protected against crashes, full disks and killed writers.

A failed or killed write leaves a torn tail, which the next holder of the lock cuts off. Optuna 5.0 appends to the tail,
and then cannot read the journal any more; that is repaired too. Each record has its place in the file and a checksum,
and that of a claim the lease, which Optuna ignores.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState

from hpo.errors import FULL_DISK, StudyError
from hpo.storage.lease import LEASE, own_lease
from hpo.storage.lock import JournalLock
from hpo.storage.names import LONG, METADATA
from hpo.storage.records import check_types

logger = logging.getLogger(__name__)

_FULL = FULL_DISK | {errno.EFBIG}  # the limit of a file's size
_REPORTS = {
    *(JournalOperation.SET_TRIAL_PARAM, JournalOperation.SET_TRIAL_INTERMEDIATE_VALUE),
    *(JournalOperation.SET_TRIAL_USER_ATTR, JournalOperation.SET_TRIAL_SYSTEM_ATTR),
}
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def open_journal(path: Path) -> JournalStorage:
    """Open or create a journal, and repair it after a crash; StudyError if it cannot be opened or repaired."""
    with _explained(path, "opened"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            repair_journal(path)
        return CheckedStorage(_Journal(path), path)


@contextmanager
def _explained(path: Path, what: str) -> Iterator[None]:
    """Explain an error of the system in one line. `what` completes "cannot be …"."""
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


class CheckedStorage(JournalStorage):
    """Optuna's journal storage, in which a trial may go back from running to waiting.

    A record that cannot be replayed is a StudyError with its line.
    """

    def __init__(self, backend: BaseJournalBackend, path: Path) -> None:
        self._path = path
        super().__init__(backend)

    def _sync_with_backend(self) -> None:
        replayed = self._replay_result
        for log in self._backend.read_logs(replayed.log_number_read):
            line = replayed.log_number_read + 1
            own = isinstance(log, dict) and log.get("worker_id") == replayed.worker_id
            try:
                if not own:
                    check_types(log, ours=self._is_ours(log))
                claims = LEASE in log and self._waits(log["trial_id"])
                replayed.apply_logs([log])
                if claims:
                    trial = replayed._trials[log["trial_id"]]  # copied by this claim
                    trial.user_attrs = {**trial.user_attrs, LEASE: log[LEASE]}
            except Exception as error:
                if own:
                    raise  # Optuna's answer to this process's own operation
                replayed.log_number_read = line - 1  # else the next operation would skip the record
                raise damaged(self._path, line) from error

    def _is_ours(self, log: dict[str, Any]) -> bool:
        """Whether a record is of a study of hpo; a journal may have others."""
        replayed = self._replay_result
        study_id = log["study_id"] if "study_id" in log else replayed._trial_id_to_study_id.get(log.get("trial_id", -1))
        study = None if study_id is None else replayed._studies.get(study_id)
        return study is not None and (METADATA in study.user_attrs or LONG[METADATA] in study.system_attrs)

    def _waits(self, trial_id: int) -> bool:
        trial = self._replay_result._trials.get(trial_id)
        return trial is not None and trial.state == TrialState.WAITING

    def _write_log(self, op_code: int, extra_fields: dict[str, Any]) -> None:
        """With the lease in the record of a claim, since the process may die before its next one."""
        if op_code == JournalOperation.SET_TRIAL_STATE_VALUES and extra_fields["state"] == TrialState.RUNNING:
            extra_fields = {**extra_fields, LEASE: own_lease()}
        super()._write_log(op_code, extra_fields)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Set the state; with RUNNING, return whether this process was the first."""
        if state == TrialState.RUNNING:
            # Else Optuna takes the process that ran the trial before for the winner of every later race for it.
            self._replay_result._worker_id_to_owned_trial_id.pop(self._replay_result.worker_id, None)
        return super().set_trial_state_values(trial_id, state, values)


class _Journal(JournalFileBackend):
    """Optuna's journal file with atomic appends, synced once a trial instead of 25 times, each 0.5 to 6 ms."""

    def __init__(self, path: Path) -> None:
        self._lock: JournalLock
        super().__init__(str(path), JournalLock(path))
        self._path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append all records or none; StudyError if the file cannot be written."""
        records = [json.dumps(log, separators=(",", ":")).encode() for log in logs]
        with _explained(self._path, "written"), self._lock, _opened(self._path) as descriptor:
            _cut_torn_tail(descriptor, self._path)
            before, written = os.fstat(descriptor).st_size, bytearray()
            for record in records:
                written += sealed(record, before + len(written)) + b"\n"
            _write_whole(descriptor, bytes(written))
            if any(_is_lasting(log) for log in logs):
                # If this fails, the record stays, since other processes may have read it.
                os.fsync(descriptor)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Yield the records from this number on; StudyError about damage that is not a crash's."""
        number = log_number_from
        with _explained(self._path, "read"):
            try:
                for log in super().read_logs(log_number_from):
                    number += 1
                    yield log
            except ValueError:  # not JSON: Optuna's dashboard appended to the torn tail of a killed writer
                repair_journal(self._path)
                self._log_number_offset = {n: at for n, at in self._log_number_offset.items() if n <= number}
                try:
                    for log in super().read_logs(number):
                        number += 1
                        yield log
                except ValueError as error:
                    raise damaged(self._path, number + 1) from error


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_whole(descriptor: int, record: bytes) -> None:
    """Append the bytes; restore the file if that fails."""
    before = os.fstat(descriptor).st_size
    written = 0
    try:
        while written < len(record):  # a nearly full disk takes a part before the error
            written += os.write(descriptor, record[written:])
    except BaseException:
        # By the size, not by `written`: an interrupt may come between the write and the count.
        if os.fstat(descriptor).st_size < before + len(record):
            os.ftruncate(descriptor, before)
        raise


def _is_lasting(log: dict[str, Any]) -> bool:
    """Whether a record ends a trial, adds a finished one, or is about the study."""
    if log["op_code"] in (JournalOperation.SET_TRIAL_STATE_VALUES, JournalOperation.CREATE_TRIAL):
        return TrialState(log.get("state", TrialState.RUNNING)).is_finished()
    return log["op_code"] not in _REPORTS


def _cut_torn_tail(descriptor: int, path: Path) -> None:
    """The caller holds the lock."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return
    content = path.read_bytes()
    start = content.rfind(b"\n") + 1
    _keep(path, content[start:])
    os.ftruncate(descriptor, start)


def repair_journal(path: Path) -> None:
    """Repair a torn last line, or a torn record in front of a complete one; StudyError about other damage.

    The record is moved to `*.torn`. In front of a complete one it becomes spaces, for processes that are reading.
    """
    if not torn_records(path.read_bytes(), path):
        return
    with JournalLock(path), _opened(path) as descriptor:
        content = path.read_bytes()  # again: without the lock, another process may have been writing
        for start, end in torn_records(content, path):
            _keep(path, content[start:end])
            if end == len(content):
                os.ftruncate(descriptor, start)
            else:
                with path.open("r+b") as journal:  # a descriptor opened for appending would write at the end
                    journal.seek(start)
                    journal.write(b" " * (end - start))


def _keep(path: Path, torn: bytes) -> None:
    kept = path.with_name(path.name + ".torn")
    if kept.is_symlink():
        kept.unlink()
    with kept.open("ab") as backup:
        backup.write(torn + b"\n")
    logger.warning("%s: a record torn by a crash was taken out, and kept in %s.torn", path, path.name)


_RECORD = b'{"op_code":'  # start of each of Optuna's lines
_SURROGATE = b"\\ud"  # half of a character; JSON accepts a single one, which no file can hold
_CHECKSUM = b',"crc":"'
_CHECKSUM_SIZE = len(_CHECKSUM) + 10  # with eight digits and `"}`
_PLACE = b',"at":'
_PLACE_SIZE = len(_PLACE) + 20  # an integer of 64 bits


def sealed(record: bytes, at: int) -> bytes:
    """Return a record of JSON with its first byte's place in the file and its CRC-32 as the last fields."""
    content = b"%s%s%d" % (record[:-1], _PLACE, at)
    return content + _checksum(content)


def _checksum(content: bytes) -> bytes:
    return b'%s%08x"}' % (_CHECKSUM, zlib.crc32(content))


def _has_checksum(line: bytes) -> bool:
    return line[-_CHECKSUM_SIZE:-10] == _CHECKSUM


def damaged(path: Path, line: int, how: str = "damaged") -> StudyError:
    """Return the error about a record that is not as it was written."""
    return StudyError(f"{path}:{line}: {how}, and not by a crash of ours; restore it from a backup")


def torn_records(content: bytes, path: Path) -> list[tuple[int, int]]:
    """Return the first byte of each torn record and the byte after it; StudyError about other damage."""
    if content.startswith(b"SQLite format 3"):
        raise StudyError(f"{path} is an SQLite file; give it as --storage sqlite:///{path}")
    begins = content.lstrip(b" \0")[: len(_RECORD)]
    if not _RECORD.startswith(begins):  # a file of something else, of which nothing may be cut off
        raise damaged(path, 1)
    torn, start = [], 0
    for number, line in enumerate(content.split(b"\n"), 1):
        end = start + len(line)
        if end == len(content):  # the text after the last newline is empty or a torn tail
            if _is_record(line[:-1], parsed=True):  # only its newline is damaged
                raise damaged(path, number)
            torn += [(start, end)] if line else []
        elif not _is_record(line, parsed=end + 1 == len(content)):  # Optuna skips a last line that it cannot read
            starts = (at.start() for at in re.finditer(re.escape(_RECORD), line))
            whole = next((at for at in starts if _is_record(line[at:])), 0)
            if whole and not _is_record(line[: whole - 1]):  # else only the newline between two records is damaged
                torn.append((start, start + whole))
            elif end + 1 == len(content) and not _has_end(line):
                torn.append((start, end + 1))
            else:
                raise damaged(path, number)
        elif _is_displaced(line, start):
            raise damaged(path, number, "damaged, since records before it were deleted or inserted")
        start = end + 1
    return torn


def _is_displaced(line: bytes, start: int) -> bool:
    """Whether a record was written at another place; earlier versions and other programs wrote none."""
    if not _has_checksum(line):
        return False
    _, _, place = line[-_PLACE_SIZE - _CHECKSUM_SIZE : -_CHECKSUM_SIZE].rpartition(_PLACE)
    spaces = len(line) - len(line.lstrip(b" "))  # of a torn record that was taken out
    return place.isdigit() and int(place) != start + spaces


def _has_end(line: bytes) -> bool:
    """Whether a line that is no record was written to its end, so that it is damaged, not torn."""
    return (line.startswith(_RECORD) and line.endswith(b"}")) or _has_checksum(line)


def _is_record(line: bytes, *, parsed: bool = False) -> bool:
    """Whether a line is a record; one without a checksum is only parsed if it looks strange, or if asked for."""
    if _has_checksum(line):
        content = line[:-_CHECKSUM_SIZE].lstrip(b" ")  # spaces are a torn record that was taken out
        return line.endswith(_checksum(content))
    plain = line.isascii() and _SURROGATE not in line
    if not parsed and plain and line.startswith(_RECORD) and line.endswith(b"}") and line.count(_RECORD) == 1:
        return True  # parsing every line would double the time to open a study
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()
    except ValueError:  # not JSON, or not Unicode
        return False
    return isinstance(record, dict) and "op_code" in record
