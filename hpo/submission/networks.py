"""The networks of a refit: the trial's own where it kept them, or trained now, and what they answer to images.

There are two kinds of several. Members differ in their seeds, and all see every image. Folds are each trained without
another part of the images.
"""

from __future__ import annotations

import json
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
from core.schedule import replayed
from core.tta import average, predict_logits
from hpo.errors import StudyError
from hpo.paths import StudyPaths
from hpo.search.training import Watch, fold_label, of_fold, resume_or_restart
from hpo.text import count

logger = logging.getLogger(__name__)

Row = dict[str, Any]
"""A line of `metrics.jsonl`."""


@dataclass(frozen=True)
class Network:
    """A trained network, with what it needs to see images as in its training."""

    model: nn.Module
    config: TrainConfig
    splits: Splits
    rows: tuple[Row, ...]
    """Of its training, an epoch a row; of several networks, each has its number as `fold`, by which a picture tells
    them apart."""
    elapsed_s: float = 0.0
    """That its training has taken here; 0 of one that a trial had trained."""

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
        """The images normalised."""
        return normalize(images, mean=self.splits.mean, std=self.splits.std)

    def kept_epoch(self, metric: str) -> int:
        """The epoch whose weights it has: the last, or under early stopping the first of the best."""
        if self.config.early_stop.patience_fraction is None:
            return int(self.rows[-1]["epoch"])
        sign = 1 if metrics.METRICS[metric] == "maximize" else -1
        return int(max(self.rows, key=lambda row: sign * row[_column(metric)])["epoch"])


def together(answers: Iterable[Tensor]) -> Tensor:
    """(N, K): one network's logits, or the logarithm of the probabilities averaged over several."""
    return average(torch.stack(list(answers)))


def averaged(networks: Sequence[Network]) -> Network:
    """One network of the mean weights, with batch-norm statistics of its own.

    It is shown the images that the networks were trained on, as it will see others: unmixed, not augmented, in their
    whole size. They are shuffled, since sorted by class a batch's variance would be too small.
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
    """The configuration that this member trains, counted from 1: every one but the first has a seed of its own."""
    return config if member == 1 else config.override({"seed": derive_seed(config.seed, "member", member)})


@dataclass(frozen=True)
class Trainer:
    """Comes by the networks that a refit needs.

    Several of them lie on the CPU, since the device's room is the next one's training's.
    """

    paths: StudyPaths
    number: int | None
    """The trial's; None of a configuration that is none."""
    label: str
    """The bundle's folder, whose checkpoints are gone on from."""
    config: TrainConfig
    """The trial's."""
    metric: str
    device: torch.device
    watch: Watch | None

    def folds(self, config: TrainConfig, splits: Sequence[Splits]) -> list[Network]:
        """The network of each fold, or the one network where there is one: trained without its validation images.

        Args:
            config: with the folds that are wanted.
            splits: one, or one a fold.
        """
        return [self._fold(config, fold, splits) for fold in range(1, len(splits) + 1)]

    def _fold(self, config: TrainConfig, fold: int, splits: Sequence[Splits]) -> Network:
        divided, name = splits[fold - 1], fold_label(fold, len(splits))
        kept = self._kept(config, fold, divided)
        if kept is not None:
            return kept
        if config == self.config and self.number is not None:
            logger.info("trial %d kept no weights%s: training it again", self.number, f" of {name}" if name else "")
        alone = "the configuration" if self.number is None else f"trial {self.number}"
        part = f"fold{fold}of{len(splits)}"
        network = self._train(of_fold(config, fold), divided, name or alone, part, fold if name else None)
        return replace(network, config=config)

    def members(self, config: TrainConfig, splits: Splits, count: int) -> list[Network]:
        """So many networks, each from another seed, trained without the validation images; the first is the trial's."""
        kept = self._kept(config, 1, splits)
        first = [] if kept is None else [replace(kept, model=kept.model.cpu())]
        return first + [
            self._train(of_member(config, n), splits, f"member {n} of {count}", f"member{n}", n)
            for n in range(len(first) + 1, count + 1)
        ]

    def on_all_images(
        self, config: TrainConfig, whole: Splits, rows: Sequence[Row], epochs: int, members: int | None
    ) -> list[Network]:
        """The network, or the members, of a training without validation images, for the run's first so many epochs.

        A plateau has nothing to watch there, so the learning rate falls where it fell in the training that had
        validation images, whose epochs are `rows`: for all members in that of the first, so that one configuration is
        that of all.
        """
        scores = [row[_column(self.metric)] for row in rows]
        maximize = metrics.METRICS[self.metric] == "maximize"
        schedule = replayed(config.schedule, scores, maximize=maximize, epochs=config.epochs)
        config = config.model_copy(update={"schedule": schedule})
        if members is None:
            logger.info("training on %s, %s", count(len(whole.train), "image"), count(epochs, "epoch"))
            return [self._train(config, whole, "", "all", None, stop_after=epochs)]
        images = count(len(whole.train), "image")
        logger.info("training %d networks on %s, %s each", members, images, count(epochs, "epoch"))
        return [
            self._train(of_member(config, n), whole, f"all images, {n} of {members}", f"all{n}", n, stop_after=epochs)
            for n in range(1, members + 1)
        ]

    def _kept(self, config: TrainConfig, fold: int, splits: Splits) -> Network | None:
        """The trial's own network of that fold; None where it trained another one, or did not keep it.

        It is the one that would be trained now, since a training follows from its configuration.
        """
        if self.number is None or config != self.config:
            return None
        weights, rows = self.paths.trial_model(self.number, fold), self._trial_rows(self.number, fold)
        if not rows or not weights.exists():
            return None
        return Network(self._load(weights, splits), config, splits, rows)

    def _train(
        self, config: TrainConfig, splits: Splits, name: str, part: str, place: int | None, **options: Any
    ) -> Network:
        """Trains on from what a refit that was cut off had of this part, or anew where that is another's.

        Args:
            name: what a person is told of it; empty where it needs no telling apart.
            part: names its checkpoint.
            place: its number among several, counted from 1; None where it is the only one.
        """
        checkpoint = self.paths.refit_checkpoint(self.label, part)
        options |= {"device": self.device, "on_epoch_end": None if self.watch is None else self.watch(name)}
        options |= {"resume_from": checkpoint, "checkpoint_to": checkpoint, "checkpoint_at_end": True}
        options |= {"metric": self.metric}
        result = resume_or_restart(checkpoint, name or "the refit", lambda: train(config, splits, **options))
        head: Row = {} if place is None else {"fold": place}
        rows = tuple({**head, **epoch.row(self.metric)} for epoch in result.history)
        model = result.model if place is None else result.model.cpu()
        return Network(model, config, splits, rows, result.history[-1].elapsed_s)

    def _trial_rows(self, number: int, fold: int) -> tuple[Row, ...]:
        """What the trial wrote down of this fold's epochs; nothing where it was taken over from another study."""
        file = self.paths.trial_metrics(number)
        lines = file.read_text().splitlines() if file.exists() else []
        return tuple(row for row in map(json.loads, lines) if row.get("fold", 1) == fold)

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
                f"{weights}: does not hold trial {self.number}'s weights; delete it to train them again"
            ) from error
        return model.eval()


def _column(metric: str) -> str:
    """The key of a row of `metrics.jsonl` that has the validation score by this metric."""
    return "val_loss" if metric == "nll" else f"val_{metric}"
