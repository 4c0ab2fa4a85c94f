"""Checks of a study's storage: its records, its lock, and study.yaml."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.storages.journal import BaseJournalBackend

from hpo.analysis.doctor.check import Finding, Result, StudyCheck
from hpo.errors import StudyError
from hpo.storage import METADATA, is_journal, mask, open_storage
from hpo.storage.atomic import replacing
from hpo.storage.journal import CheckedStorage, damaged, repair_journal, torn_records
from hpo.storage.lock import GRACE_S, JournalLock
from hpo.storage.optuna_access import attribute_of
from hpo.study import Study


class _Records(BaseJournalBackend):
    """The records of a journal, read-only."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self._records = records

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        return self._records[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        raise AssertionError(f"a check tried to write {logs}")


def storage(check: StudyCheck) -> Iterator[Result]:
    """Check that the storage can be read, and set `check.study`."""
    file = _file_of(check.url)
    if file is not None and not file.exists():
        yield Finding(f"{file} is missing, and the study's trials with it", "restore it from a backup")
        return
    backend: BaseStorage
    if is_journal(check.url):
        journal = Path(check.url)
        content = journal.read_bytes()
        torn = torn_records(content, journal)
        for start, end in torn:
            where = "at its end" if end == len(content) else f"from byte {start} on"
            yield Finding(
                f"{journal}: {end - start} bytes {where} are a record torn by a crash",
                f"--mend removes it, and keeps it in {journal.name}.torn",
                partial(repair_journal, journal),
            )
        backend = CheckedStorage(_Records(_whole(content, torn, journal)), journal)
    else:
        backend = open_storage(check.url)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.load_study(study_name=check.name, storage=backend)
    except KeyError as error:
        raise StudyError(
            f"storage {mask(check.url)} has no study {check.name}; give the right one by --storage"
        ) from error
    metadata = attribute_of(study, METADATA)
    if metadata is None:
        raise StudyError(f"storage {mask(check.url)} has a study {check.name} that is not of hpo; choose another")
    check.study = Study(study, check.paths, metadata, check.url)


def _file_of(url: str) -> Path | None:
    """The file of a storage; None for a server."""
    if is_journal(url):
        return Path(url)
    scheme, _, rest = url.partition(":///")
    return Path(rest.partition("?")[0]) if scheme.startswith("sqlite") else None


def _whole(content: bytes, torn: Iterable[tuple[int, int]], journal: Path) -> list[dict[str, Any]]:
    """The records of a journal without the torn ones."""
    kept, before = [], 0
    for start, end in torn:
        kept.append(content[before:start])
        before = end
    records = []
    for number, line in enumerate(b"".join([*kept, content[before:]]).split(b"\n"), 1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise damaged(journal, number) from error
    return records


def lock(check: StudyCheck) -> Iterator[Result]:
    """Check that no dead process holds the journal's lock."""
    if not is_journal(check.url):
        return
    journal = Path(check.url)
    link = journal.with_name(journal.name + ".lock")
    if os.path.lexists(link) and JournalLock(journal).is_left_by_dead():
        yield Finding(
            f"{link}: left by a process that died; Optuna's own commands wait {GRACE_S} s for it",
            "--mend removes it",
            partial(_break_lock, journal),
        )


def _break_lock(journal: Path) -> None:
    with JournalLock(journal):  # breaks the lock of a dead process
        pass


def study_yaml(check: StudyCheck) -> Iterator[Result]:
    """Check that study.yaml can be read: without it, no command finds the study."""
    file = check.paths.study_yaml
    try:
        if check.metadata is not None:
            return
    except StudyError as error:
        if check.study is None:
            raise
        problem, advice = str(error).partition(";")[0], "--mend rebuilds it from the storage"
        yield Finding(problem, advice, partial(_write_study_yaml, check.study))
        return
    if check.study is None:
        yield Finding(f"{file} is missing, and cannot be rebuilt without the storage", "fix the storage first")
        return
    yield Finding(
        f"{file} is missing, although {check.study.storage_shown} has the study",
        "--mend rebuilds it from the storage",
        partial(_write_study_yaml, check.study),
    )


def _write_study_yaml(study: Study) -> None:
    """Rebuild study.yaml from the storage's metadata. JSON is YAML too."""
    file = study.paths.study_yaml
    own = study.storage_url == str(study.paths.journal)
    content = {"name": study.name, "storage": None if own else study.storage_shown, **study.metadata}
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file, synced=True) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
