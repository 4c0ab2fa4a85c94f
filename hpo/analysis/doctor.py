"""What is wrong with a study, and what of it can be mended.

Every check stands alone: one that cannot be made is a finding with its words, and hides no other. Looking changes
nothing; a journal is read without its lock, and without the mending that opening it does. Mending goes the way that
every worker goes, through the storage's compare-and-set, so it may be done beside living ones, whose trials it never
touches. A finished trial is never changed, and nothing is deleted but what can be made again or belongs to nobody.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial, TrialState

from core.config import TrainConfig
from core.errors import CoreError
from hpo.errors import HpoError, StudyError
from hpo.paths import StudyPaths, cache_root, data_root, is_confirmation, studies_root
from hpo.storage import is_journal, mask, open_storage, repair_journal
from hpo.storage.atomic import UNFINISHED, replacing
from hpo.storage.journal import torn_records
from hpo.storage.lease import LEASE, has_heartbeat, held_elsewhere, is_abandoned, own_lease, stale_elsewhere
from hpo.storage.lock import GRACE_S, JournalLock
from hpo.storage.optuna_access import id_of, storage_of
from hpo.storage.urls import words_of
from hpo.study import Study, find_study, join_study
from hpo.study.metadata import METADATA, check_weights, read_metadata, storage_url_of
from hpo.study.versions import versions
from hpo.text import in_words, some
from hpo.trials import ARTIFACT, TAKEN_FROM, effective_trials, trial_index_of

# A file that is being written grows. One that has not for so many seconds was left behind, even if the last thing that
# its writer does is a sync on a slow disk.
_STILL_S = 600
# The files of weights that a checkpoint is as large as: the network, its average, and two of an optimizer's state.
_CHECKPOINT_WEIGHTS = 4
# How files are called until they are whole: checkpoints and weights, and what a depot brings here.
_UNFINISHED = (UNFINISHED, ".unfinished")
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Finding:
    """Something that is wrong."""

    what: str
    advice: str
    """What to do about it."""
    mend: Callable[[], object] | None = None
    """Mends it; None where only a person can. A second time it does nothing."""


@dataclass(frozen=True)
class Note:
    """Something worth knowing that is not wrong."""

    what: str


Told = Finding | Note


class Patient:
    """A study, as far as it can be looked at.

    Args:
        storage_url: the storage that a person gave; None is what its study.yaml says, or its own journal.

    Raises:
        StudyError: what was given is another storage than the study's, or lacks the password.
    """

    def __init__(self, name: str, storage_url: str | None = None) -> None:
        self.paths = StudyPaths.of(name)
        self.study: Study | None = None
        """Once its storage could be read."""
        try:
            written = self.written
        except StudyError:  # a finding of its own
            written = None
        self.url = storage_url_of(self.paths, written, storage_url)

    @property
    def name(self) -> str:
        return self.paths.name

    @property
    def written(self) -> dict[str, Any] | None:
        """What its study.yaml holds; None where there is none.

        Raises:
            StudyError: it cannot be read.
        """
        return read_metadata(self.paths)

    @property
    def known(self) -> Study:
        """The study, for what is only asked once its storage could be read."""
        assert self.study is not None
        return self.study

    @cached_property
    def trials(self) -> list[FrozenTrial]:
        return self.known.optuna.get_trials(deepcopy=False)

    @property
    def unfinished(self) -> int:
        """How many slots are still to be trained."""
        states = [trial.state for trial in effective_trials(self.trials).values()]
        total = len(states) if self.known.total is None else max(self.known.total, len(states))
        return total - sum(state in _FINISHED for state in states)

    def alive(self) -> Study:
        """The study, to be changed."""
        return find_study(self.name, storage_url=self.url)


def find_patient(name: str | None, *, storage_url: str | None) -> Patient:
    """The study of that name, or the one that was run last, however broken.

    Raises:
        StudyError: there is none, or `storage_url` is not its storage.
    """
    folders = studies_root().iterdir() if studies_root().is_dir() else []
    times = {paths.name: seen for paths in map(StudyPaths, folders) if (seen := _last_run(paths)) is not None}
    if name is None:
        searches = [known for known in times if not is_confirmation(known)]
        if not searches:
            raise StudyError(f"no studies in {studies_root()} yet; begin with: hpo run digits")
        return Patient(max(searches, key=times.__getitem__), storage_url)
    if name not in times and storage_url is None:
        return Patient(find_study(name).name)  # which says that there is none, and which there are
    if name not in times:
        join_study(name, storage_url=storage_url)  # which says so if it is none
    return Patient(name, storage_url)


def _last_run(paths: StudyPaths) -> float | None:
    """When the study in this folder was last run; None where there is none in it."""
    files = [file for file in (paths.study_yaml, paths.journal) if file.exists()]
    return max((file.stat().st_mtime for file in files), default=None)


def examine(patient: Patient) -> list[Told]:
    """Everything that is wrong, and what else is worth knowing."""
    told: list[Told] = []
    for name, check in _OF_FILES.items():
        told += _made(patient, name, check)
    if patient.study is not None:
        for name, check in _OF_TRIALS.items():
            told += _made(patient, name, check)
    return told


def _made(patient: Patient, name: str, check: Callable[[Patient], Iterable[Told]]) -> Iterator[Told]:
    """What a check finds; where it cannot be made, that."""
    try:
        yield from check(patient)
    except (HpoError, CoreError) as error:
        what, _, advice = str(error).partition("; ")
        yield Finding(what, advice or "that is for a person to mend")
    except Exception as error:
        words = words_of(patient.url, error)
        yield Finding(f"{name}: cannot be looked at ({type(error).__name__}: {words})", "look at it yourself")


# Its storage --------------------------------------------------------------------------------------------------------


class _Records(BaseJournalBackend):
    """A journal's records, to be read only."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self._records = records

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        return self._records[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        raise AssertionError(f"looking at a study changes nothing: {logs}")


def _storage(patient: Patient) -> Iterator[Told]:
    """Whether the storage can be read, and opens it."""
    file = _file_of(patient.url)
    if file is not None and not file.exists():
        yield Finding(f"{file} is gone, and the study's trials with it", "put it back from a backup")
        return
    if is_journal(patient.url):
        journal = Path(patient.url)
        content = journal.read_bytes()
        torn = torn_records(content, journal)
        for start, end in torn:
            where = "at its end" if end == len(content) else f"from byte {start} on"
            yield Finding(
                f"{journal}: {end - start} bytes {where} are a record torn by a crash",
                f"--mend takes it out, and keeps it in {journal.name}.torn",
                partial(repair_journal, journal),
            )
        storage: BaseStorage = JournalStorage(_Records(_whole(content, torn)))
    else:
        storage = open_storage(patient.url)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.load_study(study_name=patient.name, storage=storage)
    except KeyError as error:
        raise StudyError(
            f"storage {mask(patient.url)} has no study {patient.name}; give the right one by --storage"
        ) from error
    metadata = study.user_attrs.get(METADATA)
    if metadata is None:
        raise StudyError(
            f"storage {mask(patient.url)} has a study {patient.name} that hpo did not begin; choose another"
        )
    patient.study = Study(study, patient.paths, metadata, patient.url)


def _file_of(url: str) -> Path | None:
    """The file that a storage lies in; None of a server."""
    if is_journal(url):
        return Path(url)
    scheme, _, rest = url.partition(":///")
    return Path(rest.partition("?")[0]) if scheme.startswith("sqlite") else None


def _whole(content: bytes, torn: Iterable[tuple[int, int]]) -> list[dict[str, Any]]:
    """The records of a journal, without those that are torn."""
    kept, before = [], 0
    for start, end in torn:
        kept.append(content[before:start])
        before = end
    return [json.loads(line) for line in b"".join([*kept, content[before:]]).splitlines() if line.strip()]


def _lock(patient: Patient) -> Iterator[Told]:
    """Whether a dead process still holds the journal."""
    if not is_journal(patient.url):
        return
    journal = Path(patient.url)
    link = journal.with_name(journal.name + ".lock")
    if os.path.lexists(link) and JournalLock(journal).is_left_by_dead():
        yield Finding(
            f"{link}: a process that died left it; optuna's own commands wait {GRACE_S} s for it",
            "--mend takes it away",
            partial(_take_lock, journal),
        )


def _take_lock(journal: Path) -> None:
    with JournalLock(journal):  # whoever takes it finds that its holder is dead, and leaves nothing
        pass


def _study_yaml(patient: Patient) -> Iterator[Told]:
    """Whether study.yaml is there and can be read: without it, no command finds the study."""
    file = patient.paths.study_yaml
    if patient.written is not None:
        return
    if patient.study is None:
        yield Finding(f"{file} is missing, and the storage cannot be read to write it again", "mend the storage first")
        return
    yield Finding(
        f"{file} is missing, though {patient.known.storage_shown} has the study",
        "--mend writes it from what the storage knows",
        partial(_write_study_yaml, patient.known),
    )


def _write_study_yaml(study: Study) -> None:
    """Writes study.yaml from the storage's record, whole or not at all. JSON is YAML too."""
    file = study.paths.study_yaml
    own = study.storage_url == str(study.paths.journal)
    content = {"name": study.name, "storage": None if own else study.storage_shown, **study.metadata}
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file, synced=True) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# Its trials ---------------------------------------------------------------------------------------------------------


