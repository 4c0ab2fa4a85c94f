"""YAML 1.2 as plain data with a line for every value, and back.

The text is read from ruamel's event stream rather than through its constructor, for three reasons: every duplicate key
is reported and not only the first; a value keeps its line; and scalars follow YAML 1.2's core schema to the letter
(https://yaml.org/spec/1.2.2/#103-core-schema), where `1e-4` and `.5e3` are numbers, `off`, `1_000` and `2026-01-30`
are words. Tags are refused, so nothing but plain data can come out of a file, and its size, its depth and what its
aliases come to are bounded, so that a hostile one ends in a line as well.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, Event, MappingStartEvent, NodeEvent, ScalarEvent, SequenceStartEvent

from hpo.errors import Fault, SpaceError

NULL = re.compile(r"(null|Null|NULL|~|)")
BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)")
INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

MAX_BYTES = 1 << 20  # of a file: the longest space here has 5,000, and a megabyte takes ten seconds to read
MAX_DEPTH = 32  # a configuration nests 4 deep; this only keeps a hostile file from exhausting the stack
MAX_NODES = 100_000  # counted with aliases written out, against the "billion laughs" of nested aliases
MAX_DIGITS = 40  # a 64-bit integer has 20; Python refuses to read more than 4,300


@dataclass(frozen=True)
class Node:
    """A value and the line that it begins on, from 1."""

    value: Any
    """A scalar, a `list[Node]`, or a `dict[str, Entry]`."""
    line: int
    size: int = 1
    """Nodes below and including this one, aliases written out."""

    def plain(self) -> Any:
        """The value as plain Python data."""
        if isinstance(self.value, dict):
            return {key: entry.node.plain() for key, entry in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


@dataclass(frozen=True)
class Entry:
    """One key of a mapping: where the key stands, and its value."""

    line: int
    node: Node


@dataclass(frozen=True)
class Document:
    """A YAML file's content."""

    name: str
    """How the file is called in messages."""
    root: Node

    def at(self, *path: str | int) -> str:
        """`file:line` of the key or item at this path, or of the nearest thing around it that exists."""
        node, line = self.root, self.root.line
        for step in path:
            if isinstance(node.value, dict) and step in node.value:
                entry = node.value[step]
                node, line = entry.node, entry.line
            elif isinstance(node.value, list) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                line = node.line
            else:
                break
        return f"{self.name}:{line}"

    def plain(self) -> Any:
        return self.root.plain()


def parse(text: str, name: str) -> tuple[Document | None, list[Fault]]:
    """Reads one YAML document: None where it is not YAML at all, and every fault in either case."""
    if len(text) > MAX_BYTES:
        return None, [_too_long(name)]
    try:
        reader = _Reader(_events(text), name)
        return Document(name, reader.document()), reader.faults
    except _Unreadable as error:
        return None, [error.fault]
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        return None, [Fault(f"{name}:{line}", f"not YAML: {error.problem or error.context}")]
    except YAMLError as error:
        return None, [Fault(f"{name}:1", f"not YAML: {str(error).splitlines()[0]}")]


