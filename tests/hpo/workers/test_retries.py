"""Retries of trials whose process died, replicates of earlier configurations, and workers that join a study."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState, create_trial

from hpo.cli.progress import StudyProgress
from hpo.errors import StudyError
from hpo.space import SearchSpace, load_space, space_from_yaml, space_to_yaml
from hpo.storage import is_masked, lease, mask, open_storage
from hpo.storage.lease import LEASE, own_lease
from hpo.study import Study, find_study, join_study, open_study
from hpo.trials import CRASHES, FAILURE, REPLICATE_OF, TRIAL_INDEX, first_twin, trial_index_of
from tests.hpo.commands import SPACE, hpo
from tests.hpo.confirmation.simulated import Images
from tests.hpo.storage.journals import finished_of, trials_of

ONE_CELL = SPACE.replace("{low: 0.5, high: 20, log: true}", "{choices: [4.0]}").replace(
    "epochs: 2,", "epochs: 2, optim: {lr_scale: 4.0},"
)


@pytest.fixture
def space(tmp_path: Path) -> SearchSpace:
    file = tmp_path / "own.yaml"
    file.write_text(SPACE)
    return load_space(str(file))


@pytest.fixture
def study(space: SearchSpace) -> Study:
    opened = open_study(space, name="own", dataset=Images())  # type: ignore[arg-type]
    opened.queue.ensure_trials(1)
    return opened


DEAD = (
    "import os, signal, sys\n"
    "from types import SimpleNamespace\n"
    "from core.data import DataReport\n"
    "from hpo.space import load_space\n"
    "from hpo.study import open_study\n"
    "space = load_space(sys.argv[1])\n"
    "images = SimpleNamespace(\n"
    "    name='digits', fingerprint='ab' * 32, classes=('0', '1'),\n"
    "    report=DataReport(), given_val=lambda config: None, stamp='', checksums=dict)\n"
    "study = open_study(space, name='own', dataset=images)\n"
    "trial, slot = study.queue.claim()\n"
    "if sys.argv[2] == 'training':\n"
    "    space.suggest(trial)\n"
    "    trial.report(0.5, 1)\n"
    "os.kill(os.getpid(), signal.SIGKILL)\n"
)


def die(space: SearchSpace, *, doing: str = "training") -> None:
    """Claim a trial in a process that is then killed."""
    ended = subprocess.run([sys.executable, "-c", DEAD, str(space.path), doing], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


# Dead processes


def test_a_trial_index_is_retried_as_often_as_allowed_and_then_counts_as_failed(
    study: Study, space: SearchSpace, caplog: pytest.LogCaptureFixture
) -> None:
    study.settings.retries = 2
    for crashes in (1, 2):
        die(space)
        assert study.queue.reclaim() == [0]
        assert study.optuna.trials[-1].user_attrs[CRASHES] == crashes
    die(space)
    assert study.queue.reclaim() == []
    last = study.optuna.trials[-1]
    assert (last.state, last.user_attrs[FAILURE], last.user_attrs[CRASHES]) == (TrialState.PRUNED, "crashed", 3)
    assert last.value == 0.5  # as of any pruned trial: what it had reported
    assert last.system_attrs["constraints:failure"] > 0  # so that the sampler keeps away
    assert last.params
    assert (study.counts().failures, study.counts().finished, study.queue.waiting()) == (1, 1, 0)
    assert "trial 2: 3 attempts at it died with the process" in caplog.text
    study.queue.ensure_trials(1)
    assert study.queue.waiting() == 0  # it counts towards the total


def test_a_death_before_the_parameters_are_drawn_is_no_crash(study: Study, space: SearchSpace) -> None:
    study.settings.retries = 0
    die(space, doing="nothing")
    assert study.queue.reclaim() == [0]
    assert CRASHES not in study.optuna.trials[-1].user_attrs


def test_an_interrupt_is_no_crash_and_an_exception_is_one(study: Study, space: SearchSpace) -> None:
    for crashed, counted in ((False, None), (True, 1), (False, 1)):
        claimed = study.queue.claim()
        assert claimed is not None
        space.suggest(claimed[0])
        study.queue.release(claimed[0], crashed=crashed)
        assert study.optuna.trials[-1].user_attrs.get(CRASHES) == counted


def test_a_reboot_is_no_crash(study: Study, space: SearchSpace) -> None:
    study.settings.retries = 0
    claimed = study.queue.claim()
    assert claimed is not None
    space.suggest(claimed[0])
    study.optuna._storage.set_trial_user_attr(claimed[0]._trial_id, LEASE, {**own_lease(), "boot": "another"})
    assert study.queue.reclaim() == [0]
    assert CRASHES not in study.optuna.trials[-1].user_attrs


def test_a_death_together_with_the_parent_is_no_crash(study: Study, space: SearchSpace) -> None:
    study.settings.retries = 0
    die(space)
    [dead] = study.queue._running()
    lease = {**dead.user_attrs[LEASE], "parent": dead.user_attrs[LEASE]}
    study.optuna._storage.set_trial_user_attr(dead._trial_id, LEASE, lease)
    assert study.queue.reclaim() == [0]
    assert CRASHES not in study.optuna.trials[-1].user_attrs


def test_two_processes_that_give_up_a_trial_at_once_end_it_once(
    study: Study, space: SearchSpace, caplog: pytest.LogCaptureFixture
) -> None:
    study.settings.retries = 0
    die(space)
    [dead] = study.queue._running()
    caplog.set_level(logging.WARNING)
    assert not study.queue._interrupt(dead, crashed=True)
    assert not study.queue._interrupt(dead, crashed=True)
    assert len(caplog.records) == 1
    assert [trial.state for trial in study.optuna.trials] == [TrialState.PRUNED]


def test_a_trial_index_that_was_lost_between_two_writes_is_requeued(study: Study, space: SearchSpace) -> None:
    claimed = study.queue.claim()
    assert claimed is not None
    params = space.suggest(claimed[0])
    study.queue._set_state(study.optuna._storage.get_trial(claimed[0]._trial_id), TrialState.FAIL)  # and died
    assert study.queue.waiting() == 0
    assert study.queue.requeue_lost()
    [waiting] = [trial for trial in study.optuna.trials if trial.state == TrialState.WAITING]
    assert waiting.params == params


def test_a_retried_trial_precedes_a_blank_one_of_the_same_index(study: Study, space: SearchSpace) -> None:
    study.queue._queue(0, {}, {})  # as two processes do that begin at once
    claimed = study.queue.claim()
    assert claimed is not None
    params = space.suggest(claimed[0])
    study.queue.release(claimed[0])
    again = study.queue.claim()
    assert again is not None
    assert again[0].params == params


def test_a_trial_that_is_requeued_while_it_runs_is_dropped_and_the_run_continues(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shown = StudyProgress.refresh

    def take_away(progress: StudyProgress, *, force: bool = False) -> None:
        shown(progress, force=force)
        other = find_study("own")
        for running in other.queue._running():
            if CRASHES not in running.user_attrs:
                assert other.queue._interrupt(running, crashed=True)

    monkeypatch.setattr(StudyProgress, "refresh", take_away)
    assert hpo(monkeypatch, "run", str(space.path), "--trials", "1", "--retries", "5") == 0
    assert "trial 0 was requeued by another process while it ran; it is dropped" in capfd.readouterr().err
    assert sorted(finished_of(tmp_path / "studies/own")) == [0]


def test_another_run_without_trials_does_not_lower_the_total(
    space: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = space.trials + 2
    for arguments in (("--trials", str(more)), ()):
        assert hpo(monkeypatch, "run", str(space.path), "--workers", "0", *arguments) == 0
        assert find_study("own").total == more


def test_the_number_of_retries_is_stored_with_the_study(study: Study) -> None:
    assert study.settings.retries == 3
    study.settings.retries = 7
    assert find_study("own").settings.retries == 7


def test_a_run_waits_only_for_trials_of_living_processes(study: Study, space: SearchSpace) -> None:
    claimed = study.queue.claim()
    assert claimed is not None
    assert study.queue.at_work() == [0]
    study.optuna._storage.set_trial_user_attr(claimed[0]._trial_id, LEASE, {**own_lease(), "host": "another"})
    assert study.queue.at_work() == []  # a journal keeps no heartbeats: nobody knows whether that one lives


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("postgresql+psycopg://h/db?user=me&password=s%40cret", "s%40cret"),
        ("redis://h/0?password=x%2By", "x%2By"),
        ("simplecache::ftp://me:pw1234@host/dir", "pw1234"),
        ("abfs://box@account.dfs.example/dir?account_key=AAAA", "AAAA"),
    ],
)
def test_a_secret_is_masked_in_every_kind_of_url(url: str, secret: str) -> None:
    assert secret not in mask(url)
    assert is_masked(mask(url))


def test_processes_of_another_container_with_the_same_host_name_do_not_count_as_dead(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process numbers mean nothing here. A mock stands in for the container."""
    claimed = study.queue.claim()
    assert claimed is not None
    monkeypatch.setattr(lease, "_pid_namespace", lambda: "#17")
    assert study.queue.reclaim() == []
    [held] = study.queue.held_elsewhere()
    assert held.number == 0


