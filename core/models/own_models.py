"""Networks of the user's own code: `PACKAGE.MODULE:NAME`.

The callable gets `in_channels`, `num_classes`, `image_size` (H, W) if it has such a parameter, and `model.kwargs`.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from core.config import GIVEN_KWARGS, ModelConfig
from core.errors import ConfigError
from core.imports import as_lists, blaming, check_arguments, imported, kind_of, takes
from core.runtime import isolated_rng

_FIELD, _KWARGS = "model.name", "model.kwargs"


def own_model(name: str) -> Callable[..., Any]:
    """Import the callable; UserError if it cannot be imported."""
    return imported(name, _FIELD)


def check_own_model(name: str, kwargs: Collection[str]) -> None:
    """Import the callable and check that it takes these keyword arguments, without calling it.

    Raises:
        UserError: it cannot be imported.
        ConfigError: it lacks an argument.
    """
    check_arguments(own_model(name), kwargs, _given(own_model(name)), name, _KWARGS)


def build_own_model(
    config: ModelConfig, *, num_classes: int, in_channels: int, image_size: tuple[int, int]
) -> nn.Module:
    """Build the network; see `core.models.build_model`.

    Raises:
        ConfigError: the user's code fails, or returns no network that maps images to logits.
        UserError: it cannot be imported.
    """
    name = config.name
    check_own_model(name, config.kwargs)
    build = own_model(name)
    arguments: dict[str, Any] = as_lists(config.kwargs)
    given = {"in_channels": in_channels, "num_classes": num_classes, "image_size": image_size}
    arguments |= {key: value for key, value in given.items() if key in _given(build)}
    with blaming(f"{_FIELD}: {name} fails"), _seeded_by_torch():
        model = build(**arguments)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{_FIELD}: {name} returns {kind_of(model)}, not a torch.nn.Module")
    _try(model, name, torch.zeros(2, in_channels, *image_size), num_classes)
    return model


def _given(build: Callable[..., Any]) -> tuple[str, ...]:
    """The arguments that follow from the images; `image_size` only if the callable has such a parameter."""
    *needed, size = GIVEN_KWARGS["model"]
    return (*needed, size) if takes(build, size) else tuple(needed)


def _try(model: nn.Module, name: str, images: Tensor, num_classes: int) -> None:
    """Make both passes of a few black images, and leave the network as it is, in training mode."""
    with isolated_rng(torch.device("cpu")), blaming(f"{_FIELD}: {name} fails with images {tuple(images.shape)}"):
        with torch.no_grad():
            if any(map(is_lazy, model.parameters())):
                model.eval()(images)
            model.to(memory_format=torch.channels_last)
            images = images.to(memory_format=torch.channels_last)
            _check_logits(model.eval()(images), name, len(images), num_classes)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise ConfigError(f"{_FIELD}: {name} has no parameter that can be trained")
        others = [key for key, value in model.state_dict().items() if not isinstance(value, Tensor)]
        if others:
            raise ConfigError(f"{_FIELD}: {others[0]} in the state of {name} is not a tensor, and cannot be saved")
        twin = copy.deepcopy(model).train()  # a training pass changes batch norm's statistics
        logits = twin(images)
        _check_logits(logits, name, len(images), num_classes)
        if not logits.requires_grad:
            raise ConfigError(f"{_FIELD}: the output of {name} does not depend on its parameters in training")
        logits.sum().backward()
    model.train()


def _check_logits(logits: Any, name: str, images: int, num_classes: int) -> None:
    if not isinstance(logits, Tensor):
        raise ConfigError(f"{_FIELD}: {name} returns {kind_of(logits)} for images, not a tensor of logits")
    if logits.shape != (images, num_classes) or not logits.is_floating_point():
        raise ConfigError(
            f"{_FIELD}: {name} returns {tuple(logits.shape)} {str(logits.dtype).removeprefix('torch.')} for {images} "
            f"images; logits of {num_classes} classes are ({images}, {num_classes}) floats"
        )


@contextlib.contextmanager
def _seeded_by_torch() -> Iterator[None]:
    """Seed Python's and NumPy's generators from torch's, so that weights depend on the training's seed alone."""
    seed = int(torch.randint(2**32, (), dtype=torch.int64, device="cpu"))
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
