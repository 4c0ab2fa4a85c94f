"""Submissions in the form of a sample: its ids, order, header, separator and columns.

The sample's text is kept as it is, with its line ends, byte order mark and quotes; only cells of labels or
probabilities are replaced.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from core.data.layout import is_image
from core.data.names import listed
from core.data.tables import LABEL_NAMES
from core.text import count, printable
from hpo.errors import BundleError
from hpo.storage.atomic import replacing

logger = logging.getLogger(__name__)

SEPARATORS = (",", ";", "\t", "|")

LABEL_COLUMNS = frozenset({*LABEL_NAMES, "prediction", "predicted"})
"""Headers of a column of class names, in lower case."""

EXAMPLES = 3
"""Number of ids that a message names."""


@dataclass(frozen=True)
class Row:
    """One line of a sample; its cells, joined by the separator, and its end are its text."""

    cells: tuple[str, ...]
    """As written, with quotes."""
    end: str
    line: int
    """Line number of its first character, from 1."""

    @property
    def values(self) -> tuple[str, ...]:
        """The cells without quotes."""
        return tuple(map(_unquoted, self.cells))


@dataclass(frozen=True)
class Form:
    """The cells of a sample that a submission replaces."""

    positions: tuple[int, ...]
    """For each row of the sample, the position of its image."""
    label: int | None
    """Column of the class names."""
    probabilities: dict[int, int]
    """Column -> class whose probability it holds."""
    warning: str = ""


@dataclass(frozen=True)
class Sample:
    """A CSV that shows the form of a submission."""

    path: Path
    mark: str
    """Byte order mark, or nothing."""
    separator: str
    header: Row
    rows: tuple[Row, ...]
    """All other lines; an empty line has one empty cell."""

    @classmethod
    def read(cls, path: Path | str, *, output: Path | None = None) -> Sample:
        """Read a sample; `output` must not be the same file.

        Raises:
            BundleError: It cannot be read, or is not a table with a column of ids and another.
        """
        path = Path(path)
        if output is not None and output.exists() and path.exists() and output.samefile(path):
            raise BundleError(f"{path}: the sample would be replaced by the output; give another file")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{path}: the sample cannot be read ({error.strerror or error})") from error
        if b"\0" in content or content.startswith((b"\xff\xfe", b"\xfe\xff", b"PK")):
            raise BundleError(f"{path}: the sample is no CSV in UTF-8; unpack it, or save it as such")
        text = content.decode(errors="surrogateescape")
        mark = text[: len(text) - len(text.removeprefix("\ufeff"))]
        text = text.removeprefix(mark)
        separator = max(SEPARATORS, key=lambda one: len(next(_rows(text, one), _EMPTY).cells))
        header, *rows = list(_rows(text, separator)) or [_EMPTY]
        sample = cls(path, mark, separator, header, tuple(rows))
        if len(header.cells) < 2:
            raise sample._fault("no column besides the ids; expected a header such as id,label and one row per image")
        if not sample.filled_rows:
            raise sample._fault("no row besides its header; expected one per image")
        for row in sample.filled_rows:
            if len(row.cells) != len(header.cells):
                raise BundleError(
                    f"{path}:{row.line}: {count(len(row.cells), 'column')}, and the header has {len(header.cells)}"
                )
        return sample

    @property
    def filled_rows(self) -> tuple[Row, ...]:
        """The rows without empty lines."""
        return tuple(row for row in self.rows if row.cells != ("",))

    def form(self, ids: Sequence[str], classes: Sequence[str]) -> Form:
        """Find the image of each row, and the columns to replace.

        Raises:
            BundleError: An id has no image, or an image no id; or the columns do not fit the classes.
        """
        columns = list(zip(*(row.values for row in self.filled_rows), strict=True))
        id_column, match = _best_match(columns, ids)
        if not any(position is not None for position in match):
            raise self._fault(
                f"none of its columns names the images; its first has {_some(columns[0])}, the images are {_some(ids)}"
            )
        positions = self._checked(columns[id_column], match, ids)
        return Form(positions, *self._outputs(id_column, columns, classes))

    def write(
        self,
        path: Path,
        ids: Sequence[str],
        labels: Tensor,
        classes: Sequence[str],
        probabilities: Tensor,
        broken: Sequence[str] = (),
    ) -> None:
        """Write the sample with these labels or probabilities.

        Args:
            labels: (N,) int64, indices into `classes`.
            probabilities: (N, K).
            broken: Ids of images without a label, whose rows stay as in the sample.

        Raises:
            BundleError: The images or classes do not fit the sample, or the file cannot be written.
        """
        form = self.form([*ids, *broken], classes)
        if form.warning:
            logger.warning("%s: %s", self.path, form.warning)
        names, shares = labels.tolist(), probabilities.tolist()
        positions = iter(form.positions)
        text = [self.mark, self._text(self.header)]
        for row in self.rows:
            if row.cells != ("",) and (position := next(positions)) < len(ids):
                cells = list(row.cells)
                if form.label is not None:
                    cells[form.label] = self._cell(classes[names[position]], like=row.cells[form.label])
                for column, index in form.probabilities.items():
                    cells[column] = self._cell(f"{shares[position][index]:.6g}", like=row.cells[column])
                row = Row(tuple(cells), row.end, row.line)
            text.append(self._text(row))
        try:
            with replacing(path) as temporary:
                temporary.write_bytes("".join(text).encode(errors="surrogateescape"))
        except OSError as error:
            raise BundleError(f"{path}: cannot be written ({error.strerror}); give another file") from error

    def _checked(self, wanted: Sequence[str], match: Sequence[int | None], ids: Sequence[str]) -> tuple[int, ...]:
        """The positions; BundleError unless they and the images are one to one."""
        faults = []
        missing = [name for name, position in zip(wanted, match, strict=True) if position is None]
        if missing:
            faults.append(f"no image, or several, for {count(len(missing), 'id')}: {_some(missing)}")
        taken = {position for position in match if position is not None}
        extra = [name for position, name in enumerate(ids) if position not in taken]
        if extra:
            faults.append(f"no id for {count(len(extra), 'image')}: {_some(extra)}")
        positions = tuple(position for position in match if position is not None)
        if len(taken) < len(positions):
            rows_of = Counter(positions)
            twice = [name for name, position in zip(wanted, match, strict=True) if rows_of[position or 0] > 1]
            faults.append(f"several rows for one image: {_some(twice)}")
        if faults:
            raise self._fault(f"{'; '.join(faults)}; give the images that it lists, and no others")
        return positions

    def _outputs(
        self, id_column: int, columns: Sequence[Sequence[str]], classes: Sequence[str]
    ) -> tuple[int | None, dict[int, int], str]:
        """The column of class names, the columns of probabilities, and a warning about them.

        Raises:
            BundleError: A column is unknown, or a class has none.
        """
        names = [name.strip() for name in self.header.values]
        others = [column for column in range(len(names)) if column != id_column]
        labels = [column for column in others if names[column].casefold() in LABEL_COLUMNS]
        unnamed = [column for column in others if column not in labels]
        class_of = {column: _class_of(names[column], classes) for column in unnamed}
        shares = {column: index for column, index in class_of.items() if index is not None}
        if shares:
            self._check_shares(names, unnamed, shares, classes)
            return (labels[0] if labels else None), shares, ""
        if len(others) > 1 and len(labels) != 1:
            raise self._fault(
                f"which of its columns {', '.join(printable(names[column]) for column in others)} to fill? "
                f"expected one called label, or one for each class: {_some(classes)}"
            )
        label = labels[0] if labels else others[0]
        return self._single(label, names[label], set(columns[label]) - {""}, classes)

    def _single(
        self, column: int, name: str, values: set[str], classes: Sequence[str]
    ) -> tuple[int | None, dict[int, int], str]:
        """The same for a single column, with these values in the sample."""
        if not values or values & set(classes):
            return column, {}, ""
        shown = f"its column {printable(name)} has {printable(min(values))}"
        if not any(_FRACTION.fullmatch(value) for value in values):
            return column, {}, f"{shown}, which is no class; class names such as {printable(classes[0])} are written"
        if tuple(classes) == ("0", "1"):
            return None, {column: 1}, ""
        raise self._fault(
            f"{shown}, a probability; name the column after its class ({_some(classes)}) in a copy of the sample"
        )

    def _check_shares(
        self, names: Sequence[str], columns: Sequence[int], shares: dict[int, int], classes: Sequence[str]
    ) -> None:
        unknown = [names[column] for column in columns if column not in shares]
        absent = [name for index, name in enumerate(classes) if index not in shares.values()]
        if unknown:
            raise self._fault(f"no class for {count(len(unknown), 'column')}: {_some(unknown)}")
        if len(set(shares.values())) < len(shares):
            raise self._fault("two columns for one class")
        if absent and not (len(classes) == 2 and len(shares) == 1):
            raise self._fault(f"no column for {len(absent)} of the model's {len(classes)} classes: {_some(absent)}")

    def _text(self, row: Row) -> str:
        return self.separator.join(row.cells) + row.end

    def _cell(self, value: str, *, like: str) -> str:
        """The value, in quotes if the cell had them or the value needs them."""
        if like.startswith('"') or any(sign in value for sign in (self.separator, '"', "\r", "\n")):
            return '"' + value.replace('"', '""') + '"'
        return value

    def _fault(self, message: str) -> BundleError:
        return BundleError(f"{self.path}: {message}")


_FRACTION = re.compile(r"[01]?\.[0-9]+")

_EMPTY = Row((), "", 1)


def _rows(text: str, separator: str) -> Iterator[Row]:
    """Yield the rows of a CSV with their text, which Python's reader discards; cells end where it ends them."""
    cell = re.compile(rf'((?:"(?:[^"]|"")*+")?[^{re.escape(separator)}\r\n]*)({re.escape(separator)}|\r\n|\r|\n|\Z)')
    cells: list[str] = []
    place, line, begun = 0, 1, 1
    while place < len(text) or cells:
        found = cell.match(text, place)
        assert found is not None, "a cell may be empty"
        cells.append(found[1])
        line += len(re.findall(r"\r\n|\r|\n", found[0]))
        place = found.end()
        if found[2] != separator:
            yield Row(tuple(cells), found[2], begun)
            cells, begun = [], line


