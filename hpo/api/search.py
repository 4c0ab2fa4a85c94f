"""`hpo run`: search."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from core.data import Dataset, Division, Splits
from core.errors import UserError
from core.models import build_model, check_model_name
from core.runtime import isolated_rng
from hpo.analysis.summary import summarize
from hpo.api.common import joining, open_dataset, say_data, say_patience
from hpo.cli.console import say
from hpo.cli.progress import StudyProgress
from hpo.cli.scores import say_folds
from hpo.cli.summary import draw_overview, print_summary
from hpo.dashboard.notes import note_study
from hpo.paths import StudyPaths
from hpo.search.interrupts import Interrupts
from hpo.search.loop import estimate_s, wait_for_others
from hpo.search.options import TrialOptions
from hpo.search.recipes import pending_recipes, run_recipes
from hpo.search.weights import keep_best_weights
from hpo.space import RungsPruner, SearchSpace, load_space
from hpo.space.pruner import rung_epochs
from hpo.storage import mask
from hpo.storage.artifacts import Depot
from hpo.study import check_search_name, open_study
from hpo.text import count, duration
from hpo.workers.cluster import check_options, engine_and_pool
from hpo.workers.engine import Engine, WorkerSpec
from hpo.workers.placement import Placement, place
from hpo.workers.pool import WorkerPool
from hpo.workers.ray import RayEngine
from hpo.workers.work import Work


@dataclass(frozen=True)
class RunOptions:
    """What was asked for; None is what was left out."""

    space: str
    trials: int | None = None
    study: str | None = None
    data: Path | None = None
    storage: str | None = None
    assignments: Sequence[str] = ()
    seed: int | None = None
    device: str | None = None
    devices: str | None = None
    workers: int | None = None
    per_device: str | None = None
    retries: int | None = None
    keep_gb: float | None = None
    take_over: str | None = None
    skip_broken: bool = False
    reclaim: bool = False
    artifacts: str | None = None
    engine: str = "local"
    address: str | None = None

    def command(self) -> str:
        """The command line that goes on with the study, ready to copy; a password in it is masked."""
        words = ["hpo", "run", self.space]
        options = {
            "--trials": self.trials,
            "--study": self.study,
            "--data": self.data,
            "--storage": self.storage and mask(self.storage),
            "--seed": self.seed,
            "--device": self.device,
            "--devices": self.devices,
            "--workers": self.workers,
            "--per-device": self.per_device,
            "--retries": self.retries,
            "--keep-gb": None if self.keep_gb is None else f"{self.keep_gb:g}",
            "--artifacts": self.artifacts and mask(self.artifacts),
            "--engine": None if self.engine == "local" else self.engine,
            "--address": self.address,
        }
        for option, value in options.items():
            words += [] if value is None else [option, str(value)]
        for assignment in self.assignments:
            words += ["--set", assignment]
        return shlex.join([*words, *(["--skip-broken"] if self.skip_broken else [])])


def run_command(options: RunOptions) -> None:
    """Runs a study up to its total, or goes on to it."""
    placement = _placement(options)
    space = load_space(options.space, list(options.assignments))
    check_search_name(options.study or space.name)
    for model in model_names(space):
        check_model_name(model)
    dataset = open_dataset(space.baseline.data, options.data, skip_broken=options.skip_broken)
    division = Division(dataset)
    splits = division.here(space.baseline.data)
    say_data(dataset, splits[0])
    say_folds(splits)
    _check_network(space, splits[0])
    _check_reach(options, space)
    with Interrupts(told=say_patience) as interrupts:
        _Run(options, placement, space, dataset, division, interrupts).go()


def _placement(options: RunOptions) -> Placement:
    """Where the trials run, of what this machine has; a cluster places them itself.

    Raises:
        UserError: the options contradict each other, or this machine lacks a device.
    """
    if options.engine == "ray":
        check_options(device=options.device, devices=options.devices, per_device=options.per_device)
        return place(None, None, 0 if options.workers == 0 else None, None)
    if options.engine != "local":
        raise UserError(f"--engine {options.engine}: give local or ray")
    if options.address is not None:
        raise UserError(f"--address {options.address} is a Ray cluster's; give --engine ray too")
    return place(options.device, options.devices, options.workers, options.per_device)


def _check_reach(options: RunOptions, space: SearchSpace) -> None:
    """Says what cannot be reached before a study exists, which would then have been begun without it."""
    if options.artifacts:
        Depot(options.artifacts, StudyPaths.of(options.study or space.name).dir)
    if options.engine == "ray" and options.workers != 0:
        RayEngine(options.address or "auto").close()


class _Run:
    """One `hpo run`, from the study's opening on."""

    def __init__(
        self,
        options: RunOptions,
        placement: Placement,
        space: SearchSpace,
        dataset: Dataset,
        division: Division,
        interrupts: Interrupts,
    ) -> None:
        self.options, self.placement, self.space, self.interrupts = options, placement, space, interrupts
        self.study = open_study(
            space,
            name=space.name if options.study is None else options.study,
            storage_url=options.storage,
            seed=options.seed,
            dataset=dataset,
            data_path=options.data,
            take_over=options.take_over,
        )
        self.study.remember_command(options.command())
        self.study.remember_retries(options.retries)
        self.study.remember_space(space)
        self.study.use_depot(options.artifacts)
        note_study(self.study, space)
        self.work = Work(
            self.study,
            space,
            division,
            placement,
            data=options.data,
            skip_broken=options.skip_broken,
            options=TrialOptions(keep_gb=options.keep_gb),
            interrupts=interrupts,
            say=say,
            cluster=self._cluster if options.engine == "ray" else None,
        )

    def _cluster(self, spec: WorkerSpec) -> tuple[Engine, WorkerPool]:
        options = self.options
        return engine_and_pool(
            spec,
            address=options.address or "auto",
            device=options.device,
            per_device=options.per_device,
            workers=options.workers,
            say=say,
        )

    def go(self) -> None:
        """Queues what is missing of the total, works it off, and says what came of it."""
        study, space = self.study, self.space
        before = summarize(study)
        done = before.counts.finished
        total = max(self.options.trials or max(space.trials, study.total or 0), done)
        self._say_reaped(study.queue.reap(force=self.options.reclaim))
        study.queue.ensure_trials(total)
        say(
            f"study {study.name}: {count(total, 'trial')} of {count(space.baseline.epochs, 'epoch')}, {done} done; "
            f"sampler {space.sampler.name}, pruner {_pruner(space)}; "
            + ("Ray" if self.options.engine == "ray" else self.placement.described())
        )
        if self.placement.none:
            say(f"{study.queue.waiting()} trials wait for workers; start them, here or elsewhere, with")
            say(f"  {joining(study)}")
            return
        if done == total:
            say(f"they are all done; --trials {2 * total} goes on")
        try:
            self._work_off(trials=total - done)
        except KeyboardInterrupt:
            if saved := study.paths.trial_indices_with_checkpoints():
                say(f"{len(saved)} trial(s) are saved in the middle, and go on from there")
            say(f"stopped: {study.counts().finished} of {total} trials are done and safe; go on with")
            say(f"  {self.options.command()}")
            raise
        draw_overview(study)
        say()
        print_summary(study)
        for number, host, since in study.queue.held_elsewhere():
            say(f"trial {number} is held by a process on {host} since {since:%Y-%m-%d %H:%M}; if that is dead:")
            say(f"  {self.options.command()} --reclaim")

    def _say_reaped(self, trial_indices: Sequence[int]) -> None:
        """What a dead process had left running, and how far it had come."""
        if not trial_indices:
            return
        which = ", ".join(map(str, trial_indices))
        saved = sum(self.study.paths.checkpoint(trial_index).exists() for trial_index in trial_indices)
        say(
            f"{len(trial_indices)} trial(s) were left running by a process that died (slot {which}): "
            f"{saved} go on from a checkpoint, {len(trial_indices) - saved} begin anew"
        )

    def _work_off(self, *, trials: int) -> None:
        study, space, interrupts, work = self.study, self.space, self.interrupts, self.work
        if self.options.engine == "local":  # what a cluster's devices are like shows when they train
            with interrupts.let_through():
                self._say_estimate(work.images(), trials=trials)
        with StudyProgress(study) as progress:
            while study.queue.waiting() or wait_for_others(study, interrupts) or study.queue.requeue_lost():
                work.run(progress)
            keep_best_weights(
                study, folds=space.baseline.data.folds or 1, options=TrialOptions(keep_gb=self.options.keep_gb)
            )
            if pending_recipes(study, space):
                run_recipes(
                    study,
                    space,
                    work.images(),
                    device=work.device,
                    interrupts=interrupts,
                    say=say,
                    progress=progress,
                )

    def _say_estimate(self, splits: Sequence[Splits], *, trials: int) -> None:
        """How long what is left will take on this device, from a few timed steps of one trial alone."""
        references = len(pending_recipes(self.study, self.space))
        if not trials and not references:
            return
        in_full, pruned = estimate_s(self.space, splits, trials=trials, recipes=references, device=self.work.device)
        about = f"about {duration(pruned)}, {duration(in_full)} if nothing were pruned"
        beside = f", {references} recipe(s) beside the study included" if references else ""
        otherwise = "" if self.work.inline else ", one trial at a time"
        say(f"this will take {about if pruned < in_full else f'up to {duration(in_full)}'}{beside}{otherwise}")
        say("Ctrl-C stops it, and the same command goes on")


