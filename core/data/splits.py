"""Selection of test images by content, and seeded selection of validation images.

Within each class, images are ordered by a hash of their pixels, and the first ones form the test set, so seeds, names
and order of files have no effect. Validation images are drawn by scikit-learn; identical images are then moved to the
set of the first of them, since duplicates across sets inflate scores. Groups of images, if there are any, are drawn
whole, and identical images are then in one group.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.config import DataConfig
from core.data.groups import firsts, linked
from core.errors import UserError
from core.runtime import free_memory

logger = logging.getLogger(__name__)

# Salt of the hash for the test set. Changing it changes all test sets.
CUT_SALT = b"hpo test cut 1"

# Validation takes some of at most this many parts of the groups; more parts need more time and are less alike.
MOST_PARTS = 10

# Mean and deviation of ImageNet in [0, 1], as in torchvision and timm.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# Maximum fraction of a device's free memory for images; the rest is for training.
RESIDENT_FRACTION = 0.5


@dataclass(frozen=True)
class Splits:
    """Training and validation images, selected by indices, on one device or with the images on the host."""

    images: Tensor
    """(N, C, H, W) uint8."""
    labels: Tensor
    """(N,) int64."""
    train: Tensor
    """(n,) int64 indices of the training images."""
    val: Tensor
    """(m,) int64 indices of the validation images; may be empty."""
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    """One per channel, of pixels in [0, 1]."""
    std: tuple[float, ...]
    """One per channel, of pixels in [0, 1]."""
    moments: Tensor | None = None
    """(N, C, 2) int64 sums of pixels and squared pixels of each image, on the CPU; None for constant mean and std."""
    together: Tensor | None = None
    """(N,) int64 on the CPU, equal for images that every split keeps on one side; None if all may be parted."""

    def to(self, device: torch.device | str) -> Splits:
        """Return the splits on that device, copying only if needed."""
        return replace(self.on(device), images=self.images.to(device))

    def on(self, device: torch.device | str) -> Splits:
        """Return the splits on that device, with images where they are."""
        return replace(self, labels=self.labels.to(device), train=self.train.to(device), val=self.val.to(device))

    def whole(self) -> Splits:
        """Return all images for training and none for validation; measured mean and std are recomputed."""
        train = torch.cat([self.train, self.val]).sort().values
        merged = replace(self, train=train, val=train[:0])
        if self.moments is None:
            return merged
        mean, std = _statistics(self.moments, train, self.images.shape)
        return replace(merged, mean=mean, std=std)


class Labelled(Protocol):
    """Images to split, such as a `Dataset`."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def moments(self) -> Tensor: ...

    @property
    def twins(self) -> Tensor: ...

    @property
    def groups(self) -> Tensor | None: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def source(self) -> str: ...


def stratified(data: Labelled, config: DataConfig) -> Splits:
    """Draw `val_fraction` of the images for validation, stratified by class, with `split_seed`; groups stay whole.

    With `val_part`, this is one of as many disjoint validation sets as there are, see `val_parts`.

    Raises:
        UserError: a class would have no training image, or validation fewer images than classes, or none; with
            `val_part`, in any of the parts; or there is no such part.
    """
    return _normalized(data, *_draw(data, config), config)


def val_parts(data: Labelled, config: DataConfig) -> int:
    """Return the number of disjoint validation sets that a `split_seed` gives."""
    if data.groups is None:
        return int(1 / config.val_fraction + 1e-9)  # less a rounding error
    taken, parts = _share_of_groups(data, data.groups, config.val_fraction)
    return parts // taken


