"""The depot, on a file system and on fsspec's memory: whole files, the later checkpoint, and errors of one line."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from optuna.artifacts import upload_artifact
from optuna.artifacts.exceptions import ArtifactNotFound

from hpo.errors import StudyError
from hpo.paths import StudyPaths
from hpo.storage.artifacts import Depot

NAME = "checkpoints/00007.pt"


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """fsspec's memory is the process's."""
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["path", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the depot lies."""
    there = {"path": str(tmp_path / "depot"), "file": f"file://{tmp_path}/depot", "memory": "memory://depot"}
    return there[request.param]


def machine(tmp_path: Path, url: str, name: str = "here") -> tuple[Depot, StudyPaths]:
    """The depot as seen from a machine, and the study's folder there."""
    paths = StudyPaths(tmp_path / name / "own")
    return Depot(url, paths.dir), paths


def a_file(folder: Path, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "a.bin"
    file.write_bytes(content)
    return file


# Files


def test_a_file_comes_back_as_it_was_put_and_the_latest_one_counts(tmp_path: Path, url: str) -> None:
    depot, _ = machine(tmp_path, url)
    assert not depot.exists(NAME)
    assert depot.size() == 0
    for content in (b"first" * 1000, b"second"):
        depot.put(a_file(tmp_path, content), NAME)
    assert depot.exists(NAME)
    assert depot.size() == len(b"second")
    there = tmp_path / "elsewhere" / "x.pt"
    assert depot.fetch(NAME, there)
    assert there.read_bytes() == b"second"
    assert list(there.parent.iterdir()) == [there]


def test_a_file_that_is_not_there_changes_nothing_here(tmp_path: Path, url: str) -> None:
    depot, _ = machine(tmp_path, url)
    mine = a_file(tmp_path, b"mine")
    assert not depot.fetch(NAME, mine)
    assert mine.read_bytes() == b"mine"
    depot.remove(NAME)
    depot.put(mine, NAME)
    depot.remove(NAME)
    assert not depot.exists(NAME)
    assert depot.size() == 0


def test_studies_do_not_see_each_others_files(tmp_path: Path, url: str) -> None:
    depot, _ = machine(tmp_path, url)
    other = Depot(url, tmp_path / "here" / "another")
    depot.put(a_file(tmp_path, b"mine"), NAME)
    assert not other.exists(NAME)
    assert other.size() == 0


@pytest.mark.parametrize("name", ["../another/x", "/etc/x", "a/../../x", ""])
def test_no_name_leads_out_of_the_studys_folder(name: str, tmp_path: Path, url: str) -> None:
    depot, _ = machine(tmp_path, url)
    with pytest.raises(ValueError, match="is no name of a file in a study's folder"):
        depot.put(a_file(tmp_path, b"x"), name)


# Torn uploads


def test_an_upload_that_breaks_off_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    depot, _ = machine(tmp_path, url)
    depot.put(a_file(tmp_path, b"old"), NAME)
    written = type(depot)._write

    def breaks_off(self: Depot, local: Path, target: str) -> None:
        written(self, local, target)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Depot, "_write", breaks_off)
    with pytest.raises(StudyError, match=r"--artifacts .*depot: is full; free some space, and run the same command"):
        depot.put(a_file(tmp_path, b"new" * 100), NAME)
    monkeypatch.undo()
    assert depot.size() == len(b"old")
    assert depot.fetch(NAME, mine := tmp_path / "mine")
    assert mine.read_bytes() == b"old"


