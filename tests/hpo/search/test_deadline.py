"""`hpo run --hours`: what begins, what is saved, and what is left for the next run."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState

from core.config import TrainConfig
from hpo.api.options import RunOptions
from hpo.paths import StudyPaths
from hpo.search import pace
from hpo.search.pace import PLAIN_S, Pace
from hpo.study import Study, find_study
from hpo.study.deadline import Deadline, OutOfTime
from hpo.study.settings import StudySettings
from hpo.trials import trial_index_of
from tests.hpo.commands import SPACE, RunHpo, Start
from tests.hpo.storage.journals import finished_of, trials_of
from tests.hpo.workers.processes import wait_until

OTHER = "model: {widths: [8], blocks: [1]}\nepochs: 2\nbatch_size: 128\nloss: {smoothing: 0.1}\n"
EPOCHS = ("--set", "epochs=30")
PROBE = {"optim.name": "logistic", "model.name": "timm/resnet18", "model.pretrained": True}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Advances both of Python's clocks by seconds."""
    offset = [0.0]
    wall, steady = time.time, time.monotonic
    monkeypatch.setattr("hpo.study.deadline.time.time", lambda: wall() + offset[0])
    monkeypatch.setattr("hpo.study.deadline.time.monotonic", lambda: steady() + offset[0])

    def advance(seconds: float) -> None:
        offset[0] += seconds

    return advance


def a_deadline() -> Deadline:
    return Deadline(StudySettings(optuna.create_study()))


# The stored limit


def test_time_runs_during_a_run_and_not_between_two(clock: Callable[[float], None]) -> None:
    deadline = a_deadline()
    deadline.begin(100)
    clock(30)
    deadline.record(force=True)
    clock(5000)
    assert deadline.left_s() < 0
    deadline.begin(100)
    assert deadline.left_s() == pytest.approx(70, abs=1)


def test_a_killed_run_loses_the_time_since_the_last_record_only(clock: Callable[[float], None]) -> None:
    deadline = a_deadline()
    deadline.begin(100)
    for _ in range(7):
        clock(6)
        deadline.record()  # at most every ten seconds
    clock(500)  # killed here, and started again later
    deadline.begin(100)
    assert 57 < deadline.left_s() < 69


def test_a_larger_limit_adds_to_the_time_that_is_left(clock: Callable[[float], None]) -> None:
    deadline = a_deadline()
    deadline.begin(100)
    clock(100)
    deadline.record(force=True)
    deadline.begin(250)
    assert deadline.left_s() == pytest.approx(150, abs=1)


def test_without_a_limit_there_is_always_time() -> None:
    deadline = a_deadline()
    assert deadline.left_s() == float("inf")
    deadline.begin(5)
    deadline.begin(None)
    assert deadline.left_s() == float("inf")
    assert not deadline.is_set


def test_reserved_time_is_not_for_trials(clock: Callable[[float], None]) -> None:
    deadline = a_deadline()
    deadline.begin(100)
    deadline.reserve(40)
    assert deadline.left_s() == pytest.approx(60, abs=1)
    assert deadline.left_s(trials=False) == pytest.approx(100, abs=1)


def test_hours_and_minutes_add_up_and_the_resuming_command_repeats_them() -> None:
    options = RunOptions(space="digits", hours=1, minutes=30, recipes=False)
    assert options.limit_s == 5400
    assert options.command() == "hpo run digits --no-recipes --hours 1 --minutes 30"


# What begins


@pytest.mark.parametrize("at_once", ["1", "2"])
def test_no_trial_begins_after_the_limit_and_the_rest_stay_queued(
    run_hpo: RunHpo, space_file: str, tmp_path: Path, at_once: str
) -> None:
    study = tmp_path / "studies/own"
    arguments = ("run", space_file, *EPOCHS, "--per-device", at_once, "--trials")
    said = run_hpo(*arguments, "60", "--minutes", "0.2")
    finished = len(finished_of(study))
    assert 0 < finished < 60
    assert f"{finished} of 60 trials are done and safe; more time with --minutes 0.4" in said
    joined = run_hpo("worker", "own")  # perhaps with time for a short one
    finished = len(finished_of(study))
    assert f"no further trial fits the time limit, {60 - finished} waiting: {finished} of 60 trials finished" in joined
    began = [trial.datetime_start for trial in trials_of(study) if trial.datetime_start is not None]
    assert max(began) - min(began) < timedelta(seconds=12)

    said = run_hpo(*arguments, str(finished + 1))
    assert len(finished_of(study)) == finished + 1
    assert "more time" not in said


def test_a_trial_that_cannot_end_in_time_does_not_begin(
    run_hpo: RunHpo, space_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "seconds_per_epoch", lambda *_, **__: 1801.0)
    said = run_hpo("run", space_file, "--trials", "1", "--hours", "1")  # two epochs
    assert "0 of 1 trial is done and safe" in said
    assert [trial.intermediate_values for trial in trials_of(tmp_path / "studies/own")] == [{}, {}]


