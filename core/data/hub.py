"""Data sets of the Hugging Face hub on disk: .parquet or .arrow files with the bytes of images and their labels.

Read as the hub writes them: a column of `{bytes, path}`, a column of class indices whose names are in the file's
metadata, and the split in the file's name or folder. Needs pyarrow.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from core.data.decode import BrokenImageError
from core.data.files import PathSource
from core.data.layout import HUB_SUFFIXES, Arrangement, Entry, is_hidden, is_image
from core.data.names import class_name, fault_of_label, listed, look_alikes
from core.data.roles import TEST, TRAIN, Split, split_of
from core.data.source import Payload, Reading, file_stamp, one_line
from core.errors import UserError
from core.text import count, printable

IMAGE_COLUMNS = ("image", "img", "images", "picture", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "class", "target", "fine_label")
ALSO_LABELS = ("coarse_label",)

# Rows decoded from a file at once.
_ROWS_AT_ONCE = 256

# Folders around a hub's files: `default/train/0000.parquet`.
_DEPTH = 3


def files_in(folder: Path) -> list[Path]:
    """Return the .parquet or .arrow files of a folder, sorted; empty for a folder of images or anything else."""
    found: list[Path] = []
    waiting = [(os.fspath(folder), 0)]
    while waiting:
        where, depth = waiting.pop()
        try:
            with os.scandir(where) as entries:
                for entry in entries:
                    if is_image(entry.name):
                        return []
                    if entry.name.lower().endswith(HUB_SUFFIXES) and not is_hidden(entry.name):
                        found.append(Path(entry.path))
                    elif depth < _DEPTH and not is_hidden(entry.name) and entry.is_dir():
                        waiting.append((entry.path, depth + 1))
        except OSError:  # the folder's own source reports it
            return []
    return sorted(found)


class HubSource(PathSource):
    """One or several .parquet or .arrow files."""

    def __init__(self, path: Path, files: Sequence[Path], reading: Reading) -> None:
        super().__init__(path, reading)
        self._files = [(file, self._split_of(file)) for file in files]

    def stamp(self) -> str:
        states = "\n".join(file_stamp(file) for file, _ in self._files)
        return f"{self.path.resolve()}|{hashlib.sha256(states.encode()).hexdigest()}"

    def arranged(self) -> Arrangement:
        entries: list[Entry] = []
        unlabelled = 0
        for file, split in self._splits().items():
            groups = self._groups(file)
            for row, label in enumerate(self._labels(file)):
                if label is None and split == TEST:
                    unlabelled += 1
                    continue
                if fault := fault_of_label(label or ""):
                    raise UserError(f"{self.where}: row {row} of {file.name}: {fault}")
                group = groups[row] if groups else ""
                if groups and not group:
                    raise UserError(f"{self.where}: row {row} of {file.name}: no {self.reading.config.group}")
                entries.append(Entry(self._id(file, row), class_name(label or ""), split, group))
        columns = [name for name in (*self._columns, self.reading.config.group) if name in self._schema.names]
        unused = [name for name in self._schema.names if name not in columns]
        notes = [f"read from {count(len(self._files), 'file')}: the columns {', '.join(map(str, columns))}"]
        notes += [f"columns not used: {listed(unused, 10)}"] if unused else []
        notes += look_alikes({entry.label for entry in entries})
        return Arrangement(entries, unlabelled, notes=tuple(notes))

    def unlabelled(self) -> Arrangement:
        tested = [file for file, split in self._files if split == TEST]
        files = tested or [file for file, _ in self._files]
        return Arrangement([Entry(self._id(file, row)) for file in files for row in range(self._rows(file))])

    def payloads(self, entries: Sequence[Entry]) -> Iterator[tuple[int, Payload]]:
        positions = {entry.id: position for position, entry in enumerate(entries)}
        for file, _ in self._files:
            row = 0
            for batch in self._batches(file, [self._columns[0]]):
                for value in batch.column(0).to_pylist():
                    position = positions.get(self._id(file, row))
                    if position is not None:
                        yield position, self._payload(value)
                    row += 1

    @staticmethod
    def _payload(value: Any) -> Payload:
        content = value.get("bytes") if isinstance(value, dict) else value
        return content if isinstance(content, bytes) else BrokenImageError("its row has no bytes of an image")

    def _id(self, file: Path, row: int) -> str:
        name = file.name if file == self.path else file.relative_to(self.path).as_posix()
        return f"{name}:{row}"

    def _split_of(self, file: Path) -> Split | None:
        """The split in the file's name, such as `test-00000-of-00001.parquet`, or in its folder."""
        inside = file.name if file == self.path else file.relative_to(self.path).as_posix()
        parts = [os.path.splitext(part)[0] for part in reversed(inside.split("/"))]  # noqa: PTH122
        return next((split for part in parts if (split := split_of(part))), None)

    def _splits(self) -> dict[Path, Split]:
        splits = {split for _, split in self._files}
        unclear = [file.name for file, split in self._files if split is None]
        if splits != {None} and unclear:
            raise UserError(
                f"{self.where}: some of its files are named as splits, and {listed(unclear)} not; rename or remove them"
            )
        if splits == {TEST}:
            raise UserError(f"{self.where}: only test images; give the folder of all splits")
        return {file: split or TRAIN for file, split in self._files}

    @cached_property
    def _columns(self) -> tuple[str, str | None]:
        """The columns of images and of labels.

        Raises:
            UserError: there is none of images, or several of labels.
        """
        names = list(self._schema.names)
        shown = listed(names, 12)
        image = self.reading.config.path_column or next((name for name in IMAGE_COLUMNS if name in names), None)
        if image is None or image not in names:
            raise UserError(f"{self.where}: no column image; name it with data.path_column; its columns are {shown}")
        given = self.reading.config.label_column
        if given is not None and given not in names:
            raise UserError(f"{self.where}: no column {given} for data.label_column; its columns are {shown}")
        found = [name for name in (*LABEL_COLUMNS, *ALSO_LABELS) if name in names]
        if given is None and len(found) > 1:
            raise UserError(f"{self.where}: its columns {listed(found)} may all have the labels; set data.label_column")
        return image, given or next(iter(found), None)

    def _labels(self, file: Path) -> list[str | None]:
        """Label of each row; None if it has none, which the hub writes as -1."""
        column = self._columns[1]
        if column is None:
            raise UserError(
                f"{self.where}: no column label; name it with data.label_column; "
                f"its columns are {listed(list(self._schema.names), 12)}"
            )
        names = self._class_names(column)
        values = [value for batch in self._batches(file, [column]) for value in batch.column(0).to_pylist()]
        if names is None:
            return [None if value is None else _text(value) for value in values]
        wrong = next((value for value in values if value is not None and not -1 <= value < len(names)), None)
        if wrong is not None:
            raise UserError(f"{self.where}: {file.name} has the label {wrong} of {len(names)} classes")
        return [None if value in (None, -1) else names[value] for value in values]

    def _groups(self, file: Path) -> list[str]:
        """Group of each row; none unless `data.group` names a column."""
        group = self.reading.config.group
        if group is None or group not in self._schema.names:
            return []
        values = (value for batch in self._batches(file, [group]) for value in batch.column(0).to_pylist())
        return ["" if value is None else _text(value) for value in values]

    def _class_names(self, column: str) -> list[str] | None:
        """Names of the class indices, from the metadata that the `datasets` library writes."""
        try:
            features = json.loads((self._schema.metadata or {})[b"huggingface"])["info"]["features"]
            names = features[column]["names"]
        except (KeyError, TypeError, ValueError):
            return None
        return list(map(str, names)) if isinstance(names, list) else None

    @cached_property
    def _schema(self) -> Any:
        return self._open(self._files[0][0])[0]

    def _rows(self, file: Path) -> int:
        return sum(batch.num_rows for batch in self._batches(file, [self._columns[0]]))

    def _batches(self, file: Path, columns: list[str]) -> Iterator[Any]:
        schema, batches = self._open(file)
        missing = [name for name in columns if name not in schema.names]
        if missing:
            raise UserError(f"{self.where}: {printable(file.name)} has no column {listed(missing)}, as others have")
        try:
            yield from batches(columns)
        except (OSError, ValueError) as error:  # pyarrow's errors are subclasses
            raise self._damaged(file, error) from error

    def _open(self, file: Path) -> tuple[Any, Any]:
        """The schema of a file, and a function that reads batches of some columns."""
        try:
            if file.name.lower().endswith(".parquet"):
                parquet = _pyarrow("pyarrow.parquet", self.where).ParquetFile(file)
                return parquet.schema_arrow, lambda columns: parquet.iter_batches(_ROWS_AT_ONCE, columns=columns)
            ipc = _pyarrow("pyarrow.ipc", self.where)
            stored = _pyarrow("pyarrow", self.where).memory_map(str(file))
            try:
                reader = ipc.open_stream(stored)  # as the `datasets` library writes
                batches = iter(reader)
            except ValueError:
                reader = ipc.open_file(stored)
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            return reader.schema, lambda columns: (batch.select(columns) for batch in batches)
        except (OSError, ValueError) as error:
            raise self._damaged(file, error) from error

    def _damaged(self, file: Path, error: Exception) -> UserError:
        return UserError(f"{self.where}: {printable(file.name)} is damaged or cut short ({one_line(error)})")


def _text(value: Any) -> str:
    """A label as text; whole numbers without a fraction."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _pyarrow(module: str, where: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{where}: reading it needs pyarrow; install hpo-vision[parquet]") from error
