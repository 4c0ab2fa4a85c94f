"""Images in files: in folders, in archives, or listed in a CSV.

Archives are read without unpacking. Members and links that point outside an archive are refused, as are CSV rows with
paths outside the CSV's folder. Unpacked sizes are limited (`core.data.bounds`). Links in the user's own folders are
followed.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import lzma
import os
import posixpath
import stat
import tarfile
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from core.data.bounds import (
    MAX_HEADER_BYTES,
    MAX_IMAGE_BYTES,
    MAX_LINK_BYTES,
    check_image_bytes,
    check_members,
    read_image_file,
)
from core.data.decode import BrokenImageError
from core.data.layout import (
    SPLIT_NAMES,
    TEST_NAMES,
    VAL_NAMES,
    Entry,
    Tree,
    arrange,
    image_files,
    is_image,
    member_path,
    printable,
)
from core.data.source import Payload, Source, file_stamp, one_line, plain_name
from core.errors import UserError

logger = logging.getLogger(__name__)

# Raised for damaged archives: RecursionError if headers of a .tar are chained endlessly, NotImplementedError for
# unknown compression.
TORN_ARCHIVE = (
    tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError, RecursionError,
    NotImplementedError,
)  # fmt: skip
UNPACK_IT = "if you trust it, unpack it and give the folder"


class _PathSource(Source):
    def __init__(self, path: Path) -> None:
        super().__init__(plain_name(path), str(path))
        self.path = path

    def stamp(self) -> str:
        return file_stamp(self.path)


class _TreeSource(_PathSource):
    """A source with a folder per class."""

    @abstractmethod
    def tree(self) -> Tree:
        """Return all files and folders."""

    def labelled(self) -> list[Entry]:
        return arrange(self.tree(), self.where)

    def unlabelled(self) -> list[Entry]:
        return [Entry(file) for file in image_files(self.tree().files)]


class FolderSource(_TreeSource):
    """A folder on disk, or a single image in it."""

    def __init__(self, path: Path, only: str | None = None) -> None:
        super().__init__(path)
        self._only = only

    def stamp(self) -> str:
        listing = hashlib.sha256()
        for file in sorted(self.tree().files):
            status = os.stat(f"{self.path}/{file}")  # noqa: PTH116 - a Path each costs more than the call
            listing.update(f"{file}|{status.st_size}|{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return f"{self.path.resolve()}|{listing.hexdigest()}"

    def tree(self) -> Tree:
        if self._only is not None:
            return Tree((self._only,), ())
        files: list[str] = []
        folders: list[str] = []
        seen = set()
        for root, names, leaves in os.walk(self.path, followlinks=True):
            status = Path(root).stat()
            if (status.st_dev, status.st_ino) in seen:  # a link to a parent would loop forever
                names.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            relative = Path(root).relative_to(self.path).as_posix()
            prefix = "" if relative == "." else f"{relative}/"
            files += [prefix + name for name in leaves if is_image(name)]
            folders += [prefix + name for name in names]
        return Tree(tuple(files), tuple(folders))

    def payloads(self, entries: Sequence[Entry]) -> Iterator[tuple[int, Payload]]:
        for position, entry in enumerate(entries):
            yield position, _read(self.path / entry.id)


def _read(path: Path) -> Payload:
    try:
        return read_image_file(path)
    except (OSError, BrokenImageError) as error:
        return error


class ZipSource(_TreeSource):
    """A .zip, read without unpacking."""

    def tree(self) -> Tree:
        with self._open() as archive:
            members = self._members(archive)
            folders = [member_path(name, self.where) for name in archive.namelist() if name.endswith("/")]
            return Tree(tuple(members), tuple(folders))

    def payloads(self, entries: Sequence[Entry]) -> Iterator[tuple[int, Payload]]:
        with self._open() as archive:
            members = self._members(archive)
            for position, entry in enumerate(entries):
                yield position, self._content(archive, members[entry.id])

    @staticmethod
    def _content(archive: zipfile.ZipFile, name: str) -> Payload:
        try:
            info = archive.getinfo(name)
            check_image_bytes(info.file_size)  # zipfile unpacks no more than this
            return archive.read(info)
        except (KeyError, BrokenImageError, *TORN_ARCHIVE) as error:
            return error

    def _open(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except TORN_ARCHIVE as error:
            raise _torn(self.where, error) from error

    def _members(self, archive: zipfile.ZipFile) -> dict[str, str]:
        """Path -> member name to read, which for a link is its target."""
        infos = archive.infolist()
        images = sum(info.file_size for info in infos if is_image(info.filename))  # only images are unpacked
        check_members(self.where, len(infos), images, self.path.stat().st_size, UNPACK_IT)
        members = {}
        for info in infos:
            path = member_path(info.filename, self.where)
            if info.is_dir():
                continue
            if info.flag_bits & 1:
                raise UserError(f"{self.where}: {printable(path)} is encrypted; give an archive without a password")
            members[path] = info.filename
            if stat.S_ISLNK(info.external_attr >> 16):
                members[path] = _link_target(path, self._target(archive, info), self.where)
        return members

    def _target(self, archive: zipfile.ZipFile, link: zipfile.ZipInfo) -> str:
        """Target of a link, which is the link's content."""
        if link.file_size > MAX_LINK_BYTES:
            raise UserError(f"{self.where}: its link {printable(link.filename)} is longer than a path; {UNPACK_IT}")
        try:
            return archive.read(link).decode(errors="replace")
        except TORN_ARCHIVE as error:
            raise _torn(self.where, error) from error


