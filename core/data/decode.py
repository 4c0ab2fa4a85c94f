"""Decoding of one image to uint8 pixels as displayed.

EXIF orientation, transparency, 16-bit samples and colour spaces are applied here. An image with equal channels is
stored as grey, so a picture has the same digest as a greyscale or RGB file.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from core.data.sniffing import HEAD_BYTES, is_heif, plugin_formats

Pixels = NDArray[np.uint8]
Samples = NDArray[np.uint8] | NDArray[np.uint16]

# File name suffixes of images. Other files in a class folder (notes, .DS_Store) are ignored.
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".jp2", ".avif",
    ".heic", ".heif",
))  # fmt: skip

# Accepted formats, independent of the name, beside those of plugins. Pillow has forty more; for EPS it runs Ghostscript
# on the file.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")

# Maximum pixels: Pillow's limit, a quarter of a gigabyte at three bytes each. Pillow warns above it and refuses twice
# as many; here both are refused.
MAX_PIXELS = 1024**3 // 4 // 3

# Pixels per channel that are converted to 64 bits at once, to limit memory.
_AT_ONCE = 1 << 20

# Largest 16-bit sample. It becomes 255, so white stays white.
SIXTEEN_BIT_TOP = 65535

# 16-bit samples that all lie below this are values of 12 bits or fewer; nearly black on the scale of 16 bits.
TWELVE_BITS = 4096

# Colours of a TIFF by its PhotometricInterpretation: black and white, RGB, palette, CMYK, YCbCr, CIE Lab.
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}
_PHOTOMETRIC, _SAMPLES_PER_PIXEL, _EXTRA_SAMPLES = 262, 277, 338
_ALPHA = (1, 2)  # Values of ExtraSamples for transparency

_TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


# Keys of `Image.info` in which Pillow looks for an orientation.
_METADATA = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}


class BrokenImageError(Exception):
    """Bytes that are not a complete image, or whose values have no defined range. Its text is the reason."""


class UnknownBandError(BrokenImageError):
    """An image with a band beside its colours of which the file does not declare the meaning."""


@dataclass(frozen=True)
class Values:
    """The meaning of the samples of a data set's images, where their files leave it open."""

    channels: Literal["rgb", "rgba"] | None = None
    """See `DataConfig.channels`."""
    top: int = SIXTEEN_BIT_TOP
    """The 16-bit sample that is white."""


PLAIN = Values()


def range_of(highest: int) -> int:
    """Return the 16-bit sample that is white in a set whose largest sample is `highest`.

    Below `TWELVE_BITS`, it is the largest number of as many bits, at least 8: 4,095 for 12 bits. It is rounded up so
    that a few more images do not change the scale.
    """
    if highest == 0 or highest >= TWELVE_BITS:
        return SIXTEEN_BIT_TOP
    return max(255, (1 << highest.bit_length()) - 1)


class Decoded(NamedTuple):
    """An image with measurements taken while it is in the CPU cache."""

    pixels: Pixels  # (C, H, W); C is 1 if the image is grey, else 3
    digest: bytes  # SHA-256 of shape and pixels, equal for images that look the same
    moments: NDArray[np.int64]  # (C, 2): sums of pixels and of squared pixels per channel, for exact mean and deviation
    top: int  # the largest sample of a 16-bit image; 0 for other images
    coarse: bool  # whether only the upper 8 of its 16 bits could be read, as in colour images


@dataclass(frozen=True)
class _Seen:
    """An image upright and opaque, in mode L or RGB."""

    image: Image.Image
    top: int = 0
    coarse: bool = False


def decode(payload: bytes | Samples, size: tuple[int, int] | None, values: Values = PLAIN) -> Decoded:
    """Read an image with `read_pixels`, and measure it.

    Raises:
        BrokenImageError: the bytes are not a valid image.
    """
    pixels, top, coarse = _measured(payload, size, values)
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(pixels.data)
    return Decoded(pixels, digest.digest(), _moments(pixels), top, coarse)


