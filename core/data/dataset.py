"""`load_dataset`: loads a data set as uint8 tensors with a fingerprint, a report of problems, and a locked test set.

Test images are only accessible through `Dataset.open_test`; classes, channels, mean, deviation and the fingerprint are
derived from the other images alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.config import READING_FIELDS, DataConfig
from core.data import builtin
from core.data.cache import cache_key, cached, open_array, reading, write_images
from core.data.decode import SIXTEEN_BIT_TOP, BrokenImageError, Values, decode, to_channels
from core.data.groups import check_sides, firsts, linked, with_groups
from core.data.ingest import Progress, Spooled, ingest, read_spool, without_old_objects
from core.data.layout import Entry
from core.data.names import class_order, listed
from core.data.near import near_duplicates, reduced
from core.data.report import DataReport
from core.data.roles import TEST, TRAIN, VAL
from core.data.source import Reading, Source
from core.data.sources import check_source, open_source
from core.data.splits import Splits, cut_test, given, on_device, stratified, stratified_folds
from core.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TestSet:
    """The test images, for a refit only."""

    __test__ = False  # not a test class of pytest

    images: Tensor
    """(N, C, H, W) uint8."""
    labels: Tensor
    """(N,) int64."""
    ids: tuple[str, ...]
    fingerprint: str
    """Hex SHA-256 of classes, images and labels."""


@dataclass(frozen=True)
class Dataset:
    """A labelled set of images of one size."""

    name: str
    source: str
    """Description or path of its source."""
    classes: tuple[str, ...]
    images: Tensor
    """(N, C, H, W) uint8, without the test set. C is 1 if all images are grey, else 3."""
    labels: Tensor
    """(N,) int64."""
    ids: tuple[str, ...]
    fingerprint: str
    """Hex SHA-256 of classes, images and labels without the test set; independent of the location."""
    stamp: str = field(repr=False)
    """Changes with the names, sizes and times of the source's files."""
    report: DataReport
    n_test: int
    has_own_test: bool
    """Whether the source has its own test images."""
    in_val: Tensor = field(repr=False)
    """(N,) bool: whether the source gives each image as a validation image."""
    moments: Tensor = field(repr=False)
    """(N, C, 2) int64: sums of pixels and of squared pixels of each image."""
    twins: Tensor = field(repr=False)
    """(N,) int64: index of the first image that is identical to each image, or its near-duplicate."""
    groups: Tensor | None = field(repr=False)
    """(N,) int64: index of the first image that stays on the same side of every split; None without `data.group`."""
    _open_test: Callable[[], TestSet] = field(repr=False)
    _test_ids: Callable[[], tuple[str, ...]] = field(repr=False)

    def gives_val(self, config: DataConfig) -> bool:
        """Return whether a configuration validates on the images that the source gives for it."""
        return config.val == "given" and config.folds is None and bool(self.in_val.any())

    def given_val(self, config: DataConfig) -> str | None:
        """Return a hex SHA-256 of which images a configuration validates on; None if it draws them."""
        return hashlib.sha256(self.in_val.numpy().tobytes()).hexdigest() if self.gives_val(config) else None

    def checksums(self) -> dict[str, tuple[str, int] | None]:
        """Return class and CRC-32 of each image by id, None for a test image; a grey image has that of one channel."""
        grey = (self.moments == self.moments[:, :1]).flatten(1).all(1).tolist()  # also among images in colour
        rows = zip(self.ids, self.labels.tolist(), self.images.numpy(), grey, strict=True)
        return dict.fromkeys(self._test_ids()) | {
            name: (self.classes[label], zlib.crc32((image[:1] if is_grey else image).data))
            for name, label, image, is_grey in rows
        }

    def open_test(self) -> TestSet:
        """Return the test set. Call this only once the model to be evaluated is final, as `hpo refit` does."""
        return self._open_test()


