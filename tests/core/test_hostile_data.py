"""Malicious data: bombs, links, devices, paths outside the data, and pickles are refused with one-line errors."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import pickle
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core.data import bounds, files
from core.data.decode import MAX_PIXELS, BrokenImageError, decode
from core.errors import UserError
from tests.core.test_data import encoded, load, noise, photo, tree, write_folder, write_tar, write_zip

CHUNK = 1 << 26
"""Zeros of a bomb, compressed once and written repeatedly."""
ENOUGH = bounds.HARMLESS_BYTES // CHUNK + 4


def refusal(path: Path, **options: Any) -> str:
    """Return the one-line error of a set."""
    with pytest.raises(UserError) as raised:
        load(path, **options)
    assert str(raised.value).isprintable()  # no control characters
    return str(raised.value)


class Evil:
    """Creates a file when unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self.proof,)


@pytest.fixture
def proof(tmp_path: Path) -> Iterable[Path]:
    """The file created by malicious code."""
    yield tmp_path / "it ran"
    assert not (tmp_path / "it ran").exists()


def test_the_malicious_pickle_runs_code(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "it ran")))
    assert (tmp_path / "it ran").exists()


# Archives


def write_raw_zip(path: Path, members: Iterable[tuple[str, bytes, int, int]], attributes: int = 0) -> Path:
    """Write a .zip of compressed members: (name, deflated, CRC, bytes)."""
    content, directory, count = b"", b"", 0
    for name, deflated, checksum, size in members:
        common = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0x21, checksum, len(deflated), size, len(name), 0)
        place = struct.pack("<HHHII", 0, 0, 0, attributes, len(content))
        directory += b"PK\x01\x02" + struct.pack("<H", 3 << 8 | 20) + common + place + name.encode()
        content += b"PK\x03\x04" + common + name.encode() + deflated
        count += 1
    end = struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), len(content), 0)
    path.write_bytes(content + directory + b"PK\x05\x06" + end)
    return path


def deflated_zeros() -> tuple[bytes, int, int]:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(bytes(CHUNK)) + packer.flush(), zlib.crc32(bytes(CHUNK)), CHUNK


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


class TestBombs:
    def test_a_zip(self, tmp_path: Path) -> None:
        zeros = deflated_zeros()
        path = write_raw_zip(tmp_path / "set.zip", [(f"cat/{i}.png", *zeros) for i in range(ENOUGH)])
        assert "set.zip: a decompression bomb: its 1.3 MB unpack to 1.3 GB or more; if you trust it" in refusal(path)

    @pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
    def test_a_tar_is_not_read_to_its_end(
        self, tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
    ) -> None:
        # A thousand times the limit: unpacking would take an hour.
        path = tmp_path / f"set.tar{suffix}"
        path.write_bytes(compress(header("cat/0.png", 1000 * ENOUGH * CHUNK)) + compress(bytes(CHUNK)) * 3)
        assert "a decompression bomb" in refusal(path)

    def test_a_compressed_npz(self, tmp_path: Path) -> None:
        zeros = deflated_zeros()
        path = write_raw_zip(tmp_path / "set.npz", [(f"x{i}.npy", *zeros) for i in range(ENOUGH)])
        assert "a decompression bomb" in refusal(path)

    def test_a_lone_image_that_is_too_large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bounds, "MAX_IMAGE_BYTES", 100_000)
        monkeypatch.setattr("core.data.files.MAX_IMAGE_BYTES", 100_000)
        files = tree() | {"train/cat/big.png": bytes(100_001)}
        for path in (
            write_zip(tmp_path / "set.zip", files),
            write_tar(tmp_path / "set.tar.gz", files),
            write_folder(tmp_path / "set", files),
        ):
            assert "train/cat/big.png (100.0 kB, and an image has 100.0 kB at most)" in refusal(path)

    def test_a_file_with_holes(self, tmp_path: Path) -> None:
        path = write_folder(tmp_path / "set", tree())
        with (path / "train/cat/big.png").open("wb") as file:
            file.truncate(1 << 42)
        assert "big.png (4398.0 GB, and an image has 268.4 MB at most)" in refusal(path)

    def test_too_many_members(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bounds, "MAX_MEMBERS", 10)
        for path in (write_zip(tmp_path / "set.zip", tree()), write_tar(tmp_path / "set.tar", tree())):
            assert "more than 10 members" in refusal(path)

    def test_a_well_compressed_set_is_accepted(self, tmp_path: Path) -> None:
        blank = {f"{'ab'[i % 2]}/{i}.bmp": encoded(np.full((800, 800), i, np.uint8), "BMP") for i in range(18)}
        path = tmp_path / "set.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in blank.items():
                archive.writestr(name, content)
        assert sum(map(len, blank.values())) > bounds.MAX_RATIO * path.stat().st_size  # a small file
        assert len(load(path).classes) == 2


