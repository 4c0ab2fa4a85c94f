"""Held-out predictions of one configuration, which the choices of a refit rest on.

They come from networks at hand, or from the files of a confirmation, whose trainings need not be repeated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpo.confirmation.trials import trainings
from hpo.paths import StudyPaths, TrainingPaths, confirmation_of
from hpo.search.held_out import NONE, OWN, Outputs, read_outputs, views_of
from hpo.study import Study, find_study
from hpo.study.results import Row, read_rows
from hpo.submission.networks import Network

VALIDATION, OUT_OF_FOLD, CONFIRMATION = "validation", "out-of-fold", "confirmation"


@dataclass(frozen=True)
class Evidence:
    """Predictions of networks on images that they have not seen; all tensors are on the CPU."""

    images: Tensor
    """(M,) int64: rows of the data set, repeated if several networks have not seen an image."""
    labels: Tensor
    """(M,) int64."""
    logits: Outputs
    """Logits (M, K) by average and views."""
    source: str
    """`validation`, `out-of-fold` or `confirmation`."""
    rows: tuple[tuple[Row, ...], ...]
    """Epochs of each network's training."""

    @classmethod
    def of_networks(cls, networks: Sequence[Network], views: Sequence[str] = ()) -> Evidence:
        """Predict the validation images of networks of one configuration.

        Args:
            views: Choices beside those that the configuration's augmentation suggests.
        """
        first = networks[0]
        names = tuple(dict.fromkeys((*views_of(first.config, first.splits), *views)))
        parts = [
            {name: each.with_average(name).val_by_views(names) for name in (OWN, *each.averages)} for each in networks
        ]
        return cls(
            torch.cat([each.splits.val for each in networks]).cpu(),
            torch.cat([each.splits.labels[each.splits.val] for each in networks]).cpu(),
            _joined(parts),
            VALIDATION if torch.equal(first.splits.val, networks[-1].splits.val) else OUT_OF_FOLD,
            tuple(each.rows for each in networks),
        )

    @property
    def networks(self) -> int:
        return len(self.rows)

    @property
    def distinct_images(self) -> int:
        """Number of different images."""
        return len(torch.unique(self.images))

    def has(self, average: str | None, views: str | None) -> bool:
        """Whether it includes these, if they are given."""
        return (average or OWN) in self.logits and (views or NONE) in self.logits[OWN]


def of_confirmation(search: Study, identity: str, labels: Tensor, images: Tensor | None = None) -> Evidence | None:
    """Read the predictions of a confirmation's trainings of a configuration, of all replicates and folds.

    Args:
        identity: Of the configuration, see `identity_of`.
        labels: (N,) int64, of the data set.
        images: The rows (M,) that must be predicted, by all replicates or by one; None for all replicates.

    Returns:
        None if there are none, or if they lack averages, as those of earlier versions do.
    """
    if not StudyPaths.of(confirmation_of(search.name)).study_yaml.exists():
        return None
    study = find_study(confirmation_of(search.name), storage_url=search.storage_url)
    study.files.use_store(None)
    replicates = []
    for training in trainings(study):
        if training.identity == identity and training.values and all(map(math.isfinite, training.values)):
            folds = len(training.values)
            study.files.fetch_outputs(training.number, folds=folds)
            replicates.append(_read(TrainingPaths(study.paths.trial(training.number)), folds))
    choices = [[part for parts in replicates for part in parts], *(replicates if images is not None else [])]
    found = (_evidence(parts, labels, CONFIRMATION) for parts in choices)
    return next((each for each in found if each and (images is None or torch.equal(each.images, images))), None)


def of_training(folder: TrainingPaths, folds: int, labels: Tensor) -> Evidence | None:
    """Read the predictions of a recorded training, as `of_confirmation` those of several."""
    return _evidence(_read(folder, folds), labels, VALIDATION if folds == 1 else OUT_OF_FOLD)


_Part = tuple[Tensor, Outputs, tuple[Row, ...]]
"""Rows of the images, outputs and epochs of one network."""


def _read(folder: TrainingPaths, folds: int) -> list[_Part]:
    """Read the parts of all folds; empty if a file is missing."""
    rows = read_rows(folder.metrics)
    of_folds = {fold: tuple(row for row in rows if row.get("fold", 1) == fold) for fold in range(1, folds + 1)}
    if not all(of_fold and folder.validation(fold).exists() for fold, of_fold in of_folds.items()):
        return []
    return [(*read_outputs(folder.validation(fold)), of_fold) for fold, of_fold in of_folds.items()]


def _evidence(parts: Sequence[_Part], labels: Tensor, source: str) -> Evidence | None:
    outputs = [each for _, each, _ in parts]
    if not parts or any(_names(each) != _names(outputs[0]) for each in outputs):
        return None
    images = torch.cat([indices for indices, _, _ in parts])
    rows = tuple(each for _, _, each in parts)
    return Evidence(images, labels.cpu()[images], _joined(outputs), source, rows)


def _joined(parts: Sequence[Outputs]) -> Outputs:
    return {
        average: {views: torch.cat([part[average][views] for part in parts]).cpu() for views in by_views}
        for average, by_views in parts[0].items()
    }


def _names(outputs: Outputs) -> Mapping[str, frozenset[str]]:
    return {average: frozenset(by_views) for average, by_views in outputs.items()}
