"""Parts of Optuna without a public name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpo.storage.names import LONG

if TYPE_CHECKING:
    from typing import TypeAlias

    import optuna
    from optuna.artifacts._protocol import ArtifactStore
    from optuna.samplers import CmaEsSampler, GPSampler, QMCSampler, TPESampler
    from optuna.search_space import IntersectionSearchSpace
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial

    OptunaArtifactStore: TypeAlias = ArtifactStore


def storage_of(study: optuna.Study) -> BaseStorage:
    """Return the storage of a study."""
    return study._storage


def id_of(study: optuna.Study) -> int:
    """Return a study's id in its storage."""
    return study._study_id


def attributes_of(study: optuna.Study) -> dict[str, Any]:
    """Return the attributes of a study that hpo or a user has set, without copying their values."""
    system = study._storage.get_study_system_attrs(study._study_id)
    long = {key: system[name] for key, name in LONG.items() if name in system}
    return {**study._storage.get_study_user_attrs(study._study_id), **long}


def attribute_of(study: optuna.Study, key: str, default: Any = None) -> Any:
    """Return an attribute of a study without copying it."""
    if key in LONG:
        system = study._storage.get_study_system_attrs(study._study_id)
        if LONG[key] in system:
            return system[LONG[key]]
    return study._storage.get_study_user_attrs(study._study_id).get(key, default)


def set_attribute(study: optuna.Study, key: str, value: Any) -> None:
    """Set an attribute of a study; see `LONG`."""
    if key in LONG:
        study._storage.set_study_system_attr(study._study_id, LONG[key], value)
    else:
        study.set_user_attr(key, value)


def trial_id(trial: FrozenTrial | Trial) -> int:
    """Return a trial's id in its storage."""
    return trial._trial_id


def trial_by_number(study: optuna.Study, number: int) -> FrozenTrial:
    """Return a trial as it is now."""
    storage = study._storage
    return storage.get_trial(storage.get_trial_id_from_study_id_trial_number(study._study_id, number))


def get_trials_cached(study: optuna.Study, *, use_cache: bool) -> list[FrozenTrial]:
    """Return all trials without copying them, or those of the last call in this thread."""
    return study._get_trials(deepcopy=False, use_cache=use_cache)


def forget_cached_trials(study: optuna.Study) -> None:
    """Let the sampler read the trials anew, as `Study.ask` does."""
    study._thread_local.cached_all_trials = None


def set_search_space(sampler: TPESampler | CmaEsSampler | GPSampler, space: IntersectionSearchSpace) -> None:
    """Replace a sampler's relative search space."""
    name = "_search_space" if hasattr(sampler, "_search_space") else "_intersection_search_space"
    assert hasattr(sampler, name), f"{type(sampler).__name__} has no search space of this name in this Optuna"
    setattr(sampler, name, space)


def set_qmc_point(sampler: QMCSampler, index: int) -> None:
    """Draw the point of this index; by Optuna's count a retry would skip one."""
    sampler._find_sample_id = lambda study, search_space: index  # type: ignore[method-assign]  # noqa: ARG005
