"""Storages survive killed processes, torn and full journals and server restarts, and show which workers are alive."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages._rdb.models import TrialHeartbeatModel
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

import hpo.storage.database
import hpo.storage.lease
import hpo.storage.lock
import hpo.storage.outage
from hpo.errors import StudyError
from hpo.storage import open_storage
from hpo.storage.lease import LEASE, has_heartbeat, heartbeat, own_lease, stale_elsewhere
from hpo.storage.lock import JournalLock
from tests.hpo.storage.journals import without_checksums
from tests.hpo.storage.postgresql import Server, Wire, running_server

MAXIMIZE = [StudyDirection.MAXIMIZE]
Open = Callable[..., BaseStorage]


def run_python(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, **options)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A journal with one study, whose attributes the tests write."""
    path = tmp_path / "study" / "journal.log"
    open_storage(str(path)).create_new_study(MAXIMIZE, "s")
    return path


@contextmanager
def refused(match: str) -> Iterator[pytest.ExceptionInfo[StudyError]]:
    """Expect a StudyError of one line."""
    with pytest.raises(StudyError, match=match) as error:
        yield error
    assert "\n" not in str(error.value)


def attributes(storage: BaseStorage) -> dict[str, Any]:
    return storage.get_study_user_attrs(storage.get_study_id_from_name("s"))


def links(journal: Path) -> list[str]:
    return sorted(path.name for path in journal.parent.iterdir() if ".lock" in path.name)


# The lock


KILLED = """
import os, signal, sys
from pathlib import Path
from hpo.storage.lock import JournalLock
JournalLock(Path(sys.argv[1])).acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""
HELD = """
import sys, time
from pathlib import Path
from hpo.storage.lock import JournalLock
lock = JournalLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(float(sys.argv[2]))
lock.release()
"""


def test_the_lock_of_a_killed_process_is_recognized_at_once(journal: Path) -> None:
    process = run_python(KILLED, str(journal))
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert links(journal) == ["journal.log.lock"]
    storage = open_storage(str(journal))
    started = time.monotonic()
    storage.set_study_user_attr(0, "after", 1)
    assert time.monotonic() - started < 1
    assert links(journal) == []


def test_the_lock_of_a_live_process_is_waited_for(journal: Path) -> None:
    process = run_python(HELD, str(journal), "0.5")
    assert process.stdout is not None
    process.stdout.readline()
    started = time.monotonic()
    open_storage(str(journal)).set_study_user_attr(0, "after", 1)
    assert time.monotonic() - started > 0.2
    process.communicate()
    assert process.returncode == 0


def test_the_link_leads_to_the_journal_like_optunas(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(journal.parent.parent)
    lock = JournalLock(Path("study") / "journal.log")
    lock.acquire()
    link = journal.with_name("journal.log.lock")
    assert link.samefile(journal)
    assert len(os.readlink(link)) < 60  # noqa: PTH115
    lock.release()
    assert links(journal) == []


@pytest.mark.parametrize("whose", ["optuna's", "another machine's"])
def test_a_link_of_optuna_or_another_machine_is_waited_for(
    journal: Path, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    monkeypatch.setattr(hpo.storage.lock, "GRACE_S", 0.5)
    if whose == "optuna's":
        # A relative path is broken from the link's own folder; Optuna itself would wait for ever.
        monkeypatch.chdir(journal.parent.parent)
        JournalFileSymlinkLock("study/journal.log").acquire()
    else:
        with monkeypatch.context() as there:
            there.setattr(hpo.storage.lock, "machine", lambda: "another")
            hpo.storage.lock._link_text.cache_clear()
            JournalLock(journal)._make_link()
        hpo.storage.lock._link_text.cache_clear()
    storage = open_storage(str(journal))
    started = time.monotonic()
    storage.set_study_user_attr(0, "after", 1)
    assert 0.5 < time.monotonic() - started < 5
    assert links(journal) == []


def test_a_link_is_kept_as_long_as_its_holder_writes(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpo.storage.lock, "GRACE_S", 0.25)
    theirs = JournalFileSymlinkLock(str(journal))
    theirs.acquire()
    took: list[float] = []

    def ours() -> None:
        started = time.monotonic()
        lock = JournalLock(journal)
        lock.acquire()
        took.append(time.monotonic() - started)
        lock.release()

    waiting = threading.Thread(target=ours)
    waiting.start()
    for _ in range(6):
        time.sleep(0.1)
        os.utime(journal)
    theirs.release()
    waiting.join(10)
    assert 0.5 < took[0] < 5


WRITE = """
import sys
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from hpo.storage import open_storage
ours, path, name = sys.argv[1] == "ours", sys.argv[2], sys.argv[3]
storage = open_storage(path) if ours else JournalStorage(JournalFileBackend(path))
for k in range(100):
    storage.set_study_user_attr(0, f"{name} {k}", "x" * 500)
