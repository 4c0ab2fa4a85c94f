"""The networks of a refit, kept by the trial or trained now: one, the folds, or members with different seeds."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

from core import metrics
from core.averaging import mean_of, recalibrate
from core.config import TrainConfig
from core.data import Splits
from core.feed import open_feed
from core.loop import EVALUATION_BATCH, train
from core.loop.step import batch_sizes
from core.models import build_model
from core.runtime import autocast, derive_seed, make_generator, normalize
from core.schedule import without_validation
from core.tta import average, predict_logits
from hpo.errors import StudyError
from hpo.paths import StudyPaths, TrainingPaths
from hpo.search.training import Watch, fold_label, of_fold, resume_or_restart
from hpo.study.results import read_rows
from hpo.text import count

logger = logging.getLogger(__name__)

Row = dict[str, Any]
"""A line of `metrics.jsonl`."""


@dataclass(frozen=True)
class Network:
    """A trained network, its configuration and its images."""

    model: nn.Module
    config: TrainConfig
    splits: Splits
    rows: tuple[Row, ...]
    """Epochs of its training; for learning curves, the number of one of several networks is in `fold`."""
    elapsed_s: float = 0.0
    """Duration of its training; 0 if the trial trained it."""

    def logits(self, images: Tensor, views: str) -> Tensor:
        """Predict images (N, C, H, W) uint8 on any device: logits (N, K) on the labels' device."""
        return self._logits(torch.split(images, EVALUATION_BATCH), views)

    def val_logits(self, views: str) -> Tensor:
        """Predict the validation images: logits (M, K) in the order of `Splits.val`."""
        feed = open_feed(self.splits.images, self.splits.labels.device)
        return self._logits(feed.batches(torch.split(self.splits.val, EVALUATION_BATCH)), views)

    def _logits(self, batches: Iterable[Tensor], views: str) -> Tensor:
        home, device = next(self.model.parameters()).device, self.splits.labels.device
        try:
            self.model.to(device)
            return torch.cat(
                [
                    predict_logits(
                        self.model,
                        images.to(device),
                        prepare=self.prepare,
                        views=views,
                        batch_size=EVALUATION_BATCH,
                        autocast=partial(autocast, self.config.precision.autocast, device),
                    )
                    for images in batches
                ]
            )
        finally:
            self.model.to(home)

    def prepare(self, images: Tensor) -> Tensor:
        return normalize(images, mean=self.splits.mean, std=self.splits.std)

    def kept_epoch(self, metric: str) -> int:
        """Return the epoch of its weights: the last, or with early stopping the first of the best."""
        if self.config.early_stop.patience_fraction is None:
            return int(self.rows[-1]["epoch"])
        sign = 1 if metrics.METRICS[metric] == "maximize" else -1
        return int(max(self.rows, key=lambda row: sign * row[_column(metric)])["epoch"])


def together(answers: Iterable[Tensor]) -> Tensor:
    """Combine logits (N, K) of networks: of several, the logarithm of the mean probabilities."""
    return average(torch.stack(list(answers)))


def averaged(networks: Sequence[Network]) -> Network:
    """Build the network of the mean weights, with batch-norm statistics recomputed on the plain training images.

    The images are shuffled: in batches sorted by class the variance is too small.
    """
    first = networks[0]
    splits, device = first.splits, first.splits.labels.device
    mean = mean_of([network.model for network in networks]).to(device)
    generator = make_generator(device, first.config.seed, "recalibrate")
    order = torch.randperm(len(splits.train), generator=generator, device=device)
    rows = torch.split(splits.train[order], batch_sizes(len(order), EVALUATION_BATCH))
    with autocast(first.config.precision.autocast, device):
        recalibrate(mean, map(first.prepare, open_feed(splits.images, device).batches(rows)))
    return replace(first, model=mean)


def of_member(config: TrainConfig, member: int) -> TrainConfig:
    """Return the configuration of a member, counted from 1; all but the first get seeds of their own."""
    return config if member == 1 else config.override({"seed": derive_seed(config.seed, "member", member)})


