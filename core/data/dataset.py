"""`load_dataset`: any source as uint8 tensors, a fingerprint, a report of what is wrong with it, a locked test set.

The images that are not test images are at hand as `Dataset.images`. The test images lie behind `Dataset.open_test`,
and nothing else here or elsewhere leads to them: the number of classes, the channels, mean and deviation and the
fingerprint that a study remembers are all taken from the rest. A set with its own test images keeps them; another one
has them cut off by their pixels alone (`core.data.splits.cut_test`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.config import DataConfig
from core.data import builtin
from core.data.cache import cache_key, cached, open_array, reading, write_images
from core.data.decode import to_channels
from core.data.ingest import Spooled, ingest, read_spool
from core.data.layout import class_order, printable
from core.data.source import Source
from core.data.sources import open_source
from core.data.splits import Splits, cut_test, on_device, stratified, stratified_folds
from core.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataReport:
    """What is wrong with a data set, and did not stop it."""

    broken: tuple[str, ...] = ()
    """Ids of images that could not be read and were left out."""
    leaked: int = 0
    """Test images that are identical to one outside the test set."""
    conflicting: int = 0
    """Images that are identical to one of another class."""


@dataclass(frozen=True)
class TestSet:
    """The images that only a refit may see."""

    __test__ = False  # its name is no test's

    images: Tensor
    """(N, C, H, W) uint8"""
    labels: Tensor
    """(N,) int64"""
    ids: tuple[str, ...]
    fingerprint: str
    """Hex SHA-256 of classes, images and labels"""


@dataclass(frozen=True)
class Dataset:
    """A labelled set of images of one size."""

    name: str
    source: str
    """Where it came from, in words or as a path"""
    classes: tuple[str, ...]
    images: Tensor
    """(N, C, H, W) uint8: everything but the test set. C is 1 where all of these are grey, else 3"""
    labels: Tensor
    """(N,) int64"""
    ids: tuple[str, ...]
    fingerprint: str
    """Hex SHA-256 of classes, images and labels, without the test set: equal for equal data, wherever it lies"""
    report: DataReport
    n_test: int
    has_own_test: bool
    """Whether the test images are the source's own, or were cut off here"""
    moments: Tensor = field(repr=False)
    """(N, C, 2) int64: each image's sums of pixels and of their squares, for mean and deviation"""
    twins: Tensor = field(repr=False)
    """(N,) int64: for each image the index of the first one that is identical to it, which is mostly its own"""
    _open_test: Callable[[], TestSet] = field(repr=False)

    def open_test(self) -> TestSet:
        """The test set. Nothing may call this before the model that it judges is final: `hpo refit` alone does."""
        return self._open_test()


def load_dataset(
    config: DataConfig,
    *,
    data_path: Path | None = None,
    cache_dir: Path | None = None,
    skip_broken: bool = False,
    download: bool = True,
    data_root: Path = Path("data"),
) -> Dataset:
    """Loads the data set that a configuration names, from its cache where it has one.

    Args:
        config: `name` is a built-in set's, or the path of a folder, archive, .npz or .csv.
        data_path: images to use in place of the named set; or, for a built-in one, the folder that torchvision keeps
            it in.
        cache_dir: where decoded sets are kept, to be memory-mapped; None decodes into memory, anew each time.
        skip_broken: leaves unreadable images out, where they would otherwise be an error.
        download: fetches a built-in set that is not on disk.
        data_root: where built-in sets are looked for and downloaded to, unless `data_path` says so.

    Raises:
        UserError: the data are not there, or cannot be used as they are.
    """
    source = _find_source(config.name, data_path, data_root, download)
    if cache_dir is None or source.in_memory:
        with tempfile.TemporaryDirectory() as temporary:
            meta = _build(source, config, skip_broken, Path(temporary))
            dataset = _open(source, Path(temporary), meta, mapped=False)
    else:
        key = cache_key(source.name, source.stamp(), config.image_size, config.test_fraction, skip_broken)
        folder, meta = cached(cache_dir, key, partial(_build, source, config, skip_broken))
        dataset = _open(source, folder, meta, mapped=True)
    _warn(dataset)
    return dataset