def given(data: Labelled, in_val: Tensor, config: DataConfig) -> Splits:
    """Use the validation images that the data set gives.

    Args:
        data: the images.
        in_val: (N,) whether each is one of them.
        config: the normalization.

    Raises:
        UserError: a group has images on both sides.
    """
    if data.groups is not None:
        both = set(data.groups[in_val].tolist()) & set(data.groups[~in_val].tolist())
        if both:
            raise UserError(
                f"{data.source}: data.group: {len(both):,} groups have images inside and outside its val set; "
                "move them to one side, draw validation images by --set data.val=drawn, or leave data.group out"
            )
    return _normalized(data, (~in_val).nonzero().squeeze(1), in_val.nonzero().squeeze(1), config)


def stratified_folds(data: Labelled, config: DataConfig) -> tuple[Splits, ...]:
    """Divide the images into `folds` parts, stratified by class, with `split_seed`; each part validates once.

    Raises:
        UserError: a class has fewer images than there are folds, or would have no training image in one; or a fold
            would have no validation image; or there are fewer groups than folds.
    """
    assert config.folds is not None
    parts = _draw_parts(data, config)
    return tuple(
        _normalized(data, (parts != part).nonzero().squeeze(1), (parts == part).nonzero().squeeze(1), config)
        for part in range(config.folds)
    )


def on_device(folds: Sequence[Splits], device: torch.device | str) -> tuple[Splits, ...]:
    """Move folds of the same images to a device, sharing one copy of the images.

    Images that would take more than `RESIDENT_FRACTION` of a GPU's free memory stay on the host and are streamed.
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


def _normalized(data: Labelled, train: Tensor, val: Tensor, config: DataConfig) -> Splits:
    """The split with mean and std measured on its training images, or constants."""
    channels = data.images.shape[1]
    measured = None
    if config.normalize == "train":
        mean, std = _statistics(data.moments, train, data.images.shape)
        measured = data.moments
    elif config.normalize == "half":
        mean, std = (0.5,) * channels, (0.5,) * channels
    else:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        if channels == 1:
            mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    together = data.twins if data.groups is None else data.groups
    return Splits(data.images, data.labels, train, val, data.classes, mean, std, measured, together)


def _draw(data: Labelled, config: DataConfig) -> tuple[Tensor, Tensor]:
    labels, classes, where = data.labels, data.classes, data.source
    count = len(labels)
    n_val = round(count * config.val_fraction)
    for part, size, cure in (("validation", n_val, "raise"), ("training", count - n_val, "lower")):
        if size < len(classes):
            raise UserError(
                f"{where}: data.val_fraction={config.val_fraction:g} leaves {size} {part} images of {count} "
                f"for {len(classes)} classes; {cure} it"
            )
    if data.groups is None:
        drawn = _draw_images(data, n_val, config)
        copies = not torch.equal(drawn[:, data.twins], drawn)
        cure = "remove copies of its images, or try another data.split_seed" if copies else "lower it"
        drawn = drawn[:, data.twins]
    else:
        drawn = _draw_groups(data, data.groups, config)
        cure = "add images of another group, or try another data.split_seed"
    number = config.val_part or 0
    if number >= len(drawn):
        raise UserError(
            f"{where}: data.val_part={number}: data.val_fraction={config.val_fraction:g} gives {len(drawn)} disjoint "
            "validation sets, counted from 0; lower it"
        )
    for in_val in drawn:
        if not in_val.any():
            raise UserError(
                f"{where}: all {n_val} validation images are copies of training images; "
                "remove the copies, or raise data.val_fraction"
            )
        missing = _absent(labels[~in_val], classes)
        if missing:
            raise UserError(
                f"{where}: data.val_fraction={config.val_fraction:g} leaves no training image of "
                f"{', '.join(missing)}; {cure}"
            )
    train, val = (~drawn[number]).nonzero().squeeze(1), drawn[number].nonzero().squeeze(1)
    missing = _absent(labels[val], classes)
    if missing:
        logger.info("%s: too few images of %s for one in validation", where, ", ".join(missing))
    return train, val


def _draw_images(data: Labelled, n_val: int, config: DataConfig) -> Tensor:
    """(parts, N) whether each image validates, before copies are moved; one part without `val_part`."""
    from sklearn.model_selection import train_test_split

    count = len(data.labels)
    if config.val_part is None:
        _, drawn = train_test_split(
            torch.arange(count).numpy(), test_size=n_val, stratify=data.labels.numpy(), random_state=config.split_seed
        )
        sets = [torch.from_numpy(drawn)]
    else:
        order = _stratified_order(data.labels, config.split_seed)
        ends = [round(count * part * config.val_fraction) for part in range(val_parts(data, config) + 1)]
        sets = [order[first:last] for first, last in pairwise(ends)]
    in_val = torch.zeros((len(sets), count), dtype=torch.bool)
    for part, chosen in enumerate(sets):
        in_val[part, chosen] = True
    return in_val


def _stratified_order(labels: Tensor, seed: int) -> Tensor:
    """Shuffle images so that any run of consecutive ones has the classes in proportion, within about one image."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=draw)
    places = torch.empty(len(labels), dtype=torch.float64)
    for label in set(labels.tolist()):
        own = (labels[order] == label).nonzero().squeeze(1)
        places[own] = (torch.arange(len(own)) + torch.rand(1, generator=draw, dtype=torch.float64)) / len(own)
    return order[places.argsort()]


