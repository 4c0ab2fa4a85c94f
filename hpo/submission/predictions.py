"""Predict labels of images, from files or pixels, and write them as CSV.

Images are read as in training: upright, opaque, in the model's size and channels. Only 8-bit pixels in a known order
are accepted: a wrong guess would give wrong labels instead of an error.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from core.data import map_images
from core.data.decode import PLAIN, BrokenImageError, Pixels, Values, read_pixels, to_channels
from core.text import count
from hpo.errors import BundleError
from hpo.storage.atomic import replacing
from hpo.submission.samples import Sample

OneImage: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor
Images: TypeAlias = OneImage | Sequence[OneImage]
"""Paths of images, folders, archives, .npz files or CSVs of paths; Pillow images; an array (H, W), (H, W, C) or
(N, H, W, C), or a list of arrays with one image each; a tensor (C, H, W) or (N, C, H, W), or a list of tensors with one
image each. Pixels are uint8; C is 1, 3 or, with transparency, 4."""

Answer = Callable[[Tensor], Tensor]
"""A function from images (n, C, H, W) uint8 to probabilities (n, K) float32 on the CPU."""


@dataclass(frozen=True)
class Predictions:
    """Predicted labels of N images."""

    ids: tuple[str, ...]
    """Paths within the source, or the given ones if there were several; of pixels, positions from 0."""
    labels: Tensor
    """(N,) int64, indices into `classes`."""
    probabilities: Tensor
    """(N, K) float32."""
    classes: tuple[str, ...]
    broken: tuple[str, ...] = ()
    """Skipped images that could not be read."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.classes[label] for label in self.labels.tolist())

    @property
    def confidences(self) -> Tensor:
        """Probability (N,) float32 of each image's label."""
        return self.probabilities.amax(1)

    def __len__(self) -> int:
        return len(self.ids)

    def write(self, path: Path | str, *, probabilities: bool = False, like: Sample | Path | str | None = None) -> None:
        """Write a CSV.

        Args:
            probabilities: Whether to add a column of probabilities for each class, see `write_submission`.
            like: A sample submission to fill in, which then decides about the columns.

        Raises:
            BundleError: The images or classes do not fit the sample, or the file cannot be written.
        """
        if like is not None:
            sample = like if isinstance(like, Sample) else Sample.read(like, output=Path(path))
            sample.write(Path(path), self.ids, self.labels, self.classes, self.probabilities, self.broken)
            return
        write_submission(Path(path), self.ids, self.labels, self.classes, self.probabilities if probabilities else None)


def predictions_of(
    images: Images,
    answer: Answer,
    *,
    classes: tuple[str, ...],
    image_size: tuple[int, int],
    channels: int,
    batch_size: int,
    skip_broken: bool = False,
    values: Values = PLAIN,
) -> Predictions:
    """Predict images batch by batch, see `LoadedBundle.predict`."""
    each = list(images) if isinstance(images, list | tuple) else [images]
    if not each:
        raise BundleError("no image in the list; give at least one")
    paths = [Path(item) for item in each if isinstance(item, str | os.PathLike)]
    if paths and len(paths) < len(each):
        raise BundleError("paths and pixels in one list; give them one after the other, or open the paths")
    if paths:
        probabilities, ids, broken = map_images(
            paths if isinstance(images, list | tuple) else paths[0],
            answer,
            image_size=image_size,
            channels=channels,
            batch_size=batch_size,
            skip_broken=skip_broken,
            values=values,
        )
        return Predictions(ids, probabilities.argmax(1), probabilities, classes, broken)
    values = replace(values, channels=values.channels or "rgba")  # a fourth channel is transparency, see `Images`
    return _of_pixels(list(_pictures(images)), answer, classes, image_size, channels, batch_size, skip_broken, values)


