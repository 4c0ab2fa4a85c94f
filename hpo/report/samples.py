"""A sheet of training images as the winner's configuration shows them to its network.

They go through the very pipeline of the training (`core.augment.Augment`, and its mixing), with random numbers of their
own that are the same for every report. What is normalised is turned back into pixels by the same mean and deviation, so
that an erased part has the colour that it has for the network: the mean.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpo.analysis.facts import Facts
from hpo.analysis.outputs import no_images
from hpo.report.page import Section, paragraph, picture

if TYPE_CHECKING:
    from torch import Tensor

    from core.config import AugmentConfig, TrainConfig
    from core.data import Dataset, Splits

SHEET_IMAGES, SHEET_DRAWS = 8, 8
TILE = (64, 96)
"""Pixels of an image on the sheet: smaller ones are enlarged, larger ones reduced, so that the file stays small."""


def augmented_samples(facts: Facts) -> Section | None:
    """A sheet of training images as the winner's configuration shows them; None before any trial is complete."""
    chosen = _configuration(facts)
    if chosen is None:
        return None
    config, whose = chosen
    title = "Augmentation"
    dataset = facts.dataset()
    if dataset is None:
        return Section("augment", title, "The images are not at hand.", "\n".join(no_images(facts).body))
    on = augmentations(config.augment)
    if not on:
        lead = f"{whose[0].upper()}{whose[1:]} augments nothing: its network saw every image as it is."
        return Section("augment", title, lead, "")
    lead = (
        f"Training images as {whose} has them augmented: {', '.join(on)}. A row is an image, its first tile as it is."
    )
    places = examples(dataset, SHEET_IMAGES)
    sheet = draw_sheet(dataset, places, config, SHEET_DRAWS)
    names = [dataset.classes[int(dataset.labels[place])] for place in places]
    body = [
        picture(sheet, alt=f"{len(places)} images, and {SHEET_DRAWS} augmented draws of each"),
        paragraph(f"From above: {', '.join(names)}.", kind="note"),
    ]
    if config.augment.start_size_fraction < 1:
        body.append(paragraph("Their smaller size at the beginning of the run is not shown.", kind="note"))
    return Section("augment", title, lead, "\n".join(body))


def _configuration(facts: Facts) -> tuple[TrainConfig, str] | None:
    """The configuration whose augmentation is shown, and whose it is in words."""
    from core.config import TrainConfig

    one = facts.confirmation
    if one is not None:
        winner = one.contender(one.winner)
        return TrainConfig.model_validate(winner.config, strict=False), f"the confirmed winner, {winner.key},"
    if facts.best is None:
        return None
    return facts.study.config_of(facts.best), f"the best trial, {facts.best.number},"


def augmentations(config: AugmentConfig) -> list[str]:
    """What of the augmentation is on, in words."""
    per_image = [
        (config.flip, "alternate flips" if config.alternate_flip else f"flip {config.flip:g}"),
        (config.vertical_flip, f"vertical flip {config.vertical_flip:g}"),
        (config.crop_pad_fraction, f"crop after padding {config.crop_pad_fraction:g}"),
        (config.crop_area_min < 1, f"crop of at least {config.crop_area_min:g} of the area"),
        (config.rotation_degrees, f"rotation ±{config.rotation_degrees:.3g}°"),
        (config.color_jitter, f"colour jitter ±{config.color_jitter:.3g}"),
        (_policy(config), _policy(config)),
        (config.erase, f"erasing {config.erase:g}"),
    ]
    mixing = [(config.mixup, f"mixup α {config.mixup:.3g}"), (config.cutmix, f"CutMix α {config.cutmix:.3g}")]
    found = [words for on, words in per_image if on]
    if found and config.apply_to == "repeats":
        found[-1] += " (on an image's repeats alone)"
    return found + [words for on, words in mixing if on and config.mix_probability]


def _policy(config: AugmentConfig) -> str:
    if config.policy in ("randaugment", "six"):
        return f"{config.policy}, {config.ops} operations at {config.strength:.3g}" if config.ops else ""
    return config.policy


