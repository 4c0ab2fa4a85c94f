"""A narrowed or widened search space from a finished study, and the parameters with best values at an edge.

The best trials are the best fifth of each fifth of the study (`hpo.analysis.evidence`), at most half of its complete
trials: the baseline, which is never pruned, is not good for that reason alone. Each parameter is judged on its own,
and changed only by a significant pattern among the best trials. They crowd at a bound more than an even draw and the
sampler did (a binomial test). They are closer together than as many random finished trials (the range of k uniform
numbers, David and Nagaraja 2003, Order Statistics, section 2.3). Or a choice is missing among them (a hypergeometric
test).

A suggestion respects the bounds of each field, and can still draw the study's baseline.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpo.analysis.draft import SUGGESTED, Draft
from hpo.analysis.evidence import Evidence, read_evidence
from hpo.analysis.ranges import Bound, widened
from hpo.analysis.verdicts import (
    crowd_words,
    crowded,
    decide,
    number,
    with_conditions,
    without_faults,
    yaml_line,
)
from hpo.errors import SpaceError, StudyError
from hpo.space import Integer, Real, SearchSpace, space_from_yaml
from hpo.study import Study

__all__ = ["SUGGESTED", "Edge", "edges", "suggest"]


@dataclass(frozen=True)
class Edge:
    """A searched number whose best values are at a bound that can be moved."""

    path: str
    bound: Bound
    best: float
    """The best trial's value."""
    limit: float
    """The current bound."""
    yaml_line: str
    """The parameter with the bound moved, as a line of a search space."""
    words: str
    """Human-readable explanation with the supporting numbers."""


def edges(study: Study, space: SearchSpace) -> tuple[Edge, ...]:
    """Find the parameters whose best values are at a bound, in the space's order; none if trials are few.

    Args:
        study: a search.
        space: its search space.
    """
    evidence = read_evidence(study)
    if evidence.too_few:
        return ()
    found = (_edge(one, evidence) for one in space.search.values() if isinstance(one, Integer | Real))
    return tuple(edge for edge in found if edge is not None)


def _edge(found: Integer | Real, evidence: Evidence) -> Edge | None:
    bound = crowded(found, evidence)
    wider = None if bound is None else widened(found, bound)
    if bound is None or wider is None:
        return None
    values = evidence.among_best(found.path)
    limit, moved = (found.low, wider.low) if bound == "low" else (found.high, wider.high)
    words = f"{found.path}: {crowd_words(found, bound, values)}; move it to {number(moved)}"
    return Edge(found.path, bound, float(values[0]), float(limit), yaml_line(wider), words)


def suggest(study: Study, space: SearchSpace) -> str:
    """Write a search space for a study that continues from this one, as YAML with the reasons as comments.

    Data, objective, sampler, pruner, recipes and baseline are those of the study. Without significant patterns, or with
    few trials, the ranges stay the same.

    Args:
        study: a search.
        space: its search space.

    Raises:
        StudyError: the study is a confirmation.
    """
    if study.confirms is not None:
        raise StudyError(
            f"study {study.name} is a confirmation and searches nothing; give the search: {study.confirms}"
        )
    evidence, base = read_evidence(study), space.baseline_params()
    verdicts = {path: decide(one, evidence, base.get(path)) for path, one in space.search.items()}
    while True:  # each turn reverts a change, down to the space as it was
        verdicts = with_conditions(verdicts, space)
        draft = Draft(study, space, evidence, verdicts)
        try:
            checked = space_from_yaml(draft.search(), space.name)
        except SpaceError as error:
            verdicts = without_faults(verdicts, space, error)
        else:
            return draft.whole(checked)