@dataclass(frozen=True)
class Trainer:
    """Loads or trains the networks of a refit; several are kept on the CPU, to free the device's memory."""

    paths: StudyPaths
    number: int | None
    """Trial number; None if no trial has the configuration."""
    label: str
    """Name of the bundle's folder and of the checkpoints."""
    config: TrainConfig
    metric: str
    device: torch.device
    watch: Watch | None
    kept: TrainingPaths | None = None
    """Folder with weights and epochs of this configuration, a trial's or those of a ladder; None if there are none."""

    def folds(self, config: TrainConfig, splits: Sequence[Splits]) -> list[Network]:
        """Return the network of each fold, trained without its validation images; one network without folds."""
        return [self._fold(config, fold, splits) for fold in range(1, len(splits) + 1)]

    def _fold(self, config: TrainConfig, fold: int, splits: Sequence[Splits]) -> Network:
        divided, name = splits[fold - 1], fold_label(fold, len(splits))
        kept = self._kept(config, fold, divided)
        if kept is not None:
            return kept
        if config == self.config and self.kept is not None and self.number is not None:
            logger.info("trial %d kept no weights%s: training it again", self.number, f" of {name}" if name else "")
        alone = "the configuration" if self.number is None else f"trial {self.number}"
        part = f"fold{fold}of{len(splits)}"
        network = self._train(of_fold(config, fold), divided, name or alone, part, fold if name else None)
        return replace(network, config=config)

    def members(self, config: TrainConfig, splits: Splits, count: int) -> list[Network]:
        """Return networks with different seeds, trained without the validation images; the first may be the trial's."""
        kept = self._kept(config, 1, splits)
        first = [] if kept is None else [replace(kept, model=kept.model.cpu())]
        return first + [
            self._train(of_member(config, n), splits, f"member {n} of {count}", f"member{n}", n)
            for n in range(len(first) + 1, count + 1)
        ]

    def on_all_images(
        self, config: TrainConfig, whole: Splits, rows: Sequence[Row], epochs: int, members: int | None
    ) -> list[Network]:
        """Train the network, or the members, without validation images.

        Without a score to watch, a plateau's learning rate and the smoothing fall where they fell in the training with
        validation images, whose epochs are `rows`.
        """
        scores, losses = ([row[column] for row in rows] for column in (_column(self.metric), "val_loss"))
        config = without_validation(config, scores, losses, maximize=metrics.METRICS[self.metric] == "maximize")
        images, long = count(len(whole.train), "image"), count(epochs, "epoch")
        if members is None:
            logger.info("training on %s, %s", images, long)
            return [self._train(config, whole, "", "all", None, stop_after=epochs)]
        logger.info("training %d networks on %s, %s each", members, images, long)
        return [
            self._train(of_member(config, n), whole, f"all images, {n} of {members}", f"all{n}", n, stop_after=epochs)
            for n in range(1, members + 1)
        ]

    def _kept(self, config: TrainConfig, fold: int, splits: Splits) -> Network | None:
        """The recorded network of a fold; None if another configuration was trained, or its weights were not kept."""
        if self.kept is None or config != self.config:
            return None
        # No rows: the trial was imported from another study.
        rows = tuple(row for row in read_rows(self.kept.metrics) if row.get("fold", 1) == fold)
        weights = self.kept.model(fold)
        if not rows or not weights.exists():
            return None
        return Network(self._load(weights, splits), config, splits, rows)

    def _train(
        self,
        config: TrainConfig,
        splits: Splits,
        name: str,
        part: str,
        place: int | None,
        stop_after: int | None = None,
    ) -> Network:
        """Train a network, or resume its training from the checkpoint of an interrupted refit.

        The only training has an empty `name`, and `place` is None.
        """
        checkpoint = self.paths.refit_checkpoint(self.label, part)
        attempt = partial(
            train,
            config,
            splits,
            device=self.device,
            on_epoch_end=None if self.watch is None else self.watch(name),
            resume_from=checkpoint,
            checkpoint_to=checkpoint,
            checkpoint_at_end=True,
            metric=self.metric,
            stop_after=stop_after,
        )
        result = resume_or_restart(checkpoint, name or "the refit", attempt)
        head: Row = {} if place is None else {"fold": place}
        rows = tuple({**head, **epoch.row(self.metric)} for epoch in result.history)
        model = result.model if place is None else result.model.cpu()
        return Network(model, config, splits, rows, result.history[-1].elapsed_s)

    def _load(self, weights: Path, splits: Splits) -> nn.Module:
        _, channels, height, width = splits.images.shape
        plain = self.config.model.model_copy(update={"pretrained": False})  # the weights follow
        model: nn.Module = build_model(
            plain, num_classes=len(splits.classes), in_channels=channels, image_size=(height, width)
        ).to(self.device)
        try:
            load_model(model, weights)
        except (RuntimeError, OSError, SafetensorError) as error:
            raise StudyError(
                f"{weights}: these are not weights of this configuration; delete the file to train them again"
            ) from error
        return model.eval()


def _column(metric: str) -> str:
    """Key of a metric's validation score in a row of `metrics.jsonl`."""
    return "val_loss" if metric == "nll" else f"val_{metric}"
