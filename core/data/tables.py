"""Tables of labels: CSV with any of the usual columns, and the images that their rows name."""

from __future__ import annotations

import codecs
import csv
import io
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from core.config import DataConfig
from core.data.layout import Arrangement, Entry
from core.data.names import class_name, fault_of_label, listed, look_alikes
from core.data.roles import TEST, TRAIN, Split, split_of
from core.data.source import Reading
from core.errors import UserError
from core.text import count, printable

# The usual names, compared without case, with `_` for spaces and dashes; the first that fits is used.
PATH_NAMES = (
    "path", "filepath", "filepaths", "file", "file_name", "filename", "filenames", "image_path", "image_name", "image",
    "images", "img", "image_id", "id", "id_code",
)  # fmt: skip
LABEL_NAMES = ("label", "labels", "class", "class_name", "target", "category", "diagnosis")

# A column of one of these names must have split words; others may.
SPLIT_COLUMN = "split"

_PIXEL = re.compile(r"(pixel|px)_?\d+|\d+x\d+")
# Fewer columns with numbers in their names are no image: the smallest has 4×4 pixels.
_FEWEST_PIXELS = 16

# Missing files after which a table is refused without looking up the others.
_MOST_MISSING = 20

# Rows whose files are looked up to decide whether a column has paths.
_TRIED = 100


@dataclass(frozen=True)
class Table:
    """A table as text."""

    where: str
    header: tuple[str, ...]
    rows: list[list[str]]
    lines: list[int]
    """Line number of each row, for messages."""
    empty: int = 0
    """Number of rows without any text, which are left out."""

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The column names in the form in which they are compared."""
        return tuple(_key(name) for name in self.header)

    def column(self, index: int) -> list[str]:
        """All cells of a column."""
        return [row[index] for row in self.rows]

    def index_of(self, name: str | None) -> int | None:
        """Return the index of the first column of that name; None if there is none."""
        return self.keys.index(_key(name)) if name is not None and _key(name) in self.keys else None

    def find(self, name: str, field_name: str) -> int:
        """Return the index of the column that a configuration names.

        Raises:
            UserError: there is none, or several.
        """
        found = [index for index, key in enumerate(self.keys) if key == _key(name)]
        if len(found) != 1:
            problem = "no column" if not found else f"{len(found)} columns"
            raise UserError(f"{self.where}: {problem} {name} for data.{field_name}; its header is {shown_header(self)}")
        return found[0]


def _key(name: str) -> str:
    return re.sub(r"[\s\-]+", "_", name.strip().casefold())


def shown_header(table: Table) -> str:
    """The column names in one line."""
    return listed([name or "(no name)" for name in table.header], 12)


def parse_table(content: bytes, where: str) -> Table:
    """Read a CSV: separated by commas, semicolons or tabs, in UTF-8, or in UTF-16 with a byte order mark.

    Raises:
        UserError: it is none, or has no rows.
    """
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    rows: list[list[str]] = []
    lines: list[int] = []
    empty = 0
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
        first = text.partition("\n")[0]
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
        header = tuple(name.strip() for name in next(reader, []))
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                empty += 1
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{where}:{reader.line_num}: {count(len(cells), 'column')}, and the header names {len(header)}"
                )
            rows.append(cells)
            lines.append(reader.line_num)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{where}: cannot be read as CSV in UTF-8 ({error})") from error
    if not rows:
        raise UserError(f"{where}: it has no rows; expected a header such as path,label and one row per image")
    return Table(where, header, rows, lines, empty)


# Columns


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are used, by index."""

    paths: tuple[int, ...]
    """Those that may have the paths, the most likely first."""
    label: int | None
    one_hot: tuple[int, ...]
    """Columns of 0 and 1, one per class."""
    split: int | None
    group: int | None = None
    """The column that `data.group` names."""

    @property
    def is_labelled(self) -> bool:
        """Whether the table has labels."""
        return self.label is not None or bool(self.one_hot)


def pixel_columns(header: Sequence[str]) -> list[int]:
    """Return the columns that are the pixels of one image, in their order; empty if there are none."""
    found = [index for index, name in enumerate(header) if _PIXEL.fullmatch(_key(name))]
    return found if len(found) >= _FEWEST_PIXELS else []