def split(dataset: Dataset, config: DataConfig) -> Splits:
    """Training and validation images by `val_fraction` and `split_seed`, with mean and std by `normalize`.

    Raises:
        UserError: too few images, or too few that are not copies, for the classes to be in both.
    """
    return stratified(
        dataset.images, dataset.labels, dataset.moments, dataset.twins, dataset.classes, config, dataset.source
    )


def folds(dataset: Dataset, config: DataConfig) -> tuple[Splits, ...]:
    """What a configuration trains on, one after the other: k-fold by `folds` and `split_seed`, or `split` alone.

    Every image validates in exactly one fold, and each fold's mean and std are those of its own training images. The
    folds hold the same tensors of images and labels; `on_device` keeps it so.

    Raises:
        UserError: as `split`'s, or a class has fewer images than there are folds.
    """
    if config.folds is None:
        return (split(dataset, config),)
    return stratified_folds(
        dataset.images, dataset.labels, dataset.moments, dataset.twins, dataset.classes, config, dataset.source
    )


class Division:
    """Divides a data set as each configuration asks, on a device where the images lie once for all divisions.

    The last division is kept, here and there: a search has one only, and the trainings of a confirmation that follow
    each other mostly share one.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._config: DataConfig | None = None
        self._here: tuple[Splits, ...] = ()
        self._device: torch.device | None = None
        self._there: tuple[Splits, ...] = ()
        self._there_of: DataConfig | None = None

    def here(self, config: DataConfig) -> tuple[Splits, ...]:
        """One split, or one a fold, on the host.

        Raises:
            UserError: as `folds`'.
        """
        if config != self._config:
            self._here, self._config = folds(self._dataset, config), config
        return self._here

    def on(self, device: torch.device, config: DataConfig) -> tuple[Splits, ...]:
        """The same on that device, but images that are too many for it."""
        if device != self._device or not self._there:
            self._there = on_device(self.here(config), device)
        elif config != self._there_of:
            first = self._there[0]
            self._there = tuple(
                replace(split.on(device), images=first.images, labels=first.labels) for split in self.here(config)
            )
        self._device, self._there_of = device, config
        return self._there

    def let_go(self) -> None:
        """Gives the device's memory back."""
        self._there = ()


def _find_source(name: str, data_path: Path | None, data_root: Path, download: bool) -> Source:
    if name in builtin.NAMES:
        if data_path is None:
            return builtin.open_builtin(name, data_root, download)
        root = builtin.root_at(name, data_path)
        return open_source(data_path) if root is None else builtin.open_builtin(name, root, download)
    if data_path is not None:
        return open_source(data_path)
    path = Path(name).expanduser()
    if not path.exists():
        near = difflib.get_close_matches(name, builtin.NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"data.name: {name} is neither a built-in data set ({', '.join(builtin.NAMES)}) "
            f"nor a path that exists{hint or '; give your images with --data'}"
        )
    return open_source(path)


def _build(source: Source, config: DataConfig, skip_broken: bool, folder: Path) -> dict[str, Any]:
    """Decodes the source into `folder`: pool and test apart, and what is known of them."""
    size = None if config.image_size is None else (config.image_size, config.image_size)
    entries = source.labelled()
    spool = folder / "spool"
    with spool.open("wb") as file:
        images, broken = ingest(source, entries, size, skip_broken, file)
    own_test = any(entry.test for entry in entries)
    pool, test = _divide(images, own_test, config.test_fraction, source.where)
    classes = _classes(source, pool, test)
    index = {name: i for i, name in enumerate(classes)}

    channels = max(image.shape[0] for image in pool)
    meta: dict[str, Any] = {"classes": classes, "n_test": len(test), "has_own_test": own_test}
    for part, members in (("pool", pool), ("test", test)):
        labels = np.array([index[image.entry.label] for image in members], dtype=np.int64)
        shape = (len(members), channels, *members[0].shape[1:])
        write_images(
            folder / f"{part}_images.npy", shape, (to_channels(p, channels) for p in read_spool(spool, members))
        )
        np.save(folder / f"{part}_labels.npy", labels)
        (folder / f"{part}_ids.json").write_text(json.dumps([image.entry.id for image in members]), encoding="utf-8")
        meta[f"{part}_fingerprint"] = _fingerprint(classes, shape, members, labels)
    moments = [np.broadcast_to(image.moments, (channels, 2)) for image in pool]
    np.save(folder / "pool_moments.npy", np.stack(moments))
    np.save(folder / "pool_twins.npy", _twins(pool))
    spool.unlink()

    meta["report"] = {"broken": broken, "leaked": _leaked(pool, test), "conflicting": _conflicting(images)}
    return meta


