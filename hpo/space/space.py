"""`SearchSpace`: a checked search space, which maps between Optuna's parameters and `TrainConfig`.

A parameter whose condition is not met is inactive: it is not suggested, keeps the baseline's value, and meets no
condition.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.config import OWN_PARTS, READING_FIELDS, REFERENCE_LR, DataConfig, TrainConfig, is_own
from hpo.space.document import flow, hash_of
from hpo.space.grammar import Confirm, Metric, Objective, PromotePruner, Pruner, RungsPruner, Sampler

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import BaseTrial

RATES = {"optim.lr": "optim.lr_scale", "optim.lr_scale": "optim.lr"}
"""The two names of the learning rate, each with the other one."""
TOLERANCE = 1e-9
"""Relative rounding error allowed in a conversion from `lr` to `lr_scale` and back; a float's own is 1e-16."""


@dataclass(frozen=True)
class Parameter(ABC):
    """A searched field, with choices or a range."""

    path: str
    when: Mapping[str, tuple[Any, ...]]
    """Field -> values. The parameter is active only if every field has one of its values."""

    @abstractmethod
    def contains(self, value: Any) -> bool:
        """Whether the search can draw this value."""

    def encode(self, value: Any) -> Any:
        """Convert the field's value to Optuna's."""
        return value

    def decode(self, value: Any) -> Any:
        """Convert Optuna's value to the field's."""
        return value

    @abstractmethod
    def suggest(self, trial: BaseTrial) -> Any:
        """Draw one of Optuna's values."""

    @abstractmethod
    def distribution(self) -> BaseDistribution:
        """Optuna's distribution of the parameter."""

    @abstractmethod
    def domain(self) -> dict[str, Any]:
        """The choices or the range as plain data, without defaults."""

    def describe(self) -> dict[str, Any]:
        """The parameter's YAML entry as plain data."""
        when = {path: list(values) for path, values in self.when.items()}
        return {**self.domain(), "when": when} if when else self.domain()


@dataclass(frozen=True)
class Categorical(Parameter):
    """One of several values without order. In Optuna, lists are JSON text, which every storage supports."""

    choices: tuple[Any, ...]

    @cached_property
    def labels(self) -> tuple[Any, ...]:
        """The choices as Optuna's values."""
        return tuple(json.dumps(choice) if isinstance(choice, tuple) else choice for choice in self.choices)

    def contains(self, value: Any) -> bool:
        return value in self.choices

    def encode(self, value: Any) -> Any:
        return self.labels[self.choices.index(value)]

    def decode(self, value: Any) -> Any:
        return self.choices[self.labels.index(value)]

    def suggest(self, trial: BaseTrial) -> Any:
        return trial.suggest_categorical(self.path, self.labels)

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.labels)

    def domain(self) -> dict[str, Any]:
        return {"choices": list(self.choices)}


