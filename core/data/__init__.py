"""Labelled images from any source as uint8 tensors: decoded once, split by a seed, with a locked test set."""

from core.data.builtin import DatasetInfo, catalogue
from core.data.dataset import DataReport, Dataset, Division, TestSet, folds, load_dataset, split
from core.data.splits import Splits, on_device
from core.data.unlabelled import load_images, map_images

__all__ = [
    "DataReport",
    "Dataset",
    "DatasetInfo",
    "Division",
    "Splits",
    "TestSet",
    "catalogue",
    "folds",
    "load_dataset",
    "load_images",
    "map_images",
    "on_device",
    "split",
]
