"""`hpo train --from STUDY/TRIAL`: a trial alone gives the numbers that it gave in its study."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optuna.trial import TrialState, create_trial

from core.data import folds, load_dataset
from core.loop import EpochMetrics
from hpo.cli.terminal import TrainProgress
from hpo.errors import StudyError
from hpo.paths import cache_root
from hpo.reporter import NoProgress
from hpo.search.interrupts import Interrupts
from hpo.search.loop import run_study
from hpo.search.replay import Replay, replay_of
from hpo.space import load_space
from hpo.study import Study, open_study
from hpo.submission import refit as submission
from tests.hpo.api.test_end_to_end import digits_npz
from tests.hpo.commands import RunHpo, studies_in
from tests.hpo.zygote import Hpo

CPU = torch.device("cpu")
SPACE = """
data: {name: digits}
base: {model: {widths: [8], blocks: [1]}, epochs: 6, batch_size: 128, augment: {flip: 0.0}}
pruner: {name: rungs, rungs: [0.3, 0.6], keep: 0.34}
sampler: {name: random}
search:
  optim.lr_scale: {low: 0.01, high: 20, log: true}
"""
TIMES = ("images_per_s", "elapsed_s")


class Crashing(NoProgress):
    """Crashes after the third epoch."""

    def __init__(self) -> None:
        self.epochs = 0

    def refresh(self, *, force: bool = False) -> None:
        self.epochs += 1
        if self.epochs == 3:
            raise RuntimeError("a bug of ours")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_all(space_text: str, name: str, trials: int, folder: Path, *, crash: bool = False) -> Study:
    file = folder / f"{name}.yaml"
    file.write_text(space_text)
    space = load_space(file)
    dataset = load_dataset(space.baseline.data, cache_dir=cache_root())
    study = open_study(space, name=name, dataset=dataset, seed=3)
    study.queue.ensure_trials(trials)

    def work(progress: NoProgress) -> None:
        run_study(
            study, space, folds(dataset, space.baseline.data), device=CPU, progress=progress, interrupts=Interrupts()
        )

    if crash:
        with pytest.raises(RuntimeError, match="a bug of ours"):
            work(Crashing())
    work(NoProgress())
    return study


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of six trials, of which trial 0, the base, was cut off once, and of one with folds."""
    folder = tmp_path_factory.mktemp("replay")
    with studies_in(folder):
        run_all(SPACE, "own", 6, folder, crash=True)
        run_all(SPACE.replace("name: digits", "name: digits, folds: 2"), "folded", 3, folder)
    return folder / "studies"


