"""Opens what a study is stored in: Optuna's journal file by default, or any storage that a URL names.

What can be wrong with a storage is a person's to mend, so it is said in one line, without the password. What nobody
needs to be asked about is mended: a record torn by a crash, the lock of a killed process. A server that is restarted is
waited for.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalRedisBackend

from hpo.errors import StudyError
from hpo.storage.journal import open_journal, repair_journal
from hpo.storage.urls import advice, is_journal, is_masked, mask

__all__ = ["is_journal", "is_masked", "mask", "open_storage", "repair_journal"]


def open_storage(url: str, *, patient: bool = False) -> BaseStorage:
    """Opens the storage, and makes its tables or its file where there are none.

    Args:
        patient: waits for a database that does not answer, as every operation does afterwards: for a process that a
            running study has started. A person who mistyped a host shall not wait.

    Raises:
        StudyError: the URL, the driver, the server or the file will not do.
    """
    if is_journal(url):
        return open_journal(Path(url))
    try:
        if url.startswith(("redis://", "rediss://")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)  # Optuna's label on its Redis backend
                return JournalStorage(JournalRedisBackend(url))
        from hpo.storage.database import open_database  # with SQLAlchemy, which a journal does not need

        return open_database(url, patient=patient)
    except StudyError:
        raise
    except Exception as error:
        raise StudyError(f"storage {mask(url)}: {advice(url, error)}") from error
