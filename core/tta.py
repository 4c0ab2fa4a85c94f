"""Test-time augmentation: the mean of the probabilities over fixed views of each image.

`flip_shift` are the six views of arXiv 2404.00498: the image and two diagonal translations by 1/32 of the side, filled
by reflection, each also mirrored.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config import ModelConfig
from core.runtime import evaluating

STEP_FRACTION = 1 / 32  # one of CIFAR-10's pixels


class View(NamedTuple):
    """An image moved by whole steps, then mirrored."""

    flip: bool = False
    down: int = 0
    right: int = 0


VIEWS: dict[str, tuple[View, ...]] = {
    "none": (View(),),
    "flip": (View(), View(flip=True)),
    "shift": (View(), View(down=-1), View(down=1), View(right=-1), View(right=1)),
    "flip_shift": tuple(View(flip, step, step) for flip in (False, True) for step in (0, -1, 1)),
}
"""Views by name."""


def passes(views: str) -> int:
    """Return how often each image passes the network."""
    return len(VIEWS[views])


MOST_PASSES = max(map(passes, VIEWS))

EVALUATION_BATCH = 512
"""Images per forward pass without gradients: fills a GPU, yet fits a small one at 224²."""

CPU_PIXELS, CPU_FEWEST = 512 * 32 * 32, 8
"""Pixels of a batch on a CPU, and its fewest images: larger ones are slower there, and may need all memory."""


def evaluation_batch(config: ModelConfig, image_size: tuple[int, int], device: torch.device) -> int:
    """Return how many images (H, W) pass the network at once in evaluation, at most."""
    if device.type != "cpu":
        return EVALUATION_BATCH
    return min(EVALUATION_BATCH, max(CPU_FEWEST, CPU_PIXELS // config.input_pixels(image_size)))


def predict_logits(
    model: nn.Module,
    images: Tensor,
    *,
    prepare: Callable[[Tensor], Tensor],
    views: str = "none",
    batch_size: int = EVALUATION_BATCH,
    autocast: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> Tensor:
    """Predict (N, K) float32 logits in evaluation mode, or the logarithm of the mean probabilities of several views.

    `prepare` turns images (N, C, H, W) uint8 into the model's input. `batch_size` counts every view.
    """
    return predict_by_views(model, images, prepare=prepare, names=(views,), batch_size=batch_size, autocast=autocast)[
        views
    ]


def predict_by_views(
    model: nn.Module,
    images: Tensor,
    *,
    prepare: Callable[[Tensor], Tensor],
    names: Collection[str],
    batch_size: int = EVALUATION_BATCH,
    autocast: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> dict[str, Tensor]:
    """Predict as `predict_logits` with each choice of views. A view that several contain passes the network once."""
    distinct = list(dict.fromkeys(view for name in names for view in VIEWS[name]))
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}
    with evaluating(model), torch.inference_mode():
        for batch in torch.split(images, max(1, batch_size // len(distinct))):
            stacked = torch.cat([look(batch, view) for view in distinct]) if len(distinct) > 1 else batch
            with autocast():
                logits = model(prepare(stacked))  # (V·n, K)
            of_view = dict(zip(distinct, logits.float().unflatten(0, (len(distinct), -1)), strict=True))
            for name in names:
                outputs[name].append(average(torch.stack([of_view[view] for view in VIEWS[name]])))
    return {name: torch.cat(parts) for name, parts in outputs.items()}


def look(images: Tensor, view: View) -> Tensor:
    """Apply a view to images (N, C, H, W)."""
    for dim, steps in ((-2, view.down), (-1, view.right)):
        if steps:
            images = images.index_select(dim, _moved(images.shape[dim], steps, images.device))
    return images.flip(-1) if view.flip else images


def average(logits: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Combine the logits of views or networks: (V, n, K) to (n, K).

    Args:
        weights: (V,) positive, of the probabilities; equal by default.
    """
    if len(logits) == 1:
        return logits[0]
    logs = F.log_softmax(logits, dim=-1)
    if weights is None or len(set(weights)) == 1:
        return logs.logsumexp(0) - math.log(len(logits))
    return torch.stack([log + math.log(w / sum(weights)) for log, w in zip(logs, weights, strict=True)]).logsumexp(0)


def step_pixels(side: int) -> int:
    """Return the pixels of a translation of an image with such a side."""
    return max(1, round(side * STEP_FRACTION))


def _moved(side: int, steps: int, device: torch.device) -> Tensor:
    source = torch.arange(side, device=device) - steps * step_pixels(side)
    return (side - 1) - ((side - 1) - source.abs()).abs()
