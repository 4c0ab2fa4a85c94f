"""Images recognized by content, and formats that a plugin of Pillow reads."""

from __future__ import annotations

import functools
import importlib
import importlib.util

# Bytes at the start of a file that decide whether it is an image.
HEAD_BYTES = 32

_MAGIC = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"P4", b"P5", b"P6",
    b"\0\0\0\x0cjP  ",
)  # fmt: skip
_ISO_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"heif")


def looks_like_image(head: bytes) -> bool:
    """Return whether a file that begins with these bytes is an image of a known format."""
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    if head[4:8] == b"ftyp":
        return head[8:12] in _ISO_BRANDS
    if head[:2] in (b"P4", b"P5", b"P6"):
        return head[2:3].isspace()
    if head[:2] == b"BM":  # two letters of text too; the reserved fields of a bitmap are zero
        return head[6:10] == bytes(4)
    return head.startswith(_MAGIC)


def is_heif(head: bytes) -> bool:
    """Return whether these are the first bytes of a HEIC or HEIF file."""
    return head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"heif")


@functools.cache
def plugin_formats() -> tuple[str, ...]:
    """Register the HEIF plugin of Pillow, if it is installed, and return its format's name."""
    if importlib.util.find_spec("pillow_heif") is None:
        return ()
    importlib.import_module("pillow_heif").register_heif_opener()
    return ("HEIF",)
