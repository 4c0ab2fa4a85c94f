"""The section on augmentation: training images as the winner's configuration augments them.

They pass through the training's own pipeline (`core.augment.Augment` and its mixing), with random numbers that are the
same for every report. Normalization is undone, so that erased parts have the color that the network sees: the mean.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from core.text import count
from hpo.analysis.study_data import StudyData
from hpo.dashboard.pictures import enlarged
from hpo.report.images import no_images
from hpo.report.page import Section, note, picture, section
from hpo.text import sentence

if TYPE_CHECKING:
    from torch import Tensor

    from core.config import AugmentConfig, TrainConfig
    from core.data import Dataset, Splits

_IMAGES, _DRAWS = 8, 8
_SIDE = 64, 96  # pixels of an enlarged image's side, the aim and the maximum, so that the file stays small
_GAP = 3  # pixels


def augmented_samples(data: StudyData) -> Section | None:
    """A sheet of augmented training images; None before any trial is complete."""
    from core.config import TrainConfig

    if data.confirmation is not None:
        winner = data.confirmation.contender(data.confirmation.winner)
        config, owner = TrainConfig.model_validate(winner.config, strict=False), f"the confirmed winner, {winner.name},"
    elif data.best is not None:
        config, owner = data.study.config_of(data.best), f"the best trial, {data.best.number},"
    else:
        return None
    if data.dataset is None:
        return section("augment", "Augmentation", "The images are not available.", no_images(data))
    on = augmentations(config.augment)
    if not on:
        lead = f"{sentence(owner)} augments nothing: its network saw unchanged images."
        return section("augment", "Augmentation", lead)
    lead = f"Training images as {owner} augments them: {', '.join(on)}. Each row begins with the unchanged image."
    places = examples(data.dataset, _IMAGES)
    names = [data.dataset.classes[int(data.dataset.labels[place])] for place in places]
    notes = [note(f"From above: {', '.join(names)}.")]
    if config.augment.start_size_fraction < 1:
        notes.append(note("The smaller size at the beginning of the run is not shown."))
    sheet = draw_sheet(data.dataset, places, config, _DRAWS)
    alt = f"{count(len(places), 'image')}, and {_DRAWS} augmented draws of each"
    return section("augment", "Augmentation", lead, picture(sheet, alt=alt), notes)


def augmentations(config: AugmentConfig) -> list[str]:
    """The enabled augmentations, in words."""
    policy: str = config.policy
    if config.policy in ("randaugment", "six"):
        policy = f"{config.policy}, {config.ops} operations at {config.strength:.3g}" if config.ops else ""
    per_image = [
        (config.flip, "alternate flips" if config.alternate_flip else f"flip {config.flip:g}"),
        (config.vertical_flip, f"vertical flip {config.vertical_flip:g}"),
        (config.crop_pad_fraction, f"crop after padding {config.crop_pad_fraction:g}"),
        (config.crop_area_min < 1, f"crop of at least {config.crop_area_min:g} of the area"),
        (config.rotation_degrees, f"rotation ±{config.rotation_degrees:.3g}°"),
        (config.scale, f"zoom ±{config.scale:.3g}"),
        (config.shear_degrees, f"shear ±{config.shear_degrees:.3g}°"),
        (config.color_jitter, f"color jitter ±{config.color_jitter:.3g}"),
        (policy, policy),
        (config.erase, f"erasing {config.erase:g}"),
    ]
    mixing = [(config.mixup, f"mixup α {config.mixup:.3g}"), (config.cutmix, f"CutMix α {config.cutmix:.3g}")]
    found = [words for on, words in per_image if on]
    if found and config.apply_to == "repeats":
        found[-1] += " (on repeats of an image only)"
    return found + [words for on, words in mixing if on and config.mix_probability]


def examples(dataset: Dataset, n: int) -> list[int]:
    """Positions of n images: the first of evenly chosen classes; with fewer classes, further images of each."""
    labels = dataset.labels.numpy()
    by_class = [np.flatnonzero(labels == k) for k in range(len(dataset.classes))]
    filled = [places for places in by_class if len(places)]
    chosen = [filled[k] for k in sorted({round(k) for k in np.linspace(0, len(filled) - 1, min(n, len(filled)))})]
    found = [int(places[turn]) for turn in range(n) for places in chosen if turn < len(places)]
    return sorted(found[:n], key=lambda place: (labels[place], place))


def draw_sheet(dataset: Dataset, places: Sequence[int], config: TrainConfig, draws: int) -> bytes:
    """Draw a PNG with a row per image: the unchanged image, a gap, and the augmented draws, always the same."""
    import torch
    from torchvision.utils import make_grid

    from core.data import folds

    splits = folds(dataset, config.data)[0]  # for the mean and deviation of its pixels
    chosen = torch.tensor(places)
    images, labels = dataset.images[chosen], dataset.labels[chosen]  # (n, C, H, W) uint8, (n,)
    drawn = torch.stack([_draw(images, labels, splits, config.augment, draw) for draw in range(draws)], dim=1)

    def grid(tiles: Tensor, columns: int) -> Tensor:
        shown = torch.stack([torch.from_numpy(enlarged(tile, *_SIDE)).movedim(-1, 0) for tile in tiles])
        sheet: Tensor = make_grid(shown, nrow=columns, padding=_GAP, pad_value=255)
        return sheet

    sheet = torch.cat([grid(images, 1), grid(drawn.flatten(0, 1), draws)], dim=2)
    return _png(sheet.movedim(0, -1).numpy())


def _draw(images: Tensor, labels: Tensor, splits: Splits, augment: AugmentConfig, draw: int) -> Tensor:
    """Augment and mix images as one training step does: (n, C, H, W) uint8."""
    import torch

    from core.augment import Augment, apply_mix, plan_mix
    from core.seeds import derive_seed

    generator = torch.Generator().manual_seed(derive_seed(0, "augmented samples", draw))
    pipeline = Augment(augment, splits.mean, splits.std, torch.device("cpu"))
    flips = torch.rand(len(images), generator=generator) < 0.5
    shown = pipeline(images, generator, flips=flips, repeats=torch.ones(len(images), dtype=torch.bool))
    plan = plan_mix(augment, generator, shown.shape) if augment.mix_off_fraction > 0 else None
    if plan is not None:
        shown, _ = apply_mix(shown, labels, len(splits.classes), plan, generator)
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (splits.mean, splits.std))
    return shown.mul(std).add_(mean).mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def _png(pixels: Any) -> bytes:
    """Encode (H, W, 3) uint8 as PNG with at most 256 colors, which takes a quarter of the size."""
    from PIL import Image

    image: Any = Image.fromarray(pixels)
    if image.getcolors(256) is None:
        image = image.quantize(256)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
