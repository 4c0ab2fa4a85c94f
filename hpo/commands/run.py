"""`hpo run`: search."""

from __future__ import annotations

import shlex
from pathlib import Path

from core.data import split
from core.runtime import describe_device, select_device
from hpo.commands.common import open_dataset, say_data
from hpo.console import StudyProgress, duration, say
from hpo.driver import estimate_s, run_references, run_study
from hpo.search_space import load_space
from hpo.storage import mask
from hpo.study import open_study
from hpo.summary import draw_overview, say_standing, standing


def run_command(
    space_name: str,
    *,
    trials: int | None,
    study_name: str | None,
    data: Path | None,
    storage: str | None,
    assignments: list[str],
    seed: int | None,
    device_name: str | None,
    take_over: str | None,
    skip_broken: bool,
) -> None:
    """Runs a study up to its total, or goes on to it."""
    space = load_space(space_name, assignments)
    device = select_device(device_name)
    dataset = open_dataset(space.base.data, data, skip_broken=skip_broken)
    splits = split(dataset, space.base.data).to(device)
    total = trials or space.trials
    say_data(dataset, splits)

    study = open_study(
        space,
        name=study_name or space.name,
        storage_url=storage,
        seed=seed,
        dataset=dataset,
        data_path=data,
        take_over=take_over,
    )
    command = _command(space_name, trials, study_name, data, storage, assignments, seed, device_name, skip_broken)
    study.remember_command(command)
    before = standing(study)
    say(
        f"study {study.name}: {total} trials of {space.base.epochs} epochs, {before.counts.finished} done; "
        f"sampler {space.sampler.name}, pruner {space.pruner.name}; {describe_device(device)}"
    )
    if before.counts.finished < total:
        in_full, pruned = estimate_s(space, splits, trials=total - before.counts.finished, device=device)
        about = f"about {duration(pruned)}" if pruned < in_full else f"up to {duration(in_full)}"
        at_most = f", {duration(in_full)} if nothing were pruned" if pruned < in_full else ""
        say(f"this will take {about}{at_most}; Ctrl-C stops it, and the same command goes on")
    with StudyProgress(
        metric=space.metric,
        direction=space.direction,
        done=before.counts.finished,
        total=total,
        best=before.best_value,
    ) as progress:
        try:
            run_study(study, space, splits, total=total, device=device, listener=progress)
            run_references(study, space, splits, device=device, listener=progress)
        except KeyboardInterrupt:
            say(f"stopped: {study.counts().finished} of {total} trials are done and safe; go on with")
            say(f"  {command}")
            raise
    draw_overview(study)
    say()
    say_standing(study)


def _command(
    space: str,
    trials: int | None,
    study: str | None,
    data: Path | None,
    storage: str | None,
    assignments: list[str],
    seed: int | None,
    device: str | None,
    skip_broken: bool,
) -> str:
    """The command line that goes on with the study, ready to copy; a password in it is masked."""
    words = ["hpo", "run", space]
    options = {
        "--trials": trials,
        "--study": study,
        "--data": data,
        "--storage": storage and mask(storage),
        "--seed": seed,
        "--device": device,
    }
    for option, value in options.items():
        words += [] if value is None else [option, str(value)]
    for assignment in assignments:
        words += ["--set", assignment]
    return shlex.join([*words, *(["--skip-broken"] if skip_broken else [])])
