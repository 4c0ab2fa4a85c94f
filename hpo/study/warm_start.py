"""Takes over another study's trials, where the new space could have drawn them.

A trial fits if the new space can express the very configuration that it trained. Everything but the search and the
base must be the same: what is measured, how, and on which images. What a trial meant to the old study, its base or a
recipe, does not hold for the new one by itself: a complete trial is the base or a recipe here if it is what these are
here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from itertools import count
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.errors import StudyError
from hpo.space import SearchSpace, diff
from hpo.storage.lease import LEASE
from hpo.study.metadata import config_of
from hpo.trials import BASELINE, OLD_NAMES, RECIPE, TAKEN_FROM, TRIAL_INDEX, effective_trials, trial_index_of

logger = logging.getLogger(__name__)

CONSTRAINT = "constraints:"
"""How Optuna begins the system attribute that `Trial.set_constraint` writes."""


def take_over_trials(
    new: optuna.Study,
    metadata: Mapping[str, Any],
    space: SearchSpace,
    *,
    old_name: str,
    old_metadata: Mapping[str, Any],
    old_trials: Iterable[FrozenTrial],
) -> int:
    """Copies the finished trials that fit, under the new space's distributions; returns how many.

    A trial keeps its slot. Where none is the new base, slot 0 is left for it, and the trial that had it moves to the
    first free one. A study that has trials already is left as it is, so that the same command again goes on.

    Args:
        record: what the new study searches.
        old_record: what the old one does.

    Raises:
        StudyError: the trials are not comparable, or none fits.
    """
    if new.get_trials(deepcopy=False):
        return 0
    apart = [
        line for line in diff(old_metadata["identity"], space.identity()) if not line.startswith(("search.", "base."))
    ]
    if apart:
        raise StudyError(f"--take-over {old_name}: its trials are not comparable: {'; '.join(apart)}; leave it out")
    if old_metadata["data"]["fingerprint"] != metadata["data"]["fingerprint"]:
        raise StudyError(f"--take-over {old_name}: it was begun with other images; leave it out")
    weights = old_metadata.get("weights") or {}
    if any(weights.get(file, known) != known for file, known in metadata["weights"].items()):
        raise StudyError(f"--take-over {old_name}: it was begun with other weights; leave it out")
    finished = [t for t in effective_trials(old_trials).values() if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    expressed = [(trial, space.express(config_of(old_metadata, trial.params))) for trial in finished]
    fitting = [(trial, params) for trial, params in expressed if params is not None]
    if not fitting:
        raise StudyError(f"--take-over {old_name}: none of its {len(finished)} finished trials fits; leave it out")
    parts = _parts(fitting, space)
    trial_indices = {trial.number: trial_index_of(trial) for trial, _ in fitting}
    if not any(BASELINE in attributes for attributes in parts.values()):
        free = next(trial_index for trial_index in count(1) if trial_index not in trial_indices.values())
        trial_indices = {number: trial_index or free for number, trial_index in trial_indices.items()}
    for trial, params in fitting:
        attributes = {TRIAL_INDEX: trial_indices[trial.number], **parts.get(trial.number, {})}
        new.add_trial(_copy_of(trial, old_name, int(old_metadata["seed"]), params, attributes, space))
    logger.info("study %s: %d of %d trials taken over from %s", new.study_name, len(fitting), len(finished), old_name)
    return len(fitting)


def _parts(fitting: Iterable[tuple[FrozenTrial, Mapping[str, Any]]], space: SearchSpace) -> dict[int, dict[str, Any]]:
    """Trial number -> the attributes that make it the new space's base, a recipe of it, or both; each only once."""
    wanted: list[tuple[str, Any, Mapping[str, Any] | None]] = [(BASELINE, True, space.baseline_params())]
    wanted += [(RECIPE, recipe.name, space.express(recipe.config)) for recipe in space.recipes]
    parts: dict[int, dict[str, Any]] = {}
    # A pruned trial has no final value for others to be compared to, so the base and the recipes are trained again.
    complete = [(trial, params) for trial, params in fitting if trial.state == TrialState.COMPLETE]
    for key, value, meant in wanted:
        number = next((trial.number for trial, params in complete if params == meant), None)
        if number is not None:
            parts.setdefault(number, {}).setdefault(key, value)
    return parts


def _copy_of(
    trial: FrozenTrial,
    old_name: str,
    old_seed: int,
    params: Mapping[str, Any],
    attributes: Mapping[str, Any],
    space: SearchSpace,
) -> FrozenTrial:
    from core.runtime import derive_seed  # with torch, which a study that takes nothing over does not need

    user_attrs = {k: v for k, v in trial.user_attrs.items() if k not in (LEASE, BASELINE, RECIPE, *OLD_NAMES.values())}
    user_attrs.setdefault(TAKEN_FROM, f"{old_name}/{trial.number}")
    user_attrs.setdefault("seed", derive_seed(old_seed, "trial", trial_index_of(trial)))
    copied = create_trial(
        state=trial.state,
        value=trial.value,
        params=dict(params),
        distributions={path: space.distributions[path] for path in params},
        user_attrs={**user_attrs, **attributes},
        system_attrs={k: v for k, v in trial.system_attrs.items() if k.startswith(CONSTRAINT)},
        intermediate_values=trial.intermediate_values,
    )
    copied.datetime_start, copied.datetime_complete = trial.datetime_start, trial.datetime_complete
    return copied
