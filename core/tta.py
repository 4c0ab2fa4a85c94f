"""Predictions, over one view of each image or over several: test-time augmentation.

The key choice is what is averaged: the softmax probabilities of the views, each view with the same weight, whose
logarithm is returned. So the argmax, the loss and the calibration of several views are computed as those of one.

The views are fixed, none is drawn. `flip` adds the mirror image. `flip_shift` is the six views of the multi-crop
evaluation of Jordan 2024, arXiv 2404.00498: the image and two diagonal translations, each with its mirror image. A
translation is 1/32 of a side (there one pixel of 32), and the uncovered edge is filled by reflection, as there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Jordan 2024: one pixel of CIFAR-10's 32.
STEP_FRACTION = 1 / 32


class View(NamedTuple):
    """One way to look at an image: moved by whole steps, down and to the right where positive, then mirrored."""

    flip: bool = False
    down: int = 0
    right: int = 0


VIEWS: dict[str, tuple[View, ...]] = {
    "none": (View(),),
    "flip": (View(), View(flip=True)),
    "shift": (View(), View(down=-1), View(down=1), View(right=-1), View(right=1)),
    "flip_shift": tuple(View(flip, step, step) for flip in (False, True) for step in (0, -1, 1)),
}
"""The sets of views by name: the image itself, 2, 5 and 6 views."""


def predict_logits(
    model: nn.Module,
    images: Tensor,
    *,
    prepare: Callable[[Tensor], Tensor],
    views: str = "none",
    batch_size: int = 512,
    autocast: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> Tensor:
    """The model's answer to each image, in evaluation mode, without gradients; the model's mode is restored.

    Args:
        model: maps prepared images to logits (n, K).
        images: (N, C, H, W) uint8, N at least 1.
        prepare: turns (n, C, H, W) uint8 into the model's input: normalises, moves to its device if need be.
        views: a name in `VIEWS`.
        batch_size: how many images the model sees at once, every view of an image counted.
        autocast: makes the context that the model runs in.

    Returns:
        (N, K) float32: the logits for one view, the logarithm of the mean probabilities for several.
    """
    chosen = VIEWS[views]
    outputs = []
    with evaluating(model), torch.inference_mode():
        for batch in torch.split(images, max(1, batch_size // len(chosen))):
            stacked = torch.cat([look(batch, view) for view in chosen]) if len(chosen) > 1 else batch  # (V·n, C, H, W)
            with autocast():
                logits = model(prepare(stacked))  # (V·n, K)
            outputs.append(average(logits.float().unflatten(0, (len(chosen), -1))))
    return torch.cat(outputs)


def look(images: Tensor, view: View) -> Tensor:
    """The images as this view shows them: (N, C, H, W) of any type, the same shape."""
    for dim, steps in ((-2, view.down), (-1, view.right)):
        if steps:
            images = images.index_select(dim, _moved(images.shape[dim], steps, images.device))
    return images.flip(-1) if view.flip else images


def average(logits: Tensor) -> Tensor:
    """The views' logits (V, n, K) as one (n, K): for one view itself, else the log of the mean of the softmaxes."""
    if len(logits) == 1:
        return logits[0]
    return F.log_softmax(logits, dim=-1).logsumexp(0) - math.log(len(logits))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards each of its modules in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _moved(side: int, steps: int, device: torch.device) -> Tensor:
    """Where each position of a moved side is read: (side,), the positions beyond the edge reflected."""
    source = torch.arange(side, device=device) - steps * max(1, round(side * STEP_FRACTION))
    return (side - 1) - ((side - 1) - source.abs()).abs()