def _check_network(space: SearchSpace, splits: Splits) -> None:
    """Builds the base's network and forgets it.

    What it lacks, weights or larger images, is said before a study exists, which would then have been begun with it.
    """
    _, channels, height, width = splits.images.shape
    with isolated_rng(torch.device("cpu")):
        build_model(
            space.baseline.model, num_classes=len(splits.classes), in_channels=channels, image_size=(height, width)
        )


def _pruner(space: SearchSpace) -> str:
    """The pruner in words; the rung pruner with the epochs that its fractions come to."""
    if not isinstance(space.pruner, RungsPruner):
        return space.pruner.name
    rungs = rung_epochs(space.pruner.rungs, space.baseline.epochs)
    places = [f"at epoch {', '.join(map(str, rungs))}"] if rungs else []
    if space.baseline.data.folds is not None:
        places.append(f"after each of the first {space.baseline.data.folds - 1} folds")
    return f"rungs {' and '.join(places)}" if places else "none (the run is too short for its rungs)"


def model_names(space: SearchSpace) -> set[str]:
    """Every network that a trial or recipe may ask for."""
    names = {space.baseline.model.name, *(recipe.config.model.name for recipe in space.recipes)}
    searched = space.search.get("model.name")
    return names | {str(name) for name in (searched.describe().get("choices", []) if searched else [])}
