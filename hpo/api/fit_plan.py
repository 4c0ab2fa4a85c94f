"""How `hpo fit` divides its time: the epochs of a trial, and the shares of search, confirmation and refit.

A trial is short enough that the search's share holds ten trainings of the baseline, of which pruning makes some thirty
trials. Half of the time is for what comes after: the confirmation is worth as much as the search, and the final
training is longer than a trial that had to be short: as long as the space's own trials, or as long as fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SEARCH, CONFIRM, REFIT = 0.45, 0.30, 0.25
"""Shares of the time that training may take."""
SEARCH_ALONE = 0.60
"""The search's share without a confirmation; the refit has the rest."""
TRAININGS = 10
"""Trainings of the baseline in full that the search's share holds."""
TRAININGS_ALONE = 5
"""The same without a confirmation."""
LEAST_TRAININGS = 4
"""Of a confirmation: two configurations on two seeds each."""
FEWEST_EPOCHS = 5
LEAST_PART = 1 / 3
"""Shorter trials, in epochs or as a part of the space's own, are avoided by leaving out the confirmation, then the
search. On TrashNet from scratch the winner of trials of 6 epochs had 0.61, and the baseline after 47 epochs 0.77."""
SLOWER = 1.3
"""Real time of a training relative to that of a few timed steps, where nothing can be corrected later."""
REFIT_SLOWER = 1.1
"""Real time of the refit relative to that of the trials."""
REPORT_S = 8.0
"""Writing the report, with its imports: 4 to 8 s on two cores of a shared EPYC."""
BUNDLE_S = 4.0
"""Evaluating the model on few images, and writing it."""
END_S = 2.0
"""Ending the process, and the longest step between two looks at the clock."""


@dataclass(frozen=True)
class Timed:
    """The measured speed of a baseline."""

    epoch_s: float
    """Seconds of an epoch with validation."""
    whole: float
    """Images outside the test set as a multiple of the training images."""
    beside_s: float = 0.0
    """Seconds of the probes, which are trained before the trials."""
    after_s: float = 0.0
    """Seconds of what follows the last training: evaluating and writing the model, predictions, report."""
    end_s: float = 0.0
    """Of these, what does not depend on the number of views."""
    pass_s: float = 0.0
    """Seconds in which the images to predict pass the network once."""


@dataclass(frozen=True)
class Plan:
    """Epochs of a trial, and seconds of each stage."""

    epochs: int
    search_s: float
    confirm_s: float
    """0: no confirmation."""
    refit_s: float
    after_s: float
    left_out: tuple[str, ...] = ()
    """One line for each part that does not fit."""


def divide(left_s: float, timed: Timed, most_epochs: int, *, fewest_epochs: int | None = None) -> Plan | None:
    """Divide the seconds that are left; None if not even one epoch and its refit fit.

    Args:
        most_epochs: Of the search space: a trial has no more.
        fewest_epochs: As many, if possible; None for those that are worth a search.
    """
    free_s, beside_s = left_s - timed.after_s, timed.beside_s
    fewest = max(FEWEST_EPOCHS, math.ceil(LEAST_PART * most_epochs)) if fewest_epochs is None else fewest_epochs
    enough = min(fewest, most_epochs)
    epochs = min(most_epochs, int((SEARCH * free_s - beside_s) / (TRAININGS * timed.epoch_s)))
    if epochs >= enough:
        return Plan(epochs, SEARCH * free_s, CONFIRM * free_s, REFIT * free_s, timed.after_s)
    epochs = min(most_epochs, int((SEARCH_ALONE * free_s - beside_s) / (TRAININGS_ALONE * timed.epoch_s)))
    unconfirmed = "no confirmation: it would leave the search too little time"
    if epochs >= enough:
        search_s = SEARCH_ALONE * free_s
        return Plan(epochs, search_s, 0.0, free_s - search_s, timed.after_s, (unconfirmed,))
    one_s = SLOWER * timed.epoch_s
    epochs = min(enough, int((free_s - beside_s) / (one_s * (1 + timed.whole))))
    if epochs < 1:
        return None
    search_s = beside_s + epochs * one_s
    alone = "no search, unless trainings are faster than a few timed steps: there is time for the baseline alone"
    return Plan(epochs, search_s, 0.0, free_s - search_s, timed.after_s, (alone,))


def confirmation_s(both_s: float, least_s: float) -> float:
    """The confirmation's share of the seconds for search and confirmation; 0 if that is less than the least."""
    share_s = CONFIRM / (SEARCH + CONFIRM) * both_s
    return share_s if share_s >= least_s else 0.0


def least_s(timed: Timed, epochs: int) -> float:
    """Seconds that one training, its refit and what follows take."""
    return timed.after_s + timed.beside_s + SLOWER * timed.epoch_s * epochs * (1 + timed.whole)
