"""Predictions of networks on images that they were not trained on: the evidence for the choices of a refit.

A training of a confirmation has EMAs of several half-lives beside its own averaging, and its outputs are stored for
each average and choice of views. Search trials have none: on two CPU cores they took 2 to 7 % of the time of small
networks.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.augment import largest_shift
from core.averaging import ema_name
from core.config import AugmentConfig, TrainConfig
from core.data import Splits
from core.feed import open_feed
from core.loop import TrainResult
from core.runtime import autocast, normalize
from core.tta import EVALUATION_BATCH, evaluation_batch, predict_by_views, step_pixels
from hpo.errors import StudyError
from hpo.storage.atomic import replacing

HALF_LIVES = (0.01, 0.03, 0.1)
"""Half-lives of the EMAs that are tried, as fractions of the run."""

OWN = "own"
"""The average that the configuration has, or its weights if it has none."""
NONE = "none"
"""The weights themselves; one view."""

Outputs = Mapping[str, Mapping[str, Tensor]]
"""Logits (M, K) float32 by average, such as `own` or `ema_0.03`, and by views, a name in `core.tta.VIEWS`."""


def half_lives(config: TrainConfig) -> tuple[float, ...]:
    """Return the half-lives of the EMAs worth trying.

    A probe has none, nor has SWA, whose schedule holds a high rate for its own average.
    """
    if config.is_probe or config.averaging.name == "swa":
        return ()
    own = config.averaging.half_life_fraction if config.averaging.name == "ema" else None
    return tuple(each for each in HALF_LIVES if each != own)


def known_average(config: TrainConfig, name: str) -> str:
    """Return the name by which candidates have an average that the user has given.

    Raises:
        StudyError: There is no such average, or the configuration cannot have it.
    """
    half_life = re.fullmatch(r"ema_(0?\.\d+)", name)
    if name not in (OWN, NONE) and (half_life is None or not 0 < float(half_life[1]) <= 0.5):
        raise StudyError(f"--average {name}: give own, none, or ema_H with a half-life H up to 0.5, such as ema_0.03")
    own = config.averaging
    if name == OWN or (name == NONE and (own.name == "none" or config.is_probe)):
        return OWN
    if not half_lives(config):
        kind = "a probe" if config.is_probe else "an average by SWA, whose learning rate would not suit another"
        raise StudyError(f"--average {name}: the configuration trains {kind}; give own")
    if half_life is None:
        return NONE
    same = own.name == "ema" and own.half_life_fraction == float(half_life[1])
    return OWN if same else ema_name(float(half_life[1]))


def averages_of(config: TrainConfig) -> tuple[str, ...]:
    """Return the averages to choose from, the configuration's own first."""
    weights = [NONE] if config.averaging.name == "ema" and not config.is_probe else []
    return (OWN, *weights, *map(ema_name, half_lives(config)))


def views_of(config: TrainConfig, splits: Splits) -> tuple[str, ...]:
    """Return the views to choose from, one view first."""
    height, width = splits.images.shape[-2:]
    return (NONE, *useful_views(config.augment, (height, width)))


def useful_views(augment: AugmentConfig, size: tuple[int, int]) -> tuple[str, ...]:
    """Return the names of the views, besides `none`, that a network may gain from: those like its training images.

    It has seen mirrored images if the training flips, and shifted ones if the crops shift images of this size (height,
    width) as far. Where both hold, shifts without mirrored images are left out: more names would need larger gains.
    """
    flips = augment.flip > 0
    shifts = all(largest_shift(augment, side) >= step_pixels(side) for side in size)
    return (*(["flip"] if flips else []), *(["flip_shift" if flips else "shift"] if shifts else []))


def predicted(
    model: nn.Module, config: TrainConfig, splits: Splits, batches: Iterable[Tensor], views: Collection[str]
) -> dict[str, Tensor]:
    """Predict batches of images (n, C, H, W) uint8 on any device, each view of an image once.

    Returns:
        Logits (N, K) on the labels' device by choice of views. The network returns to its device.
    """
    home, device = next(model.parameters()).device, splits.labels.device
    height, width = splits.images.shape[-2:]
    at_once = evaluation_batch(config.model, (height, width), device)
    try:
        model.to(device)
        parts = [
            predict_by_views(
                model,
                images.to(device),
                prepare=partial(normalize, mean=splits.mean, std=splits.std),
                names=views,
                batch_size=at_once,
                autocast=partial(autocast, config.precision.autocast, device),
            )
            for images in batches
        ]
    finally:
        model.to(home)
    return {name: torch.cat([part[name] for part in parts]) for name in views}


def held_out(model: nn.Module, config: TrainConfig, splits: Splits, views: Collection[str]) -> dict[str, Tensor]:
    """Predict the validation images: logits (M, K), in the order of `Splits.val`, by choice of views."""
    batches = open_feed(splits.images, splits.labels.device).batches(torch.split(splits.val, EVALUATION_BATCH))
    return predicted(model, config, splits, batches, views)


def outputs_of(result: TrainResult, config: TrainConfig, splits: Splits) -> Outputs:
    """Return the outputs of a training on its validation images, with all choices that its averages allow."""
    networks = {OWN: result.model, **result.averages}
    views = views_of(config, splits)
    return {average: held_out(model, config, splits, views) for average, model in networks.items()}


def write_outputs(file: Path, result: TrainResult, splits: Splits, outputs: Outputs | None = None) -> None:
    """Write the network's `logits` (M, K) on the validation images, whose `indices` (M,) are rows of the data set.

    `outputs` are written beside them, by names such as `logits.ema_0.03.flip`.
    """
    assert result.val_logits is not None, "a trial has validation images"
    named = {
        f"logits.{average}.{views}": logits.cpu().contiguous()
        for average, by_views in (outputs or {}).items()
        for views, logits in by_views.items()
    }
    with replacing(file) as temporary:
        save_file(
            {"logits": result.val_logits.cpu().contiguous(), "indices": splits.val.cpu(), **named}, str(temporary)
        )


def read_outputs(file: Path) -> tuple[Tensor, Outputs]:
    """Read the rows (M,) int64 of the images, and the outputs; of a search trial the plain ones alone."""
    tensors = load_file(file)
    found: dict[str, dict[str, Tensor]] = {OWN: {NONE: tensors["logits"]}}
    for name, logits in tensors.items():
        if name.startswith("logits."):
            average, _, views = name.removeprefix("logits.").rpartition(".")
            found.setdefault(average, {})[views] = logits
    return tensors["indices"], found
