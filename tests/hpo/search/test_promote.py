"""`promote` with real trainings: pauses, kills, a small disk, a time limit, and what the user sees of paused trials."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from optuna_dashboard import get_note  # type: ignore[attr-defined]

import hpo.search.objective
from hpo.paths import StudyPaths
from hpo.search import pace
from hpo.study import find_study
from hpo.study.deadline import Deadline, OutOfTime
from hpo.study.queue import TrialQueue
from hpo.study.results import read_rows
from hpo.trials import PAUSED, RUNG_LOSS, effective_trials, is_paused
from tests.hpo.commands import RunHpo
from tests.hpo.storage.journals import trials_of
from tests.hpo.workers.chaos import Command, started
from tests.hpo.workers.processes import wait_until

EPOCHS = 6
PROMOTE = "pruner={name: promote, rungs: [0.17, 0.5]}"
SPACE = f"""
data: {{name: digits}}
base: {{model: {{widths: [8], blocks: [1]}}, epochs: {EPOCHS}, batch_size: 128, augment: {{flip: 0.0}}}}
pruner: {{name: promote, rungs: [0.17, 0.5]}}
sampler: {{name: random}}
search:
  optim.lr_scale: {{low: 0.5, high: 20, log: true}}
"""
RUN = ("run", "own.yaml", "--trials", "8")
"""The baseline, seven trials to epoch 1, three to epoch 3, one to the end."""


@pytest.fixture(autouse=True)
def space_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.yaml").write_text(SPACE)
    monkeypatch.chdir(tmp_path)


def results(study: Path) -> dict[int, Any]:
    """Trial index -> the end of its trial, and the epochs in its `metrics.jsonl`."""
    found = {}
    for trial_index, trial in effective_trials(trials_of(study)).items():
        rows = [row["epoch"] for row in read_rows(StudyPaths(study).trial_metrics(trial.number))]
        found[trial_index] = (trial.state.name, trial.values, trial.params, trial.intermediate_values, rows)
    return found


@pytest.fixture
def undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo) -> dict[int, Any]:
    with monkeypatch.context() as patch:
        patch.setenv("HPO_STUDIES", str(tmp_path / "twin"))
        run_hpo(*RUN)
    return results(tmp_path / "twin/own")


def stop_after(claims: int, patch: pytest.MonkeyPatch) -> None:
    """Let the run stop as after Ctrl-C when so many trials were claimed."""
    claim, made = TrialQueue.claim, []

    def claim_or_stop(self: TrialQueue, **keywords: Any) -> Any:
        if len(made) == claims:
            raise KeyboardInterrupt
        made.append(1)
        return claim(self, **keywords)

    patch.setattr(TrialQueue, "claim", claim_or_stop)


# The course of a study


def test_a_promoted_trial_equals_one_that_never_paused(
    run_hpo: RunHpo, undisturbed: dict[int, Any], tmp_path: Path
) -> None:
    assert [len(rows) for *_, rows in undisturbed.values()] != [EPOCHS] * 8
    run_hpo(*RUN, "--set", "pruner.name=none", "--study", "full")
    full = results(tmp_path / "studies/full")
    for trial_index, (state, values, params, reported, rows) in undisturbed.items():
        assert (params, rows) == (full[trial_index][2], full[trial_index][4][: len(rows)])
        assert reported == {step: full[trial_index][3][step] for step in reported}
        assert values == (full[trial_index][1] if state == "COMPLETE" else [reported[max(reported)]])
    ends = sorted(len(rows) for *_, rows in undisturbed.values())
    assert ends == [1] * 4 + [3] * 2 + [EPOCHS] * 2
    assert not list((tmp_path / "twin/own/checkpoints").glob("*.pt"))


def test_a_paused_trial_without_its_checkpoint_starts_over(
    run_hpo: RunHpo, undisturbed: dict[int, Any], tmp_path: Path
) -> None:
    said = run_hpo(*RUN, "--keep-gb", "1e-9")
    assert "deleting the checkpoint of paused trial" in said + run_hpo.error
    assert "resumes after" not in said + run_hpo.error
    assert results(tmp_path / "studies/own") == undisturbed


def test_a_run_that_stops_shows_its_paused_trials_and_the_same_command_ends_it(
    run_hpo: RunHpo, undisturbed: dict[int, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(9, patch)  # the baseline, seven new trials, and one that was promoted
        said = run_hpo(*RUN, code=130)
    assert "pruner promote at epoch 1, 3;" in said
    assert said.count("paused at epoch 1 ") == 7
    assert said.count("paused at epoch 3 ") == 1
    assert "7 trials paused at a rung: the best continue when their turn comes" in said
    assert "interrupted trial" not in said
    study = find_study("own")
    assert "1 of 8 trials finished: 1 complete, 7 paused" in run_hpo("study", "top", "own", "--once")
    assert "1 complete, 7 paused" in run_hpo("study", "show", "own")
    [promoted] = [trial for trial in study.optuna.trials if trial.user_attrs.get(PAUSED) == 3]
    assert is_paused(promoted)
    assert promoted.state == TrialState.WAITING
    note = get_note(optuna.Trial(study.optuna, promoted._trial_id))
    assert note.startswith(f"## Trial {promoted.number}: accuracy {promoted.intermediate_values[3]:.4f} at epoch 3")
    assert "Paused after 3 of 6 epochs. It continues if it is promoted, and is pruned otherwise." in note
    assert "passed rung 1 as 1st of 7" in note
    assert note.count("## Trial") == 1
    run_hpo("report", "own")
    report = study.paths.report.read_text()
    assert "The search is not over: 1 of 8 trials finished, 7 paused at a rung, none running now." in report

    said = run_hpo(*RUN)
    assert "1 done" in said
    assert results(tmp_path / "studies/own") == undisturbed
    assert "pruned at epoch 1" not in said  # the pause was reported before


# Time


def test_the_rest_of_a_time_limit_goes_to_the_best_paused_trial(
    run_hpo: RunHpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [15.0]  # seconds, of which an epoch takes one

    def check(self: Deadline, seconds: float, *, trials: bool = True) -> None:
        if seconds > left[0]:
            raise OutOfTime

    ended = hpo.search.objective._Attempt.epoch_ended

    def epoch_ended(self: Any, epoch: Any) -> None:
        left[0] -= 1
        ended(self, epoch)

    monkeypatch.setattr(pace, "seconds_per_epoch", lambda *_, **__: 1.0)
    monkeypatch.setattr(pace.Pace, "_correction", lambda _: 1.0)
    monkeypatch.setattr(pace.Pace, "_after", lambda _: 0.0)
    monkeypatch.setattr(Deadline, "check", check)
    monkeypatch.setattr(hpo.search.objective._Attempt, "epoch_ended", epoch_ended)
    said = run_hpo(*RUN, "--minutes", "5")
    trials = effective_trials(trials_of(tmp_path / "studies/own"))
    ends = {trial_index: (trial.state.name, trial.last_step) for trial_index, trial in trials.items()}
    paused = [trial for trial in trials.values() if is_paused(trial)]
    [best] = [trial for trial_index, trial in trials.items() if trial_index and trial.state == TrialState.COMPLETE]
    assert list(ends.values()).count(("WAITING", 1)) == len(paused) == 3
    assert list(ends.values()).count(("WAITING", None)) == 3
    losses = [trial.system_attrs[f"{RUNG_LOSS}1"] for trial in (best, *paused)]
    assert losses[0] == min(losses)
    assert "2 of 8 trials are done and safe, 3 paused; more time with --minutes 10" in said


# Kills


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts `hpo run …` as a process."""
    with started(tmp_path) as begin:
        yield begin


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "3"])
@pytest.mark.parametrize("space", ["own.yaml", pytest.param("digits", marks=pytest.mark.chaos)])
def test_after_ten_kills_the_total_is_exact_and_nothing_is_lost(
    tmp_path: Path,
    start: Callable[..., Command],
    run_hpo: RunHpo,
    monkeypatch: pytest.MonkeyPatch,
    space: str,
    workers: str,
) -> None:
    draw = random.Random(int(os.environ.get("HPO_CHAOS_SEED", "1")))
    arguments = (space, "--set", PROMOTE, "--study", "own", "--trials", "31", "--workers", workers, "--retries", "20")
    study, journal = tmp_path / "studies/own", tmp_path / "studies/own/journal.log"
    finished: dict[int, FrozenTrial] = {}
    for _ in range(10):
        records = _records(journal) + draw.randrange(5, 50)
        command = start(*arguments)
        wait_until(lambda r=records: _records(journal) >= r, "the run goes on", process=command.process)
        command.kill_all()
        now = effective_trials(trials_of(study))
        assert {trial_index: now[trial_index] for trial_index in finished} == finished
        finished = {trial_index: trial for trial_index, trial in now.items() if trial.state.is_finished()}
    command = start(*arguments)
    assert command.ended() == 0, command.said
    trials = effective_trials(trials_of(study))
    assert sorted(trials) == list(range(31))
    assert {trial.state for trial in trials.values()} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert len([trial for trial in trials_of(study) if trial.state.is_finished()]) >= 31
    if space == "own.yaml":
        reached = [sum(rung in trial.intermediate_values for trial in trials.values()) for rung in (1, 3, EPOCHS)]
        assert reached[0] == 31
        assert 11 <= reached[1] <= 11 + int(workers)
        assert 5 <= reached[2] <= 5 + int(workers)
    if workers == "1":
        monkeypatch.setenv("HPO_STUDIES", str(tmp_path / "twin"))
        run_hpo("run", *arguments)
        twin = results(tmp_path / "twin/own")
        assert {k: v[:4] for k, v in results(study).items()} == {k: v[:4] for k, v in twin.items()}


def _records(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0
