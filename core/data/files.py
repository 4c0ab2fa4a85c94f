"""Images in folders and archives.

Archives are read without unpacking. Members and links that point outside an archive are refused. Unpacked sizes are
limited (`core.data.bounds`). Links in the user's own folders are followed.
"""

from __future__ import annotations

import errno
import hashlib
import lzma
import os
import posixpath
import stat
import struct
import tarfile
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

from core.data.bounds import (
    MAX_HEADER_BYTES,
    MAX_IMAGE_BYTES,
    MAX_LINK_BYTES,
    MAX_MEMBERS,
    check_image_bytes,
    check_members,
    check_table_bytes,
    read_image_file,
)
from core.data.choice import arrange_tree
from core.data.decode import BrokenImageError
from core.data.layout import TABLE_SUFFIXES, Arrangement, Entry, Tree, is_hidden, is_image, left_out_of, member_path
from core.data.names import listed, natural_key
from core.data.sniffing import HEAD_BYTES, looks_like_image
from core.data.source import Content, Payload, Reading, Source, file_stamp, one_line, plain_name
from core.errors import UserError
from core.text import printable

# Raised for damaged archives: RecursionError if headers of a .tar are chained endlessly, NotImplementedError for
# unknown compression.
TORN_ARCHIVE = (
    tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError, RecursionError,
    NotImplementedError,
)  # fmt: skip
UNPACK_IT = "if you trust it, unpack it and give the folder"


class PathSource(Source):
    """A source at a path."""

    def __init__(self, path: Path, reading: Reading) -> None:
        super().__init__(plain_name(path), str(path))
        self.path = path
        self.reading = reading

    def stamp(self) -> str:
        return file_stamp(self.path)


class _TreeSource(PathSource):
    """A folder or archive of images, with a folder per class or a table."""

    @cached_property
    def tree(self) -> Tree:
        """All files and folders, listed once."""
        tree = self._list()
        if len(tree.images) > MAX_MEMBERS:
            raise UserError(f"{self.where}: more than {MAX_MEMBERS:,} images; give fewer at a time")
        return tree

    @abstractmethod
    def _list(self) -> Tree: ...

    @abstractmethod
    def read_table(self, path: str) -> bytes:
        """Read a file that is not an image."""

    def arranged(self) -> Arrangement:
        broken = self._unreadable()
        return arrange_tree(self.tree, self.read_table, self.where, self.reading).with_broken(broken)

    def unlabelled(self) -> Arrangement:
        broken = self._unreadable()
        entries = [Entry(file) for file in sorted(self.tree.images, key=natural_key)]
        return Arrangement(entries, left_out=left_out_of(self.tree), broken=broken)

    def _unreadable(self) -> tuple[str, ...]:
        """Paths that cannot be listed.

        Raises:
            UserError: there are some, and they may not be left out.
        """
        unreadable = self.tree.unreadable
        if unreadable and not self.reading.skip_broken:
            named = listed([f"{path} ({reason})" for path, reason in sorted(unreadable.items())])
            raise UserError(
                f"{self.where}: {len(unreadable):,} folders or links cannot be read: {named}; "
                "fix them, or skip them with --skip-broken"
            )
        return tuple(sorted(unreadable))


class FolderSource(_TreeSource):
    """A folder on disk, or a single image in it."""

    def __init__(self, path: Path, reading: Reading, only: str | None = None) -> None:
        super().__init__(path, reading)
        self._only = only
        self._states: list[tuple[str, int, int]] = []

    def stamp(self) -> str:
        if self._only is not None:
            return file_stamp(self.path / self._only)
        assert self.tree is not None, "lists the states"
        listing = hashlib.sha256()
        for file, size, changed in sorted(self._states):
            listing.update(f"{file}|{size}|{changed}\n".encode(errors="surrogateescape"))
        return f"{self.path.resolve()}|{listing.hexdigest()}"

    def _list(self) -> Tree:
        if self._only is not None:
            return Tree((self._only,))
        scan = _Scan(self.path)
        self._states = scan.states
        return Tree(
            tuple(sorted(scan.images)), tuple(scan.folders), tuple(sorted(scan.others)), scan.hidden, scan.unreadable
        )

    def read_table(self, path: str) -> bytes:
        try:
            check_table_bytes(f"{self.where}/{path}", (self.path / path).stat().st_size)
            return (self.path / path).read_bytes()
        except OSError as error:
            raise UserError(f"{self.where}: its table {printable(path)} cannot be read ({_reason(error)})") from error

    def payloads(self, entries: Sequence[Entry]) -> Iterator[tuple[int, Payload]]:
        for position, entry in enumerate(entries):
            yield position, partial(read_payload, f"{self.path}/{entry.id}")


