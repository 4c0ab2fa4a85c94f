"""`hpo study doctor`: it reports problems, checks change nothing, and fixes never touch a finished trial."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState, create_trial
from PIL import Image

from core.data import folds, load_dataset
from hpo.paths import StudyPaths, cache_root
from hpo.search.interrupts import Interrupts
from hpo.search.loop import run_study
from hpo.space import load_space
from hpo.storage import METADATA
from hpo.storage.lease import LEASE
from hpo.storage.lock import _link_text
from hpo.storage.optuna_access import set_attribute
from hpo.study import Study, find_study, open_study
from hpo.study.queue import TrialQueue
from hpo.text import in_words
from tests.hpo.commands import hpo
from tests.hpo.storage.journals import trials_of, without_checksums

CPU = torch.device("cpu")
SPACE = """
data: {name: digits}
base: {model: {widths: [8], blocks: [1]}, epochs: 2, batch_size: 16, augment: {flip: 0.0}}
pruner: {name: none}
sampler: {name: random}
search:
  optim.lr_scale: {low: 0.5, high: 20, log: true}
"""
TOTAL = 3


def draw_images(folder: Path, seed: int = 0) -> Path:
    """Two classes of small pictures."""
    draw = np.random.default_rng(seed)
    for label, level in (("dark", 60), ("light", 190)):
        (folder / label).mkdir(parents=True)
        for number in range(20):
            pixels = draw.integers(level - 40, level + 40, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number:02d}.png")
    return folder


def begin(folder: Path, *, images: Path, total: int, storage: str | None = None) -> Study:
    """Begin a study, with all its trials waiting."""
    file = folder / "own.yaml"
    file.write_text(SPACE)
    space = load_space(file)
    dataset = load_dataset(space.baseline.data, data_path=images, cache_dir=cache_root())
    study = open_study(space, name="own", dataset=dataset, seed=1, data_path=images, storage_url=storage)
    study.settings.set_space(space)
    study.settings.command = "hpo run own.yaml --trials 3"
    study.queue.ensure_trials(total)
    return study


def work_off(study: Study, images: Path) -> None:
    space = study.queue._space
    assert space is not None
    dataset = load_dataset(space.baseline.data, data_path=images, cache_dir=cache_root())
    splits = folds(dataset, space.baseline.data)
    run_study(study, space, splits, device=CPU, interrupts=Interrupts())


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, and a finished and refitted study of them."""
    folder = tmp_path_factory.mktemp("original")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_STUDIES", str(folder / "studies"))
        patch.setenv("HPO_CACHE", str(folder / "cache"))
        images = draw_images(folder / "images")
        work_off(begin(folder, images=images, total=TOTAL), images)
        assert hpo(patch, "refit", "best", "--no-confirm") == 0
    torch.set_num_threads(threads)
    return folder


class Case(NamedTuple):
    """A copy of the finished study, to be damaged."""

    paths: StudyPaths
    run: Callable[..., tuple[int, list[str]]]
    """Run the command with these options: (exit code, printed lines)."""

    @property
    def study(self) -> Study:
        """The study, opened again with its space."""
        found = find_study("own")
        space = load_space(self.paths.dir.parents[1] / "own.yaml")
        return Study(found.optuna, found.paths, found.metadata, found.storage_url, space)

    def finished(self) -> list[FrozenTrial]:
        return [trial for trial in trials_of(self.paths.dir) if trial.state.name in ("COMPLETE", "PRUNED")]


