"""A job array: workers with a time limit on a database, submitted again until nothing is left."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpo.api.worker
from hpo.api.options import WorkerOptions
from hpo.search.interrupts import Interrupts
from hpo.study import find_study
from tests.hpo.commands import SPACE, RunHpo
from tests.hpo.storage.postgresql import running_server
from tests.hpo.zygote import Hpo

TRIALS = 12
AGAIN = 75


@pytest.fixture
def database() -> Iterator[str]:
    """The URL of a PostgreSQL server."""
    with running_server() as server:
        yield server.url


@pytest.fixture
def queued(tmp_path: Path, run_hpo: RunHpo, database: str, closed_databases: None) -> str:
    """The URL of a study that waits for workers, with trials of about a second."""
    file = tmp_path / "own.yaml"
    file.write_text(SPACE.replace("epochs: 2", "epochs: 40"))
    run_hpo("run", str(file), "--trials", str(TRIALS), "--workers", "0", "--storage", database)
    return database


def worker(storage: str, *options: str) -> subprocess.Popen[str]:
    return Hpo(
        ["worker", "own", "--storage", storage, "--device", "cpu", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.slow
def test_three_workers_that_run_out_of_time_and_are_submitted_again_end_exactly(queued: str) -> None:
    rounds: list[list[int]] = []
    while not rounds or AGAIN in rounds[-1]:
        minutes = "0.05" if len(rounds) < 2 else "1"
        jobs = [worker(queued, "--minutes", minutes) for _ in range(3)]
        said = [job.communicate(timeout=120)[0] for job in jobs]
        rounds.append([job.returncode for job in jobs])
        assert set(rounds[-1]) <= {0, AGAIN}, said
        assert len(rounds) <= 5
    assert [AGAIN in codes for codes in rounds[:2]] == [True, True], "the time limit cut it fewer than two times"
    study = find_study("own")
    counts = study.counts()
    assert (counts.finished, counts.running, counts.waiting) == (TRIALS, 0, 0)
    assert max(trial.user_attrs.get("resumed_epoch", 0) for trial in study.optuna.trials) > 0


def test_a_limit_that_is_over_as_the_last_trial_ends_is_no_interrupt(
    space_file: str, run_hpo: RunHpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_hpo("run", space_file, "--trials", "1")

    def train_until_the_limit(*_: object) -> None:
        while not interrupts.asked:
            time.sleep(0.01)

    monkeypatch.setattr("hpo.api.worker._train", train_until_the_limit)
    with Interrupts() as interrupts:  # raises what is left at its end
        result = hpo.api.worker.worker(WorkerOptions.of(study="own", minutes=0.05), interrupts=interrupts)
    assert not result.out_of_time


def test_a_worker_that_a_batch_queue_terminates_exits_with_the_signal(queued: str) -> None:
    job = worker(queued)
    study = find_study("own")
    ends = time.monotonic() + 60
    while not study.counts().running:
        assert time.monotonic() < ends
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=60)[0]
    assert job.returncode == 128 + signal.SIGTERM, said
    assert study.counts().running == 0
