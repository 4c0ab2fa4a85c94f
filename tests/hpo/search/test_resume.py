"""A run that is killed, or told to stop, goes on by the same command: real processes, real signals, real digits."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial

from hpo.paths import StudyPaths
from hpo.search.options import TrialOptions
from hpo.search.weights import keep_best_weights
from hpo.study import find_study
from tests.hpo.storage.journals import finished_of, trials_of
from tests.hpo.workers.chaos import Command, started
from tests.hpo.workers.processes import group_of, wait_until

SPACE = """
data: {name: digits}
base: {model: {widths: [16], blocks: [1]}, epochs: 12, batch_size: 64, augment: {flip: 0.0}}
pruner: {name: none}
sampler: {name: random}
search:
  optim.lr_scale: {low: 0.5, high: 20, log: true}
"""
# An epoch of it takes half a minute on a fast core.
SLOW = ("--set", "model.widths=[256]", "--set", "model.blocks=[4]", "--set", "batch_size=16")

Start = Callable[..., Command]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Gives `hpo run …`, and at the end of the test ends what is left of it."""
    (tmp_path / "own.yaml").write_text(SPACE)
    with started(tmp_path) as begin:
        yield begin


def running(study: Path) -> list[FrozenTrial]:
    return [trial for trial in trials_of(study) if trial.state.name == "RUNNING" and "lease" in trial.user_attrs]


def with_checkpoints(study: Path, command: Command, number: int) -> list[FrozenTrial]:
    """So many running trials, once each has a checkpoint and has trained three epochs."""

    def found() -> list[FrozenTrial]:
        assert command.process.poll() is None, command.said
        ready = [
            trial
            for trial in running(study)
            if (trial.last_step or 0) >= 3 and StudyPaths(study).checkpoint(trial.user_attrs["trial_index"]).exists()
        ]
        return ready if len(ready) >= number else []

    return list(wait_until(found, f"{number} running trials have a checkpoint"))


def attempts(study: Path, trial_index: int) -> list[FrozenTrial]:
    return [trial for trial in trials_of(study) if trial.user_attrs["trial_index"] == trial_index]


@pytest.mark.slow
def test_after_a_kill_of_everything_the_same_command_ends_at_its_total_and_tells_what_was_resumed(
    tmp_path: Path, start: Start
) -> None:
    study = tmp_path / "studies/digits"
    command = start("digits", "--trials", "4", "--workers", "2", "--set", "epochs=12")
    killed = with_checkpoints(study, command, 2)
    command.kill_all()
    assert len(running(study)) == 2

    command.start()
    assert command.ended() == 0, command.said
    said = command.said
    assert "study digits: 4 trials of 12 epochs, 0 done" in said
    trial_indices = ", ".join(str(trial.user_attrs["trial_index"]) for trial in killed)
    assert (
        f"2 trials left running by a process that died (trial index {trial_indices}): "
        "2 to resume from a checkpoint, 0 to start again\n"
    ) in said
    for trial in killed:
        trial_index = trial.user_attrs["trial_index"]
        again = attempts(study, trial_index)[1]
        resumed = again.user_attrs["resumed_epoch"]
        assert 0 < resumed <= (attempts(study, trial_index)[0].last_step or 0)
        assert (
            f"trial {again.number} resumes after epoch {resumed}, from the checkpoint of trial index {trial_index}\n"
            in said
        )
    assert "study digits (space digits): 4 of 4 trials finished" in said
    assert sorted(finished_of(study)) == [0, 1, 2, 3]
    assert not running(study)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(lambda pid: os.kill(pid, signal.SIGTERM), id="SIGTERM"),
        pytest.param(lambda pid: os.killpg(pid, signal.SIGUSR1), id="SIGUSR1 to all, as by a batch queue"),
    ],
)
def test_a_signal_lets_both_epochs_end_and_none_is_trained_again(
    stop: Callable[[int], None], tmp_path: Path, start: Start
) -> None:
    study = tmp_path / "studies/own"
    command = start("own.yaml", "--trials", "2", "--workers", "2")
    stopped = with_checkpoints(study, command, 2)
    stop(command.process.pid)
    assert command.ended() == 130, command.said
    assert "stopping: the running epoch is finished and saved first; press Ctrl-C again to stop at once" in command.said
    assert "stopped: 0 of 2 trials are done and safe; resume with\n  hpo run own.yaml --trials 2" in command.said
    assert not running(study)

    command.start()
    assert command.ended() == 0, command.said
    assert "were left running" not in command.said
    assert sorted(finished_of(study)) == [0, 1]
    for trial in stopped:
        before, after = attempts(study, trial.user_attrs["trial_index"])
        assert before.state.name == "FAIL"
        assert after.user_attrs["resumed_epoch"] == before.last_step
        assert "crashes" not in after.user_attrs  # nobody but the person was at fault


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_closed_terminal_stops_a_run_as_sigterm_does(workers: str, tmp_path: Path, start: Start) -> None:
    """The terminal is real: its other end closes, as when a connection breaks."""
    (tmp_path / "own.yaml").write_text(SPACE)
    study = tmp_path / "studies/own"
    arguments = ("own.yaml", "--trials", "2", "--workers", workers)
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CONTROLLED, *arguments],
        cwd=tmp_path,
        **dict.fromkeys(("stdin", "stdout", "stderr"), inside),
        start_new_session=True,
    )
    os.close(inside)
    reading = threading.Thread(target=read_until_closed, args=(terminal, closing := threading.Event()))
    reading.start()
    try:
        wait_until(lambda: any((trial.last_step or 0) >= 2 for trial in running_in(study)), "two epochs are trained")
        closing.set()
        reading.join()
        os.close(terminal)
        assert process.wait(60) == 130
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not running(study)
    assert not any("crashes" in trial.user_attrs for trial in trials_of(study))

    command = start(*arguments)
    assert command.ended() == 0, command.said
    assert "were left running" not in command.said
    assert " resumes after epoch " in command.said
    assert sorted(finished_of(study)) == [0, 1]


