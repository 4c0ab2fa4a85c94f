"""What a training tells: an epoch's figures, and what is left when it is over."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from core import metrics
from core.metrics import Scores


@dataclass(frozen=True)
class EpochMetrics:
    """What is known at the end of an epoch, counted from 1."""

    epoch: int
    step: int
    lr: float
    train_loss: float
    raw: Scores | None
    """Validation scores of the weights themselves; None without validation images."""
    averaged: Scores | None
    """Validation scores of the averaged weights; None where there are none yet."""
    averaged_counts: bool
    """Whether the average has caught up: from then on it alone is judged."""
    images: int
    """Training images shown in it."""
    images_per_s: float
    """Of those, while it trained: validation is not counted."""
    elapsed_s: float
    """Since the training began, validation and what was before a resumption included."""
    micro_batch: int | None = None
    """Images of one pass through the network, where a whole batch did not fit the device's memory: the steps are the
    same but for batch norm, which saw that many images at once. None: whole batches."""

    def score(self, metric: str) -> float:
        """The value that this epoch is judged by.

        That of the averaged weights once they have caught up, and before that the better of both: an average that
        still remembers the first weights must not decide a rung.

        Raises:
            ValueError: there were no validation images.
        """
        return metrics.value(self.counted(metric), metric)

    def counted(self, metric: str = "accuracy") -> Scores:
        """The scores that `score` takes its value from."""
        if self.raw is None:
            raise ValueError("there were no validation images to score")
        if self.averaged is None:
            return self.raw
        if self.averaged_counts:
            return self.averaged
        better = max if metrics.METRICS[metric] == "maximize" else min
        return better(self.averaged, self.raw, key=lambda scores: metrics.value(scores, metric))

    def row(self, metric: str = "accuracy") -> dict[str, float | int]:
        """One line of `metrics.jsonl`: flat, and without what does not apply. `val_` is what counts by that metric."""
        row: dict[str, float | int] = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": self.lr,
            "train_loss": self.train_loss,
        }
        if self.raw is not None:
            counted = self.counted(metric)
            row |= {
                "val_loss": counted.loss,
                "val_accuracy": counted.accuracy,
                "val_macro_f1": counted.macro_f1,
                "val_balanced_accuracy": counted.balanced_accuracy,
                "raw_val_loss": self.raw.loss,
                "raw_val_accuracy": self.raw.accuracy,
            }
        if self.averaged is not None:
            row |= {"averaged_val_loss": self.averaged.loss, "averaged_val_accuracy": self.averaged.accuracy}
        if self.micro_batch is not None:
            row["micro_batch"] = self.micro_batch
        return row | {"images_per_s": self.images_per_s, "elapsed_s": self.elapsed_s}


@dataclass(frozen=True)
class TrainResult:
    """A finished training."""

    model: nn.Module
    """The network that is kept, in evaluation mode: averaged where there is averaging."""
    history: tuple[EpochMetrics, ...]
    kept: EpochMetrics
    """The epoch whose weights are kept: the last one, or the best one under early stopping."""
    val_logits: Tensor | None
    """(M, K) float32 of the kept network on the validation images, in the order of `Splits.val`."""

    def value(self, metric: str) -> float:
        """The result by that metric."""
        return self.kept.score(metric)
