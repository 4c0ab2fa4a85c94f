"""A study on a hostile machine: planted links, clocks that jump, other users, and what it leaves behind."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from optuna.trial import TrialState, create_trial

from core.checkpoint import save_checkpoint
from hpo.errors import HpoError
from hpo.paths import StudyPaths
from hpo.storage import lease
from hpo.storage.journal import open_journal
from hpo.study import deadline
from hpo.study.deadline import Deadline
from hpo.study.results import append_line
from tests.hpo.analysis.test_doctor import begin, draw_images, work_off
from tests.hpo.commands import SPACE, RunHpo
from tests.hpo.workers.processes import PATIENCE_S
from tests.hpo.zygote import Hpo

# Links


@pytest.fixture
def searched(tmp_path: Path) -> Iterator[StudyPaths]:
    """A finished search, whose files have the usual permissions for the user alone."""
    before = os.umask(0o077)
    try:
        images = draw_images(tmp_path / "images")
        study = begin(tmp_path, images=images, total=2)
        work_off(study, images)
        yield study.paths
    finally:
        os.umask(before)


def test_a_search_writes_through_no_planted_link_and_for_its_user_alone(searched: StudyPaths, tmp_path: Path) -> None:
    files = [file for file in searched.dir.rglob("*") if file.is_file()]
    modes = {stat.S_IMODE(file.stat().st_mode) for file in files}
    assert modes == {0o600}

    victim = tmp_path / "victim"
    victim.write_text("precious")
    names = [file.relative_to(searched.dir) for file in files]
    names += [Path("checkpoints/00000.pt.tmp"), Path("checkpoints/00001.pt"), Path("journal.log.torn")]
    own = {"journal.log", "study.yaml", "journal.log.flock"}
    shutil.rmtree(searched.dir)
    for name in names:
        if str(name) not in own:
            (searched.dir / name).parent.mkdir(parents=True, exist_ok=True)
            (searched.dir / name).symlink_to(victim)
    images = tmp_path / "images"
    study = begin(tmp_path, images=images, total=2)
    work_off(study, images)
    assert study.counts().complete == 2
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["journal.log", "study.yaml"])
def test_a_study_whose_own_files_are_links_to_others_is_refused(tmp_path: Path, run_hpo: RunHpo, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious\n")
    (tmp_path / "own.yaml").write_text(SPACE)
    folder = StudyPaths.of("own").dir
    folder.mkdir(parents=True)
    (folder / name).symlink_to(victim)
    assert "own" in run_hpo.fails("run", str(tmp_path / "own.yaml"), "--trials", "1")
    assert victim.read_text() == "precious\n"


def test_checkpoints_and_lines_are_not_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "00000.pt.tmp").symlink_to(victim)
    save_checkpoint(tmp_path / "00000.pt", {"epoch": 1})
    (tmp_path / "test_openings.jsonl").symlink_to(victim)
    with pytest.raises(HpoError, match="is a symbolic link"):
        append_line(tmp_path / "test_openings.jsonl", {})
    assert victim.read_text() == "precious"


def test_a_torn_record_is_not_kept_through_a_link(tmp_path: Path) -> None:
    victim, journal = tmp_path / "victim", tmp_path / "journal.log"
    victim.write_text("precious")
    open_journal(journal)
    with journal.open("ab") as file:
        file.write(b'{"op_code":')
    (tmp_path / "journal.log.torn").symlink_to(victim)
    open_journal(journal)
    assert victim.read_text() == "precious"


# Clocks


@pytest.mark.parametrize("jump", [timedelta(days=-365), timedelta(hours=-2), timedelta(hours=2), timedelta(days=365)])
def test_a_running_trial_without_a_lease_is_found_whenever_the_clock_was_set(
    monkeypatch: pytest.MonkeyPatch, jump: timedelta
) -> None:
    trial = create_trial(state=TrialState.RUNNING)
    trial.datetime_start = datetime.now()
    assert not lease.is_abandoned(trial)
    now = datetime.now() + jump
    monkeypatch.setattr(lease, "datetime", SimpleNamespace(now=lambda: now))
    assert lease.is_abandoned(trial)


@pytest.mark.parametrize("jump_s", [-1e6, 1e6])
def test_a_clock_that_jumps_uses_up_no_time_of_a_limit(monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    settings = SimpleNamespace(deadline=None)
    clock = SimpleNamespace(wall=0.0, steady=0.0)
    times = SimpleNamespace(time=lambda: clock.wall, monotonic=lambda: clock.steady)
    monkeypatch.setattr(deadline, "time", times)
    limit = Deadline(settings)  # type: ignore[arg-type]
    limit.begin(3600.0)
    clock.wall, clock.steady = 60.0, 60.0
    limit.record(force=True)
    assert limit.used_s == 60
    clock.wall, clock.steady = 120.0 + jump_s, 120.0
    limit.record(force=True)
    assert 60 <= limit.used_s <= 120
    limit.begin(3600.0)  # the same command again
    assert 3480 <= limit.left_s() <= 3540


# What is left behind


def _group(head: int) -> list[psutil.Process]:
    try:
        return [psutil.Process(head), *psutil.Process(head).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def test_a_search_listens_on_no_port_and_leaves_no_shared_memory_and_no_temporary_file(tmp_path: Path) -> None:
    temporary, shared = tmp_path / "tmp", Path("/dev/shm")
    temporary.mkdir()
    (tmp_path / "own.yaml").write_text(SPACE)
    arguments = ["run", "own.yaml", "--trials", "3", "--workers", "2", "--device", "cpu"]
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("w") as said:
        process = Hpo(
            arguments, cwd=tmp_path, stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        seen, ports = {process.pid}, set()
        ends = time.monotonic() + PATIENCE_S
        while process.poll() is None and time.monotonic() < ends:
            for one in _group(process.pid):
                seen.add(one.pid)
                try:
                    ports |= {each.laddr for each in one.net_connections("inet") if each.status == psutil.CONN_LISTEN}
                except psutil.Error:
                    continue
            time.sleep(0.05)
    assert process.poll() == 0, (tmp_path / "said").read_text()
    assert len(seen) >= 3
    assert ports == set()
    assert [file.name for file in temporary.iterdir() if not file.name.startswith("pymp-")] == []
    if shared.is_dir():
        left = [file.name for file in shared.iterdir() if any(str(pid) in file.name for pid in seen)]
        assert left == []
