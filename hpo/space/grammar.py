"""The keys of a search-space file as pydantic models, and their validation errors in plain words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

from core.config import IMPORT_PATH, OWN, DataConfig, Kwargs, OwnName, TrainConfig
from hpo.space.document import flow
from hpo.space.fields import did_you_mean, nearest_field


class _Section(BaseModel):
    """Unknown keys are errors, values are not coerced, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


Fraction = Annotated[float, Field(gt=0, lt=1)]
Metric = Literal["accuracy", "macro_f1", "balanced_accuracy", "nll"]


Cost = Literal["params", "latency", "size"]
COSTS: tuple[Cost, ...] = get_args(Cost)
SMALLEST = "smallest"
"""Selects the trial of the lowest cost among those near the best score."""
_BOUND = re.compile(rf"({'|'.join(COSTS)})\s*<\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)")


def cost_bound(words: str) -> tuple[str, float] | None:
    """Parse `params<1e6`: a cost and its bound; None of other words."""
    found = _BOUND.fullmatch(words.strip())
    return None if found is None else (found[1], float(found[2]))


class Objective(_Section):
    """The score of a trial, measured on the validation images, and the costs that are measured beside it."""

    metric: Metric = "accuracy"
    """accuracy, macro_f1 and balanced_accuracy are maximized, nll (negative log-likelihood) is minimized."""
    metrics: Annotated[tuple[Metric | Cost, ...], Field(strict=False)] = ()
    """The metric, and costs that are measured of each trial: `params`, the number of parameters; `latency`,
    milliseconds an image; `size`, megabytes of the weights. Trials are drawn by the metric alone; the pruner `rungs`
    compares it between trials of similar costs."""

    @model_validator(mode="before")
    @classmethod
    def _first(cls, values: Any) -> Any:
        """Take the metric from the first of the metrics."""
        names = values.get("metrics") if isinstance(values, dict) else None
        if not names or not isinstance(names, list | tuple):
            return values
        if names[0] in COSTS:
            raise ValueError(f"metrics begins with the score by which trials are drawn and pruned, not with {names[0]}")
        return {"metric": names[0], **values}

    @model_validator(mode="after")
    def _check_metrics(self) -> Objective:
        if self.metrics and self.metrics[0] != self.metric:
            raise ValueError(f"metrics begins with {self.metrics[0]}, and metric is {self.metric}: make them the same")
        if other := [name for name in self.metrics[1:] if name not in COSTS]:
            raise ValueError(f"metrics has a second score, {other[0]}; the others are {', '.join(COSTS)}")
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics names one twice: {', '.join(self.metrics)}")
        return self

    @model_serializer(mode="wrap")
    def _one_of_both(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write `metrics` if they are given, else `metric`."""
        written = write(self)
        return {key: value for key, value in written.items() if (key == "metrics") == bool(self.metrics)}

    @property
    def costs(self) -> tuple[str, ...]:
        """The measured costs."""
        return self.metrics[1:]

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        return "minimize" if self.metric == "nll" else "maximize"


MOST_TRIALS = 1_000_000
"""Largest total. Every trial waits in the storage from the start: 280 bytes and 0.5 ms each in a journal."""
MANY_TRIALS = 100_000
"""Largest total without `--yes`."""

# Samplers and pruners. Defaults that are numbers of trials are Optuna's.

_RandomFirst = Annotated[int, Field(ge=1, description="Random trials before the model decides.")]


class TpeSampler(_Section):
    """Optuna's tree-structured Parzen estimator, multivariate."""

    name: Literal["tpe"] = "tpe"
    startup_trials: _RandomFirst = 10


class GpSampler(_Section):
    """Optuna's Gaussian process."""

    name: Literal["gp"]
    startup_trials: _RandomFirst = 10


class CmaEsSampler(_Section):
    """CMA-ES; it ignores choices, which are drawn at random."""

    name: Literal["cmaes"]
    startup_trials: _RandomFirst = 1


class RandomSampler(_Section):
    """Independent uniform draws."""

    name: Literal["random"]


class QmcSampler(_Section):
    """A scrambled Sobol sequence: random draws that leave fewer gaps."""

    name: Literal["qmc"]


HUB = "hub:"
"""Begins the name of a part from OptunaHub, with a package of the registry: `hub:samplers/PACKAGE:NAME`."""
_HUB_NAME = rf"{HUB}[\w\-]+(/[\w\-]+)+:[A-Za-z_]\w*"


def _or_hub(value: Any, own: ValidatorFunctionWrapHandler) -> Any:
    """Accept a name on OptunaHub beside an import path."""
    if not (isinstance(value, str) and value.startswith(HUB) and "/" in value):
        return own(value)
    if not re.fullmatch(_HUB_NAME, value):
        raise ValueError(f"must be hub:samplers/PACKAGE:NAME or hub:pruners/PACKAGE:NAME, not '{value}'")
    return value


PartName = Annotated[
    OwnName,
    WrapValidator(_or_hub, json_schema_input_type=Annotated[str, Field(pattern=f"^({IMPORT_PATH}|{_HUB_NAME})$")]),
]


class OwnSampler(_Section):
    """An Optuna sampler of your own code, or from OptunaHub."""

    name: PartName
    """`PACKAGE.MODULE:NAME`, or `hub:samplers/PACKAGE:NAME`."""
    kwargs: Kwargs = {}
    """Keyword arguments. A `seed` is given if it takes one."""


def _tag(value: Any) -> Any:
    """The name that selects a model; `OWN` for an import path."""
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return OWN if isinstance(name, str) and ":" in name else name


Sampler = Annotated[
    Annotated[TpeSampler, Tag("tpe")]
    | Annotated[GpSampler, Tag("gp")]
    | Annotated[CmaEsSampler, Tag("cmaes")]
    | Annotated[RandomSampler, Tag("random")]
    | Annotated[QmcSampler, Tag("qmc")]
    | Annotated[OwnSampler, Tag(OWN)],
    Discriminator(_tag),
]


class RungsPruner(_Section):
    """A trial passes a rung if it is among the best of those that reached it."""

    name: Literal["rungs"] = "rungs"
    rungs: Annotated[tuple[Fraction, ...], Field(strict=False, min_length=1)] = (0.03, 0.1, 0.3)
    """Fractions of the run's epochs at which trials are compared, increasing."""
    keep: Fraction = 0.33
    """Fraction of the trials at a rung that continue."""
    let_through: float = Field(default=0.02, ge=0, le=0.5)
    """Fraction of the trials that are not pruned, to measure the loss by pruning; 0 is off. 0.02 is four of 200."""

    @model_validator(mode="after")
    def _increasing(self) -> RungsPruner:
        _check_increasing(self.rungs)
        return self


def _check_increasing(rungs: tuple[float, ...]) -> None:
    if any(later <= earlier for earlier, later in pairwise(rungs)):
        raise ValueError(f"rungs must increase, not {flow(rungs)}")


_Reduction = Annotated[int, Field(ge=2, description="One in this many continues.")]


class PromotePruner(_Section):
    """Trials pause at rungs, and the best of those that wait continue."""

    name: Literal["promote"]
    rungs: Annotated[tuple[Fraction, ...], Field(strict=False, min_length=1)] = (0.05, 0.12, 0.3, 0.6)
    """Fractions of the run's epochs at which trials pause, increasing. A rung is left out of studies in which fewer
    than reduction_factor trials would reach it: the last of these, of up to 54 trials."""
    reduction_factor: _Reduction = 3

    @model_validator(mode="after")
    def _increasing(self) -> PromotePruner:
        _check_increasing(self.rungs)
        return self


class NoPruner(_Section):
    """Every trial runs to its end."""

    name: Literal["none"]


_Unpruned = Annotated[int, Field(ge=0, description="Trials that run before any is pruned.")]
_Warmup = Annotated[float, Field(ge=0, lt=1, description="Fraction of the run before which nothing is pruned.")]


class MedianPruner(_Section):
    """Optuna's: prunes a trial below the median of the earlier ones at the same epoch."""

    name: Literal["median"]
    startup_trials: _Unpruned = 5
    warmup_fraction: _Warmup = 0.0


class PercentilePruner(_Section):
    """Optuna's: like the median, at another fraction."""

    name: Literal["percentile"]
    keep: Fraction
    """Fraction of the trials that continue: 0.25 keeps the best quarter."""
    startup_trials: _Unpruned = 5
    warmup_fraction: _Warmup = 0.0


class SuccessiveHalvingPruner(_Section):
    """Optuna's: rungs at min_fraction × reduction_factor ^ k of the run."""

    name: Literal["successive_halving"]
    min_fraction: Fraction = 0.03
    """Fraction of the run at the first rung."""
    reduction_factor: _Reduction = 4


class HyperbandPruner(_Section):
    """Optuna's: several successive halvings in parallel, from early to late first rungs."""

    name: Literal["hyperband"]
    min_fraction: Fraction = 0.03
    """Fraction of the run at the first rung of the bracket that prunes first."""
    reduction_factor: _Reduction = 3


class OwnPruner(_Section):
    """An Optuna pruner of your own code, or from OptunaHub."""

    name: PartName
    """`PACKAGE.MODULE:NAME`, or `hub:pruners/PACKAGE:NAME`."""
    kwargs: Kwargs = {}
    """Keyword arguments."""


Pruner = Annotated[
    Annotated[RungsPruner, Tag("rungs")]
    | Annotated[PromotePruner, Tag("promote")]
    | Annotated[NoPruner, Tag("none")]
    | Annotated[MedianPruner, Tag("median")]
    | Annotated[PercentilePruner, Tag("percentile")]
    | Annotated[SuccessiveHalvingPruner, Tag("successive_halving")]
    | Annotated[HyperbandPruner, Tag("hyperband")]
    | Annotated[OwnPruner, Tag(OWN)],
    Discriminator(_tag),
]


class Confirm(_Section):
    """How the best configurations are trained again on new seeds and splits, before one is called best."""

    budget: float | None = Field(default=None, gt=0)
    """Cost as a fraction of the epochs trained by the search; at least two configurations are trained three times.
    null: a third, and at least twelve trainings, but no more epochs and time than the search took."""
    margin: float = Field(default=0.0, ge=0)
    """A refit takes the best configuration instead of the baseline if its expected gain is larger."""


_MEANING = "Field: value, or list of values. Searched only if all of these hold; else the baseline's value is used."
_When = Annotated[dict[str, Any] | None, Field(min_length=1, description=_MEANING)]


class Choices(_Section):
    """One of several values without order."""

    choices: list[Any] = Field(min_length=1)
    """The values; a list for a field that is a list, null for a field that can be off."""
    when: _When = None


class Range(_Section):
    """A number between two bounds, both included."""

    low: float
    high: float
    log: bool = False
    """Draw uniformly over the logarithm: for factors, such as learning rates."""
    step: float | None = None
    """Draw only low, low + step, low + 2 step, … high."""
    when: _When = None


class SpaceFile(_Section):
    """A search space: the searched fields, the baseline, and the score."""

    description: str = ""
    """One line for `hpo space list`."""
    data: DataConfig = DataConfig()
    """The data set and its split; overrides the data of the baseline and of the recipes."""
    objective: Objective = Objective()
    trials: int = Field(default=100, ge=1, le=MOST_TRIALS)
    """Total number of trials; `--trials` overrides it."""
    sampler: Sampler = TpeSampler()
    pruner: Pruner = RungsPruner()
    confirm: Confirm = Confirm()
    base: str | dict[str, Any] = {}
    """The baseline, a recipe's path or a configuration: trial 0, and the values of all fields that are not searched."""
    search: dict[str, dict[str, Any]] = Field(min_length=1)
    """Fields by dotted path, each with choices or a range."""
    recipes: list[str] = []
    """Recipes to compare the search with."""


class RecipeNotes(_Section):
    """The notes in a recipe, beside the fields of its configuration."""

    description: str = ""
    """One line for `hpo space list`."""
    source: str = ""
    """The configuration's author, and where it was published."""
    result: str = ""
    """The result that its author reported, on their data."""
    guesses: str = ""
    """Values missing in the source, and the ones used instead."""


class ConfirmationText(_Section):
    """The space of a confirmation, as workers read it from the storage. Not written by hand."""

    confirms: str
    train_images: int = Field(ge=1)
    val_images: int = Field(ge=1)
    objective: Objective
    base: dict[str, Any]


_IN_QUOTES = re.compile(r"'([^']+)'")

# pydantic's error type -> message.
_WORDS = {
    "model_type": "must be a group of fields",
    "dict_type": "must be a group of fields",
    "model_attributes_type": "must be a group of fields",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "none_required": "must be null",
}


TAGGED = ("sampler", "pruner")  # tagged unions: pydantic puts the tag into an error's location


def location(error: ErrorDetails) -> tuple[str | int, ...]:
    """The path of an error in the file."""
    loc = error["loc"]
    return (loc[0], *loc[2:]) if loc and loc[0] in TAGGED else loc


def siblings(model: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    """The allowed names at the location of an error of this model."""
    fields = model.model_fields
    if len(loc) == 1:
        of_a_training = TrainConfig.model_fields if "base" in fields else ()
        return [*fields, *(f"base.{name}" for name in of_a_training)]
    info = fields.get(str(loc[0]))
    arms = [] if info is None else get_args(info.annotation) or (info.annotation,)
    if loc[0] in TAGGED:
        arms = [get_args(arm)[0] for arm in arms if Tag(str(loc[1])) in get_args(arm)]
    return [f"{loc[0]}.{name}" for arm in arms if hasattr(arm, "model_fields") for name in arm.model_fields]


def explain(error: ErrorDetails, siblings: Iterable[str] = ()) -> str:
    """Describe a pydantic error; `siblings` are the names to suggest for an unknown key."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    match kind:
        case "extra_forbidden":
            return f"no such field{did_you_mean(str(error['loc'][-1]), siblings, nearest_field)}"
        case "missing":
            return "is missing"
        case "value_error":
            return error["msg"].removeprefix("Value error, ")
        case "literal_error":
            expected = str(context["expected"])
            return f"must be {expected}, not {quoted(value)}{did_you_mean(value, _IN_QUOTES.findall(expected))}"
        case "union_tag_invalid":
            names = [name for name in _IN_QUOTES.findall(str(context["expected_tags"])) if name != OWN]
            known = f"{', '.join(names)}, or PACKAGE.MODULE:NAME of your own code"
            return f"name must be one of {known}, not {context['tag']}{did_you_mean(context['tag'], names)}"
        case "union_tag_not_found":
            return "name is missing" if isinstance(value, dict) else f"must be a group of fields, not {quoted(value)}"
        case "string_pattern_mismatch":
            return f"must match {context['pattern']}, not {quoted(value)}"
    if kind in _WORDS:
        return f"{_WORDS[kind]}, not {quoted(value)}"
    words = re.sub(r"^(Input|String|List|Tuple|Dictionary|Value) should ", "must ", error["msg"])
    words = words.replace(" after validation", "")
    return words if ", not " in words else f"{words}, not {quoted(value)}"


def quoted(value: Any) -> str:
    """A value as messages show it: strings in quotes, the rest as YAML."""
    return f"'{value}'" if isinstance(value, str) else flow(value)
