"""The choice between folders and a table beside the images as the source of the labels."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from core.data.layout import TABLE_SUFFIXES, Arrangement, Entry, Tree, arrange, left_out_of
from core.data.names import class_order, listed
from core.data.roles import TEST, Split, split_of
from core.data.source import Reading
from core.data.tables import (
    Columns,
    Images,
    Rows,
    Table,
    arrangement_of,
    choose_columns,
    most_missing,
    parse_table,
    read_rows,
    split_of_folders,
    with_paths,
)
from core.errors import UserError

# More tables in a folder than this are data about single images, not their labels.
_MOST_TABLES = 20

Read = Callable[[str], bytes]


def arrange_tree(tree: Tree, read: Read, where: str, reading: Reading) -> Arrangement:
    """Find classes and splits by folders, file names, or a table in the tree.

    Raises:
        UserError: there is no reading, or folders and a table have different ones.
    """
    config = reading.config
    if config.label_from in ("folder", "filename") or not tree.images:
        return arrange(tree, where, config)
    asked = config.label_from == "table" or any((config.path_column, config.label_column, config.images))
    tables = _Tables(tree, read, where, reading, asked=asked)
    if not tables.labelled:
        if asked:
            raise UserError(f"{where}: no table in it has labels and the images' paths or ids{tables.seen()}")
        return arrange(tree, where, config)
    if asked:
        return tables.arranged()
    try:
        folders = arrange(tree, where, config)
    except UserError:
        return tables.arranged()
    by_folder = {entry.id: entry.label for entry in folders.entries}
    if len(set(by_folder.values())) < 2:
        return tables.arranged()
    by_table = tables.arranged()
    if any(entry.group for entry in by_table.entries):
        return by_table
    if all(by_folder.get(entry.id) == entry.label for entry in by_table.entries):
        return folders
    names = class_order(by_folder.values()), class_order(entry.label for entry in by_table.entries)
    raise UserError(
        f"{where}: its folders give {len(names[0]):,} classes ({listed(names[0])}), and its table {tables.names()} "
        f"{len(names[1]):,} ({listed(names[1])}); choose by data.label_from=folder or data.label_from=table"
    )


class _Tables:
    """The tables in a tree that name its images."""

    def __init__(self, tree: Tree, read: Read, where: str, reading: Reading, *, asked: bool) -> None:
        self._tree = tree
        self._where = where
        self._config = reading.config
        self._most_missing = most_missing(reading)
        self._files = frozenset(tree.images)
        self.labelled: dict[str, tuple[Table, Columns, Images]] = {}
        self._unlabelled: dict[str, tuple[Table, Columns, Images]] = {}
        self._all = [path for path in tree.others if path.lower().endswith(TABLE_SUFFIXES)]
        for path in self._all if len(self._all) <= _MOST_TABLES else []:
            if "submission" in posixpath.basename(path).lower():
                continue
            try:
                self._add(path, read(path))
            except UserError:
                if asked:
                    raise

    def _add(self, path: str, content: bytes) -> None:
        table = parse_table(content, f"{self._where}/{path}")
        split = _split_of_table(path)
        images = Images(self._where, self._folders(path), self._files.__contains__, lambda: self._tree.images)
        columns = with_paths(table, choose_columns(table, self._config), images, split)
        if columns.paths and any(images.find(row[columns.paths[0]], split) for row in table.rows[:1000]):
            (self.labelled if columns.is_labelled else self._unlabelled)[path] = table, columns, images

    def _folders(self, path: str) -> tuple[str, ...]:
        """Folders that a table's paths are relative to: that of `data.images`, or its own and those around it."""
        around = [posixpath.dirname(path)]
        while around[-1]:
            around.append(posixpath.dirname(around[-1]))
        if self._config.images is None:
            return tuple(around)
        return tuple(posixpath.normpath(posixpath.join(folder, self._config.images)) for folder in around)

    def _rows(self, table: Table, columns: Columns, images: Images, split: Split | None) -> Rows:
        return read_rows(table, columns, images, split, self._most_missing)

    def names(self) -> str:
        """The tables with labels."""
        return listed(list(self.labelled))

    def seen(self) -> str:
        """The end of a message that lists all tables."""
        return f"; its tables are {listed(self._all)}" if self._all else "; it has no .csv"

    def arranged(self) -> Arrangement:
        """Read the labelled tables, which are one, or one per split."""
        splits: dict[str, Split | None] = {path: _split_of_table(path) for path in self.labelled}
        if len(splits) > 1 and (None in splits.values() or len(set(splits.values())) < len(splits)):
            raise UserError(
                f"{self._where}: its tables {self.names()} may all have the labels; give one of them, or remove "
                "the others"
            )
        read = [(*self.labelled[path][:2], self._rows(*self.labelled[path], split)) for path, split in splits.items()]
        for path, (table, columns, images) in self._unlabelled.items():
            rows = self._rows(table, replace(columns, label=None), images, TEST)
            if _split_of_table(path) == TEST:
                read.append((table, columns, Rows(unlabelled=rows.unlabelled, missing=rows.missing)))
        used = {entry.id for _, _, rows in read for entry in rows.entries}
        tested = {image for _, _, rows in read for image in rows.unlabelled}
        rest = [image for image in self._tree.images if image not in used and image not in tested]
        tested_too = [image for image in rest if split_of_folders(image) == TEST]
        names = " and ".join(posixpath.basename(path) for path in self.labelled)
        others = Counter(left_out_of(self._tree))
        others[f"images not in {names}"] = len(rest) - len(tested_too)
        found = arrangement_of(read, dict(others))
        entries: list[Entry] = sorted(found.entries, key=lambda entry: entry.id)
        return replace(found, entries=entries, unlabelled=found.unlabelled + len(tested_too))


def _split_of_table(path: str) -> Split | None:
    return split_of(posixpath.splitext(posixpath.basename(path))[0])