class TestArchives:
    def test_a_long_link_in_a_zip_is_refused(self, tmp_path: Path) -> None:
        zeros = deflated_zeros()
        path = write_raw_zip(tmp_path / "set.zip", [("cat/link.png", *zeros)], attributes=0o120777 << 16)
        assert "its link cat/link.png is longer than a path" in refusal(path)

    @pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
    def test_a_long_header_in_a_tar_is_refused(self, tmp_path: Path, kind: bytes) -> None:
        path = tmp_path / "set.tar.gz"
        path.write_bytes(gzip.compress(header("x", CHUNK, kind)) + gzip.compress(bytes(CHUNK)))
        tracemalloc.start()
        try:
            assert "a header of 67,108,864 bytes" in refusal(path)
            assert tracemalloc.get_traced_memory()[1] < CHUNK
        finally:
            tracemalloc.stop()

    def test_a_negative_size_is_refused(self, tmp_path: Path) -> None:
        member = tarfile.TarInfo("cat/a.png")
        member.pax_headers = {"size": "-1024"}
        path = tmp_path / "set.tar"
        path.write_bytes(member.tobuf(tarfile.PAX_FORMAT) + bytes(1 << 14))
        assert "a member of -1024 bytes" in refusal(path)

    def test_chained_headers_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "set.tar"
        path.write_bytes((header("././@LongLink", 5, tarfile.GNUTYPE_LONGNAME) + b"a".ljust(512, b"\0")) * 5000)
        assert "damaged or cut short" in refusal(path)

    @pytest.mark.parametrize("form", ["old", "new"])
    def test_sparse_members_are_refused(self, tmp_path: Path, form: str) -> None:
        member = tarfile.TarInfo("cat/a.png")
        if form == "old":
            member.type = tarfile.GNUTYPE_SPARSE
        else:
            member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "8"}
        path = tmp_path / "set.tar"
        path.write_bytes(member.tobuf(tarfile.PAX_FORMAT) + b"9" * (1 << 14))
        assert "a sparse member" in refusal(path)

    @pytest.mark.parametrize(
        ("target", "kind", "reason"),
        [
            ("link.png", None, "a link to itself"),
            ("folder", tarfile.DIRTYPE, "a link to something other than a file"),
            ("zero", tarfile.CHRTYPE, "a link to something other than a file"),
        ],
    )
    def test_a_broken_link_is_one_broken_image(
        self, tmp_path: Path, target: str, kind: bytes | None, reason: str
    ) -> None:
        path = write_tar(tmp_path / "set.tar", tree())
        with tarfile.open(path, "a") as archive:
            if kind is not None:
                other = tarfile.TarInfo(f"train/cat/{target}")
                other.type = kind
                archive.addfile(other)
            link = tarfile.TarInfo("train/cat/link.png")
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)
        assert f"train/cat/link.png ({reason})" in refusal(path)

    def test_invalid_archives_are_one_line_errors(self, tmp_path: Path) -> None:
        (tmp_path / "set.tar").write_bytes(b"no archive" * 1000)
        assert "damaged or cut short" in refusal(tmp_path / "set.tar")

    def test_member_names_are_escaped(self, tmp_path: Path) -> None:
        path = write_zip(tmp_path / "set.zip", tree() | {"train/cat/a\nhpo: all is well\x1b[2J.png": b"no image"})
        assert r"train/cat/a\nhpo: all is well\x1b[2J.png (not an image)" in refusal(path)


# Folders and tables


def test_pipes_and_devices_are_broken_images(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "set", tree())
    os.mkfifo(path / "train/cat/pipe.png")
    (path / "train/cat/zero.png").symlink_to("/dev/zero")
    told = refusal(path)
    assert "2 of 28 images cannot be read" in told
    assert "train/cat/pipe.png (not a file), train/cat/zero.png (not a file)" in told


