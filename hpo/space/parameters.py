"""Checks the `search:` section: each entry against the field it names, then all entries against each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from pydantic import ValidationError

from core.config import TrainConfig
from hpo.space.document import flow
from hpo.space.fields import ConfigField, config_fields, did_you_mean, no_such_field
from hpo.space.grammar import Choices, Range, explain, quoted
from hpo.space.space import Categorical, Integer, Parameter, Real, in_rate_of, snapped

Place = tuple[str | int, ...]
"""A path in the file, such as `("search", "optim.lr", "low")`."""
Report = Callable[[Place, str], None]
"""Takes the place of a fault and its message."""
Conditions = Mapping[str, tuple[Any, ...]]
"""Field -> the values of which it must have one."""

# Fields that a search may not vary, and why.
FIXED = {
    "seed": "a study seeds every trial itself; --seed sets the study's",
    "epochs": "trials of different lengths cannot be compared at their rungs; set it in base, or with --set",
}
FIXED_DATA = "trials on different images cannot be compared; set it under data"

MAX_COMBINATIONS = 2_000  # a validation takes about 20 µs: 40 ms


def parameter(path: str, entry: Any, report: Report) -> Parameter | None:
    """Build the parameter of one entry of `search:`; None if it has a fault, which is reported."""
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


def _fault(field: ConfigField, value: Any) -> str | None:
    """The message if the field refuses the value."""
    try:
        field.validate(value)
    except ValidationError as error:
        return explain(error.errors()[0])
    return None


def _conditions(path: str, when: Mapping[str, Any], report: Report) -> Conditions | None:
    """The conditions with their values as the fields store them; None if there is a fault."""
    found: dict[str, tuple[Any, ...]] = {}
    faults: list[tuple[str, str]] = []
    for name, value in when.items():
        allowed = value if isinstance(value, list) else [value]
        field = config_fields().get(name)
        if field is None:
            faults.append((name, no_such_field(name)))
            continue
        wrong = [fault for one in allowed if (fault := _fault(field, one))]
        faults += [(name, fault) for fault in wrong] if allowed else [(name, "names no value")]
        if not wrong:
            found[name] = tuple(map(field.validate, allowed))
    for name, fault in faults:
        report(("search", path, "when", name), fault)
    return None if faults else found


def _categorical(field: ConfigField, written: Choices, when: Conditions, report: Report) -> Parameter | None:
    kept: list[Any] = []
    sound = True
    for index, choice in enumerate(written.choices):
        fault = _fault(field, choice)
        if fault is None:
            value = field.validate(choice)
            fault = f"{quoted(choice)} is given twice" if value in kept else None
            kept.append(value)
        if fault is not None:
            report(("search", field.path, "choices", index), fault)
            sound = False
    return Categorical(field.path, when, tuple(kept)) if sound else None


def _number(
    field: ConfigField, written: Range, entry: Mapping[str, Any], when: Conditions, report: Report
) -> Parameter | None:
    place = ("search", field.path)
    if field.kind not in ("int", "float"):
        report(place, "has no order, so low and high mean nothing here; give choices")
        return None
    faults = dict(_range_faults(written, entry))
    # The field's own message takes precedence over the range's.
    faults |= {bound: fault for bound in ("low", "high") if (fault := _fault(field, entry[bound]))}
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
            last = (low_ + (high_ - low_) // step_ * step_).normalize()
            yield "step", f"{flow(step)} does not divide the range: it would end at {last:f}, not {flow(high)}"


# All of them together


def ordered(search: Mapping[str, Parameter], report: Report) -> dict[str, Parameter]:
    """Sort the parameters so that each comes after those in its condition; report and leave out circles.

    Otherwise the order of the file is kept, so `graphlib` does not fit.
    """
    done: dict[str, Parameter] = {}
    waiting = dict(search)
    while ready := [path for path in waiting if not _parents(path, waiting)]:
        done[ready[0]] = waiting.pop(ready[0])
    circle = dict(waiting)
    while idle := [path for path in circle if not any(path in _parents(other, circle) for other in circle)]:
        del circle[idle[0]]  # depends on the circle without being part of it
    for path in circle:
        parents = ", ".join(_parents(path, circle))
        report(("search", path, "when"), f"conditions in a circle: {path} waits for {parents}")
    return done


def _parents(path: str, among: Mapping[str, Parameter]) -> list[str]:
    """The parameters among these that a parameter's condition names."""
    return [name for name in among[path].when if name in among]