def _unquoted(cell: str) -> str:
    if not cell.startswith('"'):
        return cell
    inner, _, after = cell[1:].rpartition('"')
    return inner.replace('""', '"') + after


Match = list[int | None]
"""For each name of a sample, the position of the id that it stands for; None without one, or with several."""


def _best_match(columns: Sequence[Sequence[str]], ids: Sequence[str]) -> tuple[int, Match]:
    """The first column that names an image in every row, or else the one that names the most."""
    ours = [_Name.of(name) for name in ids]
    best: tuple[int, Match] = (0, [])
    for index, column in enumerate(columns):
        match = _match(column, ours)
        if _images(match) == len(column):
            return index, match
        best = max(best, (index, match), key=lambda found: _images(found[1]))
    return best


def _match(wanted: Sequence[str], ours: Sequence[_Name]) -> Match:
    """Find names by as many of their last parts as possible, first with their extensions, then without."""
    theirs = [_Name.of(name) for name in wanted]
    best: Match = [None] * len(wanted)
    for depth in range(max((len(name.parts) for name in (*ours, *theirs)), default=0), 0, -1):
        for with_suffix in (True, False):
            known: dict[tuple[str, ...], int | None] = {}
            for position, name in enumerate(ours):
                key = name.key(depth, with_suffix)
                known[key] = None if key in known else position
            match = [known.get(name.key(depth, with_suffix)) for name in theirs]
            best = max(best, match, key=_images)
            if _images(best) == len(wanted):
                return best
    return best