def _share_of_groups(data: Labelled, groups: Tensor, val_fraction: float) -> tuple[int, int]:
    """How many of how many equal parts of the groups validate."""
    most = min(MOST_PARTS, _count(groups), int(data.labels.bincount().max()))
    shares = [(taken, parts) for parts in range(2, most + 1) for taken in range(1, parts)]
    return min(shares, key=lambda share: (abs(share[0] / share[1] - val_fraction), share[1]))


def _draw_groups(data: Labelled, groups: Tensor, config: DataConfig) -> Tensor:
    """(parts, N) whether each image validates: some of several equal parts, in the seed's order.

    Few large groups can be divided into equal parts in one way only; the order of the parts still varies.
    """
    taken, parts = _share_of_groups(data, groups, config.val_fraction)
    part_of = _parts_of_groups(data, groups, parts, config.split_seed)
    order = torch.randperm(parts, generator=torch.Generator().manual_seed(config.split_seed))
    sets = 1 if config.val_part is None else parts // taken
    return torch.stack([torch.isin(part_of, order[part * taken : (part + 1) * taken]) for part in range(sets)])


def _parts_of_groups(data: Labelled, groups: Tensor, parts: int, seed: int) -> Tensor:
    """(N,) the part of each image: equal parts of whole groups, stratified by class."""
    from sklearn.model_selection import StratifiedGroupKFold

    draw: Any = StratifiedGroupKFold(parts, shuffle=True, random_state=seed)
    labels = data.labels.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a class has fewer images than there are parts
        return _numbered(len(labels), draw.split(labels, labels, groups.numpy()))


def _count(groups: Tensor) -> int:
    return len(set(groups.tolist()))


def _numbered(count: int, divided: Iterable[tuple[Any, Any]]) -> Tensor:
    """(count,) the number of the fold that validates each image."""
    parts = torch.empty(count, dtype=torch.int64)
    for part, (_, chosen) in enumerate(divided):
        parts[torch.from_numpy(chosen)] = part
    return parts


