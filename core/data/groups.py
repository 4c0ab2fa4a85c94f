"""Groups of images, such as those of one patient or one scene, which stay on one side of every split."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from core.data.layout import Entry
from core.data.names import listed
from core.data.roles import Split
from core.errors import UserError
from core.text import printable

# Names in an error message.
_NAMED = 3


def with_groups(entries: Sequence[Entry], group: str, where: str) -> list[Entry]:
    """Fill in the group of each entry, unless the source has set it from a column.

    Args:
        entries: all labelled images.
        group: `data.group`; a regular expression that is searched in file names, or in paths if it has a slash. The
            group is the text of its parentheses, or the whole match.
        where: the source, for messages.

    Raises:
        UserError: it is no regular expression, or not found in all names, or all images are in one group.
    """
    if not all(entry.group for entry in entries):
        entries = _searched(entries, group, where)
    if len({entry.group for entry in entries}) < 2:
        raise UserError(f"{where}: data.group={group}: all images are in the group {printable(entries[0].group)}")
    return list(entries)


def _searched(entries: Sequence[Entry], group: str, where: str) -> list[Entry]:
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise UserError(
            f"data.group={group}: neither a column of {where} nor a regular expression ({error}); fix it"
        ) from error
    in_path = "/" in group
    found = [pattern.search(entry.id if in_path else posixpath.basename(entry.id)) for entry in entries]
    names = [match and ("/".join(map(str, match.groups())) if pattern.groups else match[0]) for match in found]
    missing = [entry.id for entry, name in zip(entries, names, strict=True) if not name]
    if missing:
        raise UserError(
            f"{where}: data.group={group} is not found in {len(missing):,} of {len(entries):,} "
            f"{'paths' if in_path else 'file names'}: {listed(missing, _NAMED)}; "
            "give a regular expression for all, or the column of a CSV"
        )
    return [replace(entry, group=str(name)) for entry, name in zip(entries, names, strict=True)]


def check_sides(entries: Sequence[Entry], split: Split, where: str) -> None:
    """Raise UserError if a group has images both inside and outside a split that the source gives."""
    inside = {entry.group for entry in entries if entry.split == split}
    both = sorted(inside & {entry.group for entry in entries if entry.split != split})
    if both:
        raise UserError(
            f"{where}: data.group: {len(both):,} groups have images inside and outside its {split} set: "
            f"{listed(both, _NAMED)}; move them to one side, or leave data.group out"
        )


def firsts(keys: Sequence[Hashable]) -> NDArray[np.int64]:
    """Return for each position the first one with the same key."""
    first: dict[Hashable, int] = {}
    return np.array([first.setdefault(key, index) for index, key in enumerate(keys)], dtype=np.int64)


def linked(*links: NDArray[np.int64], pairs: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Return for each position the first one that it is linked with, over any number of links.

    Args:
        links: arrays (N,) that link each position to another, such as those of `firsts`.
        pairs: (M, 2) further links.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(links[0])
    starts, ends = np.tile(np.arange(count), len(links)), np.concatenate(links)
    if pairs is not None:
        starts, ends = np.concatenate([starts, pairs[:, 0]]), np.concatenate([ends, pairs[:, 1]])
    graph = coo_array((np.ones(len(ends)), (starts, ends)), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    return firsts(component.tolist())