def _zombies(patient: Patient) -> Iterator[Told]:
    """Trials that seem to run, and whose process is dead."""
    study = patient.known
    storage = storage_of(study.optuna)
    silent = stale_elsewhere(storage, id_of(study.optuna))
    for trial in patient.trials:
        if trial.state != TrialState.RUNNING:
            continue
        why, lease = "", trial.user_attrs.get(LEASE)
        if is_abandoned(trial):
            why = _how_it_died(trial)
        elif trial.number in silent:
            assert lease is not None
            why = f"its process on {lease['host']} has long shown no heartbeat"
        if why:
            yield Finding(
                f"trial {trial.number} (slot {trial_index_of(trial)}) is RUNNING, but {why}",
                f"--mend gives it back: the slot goes on from its checkpoint, or ends after {study.retries} retries",
                lambda: patient.alive().queue.reap(),
            )
        elif (held := held_elsewhere(trial)) is not None and not has_heartbeat(storage):
            yield Finding(
                f"trial {trial.number} (slot {trial_index_of(trial)}) is held by a process on {held.host} since "
                f"{held.since:%Y-%m-%d %H:%M}, and whether that lives cannot be seen from here",
                f"if it is dead: {study.command or 'hpo run'} --reclaim",
            )


def _how_it_died(trial: FrozenTrial) -> str:
    lease: Mapping[str, Any] | None = trial.user_attrs.get(LEASE)
    if lease is None:
        since = "" if trial.datetime_start is None else f" since {trial.datetime_start:%Y-%m-%d %H:%M}"
        return f"no process has held it{since}"
    restarted = lease["boot"] != own_lease()["boot"]
    return f"its process {lease['pid']} " + ("ended with a restart of the machine" if restarted else "is dead")


