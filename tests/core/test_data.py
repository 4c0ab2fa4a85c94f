"""Data sets: decoding, layouts, splits, the locked test set, caching, and errors."""

from __future__ import annotations

import gzip
import io
import json
import logging
import multiprocessing
import os
import pickle
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.model_selection import StratifiedKFold, train_test_split

from core.config import DataConfig
from core.data import Dataset, Splits, catalogue, folds, ingest, load_dataset, load_images, on_device, split
from core.data import dataset as dataset_module
from core.data.decode import BrokenImageError, decode
from core.data.ingest import decode_all
from core.data.layout import Entry
from core.errors import UserError

Pixels = NDArray[np.uint8]


# Helpers


def noise(seed: int, *shape: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(picture: Pixels | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(seed: int, size: int = 8, channels: int = 3) -> bytes:
    return encoded(noise(seed, size, size, channels) if channels > 1 else noise(seed, size, size))


def tree(
    per_class: int = 10, test: int = 3, classes: tuple[str, ...] = ("cat", "dog"), **options: int
) -> dict[str, bytes]:
    """A small set as {path: bytes}: train and test folders, or class folders only if `test` is 0."""
    files = {}
    for k, name in enumerate(classes):
        for i in range(per_class):
            files[f"{'train/' if test else ''}{name}/{i:02d}.png"] = photo(1000 * k + i, **options)
        for i in range(test):
            files[f"test/{name}/{i:02d}.png"] = photo(1000 * k + 500 + i, **options)
    return files


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    mode = {".gz": "w:gz", ".xz": "w:xz", ".bz2": "w:bz2"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def load(path: Path, config: dict[str, Any] | None = None, **options: Any) -> Dataset:
    return load_dataset(DataConfig(**(config or {})), data_path=path, **options)


def same(a: Dataset, b: Dataset) -> bool:
    tests = a.open_test(), b.open_test()
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and (a.classes, a.fingerprint) == (b.classes, b.fingerprint)
        and torch.equal(tests[0].images, tests[1].images)
        and torch.equal(tests[0].labels, tests[1].labels)
        and tests[0].fingerprint == tests[1].fingerprint
    )


# Decoding


def seen(content: bytes, size: tuple[int, int] | None = None) -> Pixels:
    return decode(content, size).pixels


class TestDecodedPixels:
    def test_colour(self) -> None:
        pixels = noise(0, 5, 7, 3)
        assert np.array_equal(seen(encoded(pixels)), pixels.transpose(2, 0, 1))

    def test_greyscale_has_one_channel(self) -> None:
        pixels = noise(0, 5, 7)
        assert np.array_equal(seen(encoded(pixels)), pixels[None])

    def test_grey_stored_as_colour_has_one_channel_too(self) -> None:
        pixels = noise(0, 5, 7)
        assert np.array_equal(seen(encoded(np.stack([pixels] * 3, axis=2))), pixels[None])

    def test_black_and_white(self) -> None:
        image = Image.fromarray(noise(0, 5, 7) > 127)
        assert np.array_equal(seen(encoded(image)), np.asarray(image)[None] * np.uint8(255))

    def test_palette(self) -> None:
        image = Image.fromarray(noise(0, 9, 9, 3)).quantize(16)
        assert np.array_equal(seen(encoded(image)), np.asarray(image.convert("RGB")).transpose(2, 0, 1))

    def test_a_transparent_palette_entry_is_white(self) -> None:
        image = Image.new("P", (4, 4), 0)
        image.putpalette([200, 0, 0, 0, 200, 0])
        image.putpixel((1, 2), 1)
        pixels = seen(encoded(image, "PNG", transparency=0))
        assert pixels[:, 0, 0].tolist() == [255, 255, 255]
        assert pixels[:, 2, 1].tolist() == [0, 200, 0]

    @pytest.mark.parametrize(("alpha", "expected"), [(0, 255), (255, 100), (51, 224)])
    @pytest.mark.parametrize("colour", [True, False])
    def test_alpha_is_blended_on_white(self, alpha: int, expected: int, colour: bool) -> None:
        # 51 / 255 is a fifth: 0.2 · 100 + 0.8 · 255 = 224
        pixels = np.full((3, 3, 4), 100, np.uint8) if colour else np.full((3, 3, 2), 100, np.uint8)
        pixels[..., -1] = alpha
        assert (seen(encoded(pixels)) == expected).all()

    def test_cmyk_without_ink_is_white(self) -> None:
        image = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
        image.paste((0, 255, 255, 0), (0, 0, 8, 16))  # magenta and yellow ink: red
        pixels = seen(encoded(image, "JPEG", quality=100)).astype(int)
        assert abs(pixels[:, 8, 2] - [255, 0, 0]).max() <= 3
        assert abs(pixels[:, 8, 13] - [255, 255, 255]).max() <= 3

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
    def test_sixteen_bits_keep_their_brightness(self, kind: str) -> None:
        samples = np.array([[0, 128, 129, 257], [32768, 40000, 65407, 65535]], np.uint16)
        assert np.array_equal(seen(encoded(samples, kind))[0], np.floor(samples / 257 + 0.5).astype(np.uint8))

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_is_applied(self, orientation: int) -> None:
        upright = np.zeros((16, 32), np.uint8)
        upright[:8, :8] = 255  # a light corner at the top left
        # As stored by a camera: the eight orientations of the EXIF standard.
        stored = {
            1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
            5: upright.T, 6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
        }[orientation]  # fmt: skip
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = seen(encoded(np.ascontiguousarray(stored), "JPEG", quality=100, exif=exif))
        assert pixels.shape == (1, 16, 32)
        assert abs(pixels[0].astype(int) - upright).max() <= 2

    def test_an_animation_shows_its_first_frame(self) -> None:
        frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
        assert (seen(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == 10).all()

    def test_shrinking_averages_and_does_not_alias(self) -> None:
        checkerboard = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
        assert abs(seen(encoded(checkerboard), (16, 16)).astype(int) - 127).max() <= 8

    def test_it_is_resized_to_height_and_width(self) -> None:
        assert seen(photo(0, size=10), (6, 4)).shape == (3, 6, 4)

    @pytest.mark.parametrize("kind", ["BMP", "GIF", "WEBP", "TIFF", "PPM"])
    def test_other_lossless_formats(self, kind: str) -> None:
        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels[:4, :, 0] = 255
        options = {"lossless": True} if kind == "WEBP" else {}
        assert np.array_equal(seen(encoded(pixels, kind, **options)), pixels.transpose(2, 0, 1))

    @pytest.mark.parametrize(("low", "high"), [(0, 65536), (-1, 255), (0, 2**31 - 1)])
    def test_integers_beyond_sixteen_bits_are_refused(self, low: int, high: int) -> None:
        with pytest.raises(BrokenImageError, match=f"32-bit pixels from {low} to {high} have no defined range"):
            seen(encoded(np.array([[low, 7], [8, high]], np.int32), "TIFF"))

    def test_integers_within_sixteen_bits_are_scaled_as_sixteen(self) -> None:
        assert seen(encoded(np.array([[0, 257], [25700, 65535]], np.int32), "TIFF"))[0].tolist() == [[0, 1], [100, 255]]

    def test_floating_point_pixels_are_refused(self) -> None:
        with pytest.raises(BrokenImageError, match="no defined range"):
            seen(encoded(np.ones((4, 4), np.float32), "TIFF"))


class TestHeic:
    HEAD = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"

    def test_without_the_plugin_it_is_a_broken_image_that_names_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("core.data.decode.plugin_formats", lambda: ())
        root = write_folder(tmp_path, tree() | {"train/cat/phone.HEIC": self.HEAD})
        with pytest.raises(UserError, match=r"train/cat/phone\.HEIC \(HEIC, which needs the package pillow-heif\)"):
            load(root)

    def test_it_is_read_with_the_plugin(self) -> None:
        heif = pytest.importorskip("pillow_heif")
        pixels = np.full((64, 64, 3), 100, np.uint8)
        buffer = io.BytesIO()
        heif.from_pillow(Image.fromarray(pixels)).save(buffer, quality=100)
        assert abs(seen(buffer.getvalue()).astype(int) - 100).max() <= 2


# Sources


class TestSourcesOfTheSameImagesAreEqual:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Dataset:
        return load(write_folder(tmp_path / "folder", tree()))

    def test_the_folder_itself(self, folder: Dataset) -> None:
        assert folder.classes == ("cat", "dog")
        assert folder.images.shape == (20, 3, 8, 8)
        assert folder.images.dtype == torch.uint8
        assert folder.labels.tolist() == [0] * 10 + [1] * 10
        assert folder.ids[0] == "train/cat/00.png"
        assert folder.has_own_test
        assert folder.n_test == 6
        test = folder.open_test()
        assert test.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert test.ids[-1] == "test/dog/02.png"
        first = np.asarray(Image.open(io.BytesIO(tree()["train/cat/00.png"])))
        assert np.array_equal(folder.images[0].numpy(), first.transpose(2, 0, 1))

    @pytest.mark.parametrize("wrapper", ["", "photos/", "./", "a/b/"])
    def test_zip(self, folder: Dataset, tmp_path: Path, wrapper: str) -> None:
        files = {wrapper + name: content for name, content in reversed(tree().items())}
        assert same(folder, load(write_zip(tmp_path / "set.zip", files)))

    @pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".tar.bz2", ".tgz"])
    def test_tar(self, folder: Dataset, tmp_path: Path, suffix: str) -> None:
        files = {f"photos/{name}": content for name, content in reversed(tree().items())}
        loaded = load(write_tar(tmp_path / f"set{suffix}", files))
        assert same(folder, loaded)
        assert loaded.name == "set"

    def test_files_of_macos_and_windows_are_ignored(self, folder: Dataset, tmp_path: Path) -> None:
        files = {f"photos/{name}": content for name, content in tree().items()}
        files |= {
            "__MACOSX/photos/train/cat/._00.png": b"junk",
            "photos/.DS_Store": b"junk",
            "photos/train/cat/Thumbs.db": b"junk",
            "photos/train/cat/.hidden.png": b"junk",
            "photos/README.txt": b"junk",
        }
        assert same(folder, load(write_zip(tmp_path / "set.zip", files)))

    def test_csv(self, folder: Dataset, tmp_path: Path) -> None:
        files = {name.replace("/", "_"): content for name, content in tree().items()}
        write_folder(tmp_path / "table" / "images", files)
        rows = [f"images/{name},{name.split('_')[1]},{name.split('_')[0]}" for name in sorted(files)]
        table = tmp_path / "table" / "set.csv"
        table.write_text("\n".join(["file,class,split", *sorted(rows)]), encoding="utf-8")
        assert same(folder, load(table))

    def test_csv_from_a_spreadsheet(self, folder: Dataset, tmp_path: Path) -> None:
        root = write_folder(tmp_path / "table", tree())
        rows = [f'"{name}" , {name.split("/")[1]}, {name.split("/")[0].upper()},' for name in sorted(tree())]
        text = "\r\n".join(["Path,Label,Split,Remark", *rows, ""])
        (root / "set.csv").write_text(text, encoding="utf-8-sig")
        loaded = load(root / "set.csv")
        assert loaded.fingerprint != ""
        assert Counter(loaded.labels.tolist()) == Counter(folder.labels.tolist())

    def test_npz(self, folder: Dataset, tmp_path: Path) -> None:
        test = folder.open_test()
        np.savez(
            tmp_path / "set.npz",
            x_train=folder.images.permute(0, 2, 3, 1).numpy(), y_train=np.array(folder.classes)[folder.labels.numpy()],
            x_test=test.images.permute(0, 2, 3, 1).numpy(), y_test=np.array(folder.classes)[test.labels.numpy()],
        )  # fmt: skip
        assert same(folder, load(tmp_path / "set.npz"))

    def test_the_location_does_not_matter(self, folder: Dataset, tmp_path: Path) -> None:
        assert same(folder, load(write_folder(tmp_path / "elsewhere", tree())))

    @pytest.mark.parametrize("change", ["pixel", "label", "class name"])
    def test_the_fingerprint_depends_on_the_content(self, folder: Dataset, tmp_path: Path, change: str) -> None:
        files = tree()
        if change == "pixel":
            pixels = noise(0, 8, 8, 3)
            pixels[0, 0, 0] ^= 1
            files["train/cat/00.png"] = encoded(pixels)
        elif change == "label":
            files["train/dog/99.png"] = files.pop("train/cat/09.png")
        else:
            files = {name.replace("dog", "hound"): content for name, content in files.items()}
        assert load(write_folder(tmp_path / "changed", files)).fingerprint != folder.fingerprint

    def test_the_test_images_have_their_own_fingerprint(self, folder: Dataset, tmp_path: Path) -> None:
        files = tree()
        files["test/cat/00.png"] = photo(77)
        changed = load(write_folder(tmp_path / "changed", files))
        assert changed.fingerprint == folder.fingerprint
        assert changed.open_test().fingerprint != folder.open_test().fingerprint


class TestLayouts:
    def test_a_validation_folder_is_the_validation_split(self, tmp_path: Path) -> None:
        files = tree() | {f"Valid/{name}/v{i}.png": photo(70 + i) for i, name in enumerate(("cat", "dog"))}
        loaded = load(write_folder(tmp_path / "set", files))
        assert len(loaded.images) == 22
        assert loaded.n_test == 6
        for seed in (0, 1):
            splits = split(loaded, DataConfig(split_seed=seed))
            assert [loaded.ids[i] for i in splits.val.tolist()] == ["Valid/cat/v0.png", "Valid/dog/v1.png"]
            assert len(splits.train) == 20
        pixels = loaded.images[splits.train].double() / 255
        assert splits.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-12)

    @pytest.mark.parametrize("config", [{"val": "drawn"}, {"folds": 2}])
    def test_a_validation_folder_joins_the_others_on_request_and_for_folds(
        self, tmp_path: Path, config: dict[str, Any]
    ) -> None:
        files = tree() | {f"Valid/{name}/v{i}.png": photo(70 + i) for i, name in enumerate(("cat", "dog"))}
        loaded = load(write_folder(tmp_path / "set", files))
        first, second = (folds(loaded, DataConfig(split_seed=seed, **config))[0].val.tolist() for seed in (0, 1))
        assert first != second
        assert len(first) == (11 if "folds" in config else 6)

    def test_given_validation_images_that_are_training_images_too_are_counted(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        files = tree() | {"val/cat/copy.png": tree()["train/cat/00.png"], "val/cat/own.png": photo(70)}
        assert load(write_folder(tmp_path / "set", files)).report.leaked_val == 1
        assert "1 of the given validation images are identical to training images" in caplog.text

    def test_the_fingerprint_does_not_depend_on_which_images_are_for_validation(self, tmp_path: Path) -> None:
        root = write_folder(tmp_path, {f"{i}.png": photo(i) for i in range(20)})
        rows = [f"{i}.png,{'ab'[i % 2]}" for i in range(20)]
        (root / "a.csv").write_text("\n".join(["path,label,split", *(f"{row},train" for row in rows)]))
        (root / "b.csv").write_text(
            "\n".join(["path,label,split", *(f"{row},{'val' if i < 4 else 'train'}" for i, row in enumerate(rows))])
        )
        assert load(root / "a.csv").fingerprint == load(root / "b.csv").fingerprint

    def test_classes_alone_get_a_test_set(self, tmp_path: Path) -> None:
        loaded = load(write_folder(tmp_path / "set", tree(per_class=20, test=0)), {"test_fraction": 0.25})
        assert not loaded.has_own_test
        assert loaded.open_test().labels.tolist() == [0] * 5 + [1] * 5
        assert set(loaded.ids).isdisjoint(loaded.open_test().ids)

    def test_grey_images_have_one_channel(self, tmp_path: Path) -> None:
        loaded = load(write_folder(tmp_path / "set", tree(channels=1)))
        assert loaded.images.shape == (20, 1, 8, 8)
        assert loaded.open_test().images.shape == (6, 1, 8, 8)

    def test_one_colour_image_gives_all_images_three_channels(self, tmp_path: Path) -> None:
        loaded = load(write_folder(tmp_path / "set", tree(channels=1) | {"train/cat/x.png": photo(5)}))
        assert loaded.images.shape == (21, 3, 8, 8)
        assert torch.equal(loaded.images[0, 0], loaded.images[0, 2])

    def test_the_test_images_do_not_affect_the_channels(self, tmp_path: Path) -> None:
        loaded = load(write_folder(tmp_path / "set", tree(channels=1) | {"test/cat/x.png": photo(5)}))
        assert loaded.images.shape[1] == 1
        assert loaded.open_test().images.shape == (7, 1, 8, 8)

    def test_image_size_makes_squares(self, tmp_path: Path) -> None:
        files = tree() | {"train/cat/wide.png": encoded(noise(3, 10, 30, 3))}
        assert load(write_folder(tmp_path / "set", files), {"image_size": 12}).images.shape == (21, 3, 12, 12)

    def test_links_are_followed(self, tmp_path: Path) -> None:
        root = write_folder(tmp_path / "set", tree())
        outside = write_folder(tmp_path / "birds", {f"{i}.png": photo(90 + i) for i in range(4)})
        (root / "train" / "bird").symlink_to(outside, target_is_directory=True)
        assert load(root).classes == ("bird", "cat", "dog")


class TestNpz:
    IMAGES = noise(0, 40, 6, 6, 3)
    LABELS = np.arange(40) % 4

    def save(self, tmp_path: Path, **arrays: Any) -> Path:
        np.savez(tmp_path / "set.npz", **arrays)
        return tmp_path / "set.npz"

    @pytest.mark.parametrize(("images", "labels"), [("images", "labels"), ("x", "y")])
    def test_plain_keys(self, tmp_path: Path, images: str, labels: str) -> None:
        loaded = load(self.save(tmp_path, **{images: self.IMAGES, labels: self.LABELS}))
        assert loaded.classes == ("0", "1", "2", "3")
        assert len(loaded.images) + loaded.n_test == 40
        assert not loaded.has_own_test

    def test_medmnist(self, tmp_path: Path) -> None:
        grey, labels = self.IMAGES[..., 0], self.LABELS[:, None]  # MedMNIST's labels are a column
        path = self.save(tmp_path, train_images=grey[:20], train_labels=labels[:20], val_images=grey[20:30],
                         val_labels=labels[20:30], test_images=grey[30:], test_labels=labels[30:])  # fmt: skip
        loaded = load(path)
        assert loaded.images.shape == (30, 1, 6, 6)
        assert loaded.n_test == 10
        assert loaded.ids[20] == "val/0"
        assert split(loaded, DataConfig()).val.tolist() == list(range(20, 30))

    @pytest.mark.parametrize(
        "convert",
        [
            lambda x: x.transpose(0, 3, 1, 2),
            lambda x: (x / 255).astype(np.float32),
            lambda x: x.astype(np.float64),
            lambda x: x.astype(np.int64),
            lambda x: x.astype(np.uint16) * 257,
        ],
        ids=["channels first", "floats to 1", "floats to 255", "int64", "16 bits"],
    )
    def test_other_pixel_formats_are_equivalent(self, tmp_path: Path, convert: Any) -> None:
        plain = load(self.save(tmp_path, x=self.IMAGES, y=self.LABELS))
        assert same(plain, load(self.save(tmp_path, x=convert(self.IMAGES), y=self.LABELS)))

    def test_opaque_images_are_as_those_without_transparency(self, tmp_path: Path) -> None:
        plain = load(self.save(tmp_path, x=self.IMAGES, y=self.LABELS))
        opaque = np.concatenate([self.IMAGES, np.full_like(self.IMAGES[..., :1], 255)], axis=3)
        for channels in ("rgb", "rgba"):
            assert same(plain, load(self.save(tmp_path, x=opaque, y=self.LABELS), {"channels": channels}))

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"pictures": IMAGES}, "its keys are pictures; expected images and labels"),
            ({"x": IMAGES}, "images without labels"),
            ({"x": IMAGES, "y": LABELS[:39]}, "40 x and 39 y"),
            ({"x": IMAGES, "y": np.eye(4)[LABELS]}, r"y is of shape \(40, 4\); expected \(N,\)"),
            ({"x": IMAGES, "y": LABELS + 0.5}, "y is of type float64; give whole numbers or names"),
            ({"x": IMAGES.reshape(40, -1), "y": LABELS}, r"x is of shape \(40, 108\)"),
            ({"x": IMAGES * -1.0, "y": LABELS}, "its pixels run from -255 to"),
            ({"x": IMAGES * np.nan, "y": LABELS}, "its pixels run from nan"),
            ({"x": IMAGES.astype(np.complex64), "y": LABELS}, "its images are of type complex64"),
            ({"x_test": IMAGES, "y_test": LABELS}, "no image outside its test set"),
        ],
    )
    def test_invalid_arrays_are_refused(self, tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            load(self.save(tmp_path, **arrays))

    def test_pickled_objects_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"cannot be read as an \.npz of plain arrays"):
            load(self.save(tmp_path, x=np.array([{}, []], dtype=object), y=np.arange(2)))

    def test_a_truncated_file_is_refused(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, x=self.IMAGES, y=self.LABELS)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(UserError, match=r"cannot be read as an \.npz"):
            load(path)


