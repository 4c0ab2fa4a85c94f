"""A narrowed or widened search space from a finished study, and where its best trials lie at an edge.

The best trials are the best fifth of each fifth of the study (`hpo.analysis.evidence` says why), and of those that
were trained in full the better half at most: a pruned trial counts as bad, and the base, which is never pruned, does
not count as good for that. Each parameter is then judged alone, and left as it is unless chance would hardly show what
is seen. Three things are looked for. The best trials crowd at a bound, where neither an even draw nor the sampler put
so many (a binomial test). They lie closer together than as many of the finished trials, picked at random, would (the
range of k uniform numbers, David and Nagaraja 2003, Order Statistics, section 2.3). A choice is missing among them that
others had (a hypergeometric test).

Nothing goes beyond a field's own bounds, and the search can still draw the study's base.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpo.analysis.draft import SUGGESTED, Draft
from hpo.analysis.evidence import Evidence, gather
from hpo.analysis.ranges import Bound, widened
from hpo.analysis.verdicts import (
    crowd_words,
    crowded,
    judged,
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
    """A searched number whose best values lie at a bound that can be moved."""

    path: str
    bound: Bound
    best: float
    """The best trial's value."""
    limit: float
    """The bound as it is."""
    yaml_line: str
    """The parameter with the bound moved, as it stands in a search space."""
    words: str
    """The same for a person, with the numbers that it rests on."""


def edges(study: Study, space: SearchSpace) -> tuple[Edge, ...]:
    """The parameters of a study whose best values lie at a bound, in the space's order; none where trials are few.

    Args:
        space: what the study searches.
    """
    evidence = gather(study)
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
    """A search space for a study that goes on from this one, as YAML with its reasons as comments.

    Data, objective, sampler, pruner, recipes and base are the study's. Where its trials say nothing, or are too few,
    the search stays what it was.

    Args:
        space: what the study searches.

    Raises:
        StudyError: the study searches nothing: it confirms another one.
    """
    if study.confirms is not None:
        raise StudyError(f"study {study.name} confirms another one and searches nothing; give that: {study.confirms}")
    evidence, base = gather(study), space.baseline_params()
    verdicts = {path: judged(one, evidence, base.get(path)) for path, one in space.search.items()}
    while True:  # each turn takes back a change, so that it ends with the space as it was
        verdicts = with_conditions(verdicts, space)
        draft = Draft(study, space, evidence, verdicts)
        try:
            checked = space_from_yaml(draft.search(), space.name)
        except SpaceError as error:
            verdicts = without_faults(verdicts, space, error)
        else:
            return draft.whole(checked)
