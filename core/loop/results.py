"""Results of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from core import metrics
from core.metrics import Scores


@dataclass(frozen=True)
class EpochMetrics:
    """Metrics of an epoch, counted from 1."""

    epoch: int
    step: int
    lr: float
    train_loss: float
    raw: Scores | None
    """Validation scores of the weights; None if the average's alone count, and without validation images."""
    averaged: Scores | None
    """Those of the averaged weights; None while there are none."""
    averaged_counts: bool
    """Whether the average has caught up, so that its scores alone count."""
    images: int
    images_per_s: float
    """Training images per second."""
    elapsed_s: float
    """Seconds including validation and the time before a resumption."""
    micro_batch: int | None = None
    """Images per pass if a batch did not fit the memory, which only affects batch norm."""
    calibrated_loss: float | None = None
    """Validation loss of the counted predictions at their best temperature, if `train` was asked for it."""

    @property
    def validated(self) -> bool:
        """Whether there were validation images."""
        return self.raw is not None or self.averaged is not None

    def score(self, metric: str) -> float:
        """Return the average's score once it has caught up, and before that the better of both.

        Raises:
            ValueError: there were no validation images.
        """
        return metrics.value(self.counted(metric), metric)

    def counted(self, metric: str = "accuracy") -> Scores:
        """Return the scores that `score` uses."""
        candidates = (self.averaged,) if self.averaged_counts else (self.averaged, self.raw)
        scores = [scores for scores in candidates if scores is not None]
        if not scores:
            raise ValueError("there were no validation images to score")
        better = max if metrics.METRICS[metric] == "maximize" else min
        return better(scores, key=lambda scores: metrics.value(scores, metric))

    def row(self, metric: str = "accuracy") -> dict[str, float | int]:
        """Return a row of `metrics.jsonl`; `val_` columns are the scores counted by that metric."""
        row: dict[str, float | int] = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": self.lr,
            "train_loss": self.train_loss,
        }
        if self.validated:
            counted = self.counted(metric)
            row |= {
                "val_loss": counted.loss,
                "val_accuracy": counted.accuracy,
                "val_macro_f1": counted.macro_f1,
                "val_balanced_accuracy": counted.balanced_accuracy,
            }
        if self.raw is not None:
            row |= {"raw_val_loss": self.raw.loss, "raw_val_accuracy": self.raw.accuracy}
        if self.averaged is not None:
            row |= {"averaged_val_loss": self.averaged.loss, "averaged_val_accuracy": self.averaged.accuracy}
        if self.micro_batch is not None:
            row["micro_batch"] = self.micro_batch
        return row | {"images_per_s": self.images_per_s, "elapsed_s": self.elapsed_s}


@dataclass(frozen=True)
class TrainResult:
    """Result of a finished training."""

    model: nn.Module
    """In evaluation mode; the average if there is one."""
    history: tuple[EpochMetrics, ...]
    kept: EpochMetrics
    """The model's epoch: the last, or the best with early stopping."""
    val_logits: Tensor | None
    """(M, K) float32 of the model, in the order of `Splits.val`."""
    averages: Mapping[str, nn.Module] = field(default_factory=dict)
    """Alternatives to the model at its epoch, if averages were asked for: `ema_0.03`, an EMA by its half-life, and
    `none`, the weights themselves, if the model is an average of them."""

    def value(self, metric: str) -> float:
        """Return the model's score by that metric."""
        return self.kept.score(metric)
