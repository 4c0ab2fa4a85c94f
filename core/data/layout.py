"""Classes and splits of images, derived from their paths in a folder or archive.

Two layouts are supported: `train/<class>/…` with `test/<class>/…` and optionally `val`, or `<class>/…` alone. A single
enclosing folder is ignored, and so is a doubled split, `train/train/<class>/…`, as in archives from Kaggle.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from core.data.decode import IMAGE_SUFFIXES
from core.errors import UserError

logger = logging.getLogger(__name__)

# seg_train and seg_test are used by Kaggle's Intel image classification set.
TRAIN_NAMES = frozenset({"train", "training", "seg_train"})
VAL_NAMES = frozenset({"val", "valid", "validation"})
TEST_NAMES = frozenset({"test", "testing", "seg_test"})
SPLIT_NAMES = TRAIN_NAMES | VAL_NAMES | TEST_NAMES


@dataclass(frozen=True)
class Entry:
    """One image of a source, before decoding."""

    id: str  # Its unique name within the source, as used in reports
    label: str = ""  # Its class; empty if labels were not requested
    test: bool = False  # Whether the source assigns it to the test set


@dataclass(frozen=True)
class Tree:
    """Relative paths in a folder or archive, with forward slashes."""

    files: tuple[str, ...]
    folders: tuple[str, ...]


def member_path(name: str, where: str) -> str:
    """Return an archive member's name as a relative path with forward slashes.

    Raises:
        UserError: the path points outside the archive.
    """
    path = posixpath.normpath(name.replace("\\", "/"))
    if path.startswith(("/", "../")) or path == ".." or re.match(r"[A-Za-z]:", path):
        raise UserError(f"{where}: its member {name!r} points outside the archive; nothing of it is read")
    return path


def printable(name: str) -> str:
    """Return a file name for a message, with unprintable characters escaped."""
    return name if name.isprintable() else ascii(name)


def is_hidden(path: str) -> bool:
    """Return whether a part of the path is a dotfile, or metadata that macOS adds to archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def image_files(files: Iterable[str]) -> list[str]:
    """Return the files with an image suffix, sorted."""
    return sorted(path for path in files if not is_hidden(path) and is_image(path))


def is_image(path: str) -> bool:
    """Return whether the path has an image suffix."""
    return posixpath.splitext(path)[1].lower() in IMAGE_SUFFIXES


