"""Tables of finished trainings, which benchmarks of a search replay instead of training.

A table is gzipped text with a line of JSON for each training: `c`, the configuration; `curve`, the validation accuracy
of each epoch; and `test`, the test accuracy at the end.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT
from numpy.typing import NDArray

CURVES = ROOT.parent / "shared" / "curves"

FIELDS = {
    "opt": "optim.name",
    "lr": "optim.lr_scale",
    "wd": "optim.weight_decay",
    "bs": "batch_size",
    "aug": "augment.rotation_degrees",
    "smooth": "loss.smoothing",
    "width": "model.width",
}
"""Short names in `digits300.jsonl.gz`. Its `aug` is the strength of its own augmentation, and `width` a number of
channels."""


@dataclass(frozen=True)
class Curves:
    """The trainings of a table."""

    configs: tuple[dict[str, Any], ...]
    """By fields of `TrainConfig`, equal for all rows; what is not searched is unknown."""
    val: NDArray[np.float64]
    """(rows, epochs) validation accuracy."""
    tests: NDArray[np.float64]
    """(rows,) test accuracy at the end."""
    images: int
    """Validation images."""

    def rows(self, chosen: NDArray[np.bool_]) -> Curves:
        """Keep some of the rows."""
        configs = tuple(config for config, keep in zip(self.configs, chosen, strict=True) if keep)
        return replace(self, configs=configs, val=self.val[chosen], tests=self.tests[chosen])

    def shuffled(self, epochs: int, rng: np.random.Generator) -> Curves:
        """Exchange the scores of the first epochs between the rows, so that they predict nothing."""
        val = self.val.copy()
        val[:, :epochs] = val[rng.permutation(len(val)), :epochs]
        return replace(self, val=val)

    def drawn(self, images: int, rng: np.random.Generator) -> Curves:
        """Draw the validation scores anew, as of so many images.

        The expected accuracy is the curve, moved by a constant so that its end is the test accuracy, which more images
        measured. Each row has its own random images, the same in every epoch: an image is predicted if its difficulty,
        uniform in [0, 1], is below the expected accuracy. So the error of a row persists over its epochs, and rows err
        independently: a difference between two has a larger error than on common images.
        """
        expected = np.clip(self.val + (self.tests - self.val[:, -1])[:, None], 0, 1)
        difficulties = np.sort(rng.random((len(expected), images)))
        hits = [np.searchsorted(row, curve) for row, curve in zip(difficulties, expected, strict=True)]
        return replace(self, val=np.array(hits) / images, images=images)


def read(path: Path, images: int) -> Curves:
    """Read a table of trainings with so many validation images."""
    with gzip.open(path, "rt") as file:
        lines = [json.loads(line) for line in file]
    return Curves(
        tuple(_fields(line["c"]) for line in lines),
        np.array([line["curve"] for line in lines]),
        np.array([line["test"] for line in lines]),
        images,
    )


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    found = {FIELDS.get(name, name): value for name, value in config.items()}
    if "width" in config:
        found["model.width"] = config["width"] / 16  # the field is a factor
    return found
