"""`hpo study delete`, `rename` and `copy`: of the storage, the folder, the confirmation and the artifact store."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from core.text import count
from hpo.api.options import CopyOptions, DeleteOptions, RenameOptions
from hpo.errors import StudyError
from hpo.paths import StudyPaths, confirmation_of, confirmed_by, is_confirmation, studies_root
from hpo.storage import METADATA, is_journal, is_masked, mask, open_storage
from hpo.storage.atomic import UNFINISHED, replacing
from hpo.study import check_search_name, find_study
from hpo.study.metadata import read_metadata, storage_url_of, write_file
from hpo.text import in_words

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from hpo.storage.artifacts import ArtifactStore

_LOCKS = (".fit", ".queueing", "refit/.*.lock", "references/*/.training", "length/*/.training")
"""Locks of processes that write into a study's folder, beside those that train its trials."""
_OWN_JOURNAL = ("journal.log", "journal.log.*")


@dataclass(frozen=True)
class _Found:
    """A study and its confirmation, as far as they exist."""

    paths: StudyPaths
    metadata: Mapping[str, Any]
    url: str
    storage: BaseStorage | None
    """None if the journal is gone."""

    @property
    def name(self) -> str:
        """Name of the search in the storage."""
        return str(self.metadata.get("name", self.paths.name))

    @property
    def owns_journal(self) -> bool:
        return self.url == str(self.paths.journal)

    def pairs(self, new: str) -> list[tuple[str, str]]:
        """Old and new names of the search and its confirmation in the storage."""
        return [(self.name, new), (confirmation_of(self.name), confirmation_of(new))]

    def stored(self) -> Iterator[str]:
        """Names of the studies in the storage."""
        from hpo.storage.transfer import load_stored

        for name, _ in self.pairs(""):
            if self.storage is not None and load_stored(self.storage, name) is not None:
                yield name


def _find(name: str, storage_url: str | None, *, named: str | None = None) -> _Found:
    """Find a search to be changed, in the folder of `name`; `named` as in `read_metadata`."""
    if is_confirmation(name):
        raise StudyError(f"study {name} belongs to {confirmed_by(name)}, and shares its fate; name that one")
    check_search_name(name)
    paths = StudyPaths.of(name)
    metadata = read_metadata(paths, named=named)
    if metadata is None:
        find_study(name)  # raises an error that lists the studies
        raise AssertionError("a study without study.yaml is not found")
    url = storage_url_of(paths, metadata, storage_url)
    gone = is_journal(url) and not Path(url).exists()
    return _Found(paths, metadata, url, None if gone else open_storage(url))


# Refusals -----------------------------------------------------------------------------------------------------------


def _check_idle(found: _Found) -> None:
    """Raise StudyError if a living process trains a trial of the study or of its confirmation."""
    from hpo.storage.lease import dead_of, worker_of
    from hpo.storage.transfer import load_stored

    for name in found.stored():
        assert found.storage is not None
        study = load_stored(found.storage, name)
        assert study is not None
        running = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "RUNNING"]
        alive = [trial for trial in running if trial.number not in dead_of(study, running)]
        if alive:
            by = ", ".join(sorted({worker_of(trial) for trial in alive}))
            raise StudyError(
                f"study {name}: {count(len(alive), 'trial')} running in {by}; stop that first, by Ctrl-C or kill"
            )


@contextmanager
def _undisturbed(*folders: StudyPaths) -> Iterator[None]:
    """Hold the locks of all work in the folders; StudyError if another process has one."""
    with ExitStack() as held:
        for paths in folders:
            for file in (file for pattern in _LOCKS for file in sorted(paths.dir.glob(pattern))):
                try:
                    held.enter_context(FileLock(file).acquire(timeout=0))
                except Timeout as error:
                    raise StudyError(
                        f"study {paths.name}: a process works in {file.parent}; wait for its end, or stop it first"
                    ) from error
        yield


def _check_free(found: _Found, new: str) -> None:
    """Raise StudyError if there is a study or a folder of the new name."""
    from hpo.storage.transfer import load_stored

    check_search_name(new)
    for name in (new, confirmation_of(new)):
        if StudyPaths.of(name).dir.exists():
            raise StudyError(f"{StudyPaths.of(name).dir} exists already; choose another name, or delete it first")
        if found.storage is not None and not found.owns_journal and load_stored(found.storage, name) is not None:
            raise StudyError(f"storage {mask(found.url)} has a study {name} already; choose another name")


