"""Images stored as arrays: an .npz file, or a data set loaded by another library."""

from __future__ import annotations

import math
import tokenize
import warnings
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.data.bounds import check_members
from core.data.decode import Samples
from core.data.layout import Arrangement, Entry
from core.data.names import class_name, fault_of_label, listed, look_alikes
from core.data.roles import TEST, TRAIN, VAL, Split
from core.data.source import Payload, Source, file_stamp, one_line, plain_name
from core.errors import UserError

# Raised by numpy for files that are not valid .npz: the last three for headers that cannot be parsed; RuntimeError for
# encrypted members, its subclass NotImplementedError for unknown compression.
TORN_ARRAYS = (
    ValueError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, tokenize.TokenError, SyntaxError,
)  # fmt: skip


# Zip format (PKWARE's APPNOTE, 4.3.7 and 4.4.4): bytes of a local header before the name, and a flag.
LOCAL_HEADER, ENCRYPTED = 30, 0x1

READ_AT_ONCE = 1 << 20

_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class ArrayPart:
    """Images of one array, such as the training images of a file."""

    prefix: str  # Prefix of their ids
    images: NDArray[Any]  # (N, H, W) or (N, H, W, 1|3|4); uint8, or a type that `_pixel_scale` accepts
    labels: tuple[str, ...] | None  # One class per image
    split: Split
    groups: tuple[str, ...] | None = None  # One group per image


