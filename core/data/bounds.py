"""Size limits for images, archives and array files, against decompression bombs.

Sizes are checked as declared in headers, before anything is unpacked.
"""

from __future__ import annotations

import os
import stat

from core.data.decode import MAX_PIXELS, BrokenImageError
from core.errors import UserError

# Encoded image: three bytes per pixel at the maximum number of pixels.
MAX_IMAGE_BYTES = 3 * MAX_PIXELS

# Table of labels: 10 million rows of a hundred bytes.
MAX_TABLE_BYTES = 1 << 30

# Archive members: each takes about a kilobyte of memory to list. ImageNet has 1.3 million.
MAX_MEMBERS = 2_000_000

# Maximum ratio of unpacked to packed size, checked above the given size. Images never exceed it for gigabytes; deflate
# is limited to 1032:1, bzip2 exceeds 1,000,000:1.
MAX_RATIO = 100
HARMLESS_BYTES = 1 << 30

# Link target: PATH_MAX of Linux.
MAX_LINK_BYTES = 4096

# Text of a tar header. `tarfile` before Python 3.11.10 may take quadratic time on it (CVE-2024-6232), about a second at
# this size.
MAX_HEADER_BYTES = 1 << 15


def check_members(where: str, count: int, unpacked: int, packed: int, advice: str) -> None:
    """Raise if an archive has too many members, or unpacks to far more than images do.

    Args:
        where: name of the archive, for the error message.
        count: members so far.
        unpacked: their size in bytes.
        packed: size of the archive in bytes.
        advice: what the user can do if the archive is trusted.

    Raises:
        UserError: a limit is exceeded.
    """
    if count > MAX_MEMBERS:
        raise UserError(f"{where}: more than {MAX_MEMBERS:,} members; {advice}")
    if unpacked > max(HARMLESS_BYTES, MAX_RATIO * packed):
        raise UserError(
            f"{where}: a decompression bomb: its {_size(packed)} unpack to {_size(unpacked)} or more; {advice}"
        )


def check_image_bytes(size: int) -> None:
    """Raise BrokenImageError if a file is larger than an image may be."""
    if size > MAX_IMAGE_BYTES:
        raise BrokenImageError(f"{_size(size)}, and an image has {_size(MAX_IMAGE_BYTES)} at most")


def check_table_bytes(where: str, size: int) -> None:
    """Raise UserError if a file is larger than a table may be."""
    if size > MAX_TABLE_BYTES:
        raise UserError(f"{where}: {_size(size)}, and a table has {_size(MAX_TABLE_BYTES)} at most")


def read_image_file(path: str) -> bytes:
    """Read a file that may be an image.

    Raises:
        BrokenImageError: it is a pipe, a device, or too large.
        OSError: it cannot be read.
    """
    # A file object would take half of the time of a small image. A pipe that is opened so does not wait for a writer.
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise BrokenImageError("not a file")
        check_image_bytes(status.st_size)
        content = os.read(file, status.st_size)
        while len(content) < status.st_size and (more := os.read(file, status.st_size - len(content))):
            content += more
    finally:
        os.close(file)
    return content


def _size(count: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"
