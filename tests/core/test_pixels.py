"""Sample values on the scale of the data: 12 bits in 16, undeclared fourth bands, grey and colour."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from core.data import Dataset, load_images
from core.data.decode import SIXTEEN_BIT_TOP, Values, decode, range_of
from core.errors import UserError
from tests.core.test_data import encoded, load, noise, photo, write_folder

Ramp = NDArray[np.uint16]
_EXTRA_SAMPLES = 338


def ramp(top: int, seed: int = 0) -> Ramp:
    """An 8 × 8 image with all values from 0 to `top`, of which both ends occur."""
    samples = np.random.default_rng(seed).integers(0, top + 1, (8, 8)).astype(np.uint16)
    samples[0, 0], samples[7, 7] = 0, top
    return samples


def sixteen_bit(root: Path, tops: list[int], kind: str = "PNG") -> tuple[Path, dict[str, Ramp]]:
    """Two classes with a 16-bit image for each of these largest samples, and the samples by id."""
    samples = {
        f"{name}/{i}.{kind.lower()}": ramp(top, seed=100 * k + i)
        for k, name in enumerate(("cat", "dog"))
        for i, top in enumerate(tops)
    }
    return write_folder(root, {name: encoded(Image.fromarray(a), kind) for name, a in samples.items()}), samples


def by_id(dataset: Dataset) -> dict[str, NDArray[np.uint8]]:
    test = dataset.open_test()
    pairs = [*zip(dataset.ids, dataset.images, strict=True), *zip(test.ids, test.images, strict=True)]
    return {name: image.numpy() for name, image in pairs}


# 16-bit samples


@pytest.mark.parametrize(
    ("highest", "white"),
    [(0, 65535), (1, 255), (255, 255), (256, 511), (1023, 1023), (1024, 2047), (4000, 4095), (4095, 4095),
     (4096, 65535), (65535, 65535)],
)  # fmt: skip
def test_the_range_is_that_of_the_bits_up_to_12_and_of_16_beyond(highest: int, white: int) -> None:
    assert range_of(highest) == white


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("largest", "white"), [(4095, 4095), (3000, 4095), (1023, 1023), (200, 255), (4096, 65535)])
def test_16_bit_samples_are_scaled_by_the_range_of_the_set(tmp_path: Path, kind: str, largest: int, white: int) -> None:
    root, samples = sixteen_bit(tmp_path / "set", [largest, largest // 2, largest // 3, largest // 4], kind)
    dataset = load(root)
    for name, image in by_id(dataset).items():
        assert np.array_equal(image[0], np.floor(samples[name].astype(np.int64) * 255 / white + 0.5)), name
    assert dataset.report.top == (0 if white == SIXTEEN_BIT_TOP else white)


def test_an_npz_of_16_bits_is_scaled_as_files_are(tmp_path: Path) -> None:
    root, samples = sixteen_bit(tmp_path / "set", [4095, 2000, 900, 70])
    names = sorted(samples)
    np.savez(tmp_path / "set.npz", images=np.stack([samples[n] for n in names]), labels=[n[:3] for n in names])
    files, arrays = by_id(load(root)), by_id(load(tmp_path / "set.npz"))
    for position, name in enumerate(names):
        assert np.array_equal(files[name], arrays[str(position)])


def test_8_bit_images_beside_them_keep_their_values(tmp_path: Path) -> None:
    root, _ = sixteen_bit(tmp_path / "set", [4095, 2000, 900])
    grey = noise(5, 8, 8)
    write_folder(root, {"cat/plain.png": encoded(grey)})
    assert np.array_equal(by_id(load(root))["cat/plain.png"][0], grey)


def test_a_cached_set_has_the_same_range(tmp_path: Path) -> None:
    root, _ = sixteen_bit(tmp_path / "set", [4095, 2000, 900])
    first, again = (load(root, cache_dir=tmp_path / "cache") for _ in range(2))
    assert first.report == again.report
    assert again.report.top == 4095
    assert first.fingerprint == again.fingerprint


def test_images_to_label_are_scaled_by_the_range_of_the_training_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, samples = sixteen_bit(tmp_path / "set", [1000, 300])
    values = Values(top=2047)
    found, ids, _ = load_images(root, image_size=(8, 8), channels=1, values=values)
    for name, image in zip(ids, found, strict=True):
        assert np.array_equal(image[0].numpy(), np.floor(samples[name].astype(np.int64) * 255 / 2047 + 0.5))
    assert not caplog.text
    found, _, _ = load_images(root, image_size=(8, 8), channels=1, values=Values(top=511))
    assert int(found.max()) == 255
    assert "2 images have 16-bit samples above 511, where the range of the training images ends" in caplog.text


def png_of_16_bit_colour(samples: NDArray[np.uint16]) -> bytes:
    """A PNG, which Pillow can read but not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def colour_set(root: Path, top: int) -> Path:
    draw = np.random.default_rng(0)
    return write_folder(
        root,
        {
            f"{name}/{i}.png": png_of_16_bit_colour(draw.integers(0, top + 1, (8, 8, 3)).astype(np.uint16))
            for name in ("cat", "dog")
            for i in range(4)
        },
    )


def test_12_bits_of_colour_of_which_only_4_can_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="no sample of its 16-bit images reaches 4,096, and of those in colour, such as"
    ):
        load(colour_set(tmp_path / "dark", 4095))
    assert load(colour_set(tmp_path / "full", 65535)).images.shape[1:] == (3, 8, 8)


# A fourth band


