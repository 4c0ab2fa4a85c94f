"""Checks of a study's files and of free disk space."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hpo.analysis.doctor.check import FINISHED, Finding, Note, Result, StudyCheck, guarded
from hpo.analysis.study_data import fold_steps
from hpo.confirmation.result import read_confirmation
from hpo.paths import StudyPaths, TrainingPaths
from hpo.storage.atomic import UNFINISHED, replacing
from hpo.study import Study
from hpo.study.results import read_result
from hpo.text import in_words
from hpo.trials import ARTIFACT, TAKEN_FROM, effective_trials

_IDLE_S = 600  # without a write, a file counts as left behind, even if its writer's last step is a slow sync
_CHECKPOINT_WEIGHTS = 4  # files of weights in a checkpoint: the network, its average, two of an optimizer's state
_UNFINISHED = (UNFINISHED, ".unfinished")  # suffixes of checkpoints, weights and downloads until they are complete
_GROWING = ("journal", "trials' pictures and rows", "artifacts")  # kinds of files that every trial adds to


def artifacts(check: StudyCheck) -> Iterator[Result]:
    """Check that the files that the storage lists for the dashboard exist."""
    study = check.readable
    study.files.use_store(None)
    for trial in check.trials:
        for key, value in trial.system_attrs.items():
            if not key.startswith(ARTIFACT):
                continue
            meta = json.loads(value)
            target = check.paths.artifacts / Path(str(meta["artifact_id"])).name
            if study.files.exists(target):
                continue
            name = Path(str(meta["filename"])).name
            original = check.paths.trial(trial.number) / name
            problem = f"{target} is missing: {name} of trial {trial.number}, for the dashboard"
            if original.exists():
                yield Finding(problem, f"--mend copies it from {original}", partial(_copy, study, original, target))
            else:
                yield Finding(problem, "restore it from a backup, if you have one; the trial itself does not need it")


def _copy(study: Study, original: Path, target: Path) -> None:
    if study.files.store is not None:
        study.files.store.put(original, study.paths.inside(target))
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        shutil.copyfile(original, temporary)


def kept_weights(check: StudyCheck) -> Iterator[Result]:
    """Check that the best trial's weights exist. A refit does not need them: it trains the trial again."""
    study = check.readable
    study.files.use_store(None)
    best = study.best_trial()
    if best is None or TAKEN_FROM in best.user_attrs or study.confirms is not None:  # these keep no weights
        return
    _, folds = fold_steps(study)
    files = [check.paths.trial_model(best.number, fold) for fold in range(1, folds + 1)]
    if missing := [file for file in files if not study.files.exists(file)]:
        yield Note(f"{missing[0]}, of the best trial, is missing; hpo refit best trains it again")


def whole_weights(check: StudyCheck) -> Iterator[Result]:
    """Check that kept weights and validation outputs are whole. Only their sizes are read."""
    for trial in check.trials:
        for file in check.paths.kept_of(trial.number):
            try:
                with safe_open(str(file), framework="np"):
                    pass
            except SafetensorError as error:
                yield Finding(
                    f"{file} is damaged ({error})", "--mend removes it; hpo refit trains the trial again", file.unlink
                )


def confirmation(check: StudyCheck) -> Iterator[Result]:
    """Check that the result of the confirmation can be read."""
    read_confirmation(check.paths.confirmation)
    return iter(())


def recipes(check: StudyCheck) -> Iterator[Result]:
    """Check that the results of recipes beside the study can be read."""
    for training in check.paths.references():
        yield from guarded(check, str(training.result), partial(_recipe, training))


def _recipe(training: TrainingPaths, _: StudyCheck) -> None:
    read_result(training)


def checkpoints(check: StudyCheck) -> Iterator[Result]:
    """Check that no finished trial has a checkpoint."""
    taken = effective_trials(check.trials)
    for file in sorted(check.paths.checkpoint(0).parent.glob("*.pt")):
        index = file.name.partition(".")[0]
        if index.isdecimal() and int(index) in taken and taken[int(index)].state in FINISHED:
            yield Finding(
                f"{file} ({_size_text(file)}) is the checkpoint of trial index {int(index)}, which is finished",
                "--mend removes it",
                partial(_drop, check.readable, file),
            )


def _drop(study: Study, checkpoint: Path) -> None:
    study.files.use_store(None)
    study.files.drop_checkpoint(checkpoint)


