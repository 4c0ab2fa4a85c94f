"""`hpo run`: search."""

from __future__ import annotations

import gc
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from core.data import Splits, folds, on_device
from core.errors import UserError
from core.models import build_model, check_model_name
from core.runtime import describe_device, isolated_rng, select_device
from hpo.commands.common import open_dataset, say_data
from hpo.commands.scores import say_folds
from hpo.console import StudyProgress, duration, say
from hpo.driver import estimate_s, pending_references, run_references, run_study
from hpo.interrupts import Interrupts
from hpo.packing import at_once
from hpo.pruner import rung_epochs
from hpo.search_space import RungsPruner, SearchSpace, load_space
from hpo.storage import mask
from hpo.study import Study, open_study
from hpo.summary import draw_overview, say_standing, standing
from hpo.workers import Job, free_capacity, not_found_out, run_workers

logger = logging.getLogger(__name__)


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
    per_device: str | None,
    take_over: str | None,
    skip_broken: bool,
    reclaim: bool,
) -> None:
    """Runs a study up to its total, or goes on to it."""
    trials_at_once = _trials_at_once(per_device)
    space = load_space(space_name, assignments)
    device = select_device(device_name)
    for model in model_names(space):
        check_model_name(model)
    dataset = open_dataset(space.base.data, data, skip_broken=skip_broken)
    splits = folds(dataset, space.base.data)
    say_data(dataset, splits[0])
    say_folds(splits)
    _check_network(space, splits[0])
    command = _command(
        space_name, trials, study_name, data, storage, assignments, seed, device_name, per_device, skip_broken
    )

    with Interrupts() as interrupts:
        study = open_study(
            space,
            name=study_name or space.name,
            storage_url=storage,
            seed=seed,
            dataset=dataset,
            data_path=data,
            take_over=take_over,
        )
        study.remember_command(command)
        before = standing(study)
        done = before.counts.finished
        total = max(trials or space.trials, done)
        study.reap(force=reclaim)
        study.ensure_slots(total)
        say(
            f"study {study.name}: {total} trials of {space.base.epochs} epochs, {done} done; sampler "
            f"{space.sampler.name}, pruner {_pruner(space)}; {describe_device(device)}"
        )
        if trials_at_once is None:
            trials_at_once = _known_best(study, space, device)
        bars = StudyProgress(
            metric=space.metric, direction=space.direction, done=done, total=total, best=before.best_value
        )
        try:
            with interrupts.let_through():
                there = on_device(splits, device)
                _say_estimate(study, space, there, trials=total - done, device=device, trials_at_once=trials_at_once)
            with bars as progress:
                if trials_at_once != 1 and study.waiting():
                    there = ()  # their room on the device is the workers'
                    job = Job(
                        space, study.name, study.storage_url, data, skip_broken, device=str(device), folder=Path.cwd()
                    )
                    _run_several(study, job, trials_at_once, progress, interrupts, asked=str(per_device))
                if trials_at_once == 1 or pending_references(study, space):
                    there, lane = there or on_device(splits, device), progress.lane()
                    if trials_at_once == 1:
                        run_study(study, space, there, device=device, listener=lane, interrupts=interrupts)
                    run_references(study, space, there, device=device, listener=lane, interrupts=interrupts)
        except KeyboardInterrupt:
            say(f"stopped: {study.counts().finished} of {total} trials are done and safe; go on with")
            say(f"  {command}")
            raise
    draw_overview(study)
    say()
    say_standing(study)
    for number, host, since in study.held_elsewhere():
        say(f"trial {number} is held by a process on {host} since {since:%Y-%m-%d %H:%M}; if that is dead:")
        say(f"  {command} --reclaim")


def _trials_at_once(per_device: str | None) -> int | None:
    """What `--per-device` says; None for `auto`.

    Raises:
        UserError: it says neither a number nor `auto`.
    """
    if per_device == "auto":
        return None
    if per_device is None:
        return 1
    if not per_device.isdecimal() or not int(per_device):
        raise UserError(f"--per-device {per_device}: give a whole number from 1 on, or auto")
    return int(per_device)