def choose_columns(table: Table, config: DataConfig, *, skipped: Iterable[int] = ()) -> Columns:
    """Find the columns with paths, labels and splits, by the configuration or their usual names.

    Args:
        table: the table.
        config: may name the columns of paths and labels.
        skipped: columns with other content.

    Raises:
        UserError: several columns may have the labels or the splits; or a named column is missing.
    """
    used = set(skipped)
    twice = [key for key, count in Counter(table.keys).items() if count > 1 and key in (*PATH_NAMES, *LABEL_NAMES)]
    if twice:
        count = table.keys.count(twice[0])
        raise UserError(f"{table.where}: {count} columns are named {twice[0]}; rename or remove all but one")
    paths: tuple[int, ...]
    if config.path_column is not None:
        paths = (table.find(config.path_column, "path_column"),)
    else:
        paths = tuple(i for name in PATH_NAMES for i, key in enumerate(table.keys) if key == name and i not in used)
    used.update(paths)
    if config.label_column is not None:
        label: int | None = table.find(config.label_column, "label_column")
        paths = tuple(index for index in paths if index != label)
    else:
        label = _label_column(table, used)
    used.update([] if label is None else [label])
    group = table.index_of(config.group)
    used.update([] if group is None else [group])
    split = _split_column(table, used)
    used.update([] if split is None else [split])
    one_hot = _one_hot_columns(table, used) if label is None else ()
    return Columns(paths, label, one_hot, split, group)


def _label_column(table: Table, used: set[int]) -> int | None:
    found = [i for name in LABEL_NAMES for i, key in enumerate(table.keys) if key == name and i not in used]
    values = {index: table.column(index) for index in found}
    if len({tuple(column) for column in values.values()}) > 1:
        readings = "; ".join(
            f"data.label_column={table.header[index]} reads {len(set(values[index])):,} classes "
            f"({listed(sorted(set(values[index])), 3)})"
            for index in found
        )
        raise UserError(f"{table.where}: several columns may have the labels: {readings}")
    return found[0] if found else None


def _split_column(table: Table, used: set[int]) -> int | None:
    found = []
    for index, key in enumerate(table.keys):
        if index in used:
            continue
        values = set(table.column(index)) - {""}
        words = {split_of(value) for value in values}
        if key == SPLIT_COLUMN or (None not in words and len(words) > 1):
            found.append(index)
    if len(found) > 1:
        names = listed([table.header[index] for index in found])
        raise UserError(f"{table.where}: its columns {names} all have splits; remove all but one")
    return found[0] if found else None


def _one_hot_columns(table: Table, used: set[int]) -> tuple[int, ...]:
    binary = [i for i in range(len(table.header)) if i not in used and set(table.column(i)) <= {"0", "1", "0.0", "1.0"}]
    if len(binary) < 2:
        return ()
    several = sum(sum(row[index][0] == "1" for index in binary) != 1 for row in table.rows)
    if several:
        names = listed([table.header[index] for index in binary])
        raise UserError(
            f"{table.where}: no label column; its columns {names} have 0 and 1, but {several:,} of {len(table.rows):,} "
            "rows have none or several of them, and an image has one class; name the column with data.label_column"
        )
    return tuple(binary)


# Images


