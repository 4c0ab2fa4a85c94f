"""scikit-learn's digits as a user's own images, and the check of their predictions."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits


def digit_pixels() -> tuple[np.ndarray, np.ndarray]:
    """All digits: (N, 8, 8) uint8 and their labels."""
    source = load_digits()
    return (source.images * (255 / 16)).round().astype(np.uint8), source.target


def write_digits(folder: Path, count: int) -> Path:
    """Write the first digits as `000.png`, `001.png`, … and return the new folder."""
    folder.mkdir()
    for number, pixels in enumerate(digit_pixels()[0][:count]):
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


def rows_of(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    return list(csv.DictReader(file.read_text().splitlines()))


def check_predictions(file: Path, count: int) -> None:
    """The CSV of `hpo predict --probabilities` has a row for each image, whose label is the most probable."""
    rows = rows_of(file)
    assert list(rows[0]) == ["id", "label", *"0123456789"]
    assert [row["id"] for row in rows] == [f"{number:03d}.png" for number in range(count)]
    for row in rows:
        chances = {name: float(row[name]) for name in "0123456789"}
        assert sum(chances.values()) == pytest.approx(1, abs=1e-3)
        assert row["label"] == max(chances, key=chances.__getitem__)
