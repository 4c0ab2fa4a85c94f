"""Types of a journal's records. Without checksums, as in earlier versions, a wrong one would fail far from its line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any

from optuna.trial import TrialState

from hpo.storage.names import LONG, METADATA
from hpo.trials import (
    ARTIFACT,
    BASELINE,
    CONFIG,
    CONSTRAINT,
    CRASHES,
    FAILURE,
    INTERRUPTED,
    LET_THROUGH,
    OLD_NAMES,
    PAUSED,
    PAUSED_BY,
    REASON,
    RECIPE,
    REPLICATE_OF,
    RESUMED_EPOCH,
    RUNG_LOSS,
    STANDARD_ERROR,
    STOPPED,
    TAKEN_FROM,
    TRIAL_INDEX,
    VAL_LOSS,
    WARM_START,
)

_Number = int | float

_OF_RECORD: Mapping[str, Callable[[Any], bool] | type | UnionType] = {
    **dict.fromkeys(("op_code", "study_id", "trial_id"), int),
    **dict.fromkeys(("study_name", "worker_id", "param_name", "distribution"), str),
    **dict.fromkeys(("datetime_start", "datetime_complete"), str | None),
    "directions": list,
    "state": int,
    "step": int,
    "value": _Number | None,
    "values": lambda values: values is None or _are(values, list, _Number),
    "intermediate_value": _Number | None,
    "param_value_internal": _Number,
    "params": lambda values: values is None or _are(values, dict, _Number),
    "intermediate_values": lambda values: values is None or _are(values, dict, _Number | None),
    "distributions": lambda values: values is None or _are(values, dict, str),
    **dict.fromkeys(("user_attrs", "system_attrs"), dict),
    **dict.fromkeys(("user_attr", "system_attr"), dict),
    "lease": dict,
}
_OF_TRIAL: Mapping[str, type | UnionType] = {
    **dict.fromkeys(
        (TRIAL_INDEX, OLD_NAMES[TRIAL_INDEX], LET_THROUGH, PAUSED, CRASHES, REPLICATE_OF, RESUMED_EPOCH), int
    ),
    **dict.fromkeys(("epochs", "kept_epoch", "seed", "torch_threads", "replicate"), int),
    **dict.fromkeys((VAL_LOSS, STANDARD_ERROR, "elapsed_s", "images_per_s"), _Number | None),
    **dict.fromkeys((BASELINE, OLD_NAMES[BASELINE], INTERRUPTED), bool),
    **dict.fromkeys((RECIPE, FAILURE, REASON, STOPPED, TAKEN_FROM, WARM_START, "device", "candidate"), str | None),
    **dict.fromkeys((PAUSED_BY, "fold_values"), list),
    CONFIG: dict,
    "lease": dict | None,
    "fixed_params": dict,
}
_OF_TRIAL_BY_PREFIX: Mapping[str, type | UnionType] = {
    ARTIFACT: str,
    CONSTRAINT: _Number,
    RUNG_LOSS: _Number,
    "rung:": list,
}
_OF_STUDY: Mapping[str, type | UnionType] = {
    METADATA: dict,
    LONG[METADATA]: dict,
    LONG["space"]: str | None,
    LONG["length_probe"]: dict | None,
    **dict.fromkeys(("trials", "retries"), int | None),
    **dict.fromkeys(("command", "space", "weights", "confirmation", "artifacts"), str | None),
    **dict.fromkeys(("deadline", "length_probe"), dict | None),
    "packing": dict,
    "patience": bool,
}


def check_types(record: Mapping[str, Any], *, ours: bool) -> None:
    """Raise ValueError unless the fields of a record have the types with which they are written.

    Args:
        ours: Whether it is of a study of hpo, whose attributes are checked too.
    """
    for name, value in record.items():
        _check(name, value, _OF_RECORD.get(name))
    begins = METADATA in record.get("user_attr", ()) or LONG[METADATA] in record.get("system_attr", ())
    if not (ours or begins):
        return
    if record.get("state") == TrialState.COMPLETE and record.get("values") is None and record.get("value") is None:
        raise ValueError("a complete trial has no value")
    of_trial = "trial_id" in record or "user_attrs" in record
    for field in ("user_attr", "system_attr", "user_attrs", "system_attrs"):
        for name, value in (record.get(field) or {}).items():
            _check(name, value, _of_trial(name) if of_trial else _OF_STUDY.get(name))


def _of_trial(name: str) -> type | UnionType | None:
    prefix, colon, _ = name.partition(":")
    return _OF_TRIAL_BY_PREFIX.get(prefix + colon) if colon else _OF_TRIAL.get(name)


def _check(name: str, value: Any, expected: Callable[[Any], bool] | type | UnionType | None) -> None:
    if expected is None:
        return
    if isinstance(expected, type | UnionType):
        right = isinstance(value, expected) and (not isinstance(value, bool) or expected is bool)
    else:
        right = expected(value)
    if not right:
        raise ValueError(f"{name} has the wrong type")


def _are(values: Any, holder: type[list[Any]] | type[dict[str, Any]], of: type | UnionType) -> bool:
    if not isinstance(values, holder):
        return False
    each = values.values() if isinstance(values, dict) else values
    return all(isinstance(value, of) and not isinstance(value, bool) for value in each)
