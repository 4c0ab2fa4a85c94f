"""A study's trial as the text of a recipe, which `hpo train` and a space's `base` accept."""

from __future__ import annotations

import shlex
import textwrap

from optuna.trial import FrozenTrial, TrialState

from core.config import TrainConfig
from hpo.confirmation.candidates import best_trial
from hpo.confirmation.result import Confirmation, is_current, read_confirmation
from hpo.errors import StudyError
from hpo.space import dump_yaml, to_yaml
from hpo.study import Study
from hpo.text import PARTLY_LUCK
from hpo.trials import FAILURE, RECIPE, is_baseline

_WIDTH = 116  # characters in a line of a comment


def recipe_of(study: Study, trial: str) -> str:
    """Return a trial's configuration as a recipe, with its result.

    Args:
        trial: A number, or `best`: the confirmed winner if there is one.

    Raises:
        StudyError: There is no such trial, or it has no configuration yet.
    """
    return _best_recipe(study) if trial == "best" else _trial_recipe(study, _numbered(study, trial))


def _numbered(study: Study, trial: str) -> FrozenTrial:
    trials = study.optuna.get_trials(deepcopy=False)
    if not trial.isdecimal():
        raise StudyError(f"{trial!r} is no trial: give best, or a number from 0 to {len(trials) - 1}")
    if int(trial) >= len(trials):
        raise StudyError(f"study {study.name} has no trial {trial}; its trials are 0 to {len(trials) - 1}")
    return trials[int(trial)]


def _best_recipe(study: Study) -> str:
    confirmation = read_confirmation(study.paths.confirmation)
    if confirmation is not None and is_current(confirmation, study.counts().finished):
        return _confirmed_recipe(study, confirmation)
    best = best_trial(study)
    older = "" if confirmation is None else " since these trials ran"
    comment = (
        f"The best of the search, not confirmed{older}: {PARTLY_LUCK}. "
        f"hpo confirm {shlex.quote(study.name)} tests whether it is better than the baseline."
    )
    return _trial_recipe(study, best, comment)


def _confirmed_recipe(study: Study, confirmation: Confirmation) -> str:
    winner = confirmation.contender(confirmation.winner)
    comment = f"Confirmed on other seeds and splits: {confirmation.verdict}."
    description = f"the winner of study {study.name}: {winner.name}"
    metric = f"{confirmation.metric} " if confirmation.leader == confirmation.winner else ""
    result = f"{metric}{confirmation.verdict}"
    return _recipe(study, winner.train_config, description, result=result, when=confirmation.created, comment=comment)


def _trial_recipe(study: Study, trial: FrozenTrial, comment: str = "") -> str:
    if trial.state == TrialState.WAITING and not trial.params:
        raise StudyError(f"study {study.name}: trial {trial.number} is waiting, and has no configuration yet")
    description = f"trial {trial.number} of study {study.name}"
    description += ", the baseline" if is_baseline(trial) else ""
    description += f", recipe {trial.user_attrs[RECIPE]}" if RECIPE in trial.user_attrs else ""
    when = "" if trial.datetime_complete is None else f"{trial.datetime_complete:%Y-%m-%d}"
    return _recipe(
        study, study.config_of(trial), description, result=_result_of(study, trial), when=when, comment=comment
    )


def _result_of(study: Study, trial: FrozenTrial) -> str:
    if FAILURE in trial.user_attrs:
        return f"none: {trial.user_attrs[FAILURE]}"
    where = f"{study.metric} on the validation images"
    if trial.state == TrialState.COMPLETE and trial.value is not None:
        return f"{trial.value:.4f} {where}"
    reported, state = trial.intermediate_values, trial.state.name.lower()
    if not reported:
        return f"none: {state}"
    return f"{reported[max(reported)]:.4f} {where} at epoch {max(reported)}, {state}"


def _recipe(study: Study, config: TrainConfig, description: str, *, result: str, when: str, comment: str) -> str:
    metadata = study.metadata
    versions = ", ".join(f"{name} {version}" for name, version in metadata["versions"].items())
    notes = {
        "description": description,
        "source": f"hpo, search space {study.space_name}; {', '.join(filter(None, (when, versions)))}",
        "result": f"{result}; data {study.data_name}, fingerprint {metadata['data']['fingerprint'][:12]}",
    }
    lines = [f"# {line}\n" for line in textwrap.wrap(comment, _WIDTH, break_on_hyphens=False, break_long_words=False)]
    return "".join(lines) + dump_yaml(notes) + to_yaml(config)