class _Scan:
    """Lists a folder in one pass. Links are followed, except to a folder around them."""

    def __init__(self, root: Path) -> None:
        self.root = os.fspath(root)
        self.images: list[str] = []
        self.folders: list[str] = []
        self.others: list[str] = []
        self.hidden = 0
        self.unreadable: dict[str, str] = {}
        self.states: list[tuple[str, int, int]] = []  # path, size and time of change of images and tables
        self._folder("", frozenset())

    def _folder(self, prefix: str, around: frozenset[tuple[int, int]]) -> None:
        waiting = [(prefix, around)]
        while waiting:
            prefix, around = waiting.pop()
            try:
                status = os.stat(f"{self.root}/{prefix}")  # noqa: PTH116 - a Path each costs more than the call
                here = (status.st_dev, status.st_ino)
                if here in around:
                    self.unreadable[prefix.rstrip("/")] = "a link to a folder around it"
                    continue
                with os.scandir(f"{self.root}/{prefix}") as entries:
                    waiting += [(folder, around | {here}) for folder in self._entries(prefix, entries)]
            except OSError as error:
                if not prefix:
                    raise UserError(f"{self.root}: cannot be read ({_reason(error)})") from error
                self.unreadable[prefix.rstrip("/")] = _reason(error)

    def _entries(self, prefix: str, entries: Iterator[os.DirEntry[str]]) -> list[str]:
        """Sort the entries of a folder, and return the folders in it."""
        inside = []
        for entry in entries:
            path = prefix + entry.name
            if is_hidden(entry.name):
                self.hidden += 1
                continue
            try:
                if entry.is_dir():
                    self.folders.append(path)
                    inside.append(f"{path}/")
                else:
                    self._file(path, entry)
            except OSError as error:
                if is_image(entry.name):
                    self.images.append(path)  # reading it will fail, and count it
                else:
                    dangling = entry.is_symlink() and error.errno == errno.ENOENT
                    self.unreadable[path] = "a link to nothing" if dangling else _reason(error)
        return inside

    def _file(self, path: str, entry: os.DirEntry[str]) -> None:
        known, status = is_image(entry.name), entry.stat()
        if known or ("." not in entry.name and stat.S_ISREG(status.st_mode) and self._sniff(path)):
            self.images.append(path)
        else:
            self.others.append(path)
            if not entry.name.lower().endswith(TABLE_SUFFIXES):
                return
        self.states.append((path, status.st_size, status.st_mtime_ns))

    def _sniff(self, path: str) -> bool:
        with open(f"{self.root}/{path}", "rb") as file:  # noqa: PTH123
            return looks_like_image(file.read(HEAD_BYTES))


