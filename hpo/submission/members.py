"""Forms of a model of several members: networks of one configuration with different seeds, validated on one split.

An ensemble averages their probabilities. A soup is one network with their mean weights (Wortsman et al. 2022, arXiv
2203.05482), as cheap as one: of all members, or of those that a greedy choice adds, in order of their scores, as long
as the held-out score does not fall. From scratch, different seeds have no low loss between them, and soups fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.calibration import scaled
from core.runtime import make_generator
from core.tta import passes
from hpo.search.held_out import NONE
from hpo.submission.candidates import Judge
from hpo.submission.decision import ENSEMBLE, FREE, GREEDY_SOUP, ONE, UNIFORM_SOUP, Decision, Forced, decide
from hpo.submission.evidence import Evidence
from hpo.submission.networks import Network, averaged, together


@dataclass(frozen=True)
class Members:
    """The decision for members, and those that are trained on all images."""

    decision: Decision
    chosen: tuple[int, ...]
    """Members, counted from 1."""


def decide_members(networks: Sequence[Network], evidence: Evidence, metric: str, forced: Forced = FREE) -> Members:
    """Choose average and views on all members' predictions, then the form.

    A soup is preferred to an ensemble, which must gain over the best of the others.

    Args:
        networks: All with the same validation images.
        evidence: Their predictions, see `Evidence.of_networks`.
    """
    decision = decide(evidence, metric, forced)
    networks = [network.with_average(decision.average) for network in networks]
    soups = _Soups(networks, decision.views, metric)
    count, everyone = len(networks), range(len(networks))
    answers = {  # the predictions of one network are all members', so each form has one for each of them
        ONE: evidence.logits[decision.average][decision.views],
        UNIFORM_SOUP: soups.logits(everyone).repeat(count, 1),
        GREEDY_SOUP: soups.cross_fitted().repeat(count, 1),
    }
    ensemble = together(answers[ONE].chunk(count)).repeat(count, 1)
    judge, cost = Judge(evidence.images, evidence.labels, metric), passes(decision.views)
    cheap = forced.form if forced.form in answers else None
    form, tried = judge.choose("soup", answers, dict.fromkeys(answers, cost), cheap)
    of_both = {form: answers[form], ENSEMBLE: ensemble}
    form, more = judge.choose("ensemble", of_both, {form: cost, ENSEMBLE: cost * count}, forced.form)
    chosen = {ONE: [0], GREEDY_SOUP: soups.greedy()}.get(form, everyone)
    first = slice(None) if form == ONE else slice(len(evidence.labels) // count)
    plain = {
        ONE: lambda: decision.plain,
        ENSEMBLE: lambda: together(evidence.logits[decision.average][NONE].chunk(count)),
        UNIFORM_SOUP: lambda: soups.network(everyone).val_logits(NONE).cpu(),
        GREEDY_SOUP: lambda: soups.network(soups.greedy()).val_logits(NONE).cpu(),
    }[form]()
    judge = Judge(evidence.images[first], evidence.labels[first], metric)
    final = of_both[form][first]
    temperature = judge.temperature(final)
    decision = replace(
        decision,
        form=form,
        candidates=(*decision.candidates, *tried, *more),
        temperature=temperature,
        plain=plain,
        answers=scaled(final, temperature.value),
        labels=judge.labels,
    )
    return Members(decision, tuple(member + 1 for member in chosen))


class _Soups:
    """Soups of members, and their predictions of the validation images."""

    def __init__(self, networks: Sequence[Network], views: str, metric: str) -> None:
        self._networks, self._views, self._metric = networks, views, metric
        self._labels = networks[0].splits.labels[networks[0].splits.val].cpu()
        self._known: dict[frozenset[int], Tensor] = {}

    def network(self, members: Sequence[int]) -> Network:
        chosen = [self._networks[member] for member in members]
        return chosen[0] if len(chosen) == 1 else averaged(chosen)

    def logits(self, members: Sequence[int]) -> Tensor:
        """Logits (M, K) on the CPU."""
        key = frozenset(members)
        if key not in self._known:
            self._known[key] = self.network(members).val_logits(self._views).cpu()
        return self._known[key]

    def greedy(self, rows: Tensor | slice = slice(None)) -> list[int]:
        """Choose members by these of the validation images."""
        judge = Judge(self._labels[rows], self._labels[rows], self._metric)
        return greedy_soup(len(self._networks), lambda members: judge.merit(self.logits(members)[rows]))

    def cross_fitted(self) -> Tensor:
        """Logits (M, K) of greedy soups, each half predicted by the soup that the other half has chosen."""
        generator = make_generator(torch.device("cpu"), "greedy soup")
        order = torch.randperm(len(self._labels), generator=generator)
        halves = order.chunk(2)
        found = torch.empty_like(self.logits([0]))
        for rows, others in (halves, halves[::-1]):
            found[rows] = self.logits(self.greedy(others))[rows]
        return found


def greedy_soup(count: int, merit: Callable[[Sequence[int]], float]) -> list[int]:
    """Return the members, of so many, of a greedy soup: the best, then each that does not lower the merit."""
    alone = [merit([member]) for member in range(count)]
    first, *others = sorted(range(count), key=lambda member: -alone[member])
    soup, best = [first], alone[first]
    for member in others:
        now = merit([*soup, member])
        if now >= best:
            soup, best = [*soup, member], now
    return soup
