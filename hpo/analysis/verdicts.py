"""The suggestion for each parameter with its reason: first on its own, then consistent with the others."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpo.analysis.evidence import CHANCE, FEWEST_BEST, Evidence, binomial_tail, missing_chance, spread_chance
from hpo.analysis.ranges import BOUNDS, Bound, Scale, depth, is_outer, narrowed, outer_share, widened
from hpo.errors import SpaceError
from hpo.space import Categorical, Integer, Parameter, Real, SearchSpace
from hpo.space.document import flow
from hpo.text import short

_AT_BOUND = 0.05  # fraction of the range; values closer to a bound are at it
_NARROW = 0.7  # fraction of the range; a change that keeps more is not worth it


@dataclass(frozen=True)
class Verdict:
    """A suggested parameter with the reason."""

    found: Parameter | None
    """None if it is no longer searched."""
    why: str


def yaml_line(found: Parameter) -> str:
    """Write a parameter as a line of a search space."""
    entry = found.describe()
    if "when" in entry:
        entry["when"] = {name: values[0] if len(values) == 1 else values for name, values in entry["when"].items()}
    return f"{found.path}: {flow(entry)}"


# One parameter


def decide(found: Parameter, evidence: Evidence, base: Any) -> Verdict:
    """Decide on one parameter, which must still allow the baseline's value in Optuna's representation."""
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
        return Verdict(found, f"left: {words}; the field itself allows no more")
    return Verdict(wider, f"widened to {short(getattr(wider, bound))}: {words}")


def crowded(found: Integer | Real, evidence: Evidence) -> Bound | None:
    """Return the bound at which the best trials crowd, if there is one.

    The best trial, or the median, is at it, and significantly more are near it than by an even draw or the sampler.
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
    """Describe the crowd of the best trials' values, the best's first, at the bound."""
    outer = sum(is_outer(found, bound, value) for value in values)
    limit, side = (found.low, "lower") if bound == "low" else (found.high, "upper")
    return (
        f"{outer} of the {len(values)} best trials are in the quarter of the range at its {side} bound, "
        f"{short(limit)}, and the best of all at {short(values[0])}"
    )


def _judged_spread(found: Integer | Real, best: Sequence[float], drawn: Sequence[float], base: Any) -> Verdict:
    low, high = min(best), max(best)
    words = f"the {len(best)} best trials are between {short(low)} and {short(high)}"
    within = sum(low <= value <= high for value in drawn)
    if spread_chance(within / len(drawn), len(best)) >= CHANCE:
        return Verdict(found, f"left: {words}, as {within} of all {len(drawn)} do, which may be chance")
    narrow = narrowed(found, low, high)
    if base is not None and not narrow.low <= base <= narrow.high:
        narrow = narrowed(found, min(low, base), max(high, base))
        words += f", and the baseline at {short(base)}"
    scale = Scale.of(found)
    if scale.place(narrow.high) - scale.place(narrow.low) > _NARROW:
        return Verdict(found, f"left: {words}, which is too much of the range for narrowing")
    was = f"{short(found.low)} to {short(found.high)}"
    return Verdict(narrow, f"narrowed from {was}: {words}, and of all {len(drawn)} only {within} are in this range")


def _judged_choices(found: Categorical, best: Sequence[Any], drawn: Sequence[Any], base: Any) -> Verdict:
    dropped, kept = [], {}
    for choice, label in zip(found.choices, found.labels, strict=True):
        having, having_best = (sum(_is(value, label) for value in values) for values in (drawn, best))
        absent = having_best == 0 and missing_chance(having, len(drawn), len(best)) < CHANCE
        if absent and not _is(label, base):
            dropped.append(f"{flow(choice)} (0 of the {len(best)} best trials, {having} of all {len(drawn)})")
        else:
            kept[choice] = f"{flow(choice)} {having_best}"
    shares = f"among the {len(best)} best trials: {', '.join(kept.values())}"
    if not dropped:
        return Verdict(found, f"left: {shares}")
    return Verdict(replace(found, choices=tuple(kept)), f"dropped {', '.join(dropped)}; {shares}")


def _is(value: Any, label: Any) -> bool:
    """Whether values are equal and of one type: as choices, 1 is not true."""
    return type(value) is type(label) and bool(value == label)


# All of them together


def with_conditions(verdicts: Mapping[str, Verdict], space: SearchSpace) -> dict[str, Verdict]:
    """Reduce conditions to values that are still drawn, and drop parameters that can no longer occur.

    Args:
        verdicts: in the order in which a parameter follows those of its condition.
        space: the search space before any change.
    """
    settled: dict[str, Verdict] = {}
    for path, verdict in verdicts.items():
        settled[path] = verdict
        if verdict.found is None:
            continue
        when = dict(space.search[path].when)
        for name in when.keys() & settled.keys():
            drawn = settled[name].found
            when[name] = tuple(value for value in when[name] if drawn is not None and drawn.contains(value))
        never = next((name for name, allowed in when.items() if not allowed), None)
        if never is None:
            settled[path] = replace(verdict, found=replace(verdict.found, when=when))
        else:
            wanted = " or ".join(map(flow, space.search[path].when[never]))
            settled[path] = Verdict(None, f"no longer searched: {never} is never {wanted} any more")
    return settled


def without_faults(verdicts: Mapping[str, Verdict], space: SearchSpace, error: SpaceError) -> dict[str, Verdict]:
    """Revert the changes that make an invalid space; raise the error if it concerns none of them."""
    reverted = dict(verdicts)
    messages = [fault.message for fault in error.faults]
    for path, one in space.search.items():
        found, prefixes = verdicts[path].found, (f"search.{path}:", f"search.{path}.")
        fault = next((message for message in messages if message.startswith(prefixes)), None)
        if fault is not None and found is not None and replace(found, when={}) != replace(one, when={}):
            reverted[path] = Verdict(one, f"left: {yaml_line(found)} cannot be searched, {fault}")
    if reverted == dict(verdicts):
        raise error
    return reverted
