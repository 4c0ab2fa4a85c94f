"""Resolves the options of a search, and runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from optuna.trial import TrialState

from core.data import Division, Splits
from core.errors import UserError
from core.loop import try_own_parts
from core.models import build_model, check_model_name
from core.runtime import isolated_rng
from core.sampling import class_caps
from core.text import count
from hpo.analysis.summary import summarize
from hpo.api.common import open_dataset, report_data, report_estimate, resumable, train_all
from hpo.api.length import run_length_probe
from hpo.api.networks import advice, check_own_code, with_weights
from hpo.api.options import RunOptions
from hpo.api.search_result import SearchResult
from hpo.dashboard.artifacts import draw
from hpo.dashboard.notes import note_study
from hpo.dashboard.pictures import study_overview
from hpo.errors import StudyError
from hpo.loggers import Callback, TensorBoard
from hpo.paths import StudyPaths
from hpo.report.words import entry_name, patience_text
from hpo.reporter import Reporter, Silent, StudyView
from hpo.search.interrupts import Interrupts
from hpo.search.length import MIN_TRAININGS, probe_of
from hpo.search.loop import Estimate
from hpo.search.noise import noise_line
from hpo.search.recipes import long_baseline, pending_recipes, run_recipes
from hpo.search.weights import keep_best_weights
from hpo.space import Recipe, SearchSpace
from hpo.space.grammar import MANY_TRIALS, MOST_TRIALS
from hpo.space.own_parts import check_own_parts
from hpo.space.pruner import build_pruner, keeps_of
from hpo.storage.artifacts import ArtifactStore
from hpo.study import Study, check_search_name, find_study, open_study
from hpo.study.metadata import read_metadata
from hpo.study.queue import Queued
from hpo.study.warm_start import warm_starts
from hpo.text import done_and_safe, duration
from hpo.trials import WARM_START, trial_index_of
from hpo.workers.engine import Engine, WorkerSlot, WorkerSpec
from hpo.workers.placement import Placement, place, place_on_cluster
from hpo.workers.ray import RayEngine, engine_and_slots
from hpo.workers.work import Work

# Of a time limit, for the long baseline: slightly more than half, since its epochs may be slower than the trials'.
LONG_BASELINE_SHARE = 0.6
# Side in pixels below which smaller images are not recommended.
SMALLEST_SIDE = 32


class Search:
    """One run of a study. Data, devices and networks are looked up before `run` opens the study.

    Raises:
        HpoError: The study's name or the artifact store cannot be used.
        CoreError: The data, a network or a device cannot be used.
    """

    def __init__(
        self,
        options: RunOptions,
        space: SearchSpace,
        reporter: Reporter,
        interrupts: Interrupts,
        *,
        part_of: str | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self._alone, self._command = part_of is None, part_of or options.command()
        if not options.recipes:
            space = replace(space, recipes=())
        self.options, self.reporter, self.interrupts = options, reporter, interrupts
        self.placement = _placement(options)
        self.callbacks = callbacks
        _check_callbacks(options, self.placement, callbacks)
        self.name = space.name if options.study is None else options.study
        check_search_name(self.name)
        _check_total(options.trials or space.trials, allowed=options.yes)
        for model in space.names("model.name") | {recipe.config.model.name for recipe in space.recipes}:
            check_model_name(model)
        check_own_code(space)
        check_own_parts(space.sampler, space.pruner)
        begun = read_metadata(StudyPaths.of(self.name))
        space, missing = with_weights(space, begun)
        if missing and begun is None:
            reporter.say(f"left out, since their pretrained weights are not here: {advice(missing)}")
        self.space = space
        self.warm_starts = _warm_starts(options, space, self.name)
        self.dataset = open_dataset(
            space.baseline.data, options.data, skip_broken=options.skip_broken, reporter=reporter
        )
        self.division = Division(self.dataset)
        splits = self.division.here(space.baseline.data)
        if self._alone:
            report_data(self.dataset, splits, reporter)
        _check_network(space, splits[0])
        class_caps(splits[0].labels[splits[0].train], space.baseline.sampling, splits[0].classes)
        if options.artifacts:
            ArtifactStore(options.artifacts, StudyPaths.of(self.name).dir)
        if options.engine == "ray" and options.workers != 0:
            RayEngine(options.address or "auto")  # stays connected: connecting starts worker processes on the nodes

    def run(self) -> SearchResult:
        """Open the study, queue the trials missing from the total, and run them.

        Raises:
            HpoError: The study was started with another space, seed, storage or data.
            KeyboardInterrupt: Stopped; finished trials and checkpoints are kept.
        """
        study, say = self._open(), self.reporter.say
        work = self._work(study)
        done = study.counts().finished
        total = max(self.options.trials or max(self.space.trials, study.total or 0), done)
        self._report_requeued(study, study.queue.reclaim(force=self.options.reclaim))
        study.queue.drop_finished_checkpoints()
        study.queue.ensure_trials(total, self.warm_starts)
        study.deadline.begin(self.options.limit_s)
        study.patience.begin(self.options.patience)
        self._report_start(done, total)
        self._report_warm_starts(study)
        if self.placement.none:
            return SearchResult(study, queued=study.queue.waiting())
        if done == total and self._alone:
            say(f"all trials are done; continue with --trials {2 * total}")
        with resumable(study, "trial", self._command, self.reporter):
            try:
                self._train(work, total - done)
            except KeyboardInterrupt:
                paused = set(map(trial_index_of, study.queue.paused()))
                if saved := study.paths.trial_indices_with_checkpoints() - paused:
                    say(f"{count(len(saved), 'interrupted trial')} saved, to resume from a checkpoint")
                if paused:
                    say(f"{count(len(paused), 'trial')} paused at a rung: the best continue when their turn comes")
                raise
            finally:
                study.deadline.record(force=True)
        _draw_pictures(study)
        note_study(study, self.space)  # with the Pareto front
        return SearchResult(study, held=tuple(study.queue.held_elsewhere()))

    def _open(self) -> Study:
        options = self.options
        study = open_study(
            self.space,
            name=self.name,
            storage_url=options.storage,
            seed=options.seed,
            dataset=self.dataset,
            data_path=options.data,
            take_over=options.take_over,
        )
        study.settings.command = self._command
        if options.weights is not None:
            study.settings.weights = str(options.weights)
        if options.retries is not None:
            study.settings.retries = options.retries
        study.settings.set_space(self.space)
        study.files.use_store(options.artifacts)
        note_study(study, self.space)
        return study

    def _work(self, study: Study) -> Work:
        return Work(
            study,
            self.space,
            self.division,
            self.placement,
            data=self.options.data,
            skip_broken=self.options.skip_broken,
            options=self.options.trial_options,
            interrupts=self.interrupts,
            say=self.reporter.say,
            cluster=self._cluster if self.options.engine == "ray" else None,
            callbacks=self.callbacks,
        )

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

    def _train(self, work: Work, trials: int) -> None:
        study, space = work.study, self.space
        if study.deadline.left_s() <= 0 or (trials and study.patience.is_over):
            self._report_end(study)
            return
        probes = [recipe for recipe in pending_recipes(study, space) if recipe.config.is_probe]
        with self.reporter.study(study) as view:  # seconds to minutes, and a score to beat from the first trial on
            self._train_recipes(work, view, probes)
        others = [recipe for recipe in pending_recipes(study, space) if not recipe.config.is_probe]
        recipes = len(others)
        needed = recipes or (trials and self._alone)
        if needed and self.options.engine == "local":  # the devices of a cluster are not known here
            reporter = self.reporter if self._alone else Silent()
            estimate = report_estimate(work, reporter, trials=trials, recipes=recipes)
            if study.deadline.is_set:
                self._fit_into_time(study, estimate, trials, recipes)
            self._probe_length(work, estimate)
        if trials and self._alone:
            self._report_noise(study)
        with self.reporter.study(study) as view:
            all_done = train_all(work, view)
            keep_best_weights(study, folds=space.baseline.data.folds or 1, options=self.options)
            if not all_done:
                self._report_end(study)
            self._train_recipes(work, view, others)
            if self.options.long_baseline and (longer := long_baseline(study, space)) is not None:
                self._train_recipes(work, view, [longer])

    def _train_recipes(self, work: Work, view: StudyView, recipes: Sequence[Recipe]) -> None:
        if recipes:
            run_recipes(
                work.study,
                self.space,
                partial(self.division.on, work.device),
                recipes,
                device=work.device,
                interrupts=self.interrupts,
                say=self.reporter.say,
                progress=view,
            )

    def _probe_length(self, work: Work, estimate: Estimate) -> None:
        """Before a search that costs many trainings begins, predict the baseline's scores at other lengths."""
        study = work.study
        begun = any(trial.state != TrialState.WAITING for trial in study.optuna.get_trials(deepcopy=False))
        if not self._alone or begun or study.settings.length_probe is not None:
            return
        if min(estimate.pruned_s, study.deadline.left_s()) < MIN_TRAININGS * estimate.trial_s:
            return
        study.settings.length_probe = run_length_probe(
            study.paths,
            self.space.baseline,
            work.images()[0],
            work.device,
            self.reporter,
            self.interrupts,
            study.settings,
        )

    def _report_noise(self, study: Study) -> None:
        """Warn if the validation images are too few to tell good trials apart."""
        known = [one.value for one in summarize(study).baselines if one.is_baseline and one.value is not None]
        probe = probe_of(study.settings.length_probe)
        level = known[0] if known else None if probe is None else probe.accuracy(probe.epochs)
        config = self.space.baseline.data
        given = self.dataset.given_val(config) is not None
        line = noise_line(self.division.here(config), config, study.metric, level, given=given)
        if line:
            self.reporter.say(line)

    def _fit_into_time(self, study: Study, estimate: Estimate, trials: int, recipes: int) -> None:
        """Reserve time for the recipes, and show how much of the run fits the time that is left.

        Raises:
            StudyError: Not even one trial fits.
        """
        deadline, config = study.deadline, self.space.baseline
        left_s = deadline.left_s()
        if estimate.trial_s > left_s and self._alone:
            epochs = int(config.epochs * left_s / estimate.trial_s)
            shorter = f"; {count(epochs, 'epoch')} would fit: --set epochs={epochs}" if epochs else ""
            raise StudyError(
                f"a trial of {count(config.epochs, 'epoch')} takes about {duration(estimate.trial_s)}, and "
                f"{duration(left_s)} are left{shorter}; or raise --hours or --minutes"
            )
        reserved_s = LONG_BASELINE_SHARE * deadline.limit_s if self.options.long_baseline else 0.0
        left_s = max(0.0, left_s - reserved_s)
        if recipes and recipes * estimate.trial_s <= left_s / 2:
            reserved_s += recipes * estimate.trial_s
        elif recipes:
            self.reporter.say("the recipes would take over half of the time: they are trained only if some is left")
        if reserved_s:
            deadline.reserve(reserved_s)
        share = left_s / estimate.pruned_s
        if share < 1 and self._alone:
            fitting = max(1, int(share * trials))
            ways = [f"--trials {study.counts().finished + fitting}"]
            if trials == study.total:  # otherwise the study has begun, and its epochs and images are fixed
                ways.append(f"--set epochs={max(1, int(share * config.epochs))}")
                size = "data.image_size" if config.model.input_size is None else "model.input_size"
                side = 8 * int((config.model.input_size or self.dataset.images.shape[-1]) * share**0.5 / 8)
                ways += [f"--set {size}={side}"] if side >= SMALLEST_SIDE else []
            self.reporter.say(
                f"{duration(left_s)} are left, enough for about {fitting} of these trials; "
                f"to fit all: {' or '.join(ways)}"
            )

    def _report_end(self, study: Study) -> None:
        """Show how far the study came within its time or patience, and how to continue it."""
        if study.deadline.left_s() > 0 and study.patience.is_over:
            ending = "; continue without --patience" if self._alone else ""
            self.reporter.say(patience_text(study) + ending)
            return
        if not self._alone:
            return
        limit_s = study.deadline.limit_s
        hours = self.options.hours is not None
        more = f"--hours {2 * limit_s / 3600:g}" if hours else f"--minutes {2 * limit_s / 60:g}"
        counts = study.counts()
        paused = f", {counts.paused} paused" if counts.paused else ""
        self.reporter.say(
            f"no further trial fits the {duration(limit_s)} of this study: "
            f"{done_and_safe(counts.finished, study.total)}{paused}; more time with {more}"
        )

    def _report_start(self, done: int, total: int) -> None:
        space, epochs = self.space, count(self.space.baseline.epochs, "epoch")
        where = "Ray" if self.options.engine == "ray" else self.placement.described()
        most = "up to " if self.options.limit_s else ""
        self.reporter.say(
            f"study {self.name}: {most}{count(total, 'trial')} of {epochs}, {done} done; "
            f"sampler {space.sampler.name}, pruner {_pruner(space, total)}; {where}"
        )

    def _report_warm_starts(self, study: Study) -> None:
        trials = study.optuna.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        waiting = [str(trial.user_attrs[WARM_START]) for trial in trials if WARM_START in trial.user_attrs]
        if waiting:
            sources = ", ".join(sorted({one.rpartition("/")[0] for one in waiting}))
            self.reporter.say(f"warm start with {count(len(waiting), 'configuration')} of study {sources}")

    def _report_requeued(self, study: Study, trial_indices: Sequence[int]) -> None:
        if not trial_indices:
            return
        saved = sum(study.paths.checkpoint(trial_index).exists() for trial_index in trial_indices)
        self.reporter.say(
            f"{count(len(trial_indices), 'trial')} left running by a process that died "
            f"(trial index {', '.join(map(str, trial_indices))}): {saved} to resume from a checkpoint, "
            f"{len(trial_indices) - saved} to start again"
        )


