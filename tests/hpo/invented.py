"""Studies without training: real spaces, samplers and pruners, and scores from a formula.

A study's folder and storage are as `hpo run` would write them, except for weights, pictures and metrics.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from core.data import Dataset
from hpo.analysis.study_data import StudyData
from hpo.confirmation.result import BASELINE as BASELINE_KEY
from hpo.confirmation.result import Confirmation, Contender
from hpo.confirmation.statistics import Interval
from hpo.space import SearchSpace, space_from_yaml
from hpo.space.pruner import build_pruner
from hpo.study import Study, open_study
from hpo.trials import BASELINE, COSTS, FAILURE, TRIAL_INDEX
from tests.hpo.confirmation.simulated import some_confirmation, some_contender

BASE = "base: {model: {widths: [8], blocks: [1]}, epochs: 10, batch_size: 128, augment: {flip: 0.0}"
SPACE = f"""
data: {{name: digits}}
{BASE}}}
pruner: {{name: rungs, rungs: [0.2, 0.5], keep: 0.5}}
sampler: {{name: random}}
search:
  optim.name: {{choices: [sgd, adamw]}}
  optim.lr_scale: {{low: 0.5, high: 20, log: true}}
  optim.momentum: {{low: 0.5, high: 0.95, when: {{optim.name: sgd}}}}
  loss.smoothing: {{low: 0.0, high: 0.2}}
"""
ALL_STATES: dict[str, Any] = {
    "trials": 12,
    "running": 2,
    "waiting": 3,
    "fails": lambda trial_index, _: "diverged" if trial_index in (5, 8) else "",
}
"""Arguments of `invented_study` for trials in every state."""

Fails = Callable[[int, Mapping[str, Any]], str]
"""(trial index, parameters) -> `diverged`, `oom`, …; empty if the trial can be trained."""


def never_fails(trial_index: int, params: Mapping[str, Any]) -> str:
    """Every trial can be trained."""
    return ""


def invented_study(
    space: SearchSpace | str,
    dataset: Dataset,
    name: str,
    *,
    trials: int,
    seed: int = 0,
    fails: Fails = never_fails,
    value: Callable[[Mapping[str, Any]], float] | None = None,
    running: int = 0,
    waiting: int = 0,
    costs: Callable[[int], dict[str, float]] | None = None,
) -> Study:
    """Make a study on its own journal with finished, running and waiting trials.

    Args:
        space: a space, or its YAML.
        dataset: the images.
        name: of the study.
        trials: finished ones.
        seed: of the study.
        fails: decides which trials fail.
        value: parameters -> a score in [0, 1]; None for a formula of learning rate and smoothing.
        running: trials after the finished ones.
        waiting: trials after the running ones.
        costs: trial index -> measured costs.
    """
    if isinstance(space, str):
        space = space_from_yaml(space, name)
    played = _played(space, trials + running, seed, fails, value or _usual_value, costs)
    study = open_study(space, name=name, dataset=dataset, seed=seed)
    study.settings.set_space(space)
    study.optuna.add_trials([_with_state(each, running=each.number >= trials) for each in played])
    total = trials + running + waiting
    study.queue.ensure_trials(total)
    study.settings.command = f"hpo run {space.name} --study {name} --trials {total}"
    return study


def _usual_value(params: Mapping[str, Any]) -> float:
    rate = float(params.get("optim.lr_scale", 3.0))
    return 0.95 - 0.05 * abs(math.log10(rate / 3.0)) - 0.2 * float(params.get("loss.smoothing", 0.0))


def _played(
    space: SearchSpace,
    trials: int,
    seed: int,
    fails: Fails,
    value: Callable[[Mapping[str, Any]], float],
    costs: Callable[[int], dict[str, float]] | None,
) -> list[FrozenTrial]:
    """Run the trials in memory, with the space's own pruner."""
    folds = space.baseline.data.folds or 1
    steps = space.baseline.epochs * folds
    study = optuna.create_study(
        direction=space.direction,
        sampler=optuna.samplers.RandomSampler(seed=seed),
        pruner=build_pruner(space.pruner, space.baseline.epochs, space.baseline.data.folds),
    )
    draw = random.Random(seed)
    for trial_index in range(trials):
        study.enqueue_trial(space.baseline_params() if trial_index == 0 else {}, user_attrs={TRIAL_INDEX: trial_index})
        trial = study.ask()
        params = space.suggest(trial)
        if trial_index == 0:
            trial.set_user_attr(BASELINE, True)
        if costs is not None:
            trial.set_user_attr(COSTS, costs(trial_index))
        failure = fails(trial_index, params)
        best, slowness = value(params), draw.uniform(0.05, 0.25) * steps
        pruned, score, epoch = False, 0.0, 0
        for epoch in range(1, steps + 1):
            good = best * (1 - 0.9 * math.exp(-epoch / slowness)) + draw.gauss(0, 0.004)
            score = good if space.direction == "maximize" else -math.log(max(good, 1e-3))
            if failure and epoch > steps // 3:
                break
            trial.report(score, epoch)
            pruned = epoch < steps and trial.should_prune()
            if pruned:
                break
        pace = 0.6 * float(params.get("model.width", 1.0)) * draw.uniform(0.9, 1.1)
        _remember(trial, failure, epoch, pace)
        if pruned or failure:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, score)
    return study.get_trials()


