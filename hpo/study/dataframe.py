"""A study as a dataframe: one row per trial index, every column flat, for pandas and CSV.

Interrupted attempts have no row. The last value of a pruned trial was measured after fewer epochs, so it is not in
`value` but in `last_value`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from hpo.space.pruner import places_of
from hpo.storage.lease import LEASE
from hpo.trials import (
    BASELINE,
    CRASHES,
    FAILURE,
    LET_THROUGH,
    OLD_NAMES,
    PAUSED_BY,
    RECIPE,
    REPLICATE_OF,
    RESUMED_EPOCH,
    TAKEN_FROM,
    TRIAL_INDEX,
    WARM_START,
    effective_trials,
    is_baseline,
    state_of,
    trial_index_of,
)

if TYPE_CHECKING:
    import pandas

    from hpo.study.study import Study

# Column -> nullable type in pandas. Every study has them, in this order.
_FIXED = {
    "number": "int64",
    "trial_index": "int64",
    "state": "str",
    "failure": "str",
    "value": "float64",
    "last_value": "float64",
    "baseline": "bool",
    "recipe": "str",
    "epochs": "Int64",
    "kept_epoch": "Int64",
    "elapsed_s": "float64",
    "images_per_s": "float64",
    "started": "datetime64[us]",
    "ended": "datetime64[us]",
    "device": "str",
    "torch_threads": "Int64",
    LET_THROUGH: "Int64",
    REPLICATE_OF: "Int64",
    TAKEN_FROM: "str",
    WARM_START: "str",
    CRASHES: "Int64",
    RESUMED_EPOCH: "Int64",
}
_NOT_SHOWN = {TRIAL_INDEX, LEASE, PAUSED_BY, FAILURE, BASELINE, RECIPE, *OLD_NAMES.values()}
"""Attributes that other columns show, or that are internal."""


def trials_frame(study: Study) -> pandas.DataFrame:
    """Return one row per trial index, in the order of the trials' numbers.

    Returns:
        First the same columns for every study: `number`, `trial_index`, `state` (complete, pruned, running, paused,
        waiting), `failure` (diverged, oom, invalid, crashed; then `state` is pruned), `value`, `last_value`,
        `baseline`, `recipe`, `epochs` (trained), `kept_epoch`, `elapsed_s`, `images_per_s`, `started`, `ended` (local
        time), `device` and others. Then `params.optim.lr_scale` etc., one for each searched field; all other
        attributes; and for each rung `rungs.6` (the value), `rungs.6.rank` and `rungs.6.of` (the place among how many).
    """
    import pandas  # takes half a second

    trials = sorted(effective_trials(study.optuna.get_trials(deepcopy=False)).values(), key=lambda trial: trial.number)
    rows = [_row(trial) for trial in trials]
    searched = _searched(study.metadata["identity"])
    more = sorted(dict.fromkeys(name for row in rows for name in row if name not in _FIXED | searched), key=_order)
    columns = {}
    for name in (*_FIXED, *searched, *more):
        values = [row.get(name) for row in rows]
        columns[name] = pandas.Series(values, dtype=_FIXED.get(name) or searched.get(name) or _kind(values))
    return pandas.DataFrame(columns)


def _searched(identity: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for key, parameter in identity.items():
        section, _, path = key.partition(".")
        if section == "search":
            # Optuna takes scalars only, so a list among the choices is stored as its JSON text.
            values = parameter.get("choices") or [parameter["low"], parameter["high"]]
            found[f"params.{path}"] = _kind([str(value) if isinstance(value, list) else value for value in values])
    return found


def _row(trial: FrozenTrial) -> dict[str, Any]:
    attributes = trial.user_attrs
    reported = trial.intermediate_values
    row: dict[str, Any] = {
        "number": trial.number,
        "trial_index": trial_index_of(trial),
        "state": state_of(trial),
        "failure": attributes.get(FAILURE),
        "value": trial.value if trial.state == TrialState.COMPLETE else None,
        "last_value": reported[max(reported)] if reported else None,
        "baseline": is_baseline(trial),
        "recipe": attributes.get(RECIPE),
        "started": trial.datetime_start,
        "ended": trial.datetime_complete,
    }
    row |= {f"params.{path}": value for path, value in trial.params.items()}
    row |= dict(_flat({name: value for name, value in attributes.items() if name not in _NOT_SHOWN}))
    for rung, place in places_of(trial).items():
        row |= {
            f"rungs.{rung}": reported.get(rung),
            f"rungs.{rung}.rank": place.rank,
            f"rungs.{rung}.of": place.of,
        }
    return row


def _flat(attributes: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested values under dotted names; items of lists are counted from 1."""
    for key, value in attributes.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            yield from _flat({str(place): item for place, item in enumerate(value, start=1)}, f"{name}.")
        else:
            yield name, value


def _order(name: str) -> tuple[bool, list[tuple[int, str]]]:
    """Sort key: rungs last, and numbers in a name by size, so that item 10 follows item 9."""
    parts = name.split(".")
    if parts[0] == "rungs":
        return True, [(int(parts[1]), "")]
    return False, [(int(part) if part.isdigit() else 0, part) for part in parts]


def _kind(values: Iterable[Any]) -> str:
    """Column type; integers stay integers even if values are missing."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int}:
        return "Int64"
    if kinds <= {int, float}:
        return "float64"
    return "str" if kinds == {str} else "object"
