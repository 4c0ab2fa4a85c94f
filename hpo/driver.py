"""Works a study off, trial by trial, in this process.

A slot is claimed in the storage, trained, and finished there before the next one is claimed. Whatever ends the process,
the trials that were finished are in the storage, and the one that ran goes on from its checkpoint under the same slot.
"""

from __future__ import annotations

import logging

import optuna
import torch
from safetensors.torch import save_model

from core.data import Splits
from core.loop import seconds_per_epoch
from core.metrics import METRICS, confusion
from core.runtime import derive_seed
from hpo.interrupts import Interrupts
from hpo.objective import Listener, Objective, Outcome
from hpo.pruner import rung_epochs
from hpo.report import attach_artifacts, confusion_matrix, learning_curves
from hpo.search_space import SearchSpace
from hpo.study import Study
from hpo.training import train_recorded

logger = logging.getLogger(__name__)

# Complete trials whose weights are kept for the refit: the best, and two in case a later confirmation prefers them.
KEPT_MODELS = 3


def estimate_s(space: SearchSpace, splits: Splits, *, trials: int, device: torch.device) -> tuple[float, float]:
    """Seconds that so many trials take on this device, from timed steps of the base: (all in full, as pruned).

    The second number supposes that each rung keeps the share that the rung pruner is told to keep; other pruners make
    no such promise, and both numbers are then the same.
    """
    epochs = space.base.epochs
    per_epoch = seconds_per_epoch(space.base, splits, device=device)
    in_full = trials * epochs * per_epoch
    if space.pruner.name != "rungs":
        return in_full, in_full
    share, before, visited = 1.0, 0, 0.0
    for rung in (*rung_epochs(space.pruner.rungs, epochs), epochs):
        visited += share * (rung - before)
        share, before = share * space.pruner.keep, rung
    return in_full, trials * visited * per_epoch


def run_study(
    study: Study, space: SearchSpace, splits: Splits, *, total: int, device: torch.device, listener: Listener
) -> None:
    """Runs trials until `total` are complete or pruned.

    Raises:
        KeyboardInterrupt: a person's Ctrl-C, or SIGTERM; the running trial is back in the queue.
        Exception: a fault of ours; the running trial is back in the queue too.
    """
    study.reap()
    study.ensure_slots(total)
    with Interrupts() as interrupts:
        objective = Objective(
            space,
            splits,
            study.paths,
            seed=study.seed,
            device=device,
            listener=listener,
            interrupts=interrupts,
        )
        while (claimed := study.claim()) is not None:
            trial, slot = claimed
            try:
                outcome = objective(trial, slot)
            except BaseException:
                study.release(trial)
                raise
            _keep(study, space, splits, outcome)
            study.finish(trial, outcome.state, outcome.value, failure=outcome.failure, attributes=outcome.attributes)
            study.paths.checkpoint(slot).unlink(missing_ok=True)
            listener.trial_ended(outcome)
            interrupts.check()


def run_references(
    study: Study, space: SearchSpace, splits: Splits, *, device: torch.device, listener: Listener
) -> None:
    """Trains the recipes that the search space cannot express, as long as a trial, each once in the study's life."""
    for recipe in space.recipes:
        paths = study.paths.reference(recipe.name)
        if space.express(recipe.config) is not None or paths.result.exists():
            continue  # it is a trial, or has been trained
        config = recipe.config.override({"seed": derive_seed(study.seed, "reference", recipe.name)})
        listener.trial_started(f"recipe {recipe.name}", config)
        train_recorded(
            config,
            splits,
            paths,
            metric=space.metric,
            device=device,
            on_epoch_end=lambda epoch: listener.epoch_ended(epoch, ""),
        )


def _keep(study: Study, space: SearchSpace, splits: Splits, outcome: Outcome) -> None:
    """Writes what outlives a trial: its pictures for the dashboard, and the weights of the best few."""
    pictures = []
    if outcome.history:
        pictures.append(study.paths.trial_curves(outcome.number))
        rows = [epoch.row() for epoch in outcome.history]
        learning_curves(rows, pictures[0], title=f"trial {outcome.number}", metric=space.metric)
    if outcome.result is not None and outcome.result.val_logits is not None:
        pictures.append(study.paths.trial_confusion(outcome.number))
        table = confusion(outcome.result.val_logits, splits.labels[splits.val]).cpu()
        confusion_matrix(table, splits.classes, pictures[-1], title=f"trial {outcome.number}, validation images")
        _keep_weights(study, space, outcome)
    if outcome.config is not None:
        pictures.append(study.paths.trial_config(outcome.number))
    attach_artifacts(study.optuna, outcome.number, pictures, study.paths.artifacts)


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
