"""Turns a trial into a submission model: one network trained on everything, or an ensemble of folds.

The trial's own weights, trained without the validation images, choose the test-time augmentation on those images, with
folds on all of them, each by the network that had not seen it. Then the same configuration is trained again on training
and validation images together: as many epochs, so the number of steps grows with the data, as the schedule's fractions
expect. An ensemble is trained fold by fold instead, so that each member has images to be validated on, for early
stopping and a plateau; its members' probabilities are averaged. Only then is the test set opened, and the opening
written down: nothing that is kept depends on a test label.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
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
from core.data import Dataset, Splits, folds, on_device
from core.feed import open_feed
from core.loop import EVALUATION_BATCH, TrainResult, train
from core.models import build_model
from core.runtime import autocast, normalize
from core.schedule import replayed
from core.tta import VIEWS, average, predict_logits
from hpo import bundle
from hpo.errors import StudyError
from hpo.paths import StudyPaths
from hpo.predict import write_submission
from hpo.report import confusion_matrix, learning_curves
from hpo.training import Watch, append_line, fold_label, going_on, of_fold
from hpo.versions import versions

logger = logging.getLogger(__name__)

Row = dict[str, Any]
"""A line of `metrics.jsonl`."""


@dataclass(frozen=True)
class Refitted:
    """What a refit wrote and found."""

    dir: Path
    number: int
    networks: int
    """More than one are an ensemble."""
    views: str
    candidates: dict[str, float]
    """Each TTA candidate's validation score by the study's metric."""
    val: metrics.Scores
    """With folds, out-of-fold: each image by the network that had not seen it."""
    test: metrics.Scores
    test_plain: metrics.Scores
    """Without test-time augmentation."""
    test_per_class: list[dict[str, str | float | int]]
    """With test-time augmentation."""
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
    ensemble: int | None = None,
    watch: Watch | None = None,
) -> Refitted:
    """Retrains the trial, and writes the bundle.

    Args:
        number: the trial's; its weights are taken where it kept them, and trained again where not.
        label: the bundle's folder.
        epochs: those that the trial kept, for the training on all images: fewer than the configuration's where it
            stopped early; of folds, the mean.
        metric: the study's objective, by which the views are chosen.
        ensemble: how many networks, each trained without another part of the images; None is one, trained on all. As
            many as the trial had folds are the trial's own.
        watch: told of each training.

    Raises:
        StudyError: the trial's weights are damaged.
        UserError: a class has fewer images than the ensemble members.
    """
    trainer = _Trainer(paths, number, label, config, metric, device, watch)
    if ensemble is not None:
        config = config.override({"data.folds": ensemble})
    splits = on_device(folds(dataset, config.data), device)
    judged = [trainer.network(config, fold, splits) for fold in range(1, len(splits) + 1)]

    logger.info("choosing the test-time augmentation on %d validation images", sum(len(each.val) for each in splits))
    val_labels = torch.cat([each.labels[each.val] for each in splits])
    by_view = {views: torch.cat([network.val_logits(views) for network in judged]) for views in VIEWS}
    candidates = {views: metrics.value(metrics.scores(logits, val_labels), metric) for views, logits in by_view.items()}
    views = _best_view(candidates, metric)

    if ensemble is None:
        rows = judged[0].rows
        del judged  # the networks, which the training would otherwise have to fit beside
        networks = [trainer.on_all_images(config, splits[0].whole(), rows, epochs)]
    else:
        networks = judged
    config = networks[0].config

    # Everything that is kept is decided: from here on the test set may be seen.
    openings = _write_down_opening(paths, label, number)
    test = dataset.open_test()
    test_labels = test.labels.to(device)
    test_logits = {name: _together(networks, test.images, name) for name in dict.fromkeys(("none", views))}

    report = {
        "trial": number,
        "objective": metric,
        "networks": len(networks),
        "epochs": epochs if ensemble is None else [network.kept_epoch(metric) for network in networks],
        "tta": {"chosen": views, "val_candidates": candidates},
        "val": {
            "trained_on": "training images only" if len(splits) == 1 else "the training images of each fold only",
            "images": len(val_labels),
            "without_tta": _full_scores(by_view["none"], val_labels, dataset.classes),
            "with_tta": _full_scores(by_view[views], val_labels, dataset.classes),
        },
        "test": {
            "trained_on": "training and validation images"
            if ensemble is None
            else "the training images of each member's fold",
            "images": len(test_labels),
            "opened": openings,
            "without_tta": _full_scores(test_logits["none"], test_labels, dataset.classes),
            "with_tta": _full_scores(test_logits[views], test_labels, dataset.classes),
        },
    }
    with bundle.writing(paths.refit(label)) as folder:
        bundle.Bundle(
            config=config,
            classes=dataset.classes,
            in_channels=dataset.images.shape[1],
            image_size=(dataset.images.shape[2], dataset.images.shape[3]),
            normalizations=tuple(bundle.Normalization(each.splits.mean, each.splits.std) for each in networks),
            views=views,
            data_name=dataset.name,
            fingerprint=dataset.fingerprint,
            versions=versions(),
            study=paths.name,
            trial=number,
            source=dataset.source,
        ).write(folder, [network.model for network in networks], report)
        table = metrics.confusion(test_logits[views], test_labels).cpu()
        confusion_matrix(table, dataset.classes, folder / "confusion.png", title=f"{dataset.name}, test images")
        rows = tuple(row for network in networks for row in network.rows)
        learning_curves(rows, folder / "learning_curves.png", title="refit", metric=metric)
        predicted = test_logits[views].argmax(1).cpu()
        write_submission(folder / "submission.csv", test.ids, predicted, dataset.classes)
    for checkpoint in paths.refit_checkpoints(label):
        checkpoint.unlink()
    return Refitted(
        dir=paths.refit(label),
        number=number,
        networks=len(networks),
        views=views,
        candidates=candidates,
        val=metrics.scores(by_view[views], val_labels),
        test=metrics.scores(test_logits[views], test_labels),
        test_plain=metrics.scores(test_logits["none"], test_labels),
        test_per_class=metrics.per_class(table, dataset.classes),
        openings=openings,
    )


@dataclass(frozen=True)
class _Network:
    """A trained network, with what it needs to see images as in its training."""

    model: nn.Module
    config: TrainConfig
    splits: Splits
    rows: tuple[Row, ...]
    """Of its training, an epoch a row, with its fold where there are folds."""

    def logits(self, images: Tensor, views: str) -> Tensor:
        """(N, K) on the labels' device, of images (N, C, H, W) uint8 wherever they lie."""
        return self._logits(torch.split(images, EVALUATION_BATCH), views)

    def val_logits(self, views: str) -> Tensor:
        """(M, K) of the images that it was validated on, in the order of `Splits.val`."""
        feed = open_feed(self.splits.images, self.splits.labels.device)
        return self._logits(feed.batches(torch.split(self.splits.val, EVALUATION_BATCH)), views)

    def _logits(self, batches: Iterable[Tensor], views: str) -> Tensor:
        """The network's answers, batch by batch; it may lie elsewhere, and stays there."""
        home, device = next(self.model.parameters()).device, self.splits.labels.device
        try:
            self.model.to(device)
            return torch.cat(
                [
                    predict_logits(
                        self.model,
                        images.to(device),
                        prepare=partial(normalize, mean=self.splits.mean, std=self.splits.std),
                        views=views,
                        batch_size=EVALUATION_BATCH,
                        autocast=partial(autocast, self.config.precision.autocast, device),
                    )
                    for images in batches
                ]
            )
        finally:
            self.model.to(home)

    def kept_epoch(self, metric: str) -> int:
        """The epoch whose weights it has: the last, or under early stopping the first of the best."""
        if self.config.early_stop.patience_fraction is None:
            return int(self.rows[-1]["epoch"])
        sign = 1 if metrics.METRICS[metric] == "maximize" else -1
        return int(max(self.rows, key=lambda row: sign * row[_column(metric)])["epoch"])


