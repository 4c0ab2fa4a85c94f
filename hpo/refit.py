"""Turns a trial into a submission model.

The trial's own weights, trained without the validation images, choose the test-time augmentation on those images. Then
the same configuration is trained again on training and validation images together: as many epochs, so the number of
steps grows with the data, as the schedule's fractions expect. Only then is the test set opened, and the opening written
down: nothing that is kept depends on a test label.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

from core import metrics
from core.config import TrainConfig
from core.data import Dataset, Splits, split
from core.loop import EVALUATION_BATCH, EpochMetrics, train
from core.models import build_model
from core.runtime import autocast, normalize
from core.tta import VIEWS, predict_logits
from hpo import bundle
from hpo.errors import StudyError
from hpo.paths import StudyPaths
from hpo.predict import write_submission
from hpo.report import confusion_matrix, learning_curves
from hpo.training import append_line
from hpo.versions import versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refitted:
    """What a refit wrote and found."""

    dir: Path
    number: int
    views: str
    candidates: dict[str, float]
    """Each TTA candidate's validation score by the study's metric."""
    val: metrics.Scores
    test: metrics.Scores
    test_plain: metrics.Scores
    """Without test-time augmentation."""
    openings: int
    """How often this study's test set has been opened, this time included."""


def refit(
    paths: StudyPaths,
    *,
    number: int,
    label: str,
    config: TrainConfig,
    epochs: int,
    dataset: Dataset,
    metric: str,
    device: torch.device,
    on_epoch_end: Callable[[EpochMetrics], None] | None = None,
) -> Refitted:
    """Retrains the trial on training and validation images, and writes the bundle.

    Args:
        number: the trial's; its weights are taken where it kept them, and trained again where not.
        label: the bundle's folder: `best`, or the trial's five digits.
        epochs: those that the trial kept: fewer than the configuration's where it stopped early.
        metric: the study's objective, by which the views are chosen.
    """
    splits = split(dataset, config.data).to(device)
    judge = _Judge(config, splits, device)

    logger.info("choosing the test-time augmentation on %d validation images", len(splits.val))
    trial_network = _trial_network(paths, number, config, splits, device, metric)
    val_images, val_labels = splits.images[splits.val], splits.labels[splits.val]
    by_view = {views: judge.logits(trial_network, val_images, views) for views in VIEWS}
    candidates = {views: metrics.value(metrics.scores(logits, val_labels), metric) for views, logits in by_view.items()}
    views = _best_view(candidates, metric)
    del trial_network

    whole = splits.whole()
    logger.info("training on %d images, %d epochs", len(whole.train), epochs)
    result = train(config, whole, device=device, on_epoch_end=on_epoch_end, stop_after=epochs)

    # Everything that is kept is decided: from here on the test set may be seen.
    openings = _write_down_opening(paths, label, number)
    test = dataset.open_test()
    judge = _Judge(config, whole, device)
    test_images, test_labels = test.images.to(device), test.labels.to(device)
    test_logits = {name: judge.logits(result.model, test_images, name) for name in dict.fromkeys(("none", views))}

    report = {
        "trial": number,
        "objective": metric,
        "epochs": epochs,
        "tta": {"chosen": views, "val_candidates": candidates},
        "val": {
            "trained_on": "training images only",
            "images": len(val_labels),
            "without_tta": _full_scores(by_view["none"], val_labels, dataset.classes),
            "with_tta": _full_scores(by_view[views], val_labels, dataset.classes),
        },
        "test": {
            "trained_on": "training and validation images",
            "images": len(test_labels),
            "opened": openings,
            "without_tta": _full_scores(test_logits["none"], test_labels, dataset.classes),
            "with_tta": _full_scores(test_logits[views], test_labels, dataset.classes),
        },
    }
    probabilities = test_logits[views].softmax(1)
    with bundle.writing(paths.refit(label)) as folder:
        bundle.Bundle(
            config=config,
            classes=dataset.classes,
            in_channels=splits.images.shape[1],
            image_size=(splits.images.shape[2], splits.images.shape[3]),
            mean=whole.mean,
            std=whole.std,
            views=views,
            data_name=dataset.name,
            fingerprint=dataset.fingerprint,
            versions=versions(),
            study=paths.name,
            trial=number,
            source=dataset.source,
        ).write(folder, result.model, report)
        confusion_matrix(
            metrics.confusion(test_logits[views], test_labels).cpu(),
            dataset.classes,
            folder / "confusion.png",
            title=f"{dataset.name}, test images",
        )
        learning_curves(
            [epoch.row() for epoch in result.history], folder / "learning_curves.png", title="refit", metric=metric
        )
        write_submission(folder / "submission.csv", test.ids, probabilities.argmax(1).cpu(), dataset.classes)
    return Refitted(
        dir=paths.refit(label),
        number=number,
        views=views,
        candidates=candidates,
        val=metrics.scores(by_view[views], val_labels),
        test=metrics.scores(test_logits[views], test_labels),
        test_plain=metrics.scores(test_logits["none"], test_labels),
        openings=openings,
    )


class _Judge:
    """Predicts with the pixels' normalisation and the arithmetic of one training."""

    def __init__(self, config: TrainConfig, splits: Splits, device: torch.device) -> None:
        self.prepare = partial(normalize, mean=splits.mean, std=splits.std)
        self.autocast = partial(autocast, config.precision.autocast, device)

    def logits(self, model: nn.Module, images: Tensor, views: str) -> Tensor:
        """(N, K) of images (N, C, H, W) uint8."""
        return predict_logits(
            model,
            images,
            prepare=self.prepare,
            views=views,
            batch_size=EVALUATION_BATCH,
            autocast=self.autocast,
        )


def _trial_network(
    paths: StudyPaths, number: int, config: TrainConfig, splits: Splits, device: torch.device, metric: str
) -> nn.Module:
    """The network that the trial ended with: from its file, or trained again, which gives the same one."""
    weights = paths.trial_model(number)
    if not weights.exists():
        logger.info("trial %d kept no weights: training it again", number)
        return train(config, splits, device=device, metric=metric).model
    _, channels, height, width = splits.images.shape
    plain = config.model.model_copy(update={"pretrained": False})  # the weights follow
    model: nn.Module = build_model(
        plain, num_classes=len(splits.classes), in_channels=channels, image_size=(height, width)
    ).to(device)
    try:
        load_model(model, weights)
    except (RuntimeError, OSError, SafetensorError) as error:
        raise StudyError(f"{weights}: does not hold trial {number}'s weights; delete it to train them again") from error
    return model.eval()


def _best_view(candidates: dict[str, float], metric: str) -> str:
    """The best candidate; among equals the one with the fewest views, which stand first."""
    sign = 1 if metrics.METRICS[metric] == "maximize" else -1
    return max(candidates, key=lambda views: sign * candidates[views])


def _full_scores(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """Scores over all images, and a row a class."""
    return {
        **asdict(metrics.scores(logits, labels)),
        "per_class": metrics.per_class(metrics.confusion(logits, labels), classes),
    }


def _write_down_opening(paths: StudyPaths, label: str, number: int) -> int:
    """Adds a line to the record of the test set's openings; returns how many there are."""
    record = paths.test_openings
    record.parent.mkdir(parents=True, exist_ok=True)
    append_line(record, {"opened": datetime.now(UTC).isoformat(timespec="seconds"), "label": label, "trial": number})
    return sum(1 for line in record.read_text().splitlines() if json.loads(line))