@without_old_objects()
def load_dataset(
    config: DataConfig,
    *,
    data_path: Path | None = None,
    cache_dir: Path | None = None,
    skip_broken: bool = False,
    download: bool = True,
    data_root: Path = Path("data"),
    on_progress: Progress | None = None,
) -> Dataset:
    """Load the data set of a configuration, from its cache if it has one.

    Args:
        config: `name` is that of a built-in set, or the path of a folder, archive, .npz or .csv.
        data_path: images to use instead, or torchvision's folder of a built-in set.
        cache_dir: folder of decoded data sets, which are memory-mapped; None decodes into memory each time.
        skip_broken: leave out unreadable images instead of raising an error.
        download: download a built-in set that is not on disk.
        data_root: folder of built-in sets.
        on_progress: called now and then with the step, `reading` or `comparing`, the number of images done, and of all.

    Raises:
        UserError: the data are missing or cannot be used.
    """
    source = _find_source(Reading(config, skip_broken), data_path, data_root, download)
    if cache_dir is None or source.in_memory:
        with tempfile.TemporaryDirectory() as temporary:
            meta = _build(source, config, skip_broken, on_progress, Path(temporary))
            dataset = _open(source, Path(temporary), meta, mapped=False)
    else:
        reading_as = [getattr(config, name) for name in READING_FIELDS]
        key = cache_key(source.name, source.stamp(), config.image_size, config.test_fraction, skip_broken, reading_as)
        folder, meta = cached(cache_dir, key, partial(_build, source, config, skip_broken, on_progress))
        dataset = _open(source, folder, meta, mapped=True)
    _warn(dataset)
    return dataset


SAMPLED = 64
"""Images whose sizes `image_sizes` reads."""


