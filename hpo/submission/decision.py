"""What the validation images decide: the views, the form of several networks, and the temperature.

All is judged by networks that had not seen those images: in one split by as many as the model will have, with folds
each image by the one network that was trained without it. Of several networks there are two forms: an ensemble, whose
probabilities are averaged, and one network of their averaged weights, which costs no more than one of them (Wortsman
et al. 2022, arXiv 2203.05482) and is taken where it scores no worse.
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
from core.tta import VIEWS
from hpo.submission.networks import Network, averaged, together

ALONE, ENSEMBLE, AVERAGED = "one network", "ensemble", "averaged weights"
"""The forms of a model."""

_SEEN_BY_THE_OTHERS = "each network's validation images were seen by the others, so that no average can be judged"


@dataclass(frozen=True)
class Temperature:
    """What the logits are divided by, and what that does to the validation images."""

    value: float
    before: metrics.Scores
    """With the chosen views, undivided."""
    after: metrics.Scores
    why: str | None
    """Why it is not the best that was found, in words; None where it is."""

    def metadata(self) -> dict[str, Any]:
        """As `metrics.json` has it."""
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
    """What the validation images have decided."""

    form: str
    """`one network`, `ensemble` or `averaged weights`."""
    forms: dict[str, float]
    """Form -> validation score with its best views; empty where there was nothing to choose from."""
    views: str
    """A name in `core.tta.VIEWS`."""
    candidates: dict[str, float]
    """Views -> validation score, of the chosen form."""
    temperature: Temperature
    plain: Tensor
    """(M, K): that form's answers in one view, undivided."""
    answers: Tensor
    """(M, K): its answers with these views and this temperature."""
    labels: Tensor
    """(M,) int64."""

    def averaging_record(self) -> dict[str, Any] | None:
        """As `metrics.json` has it: which form was chosen of several networks, by which scores; None of one network."""
        if self.form == ALONE:
            return None
        metadata: dict[str, Any] = {"chosen": self.form, "val": self.forms}
        return metadata if self.forms else metadata | {"why": _SEEN_BY_THE_OTHERS}


def decide_alone(judged: Sequence[Network], metric: str) -> Decision:
    """For a model of one network.

    Args:
        judged: one, or one a fold.
    """
    return decided({ALONE: _by_views(judged)}, _labels(judged), metric)


def decide_folds(judged: Sequence[Network], metric: str) -> Decision:
    """For an ensemble of these networks, one a fold.

    The temperature is that of the networks one by one, and their average is less sure than each of them. So it is taken
    where it makes them surer, and a temperature above 1 is not. Measured on digits (4 folds; 12 and 40 epochs; label
    smoothing 0 and 0.1; 3 seeds each): the ensemble's test loss with that rule is never above the one with the plain
    temperature or with none, and 0.030 in place of 0.033 where the networks alone ask for 1.10.
    """
    return decided({ENSEMBLE: _by_views(judged)}, _labels(judged), metric, averaged_later=True)


def decide_members(judged: Sequence[Network], metric: str) -> Decision:
    """For a model of as many networks, which differ in their seeds.

    Args:
        judged: at least two, all validated on the same images.
    """
    first = judged[0]
    answers = {
        # First: among equals it is taken.
        AVERAGED: _by_views([averaged(judged)]),
        ENSEMBLE: {views: together(each.val_logits(views) for each in judged) for views in VIEWS},
    }
    return decided(answers, _labels([first]), metric)


def _by_views(judged: Sequence[Network]) -> dict[str, Tensor]:
    """Views -> (M, K): the validation images of each network, one after the other."""
    return {views: torch.cat([network.val_logits(views) for network in judged]) for views in VIEWS}


def _labels(judged: Sequence[Network]) -> Tensor:
    return torch.cat([each.splits.labels[each.splits.val] for each in judged])


def decided(
    answers: Mapping[str, Mapping[str, Tensor]], labels: Tensor, metric: str, *, averaged_later: bool = False
) -> Decision:
    """The best form with its best views; of equals the first form, and the fewest views, which stand first.

    Args:
        answers: form -> views -> (M, K).
        averaged_later: whether the answers are those of single networks, whose average the model gives.
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
    forms = {form: by_views[best(by_views)] for form, by_views in scores.items()}
    form = best(forms)
    views = best(scores[form])
    temperature = _temperature(answers[form][views], labels, averaged_later=averaged_later)
    return Decision(
        form=form,
        forms=forms if len(forms) > 1 else {},
        views=views,
        candidates=scores[form],
        temperature=temperature,
        plain=answers[form]["none"],
        answers=scaled(answers[form][views], temperature.value),
        labels=labels,
    )


def _score(logits: Tensor, labels: Tensor, metric: str, *, averaged_later: bool) -> float:
    """What these answers are worth by the metric. The loss, which alone depends on a temperature, with its own: else
    views would be chosen for how unsure they make a network that is too sure."""
    if metric == "nll" and bool(logits.isfinite().all()):
        return _temperature(logits, labels, averaged_later=averaged_later).after.loss
    return metrics.value(metrics.scores(logits, labels), metric)


def _temperature(logits: Tensor, labels: Tensor, *, averaged_later: bool) -> Temperature:
    """The temperature that fits best, or another one where that would do harm."""
    value, why, before = fit_temperature(logits, labels), None, metrics.scores(logits, labels)
    if before.accuracy == 1:
        # Then the likeliest is 0, and the loss of a mistake among other images without bounds.
        value, why = 1.0, "no mistake among the validation images says how sure is too sure"
    elif value in (LOWEST, HIGHEST):
        why = f"the best lies at the bound of {value:g} or beyond"
    elif averaged_later and value > 1:
        value, why = 1.0, f"{value:.3f} fits each network by itself, and their average is less sure already"
    return Temperature(value, before, metrics.scores(scaled(logits, value), labels), why)