def _images(match: Match) -> int:
    return len(set(match) - {None})


class _Name(NamedTuple):
    """A path in any notation."""

    parts: tuple[str, ...]
    stem: str
    """The last part without the extension of an image."""

    @classmethod
    def of(cls, name: str) -> _Name:
        plain = unicodedata.normalize("NFC", name.strip()).replace("\\", "/")
        parts = tuple(part for part in plain.split("/") if part not in ("", "."))
        last = parts[-1] if parts else ""
        return cls(parts, last.rpartition(".")[0] if is_image(last) else last)

    def key(self, depth: int, with_suffix: bool) -> tuple[str, ...]:
        """The last parts of the path, at most this many."""
        return self.parts[-depth:] if with_suffix else (*self.parts[-depth:-1], self.stem)


def _class_of(name: str, classes: Sequence[str]) -> int | None:
    """The class that a column is named after, as itself or as `write_submission` names it."""
    for plain in (name, name.removeprefix("p_")):
        if plain in classes:
            return classes.index(plain)
    folded = [unicodedata.normalize("NFC", each).casefold() for each in classes]
    plain = unicodedata.normalize("NFC", name).casefold()
    return folded.index(plain) if folded.count(plain) == 1 else None


def _some(names: Sequence[str]) -> str:
    return listed(names, EXAMPLES)
