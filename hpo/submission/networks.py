"""The networks of a refit, kept by the trial or trained now: one, the folds, or members with different seeds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

from core import metrics
from core.averaging import mean_of, recalibrate
from core.config import TrainConfig
from core.data import Splits
from core.feed import open_feed
from core.loop import train
from core.loop.step import batch_sizes
from core.models import build_model
from core.runtime import autocast, make_generator, normalize
from core.schedule import without_validation
from core.seeds import derive_seed
from core.text import count
from core.tta import EVALUATION_BATCH, average, evaluation_batch
from hpo.errors import StudyError
from hpo.paths import StudyPaths, TrainingPaths
from hpo.search.held_out import OWN, held_out, predicted
from hpo.search.training import Watch, fold_label, of_fold, resume_or_restart
from hpo.study.results import Row, read_rows

logger = logging.getLogger(__name__)


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
    averages: Mapping[str, nn.Module] = field(default_factory=dict)
    """Alternatives to the model, see `TrainResult.averages`."""

    def with_average(self, name: str) -> Network:
        """Return the network with another average of its weights, `own` for this one."""
        return self if name == OWN else replace(self, model=self.averages[name])

    def logits(self, images: Tensor, views: str) -> Tensor:
        """Predict images (N, C, H, W) uint8 on any device: logits (N, K) on the labels' device."""
        batches = torch.split(images, EVALUATION_BATCH)
        return predicted(self.model, self.config, self.splits, batches, (views,))[views]

    def val_logits(self, views: str) -> Tensor:
        """Predict the validation images: logits (M, K) in the order of `Splits.val`."""
        return self.val_by_views((views,))[views]

    def val_by_views(self, views: Collection[str]) -> dict[str, Tensor]:
        """Predict the validation images with several choices of views."""
        return held_out(self.model, self.config, self.splits, views)

    def prepare(self, images: Tensor) -> Tensor:
        return normalize(images, mean=self.splits.mean, std=self.splits.std)


def kept_epoch(config: TrainConfig, rows: Sequence[Row], metric: str) -> int:
    """Return the epoch of a training's weights: the last, or with early stopping the first of the best."""
    if config.early_stop.patience_fraction is None:
        return int(rows[-1]["epoch"])
    sign = 1 if metrics.METRICS[metric] == "maximize" else -1
    return int(max(rows, key=lambda row: sign * row[_column(metric)])["epoch"])