class TestCsvFaults:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "it has no rows"),
            ("path,label\n", "it has no rows"),
            ("path,label\na.png\n", ":2: 1 column, and the header names 2"),
            ("path,label\n,x\n", ":2: no path; fill it in or remove the row"),
            (
                "path,label\nmissing.png,x\nalso.png,y\n",
                "2 of 2 rows name files that do not exist: missing.png, also.png",
            ),
            ("path,label,Path\na.png,x,b.png\n", "2 columns are named path; rename or remove all but one"),
        ],
    )
    def test_each_error_names_the_row_and_the_problem(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "set.csv").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            load(tmp_path / "set.csv")

    def test_other_encodings_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "set.csv").write_bytes("path,label\nä.png,Bär\n".encode("latin-1"))
        with pytest.raises(UserError, match="cannot be read as CSV in UTF-8"):
            load(tmp_path / "set.csv")


# Archives


class TestArchivesCannotReachOutside:
    NAMES = ("../evil.png", "train/../../evil.png", "/etc/evil.png", "..\\evil.png", "C:\\evil.png", "..")

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize(("write", "archive"), [(write_zip, "set.zip"), (write_tar, "set.tar")])
    def test_by_a_name(self, tmp_path: Path, name: str, write: Any, archive: str) -> None:
        with pytest.raises(UserError, match="points outside the archive"):
            load(write(tmp_path / archive, tree() | {name: photo(0)}))

    @pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
    @pytest.mark.parametrize("target", ["/etc/passwd", "../../../etc/passwd"])
    def test_by_a_link_in_a_tar(self, tmp_path: Path, kind: bytes, target: str) -> None:
        path = write_tar(tmp_path / "set.tar", tree())
        with tarfile.open(path, "a") as archive:
            link = tarfile.TarInfo("train/cat/link.png")
            link.type, link.linkname = kind, target
            archive.addfile(link)
        with pytest.raises(UserError, match="points outside the archive"):
            load(path)

    def test_by_a_link_in_a_zip(self, tmp_path: Path) -> None:
        path = write_zip(tmp_path / "set.zip", tree())
        self.add_link(path, "train/cat/link.png", "../../../secret.png")
        with pytest.raises(UserError, match="points outside the archive"):
            load(path)

    @staticmethod
    def add_link(path: Path, name: str, target: str) -> None:
        with zipfile.ZipFile(path, "a") as archive:
            link = zipfile.ZipInfo(name)
            link.create_system = 3  # Unix: file types in the upper half of the attributes
            link.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(link, target)

    def test_links_within_an_archive_are_resolved(self, tmp_path: Path) -> None:
        expected = load(write_folder(tmp_path / "set", tree() | {"train/dog/z.png": tree()["train/dog/00.png"]}))
        zipped = write_zip(tmp_path / "set.zip", tree())
        self.add_link(zipped, "train/dog/z.png", "00.png")
        tarred = write_tar(tmp_path / "set.tar.gz", {})
        with tarfile.open(tarred, "w:gz") as archive:
            for name, content in tree().items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            link = tarfile.TarInfo("train/dog/z.png")
            link.type, link.linkname = tarfile.SYMTYPE, "00.png"
            archive.addfile(link)
        assert same(expected, load(zipped))
        assert same(expected, load(tarred))

    @pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.xz"])
    def test_nothing_is_unpacked(self, tmp_path: Path, suffix: str) -> None:
        write = write_zip if suffix == ".zip" else write_tar
        path = write(tmp_path / f"set{suffix}", tree())
        load(path, cache_dir=tmp_path / "cache")
        assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["cache", path.name])
        assert not list((tmp_path / "cache").rglob("*.png"))


