"""The scores of a submission model on the test images, and the files made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import metrics
from core.calibration import scaled
from core.data import Dataset, TestSet
from core.runtime import make_generator
from hpo.dashboard.pictures import confident_errors, confusion_matrix
from hpo.search.held_out import NONE
from hpo.submission.decision import Decision
from hpo.submission.networks import Network, together
from hpo.submission.predictions import write_submission

SHOWN_ERRORS = 24  # the most confident mistakes: four rows of six


@dataclass(frozen=True)
class Tested:
    """The model's answers to the test images."""

    set: TestSet
    labels: Tensor
    """(N,) int64, on the CPU as all tensors here."""
    plain: Tensor
    """Logits (N, K) with one view, without the temperature."""
    answers: Tensor
    """Logits (N, K) with the chosen views and temperature."""
    seed: int
    """Seed of the bootstrap samples."""

    @classmethod
    def by(cls, networks: Sequence[Network], decision: Decision, test: TestSet) -> Tested:
        """Predict the test images with the model's networks, and the chosen views and temperature."""
        one_view = (NONE,) * len(networks)
        chosen = tuple(each.views for each in decision.selection) or (decision.views,) * len(networks)
        weights = [each.weight for each in decision.selection] or None
        logits = {
            views: together(
                (network.logits(test.images, name) for network, name in zip(networks, views, strict=True)), weights
            ).cpu()
            for views in dict.fromkeys((one_view, chosen))
        }
        answers = scaled(logits[chosen], decision.temperature.value)
        return cls(test, test.labels.cpu(), logits[one_view], answers, networks[0].config.seed)

    @cached_property
    def confusion(self) -> Tensor:
        """Counts (K, K) int64, rows are true classes."""
        return metrics.confusion(self.answers, self.labels)

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % interval of each score, see `core.metrics.bootstrap_intervals`."""
        generator = make_generator(torch.device("cpu"), self.seed, "bootstrap")
        return metrics.bootstrap_intervals(self.answers, self.labels, generator=generator)

    @cached_property
    def mistakes(self) -> Tensor:
        """Positions (n,) int64 of the most confident mistakes, at most `SHOWN_ERRORS`."""
        confidence, choice = self.answers.softmax(1).max(1)
        wrong = (choice != self.labels).nonzero().squeeze(1)
        return wrong[confidence[wrong].argsort(descending=True, stable=True)][:SHOWN_ERRORS]

    def errors(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Describe the most confident mistakes: `id`, `true`, `predicted` and `confidence`."""
        confidence, choice = self.answers.softmax(1).max(1)
        return [
            {
                "id": self.set.ids[position],
                "true": classes[int(self.labels[position])],
                "predicted": classes[int(choice[position])],
                "confidence": float(confidence[position]),
            }
            for position in self.mistakes.tolist()
        ]

    def report(self, classes: tuple[str, ...]) -> dict[str, Any]:
        return {
            "images": len(self.labels),
            "without_tta": full_scores(self.plain, self.labels, classes),
            "with_tta": full_scores(self.answers, self.labels, classes) | {"intervals": self.intervals},
            "confusion": self.confusion.tolist(),
            "errors": self.errors(classes),
        }

    def write(self, folder: Path, dataset: Dataset) -> None:
        classes, title = dataset.classes, f"{dataset.name}, test images"
        images = self.set.images[self.mistakes.to(self.set.images.device)].cpu()
        confusion_matrix(self.confusion, classes, folder / "confusion.png", title=title)
        confident_errors(images, self.errors(classes), classes, folder / "confident_errors.png", title=title)
        write_submission(folder / "submission.csv", self.set.ids, self.answers.argmax(1), classes)


def full_scores(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """Compute the scores over all images, and one row of scores per class, from logits (N, K) and labels (N,)."""
    return {
        **asdict(metrics.scores(logits, labels)),
        "per_class": metrics.per_class(metrics.confusion(logits, labels), classes),
    }