# Delete -------------------------------------------------------------------------------------------------------------


def deletion(options: DeleteOptions) -> list[str]:
    """Describe what `delete` would delete, a line each.

    Raises:
        StudyError: There is no such study, or a process works on it.
    """
    found = _find(options.study, options.storage)
    _check_idle(found)
    lines = []
    for name in (found.name, confirmation_of(found.name)):
        paths = StudyPaths.of(name)
        if paths.dir.exists():
            size = sum(file.stat().st_size for file in paths.dir.rglob("*") if file.is_file())
            models = f", with {count(len(refits), 'model')}" if (refits := paths.refits()) else ""
            lines.append(f"{paths.dir}: {in_words(size)}{models}")
    if not found.owns_journal:
        lines += [f"study {name} in {mask(found.url)}" for name in found.stored()]
    lines += [f"its files in {store.shown}" for store in _stores(found)]
    return lines


def delete(options: DeleteOptions) -> None:
    """Delete a study with its confirmation and its models. An interrupted deletion can be repeated.

    Raises:
        StudyError: There is no such study, or a process works on it.
    """
    from hpo.storage.transfer import delete_stored

    found = _find(options.study, options.storage)
    _check_idle(found)
    folders = [StudyPaths.of(confirmation_of(found.name)), found.paths]
    with _undisturbed(*folders):
        for store in _stores(found):
            store.clear()
        if found.storage is not None and not found.owns_journal:
            for name in reversed(list(found.stored())):
                delete_stored(found.storage, name)
    for paths in folders:  # the search last: with its study.yaml, the deletion can be repeated
        if paths.dir.exists():
            shutil.rmtree(paths.dir)


# Rename and copy ----------------------------------------------------------------------------------------------------


def rename(options: RenameOptions) -> None:
    """Rename a study, its folder and its confirmation; also finish what a renamed folder began.

    Raises:
        StudyError: There is no such study, the new name is taken, or a process works on the study.
    """
    old, new = options.study, options.new
    begun = StudyPaths.of(new).study_yaml.exists() and not StudyPaths.of(old).study_yaml.exists()
    found = _find(new if begun else old, options.storage, named=old)
    if begun and found.name != old:
        raise StudyError(f"there is no study {old}, and {new} is no renamed one; hpo study list shows all")
    _check_storage(found)
    _check_idle(found)
    if not begun:
        _check_free(found, new)
    stores = _stores(found)
    with _undisturbed(found.paths, StudyPaths.of(confirmation_of(old))):
        pass
    for before, after in found.pairs(new):
        if StudyPaths.of(before).dir.exists():
            StudyPaths.of(before).dir.rename(StudyPaths.of(after).dir)
    moved = _find(new, options.storage, named=old)
    _copy_studies(moved, moved, new, replace=True)
    for store in stores:
        store.named(_renamed(store.name, old, new)).copy_from(store)
        store.clear()
    _write_names(old, new)


def copy(options: CopyOptions) -> None:
    """Copy a study with its confirmation, its models and all files, for example to continue it in another way.

    Raises:
        StudyError: There is no such study, the new name is taken, or a process works on the study.
    """
    old, new = options.study, options.new
    found = _find(old, options.storage)
    _check_storage(found)
    _check_idle(found)
    _check_free(found, new)
    ignored = shutil.ignore_patterns("study.yaml", f"*{UNFINISHED}", *(_OWN_JOURNAL if found.owns_journal else ()))
    try:
        with _undisturbed(found.paths, StudyPaths.of(confirmation_of(old))):
            for before, after in reversed(found.pairs(new)):
                if StudyPaths.of(before).dir.exists():
                    shutil.copytree(StudyPaths.of(before).dir, StudyPaths.of(after).dir, ignore=ignored)
            url = str(StudyPaths.of(new).journal) if found.owns_journal else found.url
            target = _Found(StudyPaths.of(new), found.metadata, url, open_storage(url))
            _copy_studies(found, target, new, replace=False)
            for store in _stores(found):
                store.named(_renamed(store.name, old, new)).copy_from(store)
            for before, after in found.pairs(new):
                if StudyPaths.of(before).study_yaml.exists():
                    shutil.copyfile(StudyPaths.of(before).study_yaml, StudyPaths.of(after).study_yaml)
            _write_names(old, new)
    except BaseException:
        _discard(found, new)
        raise