def _trial_indices(patient: Patient) -> Iterator[Told]:
    """Slots of the total that nobody would train, or that are queued twice."""
    total, taken = patient.known.total, effective_trials(patient.trials)
    missing = [trial_index for trial_index in range(total or 0) if trial_index not in taken]
    if missing:
        yield Finding(
            f"{some('slot', missing)} of the total of {total} {'has' if len(missing) == 1 else 'have'} no trial",
            f"--mend queues {'it' if len(missing) == 1 else 'them'}",
            partial(_queue_missing, patient),
        )
    for trial in patient.trials:
        counted = taken.get(trial_index_of(trial))
        if trial.state == TrialState.WAITING and counted is not None and counted is not trial:
            yield Finding(
                f"slot {trial_index_of(trial)} is queued though trial {counted.number} has it: as trial {trial.number}",
                "--mend takes the second from the queue",
                partial(_queue_missing, patient),
            )


def _queue_missing(patient: Patient) -> None:
    """What `hpo run` does first."""
    study = patient.alive()
    assert study.total is not None
    space = join_study(study.name, storage_url=patient.url).space
    Study(study.optuna, study.paths, study.metadata, study.storage_url, space).queue.ensure_trials(study.total)


# Its files ----------------------------------------------------------------------------------------------------------


def _artifacts(patient: Patient) -> Iterator[Told]:
    """Files that the storage names for the dashboard, and that are gone."""
    study = patient.known
    study.use_depot(None)
    for trial in patient.trials:
        for key, value in trial.system_attrs.items():
            if not key.startswith(ARTIFACT):
                continue
            meta = json.loads(value)
            target = patient.paths.artifacts / Path(str(meta["artifact_id"])).name
            if _is_there(study, target):
                continue
            name = Path(str(meta["filename"])).name
            original = patient.paths.trial(trial.number) / name
            what = f"{target} is gone: {name} of trial {trial.number}, for the dashboard"
            if original.exists():
                yield Finding(what, f"--mend copies it from {original}", partial(_copy, study, original, target))
            else:
                yield Finding(what, "put it back from a backup, if you have one; the trial itself needs it not")


def _is_there(study: Study, file: Path) -> bool:
    """Whether a file is where the study keeps it: in its folder or, if it has one, in its depot."""
    if study.depot is None:
        return file.exists()
    return study.depot.exists(study.paths.inside(file))


