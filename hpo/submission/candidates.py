"""Choices between candidates on held-out predictions, the simplest one first.

Another candidate is taken only if its gain over the simplest is beyond chance: the best of several equal ones scores
better by luck on a few hundred images. Where several networks predicted an image, its predictions are one unit of the
permutation test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from core import metrics
from core.calibration import HIGHEST, LOWEST, fit_temperature, scaled
from core.metrics import Gain
from core.runtime import make_generator

LEVEL = 0.05
"""Probability of taking any other candidate of a step if all are equally good, after Bonferroni's correction."""


@dataclass(frozen=True)
class Temperature:
    """A divisor of the logits, with the held-out scores of the chosen candidate before and after."""

    value: float
    before: metrics.Scores
    after: metrics.Scores
    why: str | None
    """Why it is not the best fit; None if it is."""

    def metadata(self) -> dict[str, Any]:
        metadata = {
            "value": self.value,
            "val_nll_before": self.before.loss,
            "val_nll_after": self.after.loss,
            "val_ece_before": self.before.ece,
            "val_ece_after": self.after.ece,
        }
        return metadata | ({} if self.why is None else {"why": self.why})


@dataclass(frozen=True)
class Candidate:
    """One candidate of a step."""

    step: str
    """`average`, `views`, `soup`, `ensemble` or `selection`."""
    name: str
    score: float
    """Held-out value of the metric; the loss with its best temperature."""
    gain: Gain | None
    """Over the step's simplest candidate; None of that one, and if a prediction is not finite."""
    passes: int
    """How often an image passes a network when the model predicts."""
    beyond: bool
    """Whether the gain is beyond chance."""
    taken: bool
    forced: bool
    """Whether the user has chosen, and not the evidence."""

    @property
    def verdict(self) -> str:
        """Why it was taken or not, in a few words."""
        if self.taken:
            return "taken, as asked for" if self.forced else "taken"
        if self.forced:
            return "not asked for"
        if self.gain is None:
            return "a candidate with a gain was taken" if math.isfinite(self.score) else "not finite"
        if self.beyond:
            return "beyond chance, but another gains more"
        return "no gain" if self.gain.value <= 0 else f"may be chance (p = {self.gain.chance:.2f})"

    def metadata(self) -> dict[str, Any]:
        gain = None if self.gain is None else asdict(self.gain)
        return {**asdict(self), "gain": gain, "verdict": self.verdict}


@dataclass(frozen=True)
class Judge:
    """Compares predictions of the same images."""

    images: Tensor
    """(M,) int64; equal numbers are predictions of one image."""
    labels: Tensor
    """(M,) int64."""
    metric: str
    averaged_later: bool = False
    """Whether these are logits of single networks, which the model averages."""

    def choose(
        self, step: str, answers: Mapping[str, Tensor], passes: Mapping[str, int], forced: str | None = None
    ) -> tuple[str, list[Candidate]]:
        """Choose among logits (M, K) by name, the simplest first; `forced` is taken in any case.

        Of several with a gain beyond chance, the best score is taken.
        """
        simplest = next(iter(answers))
        gains = self._gains(answers)
        scores = {name: self._score(logits) for name, logits in answers.items()}
        proven = [name for name, gain in gains.items() if gain.chance <= LEVEL / len(gains)]
        chosen = forced or max(proven, key=lambda name: gains[name].value, default=simplest)
        return chosen, [
            Candidate(
                step=step,
                name=name,
                score=scores[name],
                gain=gains.get(name),
                passes=passes[name],
                beyond=name in proven,
                taken=name == chosen,
                forced=forced is not None,
            )
            for name in answers
        ]

    def merit(self, logits: Tensor) -> float:
        """Return the score, the larger the better."""
        return self._score(logits) * (1 if metrics.METRICS[self.metric] == "maximize" else -1)

    def ranking(self, logits: Tensor, rows: Tensor | slice = slice(None)) -> tuple[float, float]:
        """Rank predictions (m, K) of these rows: by the metric, and of equals by the loss; the larger the better."""
        found = metrics.scores(logits, self.labels[rows])
        sign = 1 if metrics.METRICS[self.metric] == "maximize" else -1
        return round(sign * metrics.value(found, self.metric), 12), round(-found.loss, 12)

    def temperature(self, logits: Tensor) -> Temperature:
        """Fit the temperature, or choose a safer one.

        The temperature of an ensemble of folds is fitted to its single networks, and their average is less confident
        than each of them. So a temperature above 1 is not used. Measured on digits (4 folds; 12 and 40 epochs; label
        smoothing 0 and 0.1; 3 seeds each): the ensemble's test loss is never higher than with the fitted temperature
        or with none.
        """
        value, why, before = fit_temperature(logits, self.labels), None, metrics.scores(logits, self.labels)
        if before.accuracy == 1:
            # The best fit would be 0, with an unbounded loss for a mistake on another image.
            value, why = 1.0, "the validation images have no mistake to fit it to"
        elif value in (LOWEST, HIGHEST):
            why = f"the best fit is at the bound of {value:g} or beyond"
        elif self.averaged_later and value > 1:
            value, why = 1.0, f"{value:.3f} fits each single network, and their average is already less confident"
        return Temperature(value, before, metrics.scores(scaled(logits, value), self.labels), why)

    def _gains(self, answers: Mapping[str, Tensor]) -> dict[str, Gain]:
        """Gains over the first; the loss is that with the best temperature of each."""
        usable = {name: logits for name, logits in answers.items() if bool(logits.isfinite().all())}
        simplest = next(iter(answers))
        if simplest not in usable:
            return {}
        if self.metric == "nll":
            usable = {name: scaled(logits, self.temperature(logits).value) for name, logits in usable.items()}
        generator = make_generator(torch.device("cpu"), "candidates")
        return {
            name: metrics.paired_gain(
                logits, usable[simplest], self.labels, self.metric, generator=generator, images=self.images
            )
            for name, logits in usable.items()
            if name != simplest
        }

    def _score(self, logits: Tensor) -> float:
        """The value of the metric; the loss with its best temperature, else low confidence would win."""
        if self.metric == "nll" and bool(logits.isfinite().all()):
            return self.temperature(logits).after.loss
        return metrics.value(metrics.scores(logits, self.labels), self.metric)
