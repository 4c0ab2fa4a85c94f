"""Labelled images from any source as uint8 tensors: decoded once, split by a seed, with a locked test set."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from core.data.builtin import DatasetInfo, catalogue
    from core.data.dataset import Dataset, Division, TestSet, folds, image_sizes, load_dataset, located, split
    from core.data.report import DataReport
    from core.data.splits import Splits, on_device, val_parts
    from core.data.unlabelled import image_ids, load_images, map_images

_MODULES = {
    "DataReport": "report",
    "Dataset": "dataset",
    "DatasetInfo": "builtin",
    "Division": "dataset",
    "Splits": "splits",
    "TestSet": "dataset",
    "catalogue": "builtin",
    "folds": "dataset",
    "image_ids": "unlabelled",
    "image_sizes": "dataset",
    "load_dataset": "dataset",
    "located": "dataset",
    "load_images": "unlabelled",
    "map_images": "unlabelled",
    "on_device": "splits",
    "split": "dataset",
    "val_parts": "splits",
}
"""Modules by name, imported on first use: listing data sets needs no torch."""

__all__ = [
    "DataReport",
    "Dataset",
    "DatasetInfo",
    "Division",
    "Splits",
    "TestSet",
    "catalogue",
    "folds",
    "image_ids",
    "image_sizes",
    "load_dataset",
    "load_images",
    "located",
    "map_images",
    "on_device",
    "split",
    "val_parts",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
