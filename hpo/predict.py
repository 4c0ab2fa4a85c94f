"""Labels images with a submission model, and writes labels down as a CSV.

The images are read as those that the model was trained on: same size, same channels, same view of a person. They stay
uint8 on the host; each batch goes to the device by itself.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core.data import load_images
from core.loop import EVALUATION_BATCH
from hpo.bundle import load_bundle
from hpo.errors import BundleError


@dataclass(frozen=True)
class Predictions:
    """Labels of N images."""

    ids: tuple[str, ...]
    """Paths within the source, or positions in an .npz."""
    labels: Tensor
    """(N,) int64, positions in `classes`."""
    probabilities: Tensor
    """(N, K) float32."""
    classes: tuple[str, ...]
    broken: tuple[str, ...]
    """Images that could not be read and were left out."""

    @property
    def names(self) -> tuple[str, ...]:
        """The class of each image by name."""
        return tuple(self.classes[label] for label in self.labels.tolist())

    def write(self, path: Path, *, probabilities: bool = False) -> None:
        """Writes them as `write_submission` does, with a column for each class if asked to."""
        write_submission(path, self.ids, self.labels, self.classes, self.probabilities if probabilities else None)


def predict(
    bundle_dir: Path,
    images: Path,
    *,
    device: torch.device | None = None,
    batch_size: int = EVALUATION_BATCH,
    skip_broken: bool = False,
) -> Predictions:
    """Labels the images of a folder, archive, .npz or CSV of paths.

    Args:
        device: the first CUDA device, or the CPU, where none is given.
        batch_size: images at once on the device.
        skip_broken: leaves unreadable images out, where they would otherwise be an error.

    Raises:
        BundleError: the bundle cannot be loaded, or no image can be read.
        UserError: there is no image at that path, or one is broken.
    """
    bundle = load_bundle(bundle_dir, device)
    pixels, ids, broken = load_images(
        images, image_size=bundle.meta.image_size, channels=bundle.meta.in_channels, skip_broken=skip_broken
    )
    if not ids:
        raise BundleError(f"{images}: none of its {len(broken)} images can be read, the first is {broken[0]}")
    probabilities = bundle.probabilities(pixels, batch_size=batch_size)
    return Predictions(ids, probabilities.argmax(1), probabilities, bundle.meta.classes, broken)


def write_submission(
    path: Path, ids: Sequence[str], labels: Tensor, classes: Sequence[str], probabilities: Tensor | None = None
) -> None:
    """Writes the columns `id` and `label`, the name of the class, and one column of probabilities for each class.

    A class that is itself called `id` or `label` has its probabilities under `p_id` or `p_label`.

    Args:
        labels: (N,) int64, positions in `classes`.
        probabilities: (N, K), written with six digits; None leaves them out.

    Raises:
        BundleError: the file cannot be written.
    """
    shown = [f"p_{name}" if name in ("id", "label") else name for name in classes]
    header = ["id", "label", *(shown if probabilities is not None else [])]
    shares = [[]] * len(ids) if probabilities is None else [[f"{p:.6g}" for p in row] for row in probabilities.tolist()]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # A file name that is no UTF-8 goes through as its bytes.
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            for name, label, row in zip(ids, labels.tolist(), shares, strict=True):
                writer.writerow([name, classes[label], *row])
        temporary.replace(path)
    except OSError as error:
        raise BundleError(f"{path}: cannot be written ({error.strerror}); give another file") from error
    finally:
        temporary.unlink(missing_ok=True)
