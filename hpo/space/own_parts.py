"""Samplers and pruners of the user's own code or from OptunaHub: `{name: PACKAGE.MODULE:NAME, kwargs: {…}}`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from core.errors import ConfigError
from hpo.space.grammar import HUB, OwnPruner, OwnSampler, Pruner, Sampler


def check_own_parts(sampler: Sampler, pruner: Pruner) -> None:
    """Build the sampler and the pruner that are the user's own.

    Raises:
        UserError: One cannot be imported.
        ConfigError: One does not take its arguments, fails, or is no sampler or pruner.
    """
    if isinstance(sampler, OwnSampler):
        own_sampler(sampler, seed=0)
    if isinstance(pruner, OwnPruner):
        own_pruner(pruner)


def own_sampler(config: OwnSampler, *, seed: int) -> BaseSampler:
    """Build the sampler, with the seed if it takes one and has none in its arguments."""
    built = _built(config, "sampler", seed)
    if not isinstance(built, BaseSampler):
        raise _wrong(config, "sampler", built, "BaseSampler")
    return built


def own_pruner(config: OwnPruner) -> BasePruner:
    """Build the pruner."""
    built = _built(config, "pruner", None)
    if not isinstance(built, BasePruner):
        raise _wrong(config, "pruner", built, "BasePruner")
    return built


def _built(config: OwnSampler | OwnPruner, field: str, seed: int | None) -> Any:
    from core.imports import as_lists, blaming, check_arguments, imported, takes  # imports torch

    load = _from_hub if config.name.startswith(HUB) and "/" in config.name else imported
    found = load(config.name, f"{field}.name")
    seeded = seed is not None and "seed" not in config.kwargs and takes(found, "seed")
    check_arguments(found, config.kwargs, ("seed",) if seeded else (), config.name, f"{field}.kwargs")
    with blaming(f"{field}.name: {config.name} fails"):
        return found(**as_lists(config.kwargs), **({"seed": seed} if seeded else {}))


@functools.cache
def _from_hub(path: str, field: str) -> Callable[..., Any]:
    """Load `hub:PACKAGE:NAME` with OptunaHub, which downloads a package once, into its cache."""
    from core.imports import blaming, callable_of

    package, _, attribute = path.removeprefix(HUB).rpartition(":")
    try:
        import optunahub
    except ImportError as error:
        raise ConfigError(f"{field}: {path} needs optunahub ({error}); pip install 'hpo-vision[hub]'") from error
    with blaming(f"{field}: {path} cannot be loaded from OptunaHub; check its name and the connection"):
        module = optunahub.load_module(package)
    return callable_of(module, attribute, path, field)


def _wrong(config: OwnSampler | OwnPruner, field: str, built: Any, kind: str) -> ConfigError:
    return ConfigError(f"{field}.name: {config.name} returns a {type(built).__name__}, not Optuna's {kind}")