def together(answers: Iterable[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Combine logits (N, K) of networks: of several, the logarithm of the mean probabilities, perhaps weighted."""
    return average(torch.stack(list(answers)), weights)


def averaged(networks: Sequence[Network]) -> Network:
    """Build the network of the mean weights, with batch-norm statistics recomputed on the plain training images.

    The images are shuffled: in batches sorted by class the variance is too small.
    """
    first = networks[0]
    splits, device = first.splits, first.splits.labels.device
    mean = mean_of([network.model for network in networks]).to(device)
    generator = make_generator(device, first.config.seed, "recalibrate")
    order = torch.randperm(len(splits.train), generator=generator, device=device)
    height, width = splits.images.shape[-2:]
    together = max(evaluation_batch(first.config.model, (height, width), device), first.config.batch_size)
    rows = torch.split(splits.train[order], batch_sizes(len(order), together))
    with autocast(first.config.precision.autocast, device):
        recalibrate(mean, map(first.prepare, open_feed(splits.images, device).batches(rows)))
    return replace(first, model=mean)


def stretched(epochs: int, of: int, length: int) -> int:
    """Return the epochs that are the same part of another length, at least 1."""
    return max(1, int(epochs / of * length + 0.5))


def of_member(config: TrainConfig, member: int) -> TrainConfig:
    """Return the configuration of a member, counted from 1; all but the first get seeds of their own."""
    return config if member == 1 else config.override({"seed": derive_seed(config.seed, "member", member)})


def averaging_by(config: TrainConfig, average: str) -> TrainConfig:
    """Return the configuration that keeps another average of its weights: `own`, `none` or an EMA, such as `ema_0.03`.

    Without validation images the training is the same.
    """
    if average == OWN:
        return config
    name, _, half_life = average.partition("_")
    return config.override(
        {"averaging.name": name} | ({"averaging.half_life_fraction": float(half_life)} if half_life else {})
    )


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
    left_s: Callable[[], float] | None = None
    """Seconds that are left for the training on all images, which is shortened to fit; None without a limit."""
    averages: tuple[float, ...] = ()
    """Half-lives of the EMAs beside each training with held-out images, which a trial's kept network lacks."""

    def folds(self, config: TrainConfig, splits: Sequence[Splits]) -> list[Network]:
        """Return the network of each fold, trained without its validation images; one network without folds."""
        return [self._fold(config, fold, splits) for fold in range(1, len(splits) + 1)]

    def _fold(self, config: TrainConfig, fold: int, splits: Sequence[Splits]) -> Network:
        divided, name = splits[fold - 1], fold_label(fold, len(splits))
        kept = self._kept(config, fold, divided)
        if kept is not None:
            return kept
        if config == self.config and self.kept is not None and self.number is not None:
            why = "with EMAs of its weights" if self.averages else "it kept no weights"
            logger.info("training trial %d%s again: %s", self.number, f", {name}," if name else "", why)
        alone = "the configuration" if self.number is None else f"trial {self.number}"
        part = f"fold{fold}of{len(splits)}"
        place = fold if name else None
        network = self._train(of_fold(config, fold), divided, name or alone, part, place, averages=self.averages)
        return replace(network, config=config)

    def members(self, config: TrainConfig, splits: Splits, count: int) -> list[Network]:
        """Return networks with different seeds, trained without the validation images; the first may be the trial's."""
        kept = self._kept(config, 1, splits)
        first = [] if kept is None else [replace(kept, model=kept.model.cpu())]
        return first + [
            self._train(of_member(config, n), splits, f"member {n} of {count}", f"member{n}", n, averages=self.averages)
            for n in range(len(first) + 1, count + 1)
        ]

    def on_all_images(
        self,
        config: TrainConfig,
        whole: Splits,
        rows: Sequence[Row],
        epochs: int,
        members: Sequence[int] = (),
        *,
        length: int | None = None,
    ) -> list[Network]:
        """Train the network, or these members, without validation images.

        Args:
            rows: Epochs of the training with validation images.
            epochs: Of these, of the configuration's.
            length: Stretches (or shrinks) the schedule to as many epochs; None for the configuration's.
        """
        config = self._without_validation(config, rows)
        if length is not None:
            config, epochs = config.override({"epochs": length}), stretched(epochs, config.epochs, length)
        images, long = count(len(whole.train), "image"), count(epochs, "epoch")
        if not members:
            logger.info("training on %s, %s", images, long)
            return [self._train(config, whole, "", "all", None, stop_after=epochs)]
        logger.info("training %s on %s, %s each", count(len(members), "network"), images, long)
        names = {n: f"all images, {place} of {len(members)}" for place, n in enumerate(members, 1)}
        return [
            self._train(of_member(config, n), whole, name, f"all{n}", n, stop_after=epochs) for n, name in names.items()
        ]

    def selected(self, trainings: Sequence[tuple[TrainConfig, Sequence[Row], int]], whole: Splits) -> list[Network]:
        """Train a network of each configuration without validation images.

        Args:
            trainings: Configuration, epochs of its training with validation images, and number of epochs now.
        """
        total = len(trainings)
        logger.info("training %s on %s", count(total, "configuration"), count(len(whole.train), "image"))
        return [
            self._train(
                self._without_validation(config, rows),
                whole,
                f"all images, {place} of {total}",
                f"selected{place}",
                place,
                stop_after=epochs,
            )
            for place, (config, rows, epochs) in enumerate(trainings, 1)
        ]

    def _without_validation(self, config: TrainConfig, rows: Sequence[Row]) -> TrainConfig:
        """Let a plateau's learning rate and the smoothing fall where they fell in the training with validation images.

        Without those images there is no score to watch.
        """
        scores, losses = ([row[column] for row in rows] for column in (_column(self.metric), "val_loss"))
        return without_validation(config, scores, losses, maximize=metrics.METRICS[self.metric] == "maximize")

    def _kept(self, config: TrainConfig, fold: int, splits: Splits) -> Network | None:
        """The recorded network of a fold; None if another was trained, it kept no weights, or averages are tried."""
        if self.kept is None or self.averages or config != self.config:
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
        averages: tuple[float, ...] = (),
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
            averages=averages,
            stop_after=stop_after,
            left_s=None if len(splits.val) else self.left_s,
        )
        result = resume_or_restart(checkpoint, name or "the refit", attempt)
        if stop_after is not None and len(result.history) < stop_after:
            logger.info("shortened to %s of %d, to end in time", count(len(result.history), "epoch"), stop_after)
        head: Row = {} if place is None else {"fold": place}
        rows = tuple({**head, **epoch.row(self.metric)} for epoch in result.history)
        several = place is not None
        model = result.model.cpu() if several else result.model
        others = {name: each.cpu() if several else each for name, each in result.averages.items()}
        return Network(model, config, splits, rows, result.history[-1].elapsed_s, others)

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
