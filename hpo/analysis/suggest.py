"""A narrowed or widened search space from a finished study, and the parameters with best values at an edge.

A parameter is changed only by a significant pattern among the best trials: they crowd at a bound (a binomial test), are
closer together than random trials (the range of k uniform numbers, David and Nagaraja 2003, Order Statistics, section
2.3), or lack a choice (a hypergeometric test). The study's baseline can still be drawn.
"""

from __future__ import annotations

from typing import NamedTuple

from hpo.analysis.draft import SUGGESTED, Draft
from hpo.analysis.evidence import Evidence, read_evidence
from hpo.analysis.ranges import Bound, widened
from hpo.analysis.verdicts import crowd_words, crowded, decide, with_conditions, without_faults, yaml_line
from hpo.errors import SpaceError, StudyError
from hpo.space import Integer, Real, SearchSpace, space_from_yaml
from hpo.study import Study
from hpo.text import short

__all__ = ["SUGGESTED", "Edge", "edges", "suggest"]


class Edge(NamedTuple):
    """A searched number whose best values are at a bound that can be moved."""

    path: str
    bound: Bound
    yaml_line: str
    """The parameter with the bound moved, as a line of a search space."""
    words: str


def edges(study: Study, space: SearchSpace) -> tuple[Edge, ...]:
    """Find parameters whose best values are at a bound, in the space's order; none if trials are few."""
    evidence = read_evidence(study)
    numbers = [] if evidence.too_few else [one for one in space.search.values() if isinstance(one, Integer | Real)]
    found = (_edge(one, evidence) for one in numbers)
    return tuple(edge for edge in found if edge is not None)


def _edge(found: Integer | Real, evidence: Evidence) -> Edge | None:
    bound = crowded(found, evidence)
    wider = None if bound is None else widened(found, bound)
    if bound is None or wider is None:
        return None
    crowd = crowd_words(found, bound, evidence.among_best(found.path))
    return Edge(
        found.path, bound, yaml_line(wider), f"{found.path}: {crowd}; move it to {short(getattr(wider, bound))}"
    )


def suggest(study: Study, space: SearchSpace) -> str:
    """Write a search space as YAML with the reasons as comments.

    Without significant patterns, or with few trials, it is the study's own.

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