class _StrictTarInfo(tarfile.TarInfo):
    """A tar header that raises on damage, sparse members, and sizes that are negative or too large for metadata.

    `tarfile` treats a damaged or missing header as the end of the archive, and loops on negative sizes (CVE-2025-8194).
    """

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _StrictTarInfo:
        try:
            member = super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # end of the archive
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
        except (ValueError, OverflowError) as error:  # invalid number
            raise tarfile.ReadError(f"a damaged header: {error}") from error
        return cls._checked(member)  # an extended header may have changed its size

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictTarInfo:
        return cls._checked(super().frombuf(buf, encoding, errors))

    @staticmethod
    def _checked(member: _StrictTarInfo) -> _StrictTarInfo:
        if member.size < 0:
            raise tarfile.ReadError(f"a member of {member.size} bytes")
        if member.type in _TEXT_TYPES and member.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {member.size:,} bytes")
        if member.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("a sparse member")
        return member

    def _proc_gnusparse_10(self, *_: object) -> None:
        """Refuse the newer sparse format, whose map is not in the header."""
        raise tarfile.ReadError("a sparse member")


# Members with metadata of the next one: a long name or an extended header.
_TEXT_TYPES = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip


class TarSource(_TreeSource):
    """A .tar, compressed or not, read sequentially, since compressed ones have no random access."""

    def tree(self) -> Tree:
        files: list[str] = []
        folders: list[str] = []
        for path, member, _ in self._members():
            (folders if member.isdir() else files).append(path)
        return Tree(tuple(dict.fromkeys(files)), tuple(folders))

    def payloads(self, entries: Sequence[Entry]) -> Iterator[tuple[int, Payload]]:
        positions = {entry.id: position for position, entry in enumerate(entries)}
        for path, member, archive in self._members():
            if path in positions and not member.isdir():
                yield positions[path], self._content(archive, member)

    @staticmethod
    def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Payload:
        try:
            content = archive.extractfile(member)
            if content is None:
                return BrokenImageError("a link to something other than a file")
            read = content.read(MAX_IMAGE_BYTES + 1)
            check_image_bytes(len(read))
        except RecursionError:
            return BrokenImageError("a link to itself")
        except (KeyError, BrokenImageError, *TORN_ARCHIVE) as error:  # KeyError: a broken link
            return error
        return read

    def _members(self) -> Iterator[tuple[str, tarfile.TarInfo, tarfile.TarFile]]:
        packed, unpacked = self.path.stat().st_size, 0
        try:
            with tarfile.open(self.path, tarinfo=_StrictTarInfo) as archive:
                for count, member in enumerate(archive, 1):
                    unpacked += tarfile.BLOCKSIZE + member.size
                    check_members(self.where, count, unpacked, packed, UNPACK_IT)  # before seeking past it
                    path = member_path(member.name, self.where)
                    if member.issym():
                        _link_target(path, member.linkname, self.where)
                    elif member.islnk():
                        member_path(member.linkname, self.where)
                    if member.isfile() or member.isdir() or member.issym() or member.islnk():
                        yield path, member, archive
        except TORN_ARCHIVE as error:
            raise _torn(self.where, error) from error