def image_sizes(
    config: DataConfig, *, data_path: Path | None = None, data_root: Path = Path("data"), download: bool = True
) -> list[tuple[int, int]]:
    """Return the sizes (height, width) of some labelled images, spread over the data set; broken ones are left out.

    Args:
        config: as for `load_dataset`, like the paths.

    Raises:
        UserError: the data are missing, or their structure is not understood.
    """
    source = _find_source(Reading(config, skip_broken=True), data_path, data_root, download)
    entries = source.arranged().entries
    step = max(1, len(entries) // SAMPLED)
    # All entries, since a tar is read in its own order; the others are read in the given one.
    spread = [entry for first in range(step) for entry in entries[first::step]]
    sizes = []
    for _, payload in islice(source.payloads(spread), SAMPLED):
        content = payload() if callable(payload) else payload
        if isinstance(content, Exception):
            continue
        with contextlib.suppress(BrokenImageError):
            sizes.append(decode(content, None, Values(config.channels)).pixels.shape[1:])
    return sizes


def split(dataset: Dataset, config: DataConfig) -> Splits:
    """Split into training and validation images: as the source does, or by `val_fraction` and `split_seed`.

    Raises:
        UserError: there are too few images, apart from duplicates, to have every class in both.
    """
    if dataset.gives_val(config):
        return given(dataset, dataset.in_val, config)
    return stratified(dataset, config)


def folds(dataset: Dataset, config: DataConfig) -> tuple[Splits, ...]:
    """Return the splits that a configuration trains on: k-fold by `folds` and `split_seed`, or `split` alone.

    Every image is validated in exactly one fold. All folds share the same tensors of images and labels.

    Raises:
        UserError: as in `split`, or a class has fewer images than there are folds.
    """
    return (split(dataset, config),) if config.folds is None else stratified_folds(dataset, config)


class Division:
    """Splits a data set for different configurations, keeping the last split and its images on the device."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._config: DataConfig | None = None
        self._here: tuple[Splits, ...] = ()
        self._device: torch.device | None = None
        self._there: tuple[Splits, ...] = ()
        self._there_of: DataConfig | None = None

    def here(self, config: DataConfig) -> tuple[Splits, ...]:
        """Return one split, or one per fold, on the host.

        Raises:
            UserError: as in `folds`.
        """
        if config != self._config:
            self._here, self._config = folds(self._dataset, config), config
        return self._here

    def on(self, device: torch.device, config: DataConfig) -> tuple[Splits, ...]:
        """Return the same on that device, except images that do not fit it."""
        if device != self._device or not self._there:
            self._there = on_device(self.here(config), device)
        elif config != self._there_of:
            first = self._there[0]
            self._there = tuple(
                replace(split.on(device), images=first.images, labels=first.labels) for split in self.here(config)
            )
        self._device, self._there_of = device, config
        return self._there

    def release(self) -> None:
        """Release the device's memory."""
        self._there = ()


def located(config: DataConfig, data_path: Path | None) -> DataConfig:
    """Return the configuration with the absolute path of the user's own images as its `name`.

    Args:
        data_path: As in `load_dataset`.
    """
    if config.name in builtin.NAMES and (data_path is None or builtin.root_at(config.name, data_path.expanduser())):
        return config
    path = (Path(config.name) if data_path is None else data_path).expanduser()
    return config.model_copy(update={"name": str(path.resolve())})


def _find_source(reading: Reading, data_path: Path | None, data_root: Path, download: bool) -> Source:
    name = reading.config.name
    data_path = None if data_path is None else data_path.expanduser()
    if name in builtin.NAMES:
        if data_path is None:
            return builtin.open_builtin(name, data_root, download)
        root = builtin.root_at(name, data_path)
        return open_source(data_path, reading) if root is None else builtin.open_builtin(name, root, download)
    if data_path is not None:
        return open_source(data_path, reading)
    check_source(name, None)
    return open_source(Path(name), reading)


def _build(
    source: Source, config: DataConfig, skip_broken: bool, on_progress: Progress | None, folder: Path
) -> dict[str, Any]:
    """Decode the source into `folder`, with separate files for pool and test set, and return the description."""
    size = None if config.image_size is None else (config.image_size, config.image_size)
    found = source.arranged()
    entries = found.entries
    if not entries:
        raise UserError(f"{source.where}: no labelled images found")
    _check_classes(source.where, entries)
    grouped = config.group is not None
    if config.group is not None:
        entries = with_groups(entries, config.group, source.where)
        check_sides(entries, TEST, source.where)
    spool = folder / "spool"
    with spool.open("wb") as file:
        result = ingest(source, entries, size, skip_broken, file, Values(config.channels), on_progress)
        file.flush()
        images = result.images
        _compare(spool, images, config, on_progress)
    own_test = any(entry.test for entry in entries)
    pool, test = _divide(images, own_test, config.test_fraction, source.where)
    _check_classes(source.where, [image.entry for image in images])
    classes = _classes(source, pool)
    index = {name: i for i, name in enumerate(classes)}

    channels = max(image.shape[0] for image in pool)
    meta: dict[str, Any] = {"classes": classes, "n_test": len(test), "has_own_test": own_test, "grouped": grouped}
    for part, members in (("pool", pool), ("test", test)):
        labels = np.array([index[image.entry.label] for image in members], dtype=np.int64)
        shape = (len(members), channels, *members[0].shape[1:])
        write_images(
            folder / f"{part}_images.npy", shape, (to_channels(p, channels) for p in read_spool(spool, members))
        )
        np.save(folder / f"{part}_labels.npy", labels)
        (folder / f"{part}_ids.json").write_text(json.dumps([image.entry.id for image in members]), encoding="utf-8")
        meta[f"{part}_fingerprint"] = _fingerprint(classes, shape, members, labels)
    _save_pool(folder, pool, channels, grouped=grouped)
    spool.unlink()

    training, validation = ([i for i in pool if (i.entry.split == VAL) == in_val] for in_val in (False, True))
    report = DataReport(
        counts=_counts(classes, images),
        unlabelled=found.unlabelled,
        left_out=dict(found.left_out),
        notes=found.notes,
        broken=(*found.broken, *result.broken),
        leaked=_leaked(pool, test),
        leaked_val=_leaked(training, validation),
        near=_near(images),
        near_leaked=_near_leaked(pool, test),
        near_leaked_val=_near_leaked(training, validation),
        conflicting=_conflicting(images),
        grey=sum(image.shape[0] == 1 for image in images),
        channels=channels,
        top=0 if result.values.top == SIXTEEN_BIT_TOP else result.values.top,
        groups=len({image.entry.group for image in images} - {""}),
    )
    return {**meta, "report": asdict(report)}


def _save_pool(folder: Path, pool: Sequence[Spooled], channels: int, *, grouped: bool) -> None:
    """Save one row of numbers per image outside the test set, as splits need them."""
    moments = np.empty((len(pool), channels, 2), dtype=np.int64)
    for place, image in enumerate(pool):
        moments[place] = image.moments
    np.save(folder / "pool_moments.npy", moments)
    twins = firsts([image.look for image in pool])
    np.save(folder / "pool_twins.npy", twins)
    if grouped:
        np.save(folder / "pool_groups.npy", linked(twins, firsts([image.entry.group for image in pool])))
    np.save(folder / "pool_val.npy", np.array([image.entry.split == VAL for image in pool], dtype=np.int64))


def _compare(spool: Path, images: Sequence[Spooled], config: DataConfig, on_progress: Progress | None) -> None:
    """Set the `look` of each image, by its pixels, and by near-duplicates if the configuration wants them."""
    looks = firsts([image.digest for image in images])
    if config.near_duplicates == "together":
        compared = None if on_progress is None else partial(on_progress, "comparing")
        pairs = near_duplicates(reduced(read_spool(spool, images), len(images)), compared)
        looks = linked(looks, pairs=pairs)
    for image, look in zip(images, looks.tolist(), strict=True):
        image.look = look


def _counts(classes: Sequence[str], images: Sequence[Spooled]) -> dict[str, dict[str, int]]:
    found = Counter((image.entry.label, image.entry.split) for image in images)
    return {name: {split: n for split in (TRAIN, VAL, TEST) if (n := found[name, split])} for name in classes}


def _divide(
    images: Sequence[Spooled], own_test: bool, fraction: float, where: str
) -> tuple[list[Spooled], list[Spooled]]:
    labels = [image.entry.label for image in images]
    if own_test:
        in_test = [image.entry.test for image in images]
    else:
        groups = [image.entry.group for image in images]
        in_test = cut_test(
            [image.digest for image in images],
            labels,
            fraction,
            copies=np.array([image.look for image in images]),
            groups=groups if any(groups) else None,
        )
    pool = [image for image, locked in zip(images, in_test, strict=True) if not locked]
    test = [image for image, locked in zip(images, in_test, strict=True) if locked]
    if not pool:
        raise UserError(f"{where}: no image outside its test set; training images are needed too")
    counts = Counter(image.entry.label for image in pool)
    if len(counts) < 2:
        raise UserError(f"{where}: a single class, {next(iter(counts))}; at least two are needed")
    lone = [name for name, count in sorted(counts.items()) if count < 2]
    if lone and not any(image.entry.split == VAL for image in pool):
        raise UserError(
            f"{where}: a single image outside the test set of {_some(lone)}; "
            "training and validation need one each: add images or remove the class"
        )
    if pool[0].entry.group:
        _check_lone_groups(pool, where)
    if not test:
        third = "group" if pool[0].entry.group else "image"
        raise UserError(f"{where}: no image for a test set; add a test folder, or a third {third} to each class")
    return pool, test


def _check_lone_groups(pool: Sequence[Spooled], where: str) -> None:
    """Raise UserError if a class has one group only, unless the data set gives its validation images."""
    groups: dict[str, set[str]] = defaultdict(set)
    for image in pool:
        groups[image.entry.label].add(image.entry.group)
    lone = [name for name, found in sorted(groups.items()) if len(found) < 2]
    if lone and not any(image.entry.split == VAL for image in pool):
        raise UserError(
            f"{where}: data.group: a single group outside the test set has {_some(lone)}; "
            "training and validation need one each: add images, remove the class, or leave data.group out"
        )


def _check_classes(where: str, entries: Sequence[Entry]) -> None:
    """Raise UserError if validation or test images have a class that no training image has."""
    labels: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        labels[entry.split].add(entry.label)
    for split, name in ((VAL, "validation set"), (TEST, "test set")):
        unknown = labels[split] - labels[TRAIN]
        if unknown and labels[TRAIN]:
            raise UserError(
                f"{where}: the {name} has {_some(sorted(unknown))}, missing in the training images; "
                f"add training images or remove the class from the {name}"
            )


def _classes(source: Source, pool: Sequence[Spooled]) -> tuple[str, ...]:
    present = {image.entry.label for image in pool}
    if source.classes is None:
        return class_order(present)
    return tuple(name for name in source.classes if name in present)


def _some(names: Sequence[str]) -> str:
    return ("class " if len(names) == 1 else "the classes ") + listed(names)


def _fingerprint(
    classes: Sequence[str], shape: Sequence[int], images: Sequence[Spooled], labels: NDArray[np.int64]
) -> str:
    """Digest of the images' digests, which were computed while decoding."""
    digest = hashlib.sha256(json.dumps([list(classes), list(shape)]).encode())
    for image in images:
        digest.update(image.digest)
    digest.update(labels.astype("<i8").tobytes())
    if any(image.entry.group for image in images):
        digest.update(firsts([image.entry.group for image in images]).astype("<i8").tobytes())
    looks = firsts([image.look for image in images])
    if not np.array_equal(looks, firsts([image.digest for image in images])):
        digest.update(looks.astype("<i8").tobytes())
    return digest.hexdigest()


def _leaked(pool: Sequence[Spooled], test: Sequence[Spooled]) -> int:
    known = {image.digest for image in pool}
    return sum(image.digest in known for image in test)


def _near(images: Sequence[Spooled]) -> int:
    """Images with a near-duplicate that is not identical."""
    digests = defaultdict(set)
    for image in images:
        digests[image.look].add(image.digest)
    return sum(len(digests[image.look]) > 1 for image in images)


def _near_leaked(pool: Sequence[Spooled], test: Sequence[Spooled]) -> int:
    """Images of the second set with a near-duplicate in the first, and no identical image."""
    looks, digests = {image.look for image in pool}, {image.digest for image in pool}
    return sum(image.look in looks and image.digest not in digests for image in test)


def _conflicting(images: Sequence[Spooled]) -> int:
    first: dict[bytes, str] = {}
    mixed = {image.digest for image in images if first.setdefault(image.digest, image.entry.label) != image.entry.label}
    return sum(image.digest in mixed for image in images)


def _open(source: Source, folder: Path, meta: dict[str, Any], mapped: bool) -> Dataset:
    def pictures(part: str) -> Tensor:
        return open_array(folder / f"{part}_images.npy", mapped, np.uint8, (None, None, None, None))

    def numbers(name: str, *shape: int) -> Tensor:
        return open_array(folder / f"{name}.npy", False, np.int64, shape)

    def ids(part: str, count: int) -> tuple[str, ...]:
        found = json.loads((folder / f"{part}_ids.json").read_text(encoding="utf-8"))
        if not isinstance(found, list) or len(found) != count:
            raise ValueError(f"{part}_ids.json does not name {count} images")
        return tuple(found)

    def read_test_ids() -> tuple[str, ...]:
        with reading(folder):
            return ids("test", meta["n_test"])

    def read_test() -> TestSet:
        with reading(folder):
            images = pictures("test")
            return TestSet(
                images=images,
                labels=numbers("test_labels", len(images)),
                ids=read_test_ids(),
                fingerprint=meta["test_fingerprint"],
            )

    in_memory = None if mapped else read_test()  # without a map, the folder is about to be deleted
    with reading(folder):
        images, report = pictures("pool"), meta["report"]
        count, channels = images.shape[:2]
        return Dataset(
            name=source.name,
            source=source.where,
            classes=tuple(meta["classes"]),
            images=images,
            labels=numbers("pool_labels", count),
            ids=ids("pool", count),
            fingerprint=meta["pool_fingerprint"],
            stamp=source.stamp(),
            report=DataReport(**{**report, "notes": tuple(report["notes"]), "broken": tuple(report["broken"])}),
            n_test=meta["n_test"],
            has_own_test=meta["has_own_test"],
            in_val=numbers("pool_val", count).bool(),
            moments=numbers("pool_moments", count, channels, 2),
            twins=numbers("pool_twins", count),
            groups=numbers("pool_groups", count) if meta["grouped"] else None,
            _open_test=read_test if in_memory is None else lambda: in_memory,
            _test_ids=read_test_ids if in_memory is None else lambda: in_memory.ids,
        )


def _warn(dataset: Dataset) -> None:
    report = dataset.report
    for count, problem in (
        (len(report.broken), "unreadable images are skipped"),
        (report.leaked, "test images are identical to training images; the test score will be too high"),
        (report.leaked_val, "of the given validation images are identical to training images"),
        (report.near_leaked, "test images are near-duplicates of training images; the test score will be too high"),
        (report.near_leaked_val, "of the given validation images are near-duplicates of training images"),
        (report.conflicting, "images are identical to one of another class"),
    ):
        if count:
            logger.warning("%s: %d %s", dataset.source, count, problem)
