"""The user's own code in a search, and its networks with pretrained weights at hand."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from core.config import GIVEN_KWARGS, family_of, part_of_argument
from core.errors import MissingWeightsError
from core.imports import check_part
from core.models import check_kwargs, has_weights
from hpo.space import Categorical, Parameter, Recipe, SearchSpace
from hpo.study.code import own_code

_NAME = "model.name"


def check_own_code(found: SearchSpace | Recipe) -> None:
    """Import the user's own code that a space or recipe names, and check that it takes its arguments.

    Raises:
        UserError: There is no such module or name, or it fails when it is imported.
        ConfigError: It lacks an argument, or needs another.
    """
    if isinstance(found, Recipe):
        for name, field in own_code(found.config).items():
            _check(name, field, getattr(found.config, field.partition(".")[0]).kwargs)
        return
    for recipe in found.recipes:
        check_own_code(recipe)
    for name, field in found.own_code().items():
        part = field.partition(".")[0]
        baseline = getattr(found.baseline, part)
        searched = [
            path.rpartition(".")[2]
            for path, parameter in found.search.items()
            if part_of_argument(path) == part and name in parameter.when.get(field, (name,))
        ]
        _check(name, field, {*searched, *(baseline.kwargs if name == baseline.name else ())})


def _check(name: str, field: str, kwargs: Collection[str]) -> None:
    part = field.partition(".")[0]
    if part == "model":
        check_kwargs(name, kwargs)
    else:
        check_part(name, part, kwargs, GIVEN_KWARGS[part])


def with_weights(space: SearchSpace, begun: Mapping[str, Any] | None) -> tuple[SearchSpace, tuple[str, ...]]:
    """Leave out the networks of a space whose pretrained weights are neither on this machine nor downloadable.

    Args:
        begun: Metadata of the study if it has begun, which keeps its networks.

    Returns:
        The space, whose baseline has the first network left if its own is left out, and the names that were left out.

    Raises:
        MissingWeightsError: No network is left.
    """
    searched, model = space.search.get(_NAME), space.baseline.model
    if not isinstance(searched, Categorical) or not model.pretrained or model.pretrained_file is not None:
        return space, ()
    if begun is None:
        kept = tuple(name for name in searched.choices if family_of(name) != "timm" or has_weights(name))
    else:
        known = begun["identity"].get(f"search.{_NAME}", {}).get("choices", searched.choices)
        kept = tuple(name for name in searched.choices if name in known)
    missing = tuple(name for name in searched.choices if name not in kept)
    if not kept:
        raise MissingWeightsError(
            f"no network of {space.name} has its pretrained weights here: {advice(missing)}; or train from scratch "
            "with: hpo run stl10_small"
        )
    return (_restricted(space, kept) if missing else space), missing


def advice(names: Collection[str]) -> str:
    """Name networks without weights, and say how to get them."""
    from core.models.timm_models import weights_address

    first = next(iter(names))
    return (
        f"{', '.join(names)}; download, for example, {weights_address(first)}, put it as "
        f"{first.removeprefix('timm/')}.safetensors into a folder, and give that with --weights"
    )


def _restricted(space: SearchSpace, names: tuple[str, ...]) -> SearchSpace:
    """The space with these networks only, and without parameters of others."""
    search: dict[str, Parameter] = {}
    for path, parameter in space.search.items():
        when = dict(parameter.when)
        if _NAME in when:
            when[_NAME] = tuple(name for name in when[_NAME] if name in names)
        if path == _NAME and isinstance(parameter, Categorical):
            search[path] = replace(parameter, choices=names)
        elif when.get(_NAME, names):
            search[path] = replace(parameter, when=when)
    baseline = space.baseline
    if baseline.model.name not in names:
        baseline = baseline.override({_NAME: names[0]})
    return replace(space, search=search, baseline=baseline)
