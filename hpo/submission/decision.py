"""The choices of a refit: average, views, form of several networks, temperature, in this order.

All rest on predictions of networks that have not seen the images (`Evidence`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from core.calibration import scaled
from core.tta import passes
from hpo.search.held_out import NONE
from hpo.submission.candidates import Candidate, Judge, Temperature
from hpo.submission.evidence import Evidence

ONE, UNIFORM_SOUP, GREEDY_SOUP, ENSEMBLE = FORMS = ("one", "uniform_soup", "greedy_soup", "ensemble")
"""Forms of a model: one network, one with mean weights (see `members`), or several whose probabilities are averaged."""


@dataclass(frozen=True)
class Forced:
    """The candidates that the user has chosen; None leaves the choice to the evidence."""

    average: str | None = None
    views: str | None = None
    form: str | None = None


@dataclass(frozen=True)
class Chosen:
    """One network of an ensemble of several configurations."""

    name: str
    """For example `trial 12`; `the winner` if no trial has its configuration."""
    trial: int | None
    weight: float
    """Of its probabilities; all add to 1."""
    average: str
    views: str
    epochs: int | None = None
    """Of its training on all images; None before it is known."""


FREE = Forced()
"""Leaves every choice to the evidence."""


@dataclass(frozen=True)
class Decision:
    """The choices, and the predictions that they rest on."""

    average: str
    """`own`, `none` or an EMA by its half-life, such as `ema_0.03`."""
    views: str
    """A name in `core.tta.VIEWS`."""
    form: str
    """One of `FORMS`."""
    candidates: tuple[Candidate, ...]
    """All that were tried, step by step."""
    networks: int
    """Networks whose predictions these are."""
    temperature: Temperature
    plain: Tensor
    """Logits (M, K) of that model with one view, without the temperature."""
    answers: Tensor
    """Logits (M, K) with these views and this temperature."""
    labels: Tensor
    """(M,) int64."""
    images: int
    """Number of different images."""
    selection: tuple[Chosen, ...] = ()
    """The networks of an ensemble of several configurations, the winner's first; empty for one configuration."""

    def metadata(self) -> dict[str, Any]:
        """Return the entry of `metrics.json`."""
        return {
            "average": self.average,
            "views": self.views,
            "form": self.form,
            "networks": self.networks,
            "predictions": len(self.labels),
            "images": self.images,
            "candidates": [candidate.metadata() for candidate in self.candidates],
            "selection": [asdict(each) for each in self.selection] or None,
        }


def decide(
    evidence: Evidence,
    metric: str,
    forced: Forced = FREE,
    *,
    form: str = ONE,
    averaged_later: bool = False,
) -> Decision:
    """Decide for a model of networks of one configuration.

    Args:
        form: The model's form, where it is known before.
        averaged_later: Whether the model is the ensemble of the networks that made the predictions (folds).
    """
    judge = Judge(evidence.images, evidence.labels, metric, averaged_later)
    plain = {name: by_views[NONE] for name, by_views in evidence.logits.items()}
    average, averages = judge.choose("average", plain, dict.fromkeys(plain, 1), forced.average)
    by_views = evidence.logits[average]
    views, choices = judge.choose("views", by_views, {name: passes(name) for name in by_views}, forced.views)
    temperature = judge.temperature(by_views[views])
    return Decision(
        average=average,
        views=views,
        form=form,
        candidates=(*averages, *choices),
        networks=evidence.networks,
        temperature=temperature,
        plain=by_views[NONE],
        answers=scaled(by_views[views], temperature.value),
        labels=evidence.labels,
        images=evidence.distinct_images,
    )
