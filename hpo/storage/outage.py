"""Wait for a database server that does not answer, as during its restart."""

from __future__ import annotations

import logging
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Literal, TypeVar

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import DBAPIError, OperationalError, PendingRollbackError

from hpo.errors import StudyError
from hpo.storage.urls import mask, words_of

logger = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""Seconds to retry: enough for a machine to restart and a database to recover."""

# Pauses double, and are randomly up to half shorter, so that workers do not retry at the same moment.
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 10.0

_Kind = Literal["lost", "busy", "full"]
_CODES: dict[_Kind, re.Pattern[str]] = {
    # No connection, or a broken one; too many; a shutdown, a start; a standby that is not the primary yet.
    "lost": re.compile(r"08\w{3}|53300|57P0[1235]|25006|1040|1053|2002|2003|2006|2013|2055"),
    # A deadlock or a lock timeout: the other transaction succeeded, and this one can be repeated.
    "busy": re.compile(r"40001|40P01|55P03|1205|1213|SQLITE_(BUSY|LOCKED)\w*"),
    "full": re.compile(r"53100|1021|1114|SQLITE_(FULL|IOERR\w*)"),
}
"""PostgreSQL's SQLSTATE (appendix A of its manual), MySQL's numbers and SQLite's names."""
_NO_CONNECTION = "08001"

_T = TypeVar("_T")


class Outage:
    """State of a server, shared by all threads of this process, so that an outage is logged once."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._since: float | None = None
        self._said = False
        self._lock = threading.Lock()

    def outlast(self, operation: Callable[[bool], _T]) -> _T:
        """Run an operation, and repeat it while the server does not answer.

        Args:
            operation: Takes whether an earlier attempt may have succeeded, with only the answer lost.

        Raises:
            StudyError: The server has not answered for `PATIENCE_S`, or has no space left.
        """
        pause_s, again, begun = _FIRST_PAUSE_S, False, time.monotonic()
        while True:
            try:
                result = operation(again)
            except (StorageInternalError, DBAPIError) as error:
                kind = _kind_of(error)
                if kind == "lost":
                    self._continue(error, again=again)
                elif kind == "full":
                    raise StudyError(
                        f"storage {mask(self._url)}: cannot be written ({self._words(error)}); free some space there,"
                        " and run the same command again: nothing that was written is lost"
                    ) from error
                elif kind is None or time.monotonic() - begun > PATIENCE_S:
                    raise
            else:
                self._end()
                return result
            time.sleep(pause_s * random.uniform(0.5, 1))
            pause_s, again = min(2 * pause_s, _LONGEST_PAUSE_S), True

    def _continue(self, error: BaseException, *, again: bool) -> None:
        with self._lock:
            now = time.monotonic()
            self._since = now if self._since is None else self._since
            if now - self._since > PATIENCE_S:
                raise StudyError(
                    f"storage {mask(self._url)}: has not answered for {(now - self._since) / 60:.0f} minutes"
                    f" ({self._words(error)}); when the server runs again, run the same command again to resume"
                ) from error
            if again and not self._said:  # the first time, an idle connection may have been dropped
                self._said = True
                text = "storage %s does not answer (%s); trying again for up to %g minutes"
                logger.warning(text, mask(self._url), self._words(error), PATIENCE_S / 60)

    def _end(self) -> None:
        if self._since is None:
            return
        with self._lock:
            if self._said:
                logger.info("storage %s answers again", mask(self._url))
            self._since, self._said = None, False

    def _words(self, error: BaseException) -> str:
        cause = _cause_of(error)
        return words_of(self._url, error if cause is None or cause.orig is None else cause.orig)


def is_no_outage(_record: logging.LogRecord) -> bool:
    """Filter out Optuna's log records about outages."""
    error = sys.exc_info()[1]
    return error is None or _kind_of(error) != "lost"


def _kind_of(error: BaseException) -> _Kind | None:
    cause = _cause_of(error)
    if cause is None or cause.orig is None:
        return None
    if cause.connection_invalidated:
        return "lost"
    return next((kind for kind, codes in _CODES.items() if codes.fullmatch(_code_of(cause))), None)


def _cause_of(error: BaseException | None) -> DBAPIError | None:
    while error is not None and not isinstance(error, DBAPIError):
        # If Optuna tried another query in the same transaction, SQLAlchemy's error hides the first one.
        error = error.__context__ if isinstance(error, PendingRollbackError) else error.__cause__
    return error


def _code_of(cause: DBAPIError) -> str:
    driver = cause.orig
    for name in ("sqlite_errorname", "sqlstate", "pgcode"):  # sqlite3, psycopg, psycopg2
        if hasattr(driver, name):
            code = getattr(driver, name)
            return str(code or (_NO_CONNECTION if isinstance(cause, OperationalError) else ""))
    return str(driver.args[0]) if driver is not None and driver.args else ""