"""


def test_processes_of_ours_and_of_optunas_exclude_each_other(journal: Path) -> None:
    processes = [run_python(WRITE, side, str(journal), f"{side}{k}") for side in ("ours", "theirs") for k in range(2)]
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0] * 4
    assert len(attributes(open_storage(str(journal)))) == 400
    assert len(journal.read_text().splitlines()) == 401
    assert links(journal) == []


def take_turns(path: Path, turns: int, longest: Any) -> None:
    lock = JournalLock(path)
    for _ in range(turns):
        started = time.monotonic()
        lock.acquire()
        longest.value = max(longest.value, time.monotonic() - started)
        with path.open("r+") as file:  # read, changed and written: two at once would lose a count
            count = int(file.read() or 0)
            file.seek(0)
            file.write(str(count + 1))
        lock.release()


def test_none_of_32_processes_starves(tmp_path: Path) -> None:
    path = tmp_path / "count"
    path.touch()
    fork = multiprocessing.get_context("fork")
    longest = [fork.Value("d", 0.0) for _ in range(32)]
    processes = [fork.Process(target=take_turns, args=(path, 50, waited)) for waited in longest]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 32
    assert path.read_text() == str(32 * 50)
    assert max(waited.value for waited in longest) < 5


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_waiting_for_the_lock_ends_with_ctrl_c(journal: Path, whose: str) -> None:
    theirs, held = JournalFileSymlinkLock(str(journal)), JournalLock(journal)
    (held if whose == "ours" else theirs).acquire()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    lock = JournalLock(journal)
    with pytest.raises(KeyboardInterrupt):
        lock.acquire()
    (held if whose == "ours" else theirs).release()
    lock.acquire()
    lock.release()


def test_a_file_system_without_locks_is_reported_in_one_line(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(str(journal))

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with refused(r"journal\.log: cannot be written .* no locks \(flock\); put the study"):
        storage.set_study_user_attr(0, "after", 1)


# Torn writes


TORN = """
import os, signal, sys
from hpo.storage import open_storage
storage = open_storage(sys.argv[1])
write = os.write
def torn(descriptor, record):
    write(descriptor, record[:int(sys.argv[2])])
    os.kill(os.getpid(), signal.SIGKILL)
