"""Search spaces and recipes: from YAML to Optuna distributions over `TrainConfig` fields, checked before trial 0.

Importing this package imports neither torch nor Optuna; a space imports Optuna when it builds distributions.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpo.space.catalogue import list_spaces
    from hpo.space.confirmation import CANDIDATE, REPLICATE, ConfirmationSpace
    from hpo.space.document import dump_yaml, load_yaml, parse_yaml, shown
    from hpo.space.grammar import RungsPruner
    from hpo.space.load import (
        check_file,
        load_file,
        load_recipe,
        load_space,
        override_config,
        recipe_from_yaml,
        space_from_yaml,
        space_to_yaml,
        to_yaml,
    )
    from hpo.space.schema import json_schema
    from hpo.space.space import Categorical, Integer, Parameter, Real, Recipe, SearchSpace, diff

_MODULES = ("document", "catalogue", "grammar", "space", "confirmation", "load", "schema")
"""Searched for a name in this order on its first use: listing studies reads YAML but no space."""

__all__ = [
    "CANDIDATE",
    "REPLICATE",
    "Categorical",
    "ConfirmationSpace",
    "Integer",
    "Parameter",
    "Real",
    "Recipe",
    "RungsPruner",
    "SearchSpace",
    "check_file",
    "diff",
    "dump_yaml",
    "json_schema",
    "list_spaces",
    "load_file",
    "load_recipe",
    "load_space",
    "load_yaml",
    "override_config",
    "parse_yaml",
    "recipe_from_yaml",
    "shown",
    "space_from_yaml",
    "space_to_yaml",
    "to_yaml",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        for module in _MODULES:
            found = vars(importlib.import_module(f"{__name__}.{module}"))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
