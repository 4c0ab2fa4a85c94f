"""Any source of labelled images as uint8 tensors: decoded once, split with a seed, the test set locked.

A data set goes through five steps, a module each: `files` and `arrays` list and read a source, `layout` reads classes
off paths, `decode` turns bytes into pixels as a person sees them, `ingest` does so in parallel, and `dataset` puts the
result into a `cache` that is memory-mapped from then on. `splits` draws validation images, and cuts a test set off
where there is none; `builtin` knows the sets that have a name. Images without labels, to be predicted, go through
`unlabelled` in place of the last step: nothing of them is kept.
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
