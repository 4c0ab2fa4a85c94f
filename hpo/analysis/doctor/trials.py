"""Checks of a study's trials: abandoned ones, missing or doubled indices, and values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from hpo.analysis.doctor.check import Finding, Result, StudyCheck, guarded
from hpo.storage.lease import LEASE, dead_of, has_heartbeat, held_elsewhere, is_abandoned, own_lease
from hpo.storage.optuna_access import storage_of
from hpo.study import join_study
from hpo.study.results import read_rows
from hpo.text import held_by, some
from hpo.trials import effective_trials, trial_index_of


def abandoned(check: StudyCheck) -> Iterator[Result]:
    """Check that every running trial has a living process."""
    study = check.readable
    storage = storage_of(study.optuna)
    dead = dead_of(study.optuna, [trial for trial in check.trials if trial.state == TrialState.RUNNING])
    for trial in check.trials:
        if trial.state != TrialState.RUNNING:
            continue
        lease: Mapping[str, Any] | None = trial.user_attrs.get(LEASE)
        name, cause = f"trial {trial.number} (index {trial_index_of(trial)})", ""
        if is_abandoned(trial):
            cause = _cause_of_death(trial, lease)
        elif trial.number in dead:
            assert lease is not None
            cause = f"its process on {lease['host']} has shown no heartbeat for long"
        if cause:
            yield Finding(
                f"{name} is RUNNING, but {cause}",
                f"--mend requeues it: it resumes from its checkpoint, or ends after {study.settings.retries} retries",
                lambda: check.open().queue.reclaim(),
            )
        elif (held := held_elsewhere(trial)) is not None and not has_heartbeat(storage):
            yield Finding(
                f"{held_by(name, held.host, held.since)}, which cannot be checked from here",
                f"if it is dead: {study.settings.command or 'hpo run'} --reclaim",
            )


def _cause_of_death(trial: FrozenTrial, lease: Mapping[str, Any] | None) -> str:
    if lease is None:
        since = "" if trial.datetime_start is None else f" since {trial.datetime_start:%Y-%m-%d %H:%M}"
        return f"no process has held it{since}"
    restarted = lease["boot"] != own_lease()["boot"]
    return f"its process {lease['pid']} " + ("ended with a restart of the machine" if restarted else "is dead")


def indices(check: StudyCheck) -> Iterator[Result]:
    """Check that every trial index of the total has a trial, and only one in the queue."""
    total, taken = check.readable.total, effective_trials(check.trials)
    missing = [trial_index for trial_index in range(total or 0) if trial_index not in taken]
    if missing:
        have, them = ("has", "it") if len(missing) == 1 else ("have", "them")
        problem = f"{some('index', missing, plural='indices')} of the total of {total} {have} no trial"
        yield Finding(problem, f"--mend queues {them}", partial(_queue, check))
    for trial in check.trials:
        counted = taken.get(trial_index_of(trial))
        if trial.state == TrialState.WAITING and counted is not None and counted is not trial:
            yield Finding(
                f"index {trial_index_of(trial)} is queued as trial {trial.number}, although trial "
                f"{counted.number} has it",
                "--mend removes the second from the queue",
                partial(_queue, check),
            )


def results(check: StudyCheck) -> Iterator[Result]:
    """Check that the value of a complete trial is that of its kept epoch in `metrics.jsonl`."""
    metric = check.readable.metric
    column = "val_loss" if metric == "nll" else f"val_{metric}"
    for trial in check.trials:
        file = check.paths.trial_metrics(trial.number)
        kept = trial.user_attrs.get("kept_epoch")
        if trial.state == TrialState.COMPLETE and kept is not None:
            yield from guarded(check, str(file), partial(_result, trial=trial, file=file, column=column))


def _result(check: StudyCheck, *, trial: FrozenTrial, file: Path, column: str) -> Iterator[Result]:
    rows = read_rows(file)
    written = [row[column] for row in rows if row["epoch"] == trial.user_attrs["kept_epoch"] and column in row]
    of_folds = any("fold" in row for row in rows)  # a mean, over epochs of their own
    if written and not of_folds and not any(math.isclose(value, trial.values[0], rel_tol=1e-9) for value in written):
        yield Finding(
            f"trial {trial.number} has the value {trial.values[0]} in the storage, but {written[-1]} in {file}",
            f"one of them is damaged: restore it from a backup; hpo train --from {check.name}/{trial.number} trains "
            "it again",
        )


def _queue(check: StudyCheck) -> None:
    study = join_study(check.name, storage_url=check.url)
    assert study.total is not None
    study.queue.ensure_trials(study.total)
