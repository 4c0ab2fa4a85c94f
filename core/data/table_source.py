"""Sources that are tables: a CSV of paths, or a CSV with the pixels of one image in each row."""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.data.arrays import ArrayPart, ArraySource
from core.data.bounds import check_table_bytes
from core.data.files import FolderSource, PathSource, read_payload
from core.data.layout import Arrangement, Entry
from core.data.names import listed
from core.data.roles import TEST, TRAIN, VAL
from core.data.source import Payload, Reading, Source, file_stamp, plain_name
from core.data.tables import (
    Columns,
    Images,
    Rows,
    Table,
    arrangement_of,
    choose_columns,
    group_of_row,
    label_of_row,
    missing_files,
    most_missing,
    notes_of,
    parse_table,
    pixel_columns,
    read_rows,
    shown_header,
    split_of_row,
    with_paths,
)
from core.errors import UserError
from core.text import printable


def open_table(path: Path, reading: Reading) -> Source:
    """Open a CSV. Its header decides what its rows are."""
    table = _read(path)
    pixels = pixel_columns(table.header)
    return PixelTable(path, table, pixels, reading) if pixels else CsvSource(path, table, reading)


def _read(path: Path) -> Table:
    try:
        check_table_bytes(str(path), path.stat().st_size)
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_table(content, str(path))


class CsvSource(PathSource):
    """A table with paths below its own folder, a class for each, and optionally a split."""

    def __init__(self, path: Path, table: Table, reading: Reading) -> None:
        super().__init__(path, reading)
        self._table = table
        self._folder = os.path.abspath(path.parent)  # noqa: PTH100 - as text, links left as they are
        images = reading.config.images
        self._below = "" if images is None else os.path.expanduser(images).rstrip("/")  # noqa: PTH111

    def stamp(self) -> str:
        digest = hashlib.sha256()
        for image in (*(entry.id for entry in self._rows.entries), *self._rows.unlabelled, *self._rows.missing):
            digest.update(_state(os.path.join(self._folder, image)))  # noqa: PTH118
        return f"{super().stamp()}|{digest.hexdigest()}"

    def arranged(self) -> Arrangement:
        if not self._columns.is_labelled:
            raise UserError(
                f"{self.where}: no column label, class, target or the like; name it with data.label_column; its header "
                f"is {shown_header(self._table)}"
            )
        return arrangement_of([(self._table, self._columns, self._rows)], {})

    def unlabelled(self) -> Arrangement:
        column = self._checked_paths()
        entries, missing = [], []
        most = most_missing(self.reading)
        for number, written in enumerate(self._table.column(column), 1):
            found = self._images.find(written, None)
            if len(found) > 1:
                raise UserError(f"{self.where}: {printable(written)} may be {listed(found, 2)}; set data.images")
            entries += [Entry(image) for image in found]
            missing += [] if found else [written]
            if len(missing) == most or (missing and number == len(self._table.rows) and (most or not entries)):
                raise missing_files(self.where, missing, number, len(self._table.rows))
        left_out = {"empty rows": self._table.empty} if self._table.empty else {}
        return Arrangement(entries, left_out=left_out, broken=tuple(missing))

    def payloads(self, entries: Sequence[Entry]) -> Iterator[tuple[int, Payload]]:
        for position, entry in enumerate(entries):
            yield position, partial(read_payload, os.path.join(self._folder, entry.id))  # noqa: PTH118

    @cached_property
    def _images(self) -> Images:
        return Images(self.where, (self._below,), self._exists, self._list)

    @cached_property
    def _columns(self) -> Columns:
        columns = choose_columns(self._table, self.reading.config)
        if not columns.paths:
            raise UserError(
                f"{self.where}: no column path, file, image, id or the like; name it with data.path_column; its header "
                f"is {shown_header(self._table)}"
            )
        return with_paths(self._table, columns, self._images, None)

    @cached_property
    def _rows(self) -> Rows:
        self._checked_paths()
        return read_rows(self._table, self._columns, self._images, None, most_missing(self.reading))

    def _checked_paths(self) -> int:
        """Return the column of paths.

        Raises:
            UserError: a path is outside the folder of the images, so that a downloaded table cannot read other files.
        """
        (column,) = self._columns.paths
        folder = os.path.normpath(os.path.join(self._folder, self._below))  # noqa: PTH118
        inside = os.path.join(folder, "")  # noqa: PTH118
        for line, path in zip(self._table.lines, self._table.column(column), strict=True):
            if "\0" in path:
                raise UserError(f"{self.where}:{line}: {path!r} is not a path; fix it or remove the row")
            plain = path.replace("\\", "/")
            if path and not os.path.normpath(os.path.join(folder, plain)).startswith(inside):  # noqa: PTH118
                raise UserError(
                    f"{self.where}:{line}: {printable(path)} is outside {folder}; "
                    "put the CSV into a folder above all its images, and give paths from there"
                )
        return column

    def _exists(self, path: str) -> bool:
        if not path or "\0" in path:
            return False
        whole = os.path.join(self._folder, path)  # noqa: PTH118
        try:
            return not stat.S_ISDIR(os.stat(whole).st_mode)  # noqa: PTH116
        except OSError:
            return os.path.islink(whole)  # noqa: PTH114

    def _list(self) -> list[str]:
        folder = os.path.join(self._folder, self._below)  # noqa: PTH118
        if not os.path.isdir(folder):  # noqa: PTH112
            raise UserError(f"{self.where}: data.images={self.reading.config.images}: no folder {folder}")
        prefix = f"{self._below}/" if self._below else ""
        return [prefix + image for image in FolderSource(Path(folder), self.reading).tree.images]


