"""The best of each kind of training in a study: probe, fine-tuning, and training from scratch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from core.config import TrainConfig
from hpo.analysis.baselines import key_of
from hpo.confirmation.result import Confirmation, Contender
from hpo.confirmation.statistics import Interval, corrected_interval, effective_share, failed, paired
from hpo.paths import LONG_BASELINE
from hpo.space import load_recipe
from hpo.study.results import read_recipe_runs
from hpo.trials import effective_trials

if TYPE_CHECKING:
    from hpo.study import Study

PROBE, FINE_TUNED, FROM_SCRATCH = "probe", "fine-tuning", "from scratch"


def kind_of(config: TrainConfig) -> str:
    """Return the kind of a training: `probe`, `fine-tuning` or `from scratch`."""
    if config.is_probe:
        return PROBE
    return FINE_TUNED if config.model.pretrained else FROM_SCRATCH


@dataclass(frozen=True)
class Best:
    """The best configuration of one kind."""

    kind: str
    key: str
    """`baseline`, `trial 12` or `recipe NAME`."""
    network: str
    """`model.name`."""
    value: float
    """Confirmed if all kinds are, else of the search."""
    behind: Interval | None
    """How much worse it is than the first kind, with its 95 % interval if both are confirmed; None for the first."""


@dataclass(frozen=True)
class _Entry:
    kind: str
    key: str
    network: str
    value: float | None
    contender: Contender | None


def best_of_kinds(study: Study, confirmation: Confirmation | None) -> list[Best]:
    """Return the best of each kind, the best kind first; empty if there is one kind only.

    Scores are confirmed ones if each kind has one, and otherwise those of the search's one split.
    """
    entries = list(_entries(study, confirmation))
    kinds = {entry.kind for entry in entries if entry.value is not None}
    confirmed = {entry.kind for entry in entries if _mean(entry) is not None} >= kinds
    ranked: dict[str, _Entry] = {}
    score = _mean if confirmed else _searched
    for entry in entries:
        value, before = score(entry), ranked.get(entry.kind)
        if value is None:
            continue
        if before is None or study.sign * value > study.sign * (score(before) or 0.0):
            ranked[entry.kind] = entry
    if len(ranked) < 2:
        return []
    order = sorted(ranked.values(), key=lambda entry: -study.sign * (score(entry) or 0.0))
    return [
        Best(
            entry.kind,
            entry.key,
            entry.network,
            score(entry) or 0.0,
            None if entry is order[0] else _behind(study, confirmation, order[0], entry, confirmed=confirmed),
        )
        for entry in order
    ]


def _mean(entry: _Entry) -> float | None:
    one = entry.contender
    return None if one is None or one.interval is None else one.interval.mean


def _searched(entry: _Entry) -> float | None:
    return entry.value


def _behind(
    study: Study, confirmation: Confirmation | None, first: _Entry, entry: _Entry, *, confirmed: bool
) -> Interval:
    a, b = first.contender, entry.contender
    if confirmed and confirmation is not None and a is not None and b is not None:
        lead = paired(a.scores, b.scores, maximize=study.direction == "maximize")
        known = confirmation.test_share is not None and lead.values and not (failed(a.scores) or failed(b.scores))
        if known and confirmation.test_share is not None:
            return corrected_interval(
                lead.values,
                test_share=effective_share(
                    lead.numbers, test_share=confirmation.test_share, per_repeat=confirmation.per_repeat
                ),
                replicates=lead.replicates,
                resolution=confirmation.resolution,
            )
        return Interval(study.sign * ((_mean(first) or 0.0) - (_mean(entry) or 0.0)), math.inf, 1)
    return Interval(study.sign * ((first.value or 0.0) - (entry.value or 0.0)), math.inf, 1)


def _entries(study: Study, confirmation: Confirmation | None) -> Iterator[_Entry]:
    """The complete trials and the recipes, with their trainings in the confirmation."""
    contenders = {} if confirmation is None else {one.key: one for one in confirmation.contenders}
    for trial in effective_trials(study.optuna.get_trials(deepcopy=False)).values():
        if trial.state == TrialState.COMPLETE:
            key = key_of(trial)
            yield _entry(key, study.config_of(trial), trial.value, contenders.pop(key, None))
    for name, result in read_recipe_runs(study.paths).items():
        if name == LONG_BASELINE:  # it is no candidate of the refit
            continue
        key, value = f"recipe {name}", _finite(result)
        config = load_recipe(study.paths.reference(name).config).config
        yield _entry(key, config, value, contenders.pop(key, None))
    for one in contenders.values():  # the baseline if it was no trial
        yield _entry(one.key, one.train_config, one.search_value, one)


def _finite(result: Mapping[str, Any]) -> float | None:
    value = float(result.get("value", math.nan))
    return value if math.isfinite(value) else None


def _entry(key: str, config: TrainConfig, value: float | None, contender: Contender | None) -> _Entry:
    return _Entry(kind_of(config), key, config.model.name, value, contender)
