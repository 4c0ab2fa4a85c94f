"""Greedy ensemble selection with replacement (Caruana et al. 2004, ICML) over held-out predictions.

It begins with the winner. Each round adds the network that improves the ensemble's held-out score most; one that is
added twice counts twice. The best of all rounds is taken. A selection scores too well on the images that it was made
on, so it is judged by cross-fitting: each part of the images is predicted by the selection made on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from core.calibration import scaled
from core.runtime import make_generator
from core.tta import average, passes
from hpo.search.held_out import NONE, OWN
from hpo.submission.candidates import Judge
from hpo.submission.decision import ENSEMBLE, ONE, Chosen, Decision
from hpo.submission.evidence import Evidence
from hpo.submission.peers import Library

ROUNDS = 20
"""Rounds of a selection: the smallest weight is a twentieth."""
PARTS = 5
"""Parts of the images in cross-fitting."""

Merit = Callable[[Tensor, Tensor | slice], Any]
"""(log-probabilities (m, K), rows (m,) of the images) -> a value to compare, the larger the better."""


def decide_selection(
    decision: Decision, evidence: Evidence, library: Library, metric: str, form: str | None = None
) -> Decision:
    """Decide between the winner alone and an ensemble of it and its peers.

    A peer has the winner's average and views if its predictions include them, else its own average and one view.

    Args:
        decision: The winner's.
        evidence: The winner's; the peers' are of the same images.
        form: `one` or `ensemble` if the user has chosen.
    """
    everyone = [Chosen("the winner", None, 1.0, decision.average, decision.views)]
    networks, plain = [evidence.logits[decision.average][decision.views]], [decision.plain]
    for peer in library.peers:
        found, views = _choices(peer.evidence, decision)
        everyone.append(Chosen(peer.name, peer.trial, 0.0, found, views, peer.epochs))
        networks.append(peer.evidence.logits[found][views])
        plain.append(peer.evidence.logits[found][NONE])
    assert all(torch.equal(peer.evidence.images, evidence.images) for peer in library.peers)
    judge, fewest = Judge(evidence.images, evidence.labels, metric), 2 if form == ENSEMBLE else 1
    counts = select(networks, judge.ranking, library.most, fewest=fewest)
    parts = cross_fitted(networks, evidence.images, judge.ranking, library.most, fewest=fewest)
    chosen = tuple(
        replace(each, weight=count / sum(counts)) for each, count in zip(everyone, counts, strict=True) if count
    )
    answers = {ONE: networks[0]} | ({ENSEMBLE: _by_parts(networks, parts)} if len(chosen) > 1 else {})
    cost = {ONE: passes(decision.views), ENSEMBLE: sum(passes(each.views) for each in chosen)}
    taken, tried = judge.choose("selection", answers, cost, form)
    decision = replace(
        decision,
        candidates=(*decision.candidates, *tried),
        networks=evidence.networks + sum(peer.evidence.networks for peer in library.peers),
    )
    if taken == ONE:
        return decision
    temperature = judge.temperature(answers[ENSEMBLE])
    return replace(
        decision,
        form=ENSEMBLE,
        temperature=temperature,
        plain=_by_parts(plain, parts),
        answers=scaled(answers[ENSEMBLE], temperature.value),
        selection=chosen,
    )


def _choices(evidence: Evidence, decision: Decision) -> tuple[str, str]:
    """Average and views of a peer."""
    found = decision.average if decision.average in evidence.logits else OWN
    return found, decision.views if decision.views in evidence.logits[found] else NONE


def select(
    library: Sequence[Tensor], merit: Merit, most: int, rows: Tensor | slice = slice(None), *, fewest: int = 1
) -> tuple[int, ...]:
    """Return how often each network is in the ensemble.

    Args:
        library: Logits (M, K) of each network, the winner's first, then in order of preference among equals.
        most: Largest number of different networks, at least 1.
        rows: The images to select on.
        fewest: Smallest number of different networks, at most `most` and the library's.
    """
    probabilities = [logits[rows].double().softmax(1) for logits in library]
    total, counts = probabilities[0].clone(), [1, *(0 for _ in library[1:])]
    best: tuple[Any, tuple[int, ...]] | None = None
    if fewest == 1:
        best = merit(total.log(), rows), tuple(counts)
    for size in range(2, ROUNDS + 1):
        different = sum(count > 0 for count in counts)
        open_to = [place for place, count in enumerate(counts) if (different >= fewest if count else different < most)]
        merits = {place: merit(((total + probabilities[place]) / size).log(), rows) for place in open_to}
        added = max(merits, key=lambda place: merits[place])  # of equals the first
        total += probabilities[added]
        counts[added] += 1
        if sum(count > 0 for count in counts) >= fewest and (best is None or merits[added] > best[0]):
            best = merits[added], tuple(counts)
    assert best is not None, "there are enough networks and rounds"
    return best[1]


def combined(library: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Return the log-probabilities (M, K) of an ensemble with these counts."""
    chosen = [(logits, count) for logits, count in zip(library, counts, strict=True) if count]
    return average(torch.stack([logits for logits, _ in chosen]), [float(count) for _, count in chosen])


Parts = Sequence[tuple[Tensor, tuple[int, ...]]]
"""Rows (m,) of each part of the images, and the selection made on all others."""


def cross_fitted(library: Sequence[Tensor], images: Tensor, merit: Merit, most: int, *, fewest: int = 1) -> Parts:
    """Select for each part of the images on the others.

    Args:
        images: (M,) int64; predictions of one image are in one part.
    """
    distinct, places = torch.unique(images, return_inverse=True)
    generator = make_generator(torch.device("cpu"), "selection")
    part_of = torch.randperm(len(distinct), generator=generator)[places] % PARTS
    parts = []
    for part in range(PARTS):
        own, others = (part_of == part).nonzero().squeeze(1), (part_of != part).nonzero().squeeze(1)
        if len(own):
            parts.append((own, select(library, merit, most, others, fewest=fewest)))
    return parts


def _by_parts(library: Sequence[Tensor], parts: Parts) -> Tensor:
    """Predict each part by its selection: (M, K)."""
    found = torch.empty_like(library[0])
    for rows, counts in parts:
        found[rows] = combined([logits[rows] for logits in library], counts).to(found.dtype)
    return found
