"""Resolves the options of a search into a plan, and runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from core.data import Dataset, Division, Splits
from core.errors import UserError
from core.models import build_model, check_model_name
from core.runtime import isolated_rng
from hpo.analysis.summary import summarize
from hpo.api.common import open_dataset, report_data
from hpo.api.options import RunOptions
from hpo.dashboard.artifacts import draw
from hpo.dashboard.notes import note_study
from hpo.dashboard.pictures import study_overview
from hpo.paths import StudyPaths
from hpo.report.words import entry_name
from hpo.reporter import Reporter
from hpo.search.interrupts import Interrupts
from hpo.search.loop import estimate_s, wait_for_others
from hpo.search.recipes import pending_recipes, run_recipes
from hpo.search.weights import keep_best_weights
from hpo.space import RungsPruner, SearchSpace
from hpo.space.pruner import rung_epochs
from hpo.storage.artifacts import ArtifactStore
from hpo.storage.lease import Held
from hpo.study import Study, check_search_name, open_study
from hpo.text import count, duration
from hpo.workers.engine import Engine, WorkerSlot, WorkerSpec
from hpo.workers.placement import Placement, place, place_on_cluster
from hpo.workers.ray import RayEngine, engine_and_slots
from hpo.workers.work import Work


@dataclass(frozen=True)
class SearchPlan:
    """Everything that a search looks up, checked before its study is opened."""

    options: RunOptions
    space: SearchSpace
    name: str
    """Of the study."""
    placement: Placement
    dataset: Dataset
    division: Division


@dataclass(frozen=True)
class SearchResult:
    """The outcome of `search`."""

    study: Study
    queued: int = 0
    """Number of trials left to workers, with `workers=0`."""
    held: tuple[Held, ...] = ()
    """Running trials of other machines."""


def resolve(options: RunOptions, space: SearchSpace, reporter: Reporter) -> SearchPlan:
    """Look up data, devices and networks.

    Raises:
        HpoError: The study's name or the artifact store cannot be used.
        CoreError: The data, a network or a device cannot be used.
    """
    placement = _placement(options)
    name = space.name if options.study is None else options.study
    check_search_name(name)
    for model in _model_names(space):
        check_model_name(model)
    dataset = open_dataset(space.baseline.data, options.data, skip_broken=options.skip_broken)
    division = Division(dataset)
    splits = division.here(space.baseline.data)
    report_data(dataset, splits, reporter)
    _check_network(space, splits[0])
    if options.artifacts:
        ArtifactStore(options.artifacts, StudyPaths.of(name).dir)
    if options.engine == "ray" and options.workers != 0:
        RayEngine(options.address or "auto").close()
    return SearchPlan(options, space, name, placement, dataset, division)


def run(plan: SearchPlan, reporter: Reporter, interrupts: Interrupts) -> SearchResult:
    """Open the study, queue the missing trials, and run them.

    Raises:
        HpoError: The study was started with another space, seed, storage or data.
        KeyboardInterrupt: Stopped; finished trials and checkpoints are kept.
    """
    return _Search(plan, reporter, interrupts).run()


def _placement(options: RunOptions) -> Placement:
    """Choose the devices of this machine; a cluster places its workers itself.

    Raises:
        UserError: The options contradict each other, or this machine lacks a device.
    """
    if options.engine == "ray":
        return place_on_cluster(options.device, options.devices, options.workers, options.per_device)
    if options.engine != "local":
        raise UserError(f"--engine {options.engine}: give local or ray")
    if options.address is not None:
        raise UserError(f"--address {options.address} is a Ray cluster's; give --engine ray too")
    return place(options.device, options.devices, options.workers, options.per_device)


def _check_network(space: SearchSpace, splits: Splits) -> None:
    """Build the baseline's network once, to fail on missing weights or small images before a study exists."""
    _, channels, height, width = splits.images.shape
    with isolated_rng(torch.device("cpu")):
        build_model(
            space.baseline.model, num_classes=len(splits.classes), in_channels=channels, image_size=(height, width)
        )


def _model_names(space: SearchSpace) -> set[str]:
    """Names of all networks that a trial or recipe may train."""
    names = {space.baseline.model.name, *(recipe.config.model.name for recipe in space.recipes)}
    searched = space.search.get("model.name")
    return names | {str(name) for name in (searched.describe().get("choices", []) if searched else [])}