@dataclass(frozen=True)
class _Range(Parameter):
    """A number between two bounds, both included."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def domain(self) -> dict[str, Any]:
        defaults = {field.name: field.default for field in fields(self)}
        given = {"low": self.low, "high": self.high, "log": self.log, "step": self.step}
        return {name: value for name, value in given.items() if value != defaults[name]}


@dataclass(frozen=True)
class Integer(_Range):
    """A whole number between two bounds, both included."""

    low: int
    high: int
    step: int = 1

    def contains(self, value: Any) -> bool:
        return isinstance(value, int) and self.low <= value <= self.high and (value - self.low) % self.step == 0

    def suggest(self, trial: BaseTrial) -> Any:
        return trial.suggest_int(self.path, **self.domain())

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import IntDistribution

        return IntDistribution(**self.domain())


@dataclass(frozen=True)
class Real(_Range):
    """A number between two bounds, both included."""

    def contains(self, value: Any) -> bool:
        if value is None or not self.low <= value <= self.high:
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return bool(abs(steps - round(steps)) < 1e-8)  # Optuna's own tolerance for a step

    def suggest(self, trial: BaseTrial) -> Any:
        return trial.suggest_float(self.path, **self.domain())

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution

        return FloatDistribution(**self.domain())


@dataclass(frozen=True)
class Recipe:
    """A complete configuration with its `RecipeNotes`."""

    name: str
    path: Path
    config: TrainConfig
    description: str
    source: str
    result: str
    guesses: str


@dataclass(frozen=True)
class SearchSpace:
    """The searched fields, the baseline and the settings. Built and checked by `load_space`."""

    name: str
    path: Path
    description: str
    objective: Objective
    trials: int
    sampler: Sampler
    pruner: Pruner
    confirm: Confirm
    """Not part of the identity, since it changes no trial."""
    baseline: TrainConfig
    """Trial 0, and the values of all fields that are not searched."""
    recipes: tuple[Recipe, ...]
    """Configurations to compare the search with, on the data and epochs of its trials."""
    search: Mapping[str, Parameter]
    """Parameters by dotted path, each after those that its condition names."""

    @property
    def metric(self) -> Metric:
        return self.objective.metric

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        return self.objective.direction

    @property
    def trains_baseline(self) -> bool:
        """Whether a study of this space begins with its baseline and recipes."""
        return True

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions of all parameters, including conditional ones."""
        return {path: parameter.distribution() for path, parameter in self.search.items()}

    def suggest(self, trial: BaseTrial) -> dict[str, Any]:
        """Draw the active parameters, and return their values as Optuna stores them."""
        params: dict[str, Any] = {}
        for path, parameter in self.search.items():
            if self._holds(parameter.when, self._decode(params)):
                params[path] = parameter.suggest(trial)
        return params

    def config(self, params: Mapping[str, Any]) -> TrainConfig:
        """Build the configuration of a trial's parameters (`trial.params`).

        Raises:
            KeyError: A parameter is not searched.
            ValueError: A value is not among the choices.
            pydantic.ValidationError: Values are allowed on their own but not together.
        """
        return self.baseline.override(self._decode(params))

    def shown(self, trial: BaseTrial) -> dict[str, Any]:
        return dict(trial.params)

    def names(self, path: str) -> set[str]:
        """Return the names that a field may have: the baseline's, and the searched choices."""
        searched = self.search[path].describe().get("choices", []) if path in self.search else []
        return {str(name) for name in (self.baseline.flat()[path], *searched)}

    def own_code(self) -> dict[str, str]:
        """Return the import paths of the user's code that trials may need, each with its field."""
        fields = [f"{part}.name" for part in OWN_PARTS]
        return {name: field for field in fields for name in sorted(self.names(field)) if is_own(name)}

    def baseline_params(self) -> dict[str, Any]:
        """The baseline as the parameters of trial 0."""
        params = self.express(self.baseline)
        assert params is not None, "load_space checks that the search can draw the baseline"
        return params

    def express(self, config: TrainConfig) -> dict[str, Any] | None:
        """Return the parameters of this configuration, but for seed and data set; None if the space lacks it."""
        values = self._drawable(config)
        if any(path not in values and self._holds(one.when, values) for path, one in self.search.items()):
            return None
        wanted = in_rate_of(config, self.search).flat()
        reached = self.baseline.override(values).flat()
        if reached.keys() != wanted.keys():  # other arguments of a network of the user's own
            return None
        compared = wanted.keys() - {"seed", "data.name", "data.val", *(f"data.{name}" for name in READING_FIELDS)}
        if any(not _same(reached[path], wanted[path]) for path in compared):
            return None
        return self._encode(values)

    def shared_params(self, config: TrainConfig) -> dict[str, Any]:
        """Return the parameters that have this configuration's values; those out of range are left out."""
        return self._encode(self._drawable(config))

    def identity(self) -> dict[str, Any]:
        """Everything that makes trials comparable, as flat JSON data.

        Not in it: settings that only steer the search; the baseline's seed, since a study seeds its trials; and how
        the data are found and read, since the study adds fingerprints of the data.
        """
        fixed = self.baseline.flat()
        split = split_fields(
            {path.removeprefix("data."): value for path, value in fixed.items() if path.startswith("data.")}
        )
        left_out = {"seed", "epochs", "data.name", *_still_at_default(fixed)}
        if "swa" not in self.names("averaging.name"):
            left_out.add("averaging.swa_factor")  # version 0.1.0 did not have it: studies without SWA can be resumed
        kept = [path for path in fixed if path not in left_out and not path.startswith("data.")]
        identity = {
            "objective.metric": self.metric,
            "epochs": self.baseline.epochs,
            "pruner.rungs": self.pruner.rungs if isinstance(self.pruner, RungsPruner | PromotePruner) else None,
            **{f"data.{name}": value for name, value in split.items() if name != "name"},
            **{f"base.{path}": fixed[path] for path in kept},
            **{f"search.{path}": self.search[path].describe() for path in sorted(self.search)},
        }
        plain: dict[str, Any] = json.loads(json.dumps(identity))
        return plain

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the identity, in hex."""
        return hash_of(self.identity())

    def _drawable(self, config: TrainConfig) -> dict[str, Any]:
        wanted, values = in_rate_of(config, self.search).flat(), dict[str, Any]()
        for path, parameter in self.search.items():
            value = snapped(parameter, wanted.get(path))
            if path in wanted and self._holds(parameter.when, values) and parameter.contains(value):
                values[path] = value
        return values

    def _encode(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {path: self.search[path].encode(value) for path, value in values.items()}

    def _decode(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {path: self.search[path].decode(value) for path, value in params.items()}

    def _holds(self, when: Mapping[str, tuple[Any, ...]], values: Mapping[str, Any]) -> bool:
        return all(
            (path in values and values[path] in allowed)
            if path in self.search
            else self.baseline.flat().get(path) in allowed
            for path, allowed in when.items()
        )


_ADDED_FIELDS = (
    "model.input_size", "optim.layer_decay", "sampling.caps", "augment.scale", "augment.shear_degrees",
    "model.block_dropout", "loss.smoothing_final_from", "loss.smoothing_patience_fraction", "augment.name",
)  # fmt: skip
"""Fields of `TrainConfig`, outside of `data`, that version 0.1.0 did not have and that are off by default."""


def _still_at_default(fixed: Mapping[str, Any]) -> set[str]:
    """Added fields with their default: studies of earlier versions, which lack them, can be resumed."""
    defaults = TrainConfig().flat()
    return {path for path in _ADDED_FIELDS if fixed[path] == defaults[path]}


_FIRST_DATA_FIELDS = {"name", "val_fraction", "test_fraction", "split_seed", "folds", "image_size", "normalize"}
"""Fields of `DataConfig` in version 0.1.0."""


def split_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `DataConfig` that distinguish configurations on the same images, with the name.

    Left out are those whose effect is in a fingerprint of the data: how they are read, and `val`; and fields that
    version 0.1.0 did not have, where they have their default, so that its studies can be resumed.
    """
    defaults = DataConfig().model_dump(mode="json")
    in_fingerprints = {*READING_FIELDS, "val"}
    return {
        name: value
        for name, value in data.items()
        if name in _FIRST_DATA_FIELDS or (name not in in_fingerprints and value != defaults.get(name))
    }