@dataclass(frozen=True)
class Images:
    """Finds the images that rows name.

    Args:
        where: the folder or archive, for messages.
        folders: folders that paths are relative to, the first in which there is such a file counts.
        exists: whether there is a file of that path.
        listing: all images, looked at only if a path does not exist as it is written.
    """

    where: str
    folders: tuple[str, ...]
    exists: Callable[[str], bool]
    listing: Callable[[], Iterable[str]]

    @cached_property
    def _by_name(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """Paths by file name, and by file name without suffix, both in lower case."""
        names: dict[str, list[str]] = defaultdict(list)
        stems: dict[str, list[str]] = defaultdict(list)
        for path in self.listing():
            name = posixpath.basename(path).lower()
            names[name].append(path)
            stems[posixpath.splitext(name)[0]].append(path)
        return names, stems

    def find(self, written: str, split: Split | None) -> list[str]:
        """Return the images that a row may mean: one if it is clear, none if there is no such file.

        A path may lack its suffix or folder, have the suffix in another case, or backslashes. Among files of the same
        name, one in a folder named like the table's split counts.
        """
        path = posixpath.normpath(written.replace("\\", "/"))
        for folder in self.folders:
            for name in (written, path):
                inside = f"{folder}/{name}" if folder else name
                if self.exists(inside):
                    return [inside]
        names, stems = self._by_name
        last = posixpath.basename(path).lower()
        tail = f"/{path.lower()}"
        found = [image for image in names.get(last, ()) if f"/{image.lower()}".endswith(tail)]
        if not found:
            found = [
                image for image in stems.get(last, ()) if posixpath.splitext(f"/{image.lower()}")[0].endswith(tail)
            ]
        near = [image for image in found if any(image.startswith(f"{folder}/") for folder in self.folders if folder)]
        found = near or found
        alike = [image for image in found if split is not None and split_of_folders(image) == split]
        return alike if len(found) > 1 and alike else found


def split_of_folders(path: str) -> Split | None:
    """Return the split that the folders of a path name, the outermost first."""
    return next((split for part in path.split("/")[:-1] if (split := split_of(part))), None)


def with_paths(table: Table, columns: Columns, images: Images, split: Split | None) -> Columns:
    """Keep the first of the columns that may have paths whose first rows name images; the first if none does."""
    for index in columns.paths:
        if any(images.find(row[index], split) for row in table.rows[:_TRIED] if row[index]):
            return replace(columns, paths=(index,))
    return replace(columns, paths=columns.paths[:1])


# Rows


@dataclass
class Rows:
    """The rows of a table as entries."""

    entries: list[Entry] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    """Test images without a class."""
    missing: list[str] = field(default_factory=list)
    """Paths without a file."""
    repeated: int = 0
    """Rows that repeat another."""
    labels: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Each class with its spellings."""


def read_rows(table: Table, columns: Columns, images: Images, split: Split | None, most_missing: int | None) -> Rows:
    """Find the image, the label and the split of each row.

    Args:
        table: the table.
        columns: its columns, with one of paths.
        images: finds the images.
        split: the split of rows that name none.
        most_missing: number of missing files at which to stop; None skips any number.

    Raises:
        UserError: files are missing; or a row has no path, no class or an unknown split, contradicts another, or may
            mean several images.
    """
    found = Rows()
    (path_column,) = columns.paths
    seen: dict[str, tuple[int, Entry | None]] = {}
    for number, (line, row) in enumerate(zip(table.lines, table.rows, strict=True), 1):
        at = f"{table.where}:{line}"
        own = split_of_row(at, row, columns, split)
        label = label_of_row(at, table, row, columns, own)
        if not row[path_column]:
            raise UserError(f"{at}: no {table.header[path_column]}; fill it in or remove the row")
        candidates = images.find(row[path_column], own)
        if not candidates:
            found.missing.append(row[path_column])
            if len(found.missing) == most_missing:
                raise missing_files(table.where, found.missing, number, len(table.rows))
            continue
        if len(candidates) > 1:
            raise UserError(
                f"{at}: {printable(row[path_column])} may be {listed(candidates, 2)}; "
                "name their folder with data.images"
            )
        entry = (
            None if label is None else Entry(candidates[0], label, own or TRAIN, group_of_row(at, table, row, columns))
        )
        if candidates[0] in seen:
            before, other = seen[candidates[0]]
            if other != entry:
                raise UserError(
                    f"{at}: {printable(candidates[0])} is in line {before} too, with {_contradiction(other, entry)}; "
                    "remove one of the two"
                )
            found.repeated += 1
            continue
        seen[candidates[0]] = line, entry
        if entry is None:
            found.unlabelled.append(candidates[0])
            continue
        found.labels[class_name(entry.label)].add(entry.label)
        found.entries.append(replace(entry, label=class_name(entry.label)))
    if found.missing and most_missing is not None:
        raise missing_files(table.where, found.missing, len(table.rows), len(table.rows))
    return found


def _contradiction(a: Entry | None, b: Entry | None) -> str:
    if a is None or b is None or a.split != b.split:
        return "another split"
    if a.label == b.label:
        return f"the group {printable(a.group)} instead of {printable(b.group)}"
    return f"the class {printable(a.label)} instead of {printable(b.label)}"


def split_of_row(at: str, row: list[str], columns: Columns, default: Split | None) -> Split | None:
    """The row's split; `default` if it names none."""
    written = "" if columns.split is None else row[columns.split]
    if not written:
        return default
    split = split_of(written)
    if split is None:
        raise UserError(f"{at}: split is {written!r}; write train, val or test")
    return split


def label_of_row(at: str, table: Table, row: list[str], columns: Columns, split: Split | None) -> str | None:
    """The row's label; None if it is a test image without a class."""
    if columns.one_hot:
        label = table.header[next(index for index in columns.one_hot if row[index][0] == "1")]
    else:
        label = "" if columns.label is None else row[columns.label]
    if not label and split == TEST:
        return None
    if fault := fault_of_label(label):
        raise UserError(f"{at}: {fault}; fill it in or remove the row")
    return label


def group_of_row(at: str, table: Table, row: list[str], columns: Columns) -> str:
    """The row's group; empty without a column of groups."""
    if columns.group is None:
        return ""
    if not row[columns.group]:
        raise UserError(
            f"{at}: no {table.header[columns.group]}, the column of data.group; fill it in or remove the row"
        )
    return row[columns.group]


def split_by_folders(entries: Sequence[Entry]) -> list[Entry] | None:
    """The entries in the splits that their folders name; None unless all folders name one, and not the same."""
    splits = [split_of_folders(entry.id) for entry in entries]
    if None in splits or TRAIN not in splits or len(set(splits)) < 2:
        return None
    return [replace(entry, split=split) for entry, split in zip(entries, splits, strict=True) if split]


def notes_of(table: Table, columns: Columns) -> list[str]:
    """Describe the columns that are used, and those that are not."""
    used = {*columns.paths, *columns.one_hot, columns.label, columns.split, columns.group}
    unused = [name or "(no name)" for index, name in enumerate(table.header) if index not in used]
    names = [table.header[columns.paths[0]]] if columns.paths else []
    names += [table.header[index] for index in (columns.label, columns.split, columns.group) if index is not None]
    text = f"read from {os.path.basename(table.where)}: the columns {listed(names)}"  # noqa: PTH119
    if columns.one_hot:
        text += f" and one column for each of {len(columns.one_hot)} classes"
    return [text, *([f"columns not used: {listed(unused, 10)}"] if unused else [])]


def most_missing(reading: Reading) -> int | None:
    """Number of missing files at which reading a table stops; None skips them."""
    return None if reading.skip_broken else _MOST_MISSING


def missing_files(where: str, missing: Sequence[str], read: int, rows: int) -> UserError:
    """The error of a table of which `read` of all `rows` were looked up."""
    looked_up = f"{rows:,}" if read == rows else f"the first {read:,} (of {rows:,})"
    return UserError(
        f"{where}: {len(missing):,} of {looked_up} rows name files that do not exist: {listed(missing)}; "
        "fix the paths, name the folder of the images with data.images, or skip them with --skip-broken"
    )


def arrangement_of(rows: Sequence[tuple[Table, Columns, Rows]], others: dict[str, int]) -> Arrangement:
    """Build the arrangement of one or several tables.

    Raises:
        UserError: all are test images, or none has a file.
    """
    first = rows[0][0].where
    missing = [path for _, _, found in rows for path in found.missing]
    entries = [entry for _, _, found in rows for entry in found.entries]
    if missing and not entries:
        raise missing_files(first, missing, len(missing), sum(len(table.rows) for table, _, _ in rows))
    by_folder = None if any(columns.split is not None for _, columns, _ in rows) else split_by_folders(entries)
    entries = entries if by_folder is None or len(rows) > 1 else by_folder
    if entries and all(entry.test for entry in entries):
        raise UserError(f"{first}: every row is in the split test; mark the others train")
    labels: dict[str, set[str]] = defaultdict(set)
    left_out: Counter[str] = Counter(others)
    for table, _, found in rows:
        left_out.update({"empty rows": table.empty, "repeated rows": found.repeated})
        for name, spellings in found.labels.items():
            labels[name] |= spellings
    return Arrangement(
        entries,
        unlabelled=sum(len(found.unlabelled) for _, _, found in rows),
        left_out={kind: count for kind, count in left_out.items() if count},
        notes=(
            *(note for table, columns, _ in rows for note in notes_of(table, columns)),
            *look_alikes(labels, labels),
        ),
        broken=tuple(missing),
    )