def without_unreachable(
    search: Mapping[str, Parameter], baseline: TrainConfig, report: Report | None, broken: Container[str] = ()
) -> dict[str, Parameter]:
    """Return the parameters whose condition can be met.

    Args:
        search: sorted by `ordered`.
        baseline: has the values of the fields that are not searched.
        report: receives the others; if None they are dropped silently, since `--set optim.name=sgd` is meant to remove
            the parameters of the other optimizers.
        broken: fields whose entries are faulty; conditions on them are not checked.
    """
    kept: dict[str, Parameter] = {}
    needs: dict[str, dict[str, tuple[Any, ...]]] = {}  # of each parameter, with the conditions of its ancestors
    fixed = baseline.flat()
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
                wrong = f"can never be met: {name} is not searched, and the baseline's is {quoted(fixed[name])}"
            if wrong is not None:
                if report is not None:
                    report(("search", path, "when", name), wrong)
                break
        if wrong is None:
            kept[path] = found
    return kept


def _undrawn(found: Parameter, allowed: tuple[Any, ...]) -> str | None:
    """The message if a condition requires a value that the search never draws, as from a continuous range."""
    for value in allowed:
        if not found.contains(value) or (isinstance(found, Real) and found.step is None):
            names = [choice for choice in getattr(found, "choices", ()) if isinstance(choice, str)]
            meant = did_you_mean(value, names)
            return f"{quoted(value)} can never be met: search.{found.path} does not draw it{meant}"
    return None


def _narrow(needs: dict[str, tuple[Any, ...]], more: Conditions) -> str | None:
    """Add conditions to `needs`; return a field that has no possible value left."""
    for name, values in more.items():
        needs[name] = tuple(value for value in needs.get(name, values) if value in values)
    return next((name for name, values in needs.items() if not values), None)


def clashing_rates(search: Container[str], report: Report) -> bool:
    """Report a search of both `optim.lr` and `optim.lr_scale`, which are one parameter; return whether it was."""
    if "optim.lr" in search and "optim.lr_scale" in search:
        report(("search", "optim.lr"), "optim.lr and optim.lr_scale are one knob under two names: search one of them")
        return True
    return False


def check_baseline(search: Mapping[str, Parameter], baseline: TrainConfig, report: Report) -> None:
    """Report active parameters that cannot draw the baseline's value: trial 0 is the baseline."""
    values = in_rate_of(baseline, search).flat()
    active: set[str] = set()
    for path, found in search.items():
        if active.issuperset(_parents(path, search)) and all(values[name] in found.when[name] for name in found.when):
            active.add(path)
            if not found.contains(snapped(found, values[path])):
                domain = ", ".join(f"{key} {flow(value)}" for key, value in found.describe().items() if key != "when")
                value = quoted(values[path])
                text = f"must contain the baseline's {value}, because trial 0 is the baseline; it has {domain}"
                report(("search", path), text)


def check_values(
    search: Mapping[str, Parameter], baseline: TrainConfig, report: Report, broken: Iterable[str] = ()
) -> None:
    """Report each choice, low and high that `TrainConfig` refuses for all values of the other parameters."""
    uncertain = {_section(path) for path in broken}
    for path, found in search.items():
        if _section(path) in uncertain:
            continue
        others = [other for name, other in search.items() if name != path and _section(name) == _section(path)]
        given = {name: allowed[0] for name, allowed in found.when.items()}
        for place, value in _edges(found):
            values = {**given, path: value}
            refusal = _refusal(baseline, values)
            if refusal is not None and not _valid_with(baseline, values, others):
                report(("search", path, *place), explain(refusal.errors()[0]))


def _edges(found: Parameter) -> list[tuple[Place, Any]]:
    if isinstance(found, Categorical):
        return [(("choices", index), choice) for index, choice in enumerate(found.choices)]
    assert isinstance(found, Integer | Real)
    return [(("low",), found.low), (("high",), found.high)]


def _section(path: str) -> str:
    return path.rpartition(".")[0]


def _refusal(baseline: TrainConfig, values: dict[str, Any]) -> ValidationError | None:
    try:
        baseline.override(values)
    except ValidationError as error:
        return error
    return None


def _valid_with(baseline: TrainConfig, values: dict[str, Any], others: list[Parameter]) -> bool:
    """Whether `TrainConfig` accepts these values with some values of the others; True if there are too many to try."""
    free = [
        [(other.path, value) for _, value in _edges(other)]
        for other in others
        if other.path not in values
        and all(name not in values or values[name] in allowed for name, allowed in other.when.items())
    ]
    for count, combination in enumerate(itertools.product(*free)):
        if count == MAX_COMBINATIONS or _refusal(baseline, {**values, **dict(combination)}) is None:
            return True
    return False
