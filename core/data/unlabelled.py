"""Images without labels, to be predicted: decoded, asked about and let go of, batch by batch.

The key choice is that a function goes along the images, in place of the images to the function: however many there are,
a few batches of pixels are in memory at a time, and what the function says of each. The decoder's threads read ahead
while it works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.data.decode import Decoded, to_channels
from core.data.ingest import decode_all, report_broken
from core.data.layout import Entry, is_image
from core.data.source import Payload, Source
from core.data.sources import open_source
from core.errors import UserError

# Images that `load_images` copies at once.
LOADED_AT_ONCE = 256


def map_images(
    paths: Path | Sequence[Path],
    function: Callable[[Tensor], Tensor],
    *,
    image_size: tuple[int, int],
    channels: int,
    batch_size: int,
    skip_broken: bool = False,
) -> tuple[Tensor, tuple[str, ...], tuple[str, ...]]:
    """What a function says of every image of a folder, a .zip, a tar, an .npz, a CSV of paths, one file, or several.

    An .npz is mapped where it is not compressed, and otherwise lies in memory whole.

    Args:
        paths: where they lie; folders within do not matter.
        function: takes images (n, channels, H, W) uint8, n at most `batch_size`, which hold until it returns, and gives
            (n, …) on the CPU. It meets an image of a tar that holds it twice twice, and the later one counts.
        image_size: (height, width) that they are resized to.
        channels: 1 or 3.
        skip_broken: leaves unreadable images out, where they would otherwise be an error, after the last was looked at.

    Returns:
        (N, …) of the images in the order of their ids: sorted, or as the CSV or .npz has them; the ids, within the one
        source, or of several as paths; and the ids of those left out.

    Raises:
        UserError: there is no image, or one is broken, or the memory has no room for all answers.
    """
    images = _Single(open_source(paths)) if isinstance(paths, Path) else _Several(tuple(paths))
    entries = images.entries
    if not entries:
        raise UserError(f"{images.where}: no image in it")
    answers: NDArray[np.generic] | None = None
    broken: dict[int, Exception] = {}
    batch = np.empty((min(batch_size, len(entries)), channels, *image_size), dtype=np.uint8)
    for positions, results in _in_batches(decode_all(images, entries, image_size), len(batch), broken):
        for place, result in enumerate(results):
            batch[place] = to_channels(result.pixels, channels)
        answer = function(torch.from_numpy(batch[: len(results)])).numpy()
        if answers is None:
            answers = _room(images.where, (len(entries), *answer.shape[1:]), answer.dtype)
        answers[positions] = answer  # of two at the same position the last stays
    report_broken(images.where, entries, broken, skip_broken)
    assert answers is not None, "where all are broken, that is an error"
    kept = [position for position in range(len(entries)) if position not in broken]
    ids = tuple(entries[position].id for position in kept)
    return torch.from_numpy(answers[kept] if broken else answers), ids, tuple(entries[i].id for i in sorted(broken))


def load_images(
    path: Path, *, image_size: tuple[int, int], channels: int, skip_broken: bool = False
) -> tuple[Tensor, tuple[str, ...], tuple[str, ...]]:
    """The images themselves, (N, channels, H, W) uint8, their ids, and the ids of those left out.

    Args and errors are those of `map_images`.
    """
    return map_images(
        path, _themselves, image_size=image_size, channels=channels, batch_size=LOADED_AT_ONCE, skip_broken=skip_broken
    )


def _themselves(images: Tensor) -> Tensor:
    return images


def _room(where: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    try:
        return np.empty(shape, dtype=dtype)
    except MemoryError as error:
        raise UserError(f"{where}: its {shape[0]:,} images do not fit the memory; give fewer at a time") from error


def _in_batches(
    decoded: Iterator[tuple[int, Decoded | Exception]], size: int, broken: dict[int, Exception]
) -> Iterator[tuple[list[int], list[Decoded]]]:
    """(positions, images) of those that can be read, up to so many at a time; `broken` gets the others.

    Of two at the same position the later one decides whether it is broken.
    """
    positions: list[int] = []
    images: list[Decoded] = []
    for position, result in decoded:
        broken.pop(position, None)
        if isinstance(result, Exception):
            broken[position] = result
            continue
        positions.append(position)
        images.append(result)
        if len(images) == size:
            yield positions, images
            positions, images = [], []
    if images:
        yield positions, images


class _Single:
    """The images of one source, under their ids there."""

    def __init__(self, source: Source) -> None:
        self.where = source.where
        self.entries = source.unlabelled()
        self._source = source

    def payloads(self, entries: Sequence[Entry]) -> Iterator[tuple[int, Payload]]:
        return self._source.payloads(entries)


@dataclass(frozen=True)
class _Part:
    """A source among several."""

    source: Source
    entries: list[Entry]


class _Several:
    """The images of several sources, one source after the other, each under its path."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.where = f"{len(paths)} paths"
        self.entries: list[Entry] = []
        self._parts: list[_Part] = []
        for path in paths:
            source = open_source(path)
            entries = source.unlabelled()
            if not entries:
                raise UserError(f"{path}: no image in it")
            self._parts.append(_Part(source, entries))
            alone = path.is_file() and is_image(path.name)
            self.entries += [Entry(str(path if alone else path / entry.id)) for entry in entries]

    def payloads(self, entries: Sequence[Entry]) -> Iterator[tuple[int, Payload]]:  # noqa: ARG002 - always all
        first = 0
        for part in self._parts:
            for position, payload in part.source.payloads(part.entries):
                yield first + position, payload
            first += len(part.entries)
