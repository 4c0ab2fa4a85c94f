"""`hpo train`: one fixed configuration, once, or once a fold."""

from __future__ import annotations

import shlex
import statistics
from pathlib import Path

from core import metrics
from core.data import folds, on_device
from core.errors import UserError
from core.models import weights_fingerprint
from core.runtime import describe_device, select_device
from hpo.commands.common import memory_told, open_dataset, say_data
from hpo.commands.profile import profile_training
from hpo.commands.scores import METRIC_WORDS, say_folds, say_per_class, training_bars
from hpo.console import duration, say
from hpo.paths import TrainingPaths
from hpo.report import learning_curves
from hpo.search_space import load_recipe
from hpo.training import Recorded, spread, train_recorded


def train_command(
    recipe_name: str,
    *,
    data: Path | None,
    assignments: list[str],
    metric: str,
    device_name: str | None,
    skip_broken: bool,
    profiled: bool,
) -> None:
    """Trains a recipe and says how it scores on the validation images; `profiled`, and first where its time goes."""
    if metric not in metrics.METRICS:
        raise UserError(f"--metric {metric}: no such metric; give one of {', '.join(metrics.METRICS)}")
    recipe = load_recipe(recipe_name, assignments)
    config = recipe.config
    device = select_device(device_name)
    dataset = open_dataset(config.data, data, skip_broken=skip_broken)
    splits = on_device(folds(dataset, config.data), device)
    say_data(dataset, splits[0])
    say_folds(splits)

    # What early stopping and a plateau watch decides what comes out. Accuracy is what a folder without a word means.
    watched = None if metric == "accuracy" else metric
    file = config.model.pretrained_file
    weights = None if file is None else weights_fingerprint(file)
    identity = (config.model_dump_json(), dataset.fingerprint, watched, weights)
    paths = TrainingPaths.of(recipe.name, *filter(None, identity))
    if profiled:
        profile_training(config, splits[0], paths, name=recipe.name, device=device)
    say(f"training {recipe.name}: {config.epochs} epochs; {describe_device(device)}")
    if paths.checkpoint().exists():
        say("going on from its checkpoint")
    with memory_told(), training_bars(recipe.name, epochs=config.epochs, metric=metric) as watch:
        try:
            recorded = train_recorded(config, splits, paths, metric=metric, device=device, watch=watch)
        except KeyboardInterrupt:
            say("stopped; the same command goes on from the last checkpoint")
            raise
    learning_curves(recorded.rows, paths.curves, title=recipe.name, metric=metric)

    say(f"{recipe.name}: validation {_scores(recorded, metric)} ({_course(recorded, config.epochs)})")
    images = f"{sum(len(each.val) for each in splits):,} validation images"
    say_per_class(recorded.per_class, dataset.labels, images=images)
    if recipe.result:
        say(f"  its author's result: {recipe.result}")
    say(f"written to {shlex.quote(str(paths.dir))}")


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
