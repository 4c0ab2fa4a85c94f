"""The depot: a place that all machines of a study reach, for what must outlive the one it was made on.

Checkpoints, kept weights and the dashboard's pictures go there under the names that they have in the study's folder. It
is a shared folder, or whatever fsspec has a driver for: `s3://…`, `gs://…`. A reader finds a file whole or not at all,
and the old one until the new one is whole: object stores give that by themselves, elsewhere a file is written under
another name and moved.

Which of two checkpoints is the later one is not asked of clocks, since machines differ. Beside its own copy a machine
notes the mark of the depot's (an ETag, or what a file system knows of it) at the time when both were the same. As long
as that mark stays, nobody else has put one since.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, cast

from hpo.errors import FULL_DISK, StudyError
from hpo.storage import mask
from hpo.storage.urls import missing_module, words_of

if TYPE_CHECKING:
    from hpo.storage.optuna_access import OptunaArtifactStore

# Where an upload is one operation of the service: its object is the old one until the whole new one is there.
_ATOMIC = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss"}
# What a file is called while it is written: a dot, its own name, and this.
_UNFINISHED = ".unfinished"


class Depot:
    """A study's files at a path or URL, by their names in the study's folder: `checkpoints/00007.pt`.

    Args:
        url: of all studies; the study's folder lies in it, under the study's name.
        folder: the study's, on this machine.

    Raises:
        StudyError: there is no driver for the URL, or it leads nowhere. So does every method where the place cannot be
            reached, is full, or lets nobody write.
    """

    def __init__(self, url: str, folder: Path) -> None:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        self.url, self._folder = url, folder
        with self._saying("opened"):
            # Without a cache of listings: other machines put files there too.
            self._files, root = url_to_fs(url, use_listings_cache=False)
        self._root = f"{root.rstrip('/')}/{folder.name}"
        self._local = isinstance(self._files, LocalFileSystem)
        protocols = self._files.protocol
        self._atomic = bool(_ATOMIC & {*([protocols] if isinstance(protocols, str) else protocols)})

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return mask(self.url)

    # A file by its name

    def put(self, local: Path, name: str) -> None:
        """Puts a file there, in place of an older one."""
        target = self._at(name)
        with self._saying("written"):
            if self._atomic:
                self._files.put_file(str(local), target)
                return
            parent, _, last = target.rpartition("/")
            self._files.makedirs(parent, exist_ok=True)
            unfinished = f"{parent}/.{last}.{uuid.uuid4().hex}{_UNFINISHED}"
            try:
                self._write(local, unfinished)
                self._move(unfinished, target)
            except BaseException:
                with contextlib.suppress(Exception):  # what went wrong before is what is to be told
                    self._files.rm_file(unfinished)
                raise

    def _write(self, local: Path, target: str) -> None:
        if not self._local:
            self._files.put_file(str(local), target)
            return
        with local.open("rb") as source, Path(target).open("wb") as sink:
            shutil.copyfileobj(source, sink)
            sink.flush()
            os.fsync(sink.fileno())

    def _move(self, source: str, target: str) -> None:
        if self._local:
            Path(source).replace(target)
        else:
            self._files.mv(source, target)

    def fetch(self, name: str, local: Path) -> bool:
        """Brings a file here, in place of what `local` is; False where the depot has none of that name."""
        source = self._at(name)
        local.parent.mkdir(parents=True, exist_ok=True)
        unfinished = local.with_name(f".{local.name}.{uuid.uuid4().hex}{_UNFINISHED}")
        try:
            with self._saying("read"):
                try:
                    self._files.get_file(source, str(unfinished))
                except FileNotFoundError:
                    return False
            unfinished.replace(local)
        finally:
            unfinished.unlink(missing_ok=True)
        return True

    def remove(self, name: str) -> None:
        """Lets go of a file, and of what killed processes left half written of it; nothing where there is none."""
        target = self._at(name)
        with self._saying("written"):
            parent, _, last = target.rpartition("/")
            left = [] if self._atomic else self._files.glob(f"{parent}/.{last}.*{_UNFINISHED}")
            for path in [target, *left]:
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(path)

    def exists(self, name: str) -> bool:
        """Whether a file of that name is there, whole."""
        target = self._at(name)
        with self._saying("read"):
            return bool(self._files.exists(target))

    def size(self) -> int:
        """The bytes of all the study's files there."""
        with self._saying("read"):
            try:
                return sum(int(info["size"] or 0) for info in self._files.find(self._root, detail=True).values())
            except FileNotFoundError:
                return 0

    # A checkpoint by its file on this machine

    def bring(self, checkpoint: Path) -> None:
        """Brings a checkpoint here, if another machine has put it there since this one did; before a training."""
        if (mark := self._mark(checkpoint)) is None:
            return
        noted = _note_of(checkpoint)
        if checkpoint.exists() and noted.exists() and noted.read_text(encoding="utf-8") == mark:
            return
        if self.fetch(self._name(checkpoint), checkpoint):
            # The mark of before: were another one put meanwhile, it would be fetched again, and not be missed.
            noted.write_text(mark, encoding="utf-8")

    def send(self, checkpoint: Path) -> None:
        """Puts a checkpoint there that has just been saved."""
        self.put(checkpoint, self._name(checkpoint))
        _note_of(checkpoint).write_text(self._mark(checkpoint) or "", encoding="utf-8")

    def drop(self, checkpoint: Path) -> None:
        """Lets go of the checkpoint of a finished trial, there and here."""
        self.remove(self._name(checkpoint))
        checkpoint.unlink(missing_ok=True)
        _note_of(checkpoint).unlink(missing_ok=True)

    def _mark(self, checkpoint: Path) -> str | None:
        """What changes with every checkpoint that is put there in place of this; None where there is none."""
        there = self._at(self._name(checkpoint))
        with self._saying("read"):
            try:
                return str(self._files.ukey(there))
            except FileNotFoundError:
                return None

    def _name(self, file: Path) -> str:
        return file.relative_to(self._folder).as_posix()

    # What all of it needs

    def artifacts(self, folder: Path) -> OptunaArtifactStore:
        """The dashboard's artifacts, as Optuna asks for them.

        Args:
            folder: theirs in the study's folder.
        """
        return cast("OptunaArtifactStore", _Artifacts(self, folder.relative_to(self._folder).as_posix()))

    def open(self, name: str) -> BinaryIO:
        """A file of the depot, to be read.

        Raises:
            FileNotFoundError: there is none of that name.
        """
        return cast("BinaryIO", self._files.open(self._at(name), "rb"))

    def _at(self, name: str) -> str:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or parts[0] == "/":
            raise ValueError(f"{name!r} is no name of a file in a study's folder")
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _saying(self, done: str) -> Iterator[None]:
        """Turns what a driver says into one line. `done`: what the place cannot be."""
        try:
            yield
        except (AssertionError, AttributeError, NameError, TypeError):
            raise  # a fault of ours
        except Exception as error:
            raise StudyError(f"--artifacts {self.shown}: {_advice(self.url, error, done)}") from error


