"""`hpo train`: train one fixed configuration, a recipe's or that of a study's trial."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from core import metrics
from core.config import TrainConfig
from core.data import Dataset, folds, on_device
from core.errors import UserError
from core.models import weights_fingerprint
from core.runtime import describe_device, select_device
from core.text import count
from core.weights import weights_in
from hpo.api.common import open_dataset, report_data, trainings, weights_of
from hpo.api.options import TrainOptions, setting_texts
from hpo.dashboard.pictures import learning_curves
from hpo.paths import TrainingPaths
from hpo.reporter import Reporter, Silent
from hpo.search.interrupts import Interrupts
from hpo.search.profile import profile_training
from hpo.search.replay import Replay, replay_of
from hpo.search.training import Recorded, naming_images, train_recorded
from hpo.space import load_recipe, override_config
from hpo.study.code import code_of, own_code


@dataclass(frozen=True)
class TrainPlan:
    """The resolved training."""

    name: str
    config: TrainConfig
    metric: str
    data: Path | None = None
    """Path of the study's images."""
    skip_broken: bool = False
    published: str | None = None
    """Result reported by the recipe's author."""
    weights: Path | None = None
    """Folder of pretrained weights."""
    replay: Replay | None = None
    """The trial that this training repeats exactly."""


@dataclass(frozen=True)
class TrainResult:
    """The outcome of `train`."""

    plan: TrainPlan
    recorded: Recorded
    folder: Path
    labels: Tensor = field(repr=False)
    """(N,) int64: labels of the training and validation images."""
    validation_images: int
    """Of all folds together."""
    comparison: str | None
    """How a replayed trial compares with the original, in a sentence."""


def train(options: TrainOptions, reporter: Reporter | None = None, interrupts: Interrupts | None = None) -> TrainResult:
    """Train a recipe, or a trial again, and evaluate it on the validation images.

    With `data.folds`, one network a fold. The same call again resumes an interrupted training.

    Raises:
        HpoError: The recipe has faults, or there is no such trial.
        CoreError: The data, the network or the device cannot be used.
        KeyboardInterrupt: Stopped; the last checkpoint is kept.
    """
    reporter, interrupts = reporter or Silent(), interrupts or Interrupts()
    with interrupts.let_through():
        plan = _resolve(options, reporter)
    with weights_in(plan.weights):
        return _trained(plan, options, reporter, interrupts)


def _trained(plan: TrainPlan, options: TrainOptions, reporter: Reporter, interrupts: Interrupts) -> TrainResult:
    with interrupts.let_through():
        config, metric, replay = plan.config, plan.metric, plan.replay
        device = select_device(options.device)
        dataset = open_dataset(config.data, plan.data, skip_broken=plan.skip_broken, reporter=reporter)
        if replay is not None:
            replay.check(dataset)
        splits = on_device(folds(dataset, config.data), device)
        report_data(dataset, splits, reporter)
        paths = training_paths(plan.name, config, metric, dataset)
        if options.profile:
            profile_training(config, splits[0], paths, name=plan.name, device=device, reporter=reporter)
    reporter.say(f"training {plan.name}: {count(config.epochs, 'epoch')}; {describe_device(device)}")
    if paths.checkpoint().exists():
        reporter.say("resuming from its checkpoint")
    shown = trainings(reporter, plan.name, epochs=config.epochs, metric=metric, interrupts=interrupts)
    with nullcontext() if replay is None else replay.threads():
        with shown as watch:
            named = naming_images(config, plan.data)
            recorded = train_recorded(config, splits, paths, metric=metric, device=device, watch=watch, written=named)
        learning_curves(recorded.rows, paths.curves, title=plan.name, metric=metric)
        comparison = None if replay is None else replay.verdict(recorded, device)
    images = sum(len(each.val) for each in splits)
    return TrainResult(plan, recorded, paths.dir, dataset.labels, images, comparison)


def _resolve(options: TrainOptions, reporter: Reporter) -> TrainPlan:
    """Look up the recipe or the trial; UserError if neither or both are given, or there is no such metric."""
    check_metric(options.metric)
    if options.trial is not None:
        if options.recipe is not None:
            raise UserError(f"give the recipe {options.recipe} or --from {options.trial}, and not both")
        return _of_trial(options, options.trial, reporter)
    if options.recipe is None:
        raise UserError("give a recipe, from hpo space list, or a trial by --from STUDY/TRIAL")
    if options.storage is not None:
        raise UserError("--storage: a recipe has no storage; give it with --from STUDY/TRIAL, or leave it out")
    recipe = load_recipe(options.recipe, options.set)
    metric = options.metric or "accuracy"
    return TrainPlan(
        recipe.name, recipe.config, metric, options.data, options.skip_broken, recipe.result, options.weights
    )


def _of_trial(options: TrainOptions, trial: str, reporter: Reporter) -> TrainPlan:
    """Look up a trial, unchanged or changed by `--set` and `--metric`."""
    replay = replay_of(trial, storage=options.storage)
    study = replay.study
    reporter.say(f"study {study.name}, trial {replay.trial.number}: {replay.was}")
    changed = [f"--set {text}" for text in setting_texts(options.set)]
    if options.metric not in (None, study.metric):
        changed.append(f"--metric {options.metric}")
    if changed:
        reporter.say(f"with {' '.join(changed)} this is no replay, and is not compared with the trial")
    return TrainPlan(
        replay.name,
        override_config(replay.config, options.set),
        options.metric or study.metric,
        options.data or study.data_path,
        options.skip_broken or study.skip_broken,
        weights=weights_of(study, options.weights),
        replay=None if changed else replay,
    )


def check_metric(metric: str | None) -> None:
    """Raise UserError if `--metric` names no metric."""
    if metric is not None and metric not in metrics.METRICS:
        raise UserError(f"--metric {metric}: no such metric; give one of {', '.join(metrics.METRICS)}")


def training_paths(name: str, config: TrainConfig, metric: str, dataset: Dataset) -> TrainingPaths:
    """Return the folder of a training outside a study: one per configuration, metric, images and weights file."""
    # Early stopping and plateau schedules watch the metric, so it is part of the identity; accuracy is the default.
    watched = None if metric == "accuracy" else metric
    file = config.model.pretrained_file
    weights = None if file is None else weights_fingerprint(file)
    code = [json.dumps(each["files"]) for each in code_of(own_code(config)).values()]
    identity = (config.model_dump_json(), dataset.fingerprint, watched, weights, *code)
    return TrainingPaths.of(name, *filter(None, identity))
