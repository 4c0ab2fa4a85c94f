"""Checks the `search:` section: each entry against the field it names, then all entries against each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from decimal import Decimal
from typing import Any

from pydantic import ValidationError

from core.config import TrainConfig
from hpo.space.document import Place, flow
from hpo.space.fields import ConfigField, config_fields, did_you_mean, field_at, no_such_field
from hpo.space.grammar import Choices, Range, explain, quoted
from hpo.space.space import Categorical, Integer, Parameter, Real, in_rate_of, snapped

Report = Callable[[Place, str], None]
"""Takes the place of a fault and its message."""
Conditions = dict[str, tuple[Any, ...]]
"""Field -> the values of which it must have one."""

# Fields that a search may not vary, and why.
FIXED = {
    "seed": "a study seeds every trial itself; --seed sets the study's",
    "epochs": "trials of different lengths cannot be compared at their rungs; set it in base, or with --set",
    **dict.fromkeys(
        (path for path in config_fields() if path.startswith("data.")),
        "trials on different images cannot be compared; set it under data",
    ),
    "data.image_size": "trials on different images cannot be compared; set it under data, and search model.input_size",
}

MAX_COMBINATIONS = 2_000  # a validation takes about 20 µs: 40 ms


def parameter(path: str, entry: Any, report: Report) -> Parameter | None:
    """Build the parameter of an entry of `search:`; None after reporting a fault."""
    faults: list[tuple[Place, str]] = []
    found = _built(path, entry, lambda place, message: faults.append((place, message)))
    for place, message in faults:
        report(("search", path, *place), message)
    return None if faults else found


def _built(path: str, entry: Any, report: Report) -> Parameter | None:
    field = field_at(path)
    if field is None:
        message = no_such_field(path)
    elif path in FIXED:
        message = f"cannot be searched: {FIXED[path]}"
    elif not isinstance(entry, Mapping):
        message = f"must be {{choices: […]}} or {{low: …, high: …}}, not {quoted(entry)}"
    elif not {"choices", "low", "high"} & set(entry):
        message = "needs choices, or low and high"
    else:
        return _read(field, entry, report)
    report((), message)
    return None


def _read(field: ConfigField, entry: Mapping[str, Any], report: Report) -> Parameter | None:
    grammar = Choices if "choices" in entry else Range
    try:
        written = grammar.model_validate(dict(entry))
    except ValidationError as error:
        for detail in error.errors():
            report(detail["loc"], explain(detail, grammar.model_fields))
        return None
    when = {name: _allowed(name, value, report) for name, value in (written.when or {}).items()}
    if isinstance(written, Choices):
        return _categorical(field, written, when, report)
    return _number(field, written, entry, when, report)


def _fault(field: ConfigField, value: Any) -> str | None:
    try:
        field.validate(value)
    except ValidationError as error:
        return explain(error.errors()[0])
    return None


def _allowed(name: str, value: Any, report: Report) -> tuple[Any, ...]:
    """The values that a condition allows, as the field stores them."""
    given = value if isinstance(value, list) else [value]
    field = field_at(name)
    if field is None:
        faults = [no_such_field(name)]
    else:
        faults = [fault for one in given if (fault := _fault(field, one))] if given else ["names no value"]
    for fault in faults:
        report(("when", name), fault)
    return () if field is None or faults else tuple(map(field.validate, given))


def _categorical(field: ConfigField, written: Choices, when: Conditions, report: Report) -> Parameter:
    kept: list[Any] = []
    for index, choice in enumerate(written.choices):
        fault = _fault(field, choice)
        if fault is None:
            value = field.validate(choice)
            fault = f"{quoted(choice)} is given twice" if value in kept else None
            kept.append(value)
        if fault is not None:
            report(("choices", index), fault)
    return Categorical(field.path, when, tuple(kept))


def _number(
    field: ConfigField, written: Range, entry: Mapping[str, Any], when: Conditions, report: Report
) -> Parameter | None:
    if field.kind not in ("int", "float", "any"):
        report((), "has no order, so low and high mean nothing here; give choices")
        return None
    faults = dict(_range_faults(written, entry))
    # The field's own message takes precedence over the range's.
    faults |= {bound: fault for bound in ("low", "high") if (fault := _fault(field, entry[bound]))}
    whole = field.kind == "int" or (field.kind == "any" and all(isinstance(entry[end], int) for end in ("low", "high")))
    if whole and written.step is not None and not isinstance(entry["step"], int):
        faults["step"] = f"must be a whole number, not {quoted(written.step)}"
    for name, message in faults.items():
        report((name,), message)
    if whole:
        return Integer(field.path, when, int(written.low), int(written.high), written.log, int(written.step or 1))
    return Real(field.path, when, written.low, written.high, written.log, written.step)


_MOST_STEPS = 10**15  # about the numbers that a float can tell apart


def _range_faults(written: Range, entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    low, high, step = (entry.get(name) for name in ("low", "high", "step"))
    if written.low >= written.high:
        yield "high", f"must be greater than low, {flow(low)}, not {flow(high)}"
    if written.log and written.low <= 0:
        yield "low", f"must be greater than 0 where log is true, not {flow(low)}"
    if written.step is None:
        return
    if written.log:
        yield "step", "a logarithmic range has no steps; leave out step or log"
    elif written.step <= 0:
        yield "step", f"must be greater than 0, not {flow(step)}"
    elif written.low < written.high:
        # In decimal, because 0.1 × 3 is not 0.3 in binary.
        low_, high_, step_ = (Decimal(str(number)) for number in (low, high, step))
        if (high_ - low_) / step_ > _MOST_STEPS:
            yield "step", f"{flow(step)} is too small for the range; give a larger one, or none"
        elif (high_ - low_) % step_ != 0:
            last = (low_ + (high_ - low_) // step_ * step_).normalize()
            yield "step", f"{flow(step)} does not divide the range: it would end at {last:f}, not {flow(high)}"


# All of them together


def clashing_rates(search: Collection[str], report: Report) -> bool:
    """Report a search of both `optim.lr` and `optim.lr_scale`, which are one parameter; return whether it was."""
    clash = {"optim.lr", "optim.lr_scale"} <= set(search)
    if clash:
        report(("search", "optim.lr"), "optim.lr and optim.lr_scale are one knob under two names: search one of them")
    return clash


def ordered(search: Mapping[str, Parameter], report: Report) -> dict[str, Parameter]:
    """Sort the parameters, each after those in its condition, else as in the file; report and leave out circles."""
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
    """The parameters that the condition names."""
    return [name for name in among[path].when if name in among]


def fitting(
    search: Mapping[str, Parameter],
    baseline: TrainConfig,
    report: Report,
    broken: Collection[str] = (),
    *,
    may_drop: bool = False,
) -> dict[str, Parameter]:
    """Check sorted parameters against the baseline and each other, and return those whose condition can be met.

    Conditions on `broken` fields, which have faulty entries, are not checked. `may_drop` reports no unmet condition.
    """
    baseline = in_rate_of(baseline, search)
    kept: dict[str, Parameter] = {}
    needs: dict[str, Conditions] = {}  # of each parameter, with the conditions of its ancestors
    for path, found in search.items():
        needs[path] = {}
        for name, allowed in found.when.items():
            if name in broken:
                continue
            wrong = _unmet(name, allowed, search, kept, baseline)
            if wrong is None and name in kept:
                wrong = _narrow(needs[path], {name: allowed, **needs[name]})
            if wrong is not None:
                if not may_drop:
                    report(("search", path, "when", name), wrong)
                break
        else:
            kept[path] = found
    _check_values(kept, baseline, report, broken)
    _check_baseline(kept, baseline, report)
    return kept


def _unmet(
    name: str,
    allowed: tuple[Any, ...],
    search: Mapping[str, Parameter],
    kept: Mapping[str, Parameter],
    baseline: TrainConfig,
) -> str | None:
    """The message if a condition can never be met."""
    if name not in search:
        fixed = baseline.flat().get(name)
        text = f"can never be met: {name} is not searched, and the baseline's is {quoted(fixed)}"
        return None if fixed in allowed else text
    if name not in kept:
        return f"can never be met: {name} itself is never searched"
    found = search[name]
    for value in allowed:
        if not found.contains(value) or (isinstance(found, Real) and found.step is None):
            names = [choice for choice in getattr(found, "choices", ()) if isinstance(choice, str)]
            meant = did_you_mean(value, names)
            return f"{quoted(value)} can never be met: search.{name} does not draw it{meant}"
    return None


def _narrow(needs: Conditions, more: Conditions) -> str | None:
    """Add conditions to `needs`; the message if a field then has no possible value left."""
    for name, values in more.items():
        needs[name] = tuple(value for value in needs.get(name, values) if value in values)
    clash = next((name for name, values in needs.items() if not values), None)
    return clash and f"can never be met: all conditions together want {clash} to have two values at once"


def _check_baseline(search: Mapping[str, Parameter], baseline: TrainConfig, report: Report) -> None:
    """Report active parameters that cannot draw the baseline's value: trial 0 is the baseline."""
    values = baseline.flat()
    active: set[str] = set()
    for path, found in search.items():
        met = all(values.get(name) in allowed for name, allowed in found.when.items())
        if met and active.issuperset(_parents(path, search)):
            active.add(path)
            if path not in values:
                report(("search", path), "the baseline has no value: give one in base, because trial 0 is the baseline")
            elif not found.contains(snapped(found, values[path])):
                domain = ", ".join(f"{key} {flow(value)}" for key, value in found.domain().items())
                value = quoted(values[path])
                text = f"must contain the baseline's {value}, because trial 0 is the baseline; it has {domain}"
                report(("search", path), text)


