"""When a training is given up though its losses are finite: far worse than a guess, for long.

A guess gives every class the same probability. A loss alone says little. An overfitted network's validation loss may
be several times a guess's while its accuracy is fine; and for epochs after a start at a high rate, while batch norm's
running statistics lag behind the weights, validation may lie at chance with a loss in the thousands though training
goes well. So an epoch is lost only where everything agrees: the training loss and the validation loss both lie far
above a guess's, accuracy and balanced accuracy are no better than chance, and the averaged weights, where there are
any, are as bad. Validation is judged by cross-entropy whatever is minimised. What is minimised is compared with its own
value for a guess, since focal loss, binary cross-entropy and logit adjustment each have another scale; mixtures,
smoothing and class weights leave a guess's loss as it is, or lower it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from core.config import TrainConfig
from core.errors import DivergedError
from core.loop.results import EpochMetrics
from core.losses import Criterion, Stage
from core.metrics import Scores

# How many times a guess's a loss has to be, and for how long on end: a quarter of the run, and five epochs. In 264
# trainings on digits (8 to 32 epochs of all optimizers, schedules and losses, with and without batch norm, averaging
# and class weights; on whole, long-tailed and mislabelled data) at learning rates up to 100, this would have given up
# 33. Left alone, every one of them ended with a balanced accuracy of 0.11 or less, of ten classes.
FACTOR = 2.0
FRACTION = 0.25
FEWEST_EPOCHS = 5
# Of a guess's accuracy, above which it is no guess any more: two are exceeded by chance once in 44 epochs.
STANDARD_ERRORS = 2.0


class Divergence:
    """Judges one training's epochs.

    Args:
        config: the training's.
        criterion: what it minimises.
        train_counts: (K,) int64, the training images of each class.
        val_labels: (M,) int64 in [0, K); with none, nothing is ever given up.
    """

    def __init__(self, config: TrainConfig, criterion: Criterion, train_counts: Tensor, val_labels: Tensor) -> None:
        self._warmup_fraction, self._epochs = config.schedule.warmup_fraction, config.epochs
        classes = len(train_counts)
        self.loss = math.log(classes)
        """A guess's cross-entropy, in nats."""
        guess = torch.zeros(1, classes, device=train_counts.device)
        rarest = train_counts.argmin().unsqueeze(0)  # under logit adjustment the class that a guess does worst at
        self.train_loss = criterion(guess, rarest, Stage(smoothing=0.0, weighted=False)).item()
        """The most that what is minimised can be of a guess."""
        support = torch.bincount(val_labels, minlength=classes)
        self.accuracy, self.balanced_accuracy = _best_guesses(support[support > 0].tolist())

    def check(self, history: Sequence[EpochMetrics]) -> None:
        """To be called after every epoch.

        Args:
            history: all epochs so far.

        Raises:
            DivergedError: every epoch of the last quarter of a run, and of the last five, is lost.
        """
        needed = max(FEWEST_EPOCHS, math.ceil(FRACTION * self._epochs))
        recent = history[-needed:]
        if len(recent) == needed and all(self.is_lost(epoch) for epoch in recent):
            raise DivergedError(
                f"for {needed} epochs up to epoch {recent[-1].epoch} the losses were more than {FACTOR:g} times those "
                "of a guess, and the accuracy was no better than chance; a lower optim.lr_scale may help"
            )

    def is_lost(self, epoch: EpochMetrics) -> bool:
        """Whether all that is known of the epoch is far worse than a guess; never while the rate warms up."""
        if epoch.raw is None or epoch.epoch <= self._warmup_fraction * self._epochs:
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
    """The accuracy and the balanced accuracy up to which chance explains them.

    Args:
        support: the validation images of each class that has any.
    """
    if not support:
        return 0.0, 0.0
    images, classes = sum(support), len(support)
    majority, uniform = max(support) / images, 1 / classes
    error = math.sqrt(majority * (1 - majority) / images)
    # Of the mean of recalls, each a mean over its class's images.
    balanced_error = math.sqrt(uniform * (1 - uniform) * sum(1 / count for count in support)) / classes
    return majority + STANDARD_ERRORS * error, uniform + STANDARD_ERRORS * balanced_error
