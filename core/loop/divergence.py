"""Detection of diverged trainings whose losses are finite.

In a diverged epoch, training and validation losses are far above those of uniform predictions, and accuracy and
balanced accuracy are those of chance, also for the averaged weights. The validation loss alone may be high for an
overfitted network, and while batch norm's running statistics lag behind. Of a loss of the user's own the scale is
unknown, so that only validation counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from core.config import TrainConfig, is_own
from core.errors import DivergedError
from core.loop.results import EpochMetrics
from core.losses import Criterion, Stage
from core.metrics import Scores

# Of 264 trainings on digits (8 to 32 epochs, all optimizers, schedules and losses, whole, long-tailed and mislabelled
# data, learning rates up to 100) these would have stopped 33, whose balanced accuracy ended at 0.11 or less.
FACTOR = 2.0
FRACTION = 0.25
FEWEST_EPOCHS = 5
# Chance exceeds two once in 44 epochs.
STANDARD_ERRORS = 2.0


class Divergence:
    """Detects divergence of a training with `train_counts` (K,) images of each class, from its validation."""

    def __init__(self, config: TrainConfig, criterion: Criterion, train_counts: Tensor, val_labels: Tensor) -> None:
        self._warmup_fraction, self._epochs = config.schedule.warmup_fraction, config.epochs
        classes = len(train_counts)
        self.loss = math.log(classes)
        """Cross-entropy of uniform predictions."""
        self.train_loss = -math.inf
        """Largest training loss of uniform predictions; any is larger than that of a loss of the user's own."""
        support = torch.bincount(val_labels, minlength=classes)
        self.accuracy, self.balanced_accuracy = _best_guesses(support[support > 0].tolist())
        if is_own(config.loss.name):
            return
        guess = torch.zeros(1, classes, device=train_counts.device)
        rarest = train_counts.argmin().unsqueeze(0)  # has the largest loss with logit adjustment
        self.train_loss = criterion(guess, rarest, Stage(smoothing=0.0, weighted=False)).item()

    def check(self, history: Sequence[EpochMetrics]) -> None:
        """Raise DivergedError if every epoch of the last quarter of a run, and of the last five, has diverged."""
        needed = max(FEWEST_EPOCHS, math.ceil(FRACTION * self._epochs))
        recent = history[-needed:]
        if len(recent) == needed and all(self.is_lost(epoch) for epoch in recent):
            raise DivergedError(
                f"for {needed} epochs up to epoch {recent[-1].epoch} the losses were more than {FACTOR:g} times those "
                "of a guess, and the accuracy was no better than chance; a lower optim.lr_scale may help"
            )

    def is_lost(self, epoch: EpochMetrics) -> bool:
        """Return whether the epoch has diverged; False during the warm-up."""
        if not epoch.validated or epoch.epoch <= self._warmup_fraction * self._epochs:
            return False
        judged = [scores for scores in (epoch.raw, epoch.averaged) if scores is not None]
        return epoch.train_loss > FACTOR * self.train_loss and all(map(self._is_no_better, judged))

    def _is_no_better(self, scores: Scores) -> bool:
        return (
            scores.loss > FACTOR * self.loss
            and scores.accuracy <= self.accuracy
            and scores.balanced_accuracy <= self.balanced_accuracy
        )


def _best_guesses(support: list[int]) -> tuple[float, float]:
    """Highest accuracy and balanced accuracy that chance explains."""
    if not support:
        return 0.0, 0.0
    images, classes = sum(support), len(support)
    majority, uniform = max(support) / images, 1 / classes
    error = math.sqrt(majority * (1 - majority) / images)
    # Standard error of the mean of recalls, each a mean over the images of its class.
    balanced_error = math.sqrt(uniform * (1 - uniform) * sum(1 / count for count in support)) / classes
    return majority + STANDARD_ERRORS * error, uniform + STANDARD_ERRORS * balanced_error