def _state(path: str) -> bytes:
    try:
        status = os.stat(path)  # noqa: PTH116 - a Path each costs more than the call
    except OSError:
        return f"{path}|missing\n".encode(errors="surrogateescape")
    return f"{path}|{status.st_size}|{status.st_mtime_ns}\n".encode(errors="surrogateescape")


class PixelTable(ArraySource):
    """A CSV with one image per row: one column per pixel, and optionally a label and a split."""

    def __init__(self, path: Path, table: Table, pixels: Sequence[int], reading: Reading) -> None:
        super().__init__(plain_name(path), str(path))
        self.path = path
        self._table = table
        self._pixels = pixels
        self._config = reading.config

    def stamp(self) -> str:
        return file_stamp(self.path)

    def load(self) -> list[ArrayPart]:
        side = math.isqrt(len(self._pixels))
        if side * side != len(self._pixels):
            raise UserError(
                f"{self.where}: its {len(self._pixels):,} columns of pixels are no square grey image; "
                "save color images as files or .npz"
            )
        columns = choose_columns(self._table, self._config, skipped=self._pixels)
        images = self._values().reshape(-1, side, side)
        unused = notes_of(self._table, replace(columns, paths=(), one_hot=(*columns.one_hot, *self._pixels)))[1:]
        self.notes = (f"read from {self.path.name}: images of {side}×{side} columns of pixels", *unused)
        labels, splits, groups = [], [], []
        for line, row in zip(self._table.lines, self._table.rows, strict=True):
            splits.append(split_of_row(f"{self.where}:{line}", row, columns, TRAIN))
            groups.append(group_of_row(f"{self.where}:{line}", self._table, row, columns))
            if columns.is_labelled:
                labels.append(label_of_row(f"{self.where}:{line}", self._table, row, columns, splits[-1]))
        parts = []
        for split in (TRAIN, VAL, TEST):
            own = [index for index, found in enumerate(splits) if found == split]
            named = [label for index in own if labels and (label := labels[index]) is not None]
            if named and len(named) < len(own):
                raise UserError(
                    f"{self.where}: {len(own) - len(named):,} of its {split} rows have no label; fill them in"
                )
            prefix = f"{split}/" if columns.split is not None else ""
            if own:
                own_groups = tuple(groups[index] for index in own)
                parts.append(ArrayPart(prefix, images[own], tuple(named) if named else None, split, own_groups))
        return parts

    def _values(self) -> NDArray[np.uint8 | np.float32]:
        rows: list[NDArray[np.uint8 | np.float32]] = []
        for line, row in zip(self._table.lines, self._table.rows, strict=True):
            try:
                with np.errstate(over="ignore"):  # infinite then, which is refused as a pixel
                    values = np.array([row[index] for index in self._pixels], dtype=np.float32)
            except ValueError as error:
                raise UserError(f"{self.where}:{line}: a pixel is not a number ({error})") from error
            small = np.clip(np.nan_to_num(values), 0, 255).astype(np.uint8)
            rows.append(small if np.array_equal(small, values) else values)
        if all(row.dtype == np.uint8 for row in rows):
            return np.stack(rows)
        return np.stack([row.astype(np.float32) for row in rows])