def _remember(trial: optuna.Trial, failure: str, epoch: int, pace: float) -> None:
    attributes = {
        "epochs": epoch,
        "kept_epoch": epoch,
        "elapsed_s": round(epoch * pace, 3),
        "images_per_s": round(1000 / pace, 1),
        "device": "CPU, 2 threads",
        **({FAILURE: failure} if failure else {}),
    }
    for key, item in attributes.items():
        trial.set_user_attr(key, item)


def _with_state(trial: FrozenTrial, *, running: bool) -> FrozenTrial:
    """Return the trial; a running one has half of its reports."""
    if not running:
        return trial
    reported = dict(list(trial.intermediate_values.items())[: max(1, len(trial.intermediate_values) // 2)])
    kept = {key: trial.user_attrs[key] for key in (TRIAL_INDEX, BASELINE) if key in trial.user_attrs}
    return create_trial(
        state=TrialState.RUNNING,
        params=trial.params,
        distributions=trial.distributions,
        intermediate_values=reported,
        user_attrs=kept,
    )


def invented_confirmation(
    data: StudyData, *, lead: float, evidence: bool, base: float = 0.9, half_width: float = 0.01, **changes: Any
) -> Confirmation:
    """Make a confirmation of five replicates in which the best trial leads the baseline by `lead`."""
    assert data.best is not None
    assert data.baseline is not None

    def contender(key: str, trial: FrozenTrial, mean: float, reason: str) -> Contender:
        scores = {replicate: (mean + half_width * (replicate - 2) / 2,) for replicate in range(5)}
        config, interval = data.study.config_of(trial), Interval(mean, half_width, 5)
        of_trial = {"trial": trial.number, "search_value": trial.value, "chosen_for": (reason,)}
        return some_contender(key, config, mean, scores=scores, interval=interval, **of_trial)

    fields: dict[str, Any] = {
        "study": data.study.name,
        "metric": data.metric,
        "direction": data.study.direction,
        "optimism": 0.011,
        "search_epochs": 120,
        "budget_epochs": 40,
        "epochs": 100,
        "trainings": 10,
        "replicates": 5,
        "elapsed_s": 75.0,
        "left_out": ("trial 3, for which it is too small",),
        "search_trials": data.finished,
    }
    best = contender(f"trial {data.best.number}", data.best, base + lead, "best validation score")
    return some_confirmation(
        best,
        contender(BASELINE_KEY, data.baseline, base, "the baseline"),
        evidence=evidence,
        advantage=Interval(lead, 0.006, 5),
        **(fields | changes),
    )
