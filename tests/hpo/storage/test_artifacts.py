"""The artifact store, on a file system and in fsspec's memory: atomic files, the later checkpoint, one-line errors."""

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
from hpo.storage.artifacts import ArtifactStore

NAME = "checkpoints/00007.pt"


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """The memory of fsspec is shared by all tests of a process."""
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["path", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of the store."""
    there = {"path": str(tmp_path / "store"), "file": f"file://{tmp_path}/store", "memory": "memory://store"}
    return there[request.param]


@pytest.fixture
def store(tmp_path: Path, url: str) -> ArtifactStore:
    return machine(tmp_path, url)[0]


def machine(tmp_path: Path, url: str, name: str = "here") -> tuple[ArtifactStore, StudyPaths]:
    """The store as used by a machine, and the study's folder there."""
    paths = StudyPaths(tmp_path / name / "own")
    return ArtifactStore(url, paths.dir), paths


def a_file(folder: Path, content: bytes, name: str = "a.bin") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_bytes(content)
    return file


def saved(checkpoint: Path, content: bytes) -> Path:
    return a_file(checkpoint.parent, content, checkpoint.name)


# Files


def test_the_latest_version_of_a_file_is_fetched(tmp_path: Path, store: ArtifactStore) -> None:
    assert not store.exists(NAME)
    assert store.size() == 0
    for content in (b"first" * 1000, b"second"):
        store.put(a_file(tmp_path, content), NAME)
    assert store.exists(NAME)
    assert store.size() == len(b"second")
    there = tmp_path / "elsewhere" / "x.pt"
    assert store.fetch(NAME, there)
    assert there.read_bytes() == b"second"
    assert list(there.parent.iterdir()) == [there]


def test_fetching_a_missing_file_changes_nothing(tmp_path: Path, store: ArtifactStore) -> None:
    mine = a_file(tmp_path, b"mine")
    assert not store.fetch(NAME, mine)
    assert mine.read_bytes() == b"mine"
    store.remove(NAME)
    store.put(mine, NAME)
    store.remove(NAME)
    assert not store.exists(NAME)
    assert store.size() == 0


def test_studies_do_not_see_each_others_files(tmp_path: Path, url: str, store: ArtifactStore) -> None:
    other = ArtifactStore(url, tmp_path / "here" / "another")
    store.put(a_file(tmp_path, b"mine"), NAME)
    assert not other.exists(NAME)
    assert other.size() == 0


@pytest.mark.parametrize("name", ["../another/x", "/etc/x", "a/../../x", ""])
def test_no_name_leads_out_of_the_studys_folder(name: str, tmp_path: Path, store: ArtifactStore) -> None:
    with pytest.raises(ValueError, match="is no name of a file in a study's folder"):
        store.put(a_file(tmp_path, b"x"), name)


# Torn uploads


def test_a_failed_upload_leaves_the_old_file_only(
    tmp_path: Path, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(a_file(tmp_path, b"old"), NAME)
    written = type(store)._write

    def breaks_off(self: ArtifactStore, local: Path, target: str) -> None:
        written(self, local, target)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ArtifactStore, "_write", breaks_off)
    with pytest.raises(StudyError, match=r"--artifacts .*store: is full; free some space, and run the same command"):
        store.put(a_file(tmp_path, b"new" * 100), NAME)
    monkeypatch.undo()
    assert store.size() == len(b"old")
    assert store.fetch(NAME, mine := tmp_path / "mine")
    assert mine.read_bytes() == b"old"


def test_a_killed_upload_leaves_the_old_file_and_its_remains_are_deleted_with_that(tmp_path: Path) -> None:
    store, paths = machine(tmp_path, str(tmp_path / "store"))
    store.put(a_file(tmp_path, b"old"), NAME)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # a file that is never read to its end
    code = (
        "import sys; from pathlib import Path; from hpo.storage.artifacts import ArtifactStore;"
        f"ArtifactStore({str(tmp_path / 'store')!r}, Path({str(paths.dir)!r})).put(Path({str(fifo)!r}), {NAME!r})"
    )
    writer = subprocess.Popen([sys.executable, "-c", code])
    with fifo.open("wb") as source:
        source.write(b"new" * 30_000)
        source.flush()
        folder = tmp_path / "store/own/checkpoints"
        deadline = time.monotonic() + 60
        while not any(file.stat().st_size for file in folder.glob(".*")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert store.fetch(NAME, mine := tmp_path / "mine")
    assert mine.read_bytes() == b"old"
    assert len(list(folder.iterdir())) == 2
    store.remove(NAME)
    assert not list(folder.iterdir())


def test_an_object_is_written_in_one_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moving an object copies it, and the service never shows an incomplete one. The memory of fsspec acts as one."""
    monkeypatch.setattr(MemoryFileSystem, "protocol", ("s3", "s3a"))
    store, _ = machine(tmp_path, "memory://store")
    moved: list[Any] = []
    monkeypatch.setattr(MemoryFileSystem, "mv", lambda *arguments, **options: moved.append(arguments))
    store.put(a_file(tmp_path, b"x"), NAME)
    assert store.exists(NAME)
    assert not moved


# Checkpoints


def test_a_machine_resumes_from_the_checkpoint_that_was_stored_last_by_any_machine(tmp_path: Path, url: str) -> None:
    (here, at_home), (there, away) = machine(tmp_path, url), machine(tmp_path, url, "there")
    mine, theirs = at_home.checkpoint(7), away.checkpoint(7)
    here.bring(mine)
    assert not mine.exists()  # none is stored

    def save(checkpoint: Path, content: bytes, store: ArtifactStore) -> None:
        store.send(saved(checkpoint, content))

    save(mine, b"epoch 1", here)
    there.bring(theirs)
    assert theirs.read_bytes() == b"epoch 1"
    save(theirs, b"epoch 2", there)
    here.bring(mine)
    assert mine.read_bytes() == b"epoch 2"
    there.bring(theirs)
    assert theirs.read_bytes() == b"epoch 2"

    mine.write_bytes(b"epoch 3")  # killed after it was saved, before it was stored
    here.bring(mine)
    assert mine.read_bytes() == b"epoch 3"
    there.bring(theirs)
    assert theirs.read_bytes() == b"epoch 2"


def test_a_checkpoint_of_unknown_origin_is_replaced_by_the_stored_one(tmp_path: Path, url: str) -> None:
    (here, at_home), (there, away) = machine(tmp_path, url), machine(tmp_path, url, "there")
    there.send(saved(away.checkpoint(7), b"theirs"))
    mine = saved(at_home.checkpoint(7), b"mine")
    here.bring(mine)
    assert mine.read_bytes() == b"theirs"


def test_the_checkpoint_of_a_finished_trial_is_deleted_in_the_store_and_here(tmp_path: Path, url: str) -> None:
    store, paths = machine(tmp_path, url)
    checkpoint = saved(paths.checkpoint(7), b"x")
    store.send(checkpoint)
    store.drop(checkpoint)
    assert not list(checkpoint.parent.iterdir())
    assert store.size() == 0
    store.drop(checkpoint)  # another process has


# Artifacts


def test_the_dashboards_artifacts_can_be_in_the_store(tmp_path: Path, url: str) -> None:
    store, paths = machine(tmp_path, url)
    artifacts = store.for_optuna(paths.artifacts)
    study = optuna.create_study()
    picture = a_file(tmp_path, b"picture")
    artifact = upload_artifact(artifact_store=artifacts, file_path=str(picture), study_or_trial=study)
    with artifacts.open_reader(artifact) as reader:
        assert reader.read() == b"picture"
    assert store.size() == len(b"picture")
    artifacts.write("another", io.BytesIO(b"text"))
    artifacts.remove("another")
    with pytest.raises(ArtifactNotFound, match="another is not in"):
        artifacts.open_reader("another")


# Mistakes of the user


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
        ArtifactStore(url, tmp_path / "own")
    assert str(refused.value) == f"--artifacts {url}: {said}"


def test_a_password_in_the_url_is_in_no_error(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"--artifacts ftp://me:\*\*\*@127.0.0.1:1/x: cannot be opened") as refused:
        ArtifactStore("ftp://me:se/cret@127.0.0.1:1/x", tmp_path / "own")
    assert "se/cret" not in str(refused.value)


def test_a_store_that_cannot_be_written_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file, and no folder")
    store, _ = machine(tmp_path, str(tmp_path / "store"))
    with pytest.raises(StudyError, match=r"^--artifacts .*/store: cannot be written \(.*\); check the address.*$"):
        store.put(a_file(tmp_path, b"x"), NAME)


def test_missing_permission_is_reported(tmp_path: Path, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:

    def refuses(*arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Access Denied")

    monkeypatch.setattr(store._files, "makedirs", refuses)
    with pytest.raises(StudyError, match=r"cannot be written: no permission \(.*Access Denied\); check the keys"):
        store.put(a_file(tmp_path, b"x"), NAME)