# Replicates


def trial_of(trial_index: int, state: TrialState = TrialState.PRUNED, **params: Any) -> Any:
    from optuna.distributions import FloatDistribution

    found = create_trial(
        state=state,
        params=params,
        distributions={name: FloatDistribution(0, 9) for name in params},
        user_attrs={TRIAL_INDEX: trial_index},
        value=1.0 if state == TrialState.COMPLETE else None,
    )
    found.number = trial_index
    return found


def test_the_twin_is_the_lowest_earlier_index_with_the_same_parameters() -> None:
    trials = [trial_of(0, a=1.0), trial_of(1, a=2.0), trial_of(2, TrialState.COMPLETE, a=2.0), trial_of(5, a=3.0)]
    assert first_twin(trials, {"a": 2.0}, trial_index=3) == 1
    assert first_twin(trials, {"a": 2.0}, trial_index=1) is None
    assert first_twin(trials, {"a": 3.0}, trial_index=4) is None  # a later slot decides nothing
    assert first_twin(trials, {"a": 1.0, "b": 1.0}, trial_index=4) is None


def test_a_space_of_one_cell_ends_and_its_trials_are_replicates_with_seeds_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cell.yaml"
    file.write_text(ONE_CELL)
    assert hpo(monkeypatch, "run", str(file), "--trials", "3") == 0
    trials = sorted(trials_of(tmp_path / "studies/cell"), key=trial_index_of)
    assert [trial.user_attrs.get(REPLICATE_OF) for trial in trials] == [None, 0, 0]
    assert len({trial.value for trial in trials}) > 1  # other seeds
    assert capsys.readouterr().out.count("(replicate of trial index 0)") == 2