class ArraySource(Source):
    """Images from arrays, loaded on first use."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__(name, where)
        self.notes: tuple[str, ...] = ()
        self._loaded: list[ArrayPart] | None = None

    @abstractmethod
    def load(self) -> list[ArrayPart]:
        """Read the arrays."""

    def arranged(self) -> Arrangement:
        parts = self._parts()
        entries: list[Entry] = []
        for part in parts:
            if part.labels is not None:
                groups = part.groups or ("",) * len(part.labels)
                entries += [
                    Entry(f"{part.prefix}{i}", self._class_of(f"{part.prefix}{i}", label), part.split, group)
                    for i, (label, group) in enumerate(zip(part.labels, groups, strict=True))
                ]
            elif part.split != TEST:
                raise UserError(f"{self.where}: images without labels; expected {NpzSource.KEYS}")
        unlabelled = sum(len(part.images) for part in parts if part.labels is None)
        self._loaded = [part for part in parts if part.labels is not None]  # those that are read
        return Arrangement(entries, unlabelled, notes=(*self.notes, *look_alikes({entry.label for entry in entries})))

    def unlabelled(self) -> Arrangement:
        return Arrangement([Entry(f"{part.prefix}{i}") for part in self._parts() for i in range(len(part.images))])

    def _class_of(self, image: str, label: str) -> str:
        if fault := fault_of_label(label):
            raise UserError(f"{self.where}: image {image}: {fault}")
        return class_name(label)

    def payloads(self, entries: Sequence[Entry]) -> Iterator[tuple[int, Payload]]:
        position = 0
        parts = self._parts()
        scale = _pixel_scale([part.images for part in parts], self.where)
        for part in parts:
            for image in part.images:
                yield position, _to_samples(image, scale)
                position += 1
        assert position == len(entries)

    def _parts(self) -> list[ArrayPart]:
        if self._loaded is None:
            self._loaded = self.load()
        return self._loaded


def _pixel_scale(arrays: list[NDArray[Any]], where: str) -> float:
    """Factor that scales all arrays of a set to 0 to 255; 1 for 16-bit ones, which are scaled by `decode`.

    Raises:
        UserError: the values are neither 8-bit, nor 16-bit, nor in [0, 1].
    """
    kind = arrays[0].dtype
    if any(array.dtype != kind for array in arrays):
        raise UserError(f"{where}: its images have different types: {', '.join(str(a.dtype) for a in arrays)}")
    if kind in (np.uint8, np.uint16):
        return 1
    if kind == np.bool_:
        return 255
    if kind.kind in "iuf":
        low = min((float(array.min()) for array in arrays if array.size), default=0)
        high = max((float(array.max()) for array in arrays if array.size), default=0)
        if kind.kind == "f" and low >= 0 and high <= 1:
            return 255
        if low >= 0 and high <= 255:  # False for NaN
            return 1
        raise UserError(f"{where}: its pixels run from {low:g} to {high:g}; give uint8, uint16, or floats in [0, 1]")
    raise UserError(f"{where}: its images are of type {kind}; give uint8, uint16, or floats in [0, 1]")


def _to_samples(image: NDArray[Any], scale: float) -> Samples:
    return image if image.dtype in (np.uint8, np.uint16) else np.rint(image * np.float64(scale)).astype(np.uint8)


def _mapped(path: Path, archive: zipfile.ZipFile, name: str) -> NDArray[Any] | None:
    """Memory map of an array in an .npz; None if it is compressed or not a plain array.

    Raises:
        zipfile.BadZipFile: it is damaged.
    """
    member = archive.NameToInfo.get(name)
    if member is None or member.compress_type != zipfile.ZIP_STORED or member.flag_bits & ENCRYPTED:
        return None
    with archive.open(member) as stored:  # reading to the end verifies the checksum
        version = np.lib.format.read_magic(stored)
        if version not in _READ_HEADER:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of an old name of a type
            shape, by_columns, kind = _READ_HEADER[version](stored)
        head = stored.tell()
        while stored.read(READ_AT_ONCE):
            pass
    if kind.hasobject or member.file_size != head + math.prod(shape) * kind.itemsize or 0 in shape:
        return None  # numpy raises the error, if any
    with path.open("rb") as file:
        file.seek(member.header_offset)
        local = file.read(LOCAL_HEADER)
    # The local header's name and extra field may differ in length from those of the directory.
    before = LOCAL_HEADER + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    start = member.header_offset + before + head
    return np.memmap(path, kind, mode="r", offset=start, shape=shape, order="F" if by_columns else "C")


class NpzSource(ArraySource):
    """An .npz of images and labels. Pickled objects are refused."""

    # (images, labels, prefix of ids, split). The first family whose first key is present is used: names of MedMNIST
    # (Yang et al. 2023, https://doi.org/10.1038/s41597-022-01721-8), Keras, and plain ones.
    FAMILIES = (
        (("train_images", "train_labels", "train/", TRAIN), ("val_images", "val_labels", "val/", VAL),
         ("test_images", "test_labels", "test/", TEST)),
        (("x_train", "y_train", "train/", TRAIN), ("x_val", "y_val", "val/", VAL),
         ("x_test", "y_test", "test/", TEST)),
        (("images", "labels", "", TRAIN),),
        (("x", "y", "", TRAIN),),
    )  # fmt: skip
    KEYS = "images and labels, x and y, x_train y_train x_test y_test, or train_images train_labels …"

    def __init__(self, path: Path) -> None:
        super().__init__(plain_name(path), str(path))
        self.path = path

    def stamp(self) -> str:
        return file_stamp(self.path)

    def load(self) -> list[ArrayPart]:
        try:
            with self.path.open("rb") as file:
                self._check_unpacked()
                with np.load(file, allow_pickle=False) as arrays:
                    return self._read(arrays)
        except TORN_ARRAYS as error:
            raise UserError(
                f"{self.where}: cannot be read as an .npz of plain arrays ({one_line(error)}); save it again"
            ) from error
        except MemoryError as error:
            raise UserError(
                f"{self.where}: its arrays do not fit the memory ({one_line(error)}); "
                "give fewer or smaller images, or a folder of them"
            ) from error

    def _check_unpacked(self) -> None:
        with zipfile.ZipFile(self.path) as archive:  # also refuses an .npy or pickle with this suffix
            unpacked = sum(member.file_size for member in archive.infolist())
            advice = "if you trust it, save it with np.savez, which does not compress"
            check_members(self.where, len(archive.infolist()), unpacked, self.path.stat().st_size, advice)

    def unlabelled(self) -> Arrangement:
        """Return all images; for a file with training and test arrays, those of the test array only."""
        self._loaded = [part for part in self._parts() if part.split == TEST] or self._parts()
        return super().unlabelled()

    def _read(self, arrays: Any) -> list[ArrayPart]:
        keys = set(arrays.files)
        for family in self.FAMILIES:
            present = [row for row in family if row[0] in keys]
            if not present:
                continue
            unused = sorted(keys - {key for images, labels, _, _ in present for key in (images, labels)})
            self.notes = (f"arrays not used: {listed(unused, 10)}",) if unused else ()
            return [self._part(arrays, *row) for row in present]
        raise UserError(f"{self.where}: its keys are {', '.join(sorted(keys)) or 'none'}; expected {self.KEYS}")

    def _part(self, arrays: Any, images_key: str, labels_key: str, prefix: str, split: Split) -> ArrayPart:
        images = self._channels_last(self._array(arrays, images_key), images_key)
        labels = None
        if labels_key in arrays.files:
            labels = self._class_names(self._array(arrays, labels_key), labels_key)
            if len(labels) != len(images):
                raise UserError(f"{self.where}: {len(images)} {images_key} and {len(labels)} {labels_key}")
        return ArrayPart(prefix, images, labels, split)

    def _array(self, arrays: Any, key: str) -> NDArray[Any]:
        """One array, mapped if possible; ValueError if numpy cannot read it."""
        try:
            mapped = _mapped(self.path, arrays.zip, f"{key}.npy")
            found: NDArray[Any] = arrays[key] if mapped is None else mapped
        except (TypeError, OverflowError) as error:  # a shape that no program writes, such as (True, 8, 8)
            raise ValueError(f"{key}: {error}") from error
        return found

    def _channels_last(self, images: NDArray[Any], key: str) -> NDArray[Any]:
        if images.ndim == 3:
            return images
        if images.ndim == 4 and images.shape[-1] in (1, 3, 4):
            return images
        if images.ndim == 4 and images.shape[1] in (1, 3, 4):
            return images.transpose(0, 2, 3, 1)
        raise UserError(f"{self.where}: {key} is of shape {images.shape}; expected (N, H, W) or (N, H, W, 1|3|4)")

    def _class_names(self, labels: NDArray[Any], key: str) -> tuple[str, ...]:
        if labels.ndim == 2 and labels.shape[1] == 1:  # as in MedMNIST
            labels = labels[:, 0]
        if labels.ndim != 1:
            raise UserError(f"{self.where}: {key} is of shape {labels.shape}; expected (N,), one class per image")
        if labels.dtype.kind == "f" and (labels == np.rint(labels)).all():
            labels = labels.astype(np.int64)
        if labels.dtype.kind == "S":
            labels = labels.astype(np.str_)
        if labels.dtype.kind not in "iubU":
            raise UserError(f"{self.where}: {key} is of type {labels.dtype}; give whole numbers or names")
        return tuple(str(label) for label in labels.tolist())
