"""YAML 1.2 as plain data with a line number for every value, and back.

PyYAML's constructors resolve scalars by YAML 1.1 (`off` is false, `1e-4` a string), accept duplicate keys, and recurse
without a bound. Here scalars follow the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.events import AliasEvent, Event, MappingStartEvent, NodeEvent, ScalarEvent, SequenceStartEvent

from hpo.errors import Fault, SpaceError

NULL = re.compile(r"(null|Null|NULL|~|)")
BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)")
INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

MAX_BYTES = 1 << 20  # the longest shipped space has 5,000
MAX_DEPTH = 32  # a configuration nests 4 deep; protects the stack from a hostile file
MAX_NODES = 100_000  # with aliases expanded, against nested aliases ("billion laughs")
MAX_DIGITS = 40  # a 64-bit integer has 20 digits; Python refuses more than 4,300

# libyaml is ten times as fast; PyYAML's wheels have it on every platform that torch supports.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BaseDumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


Place = tuple[str | int, ...]
"""The keys and indices that lead to a value, such as `("search", "optim.lr", "low")`."""


@dataclass(frozen=True)
class Document:
    """YAML as plain data, with line numbers."""

    name: str
    """The file's name in messages."""
    content: Any
    lines: Mapping[Place, int]
    """The line of each key and item, counted from 1; that of the whole content is at ()."""

    def at(self, *place: str | int) -> str:
        """`file:line` of the key or item at this place, or of its nearest existing parent."""
        while place not in self.lines:
            place = place[:-1]
        return f"{self.name}:{self.lines[place]}"


def parse_yaml(text: str, name: str) -> tuple[Document | None, list[Fault]]:
    """Parse one YAML document, which messages call `name`; None if it cannot be read, and every fault."""
    if len(text) > MAX_BYTES:
        return None, [_too_long(name)]
    try:
        reader = _Reader(yaml.parse(text, Loader=_Loader), name)
        return reader.document(), reader.faults
    except SpaceError as error:
        return None, error.faults
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        line = min(line, text.count("\n") + 1)  # libyaml places an error at the end of the text one line too far
        return None, [Fault(f"{name}:{line}", f"not YAML: {error.problem or error.context}")]
    except (yaml.YAMLError, UnicodeEncodeError) as error:  # libyaml encodes the text; a lone surrogate fails there
        return None, [Fault(f"{name}:1", f"not YAML: {str(error).splitlines()[0]}")]