def read_pixels(payload: bytes | Samples | Image.Image, size: tuple[int, int] | None, values: Values = PLAIN) -> Pixels:
    """Read a file's bytes, an array (H, W) or (H, W, 1|3|4), or a Pillow image as (1|3, H, W).

    It is resized to `size` (H, W), if given, by Pillow's antialiased bicubic filter. Grey images have one channel.

    Raises:
        UnknownBandError: it has a fourth band of unknown meaning, and `values` does not choose one.
        BrokenImageError: it is not a valid image.
    """
    return _measured(payload, size, values)[0]


def _measured(
    payload: bytes | Samples | Image.Image, size: tuple[int, int] | None, values: Values
) -> tuple[Pixels, int, bool]:
    """The pixels, and `Decoded.top` and `Decoded.coarse`."""
    if isinstance(payload, bytes | Image.Image):
        seen = _read(payload, values) if isinstance(payload, bytes) else _show(payload, values)
        return _drop_equal_channels(_to_array(seen.image, size)), seen.top, seen.coarse
    top = int(payload.max()) if payload.dtype == np.uint16 else 0
    samples = _eight_bits(payload, values.top) if top else payload.astype(np.uint8, copy=False)
    if samples.ndim == 3 and samples.shape[2] == 1:
        samples = samples[..., 0]
    if samples.ndim == 3 and samples.shape[2] == 4 and values.channels != "rgba":
        if values.channels is None:
            raise UnknownBandError("4 channels, and an array does not say what the fourth is")
        samples = samples[..., :3]
    if size is not None or (samples.ndim == 3 and samples.shape[2] == 4):
        seen = _as_seen(Image.fromarray(np.ascontiguousarray(samples)), values, in_place=True)
        samples = _to_array(seen.image, size)
    return _drop_equal_channels(samples), top, False


def to_channels(pixels: Pixels, channels: int) -> Pixels:
    """Convert (1|3, H, W) to (channels, H, W): grey is repeated, colour becomes luma (ITU-R 601, as in Pillow)."""
    if len(pixels) == channels:
        return pixels
    if channels == 3:
        return np.broadcast_to(pixels, (3, *pixels.shape[1:]))
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).convert("L"))[None]


def _read(payload: bytes, values: Values) -> _Seen:
    with _refusing():
        try:
            with Image.open(io.BytesIO(payload), formats=FORMATS + plugin_formats()) as image:
                _check_pixels(image)
                return _as_seen(image, values, in_place=True)
        except UnidentifiedImageError as error:  # its message contains a memory address
            raise BrokenImageError(_unidentified(payload)) from error


def _unidentified(payload: bytes) -> str:
    if is_heif(payload[:HEAD_BYTES]):
        return "HEIC, which needs the package pillow-heif"
    if payload.startswith(_TIFF_HEADS):
        return "a TIFF of an unknown kind of pixels; save it with 1 or 3 bands of 8 or 16 bits"
    return "not an image" if payload else "an empty file"


def _show(image: Image.Image, values: Values) -> _Seen:
    """An image opened by the caller, who may use it afterwards."""
    with _refusing():
        _check_pixels(image)
        return _as_seen(image, values, in_place=False)


@contextmanager
def _refusing() -> Iterator[None]:
    """Raise BrokenImageError for any error of Pillow."""
    try:
        yield
    except BrokenImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # if warnings are errors
        raise BrokenImageError(_BOMB) from error
    except Exception as error:  # codecs raise many types on damaged files
        raise BrokenImageError((str(error) or type(error).__name__).splitlines()[0]) from error


_BOMB = f"a decompression bomb: it has more than {MAX_PIXELS:,} pixels"