def _check_total(total: int, *, allowed: bool) -> None:
    most = MOST_TRIALS if allowed else MANY_TRIALS
    if total > most:
        advice = "" if allowed else ", or confirm the total by --yes"
        raise StudyError(f"{total:,} trials, all queued at once, are over {most:,}; give fewer by --trials{advice}")


def _warm_starts(options: RunOptions, space: SearchSpace, name: str) -> list[Queued]:
    if options.warm_start is None:
        return []
    if options.warm_start == name:
        raise StudyError(f"--warm-start {name} is the study itself; give another, or leave it out to resume this one")
    return warm_starts(space, find_study(options.warm_start))


def _check_callbacks(options: RunOptions, placement: Placement, callbacks: Sequence[Callback]) -> None:
    """Refuse callbacks where trials run in other processes, and TensorBoard's without its package."""
    if options.tensorboard:
        TensorBoard()
    here = options.engine == "local" and not placement.in_processes and all(size == 1 for _, size in placement)
    if callbacks and not here:
        raise StudyError(
            f"{placement.asked}: callbacks are called in this process, and these trials run in others; train one at "
            "a time, or use tensorboard=True"
        )


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
    """Build the baseline's network and own parts, to fail on missing weights or small images before a study exists."""
    try_own_parts(space.baseline, splits)
    _, channels, height, width = splits.images.shape
    with isolated_rng(torch.device("cpu")):
        build_model(
            space.baseline.model, num_classes=len(splits.classes), in_channels=channels, image_size=(height, width)
        )


def _pruner(space: SearchSpace, total: int) -> str:
    name, folds = space.pruner.name, space.baseline.data.folds
    if name not in ("rungs", "promote"):
        return name
    rungs = keeps_of(build_pruner(space.pruner, space.baseline.epochs, None if name == "rungs" else folds), total)
    places = [f"at epoch {', '.join(map(str, rungs))}"] if rungs else []
    if folds is not None and name == "promote":
        places = [f"{place} of all folds together" for place in places]
    elif folds is not None:
        places.append(f"after each of the first {folds - 1} folds")
    return f"{name} {' and '.join(places)}" if places else "none (the run is too short for its rungs)"


def _draw_pictures(study: Study) -> None:
    """Draw the study's history into its folder, and the pictures of its best trial for plain optuna-dashboard."""
    baselines = {entry_name(one): one.value for one in summarize(study).baselines if one.value is not None}
    study_overview(study.optuna, study.paths.overview, metric=study.metric, baselines=baselines, title=study.name)
    best = study.best_trial()
    draw(study, [] if best is None else [best.number])