def _divide(
    images: Sequence[Spooled], own_test: bool, fraction: float, where: str
) -> tuple[list[Spooled], list[Spooled]]:
    """The images outside the test set, and in it."""
    labels = [image.entry.label for image in images]
    if own_test:
        in_test = [image.entry.test for image in images]
    else:
        in_test = cut_test([image.digest for image in images], labels, fraction)
    pool = [image for image, locked in zip(images, in_test, strict=True) if not locked]
    test = [image for image, locked in zip(images, in_test, strict=True) if locked]
    if not pool:
        raise UserError(f"{where}: no image outside its test set; training images are needed too")
    counts = Counter(image.entry.label for image in pool)
    if len(counts) < 2:
        raise UserError(f"{where}: a single class, {next(iter(counts))}; at least two are needed to tell apart")
    lone = [name for name, count in sorted(counts.items()) if count < 2]
    if lone:
        raise UserError(
            f"{where}: a single image outside the test set of {_some(lone)}; "
            "training and validation need one each: add images or remove the class"
        )
    if not test:
        raise UserError(f"{where}: no image for a test set; add a test folder, or a third image to each class")
    return pool, test


def _classes(source: Source, pool: Sequence[Spooled], test: Sequence[Spooled]) -> tuple[str, ...]:
    present = {image.entry.label for image in pool}
    unknown = {image.entry.label for image in test} - present
    if unknown:
        raise UserError(
            f"{source.where}: the test set has {_some(sorted(unknown))}, which training has not; "
            "add training images or remove the class from the test set"
        )
    if source.classes is None:
        return class_order(present)
    return tuple(name for name in source.classes if name in present)


def _some(names: Sequence[str]) -> str:
    """Up to five names; a set of a thousand classes must not make an error of a thousand words."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ("class " if len(names) == 1 else "the classes ") + ", ".join(map(printable, names[:5])) + more


def _fingerprint(
    classes: Sequence[str], shape: Sequence[int], images: Sequence[Spooled], labels: NDArray[np.int64]
) -> str:
    """Over each image's own digest, which was taken while it was decoded, in place of its bytes."""
    digest = hashlib.sha256(json.dumps([list(classes), list(shape)]).encode())
    for image in images:
        digest.update(image.digest)
    digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _twins(images: Sequence[Spooled]) -> NDArray[np.int64]:
    """(N,): for each image the index of the first one that is identical to it."""
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(image.digest, index) for index, image in enumerate(images)], dtype=np.int64)


def _leaked(pool: Sequence[Spooled], test: Sequence[Spooled]) -> int:
    known = {image.digest for image in pool}
    return sum(image.digest in known for image in test)


def _conflicting(images: Sequence[Spooled]) -> int:
    labels: dict[bytes, set[str]] = defaultdict(set)
    for image in images:
        labels[image.digest].add(image.entry.label)
    return sum(len(labels[image.digest]) > 1 for image in images)


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

    def read_test() -> TestSet:
        with reading(folder):
            images = pictures("test")
            return TestSet(
                images=images,
                labels=numbers("test_labels", len(images)),
                ids=ids("test", len(images)),
                fingerprint=meta["test_fingerprint"],
            )

    in_memory = None if mapped else read_test()  # where nothing is mapped, the folder is about to go
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
            report=DataReport(tuple(report["broken"]), report["leaked"], report["conflicting"]),
            n_test=meta["n_test"],
            has_own_test=meta["has_own_test"],
            moments=numbers("pool_moments", count, channels, 2),
            twins=numbers("pool_twins", count),
            _open_test=read_test if in_memory is None else lambda: in_memory,
        )


def _warn(dataset: Dataset) -> None:
    report = dataset.report
    if report.broken:
        logger.warning("%s: %d unreadable images are left out", dataset.source, len(report.broken))
    if report.leaked:
        logger.warning("%s: %d test images are identical to training images; the test score will flatter",
                       dataset.source, report.leaked)  # fmt: skip
    if report.conflicting:
        logger.warning("%s: %d images are identical to one of another class", dataset.source, report.conflicting)