@pytest.mark.parametrize(("most", "finished"), [(5, 7), (2, 4), (0, 2)])
def test_a_trial_that_is_too_long_waits_for_more_time_and_shorter_ones_go_on(
    most: int, finished: int, run_hpo: RunHpo, space_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ten trials, those with the indices 2, 4 and 6 seem to take hours."""
    asked = iter([0.001, 0.001, *[7200.0, 0.001] * 3, *[0.001] * 2])
    monkeypatch.setattr(pace, "seconds_per_epoch", lambda *_, **__: next(asked))
    monkeypatch.setattr("hpo.search.loop.MOST_TOO_LONG", most)
    arguments = ("run", space_file, "--trials", "10")
    said = run_hpo(*arguments, "--hours", "1")
    assert f"{finished} of 10 trials are done and safe" in said
    study = find_study("own").optuna
    waiting = [trial for trial in study.get_trials() if trial.state == TrialState.WAITING]
    long = {2} if most == 0 else {2, 4, 6}
    assert long <= set(map(trial_index_of, waiting))
    assert all(trial.params for trial in waiting if trial_index_of(trial) in long), "it keeps its configuration"
    monkeypatch.setattr(pace, "seconds_per_epoch", lambda *_, **__: 0.001)
    assert "10 of 10 trials finished" in run_hpo(*arguments, "--hours", "2")


def test_a_search_whose_baseline_is_too_long_has_no_other_trials(
    run_hpo: RunHpo, space_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter([7200.0])
    monkeypatch.setattr(pace, "seconds_per_epoch", lambda *_, **__: next(asked))
    assert "0 of 3 trials are done and safe" in run_hpo("run", space_file, "--trials", "3", "--hours", "1")


def test_used_up_time_is_reported_before_anything_is_measured(
    run_hpo: RunHpo, space_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("run", space_file, "--trials", "2", "--minutes", "0.5")
    run_hpo(*arguments[:3], "1", *arguments[4:])
    study = find_study("own")
    study.settings.deadline = {**(study.settings.deadline or {}), "used_s": 30.0}
    monkeypatch.setattr("hpo.search.loop.seconds_per_epoch", None)
    said = run_hpo(*arguments)
    assert "no further trial fits the 30 s of this study: 1 of 2 trials are done and safe" in said
    assert len(finished_of(tmp_path / "studies/own")) == 1


def test_a_time_limit_below_one_trial_is_refused_with_what_would_fit(
    run_hpo: RunHpo, space_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpo.search.loop.seconds_per_epoch", lambda *_, **__: 10.0)
    run_hpo("run", space_file, "--set", "epochs=90", "--hours", "0.1", code=2)
    assert "a trial of 90 epochs takes about 15 min, and 6 min are left" in run_hpo.error
    assert re.search(r"; 3[56] epochs would fit: --set epochs=3[56]; or raise --hours or --minutes", run_hpo.error)


def test_an_estimate_beyond_the_limit_shows_what_would_fit(
    run_hpo: RunHpo, space_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpo.search.loop.seconds_per_epoch", lambda *_, **__: 5.0)
    said = run_hpo("run", space_file, "--trials", "12", "--minutes", "1", "--set", "epochs=2")
    assert "enough for about 5 of these trials; to fit all: --trials 5 or --set epochs=" in said


def test_measured_speeds_are_corrected_by_those_of_finished_trials(
    run_hpo: RunHpo, space_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few steps that seem a thousand times slower than they are stop the second trial, not the third run's."""
    true = pace.seconds_per_epoch
    monkeypatch.setattr(pace, "seconds_per_epoch", lambda *a, **k: 1000 * true(*a, **k))
    run_hpo("run", space_file, "--trials", "1", "--hours", "10", *EPOCHS)
    run_hpo("run", space_file, "--trials", "3", "--minutes", "2", *EPOCHS)
    assert len(finished_of(tmp_path / "studies/own")) == 3


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A training whose two epochs took 20 s instead of 10 and what followed 30 s, and a probe that took 40 s."""
    monkeypatch.setattr(pace, "seconds_per_epoch", lambda *_, **__: 5.0)
    study = optuna.create_study()
    for number, (took_s, attributes) in enumerate(
        [(50, {PLAIN_S: 5.0, "epochs": 2, "elapsed_s": 20.0}), (40, {"epochs": 1, "elapsed_s": 40.0})]
    ):
        end = datetime.now()
        begin = end - timedelta(seconds=took_s)
        study.add_trial(FrozenTrial(number, TrialState.COMPLETE, 0.5, begin, end, {}, {}, attributes, {}, {}, number))
    return Study(study, StudyPaths(tmp_path), {"seed": 0}, "memory")


@pytest.mark.parametrize(("changes", "seconds"), [({}, 2 * 5 * 2 + 30), (PROBE, 2 * 5 + 30)])
def test_what_follows_the_epochs_counts_and_a_probe_neither_is_corrected_nor_corrects(
    changes: dict[str, Any], seconds: float, timed: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, begun = TrainConfig().override({"epochs": 2, **changes}), timed.optuna.ask()
    splits: list[Any] = [None]
    for left_s in (seconds - 1, seconds + 1):
        timed.deadline.begin(1000)
        monkeypatch.setattr(Deadline, "left_s", lambda self, trials=True, left_s=left_s: left_s)
        with pytest.raises(OutOfTime) if left_s < seconds else nullcontext():
            Pace(timed, torch.device("cpu")).begin(begun, 1, config, splits)
    assert (PLAIN_S in timed.optuna.get_trials()[-1].user_attrs) == (not changes)


# What is saved


def test_a_trial_that_is_slower_than_measured_is_saved_and_resumes_as_its_undisturbed_twin(
    run_hpo: RunHpo, space_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("run", space_file, "--trials", "1", "--set", "epochs=40")
    left = iter([50.0] * 4 + [0.0] * 100)
    monkeypatch.setattr(pace, "seconds_per_epoch", lambda *_, **__: 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Deadline, "left_s", lambda self, trials=True: next(left))
        said = run_hpo(*arguments, "--minutes", "1")
    assert "0 of 1 trial is done and safe" in said
    study = tmp_path / "studies/own"
    [stopped] = [trial for trial in trials_of(study) if trial.state.name == "FAIL"]
    assert 0 < len(stopped.intermediate_values) < 40
    said = run_hpo(*arguments, "--minutes", "5")
    assert f"resumes after epoch {len(stopped.intermediate_values)}" in said + run_hpo.error
    monkeypatch.setenv("HPO_STUDIES", str(tmp_path / "twin"))
    run_hpo(*arguments)
    assert finished_of(study) == finished_of(tmp_path / "twin/own")


def test_recipes_get_the_time_reserved_for_them(
    run_hpo: RunHpo, space_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.yaml").write_text(OTHER)
    Path(space_file).write_text(SPACE + "recipes: [other.yaml]\n")
    monkeypatch.setattr("hpo.search.loop.seconds_per_epoch", lambda *_, **__: 3.0)
    monkeypatch.setattr(pace, "seconds_per_epoch", lambda *_, **__: 56.0)  # for two epochs: 112 of the 114 s
    assert "1 of 1 trial finished" in run_hpo("run", space_file, "--trials", "1", "--minutes", "2")
    assert (find_study("own").settings.deadline or {})["reserved_s"] == 6
    monkeypatch.setattr(pace, "seconds_per_epoch", lambda *_, **__: 58.0)
    said = run_hpo("run", space_file, "--trials", "1", "--minutes", "2", "--study", "another")
    assert "0 of 1 trial is done and safe; more time with --minutes 4" in said
    assert "recipe other  accuracy" in said


def test_the_long_baseline_gets_its_part_of_the_time(
    run_hpo: RunHpo, space_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpo.search.loop.seconds_per_epoch", lambda *_, **__: 3.0)
    monkeypatch.setattr(pace, "seconds_per_epoch", lambda *_, **__: 3.0)
    said = run_hpo("run", space_file, "--trials", "20", "--minutes", "2", "--long-baseline")
    assert (find_study("own").settings.deadline or {})["reserved_s"] == 72
    assert re.search(r"4\d s are left, enough for about [67] of these trials", said)
    monkeypatch.setattr("hpo.search.recipes.seconds_per_epoch", lambda *_, **__: 10.0)
    said = run_hpo("run", space_file, "--trials", "21", "--minutes", "2.1", "--long-baseline")
    assert "the baseline for 42 epochs  left out: it would end after the deadline" in said


def test_recipes_can_be_left_out(run_hpo: RunHpo, space_file: str, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(OTHER)
    Path(space_file).write_text(SPACE + "recipes: [other.yaml]\n")
    assert "recipe other" not in run_hpo("run", space_file, "--trials", "1", "--no-recipes")
    assert "recipe other  accuracy" in run_hpo("run", space_file, "--trials", "1")


def test_time_used_before_a_kill_counts(space_file: str, tmp_path: Path, start: Start, run_hpo: RunHpo) -> None:
    study = tmp_path / "studies/own"
    arguments = (space_file, "--trials", "60", *EPOCHS, "--minutes", "0.4")
    process = start(*arguments)
    wait_until(lambda: study.exists() and len(finished_of(study)) >= 1, "a trial is done", process=process)
    process.kill()
    process.wait()
    used_s = find_study("own").deadline.used_s
    run_hpo("run", *arguments, "--workers", "0")
    after = find_study("own").deadline
    assert after.used_s == used_s > 0
    assert after.left_s() == pytest.approx(24 - used_s, abs=3)
