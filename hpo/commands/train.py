"""`hpo train`: one fixed configuration, once."""

from __future__ import annotations

import shlex
from pathlib import Path

from core.data import split
from core.runtime import describe_device, select_device
from hpo.commands.common import open_dataset, say_data
from hpo.console import TrainProgress, duration, say
from hpo.paths import TrainingPaths
from hpo.report import learning_curves
from hpo.search_space import load_recipe
from hpo.training import train_recorded


def train_command(
    recipe_name: str, *, data: Path | None, assignments: list[str], device_name: str | None, skip_broken: bool
) -> None:
    """Trains a recipe and says how it scores on the validation images."""
    recipe = load_recipe(recipe_name, assignments)
    device = select_device(device_name)
    dataset = open_dataset(recipe.config.data, data, skip_broken=skip_broken)
    splits = split(dataset, recipe.config.data).to(device)
    say_data(dataset, splits)
    say(f"training {recipe.name}: {recipe.config.epochs} epochs; {describe_device(device)}")

    paths = TrainingPaths.of(recipe.name, recipe.config.model_dump_json(), dataset.fingerprint)
    if paths.checkpoint.exists():
        say("going on from its checkpoint")
    with TrainProgress(recipe.name, epochs=recipe.config.epochs) as progress:
        try:
            result = train_recorded(
                recipe.config, splits, paths, metric="accuracy", device=device, on_epoch_end=progress.epoch_ended
            )
        except KeyboardInterrupt:
            say("stopped; the same command goes on from the last checkpoint")
            raise
    learning_curves([epoch.row() for epoch in result.history], paths.curves, title=recipe.name)

    kept = result.kept
    scores = kept.counted()
    say(
        f"{recipe.name}: validation accuracy {scores.accuracy:.4f}, macro-F1 {scores.macro_f1:.4f}, "
        f"loss {scores.loss:.4f} (epoch {kept.epoch} of {recipe.config.epochs}, "
        f"{duration(result.history[-1].elapsed_s)}, {kept.images_per_s:,.0f} images/s)"
    )
    if recipe.result:
        say(f"  its author's result: {recipe.result}")
    say(f"written to {shlex.quote(str(paths.dir))}")