def examples(dataset: Dataset, n: int) -> list[int]:
    """Positions of the first image of each class, of as many classes as there is room for, evenly chosen; of fewer
    classes, of further images of each."""
    labels = dataset.labels.numpy()
    by_class = [np.flatnonzero(labels == k) for k in range(len(dataset.classes))]
    filled = [places for places in by_class if len(places)]
    chosen = [filled[k] for k in sorted({round(k) for k in np.linspace(0, len(filled) - 1, min(n, len(filled)))})]
    found = [int(places[turn]) for turn in range(n) for places in chosen if turn < len(places)]
    return sorted(found[:n], key=lambda place: (labels[place], place))


def draw_sheet(dataset: Dataset, places: Sequence[int], config: TrainConfig, draws: int) -> bytes:
    """A PNG: a row an image, the first tile as it is, behind a gap so many augmented draws; always the same draws."""
    import torch

    from core.data import folds

    splits = folds(dataset, config.data)[0]  # for its mean and deviation
    chosen = torch.tensor(places)
    images, labels = dataset.images[chosen], dataset.labels[chosen]  # (n, C, H, W) uint8, (n,)
    columns = [images, *(_draw(images, labels, splits, config.augment, draw) for draw in range(draws))]
    return png(_sheet([[_tile(column[row]) for column in columns] for row in range(len(places))]))


def _draw(images: Tensor, labels: Tensor, splits: Splits, augment: AugmentConfig, draw: int) -> Tensor:
    """(n, C, H, W) uint8 as one step of the training would see them, mixed with each other where it mixes."""
    import torch

    from core.augment import Augment, apply_mix, plan_mix
    from core.runtime import derive_seed

    generator = torch.Generator().manual_seed(derive_seed(0, "augmented samples", draw))
    pipeline = Augment(augment, splits.mean, splits.std, torch.device("cpu"))
    flips = torch.rand(len(images), generator=generator) < 0.5
    shown = pipeline(images, generator, flips=flips, repeats=torch.ones(len(images), dtype=torch.bool))
    plan = plan_mix(augment, generator, shown.shape) if augment.mix_off_fraction > 0 else None
    if plan is not None:
        shown, _ = apply_mix(shown, labels, len(splits.classes), plan, generator)
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (splits.mean, splits.std))
    return shown.mul(std).add_(mean).mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def _tile(image: Tensor) -> NDArray[np.uint8]:
    """(C, H, W) uint8 as (h, w, 3): small ones enlarged by a whole factor, pixel by pixel, large ones reduced."""
    from PIL import Image

    pixels = np.moveaxis(image.numpy(), 0, -1)
    pixels = pixels.repeat(3, 2) if pixels.shape[2] == 1 else pixels
    side = max(pixels.shape[:2])
    if side > TILE[1]:
        small = Image.fromarray(np.ascontiguousarray(pixels))
        small.thumbnail((TILE[1], TILE[1]))
        return np.asarray(small)
    factor = max(1, math.ceil(TILE[0] / side))
    return pixels.repeat(factor, 0).repeat(factor, 1)


def _sheet(tiles: Sequence[Sequence[NDArray[np.uint8]]]) -> NDArray[np.uint8]:
    """The tiles in rows on white, the first column apart."""
    height, width = tiles[0][0].shape[:2]
    gap, apart = 3, 14  # pixels
    down, across = height + gap, width + gap
    sheet = np.full((len(tiles) * down - gap, len(tiles[0]) * across - gap + apart, 3), 255, dtype=np.uint8)
    for row, line in enumerate(tiles):
        for column, tile in enumerate(line):
            left = column * across + (apart if column else 0)
            sheet[row * down : row * down + height, left : left + width] = tile
    return sheet


def png(pixels: NDArray[np.uint8]) -> bytes:
    """(H, W, 3) as PNG, of 256 colours where there are more: a quarter of the file, and no more than a sheet needs."""
    from PIL import Image

    image: Any = Image.fromarray(pixels)
    if image.getcolors(256) is None:
        image = image.quantize(256)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
