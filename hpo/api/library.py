"""`hpo` in Python: what the commands do, by functions that give back what they made.

The key choice is that there is one way to do each thing: these call the commands' own functions, say what those say
unless told to be `quiet`, and leave the same studies and folders behind, which the command line goes on with and the
other way round. A person's mistake is an exception, `hpo.errors.HpoError` or `core.errors.CoreError`; nothing here ends
the process. Log records go where the program's logging sends them.

In a script, stand below `if __name__ == "__main__":` where there are several workers: each is a process that imports
the script anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from core.loop import EVALUATION_BATCH
from hpo.api.refit import refit_command
from hpo.api.search import RunOptions, run_command
from hpo.cli.console import console
from hpo.errors import StudyError
from hpo.space import load_space
from hpo.space.document import flow
from hpo.study import Study, find_study
from hpo.submission.bundle import LoadedBundle, load_bundle
from hpo.submission.predictions import Images, Predictions


def run(
    space: str | Path,
    *,
    trials: int | None = None,
    study: str | None = None,
    data: str | Path | None = None,
    storage: str | None = None,
    set: Mapping[str, Any] | None = None,
    seed: int | None = None,
    device: str | None = None,
    devices: str | None = None,
    workers: int | None = None,
    per_device: int | str | None = None,
    retries: int | None = None,
    keep_gb: float | None = None,
    artifacts: str | None = None,
    take_over: str | None = None,
    skip_broken: bool = False,
    reclaim: bool = False,
    quiet: bool = False,
) -> Study:
    """Searches: runs a study's trials up to its total. The same call again goes on to it. `hpo run`.

    Args:
        space: a search space: a name from `hpo space list`, or a YAML file.
        trials: the study's total; the space's own where none is given.
        study: the study's name; the space's.
        data: images in place of the space's: a folder, archive, .npz or .csv; or where a built-in data set lies.
        storage: any Optuna URL; a journal file in the study's folder.
        set: fields by their dotted path, as in `{"epochs": 3, "model.widths": [16, 32]}`; on a searched field, pins it.
        seed: the study's; 0.
        device: `cpu`, `cuda` or `cuda:N`; the first GPU where there is one.
        devices: several, as in `cuda:0,cuda:1`; `all` is every GPU.
        workers: how many trials run at once in all, each in a process; 0 only queues them, for `hpo worker`.
        per_device: how many run on a device at once; `auto` measures it.
        retries: how often a trial is begun again after its process died; 3.
        keep_gb: what kept weights and checkpoints may take on the disk.
        artifacts: where machines without a shared folder keep them: a folder, or a URL that fsspec reaches.
        take_over: a study whose trials that fit the space begin this one.
        skip_broken: leaves broken image files out.
        reclaim: takes back trials that a dead process on another host still holds.
        quiet: says nothing.

    Returns:
        The study: its best trial is `best_trial()`, Optuna's own study `optuna`, and `hpo.trials_frame(study)` has all
        trials as a pandas frame.

    Raises:
        HpoError: the space has faults, or the study cannot go on as asked.
        CoreError: the data, the network or the device cannot be used.
        KeyboardInterrupt: it was stopped; what was trained is kept.
    """
    assignments = _assignments(set or {})
    options = RunOptions(
        str(space),
        trials=_at_least(1, trials, "trials"),
        study=study,
        data=_path(data),
        storage=storage,
        assignments=assignments,
        seed=_at_least(0, seed, "seed"),
        device=device,
        devices=devices,
        workers=_at_least(0, workers, "workers"),
        per_device=None if per_device is None else str(per_device),
        retries=_at_least(0, retries, "retries"),
        keep_gb=keep_gb,
        artifacts=artifacts,
        take_over=take_over,
        skip_broken=skip_broken,
        reclaim=reclaim,
    )
    with _said(quiet):
        run_command(options)
    return find_study(study or load_space(options.space, assignments).name, storage_url=storage)


def refit(
    study: Study | str | None = None,
    trial: int | str = "best",
    *,
    data: str | Path | None = None,
    storage: str | None = None,
    folds: int | None = None,
    members: int | None = None,
    onnx: bool = False,
    confirm: bool = True,
    device: str | None = None,
    quiet: bool = False,
) -> LoadedBundle:
    """Retrains a trial on training and validation images into a submission model, and opens the test set. `hpo refit`.

    Args:
        study: what `run` gave, or a name; the one run last where none is given.
        trial: `best`, or a trial's number.
        data: where the images lie now, if not where the study found them.
        storage: the study's storage's URL, where that holds a password.
        folds: trains so many networks, each without another part of the images, as an ensemble.
        members: trains so many on all images, each from another seed, as an ensemble or one network of their averaged
            weights.
        onnx: writes the model as ONNX too, checked against torch's outputs.
        confirm: before `best` is refitted, confirms it on other seeds and splits, unless that was done.
        device: `cpu`, `cuda` or `cuda:N`; the first GPU where there is one.
        quiet: says nothing.

    Returns:
        The model, loaded from the folder that was written, which is its `folder`.

    Raises:
        HpoError: there is no such study or trial, or it cannot be refitted.
        CoreError: the data, the network or the device cannot be used.
        KeyboardInterrupt: it was stopped; the same call goes on from the last checkpoint.
    """
    with _said(quiet):
        done = refit_command(
            str(trial),
            study_name=study.name if isinstance(study, Study) else study,
            storage=_url_of(study) if isinstance(study, Study) and storage is None else storage,
            data=_path(data),
            folds=folds,
            members=members,
            onnx=onnx,
            confirm=confirm,
            device_name=device,
        )
    return load_bundle(done.dir, device)


def predict(
    bundle: LoadedBundle | str | Path,
    images: Images,
    *,
    device: torch.device | str | None = None,
    batch_size: int = EVALUATION_BATCH,
    skip_broken: bool = False,
) -> Predictions:
    """Labels images. `hpo predict`, without its file: `Predictions.write` makes that.

    Args:
        bundle: a folder that a refit wrote, or what `load_bundle` made of one.
        images: paths, Pillow images, arrays or tensors, as `LoadedBundle.predict` takes them.
        device: of a folder: `cpu`, `cuda` or `cuda:N`; the first GPU where there is one. A loaded model has its own.
        batch_size: images at once on the device.
        skip_broken: leaves unreadable images out, where they would otherwise be an error.

    Raises:
        HpoError: the bundle cannot be loaded, or the images are nothing that can be labelled.
        CoreError: there is no image at a path, one is broken, or there is no such device.
    """
    if isinstance(bundle, LoadedBundle):
        if device is not None:
            raise ValueError("a loaded model lies on its device; give its folder to have it on another")
        model = bundle
    else:
        model = load_bundle(bundle, device)
    return model.predict(images, batch_size=batch_size, skip_broken=skip_broken)


@contextmanager
def _said(quiet: bool) -> Iterator[None]:
    """What is said in the block is said, or not, and then all is as before."""
    before = console.quiet
    console.quiet = before or quiet
    try:
        yield
    finally:
        console.quiet = before


def _assignments(values: Mapping[str, Any]) -> tuple[str, ...]:
    """As `--set` has them, which is how a study remembers the command that goes on with it."""
    return tuple(f"{path}={flow(value)}" for path, value in values.items())


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _at_least(least: int, value: int | None, name: str) -> int | None:
    """The value; the command line has its bounds from the options' own."""
    if value is not None and value < least:
        raise StudyError(f"{name}={value}: give {least} or more")
    return value


def _url_of(study: Study) -> str | None:
    """Where it lies, with its password; None of a journal in its own folder, which is found there."""
    return None if study.storage_url == str(study.paths.journal) else study.storage_url