def _copy(study: Study, original: Path, target: Path) -> None:
    if study.depot is not None:
        study.depot.put(original, study.paths.inside(target))
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        shutil.copyfile(original, temporary)


def _kept_weights(patient: Patient) -> Iterator[Told]:
    """Whether the best trial's weights are there. A refit does without: it trains them again."""
    study = patient.known
    study.use_depot(None)
    best = study.best_trial()
    if best is None or TAKEN_FROM in best.user_attrs or study.confirms is not None:  # which keeps none
        return
    folds = study.metadata["base"]["data"].get("folds") or 1
    files = [patient.paths.trial_model(best.number, fold) for fold in range(1, folds + 1)]
    if gone := [file for file in files if not _is_there(study, file)]:
        yield Note(f"{gone[0]} is not there, of the best trial; hpo refit best trains it again")


def _checkpoints(patient: Patient) -> Iterator[Told]:
    """Checkpoints that nobody will go on from."""
    taken = effective_trials(patient.trials)
    for file in sorted(patient.paths.checkpoint(0).parent.glob("*.pt")):
        trial_index = file.name.partition(".")[0]
        if trial_index.isdecimal() and int(trial_index) in taken and taken[int(trial_index)].state in _FINISHED:
            yield Finding(
                f"{file} ({_size_in_words(file)}) is the checkpoint of slot {int(trial_index)}, which is finished",
                "--mend removes it",
                partial(_drop, patient.known, file),
            )


def _drop(study: Study, checkpoint: Path) -> None:
    study.use_depot(None)
    study.drop_checkpoint(checkpoint)


def _folders(patient: Patient) -> Iterator[Told]:
    """Folders of trials that the storage does not know: it may be the storage that has lost something."""
    known = {patient.paths.trial(trial.number).name for trial in patient.trials}
    folders = sorted(patient.paths.trials.iterdir()) if patient.paths.trials.is_dir() else []
    for folder in folders:
        if folder.name not in known:
            yield Finding(
                f"{folder} ({_size_in_words(folder)}) belongs to no trial of the storage",
                "if the storage is an old copy, put the newer one back; else delete the folder yourself",
            )


def _leftovers(patient: Patient) -> Iterator[Told]:
    """What a process that died was writing."""
    refits = patient.paths.test_openings.parent
    bundles = {aside: _home_of(aside) for aside in refits.glob(".*.old")}
    for aside, home in sorted(bundles.items()):
        if not home.exists():
            yield Finding(
                f"{home} is missing: a crash left it as {aside.name}",
                "--mend puts it back",
                partial(aside.rename, home),
            )
    found = [
        *(file for file in _files_in(patient.paths.dir) if file.suffix in _UNFINISHED),
        *patient.paths.dir.glob(f"{patient.paths.journal.name}.lock*.rename"),
        *refits.glob(".*.new-*"),
        *(aside for aside, home in bundles.items() if home.exists()),
    ]
    for path in sorted(set(found)):
        if _is_still(path):
            yield Finding(
                f"{path} ({_size_in_words(path)}) was left by a process that died",
                "--mend removes it",
                partial(_remove, path),
            )


def _home_of(aside: Path) -> Path:
    """The bundle's own place."""
    return aside.with_name(aside.name.removeprefix(".").removesuffix(".old"))


def _is_still(path: Path) -> bool:
    """Whether nobody writes it any more."""
    try:
        last = max(file.lstat().st_mtime for file in (path, *_files_in(path)))
    except FileNotFoundError:  # its writer lives: it has just put it in place
        return False
    return time.time() - last > _STILL_S


def _files_in(folder: Path) -> Iterator[Path]:
    """All files below it, as far as they are there: others may come and go."""
    for root, _, names in os.walk(folder):
        yield from (Path(root) / name for name in names)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _bundles(patient: Patient) -> Iterator[Told]:
    """Submission models that cannot be used."""
    for folder in sorted(patient.paths.test_openings.parent.glob("[!.]*/")):
        yield from _made(patient, str(folder), partial(_bundle, folder))


def _bundle(folder: Path, _: Patient) -> Iterator[Told]:
    import torch  # the only way to know whether the weights are a network's

    from hpo.submission.bundle import load_bundle

    load_bundle(folder, torch.device("cpu"))
    yield from ()


# What it was begun with ---------------------------------------------------------------------------------------------


