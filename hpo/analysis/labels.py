"""Images whose labels are probably wrong, by confident learning (Northcutt et al. 2021, arXiv 1911.00068).

The evidence is outputs of networks on images outside their own training images: the validation outputs stored with a
study's best trials, and with every training of its confirmation, whose splits hold out each image once
per repeat.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpo.paths import StudyPaths, confirmation_of
from hpo.study import Study


@dataclass(frozen=True)
class Suspect:
    """An image whose label is probably wrong."""

    index: int
    """Position in `Dataset.images`."""
    id: str
    label: str
    suggested: str
    """The class that the networks predict."""
    label_probability: float
    suggested_probability: float
    networks: int
    """Number of networks that predicted the image."""


@dataclass(frozen=True)
class LabelAudit:
    """The suspects of a data set, most suspicious first."""

    suspects: tuple[Suspect, ...]
    checked: int
    """Images with a prediction of at least one network."""
    images: int
    """Images outside the test set."""
    networks: int


def audit_labels(study: Study, labels: NDArray[np.int64], ids: Sequence[str], classes: Sequence[str]) -> LabelAudit:
    """Find the images whose labels are probably wrong, by the study's stored outputs.

    Args:
        study: A study with complete trials.
        labels: (N,), of the images outside the test set.
        ids: Their names.
    """
    files = output_files(study)
    probabilities, counts = mean_probabilities(files, len(labels), len(classes))
    checked = np.flatnonzero(counts)
    order, suggested = suspects(probabilities[checked], labels[checked])
    found = [
        Suspect(
            index=int(index),
            id=ids[index],
            label=classes[labels[index]],
            suggested=classes[other],
            label_probability=float(probabilities[index, labels[index]]),
            suggested_probability=float(probabilities[index, other]),
            networks=int(counts[index]),
        )
        for index, other in zip(checked[order], suggested, strict=True)
    ]
    return LabelAudit(tuple(found), len(checked), len(labels), len(files))


def output_files(study: Study) -> list[Path]:
    """Return the stored validation outputs, with the confirmation's."""
    folders = [study.paths, StudyPaths.of(confirmation_of(study.name))]
    return [file for paths in folders for file in paths.validation_outputs()]


def mean_probabilities(
    files: Iterable[Path], images: int, classes: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Average the class probabilities of all networks that validated an image.

    Returns:
        Probabilities (N, K), zero without a prediction, and the number of networks (N,).
    """
    from safetensors.numpy import load_file
    from scipy.special import softmax

    total, counts = np.zeros((images, classes)), np.zeros(images, dtype=np.int64)
    for file in files:
        outputs = load_file(file)
        total[outputs["indices"]] += softmax(outputs["logits"].astype(np.float64), axis=1)
        counts[outputs["indices"]] += 1
    return total / np.maximum(counts, 1)[:, None], counts


def suspects(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the images that are confidently predicted as another class.

    A class is confident from the mean probability that images of this label have for it, so that classes which the
    networks know less well are judged by their own measure.

    Args:
        probabilities: (N, K), out of fold.
        labels: (N,).

    Returns:
        Positions (S,) of the suspects, and their classes (S,). The largest ratio to the label's probability comes
        first: the difference would put an image of two likely classes before one whose label is all but excluded.
    """
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=probabilities.shape[1])
    thresholds = np.bincount(labels, own, minlength=probabilities.shape[1]) / np.maximum(counts, 1)
    confident = np.where(probabilities >= np.where(counts > 0, thresholds, np.inf), probabilities, -1.0)
    best = confident.argmax(1)
    found = np.flatnonzero((confident.max(1) >= 0) & (best != labels))
    ratio = probabilities[found, best[found]] / np.maximum(own[found], np.finfo(np.float64).tiny)
    order = found[np.argsort(-ratio, kind="stable")]
    return order, best[order]