def _discard(found: _Found, new: str) -> None:
    """Delete an incomplete copy."""
    from hpo.storage.transfer import delete_stored

    for name in (new, confirmation_of(new)):
        if found.storage is not None and not found.owns_journal:
            delete_stored(found.storage, name)
        shutil.rmtree(StudyPaths.of(name).dir, ignore_errors=True)


def _check_storage(found: _Found) -> None:
    if found.storage is None:
        raise StudyError(f"study {found.name}: its journal {mask(found.url)} is gone; put it back first")


def _copy_studies(source: _Found, target: _Found, new: str, *, replace: bool) -> None:
    """Copy the stored studies under their new names; if `replace`, delete the old ones.

    A copy that an interrupted renaming left incomplete is made again.
    """
    from hpo.storage.optuna_access import attribute_of
    from hpo.storage.transfer import copy_stored, delete_stored, load_stored

    assert source.storage is not None
    assert target.storage is not None
    for before, after in source.pairs(new):
        study = load_stored(source.storage, before)
        if study is None:
            continue
        there = load_stored(target.storage, after) if replace else None
        if there is not None and attribute_of(there, METADATA) is None:
            delete_stored(target.storage, after)
            there = None
        if there is None:
            copy_stored(
                study,
                target.storage,
                after,
                last=METADATA,
                change=lambda attributes: _with_names(attributes, source.name, new),
            )
        if replace:
            delete_stored(source.storage, before)


def _with_names(attributes: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """Replace the study's name in its settings and metadata."""
    found = dict(attributes)
    if found.get("command"):
        found["command"] = _command_of(found["command"], old, new)
    metadata = found.get(METADATA)
    if metadata is not None and metadata["identity"].get("confirms") == old:
        found[METADATA] = _confirming(metadata, new)
        found["space_hash"] = found[METADATA]["hash"]
        if found.get("space"):
            found["space"] = _space_of(found["space"], metadata["space"], new)
    return found


def _confirming(metadata: Mapping[str, Any], new: str) -> dict[str, Any]:
    """The metadata of a confirmation, of a study under its new name."""
    from hpo.space.document import hash_of

    identity = {**metadata["identity"], "confirms": new}
    return {**metadata, "identity": identity, "hash": hash_of(identity)}


def _space_of(text: str, name: str, new: str) -> str:
    from dataclasses import replace

    from hpo.space import ConfirmationSpace, space_from_yaml, space_to_yaml

    space = space_from_yaml(text, name)
    assert isinstance(space, ConfirmationSpace)
    return space_to_yaml(replace(space, confirms=new))


def _command_of(command: str, old: str, new: str) -> str:
    """The command that resumes the study under its new name."""
    words = shlex.split(command)
    if words[1:2] == ["confirm"]:
        return shlex.join([new if word == old else word for word in words])
    if "--study" in words:
        at = words.index("--study")
        words[at : at + 2] = []
    return shlex.join([*words, "--study", new])


def _write_names(old: str, new: str) -> None:
    """Write the new name into the files of the confirmation and then of the search."""
    confirmation = StudyPaths.of(confirmation_of(new))
    if (metadata := read_metadata(confirmation, named=confirmation_of(old))) is not None:
        write_file(confirmation, _confirming(metadata, new))
    paths = StudyPaths.of(new)
    if paths.confirmation.exists():
        content = json.loads(paths.confirmation.read_text(encoding="utf-8"))
        with replacing(paths.confirmation) as temporary:
            temporary.write_text(json.dumps({**content, "study": new}, indent=1) + "\n", encoding="utf-8")
    metadata = read_metadata(paths, named=old)
    assert metadata is not None
    write_file(paths, metadata)


def _renamed(name: str, old: str, new: str) -> str:
    return confirmation_of(new) if name == confirmation_of(old) else new


def _stores(found: _Found) -> list[ArtifactStore]:
    """The artifact stores of the study and its confirmation; empty if they have their files in their folders."""
    from hpo.storage.transfer import load_stored
    from hpo.study.files import STORE

    stores = []
    for name in found.stored():
        assert found.storage is not None
        study = load_stored(found.storage, name)
        url = None if study is None else study.user_attrs.get(STORE)
        if url is None:
            continue
        if is_masked(url):
            raise StudyError(f"study {name}: its artifact store {url} needs a password; move or delete its files there")
        from hpo.storage.artifacts import ArtifactStore

        stores.append(ArtifactStore(url, studies_root() / name))
    return stores