def read(path: Path) -> tuple[Document | None, list[Fault]]:
    """Read a YAML file; otherwise like `parse_yaml`."""
    name = shown(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            return None, [_too_long(name)]
        return parse_yaml(content.decode("utf-8"), name)
    except UnicodeDecodeError as error:
        return None, [Fault(f"{name}:1", f"not UTF-8 text: {error.reason} at byte {error.start}")]
    except OSError as error:
        return None, [Fault(name, f"cannot be read: {error.strerror}")]


def _too_long(name: str) -> Fault:
    return Fault(name, f"longer than {MAX_BYTES:,} bytes, too long for a configuration; choose another file")


def load_yaml(path: Path) -> Any:
    """Read a YAML file within the bounds of a search space; SpaceError with its first fault."""
    document, faults = read(path)
    if document is None or faults:
        raise SpaceError(faults[:1])
    return document.content


def shown(path: Path) -> str:
    """The path, relative to the working directory if inside it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def scalar(text: str) -> Any:
    """Resolve a plain scalar by YAML 1.2's core schema; ValueError about a number that is not finite, or too long."""
    if NULL.fullmatch(text):
        return None
    if BOOL.fullmatch(text):
        return text.lower() == "true"
    if INT.fullmatch(text) or FLOAT.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise ValueError(f"a number of {len(text)} characters is too long")
        if INT.fullmatch(text):
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if math.isfinite(float(text)):
            return float(text)
    elif not NOT_FINITE.fullmatch(text):
        return text
    raise ValueError(f"{text} is not a finite number")


_Node = tuple[Any, dict[Place, int]]
"""A value, and the lines of everything in it by their places from there."""


class _Reader:
    """Reads parser events as plain data and collects the faults of single values."""

    def __init__(self, events: Iterator[Event], name: str) -> None:
        self.events = events
        self.name = name
        self.faults: list[Fault] = []
        self.anchors: dict[str, _Node] = {}
        self.nodes = 0

    def document(self) -> Document:
        found: _Node | None = None
        for event in self.events:
            if isinstance(event, NodeEvent):
                if found is not None:
                    raise SpaceError(self._faults(event, "a second document; one file holds one"))
                found = self._node(event, depth=0)
        return Document(self.name, *(found or ({}, {(): 1})))

    def _node(self, event: Event, depth: int) -> _Node:
        if isinstance(event, AliasEvent):
            if event.anchor not in self.anchors:
                raise SpaceError(self._faults(event, f"*{event.anchor} has no complete &{event.anchor} before it"))
            known, lines = self.anchors[event.anchor]
            self._check_bounds(event, len(lines), depth + max(map(len, lines)))
            return known, lines
        self._check_bounds(event, 1, depth)
        assert isinstance(event, ScalarEvent | MappingStartEvent | SequenceStartEvent)
        if event.tag is not None:
            self.faults += self._faults(event, f"the tag {event.tag} is not allowed: plain data only")
        lines = {(): event.start_mark.line + 1}
        content: Any
        if isinstance(event, ScalarEvent):
            content = self._scalar(event)
        elif isinstance(event, MappingStartEvent):
            content = self._mapping(lines, depth + 1)
        else:
            content = self._sequence(lines, depth + 1)
        if event.anchor is not None:
            self.anchors[event.anchor] = content, lines
        return content, lines

    def _check_bounds(self, event: Event, nodes: int, depth: int) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise SpaceError(self._faults(event, f"more than {MAX_NODES} values"))
        if depth > MAX_DEPTH:
            raise SpaceError(self._faults(event, f"nested more than {MAX_DEPTH} deep"))

    def _mapping(self, lines: dict[Place, int], depth: int) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for event in self._until_end():
            if not isinstance(event, ScalarEvent):
                raise SpaceError(self._faults(event, "a key must be a word"))
            key = event.value
            value, within = self._node(next(self.events), depth)
            if key in content:
                self.faults += self._faults(event, f"{key}: given twice; first on line {lines[key,]}")
                continue
            content[key] = value
            lines |= {(key, *place): line for place, line in within.items()}
            lines[key,] = event.start_mark.line + 1
        return content

    def _sequence(self, lines: dict[Place, int], depth: int) -> list[Any]:
        content: list[Any] = []
        for event in self._until_end():
            item, within = self._node(event, depth)
            lines |= {(len(content), *place): line for place, line in within.items()}
            content.append(item)
        return content

    def _until_end(self) -> Iterator[Event]:
        for event in self.events:
            if not isinstance(event, NodeEvent):
                return
            yield event

    def _scalar(self, event: ScalarEvent) -> Any:
        if event.style:  # quoted, literal or folded
            return event.value
        try:
            return scalar(event.value)
        except ValueError as error:
            self.faults += self._faults(event, str(error))
            return None

    def _faults(self, event: Event, message: str) -> list[Fault]:
        return [Fault(f"{self.name}:{event.start_mark.line + 1}", message)]


# Writing


class _Dumper(_BaseDumper):  # type: ignore[misc, valid-type]
    """Writes block mappings and flow sequences that YAML 1.1 and 1.2 readers read alike."""

    # Quoted though YAML 1.2 reads them as strings: words that are booleans in YAML 1.1.
    WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True

    def string(self, value: Any) -> yaml.ScalarNode:
        text = str(value)
        plain = re.fullmatch(r"[A-Za-z][\w./\-]*", text, re.ASCII) and text.lower() not in self.WORDS
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')

    def sequence(self, values: Sequence[Any]) -> yaml.SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


_Dumper.add_representer(str, _Dumper.string)
_Dumper.add_representer(list, _Dumper.sequence)
_Dumper.add_representer(tuple, _Dumper.sequence)
_Dumper.add_multi_representer(Mapping, _Dumper.represent_dict)
_Dumper.add_multi_representer(object, _Dumper.string)  # for messages about a wrong value, such as a Path


def hash_of(identity: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a space's identity, in hex."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Write block YAML that `parse_yaml` reads back exactly; lists in flow style, key order kept."""
    return _emit(tree, flow_style=False)


def flow(value: Any) -> str:
    """A value in YAML's flow style, on one line."""
    return _emit([value], flow_style=True)[1:-2]


def _emit(data: Any, *, flow_style: bool) -> str:
    options = {"default_flow_style": flow_style, "sort_keys": False, "allow_unicode": True, "width": 1 << 30}
    text: str = yaml.dump(data, Dumper=_Dumper, **options)
    return text
