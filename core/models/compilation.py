"""torch.compile of a whole network, or of its repeated blocks where that saves more time than it takes.

Compiled blocks read their activations fewer times: norm, activation and addition become one kernel. Equal blocks share
the code. Neither changes the network itself, whose copies and state dicts know nothing of it.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.errors import UserError
from core.imports import blaming

logger = logging.getLogger(__name__)

# All networks, or all blocks, share one code object. A run has up to 16 shapes: eight image sizes with two batch sizes
# each; twice as many with layers that are frozen at first.
RECOMPILE_LIMIT = 32
BACKEND = "inductor"

# Passes over a norm's output that its block saves when it is compiled. An activation reads and writes it once less in
# the forward pass, and its mask saves one of nine in the backward pass; an addition, after every second or third norm,
# saves two. Not measured on a GPU.
SAVED_PASSES = 3.5
# Seconds to compile both passes of a kind of block for one shape. Measured on one CPU core, 2.6 to 4.8.
COMPILE_S = 5.0

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
_SEQUENCES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

_compiled: tuple[str, str] = ("", "")
"""Kind of compilation and architecture of the last network."""
_trained_images: Counter[str] = Counter()
"""Of each architecture in this process, without compilation."""


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Compile the network, sharing its weights. Code is cached on disk, and in the process for the same architecture.

    Raises:
        UserError: the network is on the CPU, and there is no C++ compiler.
    """
    _prepare(model, "whole", RECOMPILE_LIMIT)
    return torch.compile(model, dynamic=False, backend=BACKEND)


def with_compiled_blocks(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a twin in training mode that shares the network's parameters and buffers, and whose blocks are compiled.

    Raises:
        UserError: as `compiled`.
    """
    if blocks(model) == [model]:
        return compiled(model)
    _prepare(model, "blocks", RECOMPILE_LIMIT * len(block_kinds(model)))
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}).train()
    found = set(blocks(twin))
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if child in found:
                # The reference cycle of `child.compile()` would keep the weights after the training.
                setattr(parent, name, torch.compile(child, dynamic=False, backend=BACKEND))
    return twin


def compiled_if_it_pays(
    model: nn.Module, image: tuple[int, int, int], *, images: int, shapes: int, bytes_per_element: int
) -> Callable[[Tensor], Tensor]:
    """Return `with_compiled_blocks`, or the network itself if compiling would take longer than it saves.

    Earlier trainings of the architecture in this process count, as far as `count_trained` was told of them.

    Args:
        model: the network, on its device.
        image: the shape (C, H, W) of an image.
        images: the number of images that the training shows.
        shapes: the number of different shapes of batches, each of which is compiled for itself.
        bytes_per_element: of the activations.
    """
    estimate = Estimate(
        len(block_kinds(model)),
        shapes,
        SAVED_PASSES * bytes_per_element * normed_elements(model, image) / bandwidth(next(model.parameters()).device),
        images + _trained_images[str(model)],
    )
    if _compiled == ("blocks", str(model)):
        return with_compiled_blocks(model)
    logger.info("%s", estimate)
    return with_compiled_blocks(model) if estimate.pays else model


def count_trained(model: nn.Module, images: int) -> None:
    """Count images of a training for the next decision of `compiled_if_it_pays`."""
    _trained_images[str(model)] += images


def _prepare(model: nn.Module, kind: str, limit: int) -> None:
    global _compiled
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    if BACKEND == "inductor" and on_cpu and not any(map(shutil.which, compilers)):
        raise UserError(
            "precision.compile: on a CPU torch.compile needs a C++ compiler; install g++, or set it to false"
        )
    # torch would silently run further shapes without compilation.
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = max(limit, 256)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if _compiled != (kind, str(model)):
        torch.compiler.reset()
        _compiled = (kind, str(model))


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the innermost elements of sequences that are neither layers nor sequences; without any, the network."""
    elements = [
        element
        for sequence in model.modules()
        if isinstance(sequence, _SEQUENCES)
        for element in sequence.children()
        if not isinstance(element, _SEQUENCES) and next(element.children(), None) is not None
    ]
    found = set(elements)
    return [e for e in elements if not any(inner in found for inner in e.modules() if inner is not e)] or [model]


def block_kinds(model: nn.Module) -> set[str]:
    """Return a description of each kind of block; equal blocks share compiled code."""
    return set(map(str, blocks(model)))


def normed_elements(model: nn.Module, image: tuple[int, int, int]) -> int:
    """Return the elements per image (C, H, W) of the outputs of all norms in blocks."""
    network = copy.deepcopy(model).to("meta")
    count = 0

    def add(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal count
        count += output.numel()

    norms = {module for block in blocks(network) for module in block.modules() if isinstance(module, _NORMS)}
    for norm in norms:
        norm.register_forward_hook(add)
    with blaming("precision.compile: auto cannot look into the network, set it to true or false"):
        network(torch.empty(2, *image, device="meta"))  # batch norm needs two
    return count // 2


def bandwidth(device: torch.device) -> float:
    """Return the bytes per second of a GPU's memory, or infinity for a CPU, which gains nothing from fewer passes."""
    if device.type == "cpu":  # measured: a step with compiled blocks takes 1.44 times as long
        return math.inf
    # Transfers twice per clock.
    properties = torch.cuda.get_device_properties(device)
    return float(2 * properties.memory_clock_rate * 1000 * properties.memory_bus_width / 8)


@dataclass(frozen=True)
class Estimate:
    """Whether compiling blocks pays; a prediction."""

    kinds: int
    """Of blocks."""
    shapes: int
    """Of batches, each compiled for itself."""
    saved_per_image_s: float
    images: int
    """Trained in this and in earlier trainings of the architecture in this process."""

    @property
    def cost_s(self) -> float:
        """Seconds to compile."""
        return COMPILE_S * self.kinds * self.shapes

    @property
    def saved_s(self) -> float:
        """Seconds saved by the training, and that earlier ones would have saved."""
        return self.saved_per_image_s * self.images

    @property
    def pays(self) -> bool:
        return self.saved_s > self.cost_s

    def __str__(self) -> str:
        verb = "compiling" if self.pays else "not compiling"
        return (
            f"precision.compile: auto: {verb} {self.kinds} kinds of blocks for {self.shapes} shapes of batches, which "
            f"takes about {self.cost_s:.0f} s and saves {self.saved_s:.3g} s in {self.images:,} images"
        )