class _Artifacts:
    """An artifact store of Optuna's in a depot."""

    def __init__(self, depot: Depot, folder: str) -> None:
        self._depot, self._folder = depot, folder

    def open_reader(self, artifact_id: str) -> BinaryIO:
        from optuna.artifacts.exceptions import ArtifactNotFound

        try:
            return self._depot.open(f"{self._folder}/{artifact_id}")
        except FileNotFoundError as error:
            raise ArtifactNotFound(f"artifact {artifact_id} is not in {self._depot.shown}") from error

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        with tempfile.TemporaryDirectory(prefix="hpo-") as folder:
            whole = Path(folder) / "artifact"
            with whole.open("wb") as file:
                shutil.copyfileobj(content_body, file)
            self._depot.put(whole, f"{self._folder}/{artifact_id}")

    def remove(self, artifact_id: str) -> None:
        self._depot.remove(f"{self._folder}/{artifact_id}")


def _note_of(checkpoint: Path) -> Path:
    """Where the depot's mark is noted beside a checkpoint."""
    return checkpoint.with_name(checkpoint.name + ".mark")


def _advice(url: str, error: Exception, done: str) -> str:
    """What is wrong with the place, and what to do about it."""
    scheme = url.partition("://")[0]
    if (module := missing_module(error)) is not None:
        return f"{scheme}:// needs {module}: pip install {module}"
    if isinstance(error, ValueError) and "not known" in str(error):
        return f"{scheme}:// is nothing that fsspec knows; give a path, or s3://…, gs://…, abfs://…, sftp://…"
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return "is full; free some space, and run the same command again"
    words = words_of(url, error) or type(error).__name__
    if isinstance(error, PermissionError):
        return f"cannot be {done}: no permission ({words}); check the keys, or the folder's owner"
    return f"cannot be {done} ({words}); check the address, and that it is reached from here"
