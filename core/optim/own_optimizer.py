"""Optimizers of the user's own code: `optim.name: PACKAGE.MODULE:NAME`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core.config import OptimConfig
from core.errors import ConfigError
from core.imports import blaming, built, kind_of

Groups = list[dict[str, Any]]


def build_own(config: OptimConfig, groups: Groups, lr: float) -> torch.optim.Optimizer:
    """Build the optimizer of these groups of parameters, with their rate and without weight decay.

    Raises:
        ConfigError: it fails, or is no torch optimizer.
        UserError: it cannot be imported.
    """
    optimizer = built(config.name, "optim", config.kwargs, {"params": groups, "lr": lr, "weight_decay": 0.0})
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optim.name: {config.name} returns {kind_of(optimizer)}, not a torch.optim.Optimizer")
    return optimizer


def try_own(config: OptimConfig) -> int:
    """Make two steps of a small layer, and return the number of state tensors of a weight.

    Raises:
        ConfigError: it fails, such as an optimizer that needs a closure.
        UserError: it cannot be imported.
    """
    layer = nn.Linear(3, 2)
    optimizer = build_own(config, [{"params": [layer.weight]}, {"params": [layer.bias], "weight_decay": 0.0}], 1e-3)
    with blaming(f"optim.name: {config.name} fails in a step"):
        for _ in range(2):
            optimizer.zero_grad()
            layer(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
    state = optimizer.state.get(layer.weight, {})
    return sum(isinstance(value, Tensor) and value.shape == layer.weight.shape for value in state.values())
