"""`hpo train`: one fixed configuration, once, or once a fold; a recipe's, or that of a study's trial."""

from __future__ import annotations

import shlex
import statistics
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from core import metrics
from core.config import TrainConfig
from core.data import Dataset, folds, on_device
from core.errors import UserError
from core.models import weights_fingerprint
from core.runtime import describe_device, select_device
from hpo.api.common import memory_told, open_dataset, say_data, say_patience
from hpo.api.profile import profile_training
from hpo.api.replay import Replay, replay_of
from hpo.cli.console import say
from hpo.cli.scores import METRIC_WORDS, say_folds, say_per_class, training_bars
from hpo.dashboard.pictures import learning_curves
from hpo.paths import TrainingPaths
from hpo.search.interrupts import Interrupts
from hpo.search.training import Recorded, spread, train_recorded
from hpo.space import load_recipe, to_yaml
from hpo.text import duration


@dataclass(frozen=True)
class _Asked:
    """What is to be trained."""

    name: str
    config: TrainConfig
    metric: str
    data: Path | None = None
    """Where the study's images lie."""
    skip_broken: bool = False
    result: str | None = None
    """The recipe's author's."""
    replay: Replay | None = None
    """The trial, where this is the very training that it had."""


def train_command(
    recipe_name: str | None,
    *,
    trial: str | None,
    storage: str | None,
    data: Path | None,
    assignments: list[str],
    metric: str | None,
    device_name: str | None,
    skip_broken: bool,
    profiled: bool,
) -> None:
    """Trains a recipe, or a trial again, and says how it scores on the validation images; `profiled`, and first where
    its time goes."""
    if metric is not None and metric not in metrics.METRICS:
        raise UserError(f"--metric {metric}: no such metric; give one of {', '.join(metrics.METRICS)}")
    asked = _asked(recipe_name, trial, storage, assignments, metric)
    config, metric = asked.config, asked.metric
    device = select_device(device_name)
    dataset = open_dataset(config.data, data or asked.data, skip_broken=skip_broken or asked.skip_broken)
    if asked.replay is not None:
        asked.replay.check(dataset)
    splits = on_device(folds(dataset, config.data), device)
    say_data(dataset, splits[0])
    say_folds(splits)

    paths = _paths(asked, dataset)
    if profiled:
        profile_training(config, splits[0], paths, name=asked.name, device=device)
    with Interrupts(told=say_patience) as interrupts, nullcontext() if asked.replay is None else asked.replay.threads():
        say(f"training {asked.name}: {config.epochs} epochs; {describe_device(device)}")
        if paths.checkpoint().exists():
            say("going on from its checkpoint")
        bars = training_bars(asked.name, epochs=config.epochs, metric=metric, interrupts=interrupts)
        try:
            with memory_told(), interrupts.patient(), bars as watch:
                recorded = train_recorded(config, splits, paths, metric=metric, device=device, watch=watch)
        except KeyboardInterrupt:
            say("stopped; the same command goes on from the last checkpoint")
            raise
        learning_curves(recorded.rows, paths.curves, title=asked.name, metric=metric)

        say(f"{asked.name}: validation {_scores(recorded, metric)} ({_course(recorded, config.epochs)})")
        images = f"{sum(len(each.val) for each in splits):,} validation images"
        say_per_class(recorded.per_class, dataset.labels, images=images)
        if asked.result:
            say(f"  its author's result: {asked.result}")
        if asked.replay is not None:
            say(asked.replay.verdict(recorded, device))
        say(f"written to {shlex.quote(str(paths.dir))}")


def _asked(
    recipe_name: str | None, trial: str | None, storage: str | None, assignments: list[str], metric: str | None
) -> _Asked:
    """What the command's words mean.

    Raises:
        UserError: they name nothing, or two things.
    """
    if trial is not None:
        if recipe_name is not None:
            raise UserError(f"give the recipe {recipe_name} or --from {trial}, and not both")
        return _of_trial(trial, storage, assignments, metric)
    if recipe_name is None:
        raise UserError("give a recipe, from hpo space list, or a trial by --from STUDY/TRIAL")
    if storage is not None:
        raise UserError("--storage: a recipe lies in no storage; give it with --from STUDY/TRIAL, or leave it out")
    recipe = load_recipe(recipe_name, assignments)
    return _Asked(recipe.name, recipe.config, metric or "accuracy", result=recipe.result)


def _of_trial(trial: str, storage: str | None, assignments: list[str], metric: str | None) -> _Asked:
    """A trial of a study, as it was, or changed."""
    replay = replay_of(trial, storage=storage)
    study = replay.study
    say(f"study {study.name}, trial {replay.trial.number}: {replay.was}")
    changed = [f"--set {assignment}" for assignment in assignments]
    if metric not in (None, study.metric):
        changed.append(f"--metric {metric}")
    if changed:
        say(f"with {' '.join(changed)} this is no replay of it, and is not compared with it")
    return _Asked(
        replay.name,
        _overridden(replay.config, assignments) if assignments else replay.config,
        metric or study.metric,
        data=study.data_path,
        skip_broken=study.skip_broken,
        replay=None if changed else replay,
    )


def _overridden(config: TrainConfig, assignments: list[str]) -> TrainConfig:
    """The configuration with `--set`, which is checked as a recipe's is."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trial.yaml"
        file.write_text(to_yaml(config))
        return load_recipe(file, assignments).config


def _paths(asked: _Asked, dataset: Dataset) -> TrainingPaths:
    """The folder of this training, which the same command finds again."""
    # What early stopping and a plateau watch decides what comes out. Accuracy is what a folder without a word means.
    watched = None if asked.metric == "accuracy" else asked.metric
    file = asked.config.model.pretrained_file
    weights = None if file is None else weights_fingerprint(file)
    identity = (asked.config.model_dump_json(), dataset.fingerprint, watched, weights)
    return TrainingPaths.of(asked.name, *filter(None, identity))


def _scores(recorded: Recorded, metric: str) -> str:
    """Every metric by name, the chosen one first; of folds the mean, and the standard deviation."""
    counted = [result.kept.counted(metric) for result in recorded.results]
    words = []
    for name in (metric, *(other for other in metrics.METRICS if other != metric)):
        values = [metrics.value(scores, name) for scores in counted]
        deviation = spread(values)
        around = "" if deviation is None else f" ± {deviation:.4f}"
        words.append(f"{METRIC_WORDS[name]} {statistics.fmean(values):.4f}{around}")
    return ", ".join(words)


def _course(recorded: Recorded, epochs: int) -> str:
    """How the training went: which epochs were kept, how long it took."""
    kept = [result.kept for result in recorded.results]
    which = ", ".join(str(epoch.epoch) for epoch in kept)
    took = duration(sum(result.history[-1].elapsed_s for result in recorded.results))
    of = f"epoch {which} of {epochs}" if len(kept) == 1 else f"{len(kept)} folds, epochs {which} of {epochs}"
    return f"{of}, {took}, {statistics.fmean(epoch.images_per_s for epoch in kept):,.0f} images/s"
