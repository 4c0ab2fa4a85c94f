"""What becomes of each parameter, and why: judged alone, then made to fit the others."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpo.analysis.evidence import CHANCE, FEWEST_BEST, Evidence, binomial_tail, missing_chance, spread_chance
from hpo.analysis.ranges import BOUNDS, Bound, Scale, depth, is_outer, narrowed, outer_share, widened
from hpo.errors import SpaceError
from hpo.space import Categorical, Integer, Parameter, Real, SearchSpace
from hpo.space.document import flow

_AT_BOUND = 0.05  # of the range: what is nearer to a bound than this is at it
_NARROW = 0.7  # of the range: what saves less than a third of it is not worth a change


@dataclass(frozen=True)
class Verdict:
    """A parameter as it is suggested, and why."""

    found: Parameter | None
    """None: it is no longer searched."""
    why: str


def yaml_line(found: Parameter) -> str:
    """A parameter as a search space has it, on a line; a condition with one value without brackets."""
    entry = found.describe()
    if "when" in entry:
        entry["when"] = {name: values[0] if len(values) == 1 else values for name, values in entry["when"].items()}
    return f"{found.path}: {flow(entry)}"


def number(value: float) -> str:
    """A value in a sentence."""
    return f"{value:.3g}"


# One parameter


def judged(found: Parameter, evidence: Evidence, base: Any) -> Verdict:
    """What the trials say of one parameter.

    Args:
        base: the base's value, as Optuna keeps it, which the search must go on to draw; None where the base has none.
    """
    if evidence.too_few:
        return Verdict(found, "")
    best, drawn = evidence.among_best(found.path), evidence.drawn(found.path)
    if len(best) < FEWEST_BEST:
        return Verdict(found, f"left: only {len(best)} of the {len(evidence.best)} best trials have it")
    if isinstance(found, Categorical):
        return _judged_choices(found, best, drawn, base)
    assert isinstance(found, Integer | Real)
    bound = crowded(found, evidence)
    if bound is None:
        return _judged_spread(found, best, drawn, base)
    wider, words = widened(found, bound), crowd_words(found, bound, best)
    if wider is None:
        return Verdict(found, f"left: {words}; the field itself goes no further")
    return Verdict(wider, f"widened to {number(wider.low if bound == 'low' else wider.high)}: {words}")


def crowded(found: Integer | Real, evidence: Evidence) -> Bound | None:
    """The bound that the best trials crowd at, if there is one.

    The best trial itself, or the one in the middle of the best, lies at the bound; and more of them lie near it than an
    even draw would have put there, and than the sampler did.
    """
    values, drawn = evidence.among_best(found.path), evidence.drawn(found.path)
    if len(values) < FEWEST_BEST:
        return None
    for bound in BOUNDS:
        depths = [depth(found, bound, value) for value in values]
        at_it = min(depths[0], statistics.median(depths)) <= _AT_BOUND
        outer = sum(is_outer(found, bound, value) for value in values)
        usual = sum(is_outer(found, bound, value) for value in drawn) / len(drawn)
        if at_it and binomial_tail(outer, len(values), max(usual, outer_share(found, bound))) < CHANCE:
            return bound
    return None


def crowd_words(found: Integer | Real, bound: Bound, values: Sequence[float]) -> str:
    """How the best trials' values, the best's first, crowd at the bound."""
    outer = sum(is_outer(found, bound, value) for value in values)
    limit, side = (found.low, "lower") if bound == "low" else (found.high, "upper")
    return (
        f"{outer} of the {len(values)} best trials lie in the quarter of the range at its {side} bound, "
        f"{number(limit)}, and the best of all at {number(values[0])}"
    )


def _judged_spread(found: Integer | Real, best: Sequence[float], drawn: Sequence[float], base: Any) -> Verdict:
    """Whether a range can be narrowed to where the best trials lie."""
    low, high = min(best), max(best)
    words = f"the {len(best)} best trials lie between {number(low)} and {number(high)}"
    within = sum(low <= value <= high for value in drawn)
    if spread_chance(within / len(drawn), len(best)) >= CHANCE:
        return Verdict(found, f"left: {words}, as {within} of all {len(drawn)} do, which chance would show too")
    narrow = narrowed(found, low, high)
    if base is not None and not narrow.low <= base <= narrow.high:
        narrow = narrowed(found, min(low, base), max(high, base))
        words += f", and the base at {number(base)}"
    scale = Scale.of(found)
    if scale.place(narrow.high) - scale.place(narrow.low) > _NARROW:
        return Verdict(found, f"left: {words}, which is too much of the range to gain by narrowing it")
    was = f"{number(found.low)} to {number(found.high)}"
    return Verdict(
        narrow, f"narrowed from {was}: {words}, and of all {len(drawn)} only {within} lie between those of the best"
    )


def _judged_choices(found: Categorical, best: Sequence[Any], drawn: Sequence[Any], base: Any) -> Verdict:
    """Which choices can be left out."""
    dropped, kept = [], {}
    for choice, label in zip(found.choices, found.labels, strict=True):
        having, having_best = _count(drawn, label), _count(best, label)
        absent = having_best == 0 and missing_chance(having, len(drawn), len(best)) < CHANCE
        if absent and not _is(label, base):
            dropped.append(f"{flow(choice)} (0 of the {len(best)} best trials, {having} of all {len(drawn)})")
        else:
            kept[choice] = f"{flow(choice)} {having_best}"
    shares = f"among the {len(best)} best trials: {', '.join(kept.values())}"
    if not dropped:
        return Verdict(found, f"left: {shares}")
    return Verdict(replace(found, choices=tuple(kept)), f"dropped {', '.join(dropped)}; {shares}")


def _count(values: Iterable[Any], label: Any) -> int:
    return sum(_is(value, label) for value in values)


def _is(value: Any, label: Any) -> bool:
    """Equal and of one type: as choices, 1 is not true."""
    return type(value) is type(label) and bool(value == label)


# All of them together


def with_conditions(verdicts: Mapping[str, Verdict], space: SearchSpace) -> dict[str, Verdict]:
    """The verdicts with conditions that name only what is still drawn; a parameter that can never be is dropped.

    Args:
        verdicts: in the space's order, a parameter behind those that its condition names.
    """
    settled: dict[str, Verdict] = {}
    for path, verdict in verdicts.items():
        if verdict.found is None:
            settled[path] = verdict
            continue
        when = {}
        for name, allowed in space.search[path].when.items():
            asked = settled.get(name)
            drawn = None if asked is None else asked.found
            when[name] = (
                allowed if asked is None else tuple(v for v in allowed if drawn is not None and drawn.contains(v))
            )
        never = [name for name, allowed in when.items() if not allowed]
        if never:
            wanted = " or ".join(flow(value) for value in space.search[path].when[never[0]])
            settled[path] = Verdict(None, f"no longer searched: {never[0]} is never {wanted} any more")
        else:
            settled[path] = replace(verdict, found=replace(verdict.found, when=when))
    return settled


def without_faults(verdicts: Mapping[str, Verdict], space: SearchSpace, error: SpaceError) -> dict[str, Verdict]:
    """The verdicts without the changes that a configuration's fields do not allow together.

    Raises:
        SpaceError: the one given, where it names no change: then it is a fault of something else.
    """
    mended = dict(verdicts)
    for path, one in space.search.items():
        found = verdicts[path].found
        faults = [
            text for fault in error.faults if (text := fault.message).startswith((f"search.{path}:", f"search.{path}."))
        ]
        if faults and found is not None and replace(found, when={}) != replace(one, when={}):
            mended[path] = Verdict(one, f"left: {yaml_line(found)} cannot be searched, {faults[0]}")
    if mended == dict(verdicts):
        raise error
    return mended
