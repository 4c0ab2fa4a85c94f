"""Labelled images from any source as uint8 tensors: decoded once, split by a seed, with a locked test set.

`files` and `arrays` list and read sources, `layout` derives classes from paths, `decode` turns bytes into pixels,
`ingest` does so in parallel, and `dataset` stores the result in a memory-mapped `cache`. `splits` draws validation and
test images; `builtin` has the named data sets. `unlabelled` processes images for prediction without storing them.
"""

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
