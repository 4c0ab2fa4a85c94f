"""A command whose n-th write, sync, rename, creation, claim or deletion below its studies fails, and its checks.

The failure is real: a preloaded library (shim.c) returns ENOSPC or kills all processes of the command, in the middle of
a write. Then the same command runs again, undisturbed.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from safetensors import safe_open

from hpo.paths import StudyPaths, confirmation_of
from tests.hpo.workers.processes import PATIENCE_S
from tests.hpo.zygote import IMPORTED, Hpo

NAME = "own"
MODES = ("count", "full", "kill")
Mode = Literal["count", "full", "kill"]
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_TIMED = {"elapsed_s", "images_per_s"}


@cache
def shim() -> Path:
    """Compile the library; FileNotFoundError without a C compiler."""
    library = Path(tempfile.mkdtemp(prefix="hpo-siege-")) / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


@dataclass(frozen=True)
class Ended:
    """The end of a command."""

    code: int
    said: str
    operations: int
    """Counted ones, up to its end."""
    failed: str
    """The failed operation, with the name of its file; empty if there was none."""


def run(arguments: Sequence[str], folder: Path, n: int = 0, mode: Mode = "count") -> Ended:
    """Run a command with the studies in `folder/studies`, and fail its n-th operation."""
    state = folder / "siege"
    state.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "HPO_STUDIES": str(folder / "studies"),
        "OMP_NUM_THREADS": "1",
        IMPORTED: "tests.hpo.siege.armed",
        "SIEGE": f"{folder / 'studies'}:{state}:{n}:{MODES.index(mode)}",
    }
    process = Hpo(
        arguments,
        preload=shim(),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    said, _ = process.communicate(timeout=PATIENCE_S)
    operations, _, what = struct.unpack("li2048s", state.read_bytes()[: 8 + 4 + 2048])
    return Ended(process.returncode, said, operations, what.split(b"\0")[0].decode())


def trials_of(studies: Path, name: str) -> list[FrozenTrial]:
    """The trials of a study, read by Optuna alone; none if there is no such study."""
    journal = StudyPaths(studies / name).journal
    if not journal.exists():
        return []
    storage = JournalStorage(JournalFileBackend(str(journal)))
    if name not in {study.study_name for study in storage.get_all_studies()}:
        return []
    return optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)


def results(studies: Path, name: str) -> dict[int, Any]:
    """Trial index -> the result of its finished trial, and the rows of its metrics without times."""
    paths = StudyPaths(studies / name)
    return {
        trial.user_attrs["trial_index"]: (
            trial.state.name,
            trial.values,
            trial.params,
            trial.intermediate_values,
            _rows(paths.trial_metrics(trial.number)),
        )
        for trial in trials_of(studies, name)
        if trial.state in _FINISHED
    }


def _rows(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text().splitlines() if file.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key not in _TIMED} for line in lines]


def finished(studies: Path) -> dict[tuple[str, int], FrozenTrial]:
    """(study, number) -> the finished trials of the search and of its confirmation."""
    return {
        (name, trial.number): trial
        for name in (NAME, confirmation_of(NAME))
        for trial in trials_of(studies, name)
        if trial.state in _FINISHED
    }


def outcome(studies: Path) -> dict[str, Any]:
    """All that must be equal to the undisturbed twin's: results, kept weights, verdict, and the submission models."""
    paths = StudyPaths(studies / NAME)
    found: dict[str, Any] = {name: results(studies, name) for name in (NAME, confirmation_of(NAME))}
    confirming = StudyPaths(studies / confirmation_of(NAME))
    found["confirmed outputs"] = len(confirming.validation_outputs())
    indices = {trial.number: trial.user_attrs["trial_index"] for trial in trials_of(studies, NAME)}
    kept = sorted(paths.numbers_with_weights(), key=indices.__getitem__)
    found["weights"] = [(indices[number], _tensors(paths.trial_model(number))) for number in kept]
    found["outputs"] = sorted(indices[int(file.parent.name)] for file in paths.validation_outputs())
    if paths.confirmation.exists():
        confirmation = json.loads(paths.confirmation.read_text())
        found["confirmation"] = {key: confirmation[key] for key in ("verdict", "winner") if key in confirmation}
    for folder in paths.refits():
        metrics = json.loads((folder / "metrics.json").read_text())
        files = sorted(file.name for file in folder.iterdir())
        weights = [_tensors(file) for file in sorted(folder.glob("*.safetensors"))]
        found[folder.name] = (metrics["test"]["with_tta"], metrics["decision"], files, weights)
    return found


def _tensors(file: Path) -> dict[str, Any]:
    """The tensors of a file of weights as lists; an error if it is not whole."""
    with safe_open(str(file), framework="np") as content:
        return {name: content.get_tensor(name).tolist() for name in content.keys()}  # noqa: SIM118


def copied(template: Path, folder: Path) -> Path:
    """Copy a folder with studies, with its modification times."""
    shutil.copytree(template, folder, symlinks=True)
    return folder