def test_a_writer_killed_in_between_leaves_the_old_file_and_what_it_had_written_goes_with_it(tmp_path: Path) -> None:
    depot, paths = machine(tmp_path, str(tmp_path / "depot"))
    depot.put(a_file(tmp_path, b"old"), NAME)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # a file that is never read to its end
    code = (
        "import sys; from pathlib import Path; from hpo.storage.artifacts import Depot;"
        f"Depot({str(tmp_path / 'depot')!r}, Path({str(paths.dir)!r})).put(Path({str(fifo)!r}), {NAME!r})"
    )
    writer = subprocess.Popen([sys.executable, "-c", code])
    with fifo.open("wb") as source:
        source.write(b"new" * 30_000)
        source.flush()
        folder = tmp_path / "depot/own/checkpoints"
        deadline = time.monotonic() + 60
        while not any(file.stat().st_size for file in folder.glob(".*")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert depot.fetch(NAME, mine := tmp_path / "mine")
    assert mine.read_bytes() == b"old"
    assert len(list(folder.iterdir())) == 2
    depot.remove(NAME)
    assert not list(folder.iterdir())


def test_an_object_store_is_written_to_in_one_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A move there is a copy and a deletion, and the service never shows half of one. fsspec's memory is one here."""
    monkeypatch.setattr(MemoryFileSystem, "protocol", ("s3", "s3a"))
    depot, _ = machine(tmp_path, "memory://depot")
    moved: list[Any] = []
    monkeypatch.setattr(MemoryFileSystem, "mv", lambda *arguments, **options: moved.append(arguments))
    depot.put(a_file(tmp_path, b"x"), NAME)
    assert depot.exists(NAME)
    assert not moved


# Checkpoints


def test_a_machine_goes_on_from_the_checkpoint_that_was_put_last_wherever_that_was(tmp_path: Path, url: str) -> None:
    (here, at_home), (there, away) = machine(tmp_path, url), machine(tmp_path, url, "there")
    mine, theirs = at_home.checkpoint(7), away.checkpoint(7)
    here.bring(mine)
    assert not mine.exists()  # nobody has put one

    def save(checkpoint: Path, content: bytes, depot: Depot) -> None:
        a_file(checkpoint.parent, content).replace(checkpoint)
        depot.send(checkpoint)

    save(mine, b"epoch 1", here)
    there.bring(theirs)
    assert theirs.read_bytes() == b"epoch 1"
    save(theirs, b"epoch 2", there)
    here.bring(mine)
    assert mine.read_bytes() == b"epoch 2"
    there.bring(theirs)
    assert theirs.read_bytes() == b"epoch 2"

    mine.write_bytes(b"epoch 3")  # killed after saving it, and before it was put
    here.bring(mine)
    assert mine.read_bytes() == b"epoch 3"
    there.bring(theirs)
    assert theirs.read_bytes() == b"epoch 2"


def test_a_checkpoint_of_unknown_descent_gives_way_to_the_depots(tmp_path: Path, url: str) -> None:
    (here, at_home), (there, away) = machine(tmp_path, url), machine(tmp_path, url, "there")
    there.send(a_file(away.checkpoint(7).parent, b"theirs").rename(away.checkpoint(7)))
    mine = a_file(at_home.checkpoint(7).parent, b"mine").rename(at_home.checkpoint(7))
    here.bring(mine)
    assert mine.read_bytes() == b"theirs"


def test_a_finished_trials_checkpoint_is_let_go_of_there_and_here(tmp_path: Path, url: str) -> None:
    depot, paths = machine(tmp_path, url)
    checkpoint = a_file(paths.checkpoint(7).parent, b"x").rename(paths.checkpoint(7))
    depot.send(checkpoint)
    depot.drop(checkpoint)
    assert not list(checkpoint.parent.iterdir())
    assert depot.size() == 0
    depot.drop(checkpoint)  # another process has


# Artifacts


def test_the_dashboards_pictures_can_lie_in_the_depot(tmp_path: Path, url: str) -> None:
    depot, paths = machine(tmp_path, url)
    store = depot.for_optuna(paths.artifacts)
    study = optuna.create_study()
    picture = a_file(tmp_path, b"picture")
    artifact = upload_artifact(artifact_store=store, file_path=str(picture), study_or_trial=study)
    with store.open_reader(artifact) as reader:
        assert reader.read() == b"picture"
    assert depot.size() == len(b"picture")
    store.write("another", io.BytesIO(b"text"))
    store.remove("another")
    with pytest.raises(ArtifactNotFound, match="another is not in"):
        store.open_reader("another")


# A person's mistakes


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://bucket/x", "s3:// needs s3fs: pip install s3fs"),
        ("gs://bucket/x", "gs:// needs gcsfs: pip install gcsfs"),
        ("nowhere://bucket", "nowhere:// is nothing that fsspec knows; give a path, or s3://…, gs://…, abfs://…, "
         "sftp://…"),
    ],
)  # fmt: skip
def test_a_url_without_a_driver_is_refused_in_one_line(
    url: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(StudyError) as refused:
        Depot(url, tmp_path / "own")
    assert str(refused.value) == f"--artifacts {url}: {said}"


def test_a_password_in_the_url_is_in_no_error(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"--artifacts ftp://me:\*\*\*@127.0.0.1:1/x: cannot be opened") as refused:
        Depot("ftp://me:se/cret@127.0.0.1:1/x", tmp_path / "own")
    assert "se/cret" not in str(refused.value)


def test_a_place_that_cannot_be_written_to_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "depot").write_text("a file, and no folder")
    depot, _ = machine(tmp_path, str(tmp_path / "depot"))
    with pytest.raises(StudyError, match=r"^--artifacts .*/depot: cannot be written \(.*\); check the address.*$"):
        depot.put(a_file(tmp_path, b"x"), NAME)


def test_a_place_without_permission_says_so(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    depot, _ = machine(tmp_path, url)

    def refuses(*arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Access Denied")

    monkeypatch.setattr(depot._files, "makedirs", refuses)
    with pytest.raises(StudyError, match=r"cannot be written: no permission \(.*Access Denied\); check the keys"):
        depot.put(a_file(tmp_path, b"x"), NAME)
