"""The trials in a study's journal, read by Optuna without hpo."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend


def trials_of(study: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials of the study in this folder; none if it has no journal yet."""
    journal = study / "journal.log"
    if not journal.exists():
        return []
    storage = JournalStorage(JournalFileBackend(str(journal)))
    summaries = optuna.get_all_study_summaries(storage)
    assert len(summaries) <= 1
    return [
        trial
        for summary in summaries
        for trial in optuna.load_study(study_name=summary.study_name, storage=storage).get_trials()
    ]


def finished_of(study: Path) -> dict[int, tuple[Any, ...]]:
    """Trial index -> result; every index once."""
    done = [trial for trial in trials_of(study) if trial.state.name in ("COMPLETE", "PRUNED")]
    by_index = {
        trial.user_attrs["trial_index"]: (trial.state.name, trial.value, trial.params, trial.intermediate_values)
        for trial in done
    }
    assert len(by_index) == len(done)
    return by_index


def without_checksums(content: bytes) -> bytes:
    """A journal as Optuna and earlier versions write it."""
    return re.sub(rb',"at":\d+,"crc":"[0-9a-f]{8}"', b"", content)