def _of_pixels(
    pictures: Sequence[Pixels | Image.Image],
    answer: Answer,
    classes: tuple[str, ...],
    image_size: tuple[int, int],
    channels: int,
    batch_size: int,
    skip_broken: bool,
    values: Values,
) -> Predictions:
    ids: list[str] = []
    broken: list[str] = []
    answers: list[Tensor] = []
    for start in range(0, len(pictures), batch_size):
        batch: list[Pixels] = []
        for position, picture in enumerate(pictures[start : start + batch_size], start):
            try:
                batch.append(to_channels(read_pixels(picture, image_size, values), channels))
                ids.append(str(position))
            except BrokenImageError as error:
                if not skip_broken:
                    raise BundleError(f"image {position} cannot be read: {error}") from error
                broken.append(str(position))
        if batch:
            answers.append(answer(torch.from_numpy(np.stack(batch))))
    if not answers:
        raise BundleError(f"none of {count(len(broken), 'image')} can be read")
    probabilities = torch.cat(answers)
    return Predictions(tuple(ids), probabilities.argmax(1), probabilities, classes, tuple(broken))


def _pictures(images: Any) -> Iterator[Pixels | Image.Image]:
    """The single images: Pillow images, or arrays (H, W) or (H, W, 1|3|4) uint8."""
    if not isinstance(images, list | tuple):
        yield from _stack(images, "the images")
        return
    for position, item in enumerate(images):
        name = f"image {position}"
        pictures = _stack(item, name)
        if getattr(item, "ndim", 0) == 4:
            raise BundleError(f"{name} of the list is a stack of {len(pictures)} images; give a stack without a list")
        yield from pictures


def _stack(item: Any, name: str) -> Sequence[Pixels | Image.Image]:
    """The images of an array, a tensor or a Pillow image; BundleError if its type or shape is unknown."""
    if isinstance(item, Image.Image):
        return [item]
    if isinstance(item, Tensor):
        _check_type(str(item.dtype).removeprefix("torch."), name)
        shape = tuple(item.shape)
        if item.ndim not in (3, 4) or shape[-3] not in (1, 3, 4) or 0 in shape:
            raise BundleError(
                f"{name}: a tensor of shape {shape}; give (C, H, W) or (N, C, H, W), with C of 1, 3 or 4"
                + (": channels stand before height and width" if item.ndim > 2 and shape[-1] in (1, 3, 4) else "")
            )
        pixels: NDArray[np.uint8] = item.detach().cpu().movedim(-3, -1).numpy()
        return [pixels] if item.ndim == 3 else list(pixels)
    if isinstance(item, np.ndarray):
        _check_type(str(item.dtype), name)
        known = item.ndim == 2 or (item.ndim in (3, 4) and item.shape[-1] in (1, 3, 4))
        if not known or 0 in item.shape:
            raise BundleError(
                f"{name}: an array of shape {item.shape}; give (H, W), (H, W, C) or (N, H, W, C), with C of 1, 3 or 4"
                + ("; of N grey images images[..., None]" if item.ndim == 3 else "")
            )
        return list(item) if item.ndim == 4 else [item]
    raise BundleError(
        f"{name}: {type(item).__name__} is not supported; give paths, Pillow images, numpy arrays or torch tensors"
    )


def _check_type(kind: str, name: str) -> None:
    if kind != "uint8":
        raise BundleError(
            f"{name}: pixels of type {kind}; give uint8 from 0 to 255, not normalised, since the model does that"
        )


def write_submission(
    path: Path, ids: Sequence[str], labels: Tensor, classes: Sequence[str], probabilities: Tensor | None = None
) -> None:
    """Write a CSV with the columns `id` and `label` (a class name), and one column of probabilities per class.

    The probabilities of a class called `id` or `label` are in `p_id` or `p_label`. `labels` (N,) are indices into
    `classes`, `probabilities` are (N, K).

    Raises:
        BundleError: The file cannot be written.
    """
    shown = [f"p_{name}" if name in ("id", "label") else name for name in classes]
    header = ["id", "label", *(shown if probabilities is not None else [])]
    try:
        # The bytes of a file name that is not UTF-8 are kept.
        with (
            replacing(path) as temporary,
            temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            for name, label, row in zip(ids, labels.tolist(), _shares(probabilities, len(ids)), strict=True):
                writer.writerow([name, classes[label], *row])
    except OSError as error:
        raise BundleError(f"{path}: cannot be written ({error.strerror}); give another file") from error


def _shares(probabilities: Tensor | None, count: int) -> Iterator[list[str]]:
    """The probabilities of each row as text."""
    if probabilities is None:
        yield from ([] for _ in range(count))
    else:
        yield from ([f"{share:.6g}" for share in row.tolist()] for row in probabilities)