def _link_target(path: str, target: str, where: str) -> str:
    """Path of a symbolic link's target.

    Raises:
        UserError: it is outside the archive.
    """
    return member_path(posixpath.join(posixpath.dirname(path), target.replace("\\", "/")), where)


def _torn(where: str, error: Exception) -> UserError:
    return UserError(f"{where}: the archive is damaged or cut short ({one_line(error)}); copy or download it again")


class CsvSource(_PathSource):
    """A table with paths below its own folder, a class for each, and optionally a split."""

    PATH_COLUMNS = ("path", "file", "filename", "image")
    LABEL_COLUMNS = ("label", "class", "target")

    def stamp(self) -> str:
        digest = hashlib.sha256()
        for entry in self.unlabelled():
            digest.update(file_stamp(self.path.parent / entry.id).encode(errors="surrogateescape"))
        return f"{super().stamp()}|{digest.hexdigest()}"

    def labelled(self) -> list[Entry]:
        rows = self._rows()
        label = self._column(rows, self.LABEL_COLUMNS)
        paths = self._paths(rows)
        entries = []
        for (number, row), path in zip(rows, paths, strict=True):
            if not row[label]:
                raise UserError(f"{self.where}:{number}: no {label}; fill it in or remove the row")
            split = row.get("split", "").casefold()
            if split and split not in SPLIT_NAMES:
                raise UserError(f"{self.where}:{number}: split is {row['split']!r}; write train, val or test")
            entries.append(Entry(path, label=row[label], test=split in TEST_NAMES))
        from_val = sum(row.get("split", "").casefold() in VAL_NAMES for _, row in rows)
        if from_val:
            logger.warning("%s: the %d rows of its split val join the training pool; validation is drawn from both",
                           self.where, from_val)  # fmt: skip
        if all(entry.test for entry in entries):
            raise UserError(f"{self.where}: every row is in the split test; mark the others train")
        return entries

    def unlabelled(self) -> list[Entry]:
        return [Entry(path) for path in self._paths(self._rows())]

    def payloads(self, entries: Sequence[Entry]) -> Iterator[tuple[int, Payload]]:
        for position, entry in enumerate(entries):
            yield position, _read(self.path.parent / entry.id)

    def _rows(self) -> list[tuple[int, dict[str, str]]]:
        """Rows with line numbers; column names in lower case."""
        try:
            with self.path.open(newline="", encoding="utf-8-sig") as lines:
                reader = csv.reader(lines)
                header = [name.strip().casefold() for name in next(reader, [])]
                rows = []
                for cells in reader:
                    if not any(cells):
                        continue
                    if len(cells) != len(header):
                        raise UserError(
                            f"{self.where}:{reader.line_num}: {len(cells)} columns, and the header names {len(header)}"
                        )
                    rows.append((reader.line_num, dict(zip(header, map(str.strip, cells), strict=True))))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{self.where}: cannot be read as CSV in UTF-8 ({error})") from error
        if not rows:
            raise UserError(f"{self.where}: it has no rows; expected a header such as path,label and one row per image")
        return rows

    def _paths(self, rows: list[tuple[int, dict[str, str]]]) -> list[str]:
        """Path of each row.

        Raises:
            UserError: a path is outside the CSV's folder, so that a downloaded table cannot read other files.
        """
        column = self._column(rows, self.PATH_COLUMNS)
        folder = os.path.abspath(self.path.parent)  # noqa: PTH100 - as text, links left as they are
        inside = os.path.join(folder, "")  # noqa: PTH118
        paths = [row[column] for _, row in rows]
        for (number, _), path in zip(rows, paths, strict=True):
            if "\0" in path:
                raise UserError(f"{self.where}:{number}: {path!r} is not a path; fix it or remove the row")
            if not os.path.normpath(os.path.join(folder, path)).startswith(inside):  # noqa: PTH118
                raise UserError(
                    f"{self.where}:{number}: {printable(path)} is outside {folder}; "
                    "put the CSV into a folder above all its images, and give paths from there"
                )
        return paths

    def _column(self, rows: list[tuple[int, dict[str, str]]], names: tuple[str, ...]) -> str:
        header = rows[0][1]
        for name in names:
            if name in header:
                return name
        raise UserError(f"{self.where}: no column {' or '.join(names)}; its header is {','.join(header)}")