@dataclass(frozen=True)
class _Trainer:
    """Comes by the networks that a refit needs."""

    paths: StudyPaths
    number: int
    label: str
    trial_config: TrainConfig
    metric: str
    device: torch.device
    watch: Watch | None

    def network(self, config: TrainConfig, fold: int, splits: Sequence[Splits]) -> _Network:
        """The network of a fold: the trial's, where it trained this one and kept it, or trained now.

        Both are the same one, since a fold's training follows from its configuration.

        Args:
            config: with the folds that are wanted.
            fold: counted from 1.
            splits: one, or one a fold.
        """
        divided = splits[fold - 1]
        weights = self.paths.trial_model(self.number, fold)
        rows = self._trial_rows(fold)
        if config == self.trial_config and rows and weights.exists():
            return _Network(self._load(weights, divided), config, divided, rows)
        name = fold_label(fold, len(splits))
        if config == self.trial_config:
            logger.info("trial %d kept no weights%s: training it again", self.number, f" of {name}" if name else "")
        part = f"fold{fold}of{len(splits)}"
        result = self._train(of_fold(config, fold), divided, name or f"trial {self.number}", part, metric=self.metric)
        # Off the device, where the next fold's needs the room.
        model = result.model if len(splits) == 1 else result.model.cpu()
        return _Network(model, config, divided, self._rows(result, fold if len(splits) > 1 else None))

    def on_all_images(self, config: TrainConfig, whole: Splits, rows: Sequence[Row], epochs: int) -> _Network:
        """The network of a training without validation images, for the first so many epochs of the run.

        A plateau has nothing to watch there, so the learning rate falls where it fell in the trial, whose first fold's
        epochs are `rows`.
        """
        scores = [row[_column(self.metric)] for row in rows]
        maximize = metrics.METRICS[self.metric] == "maximize"
        schedule = replayed(config.schedule, scores, maximize=maximize, epochs=config.epochs)
        config = config.model_copy(update={"schedule": schedule})
        logger.info("training on %d images, %d epochs", len(whole.train), epochs)
        result = self._train(config, whole, "", "all", stop_after=epochs)
        return _Network(result.model, config, whole, self._rows(result, None))

    def _train(self, config: TrainConfig, splits: Splits, name: str, part: str, **options: Any) -> TrainResult:
        """Trains on from what a refit that was cut off had of this part, or anew where that is another's."""
        checkpoint = self.paths.refit_checkpoint(self.label, part)
        options |= {"device": self.device, "on_epoch_end": None if self.watch is None else self.watch(name)}
        options |= {"resume_from": checkpoint, "checkpoint_to": checkpoint, "checkpoint_at_end": True}
        return going_on(checkpoint, name or "the refit", lambda: train(config, splits, **options))

    def _rows(self, result: TrainResult, fold: int | None) -> tuple[Row, ...]:
        head: Row = {} if fold is None else {"fold": fold}
        return tuple({**head, **epoch.row(self.metric)} for epoch in result.history)

    def _trial_rows(self, fold: int) -> tuple[Row, ...]:
        """What the trial wrote down of this fold's epochs; nothing where it was taken over from another study."""
        file = self.paths.trial_metrics(self.number)
        lines = file.read_text().splitlines() if file.exists() else []
        return tuple(row for row in map(json.loads, lines) if row.get("fold", 1) == fold)

    def _load(self, weights: Path, splits: Splits) -> nn.Module:
        _, channels, height, width = splits.images.shape
        plain = self.trial_config.model.model_copy(update={"pretrained": False})  # the weights follow
        model: nn.Module = build_model(
            plain, num_classes=len(splits.classes), in_channels=channels, image_size=(height, width)
        ).to(self.device)
        try:
            load_model(model, weights)
        except (RuntimeError, OSError, SafetensorError) as error:
            raise StudyError(
                f"{weights}: does not hold trial {self.number}'s weights; delete it to train them again"
            ) from error
        return model.eval()


def _together(networks: Sequence[_Network], images: Tensor, views: str) -> Tensor:
    """(N, K): one network's logits, or the logarithm of the probabilities averaged over several."""
    return average(torch.stack([network.logits(images, views) for network in networks]))


def _column(metric: str) -> str:
    """The key of a row of `metrics.jsonl` that has the validation score by this metric."""
    return "val_loss" if metric == "nll" else f"val_{metric}"


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