class TestFoldersThatCannotBeRead:
    """Each is one line, and counted with `--skip-broken`; never a traceback, and never skipped silently."""

    @staticmethod
    def told(root: Path) -> str:
        """The error; the set without the unreadable part is read on request."""
        loaded = load(root, skip_broken=True)
        assert len(loaded.report.broken) == 1
        assert loaded.classes == ("cat", "dog")
        return refusal(root)

    @pytest.mark.parametrize("target", ["nowhere", "link", "loop"])
    def test_a_link_to_nothing_or_to_itself(self, tmp_path: Path, target: str) -> None:
        root = write_folder(tmp_path / "set", tree())
        (root / "train" / "bird").symlink_to({"link": "bird", "loop": "../train/bird"}.get(target, target))
        assert "1 folders or links cannot be read: train/bird (a link to" in self.told(root)

    def test_a_link_to_a_folder_around_it(self, tmp_path: Path) -> None:
        root = write_folder(tmp_path / "set", tree())
        (root / "train" / "cat" / "again").symlink_to(root, target_is_directory=True)
        assert "train/cat/again (a link to a folder around it); fix them" in self.told(root)

    def test_links_that_lead_to_each_other(self, tmp_path: Path) -> None:
        root = write_folder(tmp_path / "set", tree())
        (root / "train" / "cat" / "dog").symlink_to(root / "train" / "dog", target_is_directory=True)
        (root / "train" / "dog" / "cat").symlink_to(root / "train" / "cat", target_is_directory=True)
        assert "2 folders or links cannot be read: train/cat/dog/cat (a link to a folder around it)" in refusal(root)

    @pytest.mark.parametrize("name", ["train/owl", "train/cat/more"])
    def test_a_folder_without_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        root = write_folder(tmp_path / "set", tree())
        (root / name).mkdir()
        self.forbid(monkeypatch, root / name)
        assert f"{name} (permission denied)" in self.told(root)

    def test_the_whole_folder_without_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = write_folder(tmp_path / "set", tree())
        self.forbid(monkeypatch, root)
        for skip_broken in (False, True):
            assert "set: cannot be read (permission denied)" in refusal(root, skip_broken=skip_broken)

    @staticmethod
    def forbid(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        """Refuse to list the folder, as the system does for users other than root, who runs the tests."""
        scandir = os.scandir

        def refuse(path: Any) -> Any:
            if not isinstance(path, int) and Path(path) == folder:
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr("core.data.files.os.scandir", refuse)

    @pytest.mark.parametrize("cached", [False, True])
    def test_files_that_are_deleted_meanwhile(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
    ) -> None:
        root = write_folder(tmp_path / "set", tree())
        read = files.read_image_file

        def delete(path: str) -> bytes:
            for name in ("07.png", "08.png"):
                (root / "train/dog" / name).unlink(missing_ok=True)
            return read(path)

        monkeypatch.setattr(files, "read_image_file", delete)
        options = {"cache_dir": tmp_path / "cache"} if cached else {}
        told = refusal(root, **options)
        assert "2 of 26 images cannot be read: train/dog/07.png (no such file), train/dog/08.png" in told
        for name in ("07.png", "08.png"):
            (root / "train/dog" / name).write_bytes(tree()[f"train/dog/{name}"])
        assert len(load(root, skip_broken=True, **options).report.broken) == 2

    def test_a_link_to_an_image_that_is_gone(self, tmp_path: Path) -> None:
        root = write_folder(tmp_path / "set", tree())
        (root / "train" / "cat" / "gone.png").symlink_to("nowhere.png")
        assert "1 of 27 images cannot be read: train/cat/gone.png (no such file)" in self.told(root)

    @pytest.mark.parametrize("name", ["set.zip", "set.csv", "set.tar", "set.npz", "set"])
    def test_a_path_without_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        (tmp_path / name).write_bytes(b"x")

        def refuse(self: Path, **options: Any) -> None:
            raise PermissionError(13, "Permission denied", self)

        monkeypatch.setattr(Path, "stat", refuse)
        assert refusal(tmp_path / name).endswith(f"{name}: cannot be read (Permission denied)")

    @pytest.mark.parametrize("name", ["set.zip", "set.tar"])
    def test_an_archive_that_may_not_be_opened(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        path = (write_zip if name.endswith("zip") else write_tar)(tmp_path / name, tree())

        def refuse(*args: Any, **options: Any) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(files.zipfile, "ZipFile", refuse)
        monkeypatch.setattr(files.tarfile, "open", refuse)
        assert refusal(path).endswith(f"{name}: cannot be read (permission denied)")


def test_a_csv_of_a_million_missing_files_is_refused_in_seconds(tmp_path: Path) -> None:
    rows = "\n".join(f"images/{i:07d}.png,{i % 2}" for i in range(1_000_000))
    (tmp_path / "set.csv").write_text(f"path,label\n{rows}\n")
    started = time.perf_counter()
    told = refusal(tmp_path / "set.csv")
    assert time.perf_counter() - started < 60
    assert "20 of the first 20 (of 1,000,000) rows name files that do not exist: images/0000000.png, " in told
    assert len(told) < 500


class TestTheRowsOfACsv:
    @pytest.mark.parametrize(
        "path", ["../secret.png", "/etc/hostname", "cat/../../secret.png", "..", ".", "..\\secret.png"]
    )
    def test_cannot_point_outside_its_folder(self, tmp_path: Path, path: str) -> None:
        (tmp_path / "secret.png").write_bytes(photo(0))
        folder = write_folder(tmp_path / "set", tree(test=0))
        rows = [f"{name},{name[:3]}" for name in tree(test=0)]
        (folder / "set.csv").write_text("\n".join(["path,label", *rows, f"{path},cat"]), encoding="utf-8")
        told = refusal(folder / "set.csv")
        assert f"set.csv:{len(rows) + 2}: " in told
        assert "is outside" in told

    def test_may_be_absolute_within_it(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "set", tree(test=0))
        for name, start in (("relative", ""), ("absolute", f"{folder}/")):
            rows = [f"{start}{file},{file[:3]}" for file in tree(test=0)]
            (folder / f"{name}.csv").write_text("\n".join(["path,label", *rows]), encoding="utf-8")
        assert load(folder / "absolute.csv").fingerprint == load(folder / "relative.csv").fingerprint

    def test_invalid_paths_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "set.csv").write_text("path,label\na\0.png,x\n", encoding="utf-8")
        assert r"set.csv:2: 'a\x00.png' is not a path" in refusal(tmp_path / "set.csv")


# Images


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A black image of one bit per pixel."""
    size = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(it ran) (w) file\n"


class TestImages:
    @pytest.mark.parametrize("side", [9460, 20_000])  # Pillow warns about the first and refuses the second
    @pytest.mark.parametrize("size", [None, (8, 8)])
    def test_a_decompression_bomb_is_a_broken_image(
        self, tmp_path: Path, side: int, size: tuple[int, int] | None
    ) -> None:
        content = png(side, side)
        assert len(content) < MAX_PIXELS / 1000
        path = write_folder(tmp_path / "set", tree() | {"train/cat/bomb.png": content})
        config = {} if size is None else {"image_size": 8}
        told = refusal(path, config=config)
        assert "train/cat/bomb.png (a decompression bomb: it has more than 89,478,485 pixels)" in told
        assert len(load(path, config, skip_broken=True).report.broken) == 1

    @pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
    def test_a_text_of_megabytes_is_broken(self, kind: bytes) -> None:
        text = zlib.compress(bytes(1 << 26))
        packed = {b"zTXt": b"a\0\0" + text, b"iTXt": b"a\0\1\0\0\0" + text}[kind]
        with pytest.raises(BrokenImageError, match="Decompressed data too large"):
            decode(png(8, 8, chunk(kind, packed)), None)

    @pytest.mark.parametrize(
        "content", [POSTSCRIPT, encoded(noise(0, 8, 8, 3), "ICO"), encoded(noise(0, 8, 8, 3), "PCX")]
    )
    def test_only_supported_formats_are_opened(self, content: bytes) -> None:
        with pytest.raises(BrokenImageError, match=r"^not an image$"):
            decode(content, None)

    @pytest.mark.parametrize("suffix", ["jpeg", "png", "bmp", "gif", "tiff", "webp", "ppm", "jpeg2000", "avif"])
    def test_formats_are_detected_by_content(self, suffix: str) -> None:
        assert decode(encoded(noise(0, 16, 16, 3), suffix.upper()), None).pixels.shape == (3, 16, 16)

    def test_a_large_image_needs_little_extra_memory(self) -> None:
        pixels = np.zeros((4000, 4000), np.uint8)
        pixels[0, 0] = 255
        tracemalloc.start()
        try:
            decoded = decode(pixels, None)
            assert tracemalloc.get_traced_memory()[1] < 2 * pixels.nbytes
        finally:
            tracemalloc.stop()
        assert decoded.moments.tolist() == [[255, 255**2]]

    def test_moments_are_exact_over_several_parts(self) -> None:
        pixels = noise(0, 1100, 1000, 3)
        wide = pixels.reshape(-1, 3).astype(object)
        expected = [[int(channel.sum()), int((channel * channel).sum())] for channel in wide.T]
        assert decode(pixels, None).moments.tolist() == expected


# Arrays and caches


def npy(descr: str, shape: str) -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (npy("|u1", "(1000000000, 1000, 1000)"), "its arrays do not fit the memory"),
        (npy("|u1", "(1000, 8, 8)"), "cannot be read as an .npz of plain arrays"),
        (npy("|u1", "(" * 40), "cannot be read as an .npz of plain arrays"),
        (
            npy("|u1", "(True, 8, 8)") + bytes(64),
            "cannot be read as an .npz of plain arrays (x: an integer is required",
        ),
        (npy("|u1", "(False, 8, 8)"), "cannot be read as an .npz of plain arrays (x: an integer"),
        (npy("|u1", f"({10**30}, 8, 8)"), "cannot be read as an .npz of plain arrays (x: "),
        (npy("|O", "(2,)") + pickle.dumps([1, 2]), "cannot be read as an .npz of plain arrays (Object arrays"),
    ],
    ids=["huge", "short", "no header", "boolean", "false", "too long", "objects"],
)
def test_a_hostile_array_in_an_npz(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, y=np.arange(10) % 2)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x.npy", content)
    assert reason in refusal(path)


def test_an_npz_with_code_is_refused_before_it_runs(tmp_path: Path, proof: Path) -> None:
    objects = np.array([Evil(proof)] * 10, dtype=object)
    np.savez(tmp_path / "objects.npz", allow_pickle=True, x=objects, y=np.arange(10) % 2)
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Evil(proof)))
    with (tmp_path / "npy.npz").open("wb") as file:
        np.save(file, objects, allow_pickle=True)
    for name in ("objects", "pickle", "npy"):
        assert "cannot be read as an .npz of plain arrays" in refusal(tmp_path / f"{name}.npz")


class TestCaches:
    ARRAYS = ("pool_images", "pool_labels", "pool_moments", "pool_twins")

    @staticmethod
    def changed(tmp_path: Path, change: Callable[[Path], None]) -> str:
        """Return the error of a modified cache with a matching description."""
        path, cache = write_folder(tmp_path / "set", tree()), tmp_path / "cache"
        load(path, cache_dir=cache)
        (folder,) = cache.iterdir()
        change(folder)
        meta = json.loads((folder / "meta.json").read_text())
        meta["files"] = {file.name: file.stat().st_size for file in folder.iterdir() if file.name != "meta.json"}
        (folder / "meta.json").write_text(json.dumps(meta))
        told = refusal(path, cache_dir=cache)
        assert told.startswith(f"{folder}: the cache of decoded images is damaged (")
        assert told.endswith("); delete that folder and run again")
        return told

    @pytest.mark.parametrize("name", ARRAYS)
    @pytest.mark.parametrize("how", ["a pickle", "objects"])
    def test_with_code_are_refused_before_it_runs(self, tmp_path: Path, proof: Path, name: str, how: str) -> None:
        def change(folder: Path) -> None:
            if how == "a pickle":
                (folder / f"{name}.npy").write_bytes(pickle.dumps(Evil(proof)))
            else:
                np.save(folder / f"{name}.npy", np.array([Evil(proof)], dtype=object), allow_pickle=True)

        assert f"{name}.npy is not an array of plain numbers" in self.changed(tmp_path, change)

    @pytest.mark.parametrize("name", ARRAYS)
    @pytest.mark.parametrize("content", [npy("<i8", "(1000000000000,)"), npy("<f8", "(0,)")], ids=["huge", "empty"])
    def test_with_other_arrays_are_refused(self, tmp_path: Path, name: str, content: bytes) -> None:
        def change(folder: Path) -> None:
            (folder / f"{name}.npy").write_bytes(content)

        assert f"{name}.npy" in self.changed(tmp_path, change)

    @pytest.mark.parametrize("ids", ["{}", "[]", "[" * 100_000, "no JSON"], ids=["no list", "short", "deep", "text"])
    def test_with_other_names_are_refused(self, tmp_path: Path, ids: str) -> None:
        def change(folder: Path) -> None:
            (folder / "pool_ids.json").write_text(ids)

        self.changed(tmp_path, change)

    def test_with_another_description_are_refused(self, tmp_path: Path) -> None:
        def change(folder: Path) -> None:
            meta = json.loads((folder / "meta.json").read_text())
            (folder / "meta.json").write_text(json.dumps({"format": meta["format"]}))

        self.changed(tmp_path, change)

    def test_test_images_are_checked_too(self, tmp_path: Path, proof: Path) -> None:
        path, cache = write_folder(tmp_path / "set", tree()), tmp_path / "cache"
        load(path, cache_dir=cache)
        (folder,) = cache.iterdir()
        name = folder / "test_images.npy"
        size = name.stat().st_size
        name.write_bytes(pickle.dumps(Evil(proof)).ljust(size, b"\0"))
        with pytest.raises(UserError, match=r"test_images\.npy is not an array of plain numbers"):
            load(path, cache_dir=cache).open_test()


def test_the_pixel_limit_is_pillows() -> None:
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS
