"""Storages of studies: Optuna's journal file by default, or a URL's.

A new kind of storage is a branch of `open_storage`, with its driver in `urls.py`. Only this package uses private names
of Optuna.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.errors import StudyError
from hpo.storage.names import METADATA
from hpo.storage.urls import advice, is_journal, is_masked, mask

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

__all__ = ["METADATA", "is_journal", "is_masked", "mask", "open_storage"]


def open_storage(url: str, *, patient: bool = False) -> BaseStorage:
    """Open a storage URL or a journal's path; create missing tables or the file.

    Args:
        patient: Wait for a database that does not answer, as all later operations do.

    Raises:
        StudyError: The URL, the driver, the server or the file does not work.
    """
    if is_journal(url):
        from hpo.storage.journal import open_journal  # imports Optuna

        return open_journal(Path(url))
    try:
        if url.startswith(("redis://", "rediss://")):
            from optuna.exceptions import ExperimentalWarning
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalRedisBackend

            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                return JournalStorage(JournalRedisBackend(url))
        from hpo.storage.database import open_database  # imports SQLAlchemy

        return open_database(url, patient=patient)
    except StudyError:
        raise
    except Exception as error:
        raise StudyError(f"storage {mask(url)}: {advice(url, error)}") from error