def _reason(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "a link to itself"
    return (error.strerror or type(error).__name__).lower()


def read_payload(path: str) -> Content:
    """Read an image file, or return the error."""
    try:
        return read_image_file(path)
    except (OSError, BrokenImageError) as error:
        return error


class ZipSource(_TreeSource):
    """A .zip, read without unpacking."""

    def _list(self) -> Tree:
        images, others, hidden = [], [], 0
        for path, name in self._members.items():
            if is_hidden(path):
                hidden += 1
            elif is_image(path) or ("." not in posixpath.basename(path) and self._sniff(name)):
                images.append(path)
            else:
                others.append(path)
        folders = [member_path(name, self.where) for name in self._archive.namelist() if name.endswith("/")]
        return Tree(tuple(sorted(images)), tuple(folders), tuple(sorted(others)), hidden)

    def read_table(self, path: str) -> bytes:
        try:
            info = self._archive.getinfo(self._members[path])
            check_table_bytes(f"{self.where}: {path}", info.file_size)
            return self._archive.read(info)
        except (KeyError, *TORN_ARCHIVE) as error:
            raise _torn(self.where, error) from error

    def payloads(self, entries: Sequence[Entry]) -> Iterator[tuple[int, Payload]]:
        for position, entry in enumerate(entries):
            yield position, self._payload(self._members[entry.id])

    def _payload(self, name: str) -> Payload:
        try:
            info = self._archive.getinfo(name)
            check_image_bytes(info.file_size)  # no more than this is unpacked
            if not hasattr(os, "pread") or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                return self._archive.read(info)
        except (KeyError, BrokenImageError, *TORN_ARCHIVE) as error:
            return error
        packed = info.compress_type == zipfile.ZIP_DEFLATED
        where = (info.header_offset, info.compress_size)
        return partial(_read_member, str(self.path), where, info.file_size, info.CRC, packed=packed)

    def _sniff(self, name: str) -> bool:
        try:
            with self._archive.open(name) as member:
                return looks_like_image(member.read(HEAD_BYTES))
        except (KeyError, *TORN_ARCHIVE):
            return False

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        """The archive, whose list of members is parsed once; open as long as the source exists."""
        try:
            return zipfile.ZipFile(self.path)
        except TORN_ARCHIVE as error:
            raise _torn(self.where, error) from error

    @cached_property
    def _members(self) -> dict[str, str]:
        """Path -> member name to read, which for a link is its target."""
        infos = self._archive.infolist()
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
                members[path] = _link_target(path, self._target(info), self.where)
        return members

    def _target(self, link: zipfile.ZipInfo) -> str:
        """Target of a link, which is the link's content."""
        if link.file_size > MAX_LINK_BYTES:
            raise UserError(f"{self.where}: its link {printable(link.filename)} is longer than a path; {UNPACK_IT}")
        try:
            return self._archive.read(link).decode(errors="replace")
        except TORN_ARCHIVE as error:
            raise _torn(self.where, error) from error


# Zip format (PKWARE's APPNOTE, 4.3.7): bytes of a local header before the name, whose length is at 26 and that of the
# extra field at 28.
_LOCAL_HEADER, _LENGTHS = 30, struct.Struct("<26xHH")


def _read_member(path: str, where: tuple[int, int], size: int, checksum: int, *, packed: bool) -> Content:
    """Read a member without `zipfile`'s objects, which take longer than decoding a small image, or return the error.

    Args:
        path: Of the archive.
        where: Start of the member's header, and bytes of its content there.
        size: Bytes of its content, unpacked.
        checksum: CRC-32 of it.
        packed: Whether it is compressed, by deflate.
    """
    start, length = where
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            header = os.pread(file, _LOCAL_HEADER, start)
            if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\3\4"):
                return zipfile.BadZipFile("Bad magic number for file header")
            start += _LOCAL_HEADER + sum(_LENGTHS.unpack(header))
            content = os.pread(file, min(length, os.fstat(file).st_size), start)
        finally:
            os.close(file)
        if packed:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
    except (OSError, zlib.error) as error:
        return error
    if len(content) != size or zlib.crc32(content) != checksum:
        return zipfile.BadZipFile("Bad CRC-32")
    return content


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

    def _list(self) -> Tree:
        images: set[str] = set()
        others: set[str] = set()
        hidden: set[str] = set()
        folders: list[str] = []
        for path, member, archive in self._members():
            if member.isdir():
                folders.append(path)
            elif is_hidden(path):
                hidden.add(path)
            elif is_image(path) or ("." not in posixpath.basename(path) and self._sniff(archive, member)):
                images.add(path)
            else:
                others.add(path)
        return Tree(tuple(sorted(images)), tuple(folders), tuple(sorted(others)), len(hidden))

    def read_table(self, path: str) -> bytes:
        content = b""
        for name, member, archive in self._members():
            if name == path and not member.isdir():
                check_table_bytes(f"{self.where}: {path}", member.size)
                found = self._content(archive, member)
                if not isinstance(found, bytes):
                    raise UserError(f"{self.where}: its table {printable(path)} cannot be read ({found})")
                content = found
        return content

    @staticmethod
    def _sniff(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
        try:
            content = archive.extractfile(member)
            return content is not None and looks_like_image(content.read(HEAD_BYTES))
        except (KeyError, *TORN_ARCHIVE):
            return False

    def payloads(self, entries: Sequence[Entry]) -> Iterator[tuple[int, Payload]]:
        positions = {entry.id: position for position, entry in enumerate(entries)}
        for path, member, archive in self._members():
            if path in positions and not member.isdir():
                yield positions[path], self._content(archive, member)

    @staticmethod
    def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Content:
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
        unpacked = 0
        try:
            packed = self.path.stat().st_size
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
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"{where}: cannot be read ({_reason(error)})")
    return UserError(f"{where}: the archive is damaged or cut short ({one_line(error)}); copy or download it again")
