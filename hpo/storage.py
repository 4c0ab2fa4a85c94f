"""Opens what a study is stored in: Optuna's journal file by default, or any storage that a URL names.

What can be wrong with a storage is a person's to mend, so it is said in one line, without the password. The one damage
that nobody needs to be asked about is mended here: the torn last line that a crash while writing leaves in a journal,
which Optuna 5.0 cannot read any more once something is written behind it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock, JournalRedisBackend
from optuna.storages.journal._file import get_lock_file
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState

from hpo.errors import StudyError

logger = logging.getLogger(__name__)

MASK = "***"
# Seconds until a database server that does not answer is given up, and until a locked SQLite file is.
_CONNECT_TIMEOUT_S = 10
_SQLITE_TIMEOUT_S = 60
# Attempts at a schema that another process is making, and the seconds between them: it takes about a second.
_SCHEMA_ATTEMPTS = 20
_SCHEMA_PAUSE_S = 0.25
_DRIVERS = {
    "psycopg": ("postgresql", "postgresql+psycopg://"),
    "psycopg2": ("postgresql", "postgresql+psycopg://"),
    "pymysql": ("mysql", "mysql+pymysql://"),
    "MySQLdb": ("mysql", "mysql+pymysql://"),
    "redis": ("redis", "redis://"),
}
"""Module that a driver is -> (the extra of ours that brings it, the URL that asks for it)."""
_URLS = "a journal's path, sqlite:///FILE, postgresql+psycopg://…, mysql+pymysql://… or redis://…"


def is_journal(url: str) -> bool:
    """Whether a storage is named by the path of a journal file."""
    return "://" not in url


def mask(url: str) -> str:
    """The URL as it may be shown and written down: `***` for its password."""
    if is_journal(url):
        return url
    for secret in _secrets(url):
        url = url.replace(secret, MASK)
    return url


def is_masked(url: str) -> bool:
    """Whether the URL has lost its password."""
    return MASK in _secrets(url)


def _secrets(url: str) -> list[str]:
    """What of a URL is secret, as it is spelt there; nothing where it cannot be read as one."""
    if is_journal(url):
        return []
    # Not urlsplit's password: that one stops at a `/` or `#`, which people forget to quote.
    found = re.match(r"[^:]+://[^:@/]*:(.+)@", url)
    secrets = [found[1]] if found else []
    try:
        query = parse_qsl(urlsplit(url).query)
    except ValueError:
        return secrets
    return secrets + [value for name, value in query if name in ("password", "sslpassword") and value]


def open_storage(url: str) -> BaseStorage:
    """Opens the storage, and makes its tables or its file where there are none.

    Raises:
        StudyError: the URL, the driver, the server or the file will not do.
    """
    if is_journal(url):
        return _open_journal(Path(url))
    try:
        if url.startswith(("redis://", "rediss://")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)  # Optuna's label on its Redis backend
                return JournalStorage(JournalRedisBackend(url))
        return get_storage(_open_database(url))
    except Exception as error:
        raise StudyError(f"storage {mask(url)}: {_advice(url, error)}") from error


def _open_database(url: str) -> RDBStorage:
    for attempt in range(_SCHEMA_ATTEMPTS):
        try:
            storage = RDBStorage(url, engine_kwargs=_engine_options(url))
            break
        except Exception as error:
            # Two processes that begin at once both make the tables, and one of them finds them half made.
            if attempt == _SCHEMA_ATTEMPTS - 1 or not re.search(r"already exists|duplicate|UNIQUE", str(error)):
                raise
            time.sleep(_SCHEMA_PAUSE_S)
    if url.startswith("sqlite"):
        _serialise(storage)
    return storage


def _serialise(storage: RDBStorage) -> None:
    """Makes every transaction of a SQLite storage exclusive from its beginning.

    SQLite knows no SELECT … FOR UPDATE, so with its deferred transactions two processes both read that a trial waits,
    and both claim it; or both want to write after reading, and one gets "database is locked" at once. The write-ahead
    log saves most of the syncs.
    """
    from sqlalchemy import event

    @event.listens_for(storage.engine, "connect")
    def set_up(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # BEGIN is ours to say
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    @event.listens_for(storage.engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    storage.engine.dispose()  # the connections that were made before


def _engine_options(url: str) -> dict[str, Any]:
    options: dict[str, Any] = {"pool_pre_ping": True}  # a connection that the server dropped overnight is made anew
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": _SQLITE_TIMEOUT_S}
    elif url.startswith(("postgresql", "mysql")):
        options["connect_args"] = {"connect_timeout": _CONNECT_TIMEOUT_S}
    return options


def _advice(url: str, error: BaseException) -> str:
    """What is wrong, and what to do about it."""
    missing = _missing_module(error)
    if missing in _DRIVERS:
        extra, scheme = _DRIVERS[missing]
        if url.startswith(scheme):
            return f"the driver {missing} is not installed; pip install 'hpo-vision[{extra}]'"
        return f"the driver {missing} is not installed; write {scheme}… and pip install 'hpo-vision[{extra}]'"
    kind = type(error).__name__
    if kind in ("ArgumentError", "NoSuchModuleError", "ValueError") or missing:
        return f"not a storage that Optuna knows; give {_URLS}"
    words = " ".join(str(error).split())
    for secret in _secrets(url):
        words = words.replace(secret, MASK)
    words = re.sub(r"\s*\(Background on this error at: .*?\)", "", words)
    words = re.sub(r"^\([\w.]+\)\s*", "", words)
    hint = "check the folder" if url.startswith("sqlite") else "check that the server runs, and host, user and database"
    return f"cannot be opened ({words}); {hint}"


def _missing_module(error: BaseException | None) -> str | None:
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            return error.name
        if isinstance(error, ImportError) and "redis" in str(error):
            return "redis"
        error = error.__cause__
    return None


# The journal file


def _open_journal(path: Path) -> JournalStorage:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            repair_journal(path)
        return JournalStorage(_Journal(str(path)))
    except OSError as error:
        raise StudyError(f"storage {path}: cannot be opened ({error.strerror}); check the folder") from error


class _Journal(JournalFileBackend):
    """Optuna's journal file, made safe against a power cut once a trial and not once a record.

    A killed process loses nothing that it had written, synced or not. A power cut may take the records since the last
    sync, so whatever ends a trial is synced, and all before it with it. What a running trial has reported may go: it is
    cut off anyway. A trial writes about 25 records, and a sync takes 0.5 to 6 ms.
    """

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with get_lock_file(self._lock), Path(self._file_path).open("ab") as file:
            file.write(text.encode())
            file.flush()
            if any(_is_lasting(log) for log in logs):
                os.fsync(file.fileno())


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


def repair_journal(path: Path) -> None:
    """Mends what a crash while writing leaves: a torn last line, or a torn record with a whole one behind it.

    A torn record was never acted upon by anyone, so it is taken out (and kept beside the journal in `*.torn`): the tail
    is cut off, and before a whole record it becomes spaces, which keeps every byte's place for others who are reading.

    Raises:
        StudyError: any other damage; skipping a whole line would re-number every trial behind it.
    """
    if not _torn(path.read_bytes(), path):
        return
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        content = path.read_bytes()  # anew: without the lock, someone may just have been writing
        for start, end in _torn(content, path):
            with path.with_name(path.name + ".torn").open("ab") as backup:
                backup.write(content[start:end] + b"\n")
            with path.open("r+b") as journal:
                if end == len(content):
                    journal.truncate(start)
                else:
                    journal.seek(start)
                    journal.write(b" " * (end - start))
            logger.warning("%s: a record torn by a crash was taken out, and kept in %s.torn", path, path.name)
    finally:
        lock.release()


_RECORD = b'{"op_code":'  # how Optuna begins every line


def _torn(content: bytes, path: Path) -> list[tuple[int, int]]:
    """The torn records: (first byte, byte behind the last)."""
    torn, start = [], 0
    for number, line in enumerate(content.split(b"\n"), 1):
        end = start + len(line)
        if end == len(content):  # what stands behind the last newline is nothing, or a tail
            torn += [(start, end)] if line else []
        elif not _is_record(line):
            whole = next(
                (at.start() for at in re.finditer(re.escape(_RECORD), line) if _is_record(line[at.start() :])), 0
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
    if line.startswith(_RECORD) and line.endswith(b"}") and line.count(_RECORD) == 1:
        return True  # begun and ended by one write; parsing every line would double the time to open a study
    try:
        record = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return False
    return isinstance(record, dict) and "op_code" in record