CONTROLLED = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "hpo.cli", "run", *sys.argv[1:]])
"""
"""`hpo run …` at the terminal that is its standard input."""


def running_in(study: Path) -> list[FrozenTrial]:
    return running(study) if StudyPaths(study).study_yaml.exists() else []


def read_until_closed(terminal: int, closing: threading.Event) -> None:
    """Read what a terminal shows: its buffer is small, and a full one stops the process."""
    while not closing.is_set():
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 1 << 16)


@pytest.mark.slow
def test_under_nohup_a_closed_terminal_stops_nothing(tmp_path: Path, start: Start) -> None:
    study = tmp_path / "studies/own"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited, as nohup does it
    try:
        command = [sys.executable, "-m", "hpo.cli", "run", "own.yaml", "--trials", "1"]
        (tmp_path / "own.yaml").write_text(SPACE)
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    with process:
        wait_until(lambda: running_in(study), "a trial runs")
        os.killpg(process.pid, signal.SIGHUP)
        assert process.wait(60) == 0
    assert sorted(finished_of(study)) == [0]


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_an_epoch_and_every_trial_is_queued_again(
    tmp_path: Path, start: Start
) -> None:
    study = tmp_path / "studies/own"
    command = start("own.yaml", "--trials", "3", "--workers", "2", *SLOW)
    wait_until(lambda: len(running(study)) == 2, "two trials run")
    workers = [trial.user_attrs["lease"]["pid"] for trial in running(study)]
    time.sleep(1)  # into the epoch
    os.killpg(command.process.pid, signal.SIGINT)  # as a terminal sends it: to all
    wait_until(lambda: "stopping: the running epoch is finished" in command.said, "the first is heard")
    asked = time.monotonic()
    os.killpg(command.process.pid, signal.SIGINT)
    assert command.ended() == 130, command.said
    took_s = time.monotonic() - asked
    assert "Traceback" not in command.said
    assert "stopped: 0 of 3 trials are done and safe; resume with\n  hpo run own.yaml" in command.said
    assert not group_of(command.process.pid) & set(workers)
    trials = trials_of(study)
    assert not any(trial.intermediate_values for trial in trials)  # no epoch was waited for
    assert sorted(t.user_attrs["trial_index"] for t in trials if t.state.name == "WAITING") == [0, 1, 2]
    assert not running(study)
    assert not any("crashes" in trial.user_attrs for trial in trials)  # a person's hurry is no configuration's fault
    assert took_s < 15  # an idle machine: under one


@pytest.mark.slow
def test_without_retries_a_trial_whose_process_is_killed_counts_as_failed_and_the_study_reaches_its_total(
    tmp_path: Path, start: Start
) -> None:
    study = tmp_path / "studies/own"
    command = start("own.yaml", "--trials", "3", "--workers", "2", "--retries", "0")
    victim = with_checkpoints(study, command, 2)[0]
    os.kill(victim.user_attrs["lease"]["pid"], signal.SIGKILL)
    assert command.ended() == 0, command.said
    [crashed] = [trial for trial in trials_of(study) if trial.state.name == "PRUNED"]
    assert crashed.number == victim.number
    assert crashed.user_attrs["failure"] == "crashed"
    assert crashed.value == crashed.intermediate_values[crashed.last_step or 0]
    assert re.search(
        rf"trial {victim.number}: 1 attempt at it died with the process, so it counts as failed to train; "
        "--retries N allows more",
        command.said,
    )
    assert sorted(finished_of(study)) == [0, 1, 2]
    assert len(trials_of(study)) == 3
    assert not StudyPaths(study).checkpoint(victim.user_attrs["trial_index"]).exists()


@pytest.mark.slow
def test_what_is_too_much_for_the_disk_is_let_go_of_the_best_last_and_never_a_running_trials_checkpoint(
    tmp_path: Path, start: Start
) -> None:
    study = tmp_path / "studies/own"
    arguments = ("own.yaml", "--set", "epochs=4", "--trials")
    assert start(*arguments, "3", "--workers", "2").ended() == 0
    weights = sorted(study.glob("trials/*/model.safetensors"))
    assert len(weights) == 3
    best = max(trials_of(study), key=lambda trial: trial.value or 0).number

    enough_for_one = 1.5 * weights[0].stat().st_size / 1e9
    keep_best_weights(find_study("own"), folds=1, options=TrialOptions(keep_gb=enough_for_one))
    assert [file.parent.name for file in study.glob("trials/*/model.safetensors")] == [f"{best:05d}"]

    command = start(*arguments, "5", "--workers", "1", "--keep-gb", "1e-9")
    assert command.ended() == 0, command.said
    assert sorted(finished_of(study)) == [0, 1, 2, 3, 4]
    assert not list(study.glob("trials/*/model.safetensors"))
    assert command.said.count("the checkpoints of the running trials alone take") == 1
