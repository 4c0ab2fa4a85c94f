"""Processing of unlabelled images batch by batch, for prediction, without keeping their pixels in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.data.decode import PLAIN, Decoded, Values, to_channels
from core.data.ingest import decode_all, report_broken
from core.data.layout import Arrangement, Entry, is_image
from core.data.source import Payload, Reading, Source
from core.data.sources import open_source
from core.errors import UserError

logger = logging.getLogger(__name__)

# Batch size of `load_images`.
LOADED_AT_ONCE = 256


def map_images(
    paths: Path | Sequence[Path],
    function: Callable[[Tensor], Tensor],
    *,
    image_size: tuple[int, int],
    channels: int,
    batch_size: int,
    skip_broken: bool = False,
    values: Values = PLAIN,
) -> tuple[Tensor, tuple[str, ...], tuple[str, ...]]:
    """Apply a function to every image of a folder, .zip, tar, .npz, CSV of paths, single file, or several of these.

    Args:
        paths: the source or sources; folder structure is ignored.
        function: maps images (n, channels, H, W) uint8 to (n, …) on the CPU. The images are only valid during the call.
            If a tar contains a path twice, the later result is used.
        image_size: (height, width) to resize to.
        channels: 1 or 3.
        batch_size: maximum images per call.
        skip_broken: leave out unreadable images instead of raising an error at the end.
        values: the meaning of samples in the images that a model was trained on.

    Returns:
        Results (N, …) in the order of ids: natural (`2.png` before `10.png`), or as in the CSV or .npz; ids within a
        single source, or as paths for several; ids of the images left out.

    Raises:
        UserError: there is no image, or one is broken, or the results do not fit the memory.
    """
    images = _opened(paths, skip_broken)
    entries = images.entries
    answers: NDArray[np.generic] | None = None
    broken: dict[int, Exception] = {}
    cut_off = 0
    batch = np.empty((min(batch_size, len(entries)), channels, *image_size), dtype=np.uint8)
    for positions, results in _in_batches(decode_all(images, entries, image_size, values), len(batch), broken):
        cut_off += sum(result.top > values.top for result in results)
        for place, result in enumerate(results):
            batch[place] = to_channels(result.pixels, channels)
        answer = function(torch.from_numpy(batch[: len(results)])).numpy()
        if answers is None:
            answers = _room(images.where, (len(entries), *answer.shape[1:]), answer.dtype)
        answers[positions] = answer  # later results of a position replace earlier ones
    report_broken(images.where, entries, broken, skip_broken)
    if cut_off:
        logger.warning(
            "%s: %d images have 16-bit samples above %d, where the range of the training images ends; they are cut off",
            images.where, cut_off, values.top,
        )  # fmt: skip
    assert answers is not None, "where all are broken, that is an error"
    kept = [position for position in range(len(entries)) if position not in broken]
    ids = tuple(entries[position].id for position in kept)
    left_out = (*images.broken, *(entries[i].id for i in sorted(broken)))
    return torch.from_numpy(answers[kept] if broken else answers), ids, left_out


def image_ids(paths: Path | Sequence[Path], *, skip_broken: bool = False) -> tuple[str, ...]:
    """Return the ids of the images that `map_images` would process, without reading them, and of unreadable ones.

    Raises:
        UserError: there is no image.
    """
    images = _opened(paths, skip_broken)
    return (*(entry.id for entry in images.entries), *images.broken)


def load_images(
    path: Path, *, image_size: tuple[int, int], channels: int, skip_broken: bool = False, values: Values = PLAIN
) -> tuple[Tensor, tuple[str, ...], tuple[str, ...]]:
    """Load the images (N, channels, H, W) uint8, their ids, and the ids of those left out; see `map_images`."""
    return map_images(
        path,
        _themselves,
        image_size=image_size,
        channels=channels,
        batch_size=LOADED_AT_ONCE,
        skip_broken=skip_broken,
        values=values,
    )


def _opened(paths: Path | Sequence[Path], skip_broken: bool) -> _Single | _Several:
    reading = Reading(skip_broken=skip_broken)
    images = (
        _Single(open_source(paths, reading))
        if isinstance(paths, Path)
        else _Several([path.expanduser() for path in paths], reading)
    )
    if not images.entries:
        raise UserError(f"{images.where}: no images found")
    return images


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
    """Yield (positions, images) of readable images in batches of `size`; collect errors in `broken`.

    Of two images at the same position, the later one counts.
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


def _listed(source: Source) -> Arrangement:
    """The images of a source, with a warning about the other files."""
    found = source.unlabelled()
    if found.left_out:
        counts = ", ".join(f"{kind}: {count:,}" for kind, count in found.left_out.items())
        logger.warning("%s: not images, and left out: %s", source.where, counts)
    return found


class _Single:
    def __init__(self, source: Source) -> None:
        found = _listed(source)
        self.where = source.where
        self.entries = found.entries
        self.broken = found.broken
        self._source = source

    def payloads(self, entries: Sequence[Entry]) -> Iterator[tuple[int, Payload]]:
        return self._source.payloads(entries)


@dataclass(frozen=True)
class _Part:
    source: Source
    entries: list[Entry]


class _Several:
    """The images of several sources in order, with their paths as ids."""

    def __init__(self, paths: Sequence[Path], reading: Reading) -> None:
        self.where = f"{len(paths)} paths"
        self.entries: list[Entry] = []
        self.broken: tuple[str, ...] = ()
        self._parts: list[_Part] = []
        for path in paths:
            source = open_source(path, reading)
            found = _listed(source)
            if not found.entries:
                raise UserError(f"{path}: no images found")
            self._parts.append(_Part(source, found.entries))
            self.broken += tuple(str(path / name) for name in found.broken)
            alone = path.is_file() and is_image(path.name)
            self.entries += [Entry(str(path if alone else path / entry.id)) for entry in found.entries]

    def payloads(self, entries: Sequence[Entry]) -> Iterator[tuple[int, Payload]]:  # noqa: ARG002 - always all
        first = 0
        for part in self._parts:
            for position, payload in part.source.payloads(part.entries):
                yield first + position, payload
            first += len(part.entries)