@pytest.fixture
def case(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Case:
    shutil.copytree(original / "studies", tmp_path / "studies")
    shutil.copy(original / "own.yaml", tmp_path / "own.yaml")
    monkeypatch.setenv("HPO_CACHE", str(original / "cache"))

    def run(*options: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        code = hpo(monkeypatch, "study", "doctor", "own", *options)
        return code, capsys.readouterr().out.splitlines()

    return Case(StudyPaths.of("own"), run)


def tree(folder: Path) -> dict[str, str]:
    """Hashes of all files, by name."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def found(lines: list[str], match: str) -> str:
    """The only matching line."""
    [line] = [line for line in lines if re.search(match, line)]
    return line


def wrong(lines: list[str]) -> int:
    """The number of problems that the command printed."""
    counted = [int(m[1]) for line in lines if (m := re.search(r"(\d+) problems? found", line))]
    return counted[0] if counted else 0


CLAIM = """
import sys, time
from hpo.study import Study, find_study
from hpo.space import load_space
found = find_study("own")
study = Study(found.optuna, found.paths, found.metadata, found.storage_url, load_space(sys.argv[1]))
study.queue.claim()
print("claimed", flush=True)
time.sleep(600)
"""


@contextmanager
def running(code: str, argument: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that prints a word and then sleeps; it is killed at the end."""
    process = subprocess.Popen([sys.executable, "-c", code, str(argument)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() in ("claimed\n", "held\n")
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def worker(case: Case, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has claimed an additional trial, and holds it."""
    case.study.queue.ensure_trials(TOTAL + 1)
    with running(CLAIM, tmp_path / "own.yaml") as process:
        yield process


@pytest.fixture
def killed(worker: subprocess.Popen[str]) -> int:
    """The number of such a process, which was killed."""
    worker.kill()
    worker.wait()
    return worker.pid


# Healthy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--mend"]], ids=["check", "fix"])
def test_a_finished_study_has_no_problems_and_is_not_changed(case: Case, options: list[str]) -> None:
    before = tree(case.paths.dir)
    code, lines = case.run(*options)
    assert code == 0, lines
    assert "no problem found in study own" in lines
    assert re.search(r"on the disk: [\d.]+ [kM]B: .*trials' weights [\d.]+ kB", lines[-1])
    assert tree(case.paths.dir) == before


def test_without_a_name_the_last_study_is_checked(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hpo(monkeypatch, "study", "doctor") == 0
    assert "no problem found in study own" in capsys.readouterr().out


# Processes that died ------------------------------------------------------------------------------------------------


def test_the_trial_of_a_killed_process_is_found_and_requeued(case: Case, killed: int) -> None:
    finished, before = case.finished(), tree(case.paths.dir)
    code, lines = case.run()
    assert code == 1
    line = found(lines, "RUNNING")
    assert line.startswith(f"trial 3 (index 3) is RUNNING, but its process {killed} is dead; --mend requeues it")
    assert "hpo study doctor own --mend" in found(lines, "can be fixed")
    assert tree(case.paths.dir) == before

    code, lines = case.run("--mend")
    assert code == 0, lines
    assert found(lines, "^fixed: trial 3")
    assert [trial.state.name for trial in trials_of(case.paths.dir)] == [*["COMPLETE"] * TOTAL, "FAIL", "WAITING"]
    assert trials_of(case.paths.dir)[-1].user_attrs["trial_index"] == 3
    assert case.finished() == finished


@pytest.mark.usefixtures("worker")
def test_a_trial_whose_process_lives_is_never_touched(case: Case) -> None:
    case.paths.checkpoint(3).parent.mkdir(exist_ok=True)
    case.paths.checkpoint(3).write_bytes(b"its epochs")
    before = tree(case.paths.dir)
    assert case.run("--mend")[0] == 0
    assert tree(case.paths.dir) == before
    assert trials_of(case.paths.dir)[3].state.name == "RUNNING"


def test_a_trial_held_by_another_host_is_reported_and_left_alone(case: Case) -> None:
    study = case.study
    study.queue.ensure_trials(TOTAL + 1)
    claimed = study.queue.claim()
    assert claimed is not None
    claimed[0].set_user_attr(LEASE, {"host": "elsewhere", "boot": "b", "pid": 7, "start": 7})
    code, lines = case.run("--mend")
    assert code == 1
    line = found(lines, "trial 3")
    assert "is held by a process on elsewhere since 20" in line
    assert line.endswith("which cannot be checked from here; if it is dead: hpo run own.yaml --trials 3 --reclaim")
    assert trials_of(case.paths.dir)[3].state.name == "RUNNING"


def test_a_running_trial_without_a_lease_is_found_after_a_while(case: Case) -> None:
    study = case.study
    study.queue.ensure_trials(TOTAL + 1)
    claimed = study.queue.claim()
    assert claimed is not None
    claimed[0].set_user_attr("lease", None)
    assert case.run()[0] == 0  # it is being paused
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hpo.storage.lease._GRACE_S", -1)
        code, lines = case.run()
    assert code == 1
    assert "no process has held it since" in found(lines, "trial 3")


HOLD = """
import sys, time
from pathlib import Path
from hpo.storage.lock import JournalLock
JournalLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_found_and_that_of_a_running_one_is_not(case: Case) -> None:
    with running(HOLD, case.paths.journal):
        assert case.run()[0] == 0
    code, lines = case.run()
    assert code == 1
    assert "journal.log.lock: left by a process that died" in found(lines, "journal.log.lock")
    code, lines = case.run("--mend")
    assert code == 0, lines
    assert not os.path.lexists(case.paths.dir / "journal.log.lock")


# The storage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", ["tail", "prefix"])
def test_a_torn_record_is_reported_and_then_fixed(case: Case, torn: str) -> None:
    case.study.queue.ensure_trials(TOTAL + 1)
    whole = case.paths.journal.read_bytes()
    *lines, last = whole.splitlines(keepends=True)
    half = last[: len(last) // 2]
    broken = whole + half if torn == "tail" else b"".join(lines) + half + without_checksums(last)  # Optuna's
    case.paths.journal.write_bytes(broken)
    before = tree(case.paths.dir)
    code, said = case.run()
    assert code == 1
    assert f"journal.log: {len(half)} bytes " in found(said, "torn by a crash")
    assert wrong(said) == 1
    assert tree(case.paths.dir) == before

    code, said = case.run("--mend")
    assert code == 0, said
    assert found(said, r"^fixed: .*journal\.log")
    assert case.paths.dir.joinpath("journal.log.torn").read_bytes() == half + b"\n"
    assert len(trials_of(case.paths.dir)) == TOTAL + 1


def test_other_damage_is_reported_with_its_line_beside_other_problems(case: Case) -> None:
    lines = case.paths.journal.read_bytes().splitlines(keepends=True)
    lines[4] = b"nonsense\n"
    case.paths.journal.write_bytes(b"".join(lines))
    old = leave(case.paths.dir / "trials" / "00001" / "model.tmp")
    before = case.paths.journal.read_bytes()
    code, said = case.run("--mend")
    assert code == 1
    assert "journal.log:5: damaged, and not by a crash of ours; restore it from a backup" in found(said, "damaged")
    assert found(said, f"^fixed: {old}")
    assert case.paths.journal.read_bytes() == before


def test_a_value_that_differs_from_the_metrics_file_is_reported(case: Case) -> None:
    rows = case.paths.trial_metrics(1).read_text()
    case.paths.trial_metrics(1).write_text(re.sub('"val_accuracy": [0-9.]+', '"val_accuracy": 0.125', rows))
    code, lines = case.run()
    assert code == 1
    line = found(lines, "trial 1 has the value")
    assert re.search(r"in the storage, but 0\.125 in .*metrics\.jsonl; .*hpo train --from own/1", line)
    assert wrong(lines) == 1


def test_a_damaged_metrics_file_is_reported_with_its_line_and_hides_no_other(case: Case) -> None:
    case.paths.trial_metrics(0).write_bytes(b'{"epoch": 1}\n{"epoch\xff\n')
    case.paths.trial_metrics(1).write_text("nonsense\n")
    code, lines = case.run()
    assert code == 1
    assert found(lines, r"00000/metrics\.jsonl:2: damaged; restore it from a backup")
    assert found(lines, r"00001/metrics\.jsonl:1: damaged")


def test_a_missing_study_yaml_is_rebuilt_from_the_storage(case: Case, capsys: Any) -> None:
    metadata = find_study("own").metadata
    case.paths.study_yaml.unlink()
    code, lines = case.run()
    assert code == 1
    assert "study.yaml is missing, although" in found(lines, "study.yaml")
    assert case.run("--mend")[0] == 0
    again = find_study("own")
    assert {key: again.metadata[key] for key in ("hash", "identity", "data", "base")} == {
        key: metadata[key] for key in ("hash", "identity", "data", "base")
    }
    work_off(case.study, Path(metadata["data"]["path"]))  # it can be resumed


def test_an_unreadable_study_yaml_is_reported_beside_other_problems(case: Case) -> None:
    case.paths.study_yaml.write_text("{no: [yaml")
    old = leave(case.paths.dir / "trials" / "00001" / "model.tmp")
    code, lines = case.run()
    assert code == 1
    assert found(lines, r"study\.yaml cannot be read")
    assert found(lines, str(old))


def test_missing_indices_are_queued_and_doubled_ones_removed(case: Case) -> None:
    study = case.study
    study.queue.ensure_trials(TOTAL)
    study.optuna.set_user_attr("trials", TOTAL + 2)  # as a process killed while queueing leaves it
    study.optuna.add_trial(create_trial(state=TrialState.WAITING, user_attrs={"trial_index": 1}))
    finished = case.finished()
    code, lines = case.run()
    assert code == 1
    assert "indices 3, 4 of the total of 5 have no trial; --mend queues them" in found(lines, "of the total")
    assert "index 1 is queued as trial 3, although trial 1 has it" in found(lines, "queued as")
    code, lines = case.run("--mend")
    assert code == 0, lines
    assert case.finished() == finished
    waiting = [trial.user_attrs["trial_index"] for trial in trials_of(case.paths.dir) if trial.state.name == "WAITING"]
    assert waiting == [3, 4]


def test_a_study_in_a_database_is_fixed_too(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path}/own.db"
    study = begin(tmp_path, images=original / "images", total=1, storage=url)
    claimed = study.queue.claim()
    assert claimed is not None
    dead = claimed[0].user_attrs[LEASE] | {"start": 1}
    claimed[0].set_user_attr(LEASE, dead)
    assert hpo(monkeypatch, "study", "doctor", "own") == 1
    assert "is RUNNING, but its process" in capsys.readouterr().out
    study.paths.study_yaml.unlink()
    assert hpo(monkeypatch, "study", "doctor", "own", "--storage", url, "--mend") == 0
    assert find_study("own").counts().waiting == 1


# Files --------------------------------------------------------------------------------------------------------------


def leave(path: Path) -> Path:
    """Create a file that was last written an hour ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * 1500)
    os.utime(path, (time.time() - 3600,) * 2)
    return path


def artifacts_of(case: Case) -> dict[str, tuple[Path, Path]]:
    """artifact id -> (its file, the trial's own)."""
    known = {}
    for trial in trials_of(case.paths.dir):
        for key, value in trial.system_attrs.items():
            if key.startswith("artifacts:"):
                meta = json.loads(value)
                name = meta["artifact_id"]
                known[name] = (case.paths.artifacts / name, case.paths.trial(trial.number) / meta["filename"])
    return known


def test_a_deleted_artifact_is_restored_from_the_trials_folder(case: Case) -> None:
    files = artifacts_of(case).values()
    gone, own = next((artifact, original) for artifact, original in files if original.exists())
    lost = next(artifact for artifact, original in files if not original.exists())  # a picture, drawn when it is opened
    content, finished = gone.read_bytes(), case.finished()
    gone.unlink()
    lost.unlink()
    code, lines = case.run()
    assert code == 1
    assert f"--mend copies it from {own}" in found(lines, gone.name)
    code, lines = case.run("--mend")
    assert code == 1
    assert gone.read_bytes() == content
    assert "restore it from a backup" in found(lines, lost.name)
    assert case.finished() == finished


def test_files_in_an_artifact_store_are_checked_and_fixed_there(case: Case, tmp_path: Path) -> None:
    there = tmp_path / "depot" / "own"
    case.study.optuna.set_user_attr("artifacts", str(there.parent))  # as a run with --artifacts sets it
    for folder in (case.paths.artifacts, case.paths.trials):
        shutil.copytree(folder, there / case.paths.inside(folder))
    here = [artifact for artifact, original in artifacts_of(case).values() if original.exists()]
    for file in (*case.paths.artifacts.iterdir(), *case.paths.trials.glob("*/model.safetensors")):
        file.unlink()  # as on a machine that trained nothing
    code, lines = case.run()
    assert code == 0, lines
    assert not [line for line in lines if line.startswith("note: ")]
    gone = there / "artifacts" / here[0].name
    gone.unlink()
    assert case.run()[0] == 1
    assert case.run("--mend")[0] == 0
    assert gone.exists()
    assert not here[0].exists()


def test_unneeded_files_are_reported_with_their_size_and_removed(case: Case) -> None:
    case.study.queue.ensure_trials(TOTAL + 1)
    of_finished, of_fold = case.paths.checkpoint(1), case.paths.checkpoint(2, fold=2)
    of_waiting = leave(case.paths.checkpoint(3))
    old = [
        leave(of_finished),
        leave(of_fold),
        leave(case.paths.checkpoint(3).with_name("00003.pt.tmp")),
        leave(case.paths.dir / ".study.yaml.4711.tmp"),
        leave(case.paths.refit("x").with_name(".best.new-99") / "model.safetensors").parent,
    ]
    os.utime(old[-1], (time.time() - 3600,) * 2)
    fresh = leave(case.paths.trial(1) / "model.tmp")
    os.utime(fresh)
    code, lines = case.run()
    assert code == 1
    assert wrong(lines) == len(old)
    for path in old:
        assert f"{path} (1.5 kB) " in found(lines, re.escape(str(path)))
    code, lines = case.run("--mend")
    assert code == 0, lines
    assert [path for path in old if path.exists()] == []
    assert of_waiting.exists()  # the trial resumes from it
    assert fresh.exists()  # a process may be writing it


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (
            lambda case: case.paths.journal.unlink(),
            r"journal\.log is missing, and the study's trials with it; restore it from a backup$",
        ),
        (
            lambda case: leave(case.paths.trial(17) / "model.safetensors"),
            r"/00017 \(1\.5 kB\) belongs to no trial of the storage",
        ),
        (
            lambda case: (case.paths.refit("best") / "model.safetensors").unlink(),
            r"refit/best.*model\.safetensors is missing",
        ),
        (
            lambda case: (case.paths.refit("best") / "preprocess.json").unlink(),
            r"refit/best.*preprocess\.json is missing",
        ),
    ],
    ids=["no journal", "a folder without a trial", "a model without weights", "a model without a file"],
)
def test_damage_that_only_the_user_can_repair_is_reported_and_left_as_it_is(
    case: Case, damage: Callable[[Case], object], problem: str
) -> None:
    damage(case)
    before = tree(case.paths.dir)
    code, lines = case.run("--mend")
    assert code == 1
    assert found(lines, problem)
    assert tree(case.paths.dir) == before


def _lose_the_best_weights(case: Case) -> None:
    best = case.study.best_trial()
    assert best is not None
    case.paths.trial_model(best.number).unlink()


def _change_versions(case: Case) -> None:
    metadata = case.study.metadata
    began = {**metadata["versions"], "torch": "1.0"}
    set_attribute(case.study.optuna, METADATA, {**metadata, "versions": began})


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (_lose_the_best_weights, r"^note: .*model\.safetensors.*hpo refit best trains it again"),
        (_change_versions, r"^note: versions.*torch [\d.]+\S*, not 1\.0"),
    ],
)
def test_a_harmless_change_is_a_note_and_no_problem(case: Case, change: Callable[[Case], None], note: str) -> None:
    change(case)
    code, lines = case.run()
    assert code == 0
    assert found(lines, note)


def test_a_submission_model_moved_aside_by_a_crash_is_restored(case: Case) -> None:
    home = case.paths.refit("best")
    home.rename(home.with_name(".best.old"))
    code, lines = case.run()
    assert code == 1
    assert "a crash left it as .best.old; --mend restores it" in found(lines, "refit/best")
    assert case.run("--mend")[0] == 0
    assert (home / "model.safetensors").exists()


def test_a_full_disk_is_reported_with_free_and_needed_space(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.study.queue.ensure_trials(TOTAL + 2)
    assert case.run()[0] == 0
    usage = shutil.disk_usage(case.paths.dir)
    monkeypatch.setattr("hpo.analysis.doctor.files.shutil.disk_usage", lambda path: usage._replace(free=2000))
    code, lines = case.run()
    assert code == 1
    assert re.search(r"2\.0 kB are free on the disk, and [\d.]+ kB are needed", found(lines, "free some space"))
    assert "the 2 unfinished trials" in found(lines, "free some space")


# Every fault --------------------------------------------------------------------------------------------------------


def _records(case: Case, change: Callable[[list[bytes]], object], *, checksums: bool = True) -> None:
    content = case.paths.journal.read_bytes()
    lines = (content if checksums else without_checksums(content)).splitlines(keepends=True)
    change(lines)
    case.paths.journal.write_bytes(b"".join(lines))


def _flip(lines: list[bytes]) -> None:
    lines[5] = lines[5][:30] + bytes([lines[5][30] ^ 1]) + lines[5][31:]


def _wrong_type(lines: list[bytes]) -> None:
    at = next(at for at, line in enumerate(lines) if b'"user_attr":{"epochs":' in line)
    lines[at] = re.sub(rb'"epochs":\d+', b'"epochs":["two"]', lines[at])


def _die_with_a_trial(case: Case) -> None:
    case.study.queue.ensure_trials(TOTAL + 1)
    claimed = case.study.queue.claim()
    assert claimed is not None
    claimed[0].set_user_attr(LEASE, claimed[0].user_attrs[LEASE] | {"start": 1})


def _queue_twice(case: Case) -> None:
    case.study.queue.ensure_trials(TOTAL)
    case.study.optuna.add_trial(create_trial(state=TrialState.WAITING, user_attrs={"trial_index": 1}))


def _delete_an_artifact(case: Case) -> None:
    next(artifact for artifact, original in artifacts_of(case).values() if original.exists()).unlink()


def _halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _write(file: Path, text: str = "{nonsense") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def _best(case: Case) -> int:
    best = case.study.best_trial()
    assert best is not None
    return best.number


FAULTS: dict[str, tuple[Callable[[Case], object], str, bool]] = {
    "a torn last record": (
        lambda case: _records(case, lambda lines: lines.append(lines[-1][:20])), r"20 bytes at its end are", True,
    ),
    "a torn record before a whole one": (
        lambda case: _records(case, lambda lines: lines.insert(-1, lines[-1][:20])), r"torn by a crash", True,
    ),
    "a flipped bit": (lambda case: _records(case, _flip), r"journal\.log:6: damaged", False),
    "no first record": (lambda case: _records(case, lambda lines: lines.pop(0)), r"journal\.log:1: damaged", False),
    "a deleted record": (lambda case: _records(case, lambda lines: lines.pop(5)), r"journal\.log:6: damaged", False),
    "a wrong type without a checksum": (
        lambda case: _records(case, _wrong_type, checksums=False), r"journal\.log:\d+: damaged", False,
    ),
    "no journal": (lambda case: case.paths.journal.unlink(), r"journal\.log is missing", False),
    "an empty journal": (lambda case: case.paths.journal.write_bytes(b""), r"has no study own", False),
    "a lock": (
        lambda case: Path(f"{case.paths.journal}.lock").symlink_to(_link_text(case.paths.journal.name)),
        r"journal\.log\.lock: left by a process that died", True,
    ),
    "no study.yaml": (lambda case: case.paths.study_yaml.unlink(), r"study\.yaml is missing, although", True),
    "a damaged study.yaml": (lambda case: _write(case.paths.study_yaml), r"study\.yaml cannot be read", True),
    "a dead process's trial": (_die_with_a_trial, r"is RUNNING, but its process", True),
    "missing indices": (
        lambda case: case.study.optuna.set_user_attr("trials", TOTAL + 2), r"of the total of 5 have no trial", True,
    ),
    "an index queued twice": (_queue_twice, r"index 1 is queued as trial 3, although", True),
    "another value": (
        lambda case: _write(
            case.paths.trial_metrics(1),
            re.sub('"val_accuracy": [0-9.]+', '"val_accuracy": 0.125', case.paths.trial_metrics(1).read_text()),
        ),
        r"trial 1 has the value", False,
    ),
    "a damaged metrics.jsonl": (
        lambda case: _write(case.paths.trial_metrics(1), "nonsense\n"), r"metrics\.jsonl:1: damaged", False,
    ),
    "a deleted artifact": (_delete_an_artifact, r"is missing: .* for the dashboard", True),
    "half of the weights": (
        lambda case: _halve(case.paths.trial_model(_best(case))), r"model\.safetensors is damaged", True,
    ),
    "half of the outputs": (
        lambda case: _halve(case.paths.trial_validation(_best(case))), r"validation\.safetensors is damaged", True,
    ),
    "a finished trial's checkpoint": (lambda case: leave(case.paths.checkpoint(1)), r"of trial index 1", True),
    "a folder without a trial": (lambda case: case.paths.trial(17).mkdir(), r"00017 .* belongs to no trial", False),
    "an unfinished file": (lambda case: leave(case.paths.dir / ".study.yaml.x.tmp"), r"left by a process", True),
    "a model moved aside": (
        lambda case: case.paths.refit("best").rename(case.paths.refit(".best.old")), r"a crash left it as", True,
    ),
    "half of a model": (
        lambda case: _halve(case.paths.refit("best") / "model.safetensors"), r"refit/best.*model\.safetensors", False,
    ),
    "a damaged confirmation": (lambda case: _write(case.paths.confirmation), r"confirmation\.json: cannot", False),
    "a damaged recipe": (
        lambda case: _write(case.paths.reference("r").result), r"result\.json: damaged", False,
    ),
}  # fmt: skip
"""Name -> what plants the fault, what the doctor calls it, and whether it can be repaired."""


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_and_repaired_where_possible_and_other_studies_are_listed(
    case: Case, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, problem, can_be_repaired = FAULTS[fault]
    plant(case)
    code, lines = case.run()
    assert code == 1
    assert ("--mend" in found(lines, problem)) == can_be_repaired
    before = tree(case.paths.dir)
    assert hpo(monkeypatch, "study", "list") == 0
    if fault.startswith("a torn"):  # reading repairs it
        assert tree(case.paths.dir) != before
        return
    if can_be_repaired:
        code, lines = case.run("--mend")
        assert code == 0, lines
        assert found(lines, f"^fixed: .*{problem}")


# What it was begun with ---------------------------------------------------------------------------------------------


def test_changed_or_missing_images_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = draw_images(tmp_path / "images")
    begin(tmp_path, images=images, total=1)
    assert hpo(monkeypatch, "study", "doctor", "own") == 0
    Image.new("RGB", (8, 8), "red").save(images / "dark" / "00.png")
    assert hpo(monkeypatch, "study", "doctor", "own") == 1
    line = found(capsys.readouterr().out.splitlines(), "fingerprint")
    assert line.startswith(f"the images in {images} have changed since the study began")
    assert "1 image of other content: dark/00.png" in line
    shutil.rmtree(images)
    assert hpo(monkeypatch, "study", "doctor", "own", "--mend") == 1
    assert found(capsys.readouterr().out.splitlines(), "cannot be read").startswith(f"the study's images ({images})")


def test_changed_and_missing_weights_are_reported_each(case: Case, tmp_path: Path) -> None:
    changed, gone = tmp_path / "changed.pth", tmp_path / "gone.pth"
    changed.write_bytes(b"new")
    study = case.study
    known = dict.fromkeys(map(str, (changed, gone)), hashlib.sha256(b"old").hexdigest())
    set_attribute(study.optuna, METADATA, {**study.metadata, "weights": known})
    code, lines = case.run()
    assert code == 1
    assert "has changed since" in found(lines, "changed.pth")
    assert found(lines, "gone.pth")


# However broken it is -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("killed")
def test_a_check_that_fails_is_a_finding_and_hides_no_other(case: Case) -> None:
    study = case.study
    study.queue.ensure_trials(TOTAL + 2)
    study.optuna._storage.set_trial_system_attr(study.optuna.get_trials()[4]._trial_id, "artifacts:x", "nonsense")
    leave(case.paths.checkpoint(1))
    code, lines = case.run()
    assert code == 1
    assert "artifacts: the check failed (JSONDecodeError:" in found(lines, "^artifacts")
    assert found(lines, "is RUNNING, but its process")
    assert found(lines, "checkpoint of trial index 1")
    code, lines = case.run("--mend")
    assert code == 1
    assert wrong(lines) == 1  # the two others are fixed


@pytest.mark.usefixtures("killed")
def test_a_fix_that_fails_is_reported(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(case.paths.checkpoint(1))
    monkeypatch.setattr(TrialQueue, "reclaim", lambda self: 1 / 0)
    code, lines = case.run("--mend")
    assert code == 1
    assert "division by zero" in found(lines, "^could not be fixed: trial 3")
    assert found(lines, "^fixed: .*checkpoint")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nosuch"], "no study nosuch"),
        (["../own"], "'../own'"),
        (["own", "--storage", "other.log"], "study own lies in"),
        (["nosuch", "--storage", "nowhere.log"], "nowhere.log: there is no such journal"),
        (["own", "--storage", ""], "--storage is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    arguments: list[str],
    told: str,
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert hpo(monkeypatch, "study", "doctor", *arguments) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.startswith("hpo: ")
    assert len(error.strip().splitlines()) == 1


def test_without_studies_there_is_a_command_to_begin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hpo(monkeypatch, "study", "doctor") == 2
    assert "begin with: hpo run digits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e12, "3.0 TB")]
)
def test_sizes_are_formatted_with_units(size: float, words: str) -> None:
    assert in_words(size) == words