def _data(patient: Patient) -> Iterator[Told]:
    """Whether the images are where they were, and what they were."""
    from core.data import load_dataset  # with torch, which the other checks do without

    study = patient.known
    where = study.data_name if study.data_path is None else str(study.data_path)
    try:
        dataset = load_dataset(
            TrainConfig.model_validate_json(json.dumps(study.metadata["base"])).data,
            data_path=study.data_path,
            data_root=data_root(),
            cache_dir=cache_root(),
            skip_broken=study.skip_broken,
            download=False,
        )
    except CoreError as error:
        yield Finding(f"the study's images ({where}) cannot be read: {error}", "put them back, or give them by --data")
        return
    known = study.metadata["data"]["fingerprint"]
    if dataset.fingerprint != known:
        yield Finding(
            f"the images in {where} are not those that the study was begun with "
            f"(fingerprint {dataset.fingerprint[:12]}, not {known[:12]})",
            "put the old ones back, or begin another study",
        )


def _weights(patient: Patient) -> Iterator[Told]:
    """Whether the files of weights that trials begin from are what they were."""
    for file in patient.known.metadata.get("weights") or {}:
        yield from _made(patient, file, partial(_weights_file, file))


def _weights_file(file: str, patient: Patient) -> Iterator[Told]:
    check_weights(patient.name, patient.known.metadata, [file])
    yield from ()


def _versions(patient: Patient) -> Iterator[Told]:
    """What trains here, where it is not what the study was begun with."""
    began, here = patient.known.metadata.get("versions", {}), versions()
    apart = [f"{p} {here.get(p, 'none')}, not {began[p]}" for p in began if here.get(p) != began[p]]
    if apart:
        yield Note(f"versions are not those that the study was begun with: {'; '.join(apart)}")


# The disk -----------------------------------------------------------------------------------------------------------


def _disk(patient: Patient) -> Iterator[Told]:
    """Whether there is room for what is still to be trained."""
    if not patient.unfinished or not patient.paths.dir.is_dir():
        return
    used = disk_use(patient.paths)
    weights = max(map(_size, patient.paths.trials.glob("*/model*.safetensors")), default=0)
    checkpoint = max(map(_size, patient.paths.checkpoint(0).parent.glob("*.pt")), default=_CHECKPOINT_WEIGHTS * weights)
    a_trial = sum(used.get(kind, 0) for kind in _GROWS) / max(len(patient.trials), 1)
    need = checkpoint + math.ceil(a_trial * patient.unfinished)
    free = shutil.disk_usage(patient.paths.dir).free
    if free < need:
        yield Finding(
            f"{patient.paths.dir}: {in_words(free)} are free on the disk, and {in_words(need)} are needed for "
            f"a checkpoint and the {patient.unfinished} trials that are left",
            "free some space",
        )


_GROWS = ("journal", "trials' pictures and rows", "artifacts")
"""The kinds of files that every trial adds to."""


def disk_use(paths: StudyPaths) -> dict[str, int]:
    """Bytes by kind of file, without kinds that there are none of."""
    use: dict[str, int] = {}
    for file in _files_in(paths.dir):
        kind = _kind(paths, file)
        use[kind] = use.get(kind, 0) + _size(file)
    return use


def _kind(paths: StudyPaths, file: Path) -> str:
    top = file.relative_to(paths.dir).parts[0]
    if top.startswith(paths.journal.name):
        return "journal"
    if top == paths.trials.name:
        return "trials' weights" if file.suffix == ".safetensors" else "trials' pictures and rows"
    folders = (paths.checkpoint(0).parent, paths.artifacts, paths.reference("").dir, paths.test_openings.parent)
    return top if top in {folder.name for folder in folders} else "other files"


def _size(path: Path) -> int:
    """In bytes; of a folder, of all that is in it; 0 of what has just gone."""
    try:
        if path.is_dir():
            return sum(map(_size, _files_in(path)))
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _size_in_words(path: Path) -> str:
    return in_words(_size(path))


_OF_FILES: dict[str, Callable[[Patient], Iterable[Told]]] = {
    "the journal's lock": _lock,
    "the storage": _storage,
    "study.yaml": _study_yaml,
    "leftovers": _leftovers,
    "submission models": _bundles,
}
_OF_TRIALS: dict[str, Callable[[Patient], Iterable[Told]]] = {
    "running trials": _zombies,
    "slots": _trial_indices,
    "artifacts": _artifacts,
    "kept weights": _kept_weights,
    "checkpoints": _checkpoints,
    "trial folders": _folders,
    "the disk": _disk,
    "the images": _data,
    "weights": _weights,
    "versions": _versions,
}
