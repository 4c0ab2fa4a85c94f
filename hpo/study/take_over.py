"""Import the trials of another study whose configurations the new space can express.

Everything except the search and the baseline must be the same: objective, training and images.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from itertools import count
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.errors import StudyError
from hpo.storage.lease import LEASE
from hpo.study.code import changed_files
from hpo.study.metadata import config_of
from hpo.trials import (
    BASELINE,
    CONSTRAINT,
    RECIPE,
    RUNG_LOSS,
    TAKEN_FROM,
    TRIAL_INDEX,
    effective_trials,
    trial_index_of,
    with_current_names,
)

if TYPE_CHECKING:
    from hpo.space import SearchSpace
    from hpo.study.study import Study

logger = logging.getLogger(__name__)


def import_trials(study: optuna.Study, metadata: Mapping[str, Any], space: SearchSpace, *, source: Study) -> None:
    """Copy the fitting finished trials of another study, with the new space's distributions.

    A trial keeps its index. If none of them is the new baseline, index 0 is left to that, and the trial with index 0
    gets the first free one. A study that has trials already is not changed, so that the same command can resume it.
    """
    if study.get_trials(deepcopy=False):
        return
    _check_comparable(source, metadata, space)
    finished = [
        trial
        for trial in effective_trials(source.optuna.get_trials(deepcopy=False)).values()
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    ]
    expressed = [(trial, space.express(config_of(source.metadata, trial.params))) for trial in finished]
    fitting = [(trial, params) for trial, params in expressed if params is not None]
    if not fitting:
        raise StudyError(f"--take-over {source.name}: none of its {len(finished)} finished trials fits; leave it out")
    roles = _roles(fitting, space)
    trial_indices = {trial.number: trial_index_of(trial) for trial, _ in fitting}
    if not any(BASELINE in attributes for attributes in roles.values()):
        free = next(trial_index for trial_index in count(1) if trial_index not in trial_indices.values())
        trial_indices = {number: trial_index or free for number, trial_index in trial_indices.items()}
    for trial, params in fitting:
        attributes = {TRIAL_INDEX: trial_indices[trial.number], **roles.get(trial.number, {})}
        study.add_trial(_copy_of(trial, source, params, attributes, space))
    taken, there = len(fitting), len(finished)
    logger.info("study %s: %d of %d trials taken over from %s", study.study_name, taken, there, source.name)


def _check_comparable(source: Study, metadata: Mapping[str, Any], space: SearchSpace) -> None:
    from hpo.space import diff

    differences = [
        line
        for line in diff(source.metadata["identity"], space.identity())
        if not line.startswith(("search.", "base."))
    ]
    weights, code = source.metadata.get("weights") or {}, source.metadata.get("code") or {}
    if differences:
        problem = f"its trials are not comparable: {'; '.join(differences)}"
    elif source.metadata["data"]["fingerprint"] != metadata["data"]["fingerprint"]:
        problem = "it was begun with other images"
    elif source.metadata["data"].get("given_val") != metadata["data"].get("given_val"):
        problem = "it was begun with other validation images"
    elif any(weights.get(file, known) != known for file, known in metadata["weights"].items()):
        problem = "it was begun with other weights"
    elif any(changed_files(code.get(model, known), known) for model, known in (metadata.get("code") or {}).items()):
        problem = "it was begun with other code"
    else:
        return
    raise StudyError(f"--take-over {source.name}: {problem}; leave it out")


def _roles(fitting: Iterable[tuple[FrozenTrial, Mapping[str, Any]]], space: SearchSpace) -> dict[int, dict[str, Any]]:
    """Trial number -> the attributes that make it the baseline, a recipe of the space, or both; each only once."""
    wanted: list[tuple[str, Any, Mapping[str, Any] | None]] = [(BASELINE, True, space.baseline_params())]
    wanted += [(RECIPE, recipe.name, space.express(recipe.config)) for recipe in space.recipes]
    roles: dict[int, dict[str, Any]] = {}
    # The baseline and the recipes must be complete: other trials are compared to their final value.
    complete = [(trial, params) for trial, params in fitting if trial.state == TrialState.COMPLETE]
    for key, value, meant in wanted:
        number = next((trial.number for trial, params in complete if params == meant), None)
        if number is not None:
            roles.setdefault(number, {}).setdefault(key, value)
    return roles


def _copy_of(
    trial: FrozenTrial, source: Study, params: Mapping[str, Any], attributes: Mapping[str, Any], space: SearchSpace
) -> FrozenTrial:
    from core.seeds import derive_seed

    known = with_current_names(trial.user_attrs)
    user_attrs = {key: value for key, value in known.items() if key not in (LEASE, BASELINE, RECIPE)}
    user_attrs.setdefault(TAKEN_FROM, f"{source.name}/{trial.number}")
    user_attrs.setdefault("seed", derive_seed(source.seed, "trial", trial_index_of(trial)))
    copied = create_trial(
        state=trial.state,
        value=trial.value,
        params=dict(params),
        distributions={path: space.distributions[path] for path in params},
        user_attrs={**user_attrs, **attributes},
        system_attrs={k: v for k, v in trial.system_attrs.items() if k.startswith((CONSTRAINT, RUNG_LOSS))},
        intermediate_values=trial.intermediate_values,
    )
    copied.datetime_start, copied.datetime_complete = trial.datetime_start, trial.datetime_complete
    return copied