def _check_values(
    search: Mapping[str, Parameter], baseline: TrainConfig, report: Report, broken: Collection[str]
) -> None:
    """Report each choice, low and high that `TrainConfig` refuses for all values of the other parameters."""
    uncertain = {_section(path) for path in broken}
    for path, found in search.items():
        if _section(path) in uncertain:
            continue
        others = [other for name, other in search.items() if name != path and _section(name) == _section(path)]
        given = {name: allowed[0] for name, allowed in found.when.items()}
        for place, value in _edges(found).items():
            values = {**given, path: value}
            refusal = _refusal(baseline, values)
            if refusal is not None and not _valid_with(baseline, values, others):
                report(("search", path, *place), explain(refusal.errors()[0]))


def _edges(found: Parameter) -> dict[Place, Any]:
    """Place in the entry -> value, of each choice or of both bounds."""
    if isinstance(found, Categorical):
        return {("choices", index): choice for index, choice in enumerate(found.choices)}
    return {(name,): found.domain()[name] for name in ("low", "high")}


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
        [(other.path, value) for value in _edges(other).values()]
        for other in others
        if other.path not in values
        and all(name not in values or values[name] in allowed for name, allowed in other.when.items())
    ]
    for count, combination in enumerate(itertools.product(*free)):
        if count == MAX_COMBINATIONS or _refusal(baseline, {**values, **dict(combination)}) is None:
            return True
    return False
