"""Whether a study has enough validation images to tell good trials apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from core import metrics
from core.config import DataConfig
from core.data import Splits
from core.text import count
from hpo.text import METRIC_WORDS

TOO_LARGE = 0.02
"""A standard error above this is reported."""
ASSUMED_LEVEL = 0.9
"""The baseline's score if it is unknown."""
FOLDS = 5
"""Folds to advise."""


def noise_line(splits: Sequence[Splits], config: DataConfig, metric: str, level: float | None, *, given: bool) -> str:
    """Describe a validation set whose standard error is over two points, and how to have a larger one; else empty.

    The error of `nll` has no known scale before a training, so it is not described.

    Args:
        splits: One, or one per fold.
        config: The data and their split.
        metric: Of the study.
        level: The baseline's score, if known.
        given: Whether the data give the validation images.
    """
    if metric == "nll":
        return ""
    level = ASSUMED_LEVEL if level is None else min(max(level, 0.0), 1.0)
    labels = torch.cat([divided.labels[divided.val] for divided in splits])
    error = metrics.standard_error_at(level, labels, metric)
    if error <= TOO_LARGE:
        return ""
    images = len(labels)
    head = (
        f"{count(images, 'validation image')}: the standard error is {100 * error:.1f} points at "
        f"{METRIC_WORDS[metric]} {level:.2f}, too much to tell close trials apart"
    )
    if config.folds is not None:
        return f"{head}; all images validate already, so leave the choice among the best to hpo confirm"
    ways = [f"--set data.folds={FOLDS}, which validates on all images at {FOLDS} times the cost"]
    fraction = math.ceil(20 * (error / TOO_LARGE) ** 2 * images / (images + len(splits[0].train))) / 20
    if fraction <= 0.5:
        drawn = "--set data.val=drawn " if given else ""
        ways.insert(0, f"{drawn}--set data.val_fraction={fraction:g}")
    return f"{head}; better: {', or '.join(ways)}"