def in_rate_of(config: TrainConfig, search: Mapping[str, Any]) -> TrainConfig:
    """The configuration with its rate given as the searched one of `lr` and `lr_scale`."""
    peak = config.optim.peak_lr(config.batch_size)
    if "optim.lr" in search and config.optim.lr is None:
        return config.override({"optim.lr": peak})
    if "optim.lr_scale" in search and config.optim.lr_scale is None and config.optim.name in REFERENCE_LR:
        reference, power = REFERENCE_LR[config.optim.name]
        return config.override({"optim.lr_scale": peak / (reference * (config.batch_size / 256) ** power)})
    return config


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=TOLERANCE)
    return bool(a == b)


def snapped(parameter: Parameter, value: Any) -> Any:
    """The value, or the parameter's bound if it differs only by the rounding error of a converted learning rate."""
    if isinstance(parameter, Real) and isinstance(value, float):
        for bound in (parameter.low, parameter.high):
            if _same(value, bound):
                return bound
    return value


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The differences of two identities, one per line: `search.optim.lr_scale: high 10 → 20`."""
    lines: list[str] = []
    for key in [*old, *(key for key in new if key not in old)]:
        if key not in new:
            lines.append(f"{key}: removed (was {_brief(old[key])})")
        elif key not in old:
            lines.append(f"{key}: added ({_brief(new[key])})")
        elif isinstance(old[key], Mapping) and isinstance(new[key], Mapping):
            was, now = old[key], new[key]
            parts = [*was, *(part for part in now if part not in was)]
            changes = [
                f"{part} {_brief(was.get(part, 'none'))} → {_brief(now.get(part, 'none'))}"
                for part in parts
                if was.get(part) != now.get(part)
            ]
            lines += [f"{key}: {', '.join(changes)}"] if changes else []
        elif old[key] != new[key]:
            lines.append(f"{key}: {_brief(old[key])} → {_brief(new[key])}")
    return lines


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_brief(item)}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else flow(value)