def tiff(bands: NDArray[np.uint8], extra: int | None) -> bytes:
    """A TIFF of four bands with this ExtraSamples: 0 for unspecified data, 2 for transparency, None for no tag."""
    written = encoded(Image.fromarray(bands, "RGBA"), "TIFF")
    pillows = struct.pack("<HHIHH", _EXTRA_SAMPLES, 3, 1, 2, 0)
    assert written.count(pillows) == 1
    tag = 65000 if extra is None else _EXTRA_SAMPLES
    return written.replace(pillows, struct.pack("<HHIHH", tag, 3, 1, extra or 0, 0))


def four_bands(seed: int = 0) -> NDArray[np.uint8]:
    return noise(seed, 8, 8, 4)


def over_white(bands: NDArray[np.uint8]) -> NDArray[np.uint8]:
    image = Image.fromarray(bands, "RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def tiffs(root: Path, extra: int | None) -> tuple[Path, dict[str, NDArray[np.uint8]]]:
    bands = {f"{name}/{i}.tif": four_bands(100 * k + i) for k, name in enumerate(("cat", "dog")) for i in range(4)}
    return write_folder(root, {name: tiff(four, extra) for name, four in bands.items()}), bands


@pytest.mark.parametrize(
    ("extra", "channels", "read"),
    [
        (2, None, over_white),
        (2, "rgb", over_white),
        (2, "rgba", over_white),
        (None, "rgb", lambda bands: bands[..., :3]),
        (None, "rgba", over_white),
        (0, "rgb", lambda bands: bands[..., :3]),
    ],
)
def test_a_fourth_band_is_what_the_file_declares_or_else_what_the_configuration_chooses(
    tmp_path: Path, extra: int | None, channels: str | None, read: object
) -> None:
    root, bands = tiffs(tmp_path / "set", extra)
    for name, image in by_id(load(root, {"channels": channels})).items():
        assert np.array_equal(image.transpose(1, 2, 0), read(bands[name]))  # type: ignore[operator]


@pytest.mark.parametrize("extra", [None, 0])
def test_an_undeclared_fourth_band_is_refused_with_the_choice(tmp_path: Path, extra: int | None) -> None:
    root, _ = tiffs(tmp_path / "set", extra)
    message = (
        "cat/0.tif has 4 bands, and the file does not declare what the fourth is; --set data.channels=rgb ignores "
        "it, data.channels=rgba takes it as transparency"
    )
    for skip in (False, True):
        with pytest.raises(UserError, match=re.escape(message) + "$") as raised:
            load(root, skip_broken=skip)
        assert "\n" not in str(raised.value)


def test_a_band_that_is_declared_not_to_be_transparency_is_not_taken_as_one(tmp_path: Path) -> None:
    root, _ = tiffs(tmp_path / "set", 0)
    with pytest.raises(UserError, match="4 bands, and the file declares that the fourth is no transparency"):
        load(root, {"channels": "rgba"})


def test_arrays_with_four_channels_are_refused_with_the_choice(tmp_path: Path) -> None:
    images = np.stack([four_bands(i) for i in range(8)])
    np.savez(tmp_path / "set.npz", images=images, labels=[0, 1] * 4)
    with pytest.raises(
        UserError, match=r"0 has 4 channels, and an array does not say what the fourth is; --set data\."
    ):
        load(tmp_path / "set.npz")
    for channels, read in (("rgb", lambda bands: bands[..., :3]), ("rgba", over_white)):
        for name, image in by_id(load(tmp_path / "set.npz", {"channels": channels})).items():
            assert np.array_equal(image.transpose(1, 2, 0), read(images[int(name)]))


def test_a_png_declares_its_transparency(tmp_path: Path) -> None:
    bands = four_bands()
    assert np.array_equal(decode(encoded(bands), None).pixels.transpose(1, 2, 0), over_white(bands))


def test_a_cache_distinguishes_the_choices(tmp_path: Path) -> None:
    root, _ = tiffs(tmp_path / "set", None)
    fingerprints = {load(root, {"channels": c}, cache_dir=tmp_path / "cache").fingerprint for c in ("rgb", "rgba")}
    assert len(fingerprints) == 2


def test_a_tiff_of_bands_that_cannot_be_read_is_named_as_one(tmp_path: Path) -> None:
    written = io.BytesIO(tiff(four_bands(), 0)).getvalue()
    photometric = struct.pack("<HHIHH", 262, 3, 1, 2, 0)
    assert written.count(photometric) == 1
    grey = written.replace(photometric, struct.pack("<HHIHH", 262, 3, 1, 1, 0))
    root = write_folder(tmp_path / "set", {"cat/a.tif": grey, "cat/b.png": photo(1), "dog/c.png": photo(2)})
    with pytest.raises(UserError, match=r"cat/a\.tif \(a TIFF of an unknown kind of pixels; save it with 1 or 3 bands"):
        load(root)


# Grey and colour


@pytest.mark.parametrize(("grey", "colour", "channels"), [(6, 0, 1), (0, 6, 3), (2, 4, 3)])
def test_the_report_counts_grey_images(tmp_path: Path, grey: int, colour: int, channels: int) -> None:
    files = {
        f"{name}/{i}.png": photo(100 * k + i, channels=1 if i < grey else 3)
        for k, name in enumerate(("cat", "dog"))
        for i in range(grey + colour)
    }
    dataset = load(write_folder(tmp_path / "set", files))
    assert dataset.report.grey == 2 * grey
    assert dataset.images.shape[1] == channels
