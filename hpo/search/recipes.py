"""Recipe runs: trainings of recipes that are not trials, for comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from core.config import MOST_EPOCHS, TrainConfig
from core.data import Splits
from core.errors import MissingWeightsError
from core.loop import EpochMetrics, seconds_per_epoch
from core.seeds import derive_seed
from core.text import count
from hpo.confirmation.trials import search_epochs
from hpo.errors import SpaceError
from hpo.paths import LONG_BASELINE, TrainingPaths
from hpo.reporter import NO_PROGRESS, StudyView
from hpo.search.interrupts import Interrupts
from hpo.search.objective import Divide, failure_of
from hpo.search.training import Watch, train_recorded
from hpo.search.weights import explain_full_disk
from hpo.space import Recipe, SearchSpace, recipe_from_yaml
from hpo.storage.atomic import lock_of
from hpo.study import Study
from hpo.study.deadline import OutOfTime
from hpo.study.results import read_result, write_result


def pending_recipes(study: Study, space: SearchSpace) -> list[Recipe]:
    """Return the recipes that are no trials and not yet trained in their present form."""
    unqueued = {recipe.name for recipe in study.queue.missing_recipes()}
    outside = [recipe for recipe in space.recipes if recipe.name in unqueued or space.express(recipe.config) is None]
    return [recipe for recipe in outside if not _is_trained(study, recipe)]


def long_baseline(study: Study, space: SearchSpace) -> Recipe | None:
    """Return the baseline for as many epochs as the finished trials trained together.

    None if that is no longer than a trial, or trained already.
    """
    baseline = space.baseline
    epochs = min(search_epochs(study) // (baseline.data.folds or 1), MOST_EPOCHS)
    if baseline.is_probe or epochs <= baseline.epochs:
        return None
    config = baseline.override({"epochs": epochs})
    recipe = Recipe(LONG_BASELINE, space.path, config, description="", source="", result="", guesses="")
    return None if _is_trained(study, recipe) else recipe


def run_recipes(
    study: Study,
    space: SearchSpace,
    splits: Sequence[Splits] | Divide,
    recipes: Sequence[Recipe] | None = None,
    *,
    device: torch.device,
    interrupts: Interrupts,
    say: Callable[[str], None],
    progress: StudyView = NO_PROGRESS,
) -> None:
    """Train the pending recipes into the study's folder, as long as a trial each, up to the study's deadline.

    A recipe whose pretrained weights are missing is left out; the next run of the study tries again.

    Args:
        splits: On the device: one, one per fold, or a function that splits the images for a configuration.
        recipes: Those that are not trained yet; None for the pending ones.
        say: Shows one line per result.
    """
    divide: Divide = splits if callable(splits) else lambda _: splits
    for recipe in pending_recipes(study, space) if recipes is None else recipes:
        paths = study.paths.reference(recipe.name)
        paths.dir.mkdir(parents=True, exist_ok=True)
        with interrupts.let_through():  # two processes would overwrite each other's checkpoints
            lock = lock_of(paths.lock).acquire()
        try:
            with lock:
                if not _is_trained(study, recipe):  # by another run of the study
                    here = divide(recipe.config.data)
                    _run(study, space, here, recipe, device=device, interrupts=interrupts, progress=progress)
        except OutOfTime:
            say(f"{_title(recipe)}  left out: it would end after the deadline")
            continue
        except MissingWeightsError as error:
            say(f"{_title(recipe)}  left out: {error}")
            continue
        result = read_result(paths) or {}
        came_to = f"{result['value']:.4f}" if "value" in result else f"{result['failure']}  ({result['why']})"
        say(f"{_title(recipe)}  {space.metric} {came_to}")


def _title(recipe: Recipe) -> str:
    if recipe.name == LONG_BASELINE:
        return f"the baseline for {count(recipe.config.epochs, 'epoch')}"
    return f"recipe {recipe.name}"


def _run(
    study: Study,
    space: SearchSpace,
    splits: Sequence[Splits],
    recipe: Recipe,
    *,
    device: torch.device,
    interrupts: Interrupts,
    progress: StudyView,
) -> None:
    paths, config = study.paths.reference(recipe.name), _config_of(study, recipe)
    with recording_failure(config, paths, folds=len(splits), metric=space.metric), interrupts.patient():
        if not any(file.exists() for file in paths.checkpoints(len(splits))):
            _check_time(study, config, splits, device)
        watch = _watched(study, progress, interrupts, _title(recipe), config)
        train_recorded(config, splits, paths, metric=space.metric, device=device, watch=watch, settings=study.settings)


@contextmanager
def recording_failure(config: TrainConfig, paths: TrainingPaths, *, folds: int, metric: str) -> Iterator[None]:
    """Record the failure of a configuration that the body trains into a folder, and drop other configurations' files.

    Raises:
        StudyError: The disk is full.
    """
    if paths.config.exists() and not is_training_of(paths, config):
        for outdated in (paths.result, *paths.checkpoints(folds)):
            outdated.unlink(missing_ok=True)
    try:
        with explain_full_disk(paths.dir):
            yield
    except Exception as error:
        failure = failure_of(error)
        if failure is None:
            raise
        write_result(paths, {"metric": metric, "failure": failure, "why": str(error).partition("\n")[0]})
        for checkpoint in paths.checkpoints(folds):
            checkpoint.unlink(missing_ok=True)


def _check_time(study: Study, config: TrainConfig, splits: Sequence[Splits], device: torch.device) -> None:
    """Raise OutOfTime if the training would end after the study's deadline."""
    if not study.deadline.is_set:
        return
    needed_s = seconds_per_epoch(config, splits[0], device=device) * config.epochs * len(splits)
    study.deadline.check(needed_s, trials=False)


def _watched(study: Study, progress: StudyView, interrupts: Interrupts, title: str, config: TrainConfig) -> Watch:
    deadline = study.deadline

    def watch(label: str) -> Callable[[EpochMetrics], None]:
        shown = progress.training(", ".join(filter(None, (title, label))), epochs=config.epochs)

        def epoch_ended(epoch: EpochMetrics) -> None:
            shown(epoch)
            interrupts.check()
            deadline.record()
            if epoch.epoch < config.epochs:
                deadline.check(epoch.elapsed_s / epoch.epoch, trials=False)

        return epoch_ended

    return watch


def _config_of(study: Study, recipe: Recipe) -> TrainConfig:
    return recipe.config.override({"seed": derive_seed(study.seed, "reference", recipe.name)})


def _is_trained(study: Study, recipe: Recipe) -> bool:
    paths = study.paths.reference(recipe.name)
    return paths.result.exists() and is_training_of(paths, _config_of(study, recipe))


def is_training_of(paths: TrainingPaths, config: TrainConfig) -> bool:
    """Whether the folder's training has this configuration; fields that its version lacked have their default."""
    try:
        return recipe_from_yaml(paths.config.read_text()).config == config
    except SpaceError:  # of a field that is no more
        return False