def folders(check: StudyCheck) -> Iterator[Result]:
    """Check that every trial folder has a trial: the storage may have lost some."""
    known = {check.paths.trial(trial.number).name for trial in check.trials}
    for folder in sorted(check.paths.trials.iterdir()) if check.paths.trials.is_dir() else []:
        if folder.name not in known:
            yield Finding(
                f"{folder} ({_size_text(folder)}) belongs to no trial of the storage",
                "if the storage is an old copy, restore the newer one; else delete the folder yourself",
            )


def leftovers(check: StudyCheck) -> Iterator[Result]:
    """Check for unfinished files of processes that died."""
    refits = check.paths.test_openings.parent
    aside = {old: old.with_name(old.name.removeprefix(".").removesuffix(".old")) for old in refits.glob(".*.old")}
    for old, home in sorted(aside.items()):
        if not home.exists():
            problem = f"{home} is missing: a crash left it as {old.name}"
            yield Finding(problem, "--mend restores it", partial(old.rename, home))
    found = [
        *(file for file in _files_in(check.paths.dir) if file.suffix in _UNFINISHED),
        *check.paths.dir.glob(f"{check.paths.journal.name}.lock*.rename"),
        *refits.glob(".*.new-*"),
        *(old for old, home in aside.items() if home.exists()),
    ]
    for path in sorted(set(found)):
        if _is_idle(path):
            problem = f"{path} ({_size_text(path)}) was left by a process that died"
            yield Finding(problem, "--mend removes it", partial(_remove, path))


def _is_idle(path: Path) -> bool:
    try:
        last = max(file.lstat().st_mtime for file in (path, *_files_in(path)))
    except FileNotFoundError:  # its writer has just completed it
        return False
    return time.time() - last > _IDLE_S


def _files_in(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root) / name for name in names)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def bundles(check: StudyCheck) -> Iterator[Result]:
    """Check that the submission models can be loaded."""
    for folder in sorted(check.paths.test_openings.parent.glob("[!.]*/")):
        yield from guarded(check, str(folder), partial(_bundle, folder))


def _bundle(folder: Path, _: StudyCheck) -> None:
    import torch  # only loading shows whether the weights fit the network

    from hpo.submission.bundle import load_bundle

    load_bundle(folder, torch.device("cpu"))


# Disk space ---------------------------------------------------------------------------------------------------------


def disk(check: StudyCheck) -> Iterator[Result]:
    """Check that there is space for the unfinished trials."""
    if not check.unfinished or not check.paths.dir.is_dir():
        return
    used = disk_use(check.paths)
    weights = max(map(_size, check.paths.trials.glob("*/model*.safetensors")), default=0)
    checkpoint = max(map(_size, check.paths.checkpoint(0).parent.glob("*.pt")), default=_CHECKPOINT_WEIGHTS * weights)
    per_trial = sum(used[kind] for kind in _GROWING) / max(len(check.trials), 1)
    needed = checkpoint + math.ceil(per_trial * check.unfinished)
    free = shutil.disk_usage(check.paths.dir).free
    if free < needed:
        yield Finding(
            f"{check.paths.dir}: {in_words(free)} are free on the disk, and {in_words(needed)} are needed for a "
            f"checkpoint and the {check.unfinished} unfinished trials",
            "free some space",
        )


def disk_use(paths: StudyPaths) -> Counter[str]:
    """Return the bytes of each kind of file that exists."""
    use = Counter[str]()
    for file in _files_in(paths.dir):
        use[_kind(paths, file)] += _size(file)
    return use


def _kind(paths: StudyPaths, file: Path) -> str:
    top = file.relative_to(paths.dir).parts[0]
    if top.startswith(paths.journal.name):
        return "journal"
    if top == paths.trials.name:
        return "trials' weights" if file.suffix == ".safetensors" else "trials' pictures and rows"
    known = (paths.checkpoint(0).parent, paths.artifacts, paths.reference("").dir, paths.test_openings.parent)
    return top if top in {folder.name for folder in known} else "other files"


def _size(path: Path) -> int:
    """Bytes of a file or folder; 0 if it was deleted meanwhile."""
    try:
        return sum(map(_size, _files_in(path))) if path.is_dir() else path.lstat().st_size
    except FileNotFoundError:
        return 0


def _size_text(path: Path) -> str:
    return in_words(_size(path))
