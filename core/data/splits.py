"""Who is in which set: the locked cut of the test images, and the seeded draw of the validation images.

The test cut depends on the images alone. Within each class they are ordered by a hash of their pixels, and the first
ones are the test set: no seed, no file name and no order of files has a say, images that look equal stay on one
side, and adding an image moves hardly any other. The validation draw is scikit-learn's stratified one, once or into
folds, after which identical images go where the first of them was drawn to: a training image in validation would
flatter every score.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from core.config import DataConfig
from core.errors import UserError
from core.runtime import free_memory

logger = logging.getLogger(__name__)

# Part of the hash that orders images for the test cut. Changing it would change every test set that was cut so far.
CUT_SALT = b"hpo test cut 1"

# Mean and deviation of ImageNet's training images in [0, 1], as torchvision and timm use them.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# Share of a device's free memory that images may fill; the rest is for networks and what they compute.
RESIDENT_FRACTION = 0.5


@dataclass(frozen=True)
class Splits:
    """Training and validation images. `images` and `labels` hold both; indices tell them apart.

    All lie on one device, or the images alone on the host where they are too many for it.
    """

    images: Tensor
    """(N, C, H, W) uint8"""
    labels: Tensor
    """(N,) int64"""
    train: Tensor
    """(n,) int64, indices of the training images"""
    val: Tensor
    """(m,) int64, indices of the validation images; may be empty"""
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    """One a channel, of pixels in [0, 1]"""
    std: tuple[float, ...]
    """One a channel, of pixels in [0, 1]"""
    moments: Tensor | None = None
    """(N, C, 2) int64, each image's sums of pixels and of their squares, on the CPU. None where mean and std are
    constants, which then stay as they are."""

    def to(self, device: torch.device | str) -> Splits:
        """The same on that device; no copy of what is there already."""
        return replace(self.on(device), images=self.images.to(device))

    def on(self, device: torch.device | str) -> Splits:
        """All but the images on that device; they stay where they lie."""
        return replace(self, labels=self.labels.to(device), train=self.train.to(device), val=self.val.to(device))

    def whole(self) -> Splits:
        """All images for training and none for validation; mean and std follow where they come from the data."""
        train = torch.cat([self.train, self.val]).sort().values
        merged = replace(self, train=train, val=train[:0])
        if self.moments is None:
            return merged
        mean, std = _statistics(self.moments, train, self.images.shape)
        return replace(merged, mean=mean, std=std)


def stratified(
    images: Tensor,
    labels: Tensor,
    moments: Tensor,
    twins: Tensor,
    classes: tuple[str, ...],
    config: DataConfig,
    where: str,
) -> Splits:
    """Draws `val_fraction` of the images for validation, every class in proportion, by `split_seed`.

    Identical images stay together, so where there are some, the fraction and the proportions hold on average only.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        moments: (N, C, 2) int64, see `Splits`.
        twins: (N,) int64, for each image the index of the first one that is identical to it.

    Raises:
        UserError: a class would have no training image, or validation fewer images than classes, or none.
    """
    train, val = _draw(labels, twins, classes, config, where)
    return _normalized(images, labels, moments, train, val, classes, config)


def stratified_folds(
    images: Tensor,
    labels: Tensor,
    moments: Tensor,
    twins: Tensor,
    classes: tuple[str, ...],
    config: DataConfig,
    where: str,
) -> tuple[Splits, ...]:
    """Divides the images into `folds` parts, every class in proportion, by `split_seed`; each validates once.

    Identical images stay together, so where there are some, the parts are of one size and the classes in proportion on
    average only. All folds hold the same `images` and `labels`.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        moments: (N, C, 2) int64, see `Splits`.
        twins: (N,) int64, for each image the index of the first one that is identical to it.
        config: its `folds` is a number.

    Raises:
        UserError: a class has fewer images than there are folds, or would have no training image in one; or a fold
            would have nothing to validate.
    """
    parts = _draw_parts(labels, twins, classes, config, where)
    divided = []
    for part in range(int(config.folds or 1)):
        train, val = (parts != part).nonzero().squeeze(1), (parts == part).nonzero().squeeze(1)
        divided.append(_normalized(images, labels, moments, train, val, classes, config))
    return tuple(divided)


def on_device(folds: Sequence[Splits], device: torch.device | str) -> tuple[Splits, ...]:
    """Folds of the same images on that device, where the images lie once for all of them.

    Images that would take more than `RESIDENT_FRACTION` of a GPU's free memory stay on the host, from where a training
    sends them batch by batch.
    """
    images, device = folds[0].images, torch.device(device)
    if device.type == "cuda" and images.device.type == "cpu":
        free = free_memory(device)
        if images.nbytes > RESIDENT_FRACTION * free:
            logger.info(
                "the images take %.1f GB and %s has %.1f GB free: they stay on the host, and are sent batch by batch",
                images.nbytes / 1e9,
                device,
                free / 1e9,
            )
            return tuple(fold.on(device) for fold in folds)
    first = folds[0].to(device)
    return (first, *(replace(fold.on(device), images=first.images, labels=first.labels) for fold in folds[1:]))


def _normalized(
    images: Tensor,
    labels: Tensor,
    moments: Tensor,
    train: Tensor,
    val: Tensor,
    classes: tuple[str, ...],
    config: DataConfig,
) -> Splits:
    """The split with its mean and std: measured on its training images, or the constants that were asked for."""
    channels = images.shape[1]
    measured = None
    if config.normalize == "train":
        mean, std = _statistics(moments, train, images.shape)
        measured = moments
    elif config.normalize == "half":
        mean, std = (0.5,) * channels, (0.5,) * channels
    else:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        if channels == 1:
            mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    return Splits(images, labels, train, val, classes, mean, std, measured)


def _draw(
    labels: Tensor, twins: Tensor, classes: tuple[str, ...], config: DataConfig, where: str
) -> tuple[Tensor, Tensor]:
    from sklearn.model_selection import train_test_split

    count = len(labels)
    n_val = round(count * config.val_fraction)
    for part, size, cure in (("validation", n_val, "raise"), ("training", count - n_val, "lower")):
        if size < len(classes):
            raise UserError(
                f"{where}: data.val_fraction={config.val_fraction:g} leaves {size} {part} images of {count} "
                f"for {len(classes)} classes; {cure} it"
            )
    _, drawn = train_test_split(
        torch.arange(count).numpy(), test_size=n_val, stratify=labels.numpy(), random_state=config.split_seed
    )
    in_val = torch.zeros(count, dtype=torch.bool)
    in_val[torch.from_numpy(drawn)] = True
    together = in_val[twins]
    cure = (
        "lower it" if torch.equal(together, in_val) else "remove copies of its images, or try another data.split_seed"
    )
    train, val = (~together).nonzero().squeeze(1), together.nonzero().squeeze(1)
    if not len(val):
        raise UserError(
            f"{where}: all {n_val} validation images are copies of training images; "
            "remove the copies, or raise data.val_fraction"
        )
    missing = _absent(labels[train], classes)
    if missing:
        raise UserError(
            f"{where}: data.val_fraction={config.val_fraction:g} leaves no training image of "
            f"{', '.join(missing)}; {cure}"
        )
    missing = _absent(labels[val], classes)
    if missing:
        logger.info("%s: too few images of %s for one in validation", where, ", ".join(missing))
    return train, val


def _draw_parts(labels: Tensor, twins: Tensor, classes: tuple[str, ...], config: DataConfig, where: str) -> Tensor:
    """Which fold validates each image: (N,) int64, counted from 0."""
    from sklearn.model_selection import StratifiedKFold

    assert config.folds is not None
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    fewest = min(counts)
    if fewest < config.folds:
        raise UserError(
            f"{where}: data.folds={config.folds} needs as many images of every class, and of "
            f"{classes[counts.index(fewest)]} there are {fewest}; lower it, or add images"
        )
    draw: Any = StratifiedKFold(config.folds, shuffle=True, random_state=config.split_seed)
    drawn = torch.empty(len(labels), dtype=torch.int64)
    for part, (_, chosen) in enumerate(draw.split(labels.numpy(), labels.numpy())):
        drawn[torch.from_numpy(chosen)] = part
    parts = drawn[twins]
    for part in range(config.folds):
        inside = parts == part
        which = f"{where}: data.folds={config.folds}: fold {part + 1}"
        if not inside.any():
            raise UserError(f"{which} has only copies of images in others to validate; remove the copies, or lower it")
        missing = _absent(labels[~inside], classes)
        if missing:
            raise UserError(
                f"{which} has no training image of {', '.join(missing)}; "
                "remove copies of its images, or try another data.split_seed"
            )
        missing = _absent(labels[inside], classes)
        if missing:
            logger.info("%s has no image of %s to validate: too many are copies", which, ", ".join(missing))
    return parts


def _absent(labels: Tensor, classes: tuple[str, ...]) -> list[str]:
    counts = torch.bincount(labels, minlength=len(classes))
    return [name for name, present in zip(classes, counts.tolist(), strict=True) if not present]


def _statistics(moments: Tensor, indices: Tensor, shape: torch.Size) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation a channel of these images' pixels in [0, 1], exact: sums of integers, divided once.

    A channel that never varies has no deviation to divide by, and gets 1.
    """
    pixels = len(indices) * shape[2] * shape[3]
    sums = moments[indices.cpu()].sum(dim=0).tolist()  # (C, 2), at most 65025 × pixels: far below 2**63
    mean = tuple(total / pixels / 255 for total, _ in sums)
    # pixels × squares − total² is the variance × pixels², in whole numbers: nothing cancels.
    std = tuple((pixels * squares - total * total) ** 0.5 / pixels / 255 or 1.0 for total, squares in sums)
    return mean, std


def cut_test(digests: Sequence[bytes], labels: Sequence[str], fraction: float) -> list[bool]:
    """Which images are the test set: about `fraction` of each class, at least one, and at least two left of it.

    Args:
        digests: one an image, equal for images that look equal.
        labels: their classes.
    """
    quota = {label: max(min(max(round(n * fraction), 1), n - 2), 0) for label, n in Counter(labels).items()}
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, digest in enumerate(digests):
        groups[hashlib.sha256(CUT_SALT + digest).digest()].append(index)
    chosen = [False] * len(labels)
    for order in sorted(groups):
        wanted = Counter(labels[index] for index in groups[order])
        if all(quota[label] >= n for label, n in wanted.items()):
            for index in groups[order]:
                chosen[index] = True
            for label, n in wanted.items():
                quota[label] -= n
    return chosen
