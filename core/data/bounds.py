"""How large an image, an archive and an array file may be, so that a few hostile kilobytes cannot fill a machine.

A file says itself how much it unpacks to, and a bomb says so truly: what is asked here is asked before anything is
unpacked. The bounds lie far above every real set of images, and their errors say what to do with one that they hit.
"""

from __future__ import annotations

import stat
from pathlib import Path

from core.data.decode import MAX_PIXELS, BrokenImageError
from core.errors import UserError

# An encoded image: three bytes for each of the most pixels that one may have. No codec makes it larger on purpose.
MAX_IMAGE_BYTES = 3 * MAX_PIXELS

# Members of an archive. Each costs a kilobyte of memory before the first image is read; ImageNet has 1.3 million.
MAX_MEMBERS = 2_000_000

# Bytes that an archive unpacks to for one of its own, and the whole below which that is no matter: a label file of one
# class or a blank page shrinks a thousandfold, but images do not, and never gigabytes of them (deflate ends at 1032:1,
# bzip2 beyond 1,000,000:1).
MAX_RATIO = 100
HARMLESS_BYTES = 1 << 30

# A link's target: what Linux takes for a path (PATH_MAX).
MAX_LINK_BYTES = 4096

# A tar header's own text: paths, dates and attributes. `tarfile` before Python 3.11.10 may search it in a time that
# grows with its square (CVE-2024-6232), here to a second.
MAX_HEADER_BYTES = 1 << 15


def check_members(where: str, count: int, unpacked: int, packed: int, advice: str) -> None:
    """Refuses what unpacks to far more than images do, or has too many members.

    Args:
        count: members so far.
        unpacked: bytes that they unpack to.
        packed: bytes of the file that holds them.
        advice: what to do where it is no attack.

    Raises:
        UserError: it is one, by the bounds above.
    """
    if count > MAX_MEMBERS:
        raise UserError(f"{where}: more than {MAX_MEMBERS:,} members; {advice}")
    if unpacked > max(HARMLESS_BYTES, MAX_RATIO * packed):
        raise UserError(
            f"{where}: a decompression bomb: its {_size(packed)} unpack to {_size(unpacked)} or more; {advice}"
        )


def check_image_bytes(size: int) -> None:
    """Raises BrokenImageError where a file is larger than an image may be."""
    if size > MAX_IMAGE_BYTES:
        raise BrokenImageError(f"{_size(size)}, and an image has {_size(MAX_IMAGE_BYTES)} at most")


def read_image_file(path: Path) -> bytes:
    """The bytes of a file that may be an image.

    Raises:
        BrokenImageError: it is a pipe or a device, which may never end, or too large.
        OSError: it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BrokenImageError("not a file")
    check_image_bytes(status.st_size)
    return path.read_bytes()


def _size(count: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"