@pytest.mark.parametrize("how", ["cut in a header", "cut between members", "damaged header"])
def test_a_damaged_tar_is_an_error(tmp_path: Path, how: str) -> None:
    path = write_tar(tmp_path / "set.tar", tree())
    with tarfile.open(path) as archive:
        at = archive.getmembers()[10].offset
    content = bytearray(path.read_bytes())
    if how == "damaged header":
        content[at + 150] ^= 0xFF  # its checksum
    path.write_bytes(content[: {"cut in a header": at + 100, "cut between members": at}.get(how)])
    with pytest.raises(UserError, match="damaged or cut short"):
        load(path)


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.xz", ".tar.bz2"])
def test_a_truncated_archive_is_refused(tmp_path: Path, suffix: str) -> None:
    write = write_zip if suffix == ".zip" else write_tar
    path = write(tmp_path / f"set{suffix}", tree())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged or cut short"):
        load(path)


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", tree())
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")  # the first entry of the central directory
    content[at + 8] |= 1  # its flag for encryption
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="is encrypted"):
        load(path)


# Invalid sets


class TestBrokenImages:
    def files(self) -> dict[str, bytes]:
        truncated = encoded(noise(0, 64, 64, 3), "JPEG")
        files = tree()
        files |= {f"train/cat/bad{i}.png": b"no picture" for i in range(6)}
        return files | {"train/dog/empty.png": b"", "test/dog/torn.jpg": truncated[: len(truncated) // 2]}

    @pytest.mark.parametrize("write", [write_folder, write_zip, write_tar])
    def test_are_counted_and_named(self, tmp_path: Path, write: Any) -> None:
        name = {write_folder: "set", write_zip: "set.zip", write_tar: "set.tar"}[write]
        with pytest.raises(UserError) as caught:
            load(write(tmp_path / name, self.files()))
        message = str(caught.value)
        assert "8 of 34 images cannot be read: " in message
        assert "test/dog/torn.jpg" in message
        assert "and 3 more" in message
        assert "--skip-broken" in message
        assert "\n" not in message
        assert "0x" not in message  # no address in memory

    def test_are_skipped_on_request_and_reported(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        loaded = load(write_folder(tmp_path / "set", self.files()), skip_broken=True)
        assert same(loaded, load(write_folder(tmp_path / "whole", tree())))
        assert len(loaded.report.broken) == 8
        assert "train/dog/empty.png" in loaded.report.broken
        assert "8 unreadable images are skipped" in caplog.text

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
    def test_random_damage_never_crashes(self, kind: str) -> None:
        rng = np.random.default_rng(0)
        entries, payloads = [], []
        for i in range(200):
            content = bytearray(encoded(noise(0, 16, 16, 3), kind))
            for _ in range(3):
                content[rng.integers(min(len(content), 300))] = rng.integers(256)
            entries.append(Entry(str(i)))
            payloads.append(bytes(content[: rng.integers(len(content))] if i % 4 == 0 else content))
        source = SimpleNamespace(where="here", payloads=lambda _: enumerate(payloads))
        results = [result for _, result in decode_all(source, entries, (8, 8))]  # type: ignore[arg-type]
        assert len(results) == 200
        assert any(isinstance(result, BrokenImageError) for result in results)
        for result in results:
            assert isinstance(result, BrokenImageError) or result.pixels.shape[1:] == (8, 8)  # type: ignore[union-attr]

    def test_a_set_of_broken_images_is_an_error(self, tmp_path: Path) -> None:
        files = {"a/1.png": b"", "b/1.png": b""}
        with pytest.raises(UserError, match=r"2 of 2 images cannot be read.*none is left"):
            load(write_folder(tmp_path / "set", files), skip_broken=True)

    def test_a_damaged_member_of_a_zip_is_one_broken_image(self, tmp_path: Path) -> None:
        path = write_zip(tmp_path / "set.zip", tree())
        content = bytearray(path.read_bytes())
        at = content.index(tree()["train/cat/03.png"])
        content[at + 60] ^= 0xFF
        path.write_bytes(bytes(content))
        with pytest.raises(UserError, match=r"1 of 26 images cannot be read: train/cat/03.png \(Bad CRC-32"):
            load(path)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
class TestProcesses:
    """Sets of more images than `ingest.FEW` are decoded by forked processes."""

    @staticmethod
    def many(root: Path) -> Path:
        return write_folder(root / "many", {f"{label}/{i}.png": photo(i) for i in range(200) for label in "ab"})

    def test_they_read_the_same_as_one_process(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = self.many(tmp_path)
        state = torch.get_rng_state()
        forked = load(path)
        assert torch.equal(torch.get_rng_state(), state)
        forks: list[int] = []
        monkeypatch.setattr(ingest, "_processes", lambda: forks.append(0) or 0)
        alone = load(path)
        assert forks == [0]
        assert (forked.fingerprint, forked.ids) == (alone.fingerprint, alone.ids)
        assert torch.equal(forked.images, alone.images)
        assert torch.equal(forked.moments, alone.moments)

    @pytest.mark.parametrize("broken", [200, 400])
    def test_broken_images_are_counted(self, tmp_path: Path, broken: int) -> None:
        path = self.many(tmp_path)
        for file in sorted(path.rglob("*.png"))[:broken]:
            file.write_bytes(file.read_bytes()[:50])
        with pytest.raises(
            UserError, match=rf"{broken} of 400 images cannot be read: a/0\.png \(.*and {broken - 5} more"
        ):
            load(path)

    def test_one_that_is_killed_is_said_in_a_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        here = os.getpid()

        def killed(*_: Any) -> Any:
            assert os.getpid() != here
            os.kill(os.getpid(), signal.SIGKILL)

        path = self.many(tmp_path)
        monkeypatch.setattr(ingest, "decode", killed)
        with pytest.raises(UserError, match=r"many: a process that reads its images was killed, .* memory is full"):
            load(path)
        assert not multiprocessing.active_children()

    def test_an_interrupt_is_the_parents_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ctrl-C reaches the whole group, also while a process starts."""
        here = os.getpid()
        start = ingest._start

        def interrupted(number: int) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            start(number)

        def received(*_: Any) -> None:
            assert os.getpid() == here

        monkeypatch.setattr(ingest, "_start", interrupted)
        before = signal.signal(signal.SIGINT, received)
        try:
            assert len(load(self.many(tmp_path)).images)
        finally:
            signal.signal(signal.SIGINT, before)


def test_arrays_are_not_sent_to_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "_processes", pytest.fail)
    load_dataset(DataConfig(name="digits"))


class TestMemory:
    MEASURED = """
import resource, sys
from pathlib import Path
from core.config import DataConfig
from core.data import load_dataset
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
dataset = load_dataset(DataConfig(), data_path=Path(sys.argv[1]), cache_dir=Path(sys.argv[2]))
print(peak() - before, dataset.images.nbytes + dataset.open_test().images.nbytes)
"""

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems report the peak in another unit")
    def test_reading_takes_less_than_twice_the_decoded_set(self, tmp_path: Path) -> None:
        files = {f"{'ab'[i % 2]}/{i}.bmp": encoded(noise(i, 256, 256, 3), "BMP") for i in range(600)}
        command = [
            sys.executable,
            "-c",
            self.MEASURED,
            str(write_folder(tmp_path / "set", files)),
            str(tmp_path / "cache"),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        more, decoded = map(int, done.stdout.split())
        assert decoded == 600 * 256 * 256 * 3
        assert more < 2 * decoded


class TestUnusableSets:
    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({}, "no images found"),
            ({"1.png": photo(1), "2.png": photo(2)}, "1.png and 1 more images are outside the class folders"),
            (tree() | {"train/stray.png": photo(1)}, "train/stray.png is outside the class folders"),
            (tree(classes=("cat",)), "a single class, cat"),
            (tree() | {"train/owl/1.png": photo(1)}, "a single image outside the test set of class owl"),
            (tree(per_class=2, test=0), "no image for a test set"),
            (tree() | {"train/cat/x.png": photo(1, size=9)}, "differ in size"),
        ],
    )
    def test_each_error_names_the_problem(self, tmp_path: Path, files: dict[str, bytes], message: str) -> None:
        (tmp_path / "set").mkdir()
        with pytest.raises(UserError, match=message) as caught:
            load(write_folder(tmp_path / "set", files))
        assert "\n" not in str(caught.value)
        assert str(tmp_path / "set") in str(caught.value)

    @pytest.mark.parametrize("folder", ["train/owl", "test/cat"])
    def test_an_empty_class_folder_is_an_error(self, tmp_path: Path, folder: str) -> None:
        files = {name: content for name, content in tree().items() if not name.startswith(folder)}
        root = write_folder(tmp_path / "set", files | {f"{folder}/readme.txt": b"x"})
        with pytest.raises(UserError, match=f"the class folder {folder} has no image"):
            load(root)

    def test_sizes_that_differ_name_the_smallest_and_the_largest(self, tmp_path: Path) -> None:
        files = tree() | {
            "train/cat/big.png": encoded(noise(0, 20, 30, 3)),
            "train/cat/small.png": encoded(noise(0, 5, 4, 3)),
        }
        with pytest.raises(UserError) as caught:
            load(write_folder(tmp_path / "set", files))
        assert "from 4×5 (train/cat/small.png) to 30×20 (train/cat/big.png)" in str(caught.value)
        assert "--set data.image_size=96" in str(caught.value)

    def test_an_unknown_name_suggests_similar_ones(self) -> None:
        with pytest.raises(UserError, match=r"cifar01 is neither a built-in data set \(digits.*did you mean cifar10"):
            load_dataset(DataConfig(name="cifar01"))

    def test_a_missing_path(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="nowhere: no such file or folder"):
            load(tmp_path / "nowhere")

    def test_a_file_of_an_unknown_kind(self, tmp_path: Path) -> None:
        (tmp_path / "set.rar").write_bytes(b"x")
        with pytest.raises(UserError, match="not a known kind of data; give a folder"):
            load(tmp_path / "set.rar")


class TestDuplicateImages:
    def test_in_train_and_test(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        files = tree()
        files["test/cat/copy.png"] = files["train/cat/00.png"]
        files["test/dog/copy.bmp"] = encoded(noise(1000, 8, 8, 3), "BMP")  # as train/dog/00.png, in another format
        loaded = load(write_folder(tmp_path / "set", files))
        assert loaded.report.leaked == 2
        assert loaded.report.conflicting == 0
        assert "2 test images are identical to training images" in caplog.text

    def test_under_two_classes(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        files = tree()
        files["train/dog/copy.png"] = files["train/cat/00.png"]
        loaded = load(write_folder(tmp_path / "set", files))
        assert loaded.report.conflicting == 2
        assert "2 images are identical to one of another class" in caplog.text

    def test_warnings_are_repeated_for_cached_sets(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        files = tree()
        files["train/dog/copy.png"] = files["train/cat/00.png"]
        root = write_folder(tmp_path / "set", files)
        load(root, cache_dir=tmp_path / "cache")
        caplog.clear()
        load(root, cache_dir=tmp_path / "cache")
        assert "2 images are identical" in caplog.text

    def test_a_clean_set_logs_no_warning(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        load(write_folder(tmp_path / "set", tree()))
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# The test set


class TestTheTestCut:
    def cut(self, root: Path, **config: Any) -> set[str]:
        return set(load(root, config).open_test().ids)

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return write_folder(tmp_path / "set", tree(per_class=30, test=0))

    def test_does_not_depend_on_the_split_seed_or_the_validation_share(self, root: Path) -> None:
        assert self.cut(root) == self.cut(root, split_seed=99, val_fraction=0.5)

    def test_does_not_depend_on_names_or_order(self, root: Path, tmp_path: Path) -> None:
        images = load(root).open_test().images
        renamed = {
            f"{name.split('/')[0]}/{1000 - i}.png": content
            for i, (name, content) in enumerate(tree(per_class=30, test=0).items())
        }
        other = load(write_folder(tmp_path / "renamed", renamed)).open_test().images
        assert {image.numpy().tobytes() for image in images} == {image.numpy().tobytes() for image in other}

    def test_grows_with_its_fraction_and_keeps_its_images(self, root: Path) -> None:
        small, large = self.cut(root, test_fraction=0.1), self.cut(root, test_fraction=0.3)
        assert len(small) == 6
        assert len(large) == 18
        assert small < large

    def test_moves_no_other_image_when_one_is_added(self, root: Path) -> None:
        before = self.cut(root)
        write_folder(root, {"cat/new.png": photo(31)})
        assert len(before ^ self.cut(root)) <= 2

    def test_keeps_identical_images_together(self, tmp_path: Path) -> None:
        files = tree(per_class=40, test=0)
        twins = {name.replace(".png", "b.png"): content for name, content in files.items()}
        loaded = load(write_folder(tmp_path / "set", files | twins))
        assert loaded.n_test == 32
        assert loaded.report.leaked == 0

    @pytest.mark.parametrize(("n", "expected"), [(2, 0), (3, 1), (4, 1), (10, 2)])
    def test_leaves_two_images_of_every_class(self, tmp_path: Path, n: int, expected: int) -> None:
        files = tree(per_class=20, test=0) | {f"owl/{i}.png": photo(5000 + i) for i in range(n)}
        loaded = load(write_folder(tmp_path / "set", files))
        assert sum("owl" in name for name in loaded.open_test().ids) == expected

    def test_a_cache_distinguishes_test_fractions(self, root: Path, tmp_path: Path) -> None:
        cache = tmp_path / "cache"
        small = load(root, {"test_fraction": 0.1}, cache_dir=cache)
        large = load(root, {"test_fraction": 0.3}, cache_dir=cache)
        assert (small.n_test, large.n_test) == (6, 18)


def test_test_labels_affect_only_the_test_set(tmp_path: Path) -> None:
    files = tree(test=10)
    other = {"cat": "dog", "dog": "cat"}
    swapped = {}
    for i, (name, content) in enumerate(files.items()):
        part, label, file = name.split("/")
        swapped[f"{part}/{other[label] if part == 'test' and i % 3 else label}/{i}-{file}"] = content
    a = load(write_folder(tmp_path / "a", files))
    b = load(write_folder(tmp_path / "b", swapped))
    assert a.fingerprint == b.fingerprint
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.labels, b.labels)
    assert a.open_test().fingerprint != b.open_test().fingerprint


# Training and validation


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DataConfig())


class TestDigits:
    def test_are_those_of_scikit_learn(self, digits: Dataset) -> None:
        from sklearn.datasets import load_digits

        assert digits.name == "digits"
        assert digits.classes == tuple("0123456789")
        assert digits.images.shape == (1797 - digits.n_test, 1, 8, 8)
        assert digits.images.max() == 255
        both = torch.cat([digits.images, digits.open_test().images])
        assert both.double().mean() == pytest.approx(load_digits().images.mean() * 255 / 16, abs=0.1)
        report = digits.report
        assert (report.broken, report.leaked, report.conflicting, report.left_out) == ((), 0, 0, {})

    def test_have_a_test_set_of_a_fifth(self, digits: Dataset) -> None:
        assert not digits.has_own_test
        assert digits.n_test == len(digits.open_test().images)
        assert digits.n_test == pytest.approx(0.2 * 1797, abs=3)

    def test_are_the_same_each_time(self, digits: Dataset, tmp_path: Path) -> None:
        assert same(digits, load_dataset(DataConfig(split_seed=5), cache_dir=tmp_path))
        assert not list(tmp_path.iterdir())  # too small for a cache


class TestSplit:
    def test_is_stratified(self, digits: Dataset) -> None:
        splits = split(digits, DataConfig(val_fraction=0.25))
        everything = torch.bincount(digits.labels)
        assert len(splits.val) == round(0.25 * len(digits.labels))
        assert (torch.bincount(digits.labels[splits.val]) - 0.25 * everything).abs().max() <= 1

    def test_puts_every_image_on_one_side(self, digits: Dataset) -> None:
        splits = split(digits, DataConfig())
        together = torch.cat([splits.train, splits.val]).sort().values
        assert torch.equal(together, torch.arange(len(digits.images)))

    def test_depends_on_its_seed(self, digits: Dataset) -> None:
        first = split(digits, DataConfig(split_seed=1))
        assert torch.equal(first.val, split(digits, DataConfig(split_seed=1)).val)
        assert not torch.equal(first.val, split(digits, DataConfig(split_seed=2)).val)

    def test_makes_no_copy_of_the_images(self, digits: Dataset) -> None:
        splits = split(digits, DataConfig())
        assert splits.images.data_ptr() == digits.images.data_ptr()
        assert splits.to("cpu").images.data_ptr() == digits.images.data_ptr()
        assert splits.to(torch.device("cpu")).train.data_ptr() == splits.train.data_ptr()

    @pytest.mark.parametrize("count", [None, 3])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_mean_and_std_are_those_of_the_training_images(
        self, tmp_path: Path, channels: int, count: int | None
    ) -> None:
        loaded = load(write_folder(tmp_path / "set", tree(channels=channels)))
        divided = folds(loaded, DataConfig(folds=count))
        for splits in divided:
            pixels = loaded.images[splits.train].double() / 255
            assert splits.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-12)
            assert splits.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-12)
        assert len({splits.mean for splits in divided}) == (count or 1)

    def test_whole_trains_on_all_images_with_their_mean(self, digits: Dataset) -> None:
        whole = split(digits, DataConfig()).whole()
        assert torch.equal(whole.train, torch.arange(len(digits.images)))
        assert whole.val.shape == (0,)
        assert whole.val.dtype == torch.int64
        assert whole.mean == pytest.approx([(digits.images.double() / 255).mean().item()], abs=1e-12)

    @pytest.mark.parametrize(
        ("normalize", "grey", "mean", "std"),
        [
            ("half", False, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            ("half", True, (0.5,), (0.5,)),
            ("imagenet", False, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ("imagenet", True, (0.449,), (0.226,)),
        ],
    )
    def test_constant_mean_and_std(
        self, tmp_path: Path, normalize: str, grey: bool, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        loaded = load(write_folder(tmp_path / "set", tree(channels=1 if grey else 3)))
        splits = split(loaded, DataConfig(normalize=normalize))
        for each in (splits, splits.whole()):
            assert each.mean == pytest.approx(mean)
            assert each.std == pytest.approx(std)

    def test_a_constant_channel_has_std_1(self, tmp_path: Path) -> None:
        files = {}
        for i, name in enumerate(sorted(tree())):
            pixels = noise(i, 8, 8, 3)
            pixels[..., 2] = 51
            files[name] = encoded(pixels)
        splits = split(load(write_folder(tmp_path / "set", files)), DataConfig())
        assert splits.mean[2] == pytest.approx(0.2)
        assert splits.std[2] == 1.0

    @pytest.mark.parametrize(
        ("fraction", "message"),
        [
            (0.002, r"data.val_fraction=0.002 leaves 3 validation images of \d+ for 10 classes; raise it"),
            (0.998, r"data.val_fraction=0.998 leaves 3 training images of \d+ for 10 classes; lower it"),
        ],
    )
    def test_too_few_images_for_the_classes(self, digits: Dataset, fraction: float, message: str) -> None:
        with pytest.raises(UserError, match=message):
            split(digits, DataConfig(val_fraction=fraction))

    def test_a_class_without_a_training_image(self, tmp_path: Path) -> None:
        files = tree(per_class=100, test=2) | {f"train/owl/{i}.png": photo(7000 + i) for i in range(2)}
        loaded = load(write_folder(tmp_path / "set", files))
        with pytest.raises(UserError, match=r"val_fraction=0\.9 leaves no training image of owl; lower it"):
            split(loaded, DataConfig(val_fraction=0.9))

    @pytest.mark.parametrize("count", [None, 4])
    @pytest.mark.parametrize("seed", range(5))
    def test_identical_images_stay_together(self, tmp_path: Path, seed: int, count: int | None) -> None:
        files = tree(per_class=20)
        for i in range(10):
            files[f"train/cat/copy{i}.png"] = files[f"train/cat/{i:02d}.png"]
        files["train/dog/cat.png"] = files["train/cat/00.png"]  # of another class, and yet the same image
        loaded = load(write_folder(tmp_path / "set", files))
        divided = folds(loaded, DataConfig(split_seed=seed, val_fraction=0.4, folds=count))
        for splits in divided:
            train, val = (
                {loaded.images[i].numpy().tobytes() for i in part.tolist()} for part in (splits.train, splits.val)
            )
            assert val
            assert not train & val
            together = torch.cat([splits.train, splits.val]).sort().values
            assert torch.equal(together, torch.arange(len(loaded.images)))
        if count is not None:
            validated = torch.cat([splits.val for splits in divided]).sort().values
            assert torch.equal(validated, torch.arange(len(loaded.images)))

    def test_equals_scikit_learn_without_duplicates(self, digits: Dataset) -> None:
        _, val = train_test_split(
            np.arange(len(digits.labels)),
            test_size=round(len(digits.labels) * 0.2),
            stratify=digits.labels.numpy(),
            random_state=3,
        )
        assert split(digits, DataConfig(split_seed=3, val_fraction=0.2)).val.tolist() == sorted(val.tolist())

    @pytest.mark.parametrize(
        ("count", "message"),
        [
            (None, r"are copies of training images|no training image of .*; remove copies"),
            (3, r"data\.folds=3: fold \d (has only copies|has no training image of (cat|dog))"),
        ],
    )
    @pytest.mark.parametrize("seed", range(4))
    def test_classes_of_identical_images_cannot_be_split(
        self, tmp_path: Path, seed: int, count: int | None, message: str
    ) -> None:
        files = tree(test=2)
        for name in files:
            if name.startswith("train"):
                files[name] = files[f"{name.rpartition('/')[0]}/00.png"]
        loaded = load(write_folder(tmp_path / "set", files))
        with pytest.raises(UserError, match=message):
            folds(loaded, DataConfig(split_seed=seed, folds=count))

    def test_splits_without_moments_keep_their_mean(self) -> None:
        images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
        index = torch.arange(4)
        splits = Splits(images, index % 2, index[:2], index[2:], ("a", "b"), (0.1,), (0.2,))
        assert splits.whole().mean == (0.1,)


class TestFolds:
    def test_without_folds_there_is_a_single_split(self, digits: Dataset) -> None:
        config = DataConfig(split_seed=4)
        [only] = folds(digits, config)
        assert torch.equal(only.val, split(digits, config).val)
        assert only.mean == split(digits, config).mean

    @pytest.mark.parametrize("count", [2, 3, 5, 20])
    def test_every_image_validates_in_exactly_one_fold(self, digits: Dataset, count: int) -> None:
        divided = folds(digits, DataConfig(folds=count))
        assert len(divided) == count
        everything = torch.arange(len(digits.images))
        assert torch.equal(torch.cat([fold.val for fold in divided]).sort().values, everything)
        for fold in divided:
            assert torch.equal(torch.cat([fold.train, fold.val]).sort().values, everything)
            assert len(fold.val) == pytest.approx(len(everything) / count, abs=10)

    def test_are_stratified(self, digits: Dataset) -> None:
        share = torch.bincount(digits.labels) / 5
        for fold in folds(digits, DataConfig(folds=5)):
            assert (torch.bincount(digits.labels[fold.val]) - share).abs().max() <= 1

    def test_equal_scikit_learn_without_duplicates(self, digits: Dataset) -> None:
        draw = StratifiedKFold(4, shuffle=True, random_state=7)
        labels = digits.labels.numpy()
        expected = [val.tolist() for _, val in draw.split(np.zeros(len(labels)), labels)]
        assert [fold.val.tolist() for fold in folds(digits, DataConfig(folds=4, split_seed=7))] == expected

    def test_depend_on_the_seed_and_not_on_the_fraction(self, digits: Dataset) -> None:
        first = folds(digits, DataConfig(folds=3, split_seed=1))
        again = folds(digits, DataConfig(folds=3, split_seed=1, val_fraction=0.5))
        other = folds(digits, DataConfig(folds=3, split_seed=2))
        assert all(torch.equal(a.val, b.val) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0].val, other[0].val)

    def test_constant_mean_and_std(self, digits: Dataset) -> None:
        assert {fold.mean for fold in folds(digits, DataConfig(folds=3, normalize="half"))} == {(0.5,)}

    def test_whole_is_equal_for_all_folds(self, digits: Dataset) -> None:
        expected = split(digits, DataConfig()).whole()
        for fold in folds(digits, DataConfig(folds=3)):
            whole = fold.whole()
            assert torch.equal(whole.train, expected.train)
            assert (whole.mean, whole.std) == (expected.mean, expected.std)

    @pytest.mark.gpu
    def test_images_too_large_for_a_gpu_stay_on_the_host(
        self, digits: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("core.data.splits.free_memory", lambda device: digits.images.nbytes)
        for fold in on_device(folds(digits, DataConfig(folds=3)), "cuda"):
            assert fold.images.device.type == "cpu"
            assert {part.device.type for part in (fold.labels, fold.train, fold.val)} == {"cuda"}

    def test_share_the_images_on_every_device(self, digits: Dataset) -> None:
        divided = folds(digits, DataConfig(folds=3))
        assert {fold.images.data_ptr() for fold in divided} == {digits.images.data_ptr()}
        moved = on_device(divided, "meta")  # tensors are really moved
        assert all(fold.images is moved[0].images and fold.labels is moved[0].labels for fold in moved)
        assert {fold.train.device.type for fold in moved} | {fold.val.device.type for fold in moved} == {"meta"}

    def test_more_folds_than_images_of_a_class(self, tmp_path: Path) -> None:
        files = tree(per_class=10) | {f"train/owl/{i}.png": photo(7000 + i) for i in range(3)}
        loaded = load(write_folder(tmp_path / "set", files))
        assert len(folds(loaded, DataConfig(folds=3))) == 3
        with pytest.raises(
            UserError, match=r"data\.folds=4 needs as many images of every class, and of owl there are 3"
        ):
            folds(loaded, DataConfig(folds=4))


# The cache


def test_the_progress_of_reading_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    load(write_folder(tmp_path, tree(per_class=100)), on_progress=lambda *now: told.append(now))
    assert told == [("reading", done, 206) for done in (0, 64, 128, 192)]


class TestCache:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return write_folder(tmp_path / "set", tree())

    @pytest.fixture
    def cache(self, tmp_path: Path) -> Path:
        return tmp_path / "cache"

    def count_builds(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        builds: list[int] = []
        build = dataset_module._build
        monkeypatch.setattr(dataset_module, "_build", lambda *args: builds.append(1) or build(*args))
        return builds

    def test_equals_decoding(self, root: Path, cache: Path) -> None:
        assert same(load(root), load(root, cache_dir=cache))
        assert same(load(root), load(root, cache_dir=cache))
        assert load(root).ids == load(root, cache_dir=cache).ids
        assert split(load(root), DataConfig()).mean == split(load(root, cache_dir=cache), DataConfig()).mean

    def test_is_built_once(self, root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        builds = self.count_builds(monkeypatch)
        for _ in range(3):
            load(root, cache_dir=cache)
        assert len(builds) == 1

    @pytest.mark.parametrize("change", ["file", "added", "image_size", "skip_broken", "class_depth"])
    def test_is_rebuilt_on_any_change(
        self, root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, change: str
    ) -> None:
        builds = self.count_builds(monkeypatch)
        load(root, cache_dir=cache)
        if change == "file":
            (root / "train/cat/00.png").write_bytes(photo(4242))
        elif change == "added":
            write_folder(root, {"train/cat/new.png": photo(4242)})
        config = {"image_size": {"image_size": 16}, "class_depth": {"class_depth": 1}}.get(change, {})
        loaded = load(root, config, cache_dir=cache, skip_broken=change == "skip_broken")
        assert len(builds) == 2
        assert same(loaded, load(root, config))

    @pytest.mark.parametrize("write", [write_zip, write_tar])
    def test_a_changed_archive_is_read_again(self, tmp_path: Path, cache: Path, write: Any) -> None:
        path = write(tmp_path / {write_zip: "s.zip", write_tar: "s.tar"}[write], tree())
        before = load(path, cache_dir=cache)
        write(path, tree(per_class=12))
        assert len(load(path, cache_dir=cache).images) == len(before.images) + 4

    @pytest.mark.parametrize("name", ["meta.json", "pool_images.npy", "pool_labels.npy", "test_images.npy"])
    @pytest.mark.parametrize("damage", ["cut", "gone"])
    def test_damage_is_detected(self, root: Path, cache: Path, name: str, damage: str) -> None:
        whole = load(root)
        load(root, cache_dir=cache)
        [file] = cache.glob(f"*/{name}")
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:-1])
        else:
            file.unlink()
        assert same(whole, load(root, cache_dir=cache))

    def test_an_interrupted_build_leaves_nothing(
        self, root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*args: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(dataset_module, "write_images", interrupt)
            with pytest.raises(KeyboardInterrupt):
                load(root, cache_dir=cache)
        assert not list(cache.iterdir())
        assert same(load(root), load(root, cache_dir=cache))

    def test_only_abandoned_builds_are_removed(self, root: Path, cache: Path) -> None:
        key = f"set-{'0' * 20}"
        old, young, busy = (cache / f".{key}-{end}" for end in ("old_old_", "young123", "busy1234"))
        for folder in (old, young, busy):
            (folder / key).mkdir(parents=True)
            (folder / key / "spool").write_bytes(b"half")
        others = [cache / ".mine-and-old", cache / f"{key}-old_old_", cache / key]
        for folder in others:
            folder.mkdir()
        two_days_ago = time.time() - 2 * 86400
        for path in (old / key / "spool", old / key, old, busy / key, busy, *others):
            os.utime(path, (two_days_ago, two_days_ago))
        load(root, cache_dir=cache)
        assert not old.exists()
        assert all(folder.exists() for folder in (young, busy, *others))

    def test_concurrent_builds_work(self, root: Path, cache: Path) -> None:
        results: list[Dataset] = []
        threads = [threading.Thread(target=lambda: results.append(load(root, cache_dir=cache))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 4
        assert len(list(cache.iterdir())) == 1
        assert all(same(result, load(root)) for result in results)

    def test_maps_only_the_pool(self, root: Path, cache: Path) -> None:
        loaded = load(root, cache_dir=cache)
        maps = Path("/proc/self/maps")
        if not maps.exists():
            pytest.skip("needs /proc")
        assert "pool_images.npy" in maps.read_text()
        assert f"{cache}" in maps.read_text()
        assert "test_images.npy" not in maps.read_text()
        assert len(loaded.images) == 20

    def test_writing_to_the_images_does_not_change_it(self, root: Path, cache: Path) -> None:
        load(root, cache_dir=cache).images.zero_()
        assert load(root, cache_dir=cache).images.any()

    def test_an_unwritable_cache_is_an_error(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(UserError, match="cannot write the cache of decoded images there"):
            load(root, cache_dir=tmp_path / "file")

    def test_stores_no_spool_file(self, root: Path, cache: Path) -> None:
        loaded = load(root, cache_dir=cache)
        [folder] = cache.iterdir()
        names = {file.name for file in folder.iterdir()}
        assert {"meta.json", "pool_images.npy", "test_images.npy"} <= names
        assert "spool" not in names
        assert json.loads((folder / "meta.json").read_text())["pool_fingerprint"] == loaded.fingerprint


# Prediction


class TestLoadImages:
    @pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz", "csv", "npz"])
    def test_reads_every_source_without_labels(self, tmp_path: Path, kind: str) -> None:
        files = {"a.png": photo(0), "deep/down/b.png": photo(1), "c.png": photo(2)}
        root = write_folder(tmp_path / "photos", files)
        path = {"folder": root, "csv": root / "list.csv"}.get(kind, tmp_path / f"photos.{kind}")
        if kind == "zip":
            write_zip(path, files)
        elif kind == "tar.gz":
            write_tar(path, files)
        elif kind == "csv":
            path.write_text("image\na.png\nc.png\ndeep/down/b.png\n", encoding="utf-8")
        elif kind == "npz":
            np.savez(path, images=np.stack([noise(i, 8, 8, 3) for i in (0, 2, 1)]))
        images, ids, broken = load_images(path, image_size=(8, 8), channels=3)
        expected = np.stack([noise(i, 8, 8, 3).transpose(2, 0, 1) for i in (0, 2, 1)])
        assert np.array_equal(images.numpy(), expected)
        assert ids == (("0", "1", "2") if kind == "npz" else ("a.png", "c.png", "deep/down/b.png"))
        assert broken == ()

    def test_reads_one_file(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"a.png": photo(0), "b.png": photo(1)})
        images, ids, _ = load_images(tmp_path / "b.png", image_size=(8, 8), channels=3)
        assert images.shape == (1, 3, 8, 8)
        assert ids == ("b.png",)

    def test_converts_every_image_to_the_models_shape(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"a.png": photo(0, size=20), "b.png": photo(1, size=5, channels=1)})
        images, _, _ = load_images(tmp_path, image_size=(6, 7), channels=3)
        assert images.shape == (2, 3, 6, 7)
        assert torch.equal(images[1, 0], images[1, 2])
        grey, _, _ = load_images(tmp_path, image_size=(20, 20), channels=1)
        luma = np.asarray(Image.fromarray(noise(0, 20, 20, 3)).convert("L"))
        assert np.array_equal(grey[0, 0].numpy(), luma)

    def test_equals_the_training_images(self, tmp_path: Path) -> None:
        root = write_folder(tmp_path / "set", tree())
        loaded = load(root)
        images, ids, _ = load_images(root / "train", image_size=(8, 8), channels=3)
        assert torch.equal(images, loaded.images)
        assert tuple(f"train/{name}" for name in ids) == loaded.ids

    def test_reports_broken_files(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"a.png": photo(0), "b.png": b"", "c.png": photo(1)})
        with pytest.raises(UserError, match=r"1 of 3 images cannot be read: b.png"):
            load_images(tmp_path, image_size=(8, 8), channels=3)
        images, ids, broken = load_images(tmp_path, image_size=(8, 8), channels=3, skip_broken=True)
        assert len(images) == 2
        assert ids == ("a.png", "c.png")
        assert broken == ("b.png",)

    def test_a_table_may_name_images_by_id(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {f"photos/{i}.jpg": photo(i) for i in range(3)} | {"notes.txt": b"x"})
        table = tmp_path / "test.csv"
        table.write_text("id,age\n2,5\n0,7\n2,5\n")
        _, ids, _ = load_images(table, image_size=(8, 8), channels=3)
        assert ids == ("photos/2.jpg", "photos/0.jpg", "photos/2.jpg")
        table.write_text("id\n2\n7\n")
        with pytest.raises(UserError, match=r"1 of 2 rows name files that do not exist: 7"):
            load_images(table, image_size=(8, 8), channels=3)
        _, ids, broken = load_images(table, image_size=(8, 8), channels=3, skip_broken=True)
        assert (ids, broken) == (("photos/2.jpg",), ("7",))

    def test_counts_other_files_and_fails_on_folders_that_cannot_be_read(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_folder(tmp_path, {"a.png": photo(0), "more/b": photo(1), "x.txt": b"x", "y.csv": b"y"})
        (tmp_path / "gone").symlink_to("nowhere")
        with pytest.raises(UserError, match=r"1 folders or links cannot be read: gone \(a link to nothing\)"):
            load_images(tmp_path, image_size=(8, 8), channels=3)
        _, ids, broken = load_images(tmp_path, image_size=(8, 8), channels=3, skip_broken=True)
        assert (ids, broken) == (("a.png", "more/b"), ("gone",))
        assert "not images, and left out: .csv files: 1, .txt files: 1" in caplog.text

    def test_uses_the_test_images_of_medmnist(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "x.npz", train_images=noise(0, 5, 8, 8), test_images=noise(1, 3, 8, 8))
        images, ids, _ = load_images(tmp_path / "x.npz", image_size=(8, 8), channels=1)
        assert np.array_equal(images[:, 0].numpy(), noise(1, 3, 8, 8))
        assert ids == ("test/0", "test/1", "test/2")

    @pytest.mark.parametrize("write", [write_folder, write_zip])
    def test_no_images_are_an_error(self, tmp_path: Path, write: Any) -> None:
        path = write(tmp_path / {write_folder: "set", write_zip: "set.zip"}[write], {"notes.txt": b"x"})
        with pytest.raises(UserError, match="no images found"):
            load_images(path, image_size=(8, 8), channels=3)


# The built-in sets


def write_stl10(root: Path, train: int = 40, test: int = 20) -> Path:
    """Write small files in STL-10's binary format: column-major planes of 96², labels from 1."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for part, count, seed in (("train", train, 0), ("test", test, 1)):
        (folder / f"{part}_X.bin").write_bytes(noise(seed, count, 3, 96, 96).tobytes())
        (folder / f"{part}_y.bin").write_bytes((np.arange(count) % 10 + 1).astype(np.uint8).tobytes())
    (folder / "class_names.txt").write_text("\n".join(CLASSES), encoding="utf-8")
    return root


CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def write_cifar(root: Path, name: str, labels_of: int) -> Path:
    folder = root / ("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")
    folder.mkdir(parents=True)
    batches = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if name == "cifar10" else ["train", "test"]
    names_key, labels_key = ("label_names", "labels") if name == "cifar10" else ("fine_label_names", "fine_labels")
    for seed, batch in enumerate(batches):
        content = {"data": noise(seed, 2 * labels_of, 3072), labels_key: [i % labels_of for i in range(2 * labels_of)]}
        (folder / batch).write_bytes(pickle.dumps(content))
    meta = "batches.meta" if name == "cifar10" else "meta"
    (folder / meta).write_bytes(pickle.dumps({names_key: [f"class{i:02d}" for i in range(labels_of)]}))
    return root


def write_fashion(root: Path, train: int = 40, test: int = 20, packed: bool = False) -> Path:
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count, seed in (("train", train, 0), ("t10k", test, 1)):
        images = bytes([0, 0, 8, 3]) + np.array([count, 28, 28], ">u4").tobytes() + noise(seed, count, 28, 28).tobytes()
        labels = bytes([0, 0, 8, 1]) + np.array([count], ">u4").tobytes() + bytes(i % 10 for i in range(count))
        for name, content in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            (folder / name).write_bytes(content)
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return root


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


class TestStl10:
    @pytest.mark.parametrize("by", ["root", "data path", "its own folder"])
    def test_is_read_from_torchvisions_files(self, tmp_path: Path, by: str) -> None:
        write_stl10(tmp_path / "data")
        options: dict[str, Any] = {
            "root": {"data_root": tmp_path / "data"},
            "data path": {"data_path": tmp_path / "data"},
            "its own folder": {"data_path": tmp_path / "data" / "stl10_binary"},
        }[by]
        loaded = load_dataset(DataConfig(name="stl10"), **options)
        assert loaded.name == "stl10"
        assert loaded.classes == CLASSES
        assert loaded.images.shape == (40, 3, 96, 96)
        assert loaded.labels.tolist() == [i % 10 for i in range(40)]
        assert loaded.n_test == 20
        assert loaded.has_own_test
        # The format is column-major: Coates et al., https://cs.stanford.edu/~acoates/stl10/
        assert np.array_equal(loaded.images.numpy(), noise(0, 40, 3, 96, 96).transpose(0, 1, 3, 2))
        assert np.array_equal(loaded.open_test().images.numpy(), noise(1, 20, 3, 96, 96).transpose(0, 1, 3, 2))

    def test_equals_torchvisions_own_reading(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision.datasets import STL10

        write_stl10(tmp_path)
        monkeypatch.setattr(STL10, "_check_integrity", lambda _: True)
        reference = STL10(tmp_path, split="train")
        loaded = load_dataset(DataConfig(name="stl10"), data_root=tmp_path)
        assert np.array_equal(loaded.images.numpy(), reference.data)
        assert loaded.labels.tolist() == reference.labels.tolist()

    def test_unpublished_files_are_reported(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        load_dataset(DataConfig(name="stl10"), data_root=write_stl10(tmp_path))
        assert "not the published files: train_X.bin, train_y.bin, test_X.bin, test_y.bin" in caplog.text

    def test_is_cached_until_its_files_change(self, tmp_path: Path) -> None:
        write_stl10(tmp_path / "data")
        options = {"data_root": tmp_path / "data", "cache_dir": tmp_path / "cache"}
        before = load_dataset(DataConfig(name="stl10"), **options)
        assert same(before, load_dataset(DataConfig(name="stl10"), **options))
        file = tmp_path / "data/stl10_binary/train_X.bin"
        file.write_bytes(noise(5, 40, 3, 96, 96).tobytes())
        assert load_dataset(DataConfig(name="stl10"), **options).fingerprint != before.fingerprint

    @pytest.mark.parametrize("length", [1000, 27648 * 39])
    def test_truncated_files_are_refused(self, tmp_path: Path, length: int) -> None:
        file = write_stl10(tmp_path) / "stl10_binary/train_X.bin"
        file.write_bytes(file.read_bytes()[:length])
        with pytest.raises(UserError, match=r"its files are damaged .*; remove that folder and run again"):
            load_dataset(DataConfig(name="stl10"), data_root=tmp_path)

    def test_an_incomplete_folder_is_not_used_as_the_users_images(self, tmp_path: Path) -> None:
        (write_stl10(tmp_path) / "stl10_binary/test_y.bin").unlink()
        with pytest.raises(UserError, match=r"stl10 is not in .*stl10_binary, and downloading is off"):
            load_dataset(DataConfig(name="stl10"), data_path=tmp_path, download=False)

    def test_other_images_can_be_used_instead(self, tmp_path: Path) -> None:
        loaded = load_dataset(DataConfig(name="stl10"), data_path=write_zip(tmp_path / "mine.zip", tree()))
        assert loaded.name == "mine"  # not named STL-10
        assert loaded.classes == ("cat", "dog")


class TestCifar:
    @pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
    def test_is_read_from_torchvisions_files(self, tmp_path: Path, name: str, classes: int) -> None:
        loaded = load_dataset(DataConfig(name=name), data_root=write_cifar(tmp_path, name, classes))
        assert len(loaded.classes) == classes
        assert loaded.images.shape[1:] == (3, 32, 32)
        assert len(loaded.images) == (10 if name == "cifar10" else 2) * classes
        assert loaded.n_test == 2 * classes
        assert np.array_equal(loaded.images[0].numpy(), noise(0, 2 * classes, 3072)[0].reshape(3, 32, 32))

    def test_a_pickle_with_code_is_refused(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "run",)

        folder = write_cifar(tmp_path, "cifar10", 10) / "cifar-10-batches-py"
        (folder / "data_batch_3").write_bytes(pickle.dumps(Evil()))
        with pytest.raises(UserError, match="data_batch_3: it names pathlib"):
            load_dataset(DataConfig(name="cifar10"), data_root=tmp_path)
        assert not (tmp_path / "run").exists()


def test_fashion_mnist_is_read_from_torchvisions_files(tmp_path: Path) -> None:
    loaded = load_dataset(DataConfig(name="fashion_mnist"), data_root=write_fashion(tmp_path))
    assert loaded.images.shape == (40, 1, 28, 28)
    assert loaded.classes[0] == "T-shirt/top"
    assert np.array_equal(loaded.images[:, 0].numpy(), noise(0, 40, 28, 28))
    assert loaded.n_test == 20


@pytest.mark.parametrize("name", ["stl10", "cifar10", "cifar100", "fashion_mnist"])
class TestMissingFiles:
    def error(self, name: str, root: Path, download: bool) -> str:
        with pytest.raises(UserError) as caught:
            load_dataset(DataConfig(name=name), data_root=root, download=download)
        return str(caught.value)

    @pytest.mark.usefixtures("no_network")
    @pytest.mark.parametrize("download", [True, False])
    def test_the_error_names_files_sizes_and_folders(self, tmp_path: Path, name: str, download: bool) -> None:
        message = self.error(name, tmp_path / "data", download)
        info = next(info for info in catalogue(tmp_path / "data") if info.name == name)
        assert "\n" not in message
        assert f"{name} is not in {info.path}" in message  # folder
        assert ".gz (" in message  # file
        assert "GB)" in message or "MB)" in message  # size
        assert f" to {tmp_path / 'data'}" in message  # destination
        assert "`hpo run digits`, which needs nothing" in message
        assert ("Network is unreachable" in message) == download
        assert ("downloading is off" in message) != download

    @pytest.mark.usefixtures("no_network")
    def test_no_empty_folder_remains(self, tmp_path: Path, name: str) -> None:
        self.error(name, tmp_path / "data", True)
        assert not (tmp_path / "data").exists()

    def test_urls_and_files_match_torchvision(self, name: str) -> None:
        from core.data.builtin import _KNOWN, _torch_class

        known = _KNOWN[name]
        kind = _torch_class(known)
        if name == "fashion_mnist":
            assert list(known.archives) == [file for file, _ in kind.resources]
            assert known.url == kind.mirrors[0]
        else:
            assert known.url + known.archives[0] == kind.url
            assert known.folder == kind.base_folder
            published = {file for file, _ in kind.train_list + kind.test_list} - {"unlabeled_X.bin"}
            assert published <= set(known.files)


@pytest.mark.usefixtures("no_network")
def test_an_existing_archive_is_unpacked_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import STL10
    from torchvision.datasets.utils import calculate_md5

    write_stl10(tmp_path / "made")
    (tmp_path / "data").mkdir()
    archive = tmp_path / "data" / "stl10_binary.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(tmp_path / "made" / "stl10_binary", "stl10_binary")
    with pytest.raises(UserError, match="stl10 is not in"):  # not the published archive
        load_dataset(DataConfig(name="stl10"), data_root=tmp_path / "data")
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(tmp_path / "made" / "stl10_binary", "stl10_binary")
    monkeypatch.setattr(STL10, "tgz_md5", calculate_md5(archive))
    assert load_dataset(DataConfig(name="stl10"), data_root=tmp_path / "data", download=False).n_test == 20


class TestCatalogue:
    def test_lists_all_sets_and_whether_they_are_on_disk(self, tmp_path: Path) -> None:
        write_stl10(tmp_path)
        lines = {info.name: info for info in catalogue(tmp_path)}
        assert list(lines) == ["digits", "stl10", "cifar10", "cifar100", "fashion_mnist"]
        assert {name for name, info in lines.items() if info.on_disk} == {"digits", "stl10"}
        assert lines["digits"].path is None
        assert lines["digits"].download_bytes == 0
        assert lines["digits"].images == 1797
        assert lines["stl10"].path == tmp_path / "stl10_binary"
        assert lines["stl10"].images == 13_000
        assert lines["stl10"].size == "96×96×3"


# Real sets


class TestRealSets:
    @pytest.mark.slow
    def test_scenes(self, shared_data: Path, tmp_path: Path) -> None:
        config = DataConfig(name=str(shared_data / "scenes5k.zip"), near_duplicates="ignored")  # which take a minute
        loaded = load_dataset(config, cache_dir=tmp_path)
        assert loaded.name == "scenes5k"
        assert loaded.images.shape == (5000, 3, 96, 96)
        assert loaded.n_test == 2997
        assert (loaded.report.broken, loaded.report.leaked, loaded.report.conflicting) == ((), 0, 0)
        started = time.perf_counter()
        again = load_dataset(config, cache_dir=tmp_path)
        assert time.perf_counter() - started < 0.2
        assert again.fingerprint == loaded.fingerprint
        splits = split(again, DataConfig(val_fraction=0.1))
        assert len(splits.val) == 500
        pixels = again.images[splits.train].numpy()
        assert splits.mean[0] == pytest.approx(pixels[:, 0].mean(dtype=np.float64) / 255, abs=1e-9)

    def test_trashnet_gets_a_stratified_test_set(self, shared_data: Path) -> None:
        loaded = load_dataset(DataConfig(), data_path=shared_data / "trashnet96.zip")
        assert len(loaded.images) + loaded.n_test == 2524
        total = torch.bincount(loaded.labels) + torch.bincount(loaded.open_test().labels)
        shares = torch.bincount(loaded.open_test().labels) / total
        assert shares.tolist() == pytest.approx([0.2] * 6, abs=0.005)