os.write = torn
storage.set_study_user_attr(0, "torn", "ä" * 100)
"""


def tear(journal: Path, after: int = 60) -> None:
    """Kill a process in the middle of writing a record."""
    process = run_python(TORN, str(journal), str(after))
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_other_processes_continue_when_one_is_killed_while_writing(journal: Path) -> None:
    one, other = (open_storage(str(journal)) for _ in range(2))
    one.set_study_user_attr(0, "before", 1)
    whole = journal.read_bytes()
    tear(journal)
    assert len(journal.read_bytes()) == len(whole) + 60
    assert attributes(other) == {"before": 1}
    started = time.monotonic()
    one.set_study_user_attr(0, "after", 2)
    assert time.monotonic() - started < 1  # the dead one held the lock
    assert journal.read_bytes()[len(whole) :].count(b'{"op_code"') == 1  # no reader meets what was torn
    other.set_study_user_attr(0, "and after", 3)
    expected = {"before": 1, "after": 2, "and after": 3}
    assert attributes(one) == attributes(other) == attributes(open_storage(str(journal))) == expected
    assert journal.with_name("journal.log.torn").read_bytes().startswith(b'{"op_code":2')
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_process_repairs_a_journal_in_which_optuna_has_appended_to_a_torn_record(journal: Path) -> None:
    live = open_storage(str(journal))
    dashboard = JournalStorage(JournalFileBackend(str(journal)))
    tear(journal)
    journal.with_name("journal.log.lock").unlink()  # which Optuna's would wait 30 s for
    with pytest.raises(json.JSONDecodeError):
        for k in range(2):
            dashboard.set_study_user_attr(0, f"note {k}", k)
    assert attributes(live) == {"note 0": 0, "note 1": 1}
    live.set_study_user_attr(0, "after", 2)
    assert attributes(live) == attributes(open_storage(str(journal))) == {"note 0": 0, "note 1": 1, "after": 2}
    assert len(journal.read_text().splitlines()) == 4


def test_other_damage_is_an_error_with_its_line(journal: Path) -> None:
    live = open_storage(str(journal))
    with journal.open("ab") as file:
        file.write(b'{"op_code":2,"garbage\n{"op_code":2,"worker_id":"x","study_id":0,"user_attr":{"a":1}}\n')
    before = journal.read_bytes()
    with pytest.raises(StudyError, match=r"journal\.log:2: damaged"):
        attributes(live)
    assert journal.read_bytes() == before


def flipped(content: bytes, *, every: int) -> Iterator[tuple[int, bytes]]:
    """The content with one bit flipped, for every so many bits: (number of the line, content)."""
    for bit in range(0, 8 * len(content), every):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        yield content.count(b"\n", 0, bit // 8) + 1, bytes(damaged)


@pytest.fixture
def finished(journal: Path) -> Path:
    """A journal with a complete trial."""
    study = optuna.load_study(study_name="s", storage=open_storage(str(journal)))
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    trial.report(0.5, 1)
    study.tell(trial, 0.5)
    return journal


def read_or_refused(journal: Path) -> tuple[list[FrozenTrial], str]:
    """The trials, or the error in one line."""
    try:
        return open_storage(str(journal)).get_all_trials(0), ""
    except StudyError as error:
        return [], str(error)


def test_a_flipped_bit_is_an_error_with_its_line(finished: Path) -> None:
    content = finished.read_bytes()
    expected, _ = read_or_refused(finished)
    accepted = 0
    for line, damaged in flipped(content, every=11):
        finished.write_bytes(damaged)
        trials, error = read_or_refused(finished)
        if error:
            assert f"journal.log:{line}: damaged" in error
        else:  # the name of the checksum's field is not protected by it
            accepted += 1
            assert trials == expected
        assert finished.read_bytes() == damaged
    assert accepted < 0.05 * len(content) * 8 / 11


def test_a_flipped_bit_in_a_journal_without_checksums_causes_no_other_error(finished: Path) -> None:
    content = without_checksums(finished.read_bytes())
    errors = []
    for _, damaged in flipped(content, every=11):
        finished.write_bytes(damaged)
        errors.append(read_or_refused(finished)[1])
    assert all(re.search(r"journal\.log:\d+: damaged", error) for error in errors if error)
    assert sum(map(bool, errors)) > 0.2 * len(errors)


@pytest.mark.parametrize("change", ["delete", "repeat", "swap"])
def test_a_record_that_is_not_where_it_was_written_is_an_error_with_its_line(finished: Path, change: str) -> None:
    lines = finished.read_bytes().splitlines(keepends=True)
    assert len(lines) >= 5
    for place in range(len(lines) - 1):
        here, after = lines[place : place + 2]
        changed = {"delete": [after], "repeat": [here, here, after], "swap": [after, here]}[change]
        finished.write_bytes(b"".join([*lines[:place], *changed, *lines[place + 2 :]]))
        bad = place + 2 if change == "repeat" else place + 1
        assert f"journal.log:{bad}: damaged, since records before it were deleted" in read_or_refused(finished)[1]


def test_a_complete_trial_without_a_value_is_an_error_with_its_line(finished: Path) -> None:
    finished.write_bytes(without_checksums(finished.read_bytes()).replace(b'"values":[0.5]', b'"values":null'))
    open_storage(str(finished)).get_all_trials(0)  # of another program, which may mean something by it
    lines = finished.read_bytes().splitlines(keepends=True)
    begun = b'{"op_code":3,"worker_id":"x","study_id":0,"system_attr":{"hpo:metadata":{}}}\n'
    finished.write_bytes(lines[0] + begun + b"".join(lines[1:]))
    assert f"journal.log:{len(lines) + 1}: damaged" in read_or_refused(finished)[1]


@pytest.mark.parametrize(("name", "damaged"), [(b"\\ud83d\\ude00", False), (b"\\ud800", True), (b"\xed\xa0\x80", True)])
def test_half_a_character_is_an_error_with_its_line(finished: Path, name: bytes, damaged: bool) -> None:
    attribute = b'{"op_code":2,"worker_id":"x","study_id":0,"user_attr":{"name":"%s"}}\n' % name
    finished.write_bytes(without_checksums(finished.read_bytes()) + attribute + attribute)
    line = finished.read_bytes().count(b"\n") - 1
    assert (f"journal.log:{line}: damaged" in read_or_refused(finished)[1]) == damaged


def test_the_end_of_a_journal_may_be_missing(finished: Path) -> None:
    lines = finished.read_bytes().splitlines(keepends=True)
    finished.write_bytes(b"".join(lines[:-1]))
    [trial], error = read_or_refused(finished)
    assert (trial.state, error) == (TrialState.RUNNING, "")
    open_storage(str(finished)).set_study_user_attr(0, "later", 1)
    assert read_or_refused(finished)[1] == ""


def test_optuna_reads_a_journal_with_checksums(finished: Path) -> None:
    assert finished.read_bytes() != without_checksums(finished.read_bytes())
    theirs = JournalStorage(JournalFileBackend(str(finished)))
    assert theirs.get_all_trials(0) == open_storage(str(finished)).get_all_trials(0)


def test_a_claim_in_a_journal_has_its_lease_before_any_other_record(tmp_path: Path) -> None:
    ours = open_storage(str(tmp_path / "journal.log"))
    study = ours.create_new_study(MAXIMIZE)
    trial = ours.create_new_trial(study, create_trial(state=TrialState.WAITING))
    theirs = open_storage(str(tmp_path / "journal.log"))
    assert ours.set_trial_state_values(trial, TrialState.RUNNING)
    assert theirs.get_trial(trial).user_attrs == {LEASE: own_lease()}
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.setattr("hpo.storage.journal.own_lease", lambda: {**own_lease(), "pid": 1})
        assert not theirs.set_trial_state_values(trial, TrialState.RUNNING)
    assert ours.get_trial(trial).user_attrs == {LEASE: own_lease()}


def test_damage_that_a_live_process_meets_is_an_error_every_time(finished: Path) -> None:
    live = open_storage(str(finished))
    with finished.open("ab") as file:
        file.write(b'{"op_code":8,"worker_id":"x","trial":0,"user_attr":{"a":1}}\n')
        file.write(b'{"op_code":2,"worker_id":"x","study_id":0,"user_attr":{"a":1}}\n')
    line = finished.read_bytes().count(b"\n") - 1
    for _ in range(2):
        with refused(rf"journal\.log:{line}: damaged"):
            attributes(live)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(storage: BaseStorage) -> None:
    """Write until that fails."""
    for k in range(10_000):
        storage.set_study_user_attr(0, "filled", [k, "x" * 700])
    raise AssertionError("the disk has no end")


def test_a_full_disk_loses_nothing_and_is_reported_in_one_line(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "128k") as disk:
        path = disk / "journal.log"
        ballast = disk / "ballast"
        ballast.write_bytes(b"x" * 40_000)
        one, other = open_storage(str(path)), open_storage(str(path))
        one.create_new_study(MAXIMIZE, "s")
        said = r"journal\.log: cannot be written \(No space left on device\); free some space, and run the same command"
        with refused(said):
            fill(one)
        content = path.read_bytes()
        assert content.endswith(b"}\n")
        kept = attributes(one)
        assert attributes(other) == kept == attributes(open_storage(str(path)))
        with refused(said):
            other.set_study_user_attr(0, "filled", "x" * 5000)
        assert path.read_bytes() == content
        ballast.unlink()
        other.set_study_user_attr(0, "after", 1)
        assert attributes(one) == attributes(open_storage(str(path))) == {**kept, "after": 1}
        assert not path.with_name("journal.log.torn").exists()


def test_a_torn_record_on_a_full_disk_is_repaired_once_there_is_space(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "32k") as disk:
        path = disk / "journal.log"
        open_storage(str(path)).create_new_study(MAXIMIZE, "s")
        tear(path)
        torn = path.read_bytes()
        ballast = disk / "ballast"
        with pytest.raises(OSError, match="No space"), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 1024)
        with pytest.raises(StudyError, match=r"cannot be opened \(No space left on device\); free some space"):
            open_storage(str(path))
        assert path.read_bytes() == torn
        ballast.unlink()
        assert attributes(open_storage(str(path))) == {}


LIMITED = """
import resource, sys
from hpo.errors import StudyError
from hpo.storage import open_storage
storage = open_storage(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    for k in range(100):
        storage.set_study_user_attr(0, "filled", [k] + ["x" * 700])
except StudyError as error:
    print(error)
print(storage.get_study_user_attrs(0)["filled"][0], k - 1)
"""


def test_an_incomplete_write_is_reverted(journal: Path) -> None:
    process = run_python(LIMITED, str(journal), "10000")
    said, last, *rest = process.communicate()[0].splitlines()
    assert not rest
    assert "cannot be written (File too large); free some space" in said
    seen, written = last.split()
    assert seen == written
    assert 9000 < journal.stat().st_size < 10_000
    assert journal.read_bytes().endswith(b"}\n")
    assert attributes(open_storage(str(journal)))["filled"][0] == int(written)


def test_a_record_that_could_not_be_synced_stays(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes may have read it: without it, all later records would have other numbers for them."""
    one, other = (open_storage(str(journal)) for _ in range(2))

    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(StudyError, match=r"cannot be written \(Input/output error\); check the disk"):
            one.set_study_user_attr(0, "written", 1)
    assert attributes(one) == attributes(other) == {"written": 1}


def test_a_deleted_journal_is_reported_in_one_line(journal: Path) -> None:
    storage = open_storage(str(journal))
    journal.unlink()
    with refused(r"journal\.log: cannot be read \(No such file or directory\); check the folder"):
        attributes(storage)
    with refused(r"journal\.log: cannot be written \(No such file or directory\)"):
        storage.set_study_user_attr(0, "after", 1)


# Outages of a server


@pytest.fixture(scope="module")
def one_server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def open_() -> Iterator[Open]:
    """Opens databases, which are closed after the test."""
    opened = []

    def open_(url: str, **options: bool) -> BaseStorage:
        opened.append(open_storage(url, **options))
        return opened[-1]

    yield open_
    for storage in opened:
        close(storage)


def close(storage: BaseStorage) -> None:
    storage._backend.engine.dispose()  # type: ignore[attr-defined]


@pytest.fixture
def server(one_server: Server, open_: Open) -> Iterator[Server]:
    """A running server without studies."""
    storage = open_(one_server.url, patient=True)
    for study in storage.get_all_studies():
        storage.delete_study(study._study_id)
    close(storage)
    yield one_server
    try:
        open_(one_server.url)
    except StudyError:
        one_server.start()


def begin(storage: BaseStorage, waiting: int = 1) -> int:
    """Create a study with waiting trials; returns its id."""
    study = storage.create_new_study(MAXIMIZE, "s")
    for trial_index in range(waiting):
        template = create_trial(state=TrialState.WAITING, user_attrs={"trial_index": trial_index})
        storage.create_new_trial(study, template)
    return study


def first_trial(storage: BaseStorage, study: int) -> optuna.trial.FrozenTrial:
    return storage.get_all_trials(study)[0]


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restart_of_the_server_only_delays_a_worker(
    server: Server, open_: Open, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hpo")
    storage = open_(server.url)
    study = begin(storage)
    trial = first_trial(storage, study)._trial_id
    assert storage.set_trial_state_values(trial, TrialState.RUNNING)
    stopped = threading.Event()

    def restart() -> None:
        server.stop(mode)
        stopped.set()
        time.sleep(0.5)
        server.start()

    restarting = threading.Thread(target=restart)
    for step in range(200):
        if step == 20:
            restarting.start()
        storage.set_trial_intermediate_value(trial, step, step / 200)
        storage.get_all_trials(study)
        if step >= 60 and stopped.is_set() and not restarting.is_alive():
            break
        time.sleep(0.01)
    assert storage.set_trial_state_values(trial, TrialState.COMPLETE, [0.5])
    restarting.join()
    done = storage._backend.get_trial(trial)  # type: ignore[attr-defined]
    assert done.intermediate_values == {k: k / 200 for k in range(step + 1)}
    assert done.value == 0.5
    said = [record.getMessage() for record in caplog.records]
    assert sum("does not answer (" in line and "trying again for up to 5 minutes" in line for line in said) == 1, said
    assert sum("answers again" in line for line in said) == 1
    assert not any("Falling back" in line for line in said)


def test_an_unreachable_server_is_reported_in_one_line_without_the_password(
    server: Server, open_: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hpo.storage.outage, "PATIENCE_S", 0.5)
    url = server.url.replace("hpo@", "hpo:hunter2@")  # trust authentication takes any
    storage = open_(url)
    study = begin(storage)
    server.stop()
    started = time.monotonic()
    said = r"storage postgresql\+psycopg://hpo:\*\*\*@.*: has not answered for .* run the same command again"
    with refused(said) as gone:
        storage.get_all_trials(study)
    assert 0.5 < time.monotonic() - started < 10
    started = time.monotonic()
    with refused("has not answered for"):  # the clean-up does not wait again
        storage.set_trial_user_attr(1, "a", 1)
    assert time.monotonic() - started < 0.5
    with refused(said):
        open_storage(url, patient=True)
    with refused("cannot be opened"):
        open_storage(url)
    assert "hunter2" not in str(gone.value) + caplog.text
    server.start()
    assert len(storage.get_all_trials(study)) == 1


def test_a_worker_that_starts_during_an_outage_waits_for_its_end(server: Server, open_: Open) -> None:
    server.stop()
    threading.Timer(1, server.start).start()
    storage = open_(server.url, patient=True)
    begin(storage)


def test_other_errors_are_not_taken_for_an_outage(server: Server, open_: Open) -> None:
    storage = open_(server.url)
    study = begin(storage)
    started = time.monotonic()
    with pytest.raises(optuna.exceptions.StorageInternalError):
        storage.set_study_user_attr(study, "x" * 10_000, 1)  # a longer key than its column
    with pytest.raises(KeyError):
        storage.get_study_id_from_name("unknown")
    assert time.monotonic() - started < 2


def test_a_connection_that_was_dropped_while_idle_is_replaced_silently(
    server: Server, open_: Open, caplog: pytest.LogCaptureFixture
) -> None:
    import psycopg

    storage = open_(server.url)
    study = begin(storage)
    drop = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'client backend'"
    with psycopg.connect(server.url.replace("+psycopg", "")) as connection:
        connection.execute(f"{drop} AND pid <> pg_backend_pid()")
    assert len(storage.get_all_trials(study)) == 1
    assert "does not answer" not in caplog.text


def test_one_thread_uses_one_connection(server: Server, open_: Open) -> None:
    import psycopg

    storages = [open_(server.url) for _ in range(3)]
    begin(storages[0])
    for storage in storages:
        for _ in range(5):
            attributes(storage)
    with psycopg.connect(server.url.replace("+psycopg", "")) as connection:
        count = connection.execute("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'")
        assert count.fetchone() == (3 + 1,)


@pytest.fixture
def wire(server: Server) -> Iterator[Wire]:
    wire = Wire(server.port)
    yield wire
    wire.close()


def through(wire: Wire, server: Server) -> str:
    return server.url.replace(str(server.port), str(wire.port))


def test_operations_whose_answer_was_lost_are_done_once(server: Server, open_: Open, wire: Wire) -> None:
    storage = open_(through(wire, server))
    study = begin(storage)
    trial = first_trial(storage, study)._trial_id
    distribution = optuna.distributions.FloatDistribution(0, 1)

    operations: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (storage.set_trial_state_values, (trial, TrialState.RUNNING)),
        (storage._backend._set_trial_param, (trial, "x", 0.5, distribution, None)),  # type: ignore[attr-defined]
        (storage.set_trial_intermediate_value, (trial, 1, 0.25)),
        (storage.set_trial_user_attr, (trial, "seed", 3)),
        (storage.set_trial_state_values, (trial, TrialState.COMPLETE, [0.75])),
    ]
    for operation, arguments in operations:
        wire.cut_at(b"COMMIT")
        assert operation(*arguments) in (True, None)
    assert wire.cuts == 5
    (done,) = open_(server.url).get_all_trials(study)
    assert (done.state, done.value, done.params) == (TrialState.COMPLETE, 0.75, {"x": 0.5})
    assert (done.intermediate_values, done.user_attrs) == ({1: 0.25}, {"trial_index": 0, "seed": 3, LEASE: own_lease()})


def test_a_claim_of_another_process_is_not_taken_for_ours(
    server: Server, open_: Open, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, other = open_(through(wire, server)), open_(server.url)
    study = begin(storage)
    trial = first_trial(storage, study)._trial_id
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(hpo.storage.database, "own_lease", lambda: {**own_lease(), "pid": 1})
        assert other.set_trial_state_values(trial, TrialState.RUNNING)
    wire.cut_at(b"FOR UPDATE")
    assert not storage.set_trial_state_values(trial, TrialState.RUNNING)
    assert wire.cuts == 1
    assert not storage.set_trial_state_values(trial, TrialState.RUNNING)
    assert other.set_trial_state_values(trial, TrialState.FAIL)
    wire.cut_at(b"FOR UPDATE")
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        storage.set_trial_state_values(trial, TrialState.COMPLETE, [1.0])


def test_a_full_disk_under_a_database_is_reported_in_one_line(tmp_path: Path, open_: Open) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        storage = open_(f"sqlite:///{disk / 'study.db'}")
        storage.create_new_study(MAXIMIZE, "s")
        ballast = disk / "ballast"
        ballast.write_bytes(b"x" * 100_000)
        with refused(r"study\.db: cannot be written \(.*\); free some space there"):
            for k in range(1000):
                storage.set_study_user_attr(1, f"filled {k}", "x" * 1500)
        ballast.unlink()
        storage.set_study_user_attr(1, "after", 1)
        kept = attributes(storage)
        assert sorted(kept) == sorted([*(f"filled {j}" for j in range(k)), "after"])


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.db'}"
    return str(request.getfixturevalue("server").url)


def test_trials_are_read_as_they_are_although_waiting_ones_are_not_read_again(database: str, open_: Open) -> None:
    one, other = open_(database), open_(database)
    study = begin(one, waiting=6)
    numbers = [trial._trial_id for trial in one.get_all_trials(study)]
    assert [trial.state.name for trial in other.get_all_trials(study)] == ["WAITING"] * 6
    assert one.set_trial_state_values(numbers[4], TrialState.RUNNING)
    one.set_trial_user_attr(numbers[4], "seed", 3)
    one.set_trial_intermediate_value(numbers[4], 1, 0.5)
    assert one.set_trial_state_values(numbers[1], TrialState.RUNNING)
    assert one.set_trial_state_values(numbers[1], TrialState.COMPLETE, [0.25])
    one.create_new_trial(study, create_trial(state=TrialState.WAITING, user_attrs={"trial_index": 6}))
    plain = optuna.storages.RDBStorage(database)
    for storage in (one, other):
        for _ in range(2):
            assert storage.get_all_trials(study) == plain.get_all_trials(study)
    states = [trial.state.name for trial in other.get_all_trials(study)]
    assert states == ["WAITING", "COMPLETE", "WAITING", "WAITING", "RUNNING", "WAITING", "WAITING"]
    assert one.set_trial_state_values(numbers[4], TrialState.COMPLETE, [0.75])
    assert other.get_all_trials(study) == plain.get_all_trials(study)
    with pytest.raises(KeyError):
        other.get_all_trials(study + 99)
    plain.engine.dispose()


# Many workers on one study


CREW = """
import multiprocessing, sys
from types import SimpleNamespace
from core.data import DataReport
from hpo.space import load_space
from hpo.storage import open_storage
from hpo.study import open_study
url, total, epochs, workers = sys.argv[1], *map(int, sys.argv[2:])
images = SimpleNamespace(name="digits", fingerprint="0" * 64, classes=("0", "1"),
    report=DataReport(), given_val=lambda config: None, stamp="", checksums=dict)
space = load_space("digits", [f"epochs={epochs}"])
if "://" in url:  # import the database's modules once, not in every process
    open_storage("sqlite://")
    import psycopg
fork = multiprocessing.get_context("fork")
barrier = fork.Barrier(workers)

def work(queues):
    barrier.wait()
    study = open_study(space, name="s", dataset=images, storage_url=url)
    if queues:
        study.queue.ensure_trials(total)
    barrier.wait()
    while (claimed := study.queue.claim()) is not None:
        trial, _ = claimed
        params = space.suggest(trial)
        for epoch in range(1, epochs + 1):
            trial.report(1 - params["loss.smoothing"] - 1 / (epoch + 2), epoch)
            if epoch < epochs and trial.should_prune():
                study.queue.finish(trial, "pruned")
                break
        else:
            study.queue.finish(trial, "complete", 1 - params["loss.smoothing"])
    assert "torch" not in sys.modules

processes = [fork.Process(target=work, args=(number < 2,)) for number in range(workers)]
for process in processes:
    process.start()
for process in processes:
    process.join()
sys.exit(sum(process.exitcode != 0 for process in processes))
"""


def work_off(url: str, open_: Open = open_storage, *, workers: int, total: int, epochs: int) -> None:
    """Let processes begin a study at the same moment, two of them queue it, and all run it; check the trials."""
    process = run_python(CREW, url, str(total), str(epochs), str(workers))
    process.communicate(timeout=300)
    assert process.returncode == 0
    storage = open_(url)
    trials = storage.get_all_trials(storage.get_study_id_from_name("s"))
    results = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert sorted(trial.user_attrs["trial_index"] for trial in results) == list(range(total))
    assert not any(trial.state == TrialState.RUNNING for trial in trials)
    for trial in results:
        assert sorted(trial.intermediate_values) == list(range(1, len(trial.intermediate_values) + 1))
    assert len({trial.user_attrs[LEASE]["pid"] for trial in results}) > workers / 2


def test_eight_workers_that_begin_at_once_make_exactly_the_total_in_a_database(database: str, open_: Open) -> None:
    work_off(database, open_, workers=8, total=16, epochs=4)


def test_32_workers_that_begin_at_once_make_exactly_the_total_on_a_journal(tmp_path: Path) -> None:
    work_off(str(tmp_path / "journal.log"), workers=32, total=64, epochs=4)


# Heartbeats


CLAIM = """
import os, signal, socket, sys, time
socket.gethostname = lambda: "elsewhere"
import hpo.storage.database
hpo.storage.database.HEARTBEAT_S = 1
from optuna.trial import TrialState
from hpo.storage.lease import heartbeat
from hpo.storage import open_storage
storage, study, number = open_storage(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
trial = storage.get_trial_id_from_study_id_trial_number(study, number)
assert storage.set_trial_state_values(trial, TrialState.RUNNING)
if sys.argv[4] == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
print("claimed", flush=True)
with heartbeat(storage, trial):
    time.sleep(600)
"""


@pytest.fixture
def short_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpo.storage.database, "HEARTBEAT_S", 1)


def age_heartbeats(storage: BaseStorage) -> None:
    """Make every heartbeat so far older than the grace period."""
    with _create_scoped_session(storage._backend.scoped_session) as session:  # type: ignore[attr-defined]
        for beat in session.query(TrialHeartbeatModel).all():
            beat.heartbeat -= timedelta(hours=1)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_dead_processes_of_other_hosts_are_found_by_their_heartbeats(
    database: str, open_: Open, short_beats: None
) -> None:
    storage = open_(database)
    assert has_heartbeat(storage)
    study = begin(storage, waiting=3)
    # This process does not beat: it is slow, and its own host knows better.
    assert storage.set_trial_state_values(first_trial(storage, study)._trial_id, TrialState.RUNNING)
    alive = run_python(CLAIM, database, str(study), "1", "beats")
    dead = run_python(CLAIM, database, str(study), "2", "dies")  # before it has beaten once
    dead.communicate()
    assert alive.stdout is not None
    alive.stdout.readline()
    assert stale_elsewhere(storage, study) == set()
    age_heartbeats(storage)
    wait_until(lambda: stale_elsewhere(storage, study) == {2})  # the other has beaten again
    alive.kill()
    alive.communicate()
    assert stale_elsewhere(storage, study) == {2}
    age_heartbeats(storage)
    assert stale_elsewhere(storage, study) == {1, 2}


def test_heartbeats_continue_after_an_outage(
    server: Server, open_: Open, short_beats: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hpo.storage.outage, "PATIENCE_S", 0.3)
    monkeypatch.setattr(hpo.storage.lease.socket, "gethostname", lambda: "elsewhere")
    storage = open_(server.url)
    study = begin(storage)
    trial = first_trial(storage, study)._trial_id
    assert storage.set_trial_state_values(trial, TrialState.RUNNING)
    with heartbeat(storage, trial):
        server.stop()
        wait_until(lambda: "no heartbeat could be written" in caplog.text)
        server.start()
        monkeypatch.undo()
        age_heartbeats(storage)
        wait_until(lambda: stale_elsewhere(storage, study) == set())
    assert caplog.text.count("no heartbeat could be written") == 1


def test_a_journal_has_no_heartbeats(journal: Path) -> None:
    storage = open_storage(str(journal))
    storage.create_new_trial(0, create_trial(state=TrialState.WAITING))
    trial = first_trial(storage, 0)._trial_id
    assert storage.set_trial_state_values(trial, TrialState.RUNNING)
    storage.set_trial_user_attr(trial, LEASE, {**own_lease(), "host": "elsewhere"})
    assert not has_heartbeat(storage)
    threads = threading.active_count()
    with heartbeat(storage, trial):
        assert threading.active_count() == threads
    assert stale_elsewhere(storage, 0) == set()


def test_a_worker_that_survives_an_outage_is_not_taken_for_dead() -> None:
    longest_silence_s = hpo.storage.outage.PATIENCE_S + hpo.storage.outage._LONGEST_PAUSE_S
    assert longest_silence_s + hpo.storage.database.HEARTBEAT_S < hpo.storage.database.GRACE_S
