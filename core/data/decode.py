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

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from core.data.sniffing import HEAD_BYTES, is_heif, plugin_formats

Pixels = NDArray[np.uint8]

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

# 16-bit samples are divided by 65535 / 255 = 257, so white stays white.
SIXTEEN_TO_EIGHT = 257


# Keys of `Image.info` in which Pillow looks for an orientation.
_METADATA = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}


class BrokenImageError(Exception):
    """Bytes that are not a complete image, or whose values have no defined range. Its text is the reason."""


@dataclass(frozen=True)
class Decoded:
    """An image with measurements taken while it is in the CPU cache."""

    pixels: Pixels  # (C, H, W); C is 1 if the image is grey, else 3
    digest: bytes  # SHA-256 of shape and pixels, equal for images that look the same
    moments: NDArray[np.int64]  # (C, 2): sums of pixels and of squared pixels per channel, for exact mean and deviation


def decode(payload: bytes | Pixels, size: tuple[int, int] | None) -> Decoded:
    """Read an image with `read_pixels`, and measure it.

    Raises:
        BrokenImageError: the bytes are not a valid image.
    """
    pixels = read_pixels(payload, size)
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(pixels.data)
    return Decoded(pixels, digest.digest(), _moments(pixels))


def read_pixels(payload: bytes | Pixels | Image.Image, size: tuple[int, int] | None) -> Pixels:
    """Read a file's bytes, an array (H, W) or (H, W, 1|3|4), or a Pillow image as (1|3, H, W).

    It is resized to `size` (H, W), if given, by Pillow's antialiased bicubic filter. Grey images have one channel.

    Raises:
        BrokenImageError: it is not a valid image.
    """
    if isinstance(payload, bytes):
        return _drop_equal_channels(_read(payload, size))
    if isinstance(payload, Image.Image):
        return _drop_equal_channels(_show(payload, size))
    if payload.ndim == 3 and payload.shape[2] == 1:
        payload = payload[..., 0]
    if size is None and (payload.ndim == 2 or payload.shape[2] == 3):
        return _drop_equal_channels(payload)
    return _drop_equal_channels(_to_array(_as_seen(Image.fromarray(np.ascontiguousarray(payload))), size))


def to_channels(pixels: Pixels, channels: int) -> Pixels:
    """Convert (1|3, H, W) to (channels, H, W): grey is repeated, colour becomes luma (ITU-R 601, as in Pillow)."""
    if len(pixels) == channels:
        return pixels
    if channels == 3:
        return np.broadcast_to(pixels, (3, *pixels.shape[1:]))
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).convert("L"))[None]


def _read(payload: bytes, size: tuple[int, int] | None) -> Pixels:
    with _refusing():
        try:
            with Image.open(io.BytesIO(payload), formats=FORMATS + plugin_formats()) as image:
                _check_pixels(image)
                return _to_array(_as_seen(image), size)
        except UnidentifiedImageError as error:  # its message contains a memory address
            raise BrokenImageError(_unidentified(payload)) from error


def _unidentified(payload: bytes) -> str:
    if is_heif(payload[:HEAD_BYTES]):
        return "HEIC, which needs the package pillow-heif"
    return "not an image" if payload else "an empty file"


def _show(image: Image.Image, size: tuple[int, int] | None) -> Pixels:
    """Pixels of an image opened by the caller, who may use it afterwards."""
    with _refusing():
        _check_pixels(image)
        return _to_array(_as_seen(image.copy()), size)


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


def _as_seen(image: Image.Image) -> Image.Image:
    """The image upright, opaque, in mode L or RGB."""
    _turn_upright(image)
    if image.mode.startswith("I"):  # I;16, I;16B, and I, which Pillow uses for 16-bit PGM too
        samples = np.asarray(image).astype(np.int64)
        low, high = int(samples.min()), int(samples.max())
        if low < 0 or high > 65535:
            raise ValueError(f"32-bit pixels from {low} to {high} have no defined range: save it with 8 or 16 bits")
        return Image.fromarray(((samples + SIXTEEN_TO_EIGHT // 2) // SIXTEEN_TO_EIGHT).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range: save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


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
        moments[:, 0] += part.sum(1)
        moments[:, 1] += np.einsum("ci,ci->c", part, part)
    return moments
