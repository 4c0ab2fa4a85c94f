"""The `search:` section: each entry checked against the field that it names, then all of them against each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from pydantic import ValidationError

from core.config import TrainConfig
from hpo.space.document import flow
from hpo.space.fields import ConfigField, config_fields, did_you_mean, nearest, no_such_field
from hpo.space.grammar import Choices, Range, explain, quoted
from hpo.space.space import Categorical, Integer, Parameter, Real, in_rate_of, snapped

Report = Callable[[tuple[str | int, ...], str], None]
"""Takes a place in the file (`("search", "optim.lr", "low")`) and what is wrong there."""

# What a search may not vary, and why.
FIXED = {
    "seed": "a study seeds every trial itself; --seed sets the study's",
    "epochs": "trials of different lengths cannot be compared at their rungs; set it in base, or with --set",
}
FIXED_DATA = "trials on different images cannot be compared; set it under data"

MAX_COMBINATIONS = 2_000  # a validation takes some 20 µs: 40 ms


def parameter(path: str, entry: Any, report: Report) -> Parameter | None:
    """One entry of `search:`; None where it has a fault, which is reported."""
    place = ("search", path)
    field = config_fields().get(path)
    if field is None:
        report(place, no_such_field(path))
        return None
    if path in FIXED or path.startswith("data."):
        report(place, f"cannot be searched: {FIXED.get(path, FIXED_DATA)}")
        return None
    if not isinstance(entry, Mapping):
        report(place, f"must be {{choices: […]}} or {{low: …, high: …}}, not {quoted(entry)}")
        return None
    if "choices" not in entry and not {"low", "high"} & set(entry):
        report(place, "needs choices, or low and high")
        return None
    grammar = Choices if "choices" in entry else Range
    try:
        written = grammar.model_validate(dict(entry))
    except ValidationError as error:
        for detail in error.errors():
            report((*place, *detail["loc"]), explain(detail, grammar.model_fields))
        return None
    when = _conditions(path, written.when or {}, report)
    if isinstance(written, Choices):
        found: Parameter | None = _categorical(field, written, when or {}, report)
    else:
        found = _number(field, written, entry, when or {}, report)
    return None if when is None else found


def _conditions(path: str, when: Mapping[str, Any], report: Report) -> dict[str, tuple[Any, ...]] | None:
    """A condition with its values as their fields keep them; None where it has a fault."""
    found: dict[str, tuple[Any, ...]] = {}
    sound = True
    for name, allowed in when.items():
        place = ("search", path, "when", name)
        field = config_fields().get(name)
        if field is None:
            report(place, no_such_field(name))
            sound = False
            continue
        values = []
        for value in allowed if isinstance(allowed, list) else [allowed]:
            try:
                values.append(field.validate(value))
            except ValidationError as error:
                report(place, explain(error.errors()[0]))
                sound = False
        if isinstance(allowed, list) and not allowed:
            report(place, "names no value")
            sound = False
        found[name] = tuple(values)
    return found if sound else None


def _categorical(
    field: ConfigField, written: Choices, when: Mapping[str, tuple[Any, ...]], report: Report
) -> Parameter | None:
    kept: list[Any] = []
    sound = True
    for index, choice in enumerate(written.choices):
        place = ("search", field.path, "choices", index)
        try:
            value = field.validate(choice)
        except ValidationError as error:
            report(place, explain(error.errors()[0]))
            sound = False
            continue
        if value in kept:
            report(place, f"{quoted(choice)} is given twice")
            sound = False
        kept.append(value)
    return Categorical(field.path, when, tuple(kept)) if sound else None


def _number(
    field: ConfigField,
    written: Range,
    entry: Mapping[str, Any],
    when: Mapping[str, tuple[Any, ...]],
    report: Report,
) -> Parameter | None:
    place = ("search", field.path)
    if field.kind not in ("int", "float"):
        report(place, "has no order, so low and high mean nothing here; give choices")
        return None
    faults = dict(_range_faults(written, entry))
    for bound in ("low", "high"):
        try:
            field.validate(entry[bound])
        except ValidationError as error:
            faults[bound] = explain(error.errors()[0])  # the field's own word comes before the range's
    if field.kind == "int" and written.step is not None and not isinstance(entry["step"], int):
        faults["step"] = f"must be a whole number, not {quoted(written.step)}"
    for name, message in faults.items():
        report((*place, name), message)
    if faults:
        return None
    if field.kind == "int":
        return Integer(field.path, when, int(entry["low"]), int(entry["high"]), written.log, int(written.step or 1))
    return Real(field.path, when, written.low, written.high, written.log, written.step)


def _range_faults(written: Range, entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    low, high, step = (entry.get(name) for name in ("low", "high", "step"))
    if written.low >= written.high:
        yield "high", f"must be greater than low, {flow(low)}, not {flow(high)}"
    if written.log and written.low <= 0:
        yield "low", f"must be greater than 0 where log is true, not {flow(low)}"
    if written.log and written.step is not None:
        yield "step", "a logarithmic range has no steps; leave out step or log"
    elif written.step is not None and written.step <= 0:
        yield "step", f"must be greater than 0, not {flow(step)}"
    elif written.step is not None and written.low < written.high:
        # In decimal, because 0.1 × 3 is not 0.3 in binary.
        low_, high_, step_ = (Decimal(str(number)) for number in (low, high, step))
        if (high_ - low_) % step_ != 0:
            last = low_ + (high_ - low_) // step_ * step_
            yield (
                "step",
                f"{flow(step)} does not divide the range: it would end at {last.normalize():f}, not {flow(high)}",
            )


# All of them together


def ordered(search: Mapping[str, Parameter], report: Report) -> dict[str, Parameter]:
    """The parameters, each behind those that its condition names. Conditions in a circle are reported and left out."""
    done: dict[str, Parameter] = {}
    waiting = dict(search)
    while ready := [path for path in waiting if not _asked(path, waiting)]:
        # One at a time, the first ready one: the order of the file is kept wherever it can be.
        done[ready[0]] = waiting.pop(ready[0])
    circle = dict(waiting)
    while idle := [path for path in circle if not any(path in _asked(other, circle) for other in circle)]:
        del circle[idle[0]]  # it only waits for the circle, and nothing waits for it
    for path in circle:
        report(("search", path, "when"), f"conditions in a circle: {path} waits for {', '.join(_asked(path, circle))}")
    return done


def _asked(path: str, among: Mapping[str, Parameter]) -> list[str]:
    """Which of these parameters the condition of one of them names."""
    return [name for name in among[path].when if name in among]


Needs = dict[str, tuple[Any, ...]]
"""Field -> the values that it must have one of."""


def without_unreachable(
    search: Mapping[str, Parameter], base: TrainConfig, report: Report | None, broken: Container[str] = ()
) -> dict[str, Parameter]:
    """The parameters, as ordered, whose condition can be met.

    The others are reported; or dropped in silence where `report` is None: `--set optim.name=sgd` does away with what
    belongs to the other optimizers. What conditions say of the fields in `broken`, faulty already, is not judged.
    """
    kept: dict[str, Parameter] = {}
    needs: dict[str, Needs] = {}  # of each parameter kept, its ancestors' conditions included
    fixed = base.flat()
    for path, found in search.items():
        wrong = None
        needs[path] = {}
        for name, allowed in found.when.items():
            if name in broken:
                continue
            if name in kept:
                wrong = None if report is None else _undrawn(kept[name], allowed)
                clash = _narrow(needs[path], {name: allowed, **needs[name]})
                if wrong is None and clash is not None:
                    wrong = f"can never be met: all conditions together want {clash} to have two values at once"
            elif name in search:
                wrong = f"can never be met: {name} itself is never searched"
            elif fixed[name] not in allowed:
                wrong = f"can never be met: {name} is not searched, and the base's is {quoted(fixed[name])}"
            if wrong is not None:
                if report is not None:
                    report(("search", path, "when", name), wrong)
                break
        if wrong is None:
            kept[path] = found
    return kept


def _undrawn(found: Parameter, allowed: tuple[Any, ...]) -> str | None:
    """What is wrong with a condition on a searched field: a value that it never has.

    A range without steps never meets one value exactly.
    """
    for value in allowed:
        if not found.contains(value) or (isinstance(found, Real) and found.step is None):
            names = [choice for choice in getattr(found, "choices", ()) if isinstance(choice, str)]
            meant = did_you_mean(nearest(value, names)) if isinstance(value, str) else ""
            return f"{quoted(value)} can never be met: search.{found.path} does not draw it{meant}"
    return None


def _narrow(needs: Needs, more: Needs) -> str | None:
    """Narrows the needs by more of them; names a field for which nothing is left."""
    for name, values in more.items():
        needs[name] = tuple(value for value in needs.get(name, values) if value in values)
    return next((name for name, values in needs.items() if not values), None)


def clashing_rates(search: Container[str], report: Report) -> bool:
    """Whether both `optim.lr` and `optim.lr_scale` are searched, which is reported: they are one knob."""
    if "optim.lr" in search and "optim.lr_scale" in search:
        report(("search", "optim.lr"), "optim.lr and optim.lr_scale are one knob under two names: search one of them")
        return True
    return False


def check_base(search: Mapping[str, Parameter], base: TrainConfig, report: Report) -> None:
    """Trial 0 is the base, so the search must be able to draw it. Parameters that the base does without are skipped."""
    values = in_rate_of(base, search).flat()
    active: set[str] = set()
    for path, found in search.items():
        asked = [name for name in found.when if name in search]
        if active.issuperset(asked) and all(values[name] in allowed for name, allowed in found.when.items()):
            active.add(path)
            if not found.contains(snapped(found, values[path])):
                text = (
                    f"must hold the base's {quoted(values[path])}, since trial 0 is the base; it has {_domain(found)}"
                )
                report(("search", path), text)


def _domain(found: Parameter) -> str:
    return ", ".join(f"{key} {flow(value)}" for key, value in found.describe().items() if key != "when")


def check_values(
    search: Mapping[str, Parameter], base: TrainConfig, report: Report, broken: Iterable[str] = ()
) -> None:
    """Reports each choice, low and high that `TrainConfig` refuses whatever the rest of its section draws."""
    uncertain = {_section(path) for path in broken}
    for path, found in search.items():
        if _section(path) in uncertain:
            continue
        others = [other for name, other in search.items() if name != path and _section(name) == _section(path)]
        given = {name: allowed[0] for name, allowed in found.when.items()}
        for place, value in _edges(found):
            values = {**given, path: value}
            refusal = _refusal(base, values)
            if refusal is not None and not _saved(base, values, [other for other in others if _fits(other, values)]):
                report(("search", path, *place), refusal)


def _edges(found: Parameter) -> list[tuple[tuple[str | int, ...], Any]]:
    if isinstance(found, Categorical):
        return [(("choices", index), choice) for index, choice in enumerate(found.choices)]
    assert isinstance(found, Integer | Real)
    return [(("low",), found.low), (("high",), found.high)]


def _fits(found: Parameter, values: Mapping[str, Any]) -> bool:
    """Whether the parameter may exist beside these values."""
    return all(name not in values or values[name] in allowed for name, allowed in found.when.items())


def _section(path: str) -> str:
    return path.rpartition(".")[0]


def _refusal(base: TrainConfig, values: dict[str, Any]) -> str | None:
    try:
        base.override(values)
    except ValidationError as error:
        return explain(error.errors()[0])
    return None


def _saved(base: TrainConfig, values: dict[str, Any], others: list[Parameter]) -> bool:
    """Whether some values of the others make these acceptable; True as well where there are too many to try."""
    spaces = [[(other.path, value) for _, value in _edges(other)] for other in others if other.path not in values]
    combinations = itertools.product(*spaces)
    for count, combination in enumerate(combinations):
        if count == MAX_COMBINATIONS or _refusal(base, {**values, **dict(combination)}) is None:
            return True
    return False