def _draw_parts(data: Labelled, config: DataConfig) -> Tensor:
    from sklearn.model_selection import StratifiedKFold

    assert config.folds is not None
    labels, classes, where = data.labels, data.classes, data.source
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    fewest = min(counts)
    if fewest < config.folds:
        raise UserError(
            f"{where}: data.folds={config.folds} needs as many images of every class, and of "
            f"{classes[counts.index(fewest)]} there are {fewest}; lower it, or add images"
        )
    if data.groups is None:
        draw: Any = StratifiedKFold(config.folds, shuffle=True, random_state=config.split_seed)
        parts = _numbered(len(labels), draw.split(labels.numpy(), labels.numpy()))[data.twins]
    elif (groups := _count(data.groups)) < config.folds:
        raise UserError(f"{where}: data.folds={config.folds} needs as many groups, and there are {groups}; lower it")
    else:
        parts = _parts_of_groups(data, data.groups, config.folds, config.split_seed)
    together = "copies of its images" if data.groups is None else "images of its groups"
    for part in range(config.folds):
        inside = parts == part
        which = f"{where}: data.folds={config.folds}: fold {part + 1}"
        if not inside.any():
            raise UserError(f"{which} has only copies of images in others to validate; remove the copies, or lower it")
        missing = _absent(labels[~inside], classes)
        if missing:
            raise UserError(
                f"{which} has no training image of {', '.join(missing)}; "
                f"remove {together}, or try another data.split_seed"
            )
        missing = _absent(labels[inside], classes)
        if missing:
            why = "copies" if data.groups is None else "in one group"
            logger.info("%s has no image of %s to validate: too many are %s", which, ", ".join(missing), why)
    return parts


def _absent(labels: Tensor, classes: tuple[str, ...]) -> list[str]:
    counts = torch.bincount(labels, minlength=len(classes))
    return [name for name, present in zip(classes, counts.tolist(), strict=True) if not present]


def _statistics(moments: Tensor, indices: Tensor, shape: torch.Size) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact mean and deviation per channel of these images' pixels in [0, 1].

    A constant channel gets a deviation of 1.
    """
    pixels = len(indices) * shape[2] * shape[3]
    sums = moments[indices.cpu()].sum(dim=0).tolist()  # (C, 2), at most 65025 × pixels, below 2**63
    mean = tuple(total / pixels / 255 for total, _ in sums)
    # pixels × squares − total² is variance × pixels², exact in integers.
    std = tuple((pixels * squares - total * total) ** 0.5 / pixels / 255 or 1.0 for total, squares in sums)
    return mean, std


def cut_test(
    digests: Sequence[bytes],
    labels: Sequence[str],
    fraction: float,
    *,
    copies: NDArray[np.int64] | None = None,
    groups: Sequence[str] | None = None,
) -> list[bool]:
    """Select the test images: about `fraction` of each class, at least one, leaving at least two.

    Args:
        digests: equal for identical images.
        labels: the classes.
        fraction: of each class.
        copies: (N,) equal for identical images and near-duplicates, which are selected together; None for identical
            images alone.
        groups: images of a group are selected together, and each class keeps at least two groups.

    Returns:
        Whether each image is in the test set.
    """
    quota = {label: max(min(max(round(n * fraction), 1), n - 2), 0) for label, n in Counter(labels).items()}
    unit_of = firsts(digests if copies is None else copies.tolist())
    if groups is not None:
        unit_of = linked(unit_of, firsts(groups))
    members: dict[int, list[int]] = defaultdict(list)
    for index, first in enumerate(unit_of.tolist()):
        members[first].append(index)
    units = sorted(members.values(), key=lambda unit: _order(digests, unit))
    left = Counter(label for unit in units for label in {labels[index] for index in unit})
    chosen = [False] * len(labels)
    for unit in units:
        wanted = Counter(labels[index] for index in unit)
        if groups is None:
            fits = all(quota[label] >= n for label, n in wanted.items())
        else:  # a group is hardly ever as large as what is missing, so it is taken if it brings the set closer
            closer = sum(abs(quota[label]) - abs(quota[label] - n) for label, n in wanted.items()) > 0
            fits = closer and all(left[label] > 2 for label in wanted)
        if fits:
            for index in unit:
                chosen[index] = True
            for label, n in wanted.items():
                quota[label] -= n
                left[label] -= 1
    return chosen


def _order(digests: Sequence[bytes], unit: Sequence[int]) -> bytes:
    """Key that orders images, or groups of images, by their content alone."""
    return hashlib.sha256(CUT_SALT + b"".join(sorted({digests[index] for index in unit}))).digest()
