"""Search spaces and recipes: from YAML to Optuna distributions over `TrainConfig` fields, checked before trial 0.

The YAML, the code, a trial's parameters and `--set` all name fields by their dotted path in `TrainConfig`. Importing
this package imports neither torch nor Optuna; a space imports Optuna when it builds distributions. The options of
samplers and pruners are models in `grammar.py`, built in `samplers.py` and `pruner.py`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpo.space.catalogue import Listed, list_spaces
    from hpo.space.confirmation import CANDIDATE, REPLICATE, ConfirmationSpace
    from hpo.space.document import dump_yaml, load_yaml, parse_yaml, shown
    from hpo.space.grammar import Objective, Pruner, RungsPruner, Sampler
    from hpo.space.load import (
        check_file,
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

_MODULES = {
    "catalogue": ("Listed", "list_spaces"),
    "confirmation": ("CANDIDATE", "ConfirmationSpace", "REPLICATE"),
    "document": ("dump_yaml", "load_yaml", "parse_yaml", "shown"),
    "grammar": ("Objective", "Pruner", "RungsPruner", "Sampler"),
    "load": (
        "check_file",
        "load_recipe",
        "load_space",
        "override_config",
        "recipe_from_yaml",
        "space_from_yaml",
        "space_to_yaml",
        "to_yaml",
    ),
    "schema": ("json_schema",),
    "space": ("Categorical", "Integer", "Parameter", "Real", "Recipe", "SearchSpace", "diff"),
}
"""Names by the module that defines them, imported on first use: listing studies reads YAML but no space."""

__all__ = [
    "CANDIDATE",
    "REPLICATE",
    "Categorical",
    "ConfirmationSpace",
    "Integer",
    "Listed",
    "Objective",
    "Parameter",
    "Pruner",
    "Real",
    "Recipe",
    "RungsPruner",
    "Sampler",
    "SearchSpace",
    "check_file",
    "diff",
    "dump_yaml",
    "json_schema",
    "list_spaces",
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
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
