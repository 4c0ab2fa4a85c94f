"""Decisions on the validation images: the views, the form of several networks, and the temperature.

They use predictions of networks that have not seen these images. Other views than the plain one are taken only if their
gain is beyond chance: the best of several equal views scores better by luck on a few hundred images. Several networks
can form an ensemble, which averages probabilities, or one network with their mean weights (Wortsman et al. 2022, arXiv
2203.05482), which is as cheap as one and preferred unless it scores worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core import metrics
from core.calibration import HIGHEST, LOWEST, fit_temperature, scaled
from core.metrics import Gain
from core.runtime import make_generator
from core.tta import VIEWS
from hpo.submission.networks import Network, averaged, together

ALONE, ENSEMBLE, AVERAGED = "one network", "ensemble", "averaged weights"
"""The forms of a model."""

LEVEL = 0.05
"""Probability of taking any other views than the plain one if all are equally good, after Bonferroni's correction."""

_SEEN_BY_THE_OTHERS = "each network's validation images were seen by the others, so averages cannot be validated"


@dataclass(frozen=True)
class Temperature:
    """A divisor of the logits, with the validation scores of the chosen views before and after."""

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
class Decision:
    """The choices made on the validation images, and the predictions that they rest on."""

    form: str
    """`one network`, `ensemble` or `averaged weights`."""
    forms: dict[str, float]
    """Validation score of each form with its best views; empty if there was only one form."""
    views: str
    """A name in `core.tta.VIEWS`."""
    candidates: dict[str, float]
    """Validation score of the chosen form with each choice of views."""
    gains: dict[str, Gain]
    """Gain over the plain view of each other choice of views; empty if predictions are not finite."""
    temperature: Temperature
    plain: Tensor
    """Logits (M, K) of that form with one view, without the temperature."""
    answers: Tensor
    """Logits (M, K) with these views and this temperature."""
    labels: Tensor
    """(M,) int64."""

    def averaging_record(self) -> dict[str, Any] | None:
        """Return the entry of `metrics.json` about the form of several networks; None for one network."""
        if self.form == ALONE:
            return None
        metadata: dict[str, Any] = {"chosen": self.form, "val": self.forms}
        return metadata if self.forms else metadata | {"why": _SEEN_BY_THE_OTHERS}


def decide(networks: Sequence[Network], metric: str, *, folds: bool, members: bool) -> Decision:
    """Decide for a model of one network, of the ensemble of its `folds`, or of `members`.

    The temperature of an ensemble of folds is fitted to its single networks, and their average is less confident than
    each of them. So a temperature above 1 is not used. Measured on digits (4 folds; 12 and 40 epochs; label smoothing 0
    and 0.1; 3 seeds each): the ensemble's test loss is never higher than with the fitted temperature or with none.
    """
    if members:
        answers = {
            AVERAGED: _by_views([averaged(networks)]),  # first, so preferred among equals
            ENSEMBLE: {views: together(each.val_logits(views) for each in networks) for views in VIEWS},
        }
        networks = networks[:1]
    else:
        answers = {ENSEMBLE if folds else ALONE: _by_views(networks)}
    labels = torch.cat([each.splits.labels[each.splits.val] for each in networks])
    return decided(answers, labels, metric, averaged_later=folds)


def _by_views(networks: Sequence[Network]) -> dict[str, Tensor]:
    """Logits (M, K) of the validation images of all networks by views."""
    return {views: torch.cat([network.val_logits(views) for network in networks]) for views in VIEWS}


def decided(
    answers: Mapping[str, Mapping[str, Tensor]], labels: Tensor, metric: str, *, averaged_later: bool = False
) -> Decision:
    """Choose the best form with its views from logits (M, K); of equals the first form and the fewest views.

    Views compete with the plain one only if equal views would hardly gain as much (see `LEVEL`).

    `averaged_later` if these are logits of single networks, which the model averages.
    """
    sign = 1 if metrics.METRICS[metric] == "maximize" else -1

    def best(scores: Mapping[str, float]) -> str:
        return max(scores, key=lambda name: sign * scores[name] if math.isfinite(scores[name]) else -math.inf)

    scores = {
        form: {
            views: _score(logits, labels, metric, averaged_later=averaged_later) for views, logits in by_views.items()
        }
        for form, by_views in answers.items()
    }
    gains = {
        form: _gains(by_views, labels, metric, averaged_later=averaged_later) for form, by_views in answers.items()
    }
    chosen = {form: best({v: scores[form][v] for v in ["none", *_proven(gains[form])]}) for form in answers}
    forms = {form: scores[form][views] for form, views in chosen.items()}
    form = best(forms)
    views = chosen[form]
    temperature = _temperature(answers[form][views], labels, averaged_later=averaged_later)
    return Decision(
        form=form,
        forms=forms if len(forms) > 1 else {},
        views=views,
        candidates=scores[form],
        gains=gains[form],
        temperature=temperature,
        plain=answers[form]["none"],
        answers=scaled(answers[form][views], temperature.value),
        labels=labels,
    )


def _gains(by_views: Mapping[str, Tensor], labels: Tensor, metric: str, *, averaged_later: bool) -> dict[str, Gain]:
    """Gain of each choice of views over the plain one; the loss is that with the best temperature of each."""
    if not all(bool(logits.isfinite().all()) for logits in by_views.values()):
        return {}
    if metric == "nll":
        fitted = {v: _temperature(logits, labels, averaged_later=averaged_later) for v, logits in by_views.items()}
        by_views = {views: scaled(logits, fitted[views].value) for views, logits in by_views.items()}
    generator = make_generator(torch.device("cpu"), "views")
    return {
        views: metrics.paired_gain(logits, by_views["none"], labels, metric, generator=generator)
        for views, logits in by_views.items()
        if views != "none"
    }


def _proven(gains: Mapping[str, Gain]) -> list[str]:
    return [views for views, gain in gains.items() if gain.chance <= LEVEL / len(gains)]


def _score(logits: Tensor, labels: Tensor, metric: str, *, averaged_later: bool) -> float:
    """The value of the metric; the loss with its best temperature, else views would win by lowering confidence."""
    if metric == "nll" and bool(logits.isfinite().all()):
        return _temperature(logits, labels, averaged_later=averaged_later).after.loss
    return metrics.value(metrics.scores(logits, labels), metric)


def _temperature(logits: Tensor, labels: Tensor, *, averaged_later: bool) -> Temperature:
    """The temperature that fits best, or a safer one."""
    value, why, before = fit_temperature(logits, labels), None, metrics.scores(logits, labels)
    if before.accuracy == 1:
        # The best fit would be 0, with an unbounded loss for a mistake on another image.
        value, why = 1.0, "the validation images have no mistake to fit it to"
    elif value in (LOWEST, HIGHEST):
        why = f"the best fit is at the bound of {value:g} or beyond"
    elif averaged_later and value > 1:
        value, why = 1.0, f"{value:.3f} fits each single network, and their average is already less confident"
    return Temperature(value, before, metrics.scores(scaled(logits, value), labels), why)