class _Search:
    """One run of a study."""

    def __init__(self, plan: SearchPlan, reporter: Reporter, interrupts: Interrupts) -> None:
        options, space = plan.options, plan.space
        self.plan, self.options, self.space = plan, options, space
        self.reporter, self.interrupts = reporter, interrupts
        self.study = self._open()
        self.work = Work(
            self.study,
            space,
            plan.division,
            plan.placement,
            data=options.data,
            skip_broken=options.skip_broken,
            options=options.trial_options,
            interrupts=interrupts,
            say=reporter.say,
            cluster=self._cluster if options.engine == "ray" else None,
        )

    def _open(self) -> Study:
        plan, options = self.plan, self.options
        study = open_study(
            plan.space,
            name=plan.name,
            storage_url=options.storage,
            seed=options.seed,
            dataset=plan.dataset,
            data_path=options.data,
            take_over=options.take_over,
        )
        study.settings.command = options.command()
        if options.retries is not None:
            study.settings.retries = options.retries
        study.settings.set_space(plan.space)
        study.files.use_store(options.artifacts)
        note_study(study, plan.space)
        return study

    def _cluster(self, spec: WorkerSpec) -> tuple[Engine, list[WorkerSlot]]:
        options = self.options
        return engine_and_slots(
            spec,
            address=options.address or "auto",
            device=options.device,
            per_device=options.per_device,
            workers=options.workers,
            say=self.reporter.say,
        )

    def run(self) -> SearchResult:
        """Queue the trials missing from the total, and run them."""
        study, say = self.study, self.reporter.say
        done = study.counts().finished
        total = max(self.options.trials or max(self.space.trials, study.total or 0), done)
        self._report_requeued(study.queue.reclaim(force=self.options.reclaim))
        study.queue.ensure_trials(total)
        self._report_start(done, total)
        if self.plan.placement.none:
            return SearchResult(study, queued=study.queue.waiting())
        if done == total:
            say(f"all trials are done; continue with --trials {2 * total}")
        try:
            self._train(total - done)
        except KeyboardInterrupt:
            if saved := study.paths.trial_indices_with_checkpoints():
                say(f"{len(saved)} interrupted trial(s) are saved, and resume from their checkpoints")
            say(f"stopped: {study.counts().finished} of {total} trials are done and safe; resume with")
            say(f"  {self.options.command()}")
            raise
        _draw_pictures(study)
        return SearchResult(study, held=tuple(study.queue.held_elsewhere()))

    def _train(self, trials: int) -> None:
        study, space, work, reporter = self.study, self.space, self.work, self.reporter
        if self.options.engine == "local":  # the devices of a cluster are not known here
            with self.interrupts.let_through():
                self._report_estimate(work.images(), trials=trials)
        with reporter.study(study) as view:
            while study.queue.waiting() or wait_for_others(study, self.interrupts) or study.queue.requeue_lost():
                work.run(view)
            keep_best_weights(study, folds=space.baseline.data.folds or 1, options=self.options)
            if pending_recipes(study, space):
                run_recipes(
                    study,
                    space,
                    work.images(),
                    device=work.device,
                    interrupts=self.interrupts,
                    say=reporter.say,
                    progress=view,
                )

    def _report_start(self, done: int, total: int) -> None:
        space, epochs = self.space, count(self.space.baseline.epochs, "epoch")
        where = "Ray" if self.options.engine == "ray" else self.plan.placement.described()
        self.reporter.say(
            f"study {self.study.name}: {count(total, 'trial')} of {epochs}, {done} done; "
            f"sampler {space.sampler.name}, pruner {_pruner(space)}; {where}"
        )

    def _report_requeued(self, trial_indices: Sequence[int]) -> None:
        """Show the trials left by a dead process, and how many of them have a checkpoint."""
        if not trial_indices:
            return
        saved = sum(self.study.paths.checkpoint(trial_index).exists() for trial_index in trial_indices)
        self.reporter.say(
            f"{len(trial_indices)} trial(s) were left running by a process that died "
            f"(trial index {', '.join(map(str, trial_indices))}): {saved} resume from a checkpoint, "
            f"{len(trial_indices) - saved} start again"
        )

    def _report_estimate(self, splits: Sequence[Splits], *, trials: int) -> None:
        """Show the time that the missing trials take on this device, from a few timed steps."""
        recipes = len(pending_recipes(self.study, self.space))
        if not trials and not recipes:
            return
        in_full, pruned = estimate_s(self.space, splits, trials=trials, recipes=recipes, device=self.work.device)
        time = f"about {duration(pruned)}, {duration(in_full)} without pruning"
        beside = f", including {recipes} recipe(s) trained beside the study" if recipes else ""
        alone = "" if self.work.inline else ", one trial at a time"
        self.reporter.say(f"this will take {time if pruned < in_full else f'up to {duration(in_full)}'}{beside}{alone}")
        self.reporter.say("Ctrl-C stops it; the same command resumes it")


def _pruner(space: SearchSpace) -> str:
    """Name the pruner; the rung pruner with its epochs."""
    if not isinstance(space.pruner, RungsPruner):
        return space.pruner.name
    rungs = rung_epochs(space.pruner.rungs, space.baseline.epochs)
    places = [f"at epoch {', '.join(map(str, rungs))}"] if rungs else []
    if space.baseline.data.folds is not None:
        places.append(f"after each of the first {space.baseline.data.folds - 1} folds")
    return f"rungs {' and '.join(places)}" if places else "none (the run is too short for its rungs)"


def _draw_pictures(study: Study) -> None:
    """Draw the study's history into its folder, and the pictures of its best trial for plain optuna-dashboard."""
    baselines = {entry_name(one): one.value for one in summarize(study).baselines if one.value is not None}
    study_overview(study.optuna, study.paths.overview, metric=study.metric, baselines=baselines, title=study.name)
    best = study.best_trial()
    draw(study, [] if best is None else [best.number])