def class_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort class names: numerically if all are whole numbers, else alphabetically."""
    names = set(labels)
    return tuple(sorted(names, key=int if all(name.isdecimal() for name in names) else None))


def arrange(tree: Tree, where: str) -> list[Entry]:
    """Return the images of a tree with their classes, sorted by path.

    Raises:
        UserError: there is no image, no class folder, an empty class folder, or an image outside the class folders.
    """
    files = image_files(tree.files)
    if not files:
        raise UserError(f"{where}: no images found; expected train/<class>/… and test/<class>/…, or <class>/…")
    wrapper = _wrapper(files)
    paths = {file: tuple(file.removeprefix(wrapper).split("/")) for file in files}
    doubled = _doubled(paths.values())
    paths = {file: _once(parts, doubled) for file, parts in paths.items()}
    tops = {parts[0].casefold() for parts in paths.values()}
    # A class may be called train, so train is a split only if it contains folders, or if all folders are splits.
    nested = {parts[0].casefold() for parts in paths.values() if len(parts) > 2} & SPLIT_NAMES
    has_splits = tops <= SPLIT_NAMES or bool(nested & TRAIN_NAMES)
    if nested and not has_splits:
        raise UserError(f"{where}: class folders next to its folder {nested.pop()}; put them into a folder train")
    entries = _from_splits(paths, where) if has_splits else _from_classes(paths, where)
    folders = {
        folder: _once(tuple(folder.removeprefix(wrapper).split("/")), doubled)
        for folder in tree.folders
        if folder.startswith(wrapper) and not is_hidden(folder)
    }
    _check_no_empty_class(paths.values(), folders, has_splits, where)
    return entries


def _doubled(paths: Iterable[tuple[str, ...]]) -> frozenset[str]:
    """Splits nested in themselves: all their images are in `train/train/<class>/`."""
    found: dict[str, bool] = {}
    for parts in paths:
        if parts[0].casefold() in SPLIT_NAMES:
            wrapped = len(parts) > 3 and parts[1] == parts[0]
            found[parts[0]] = found.get(parts[0], True) and wrapped
    return frozenset(name for name, wrapped in found.items() if wrapped)


def _once(parts: tuple[str, ...], doubled: frozenset[str]) -> tuple[str, ...]:
    return parts[1:] if len(parts) > 1 and parts[0] in doubled and parts[1] == parts[0] else parts


def _wrapper(files: list[str]) -> str:
    """Common prefix of all files that is neither a split nor a class; empty or ending in a slash."""
    prefix = ""
    while True:
        rest = [file.removeprefix(prefix).split("/") for file in files]
        top = rest[0][0]
        if top.casefold() in SPLIT_NAMES or any(parts[0] != top or len(parts) < 3 for parts in rest):
            return prefix
        prefix += f"{top}/"


def _from_classes(paths: dict[str, tuple[str, ...]], where: str) -> list[Entry]:
    stray = [file for file, parts in paths.items() if len(parts) < 2]
    if stray:
        raise UserError(
            f"{where}: {_several(stray)} outside the class folders; "
            "expected <class>/<image>, or train/<class>/<image> and test/<class>/<image>"
        )
    return [Entry(file, label=parts[0]) for file, parts in paths.items()]


def _from_splits(paths: dict[str, tuple[str, ...]], where: str) -> list[Entry]:
    entries = []
    unlabelled: list[str] = []
    stray: list[str] = []
    beside: set[str] = set()
    from_val = 0
    for file, parts in paths.items():
        top = parts[0].casefold()
        if top not in SPLIT_NAMES:
            beside.add(parts[0])
        elif len(parts) < 3:
            (unlabelled if top in TEST_NAMES else stray).append(file)
        else:
            entries.append(Entry(file, label=parts[1], test=top in TEST_NAMES))
            from_val += top in VAL_NAMES
    if stray:
        raise UserError(f"{where}: {_several(stray)} outside the class folders; expected train/<class>/<image>")
    if unlabelled and any(entry.test for entry in entries):
        raise UserError(f"{where}: {_several(unlabelled)} outside the class folders, others of test are not; move them")
    if all(entry.test for entry in entries):
        raise UserError(f"{where}: a test folder without a train folder; expected train/<class>/<image> too")
    if unlabelled:
        logger.warning(
            "%s: %d images in test have no class and are skipped; label them with predict", where, len(unlabelled)
        )
    if beside:
        logger.warning("%s: these folders next to train are skipped: %s", where, ", ".join(sorted(beside)))
    if from_val:
        logger.warning("%s: the %d images of its validation folder join the training pool; "
                       "validation is drawn from both", where, from_val)  # fmt: skip
    return entries


def _check_no_empty_class(
    paths: Iterable[tuple[str, ...]], folders: Mapping[str, tuple[str, ...]], has_splits: bool, where: str
) -> None:
    """Raise if a class folder has no image: the model would never learn that class."""
    depth = 2 if has_splits else 1  # depth of class folders
    full = {parts[:depth] for parts in paths}
    for folder, parts in sorted(folders.items()):
        if len(parts) != depth or (has_splits and parts[0].casefold() not in SPLIT_NAMES):
            continue
        if parts not in full:
            raise UserError(
                f"{where}: the class folder {printable(folder)} has no image "
                f"({' '.join(sorted(IMAGE_SUFFIXES))} are known); fill it or remove it"
            )


def _several(files: list[str]) -> str:
    first = printable(files[0])
    return f"{first} is" if len(files) == 1 else f"{first} and {len(files) - 1} more images are"
