"""Copy a study under another name, and delete one; the same for every kind of storage."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.storages import BaseStorage

from hpo.storage.names import LONG
from hpo.storage.optuna_access import attributes_of, id_of, set_attribute, storage_of, trial_id

_OF_TRIAL = re.compile(r"dashboard:(\d+):")  # notes of optuna-dashboard, by the id of a trial in its storage

Attributes = Mapping[str, Any]


def copy_stored(
    study: optuna.Study,
    storage: BaseStorage,
    name: str,
    *,
    last: str,
    change: Callable[[Attributes], Attributes] = lambda attributes: attributes,
) -> None:
    """Copy a study with all its trials, which keep their numbers, and with the notes of the dashboard.

    Args:
        storage: Where the copy is made.
        name: Of the copy, which must not exist.
        last: Attribute that is written last: a copy without it is incomplete.
        change: Returns the attributes of the copy.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    copied = optuna.create_study(study_name=name, storage=storage, directions=study.directions)
    for trial in study.get_trials(deepcopy=False):
        storage.create_new_trial(id_of(copied), template_trial=trial)
    pairs = zip(study.get_trials(deepcopy=False), copied.get_trials(deepcopy=False), strict=True)
    ids = {str(trial_id(old)): str(trial_id(new)) for old, new in pairs}
    for key, value in storage_of(study).get_study_system_attrs(id_of(study)).items():
        if key not in LONG.values():
            key = _OF_TRIAL.sub(lambda found: f"dashboard:{ids.get(found[1], found[1])}:", key)
            storage.set_study_system_attr(id_of(copied), key, value)
    attributes = change(attributes_of(study))
    for key in sorted(attributes, key=lambda key: key == last):
        set_attribute(copied, key, attributes[key])


def load_stored(storage: BaseStorage, name: str) -> optuna.Study | None:
    """Return a study of a storage, or None."""
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return None


def delete_stored(storage: BaseStorage, name: str) -> None:
    """Delete a study, if there is one."""
    if load_stored(storage, name) is not None:
        optuna.delete_study(study_name=name, storage=storage)