def _check_pixels(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise BrokenImageError(_BOMB)


def _check_bands(image: Image.Image, values: Values) -> bool:
    """Whether a fourth band of a TIFF is to be ignored.

    Raises:
        UnknownBandError: it has a band beside its colours, of unknown meaning, and `values` does not choose one.
    """
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return False
    bands, colours = tags.get(_SAMPLES_PER_PIXEL, 1), _COLOURS.get(tags.get(_PHOTOMETRIC))
    extra = tags.get(_EXTRA_SAMPLES)
    extra = extra if isinstance(extra, tuple) else () if extra is None else (extra,)
    if colours is None or bands <= colours or (bands == colours + 1 and extra[:1] in ((1,), (2,))):
        return False
    if values.channels is None:
        raise UnknownBandError(f"{bands} bands, and the file does not declare what the {_ORDINALS[colours]} is")
    if values.channels == "rgba" and (extra[:1] == (0,) or bands > colours + 1):
        raise BrokenImageError(f"{bands} bands, and the file declares that the {_ORDINALS[colours]} is no transparency")
    return values.channels == "rgb"


_ORDINALS = {1: "second", 3: "fourth", 4: "fifth"}


def _is_sixteen_bit_colour(image: Image.Image) -> bool:
    """Whether Pillow reads the upper 8 bits of 16-bit samples only, as it does in colour images."""
    in_colour = image.mode in ("RGB", "RGBA", "LA")
    return in_colour and any(";16" in str(tile.args) for tile in getattr(image, "tile", ()))


def _eight_bits(samples: NDArray[Any], top: int) -> Pixels:
    """Scale samples from 0 to `top` to 0 to 255, rounded; larger ones are cut off."""
    scaled = (samples.astype(np.int64) * 255 + top // 2) // top
    return np.minimum(scaled, 255).astype(np.uint8)


def _as_seen(image: Image.Image, values: Values, *, in_place: bool) -> _Seen:
    ignored = _check_bands(image, values)
    coarse = _is_sixteen_bit_colour(image)
    if not in_place:
        image = image.copy()
    _turn_upright(image)
    if image.mode.startswith("I"):  # I;16, I;16B, and I, which Pillow uses for 16-bit PGM too
        samples = np.asarray(image).astype(np.int64)
        low, high = int(samples.min()), int(samples.max())
        if low < 0 or high > 65535:
            raise ValueError(f"32-bit pixels from {low} to {high} have no defined range: save it with 8 or 16 bits")
        return _Seen(Image.fromarray(_eight_bits(samples, values.top)), high)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range: save it with 8 or 16 bits")
    top = 257 * _largest(image) if coarse else 0
    if image.has_transparency_data and not ignored:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    return _Seen(image if image.mode == mode else image.convert(mode), top, coarse)


def _largest(image: Image.Image) -> int:
    """Largest value of the colours, without transparency."""
    return int(np.asarray(image.convert(image.mode.removesuffix("A"))).max())


def _turn_upright(image: Image.Image) -> None:
    """Apply the orientation in the metadata, without Pillow's search if there are none: a quarter of a small PNG."""
    image.load()  # a PNG may have them after its pixels
    if hasattr(image, "tag_v2") or not _METADATA.isdisjoint(image.info):
        ImageOps.exif_transpose(image, in_place=True)


def _to_array(image: Image.Image, size: tuple[int, int] | None) -> Pixels:
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _drop_equal_channels(pixels: Pixels) -> Pixels:
    """(H, W) or (H, W, 3) as contiguous (1|3, H, W)."""
    if pixels.ndim == 3 and _is_grey(pixels):
        pixels = pixels[..., 0]
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _is_grey(pixels: Pixels) -> bool:
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    return bool((red == green).all() and (red == blue).all())


def _moments(pixels: Pixels) -> NDArray[np.int64]:
    flat = pixels.reshape(len(pixels), -1)
    moments = np.zeros((len(pixels), 2), dtype=np.int64)
    for start in range(0, flat.shape[1], _AT_ONCE):
        part = flat[:, start : start + _AT_ONCE].astype(np.int64)
        moments[:, 0] += np.add.reduce(part, 1)
        moments[:, 1] += np.einsum("ci,ci->c", part, part)
    return moments