def _known_best(study: Study, space: SearchSpace, device: torch.device) -> int | None:
    """How many trials at once `auto` means before anything is measured, said; None where it is to be measured.

    What an earlier run of the study found best on this device counts as far as the device still has room for it.
    """
    if space.base.epochs == 1:  # a training's first epoch pays for start-up, so that none of these could be timed
        say(not_found_out("an epoch can only be timed after another one, and the trials have one", 1))
        return 1
    known = study.packing(describe_device(device))
    if known is None:
        return None
    number, why = known
    say(f"as measured on this device before: {why}")
    capacity = free_capacity(device)
    most = min(number, capacity.most, capacity.limit().trials or number)
    if most < number:
        say(f"--per-device auto: there is less room now; going on with {most}")
    return most


def _run_several(
    study: Study,
    job: Job,
    trials_at_once: int | None,
    progress: StudyProgress,
    interrupts: Interrupts,
    *,
    asked: str,
) -> None:
    """Runs the trials that wait, several at once, each in a process of its own; `asked` is what `--per-device` was."""
    device = torch.device(job.device)
    name = describe_device(device)  # before the workers: who divides the CPU's threads does not rename it
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the estimate needed is the workers' now
    capacity = free_capacity(device)
    capacity.check(trials_at_once or 1, asked=asked)
    limit = capacity.limit()
    if trials_at_once and limit.trials and trials_at_once > limit.trials:
        logger.warning("--per-device %s: %s, and more trials at once only wait for each other", asked, limit.why)
    if trials_at_once is None:
        sharing = "" if device.type == "cuda" else f", sharing the CPU's {_threads(capacity.threads)}"
        say(f"the first trials find out how many at once train the most images a second{sharing}")
    else:
        threads = _threads(capacity.share(trials_at_once).threads)
        say(f"{at_once(trials_at_once)}, each in a process with {threads}")
    run_workers(
        study,
        job,
        trials_at_once=trials_at_once,
        capacity=capacity,
        device_name=name,
        lane=progress.lane,
        interrupts=interrupts,
    )


def _threads(number: int) -> str:
    return f"{number} thread{'' if number == 1 else 's'}"


def _check_network(space: SearchSpace, splits: Splits) -> None:
    """Builds the base's network and forgets it.

    What it lacks, weights or larger images, is said before a study exists, which would then have been begun with it.
    """
    _, channels, height, width = splits.images.shape
    with isolated_rng(torch.device("cpu")):
        build_model(space.base.model, num_classes=len(splits.classes), in_channels=channels, image_size=(height, width))


def _say_estimate(
    study: Study,
    space: SearchSpace,
    splits: Sequence[Splits],
    *,
    trials: int,
    device: torch.device,
    trials_at_once: int | None,
) -> None:
    """How long what is left will take on this device, from a few timed steps of one trial alone."""
    references = len(pending_references(study, space))
    if not trials and not references:
        return
    in_full, pruned = estimate_s(space, splits, trials=trials, references=references, device=device)
    about = f"about {duration(pruned)}, {duration(in_full)} if nothing were pruned"
    beside = f", {references} recipe(s) beside the study included" if references else ""
    alone = "" if trials_at_once == 1 else ", were it one trial at a time"
    say(f"this will take {about if pruned < in_full else f'up to {duration(in_full)}'}{beside}{alone}")
    say("Ctrl-C stops it, and the same command goes on")


def _pruner(space: SearchSpace) -> str:
    """The pruner in words; the rung pruner with the epochs that its fractions come to."""
    if not isinstance(space.pruner, RungsPruner):
        return space.pruner.name
    rungs = rung_epochs(space.pruner.rungs, space.base.epochs)
    places = [f"at epoch {', '.join(map(str, rungs))}"] if rungs else []
    if space.base.data.folds is not None:
        places.append(f"after each of the first {space.base.data.folds - 1} folds")
    return f"rungs {' and '.join(places)}" if places else "none (the run is too short for its rungs)"


def model_names(space: SearchSpace) -> set[str]:
    """Every network that a trial or recipe may ask for."""
    names = {space.base.model.name, *(recipe.config.model.name for recipe in space.recipes)}
    searched = space.search.get("model.name")
    return names | {str(name) for name in (searched.describe().get("choices", []) if searched else [])}


def _command(
    space: str,
    trials: int | None,
    study: str | None,
    data: Path | None,
    storage: str | None,
    assignments: list[str],
    seed: int | None,
    device: str | None,
    per_device: str | None,
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
        "--per-device": per_device,
    }
    for option, value in options.items():
        words += [] if value is None else [option, str(value)]
    for assignment in assignments:
        words += ["--set", assignment]
    return shlex.join([*words, *(["--skip-broken"] if skip_broken else [])])
