"""The first trials of a study: configurations that were the best on the images of another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from hpo.errors import StudyError
from hpo.study.metadata import config_of
from hpo.trials import WARM_START, best_first, effective_trials

if TYPE_CHECKING:
    from hpo.space import SearchSpace
    from hpo.study.queue import Queued
    from hpo.study.study import Study

MOST = 4
"""Configurations that are tried; more gained nothing in `tests/benchmarks/bench_warm_start.py`."""


def warm_starts(space: SearchSpace, source: Study) -> list[Queued]:
    """Return the best complete trials of another study, as parameters and user attributes of trials to queue.

    A parameter whose value is out of the space's range is left to the sampler.

    Raises:
        StudyError: The other study has no complete trial that differs from the space's baseline.
    """
    trials = effective_trials(source.optuna.get_trials(deepcopy=False)).values()
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    seen: list[Mapping[str, Any]] = [{}, space.baseline_params()]
    found: list[Queued] = []
    for trial in sorted(complete, key=lambda trial: best_first(trial, source.sign)):
        if len(found) == MOST:
            break
        params = space.shared_params(config_of(source.metadata, trial.params))
        if params not in seen:
            seen.append(params)
            found.append((params, {WARM_START: f"{source.name}/{trial.number}"}))
    if not found:
        why = "no complete trial" if not complete else "no trial other than this space's baseline"
        raise StudyError(f"--warm-start {source.name}: it has {why}; leave it out")
    return found
