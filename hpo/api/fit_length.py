"""How long the refit of `hpo fit` should be, by the measured time of its configuration's trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpo.api.fit_plan import REFIT_SLOWER
from hpo.confirmation.candidates import best_searched
from hpo.confirmation.result import Confirmation
from hpo.confirmation.trials import seconds_per_epoch
from hpo.study import Study

FROM_SCRATCH = 4
"""Longest refit of a network that is not pretrained, as a multiple of the space's epochs. Longer trainings gain much
where the epochs are too few, and lose nothing where they suffice: 500 scenes gain 18 points from 32 to 128 epochs, and
digits 0.3 (`bench_length.py`)."""


@dataclass(frozen=True)
class Length:
    """Lengths of a configuration's schedule in epochs."""

    searched: int
    """Of its trial."""
    full: int
    """Of the space, whose trials may be shorter here; at least that of the trial."""
    longest: int
    """Of the refit, where the trials were made shorter."""
    epoch_s: float
    """Seconds of the training on all images for an epoch of its schedule."""

    @property
    def is_shortened(self) -> bool:
        """Whether the trials were made shorter, to fit the time."""
        return self.full > self.searched

    @property
    def longest_s(self) -> float:
        """Time of a refit of the greatest length."""
        return REFIT_SLOWER * self.longest * self.epoch_s


def length_of_refit(study: Study, choice: Mapping[str, Any], confirmation: Confirmation | None = None) -> Length | None:
    """Return the lengths of the configuration that will be refitted; None for a probe, or if its time is not known.

    Args:
        choice: The recorded one of `hpo fit`.
        confirmation: None takes the best of the search.

    Raises:
        StudyError: No trial is complete.
    """
    chosen = best_searched(study) if confirmation is None else confirmation.contender(confirmation.winner)
    epoch_s = seconds_per_epoch(study, chosen.trial)
    if epoch_s is None or chosen.train_config.is_probe:
        return None
    searched = chosen.train_config.epochs
    trained = chosen.epochs / searched  # less with early stopping
    full = max(searched, int(choice.get("epochs", 0)))  # none in records before this field
    longest = full if chosen.train_config.model.pretrained else FROM_SCRATCH * full
    return Length(searched, full, longest, trained * epoch_s * float(choice["whole"]))
