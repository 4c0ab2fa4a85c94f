"""Works a study off, trial by trial, in this process.

A slot is claimed in the storage, trained, and finished there before the next one is claimed. Whatever ends the process,
the trials that were finished are in the storage, and the one that ran goes on from its checkpoint under the same slot.
"""

from __future__ import annotations

import logging
from pathlib import Path

import optuna
import torch
from safetensors.torch import save_model

from core.config import TrainConfig
from core.data import Splits
from core.loop import seconds_per_epoch
from core.metrics import METRICS, confusion
from core.runtime import derive_seed
from hpo.interrupts import Interrupts
from hpo.objective import Listener, Objective, Outcome, failure_of
from hpo.pruner import rung_epochs
from hpo.report import attach_artifacts, confusion_matrix, learning_curves
from hpo.search_space import Recipe, RungsPruner, SearchSpace, to_yaml
from hpo.study import Study
from hpo.training import read_result, train_recorded, write_result

logger = logging.getLogger(__name__)

# Complete trials whose weights are kept for the refit: the best, and two in case a later confirmation prefers them.
KEPT_MODELS = 3


def estimate_s(
    space: SearchSpace, splits: Splits, *, trials: int, references: int, device: torch.device
) -> tuple[float, float]:
    """Seconds that so many trials and recipes take on this device, from timed steps: (all in full, as pruned).

    The second number supposes that each rung keeps the share that the rung pruner is told to keep; other pruners make
    no such promise, and both numbers are then the same. Recipes beside the study are never pruned.
    """
    epochs = space.base.epochs
    per_epoch = seconds_per_epoch(space.base, splits, device=device)
    in_full = (trials + references) * epochs * per_epoch
    if not isinstance(space.pruner, RungsPruner):
        return in_full, in_full
    share, before, visited = 1.0, 0, 0.0
    for rung in (*rung_epochs(space.pruner.rungs, epochs), epochs):
        visited += share * (rung - before)
        share, before = share * space.pruner.keep, rung
    return in_full, (trials * visited + references * epochs) * per_epoch


def run_study(
    study: Study,
    space: SearchSpace,
    splits: Splits,
    *,
    device: torch.device,
    listener: Listener,
    interrupts: Interrupts,
) -> None:
    """Runs the trials that wait, until none is left of the total.

    Raises:
        KeyboardInterrupt: a person's Ctrl-C, or SIGTERM; the running trial is back in the queue.
        Exception: a fault of ours; the running trial is back in the queue too.
    """
    objective = Objective(
        space, splits, study.paths, seed=study.seed, device=device, listener=listener, interrupts=interrupts
    )
    while (claimed := study.claim()) is not None:
        trial, slot = claimed
        try:
            outcome = objective(trial, slot)
            _keep(study, space, splits, outcome)
            study.finish(trial, outcome.state, outcome.value, failure=outcome.failure, attributes=outcome.attributes)
        except BaseException:
            study.release(trial)
            raise
        study.paths.checkpoint(slot).unlink(missing_ok=True)
        listener.trial_ended(outcome)
        del outcome  # the network, which the next trial's would otherwise have to fit beside
        interrupts.check()


def pending_references(study: Study, space: SearchSpace) -> list[Recipe]:
    """The recipes that are no trial of the study, and have not been trained as they stand now."""
    unslotted = {recipe.name for recipe in study.unslotted_recipes()}
    beside = [recipe for recipe in space.recipes if recipe.name in unslotted or space.express(recipe.config) is None]
    return [recipe for recipe in beside if not _is_trained(study, recipe)]


def run_references(
    study: Study,
    space: SearchSpace,
    splits: Splits,
    *,
    device: torch.device,
    listener: Listener,
    interrupts: Interrupts,
) -> None:
    """Trains the recipes that are no trial of the study, as long as a trial, each once in the study's life."""
    for recipe in pending_references(study, space):
        paths = study.paths.reference(recipe.name)
        config = _reference_config(study, recipe)
        if paths.config.exists() and paths.config.read_text() != to_yaml(config):
            for stale in (paths.result, paths.checkpoint):  # the recipe was edited
                stale.unlink(missing_ok=True)
        listener.trial_started(f"recipe {recipe.name}", config)
        try:
            with interrupts.let_through():
                train_recorded(
                    config,
                    splits,
                    paths,
                    metric=space.metric,
                    device=device,
                    on_epoch_end=lambda epoch: listener.epoch_ended(epoch, ""),
                )
        except Exception as error:
            failure = failure_of(error)
            if failure is None:
                raise
            write_result(paths, {"metric": space.metric, "failure": failure, "why": str(error).partition("\n")[0]})
        listener.reference_ended(recipe.name, read_result(paths) or {})


def _reference_config(study: Study, recipe: Recipe) -> TrainConfig:
    return recipe.config.override({"seed": derive_seed(study.seed, "reference", recipe.name)})


def _is_trained(study: Study, recipe: Recipe) -> bool:
    """Whether the recipe has a result, of the configuration that it is now."""
    paths = study.paths.reference(recipe.name)
    return paths.result.exists() and paths.config.read_text() == to_yaml(_reference_config(study, recipe))


def _keep(study: Study, space: SearchSpace, splits: Splits, outcome: Outcome) -> None:
    """Writes what outlives a trial: the weights of the best few, and the pictures that the dashboard shows."""
    if outcome.result is not None:
        _keep_weights(study, space, outcome)
    try:
        attach_artifacts(study.optuna, outcome.number, _draw(study, space, splits, outcome), study.paths.artifacts)
    except Exception as error:  # a picture is not worth a trial
        logger.warning("trial %d: its pictures are missing (%s: %s)", outcome.number, type(error).__name__, error)


def _draw(study: Study, space: SearchSpace, splits: Splits, outcome: Outcome) -> list[Path]:
    """Draws a trial's pictures; returns all its files that the dashboard is to show."""
    number, files = outcome.number, []
    if outcome.history:
        files.append(study.paths.trial_curves(number))
        rows = [epoch.row(space.metric) for epoch in outcome.history]
        learning_curves(rows, files[-1], title=f"trial {number}", metric=space.metric)
    if outcome.result is not None and outcome.result.val_logits is not None:
        files.append(study.paths.trial_confusion(number))
        table = confusion(outcome.result.val_logits, splits.labels[splits.val]).cpu()
        confusion_matrix(table, splits.classes, files[-1], title=f"trial {number}, validation images")
    if outcome.config is not None:
        files.append(study.paths.trial_config(number))
    return files


def _keep_weights(study: Study, space: SearchSpace, outcome: Outcome) -> None:
    """Keeps this trial's weights if it is among the best few, and lets go of those that no longer are."""
    assert outcome.result is not None
    assert outcome.value is not None
    sign = 1 if METRICS[space.metric] == "maximize" else -1
    values = {
        trial.number: sign * trial.value
        for trial in study.optuna.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        if trial.value is not None
    }
    values[outcome.number] = sign * outcome.value
    best = sorted(values, key=lambda number: (-values[number], number))[:KEPT_MODELS]
    if outcome.number in best:
        weights = study.paths.trial_model(outcome.number)
        temporary = weights.with_suffix(".tmp")
        save_model(outcome.result.model, str(temporary))
        temporary.replace(weights)
    for number in values.keys() - set(best):
        study.paths.trial_model(number).unlink(missing_ok=True)