def read(path: Path) -> tuple[Document | None, list[Fault]]:
    """Reads a YAML file, as `parse` does."""
    name = shown(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            return None, [_too_long(name)]
        return parse(content.decode("utf-8"), name)
    except UnicodeDecodeError as error:
        return None, [Fault(f"{name}:1", f"not UTF-8 text: {error.reason} at byte {error.start}")]
    except OSError as error:
        return None, [Fault(name, f"cannot be read: {error.strerror}")]


def _too_long(name: str) -> Fault:
    return Fault(name, f"longer than {MAX_BYTES:,} bytes, which no configuration is; give another file")


def load_yaml(path: Path) -> Any:
    """The plain data in a YAML file, within the same bounds as a search space: for files that `hpo` wrote itself.

    Raises:
        SpaceError: its first fault, in one line.
    """
    document, faults = read(path)
    if document is None or faults:
        raise SpaceError(faults[:1])
    return document.plain()


def shown(path: Path) -> str:
    """A path as messages show it: relative to the working directory where it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def scalar(text: str) -> Any:
    """The value of a plain scalar by YAML 1.2's core schema.

    Raises:
        ValueError: a number that is not finite, or too long.
    """
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


class _Unreadable(Exception):  # noqa: N818  (a way out of the recursion, never seen outside)
    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


def _events(text: str) -> Iterator[Event]:
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 2)
    yield from yaml.parse(StringIO(text))


class _Reader:
    """Builds nodes from events, and collects what is wrong with single values on the way."""

    def __init__(self, events: Iterator[Event], name: str) -> None:
        self.events = events
        self.name = name
        self.faults: list[Fault] = []
        self.anchors: dict[str, Node] = {}

    def document(self) -> Node:
        """The only document of the stream; an empty stream is an empty mapping."""
        found: Node | None = None
        for event in self.events:
            if isinstance(event, NodeEvent):
                if found is not None:
                    raise self._unreadable(event, "a second document; one file holds one")
                found = self._node(event, depth=0)
        return found if found is not None else Node({}, 1)

    def _node(self, event: Event, depth: int) -> Node:
        line = event.start_mark.line + 1
        if isinstance(event, AliasEvent):
            if event.anchor not in self.anchors:
                raise self._unreadable(event, f"*{event.anchor} stands for no finished &{event.anchor}")
            return self.anchors[event.anchor]
        if depth > MAX_DEPTH:
            raise self._unreadable(event, f"nested more than {MAX_DEPTH} deep")
        assert isinstance(event, ScalarEvent | MappingStartEvent | SequenceStartEvent)
        if event.tag is not None:
            self._fault(event, f"the tag {event.tag} is not allowed: plain data only")
        if isinstance(event, ScalarEvent):
            node = Node(self._scalar(event), line)
        elif isinstance(event, MappingStartEvent):
            node = self._mapping(line, depth)
        else:
            items = [self._node(item, depth + 1) for item in self._until_end()]
            node = Node(items, line, 1 + sum(item.size for item in items))
        if node.size > MAX_NODES:
            raise self._unreadable(event, f"more than {MAX_NODES} values")
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def _mapping(self, line: int, depth: int) -> Node:
        entries: dict[str, Entry] = {}
        size = 1
        for event in self._until_end():
            if not isinstance(event, ScalarEvent):
                raise self._unreadable(event, "a key must be a word")
            key, key_line = event.value, event.start_mark.line + 1
            node = self._node(next(self.events), depth + 1)
            size += node.size
            if key in entries:
                self._fault(event, f"{key}: given twice; first on line {entries[key].line}")
            else:
                entries[key] = Entry(key_line, node)
        return Node(entries, line, size)

    def _until_end(self) -> Iterator[Event]:
        """The events that begin each item of the collection just entered."""
        for event in self.events:
            if not isinstance(event, NodeEvent):
                return
            yield event

    def _scalar(self, event: ScalarEvent) -> Any:
        quoted = bool(event.style) and event.style in "\"'|>"
        if quoted:
            return event.value
        try:
            return scalar(event.value)
        except ValueError as error:
            self._fault(event, str(error))
            return None

    def _fault(self, event: Event, message: str) -> None:
        self.faults.append(Fault(f"{self.name}:{event.start_mark.line + 1}", message))

    def _unreadable(self, event: Event, message: str) -> _Unreadable:
        return _Unreadable(Fault(f"{self.name}:{event.start_mark.line + 1}", message))


# Writing


def dump(tree: Mapping[str, Any]) -> str:
    """Nested mappings of scalars and flat lists as block YAML that `parse` reads back exactly."""
    return "".join(f"{line}\n" for line in _lines(tree, ""))


def _lines(tree: Mapping[str, Any], indent: str) -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{flow(key)}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{flow(key)}: {flow(value)}"


def flow(value: Any) -> str:
    """A value in YAML's flow form, on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(flow, value)) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        # YAML 1.1 readers take a number without a point for a word: 1e-05 must be written 1.0e-05.
        return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))
    if isinstance(value, str):
        bare = re.fullmatch(r"[A-Za-z][\w./\-]*", value, re.ASCII) and value.lower() not in YAML_1_1_WORDS
        return value if bare else UNPRINTABLE.sub(_escaped, json.dumps(value, ensure_ascii=False))
    return str(value)


def _escaped(character: re.Match[str]) -> str:
    return f"\\u{ord(character[0]):04x}"


# What a YAML text may not hold, or folds, and JSON leaves as it is.
UNPRINTABLE = re.compile(r"[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]")

# Words that YAML 1.2's core schema or an older reader takes for something else.
YAML_1_1_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