# Workers that join


@pytest.mark.parametrize("name", ["digits", "stl10_small", "cifar100", "intel_scenes", "imbalanced"])
def test_a_space_reaches_a_worker_without_its_file(name: str) -> None:
    space = load_space(name)
    again = space_from_yaml(space_to_yaml(space), space.name)
    assert again.identity() == space.identity()
    assert (again.sampler, again.pruner, again.baseline, again.search) == (
        space.sampler,
        space.pruner,
        space.baseline,
        space.search,
    )


def test_a_study_queued_without_workers_is_trained_from_another_folder_by_its_storage_alone(
    tmp_path: Path, space: SearchSpace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, joined = tmp_path / "begun", tmp_path / "joined"
    monkeypatch.setenv("HPO_STUDIES", str(begun))
    assert hpo(monkeypatch, "run", str(space.path), "--trials", "2", "--workers", "0") == 0
    said = capsys.readouterr().out
    assert "2 trials waiting for workers" in said
    assert "  hpo worker own\n" in said
    assert [trial.state for trial in trials_of(begun / "own")] == [TrialState.WAITING] * 2

    Path(space.path).unlink()  # the worker's machine has no such file
    monkeypatch.setenv("HPO_STUDIES", str(joined))
    storage = str(begun / "own/journal.log")
    assert hpo(monkeypatch, "worker", "own", "--storage", storage, "--device", "cpu") == 0
    said = capsys.readouterr().out
    assert "no trial is waiting: 2 of 2 trials finished\n" in said
    assert f"its checkpoints and weights go to {joined / 'own'}\n" in said
    assert sorted(finished_of(begun / "own")) == [0, 1]
    assert (joined / "own/trials/00001/metrics.jsonl").exists()


def test_a_worker_that_finds_no_waiting_trial_reports_it_and_exits(
    space: SearchSpace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hpo(monkeypatch, "run", str(space.path), "--trials", "1") == 0
    assert hpo(monkeypatch, "worker", "own") == 0
    assert "no trial is waiting: 1 of 1 trial finished\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("worker", "nosuch"), "no study nosuch in "),
        (("worker", "../x", "--storage", "j.log"), "--study '../x': a name is letters"),
        (("worker", "own", "--storage", "gone.log"), "storage gone.log: there is no such journal"),
    ],
)
def test_a_mistake_is_a_one_line_error_with_exit_code_2(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hpo(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hpo: {said}")
    assert error.count("\n") == 1


def test_options_of_a_worker_that_exclude_each_other_are_refused(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hpo(monkeypatch, "worker", study.name, "--workers", "2", "--per-device", "auto") == 2
    assert capsys.readouterr().err.startswith("hpo: --workers 2: --per-device auto measures")


def test_joining_a_missing_study_explains_how_to_start_it(study: Study, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="has no study other; begin it by hpo run, --workers 0"):
        join_study("other", storage_url=str(study.paths.journal))
    assert [folder.name for folder in study.paths.dir.parent.iterdir()] == ["own"]


def test_joining_a_study_of_another_version_explains_the_fix(study: Study) -> None:
    with pytest.raises(
        StudyError, match="study own was begun by another version, or not by hpo; run it once by hpo run"
    ):
        join_study("own")


# Artifacts


def test_the_artifact_store_of_a_study_cannot_be_changed(study: Study, space: SearchSpace, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"^--artifacts is empty; give a folder or a URL, or leave it out$"):
        study.files.use_store("")
    study.files.use_store(str(tmp_path / "depot"))
    assert study.files.store is not None
    find_study("own").files.use_store(str(tmp_path / "depot"))
    with pytest.raises(
        StudyError,
        match=r"^study own keeps its artifacts in .*/depot; leave --artifacts out, or choose another --study$",
    ):
        find_study("own").files.use_store(str(tmp_path / "other"))


def test_a_started_study_keeps_its_artifacts_in_its_folder(study: Study, tmp_path: Path) -> None:
    assert study.queue.claim() is not None
    with pytest.raises(StudyError, match=r"^study own keeps its artifacts in .*/studies/own; leave --artifacts out"):
        study.files.use_store(str(tmp_path / "depot"))
    study.files.use_store(None)
    assert study.files.store is None


def test_the_password_of_the_artifact_store_is_not_stored_and_has_to_be_given_again(study: Study) -> None:
    study.optuna.set_user_attr("artifacts", mask("ftp://me:secret@host/hpo"))
    with pytest.raises(
        StudyError,
        match=r"^study own: give --artifacts ftp://me:\*\*\*@host/hpo with the password, which is not stored$",
    ):
        find_study("own").files.use_store(None)


def test_an_sqlite_file_is_not_opened_as_a_journal(tmp_path: Path) -> None:
    file = tmp_path / "x.db"
    file.write_bytes(b"SQLite format 3\0" + bytes(100))
    with pytest.raises(StudyError, match=r"x\.db is an SQLite file; give it as --storage sqlite:///"):
        open_storage(str(file))
