"""Artifact store: files of a study in a place that all of its machines can reach.

Readers see complete files only. Beside its copy of a checkpoint, a machine keeps the tag (such as the ETag) of the
equal stored file; while that is the same, no other machine has stored a later one. Clocks of machines differ.
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
from hpo.storage.atomic import replacing
from hpo.storage.urls import missing_module, words_of

if TYPE_CHECKING:
    from hpo.storage.optuna_access import OptunaArtifactStore

# Object stores, which replace an object atomically.
_ATOMIC = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss"}
# Suffix of a file while it is written.
_UNFINISHED = ".unfinished"


class ArtifactStore:
    """A study's files at a path or URL, by their names in the study's folder: `checkpoints/00007.pt`.

    Every method raises StudyError if the store cannot be reached, is full, or denies access.
    """

    def __init__(self, url: str, folder: Path) -> None:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        self.url, self._folder = url, folder
        with self._explained("opened"):
            # No cache of listings: other machines store files too.
            self._files, root = url_to_fs(url, use_listings_cache=False)
        self._root = f"{root.rstrip('/')}/{folder.name}"
        self._local = isinstance(self._files, LocalFileSystem)
        protocols = self._files.protocol
        self._atomic = bool(_ATOMIC & {*([protocols] if isinstance(protocols, str) else protocols)})

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return mask(self.url)

    def put(self, local: Path, name: str) -> None:
        """Store or replace a file."""
        target = self._at(name)
        with self._explained("written"):
            if self._atomic:
                self._files.put_file(str(local), target)
                return
            parent, _, last = target.rpartition("/")
            self._files.makedirs(parent, exist_ok=True)
            unfinished = f"{parent}/.{last}.{uuid.uuid4().hex}{_UNFINISHED}"
            try:
                self._write(local, unfinished)
                if self._local:
                    Path(unfinished).replace(target)
                else:
                    self._files.mv(unfinished, target)
            except BaseException:
                with contextlib.suppress(Exception):  # the first error is the one to report
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

    def fetch(self, name: str, local: Path) -> bool:
        """Fetch a file, replacing `local`; False if the store lacks it."""
        source = self._at(name)
        local.parent.mkdir(parents=True, exist_ok=True)
        with self._explained("read"), contextlib.suppress(FileNotFoundError):
            with replacing(local) as unfinished:
                self._files.get_file(source, str(unfinished))
            return True
        return False

    def remove(self, name: str) -> None:
        """Delete a file if it exists, and the incomplete copies of killed processes."""
        target = self._at(name)
        with self._explained("written"):
            parent, _, last = target.rpartition("/")
            left = [] if self._atomic else self._files.glob(f"{parent}/.{last}.*{_UNFINISHED}")
            for path in [target, *left]:
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(path)

    def exists(self, name: str) -> bool:
        target = self._at(name)
        with self._explained("read"):
            return bool(self._files.exists(target))

    def size(self) -> int:
        with self._explained("read"), contextlib.suppress(FileNotFoundError):
            return sum(int(info["size"] or 0) for info in self._files.find(self._root, detail=True).values())
        return 0

    @property
    def name(self) -> str:
        """Name of the study."""
        return self._folder.name

    def named(self, name: str) -> ArtifactStore:
        """Return the store of another study in the same place."""
        return ArtifactStore(self.url, self._folder.with_name(name))

    def copy_from(self, other: ArtifactStore) -> None:
        """Copy all files of another study in the same place."""
        with self._explained("written"), contextlib.suppress(FileNotFoundError):
            self._files.copy(other._root, self._root, recursive=True)

    def clear(self) -> None:
        """Delete all files of the study."""
        with self._explained("written"), contextlib.suppress(FileNotFoundError):
            self._files.rm(self._root, recursive=True)

    def bring(self, checkpoint: Path) -> None:
        """Fetch a checkpoint, if another machine has stored a later one."""
        if (tag := self._tag(checkpoint)) is None:
            return
        tag_file = _tag_file(checkpoint)
        if checkpoint.exists() and tag_file.exists() and tag_file.read_text(encoding="utf-8") == tag:
            return
        if self.fetch(self._name(checkpoint), checkpoint):
            # The earlier tag: a checkpoint that was stored in between is fetched again, not missed.
            tag_file.write_text(tag, encoding="utf-8")

    def send(self, checkpoint: Path) -> None:
        """Store a saved checkpoint."""
        self.put(checkpoint, self._name(checkpoint))
        _tag_file(checkpoint).write_text(self._tag(checkpoint) or "", encoding="utf-8")

    def drop(self, checkpoint: Path) -> None:
        """Delete the stored and the local checkpoint."""
        self.remove(self._name(checkpoint))
        checkpoint.unlink(missing_ok=True)
        _tag_file(checkpoint).unlink(missing_ok=True)

    def _tag(self, checkpoint: Path) -> str | None:
        """Tag of the stored checkpoint, or None."""
        with self._explained("read"), contextlib.suppress(FileNotFoundError):
            return str(self._files.ukey(self._at(self._name(checkpoint))))
        return None

    def _name(self, file: Path) -> str:
        return file.relative_to(self._folder).as_posix()

    def for_optuna(self, folder: Path) -> OptunaArtifactStore:
        """Return a folder as a store for Optuna and its dashboard."""
        return cast("OptunaArtifactStore", _Artifacts(self, folder.relative_to(self._folder).as_posix()))

    def open(self, name: str) -> BinaryIO:
        return cast("BinaryIO", self._files.open(self._at(name), "rb"))

    def _at(self, name: str) -> str:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or parts[0] == "/":
            raise ValueError(f"{name!r} is no name of a file in a study's folder")
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _explained(self, done: str) -> Iterator[None]:
        """Turn a driver's error into one line. `done` completes "cannot be …"."""
        try:
            yield
        except (AssertionError, AttributeError, NameError, TypeError):
            raise  # a bug
        except Exception as error:
            raise StudyError(f"--artifacts {self.shown}: {_advice(self.url, error, done)}") from error


class _Artifacts:
    """Implements Optuna's protocol."""

    def __init__(self, store: ArtifactStore, folder: str) -> None:
        self._store, self._folder = store, folder

    def open_reader(self, artifact_id: str) -> BinaryIO:
        from optuna.artifacts.exceptions import ArtifactNotFound

        try:
            return self._store.open(f"{self._folder}/{artifact_id}")
        except FileNotFoundError as error:
            raise ArtifactNotFound(f"artifact {artifact_id} is not in {self._store.shown}") from error

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        with tempfile.TemporaryDirectory(prefix="hpo-") as folder:
            whole = Path(folder) / "artifact"
            with whole.open("wb") as file:
                shutil.copyfileobj(content_body, file)
            self._store.put(whole, f"{self._folder}/{artifact_id}")

    def remove(self, artifact_id: str) -> None:
        self._store.remove(f"{self._folder}/{artifact_id}")


def _tag_file(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".mark")


def _advice(url: str, error: Exception, done: str) -> str:
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