@pytest.fixture
def there(studies: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HPO_STUDIES", str(studies))
    monkeypatch.setenv("HPO_CACHE", str(studies.parent / "cache"))
    return studies


def rows_of(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def one_of(study: str, state: str, *, retried: bool = False) -> Replay:
    """The study's first trial in that state; if asked for, the one whose slot was cut off once."""
    trials = replay_of(f"{study}/0", storage=None).study.optuna.get_trials(deepcopy=False)
    trial = next(
        t
        for t in trials
        if t.state.name == state
        and (t.user_attrs["trial_index"] != t.number and t.user_attrs["trial_index"] == 0) == retried
    )
    return replay_of(f"{study}/{trial.number}", storage=None)


def replayed_rows(studies: Path, replay: Replay) -> list[dict[str, Any]]:
    [folder] = (studies / "trainings").glob(f"{replay.name}-*")
    return rows_of(folder / "metrics.jsonl")


# The same numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("study", "state", "retried"),
    [
        ("own", "COMPLETE", False),
        ("own", "PRUNED", False),
        ("own", "COMPLETE", True),
        ("folded", "COMPLETE", False),
        ("folded", "PRUNED", False),
    ],
)
def test_a_replayed_trial_reproduces_its_rows_bit_for_bit(
    study: str, state: str, retried: bool, there: Path, run_hpo: RunHpo
) -> None:
    replay = one_of(study, state, retried=retried)
    said = run_hpo("train", "--from", f"{study}/{replay.trial.number}")
    was = rows_of(replay.study.paths.trial_metrics(replay.trial.number))
    rows = replayed_rows(there, replay)
    assert rows[: len(was)] == was
    assert len(rows) == 6 * (2 if study == "folded" else 1)  # a pruned trial is trained to its end
    if state == "PRUNED":
        assert len(was) < len(rows)
    assert f"the {len(was)} epochs of trial {replay.trial.number} are reproduced bit for bit" in said


@pytest.mark.parametrize("study", ["own", "folded"])
def test_without_the_trials_folder_the_stored_values_are_compared(study: str, there: Path, run_hpo: RunHpo) -> None:
    replay = one_of(study, "COMPLETE")
    file = replay.study.paths.trial_metrics(replay.trial.number)
    aside = file.rename(file.with_suffix(".aside"))
    try:
        said = run_hpo("train", "--from", f"{study}/{replay.trial.number}")
    finally:
        aside.rename(file)
    steps = 12 if study == "folded" else 6
    assert f"the {steps} epochs of trial {replay.trial.number} are reproduced bit" in said


@pytest.mark.parametrize("study", ["own", "folded"])
def test_a_differing_epoch_is_named_with_both_numbers(study: str, there: Path, run_hpo: RunHpo) -> None:
    replay = one_of(study, "COMPLETE")
    file = replay.study.paths.trial_metrics(replay.trial.number)
    before = file.read_text()
    lines = before.splitlines()
    was = json.loads(lines[4])
    file.write_text("\n".join([*lines[:4], json.dumps(was | {"val_loss": 9.5}), *lines[5:]]) + "\n")
    try:
        said = run_hpo("train", "--from", f"{study}/{replay.trial.number}")
    finally:
        file.write_text(before)
    place = "epoch 5 of fold 1" if study == "folded" else "epoch 5"
    assert f"trial {replay.trial.number} differs from {place} on: val_loss {was['val_loss']!r} against 9.5"
    assert f"from {place} on: val_loss {was['val_loss']!r} against 9.5 (for no known reason)" in said


def test_known_differences_of_the_machine_are_named(there: Path) -> None:
    replay = one_of("own", "COMPLETE")
    trial = create_trial(
        state=TrialState.COMPLETE,
        value=0.5,
        user_attrs={"device": "NVIDIA H100", "lease": {"host": "elsewhere"}, "torch_threads": 1},
        intermediate_values={1: 0.5},
    )
    trial.number = 99  # it has no folder here
    study = SimpleNamespace(paths=replay.study.paths, metric="accuracy", metadata={"versions": {"torch": "1.0"}})
    other = replace(replay, trial=trial, study=study)  # type: ignore[arg-type]
    epoch = SimpleNamespace(epoch=1, score=lambda metric: 0.25)
    recorded: Any = SimpleNamespace(results=(SimpleNamespace(history=[epoch]),), values=(0.25,), rows=())
    said = other.verdict(recorded, CPU)
    assert said.startswith("trial 99 differs from step 1 on: accuracy 0.25 against 0.5")
    assert f"torch {torch.__version__.partition('+')[0]}" in said
    assert "here, 1.0 there" in said
    assert "another device: CPU, 1 thread here, NVIDIA H100 there" in said
    assert "another machine: it ran on elsewhere" in said


def test_a_replay_uses_as_many_threads_as_the_trial(there: Path) -> None:
    replay = one_of("own", "COMPLETE")
    replay.trial.user_attrs["torch_threads"] = 2
    with replay.threads():
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1


def test_a_changed_trial_is_no_replay(there: Path, run_hpo: RunHpo) -> None:
    changes = ("--set", "epochs=1", "--metric", "macro_f1")
    said = run_hpo("train", "--from", "own/1", *changes)
    assert "with --set epochs=1 --metric macro_f1 this is no replay, and is not compared with the trial" in said
    assert "bit for bit" not in said
    assert "training own-trial-00001: 1 epoch;" in said


# User errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--from", "own"], "--from own: give STUDY/TRIAL, as in digits/7"),
        (["--from", "own/best"], "--from own/best: give STUDY/TRIAL"),
        (["--from", "/3"], "--from /3: give STUDY/TRIAL"),
        (["--from", "../own/3"], "'../own'"),
        (["--from", "nosuch/3"], "no study nosuch"),
        (["--from", "own/99"], "--from own/99: study own has no trial 99; its trials are 0 to 6"),
        (["digits_base", "--from", "own/3"], "give the recipe digits_base or --from own/3, and not both"),
        ([], "give a recipe, from hpo space list, or a trial by --from STUDY/TRIAL"),
        (["digits_base", "--storage", "x.log"], "--storage: a recipe has no storage"),
        (["--from", "own/3", "--set", "optim.lrr=1"], "did you mean optim.lr"),
        (["--from", "own/3", "--metric", "f1"], "--metric f1: no such metric"),
        (["--from", "own/3", "--storage", "other.log"], "study own lies in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_user_error_is_one_line_with_exit_code_2(
    arguments: list[str], told: str, there: Path, run_hpo: RunHpo
) -> None:
    assert told in run_hpo.fails("train", *arguments)


@pytest.mark.parametrize(
    ("state", "attributes", "told"),
    [
        ("WAITING", {}, "is waiting; choose a finished one"),
        ("RUNNING", {}, "is running; choose a finished one"),
        ("FAIL", {"interrupted": True}, "ended before its first epoch"),
        ("PRUNED", {"failure": "crashed"}, "ended before its first epoch"),
    ],
)
def test_an_unfinished_trial_cannot_be_replayed(
    state: str, attributes: Mapping[str, Any], told: str, tmp_path: Path, run_hpo: RunHpo
) -> None:
    study = run_all(SPACE, "fresh", 0, tmp_path)
    study.optuna.add_trial(create_trial(state=TrialState[state], user_attrs={"trial_index": 0, **attributes}))
    assert f"hpo: --from fresh/0: that trial {told}" in run_hpo.fails("train", "--from", "fresh/0")


def test_parameters_without_a_valid_configuration_are_an_error(there: Path) -> None:
    replay = one_of("own", "COMPLETE")
    trial = create_trial(state=TrialState.PRUNED, user_attrs={"trial_index": 3, "failure": "invalid"})
    metadata = {**replay.study.metadata, "base": replay.study.metadata["base"] | {"epochs": 0}}
    study = Study(replay.study.optuna, replay.study.paths, metadata, replay.study.storage_url)
    with pytest.raises(StudyError, match="study own: trial -1 has no configuration that can be trained"):
        study.config_of(trial)


def test_other_images_than_the_trials_are_refused(there: Path, tmp_path: Path, run_hpo: RunHpo) -> None:
    digits_npz(tmp_path / "own.npz", shuffle_test=False)
    assert "study own was begun with other images" in run_hpo.fails(
        "train", "--from", "own/1", "--data", str(tmp_path / "own.npz")
    )


# Ctrl-C -------------------------------------------------------------------------------------------------------------


TINY = ("data.name=digits", "model.widths=[8]", "model.blocks=[1]", "epochs=10", "batch_size=32", "augment.flip=0.0")


@pytest.fixture
def start(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Start a training and return it once it has printed this."""
    monkeypatch.setenv("HPO_STUDIES", str(tmp_path / "studies"))  # with the other studies' cache
    processes = []

    def begin(*arguments: str, until: str) -> subprocess.Popen[str]:
        process = Hpo(
            ["train", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        )
        processes.append(process)
        assert process.stdout is not None
        assert any(until in line for line in process.stdout)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=lambda stop: stop.name)
def test_an_interrupt_stops_after_the_epoch_and_the_same_command_resumes(
    stop: signal.Signals, start: Any, tmp_path: Path, run_hpo: RunHpo
) -> None:
    command = ("digits_base", *(word for value in TINY for word in ("--set", value)))
    process = start(*command, until=": epoch 2 of 10")
    process.send_signal(stop)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "stopped; the same command resumes from the last checkpoint" in said
    assert "Traceback" not in said
    [checkpoint] = (tmp_path / "studies/trainings").glob("*/checkpoint.pt")
    left_at = len(torch.load(checkpoint, weights_only=True)["history"])
    assert 2 <= left_at < 10

    said = run_hpo("train", *command)
    assert "resuming from its checkpoint" in said
    first = next(line for line in said.splitlines() if ": epoch " in line)
    assert f": epoch {left_at + 1} of 10" in first
    [metrics] = (tmp_path / "studies/trainings").glob("*/metrics.jsonl")
    assert [row["epoch"] for row in rows_of(metrics)] == list(range(1, 11))


def test_a_second_interrupt_stops_at_once(start: Any, tmp_path: Path) -> None:
    """In the second epoch: in the first, torch still imports parts of itself, and a KeyboardInterrupt there makes
    Python end by the signal itself, which only a shell takes for the same."""
    large = ("--set", "batch_size=4", "--set", "model.widths=[64, 128]")  # an epoch of seconds
    process = start("digits_base", *large, "--set", "epochs=10", until="epoch 1 of 10")
    time.sleep(0.2)
    [checkpoint] = (tmp_path / "studies/trainings").glob("*/checkpoint.pt")
    saved = checkpoint.stat().st_mtime_ns
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None, "the first one waits for the epoch"
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=10)
    assert process.returncode == 130, said
    assert checkpoint.stat().st_mtime_ns == saved  # that epoch was not waited for


def test_an_interrupt_stops_a_refit_before_the_test_set_is_opened(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo
) -> None:
    shutil.copytree(there, tmp_path / "studies", ignore=shutil.ignore_patterns("trainings"))
    monkeypatch.setenv("HPO_STUDIES", str(tmp_path / "studies"))
    replay = one_of("own", "COMPLETE")
    paths, number = replay.study.paths, replay.trial.number
    seen: list[int] = []
    shown = TrainProgress.epoch_ended

    def epoch_ended(bar: TrainProgress, epoch: EpochMetrics) -> None:
        shown(bar, epoch)
        seen.append(epoch.epoch)
        if seen == [1, 2]:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainProgress, "epoch_ended", epoch_ended)
    for file in paths.trial_models(number):
        file.unlink()  # else it trains once
    said = run_hpo("refit", str(number), "--study", "own", code=130)
    assert seen == [1, 2]
    assert "stopped; the same command resumes from the last checkpoint" in said
    assert not paths.test_openings.exists()

    said = run_hpo("refit", str(number), "--study", "own")
    assert seen == [1, 2, 3, 4, 5, 6, *range(1, 7)]
    assert "opened once" in said


def test_an_interrupt_after_the_last_epoch_of_a_refit_keeps_its_output(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo
) -> None:
    shutil.copytree(there, tmp_path / "studies", ignore=shutil.ignore_patterns("trainings"))
    monkeypatch.setenv("HPO_STUDIES", str(tmp_path / "studies"))
    number = one_of("own", "COMPLETE").trial.number
    whole = submission.refit

    def refit(*arguments: Any, **options: Any) -> Any:
        done = whole(*arguments, **options)
        os.kill(os.getpid(), signal.SIGINT)
        return done

    monkeypatch.setattr(submission, "refit", refit)
    said = run_hpo("refit", str(number), "--study", "own", code=130)
    assert "opened once" in said
    assert "stopped" not in said
