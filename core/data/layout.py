"""Classes and splits of images, derived from their paths in a folder or archive.

Two layouts are understood at once: `train/<class>/…` with `test/<class>/…` and optionally `val`, or `<class>/…` alone.
A single enclosing folder is ignored, and so is a split in itself, `train/train/<class>/…`, as in archives from Kaggle.
Folders that can be read in several ways are refused with both readings and the option that decides.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from core.config import DataConfig
from core.data.decode import IMAGE_SUFFIXES
from core.data.names import class_name, fault_of_label, listed, look_alikes
from core.data.roles import TEST, TRAIN, VAL, Split, is_split_word, split_of
from core.errors import UserError
from core.text import count, printable

TABLE_SUFFIXES = (".csv", ".tsv")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".gz", ".rar", ".7z")
HUB_SUFFIXES = (".parquet", ".arrow")


@dataclass(frozen=True)
class Entry:
    """One image of a source, before decoding."""

    id: str  # Its unique name within the source, as used in reports
    label: str = ""  # Its class; empty if labels were not requested
    split: Split = TRAIN  # The split that the source assigns it to
    group: str = ""  # Images of one group stay on one side of every split; empty without groups

    @property
    def test(self) -> bool:
        """Whether the source assigns it to the test set."""
        return self.split == TEST


@dataclass(frozen=True)
class Tree:
    """The content of a folder or archive: relative paths with forward slashes."""

    images: tuple[str, ...]
    """Sorted."""
    folders: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    """Files that are not images."""
    hidden: int = 0
    """Number of dotfiles, and of metadata that macOS adds to archives."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Folders and links that cannot be read, with the reason."""


@dataclass(frozen=True)
class Arrangement:
    """How a source was understood."""

    entries: list[Entry]
    """The labelled images, in an order that depends on the data alone."""
    unlabelled: int = 0
    """Test images without a class."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of files or rows that are not used, by kind."""
    notes: tuple[str, ...] = ()
    """What else the user should know, as phrases."""
    broken: tuple[str, ...] = ()
    """Paths that cannot be read, and were left out on request."""

    def with_broken(self, broken: Sequence[str]) -> Arrangement:
        """Return a copy with these paths among the broken ones."""
        return replace(self, broken=(*self.broken, *broken))


def member_path(name: str, where: str) -> str:
    """Return an archive member's name as a relative path with forward slashes.

    Raises:
        UserError: the path points outside the archive.
    """
    path = posixpath.normpath(name.replace("\\", "/"))
    if path.startswith(("/", "../")) or path == ".." or re.match(r"[A-Za-z]:", path):
        raise UserError(f"{where}: its member {name!r} points outside the archive; nothing of it is read")
    return path


def is_hidden(path: str) -> bool:
    """Return whether a part of the path is a dotfile, or metadata that macOS adds to archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def is_image(path: str) -> bool:
    """Return whether the path has an image suffix."""
    return posixpath.splitext(path)[1].lower() in IMAGE_SUFFIXES


def kinds(others: Iterable[str]) -> dict[str, int]:
    """Count files by suffix: `{".csv files": 2, "files without suffix": 1}`."""
    suffixes = (printable(posixpath.splitext(path)[1].lower()) for path in others)
    return dict(sorted(Counter(f"{suffix} files" if suffix else "files without suffix" for suffix in suffixes).items()))


def left_out_of(tree: Tree) -> dict[str, int]:
    """Count the files of a tree that are no images, by kind."""
    return {**kinds(tree.others), **({"hidden files": tree.hidden} if tree.hidden else {})}


@dataclass(frozen=True)
class _Image:
    file: str
    split: Split
    above: tuple[str, ...]  # the folders from the root to the split
    folders: tuple[str, ...]  # the folders between the split and the image

    def class_folder(self, depth: int) -> str:
        """Path of the folder at that depth below the split."""
        return "/".join((*self.above, *self.folders[:depth]))


def arrange(tree: Tree, where: str, config: DataConfig) -> Arrangement:
    """Find the classes and splits of the images in a tree.

    Raises:
        UserError: there is no image, or the folders have no reading, or several.
    """
    if not tree.images:
        raise nothing_found(tree, where)
    images, beside = _divided(tree.images, where, config)
    class_folders: dict[str, set[str]] = {}
    if config.label_from == "filename":
        labels = _labels_of_names(images, where, config)
    else:
        labels, class_folders = _labels_of_folders(images, where, config)
    labelled = [image for image in images if image.file in labels]
    if all(image.split == TEST for image in labelled):
        raise UserError(f"{where}: a test folder without a train folder; expected train/<class>/<image> too")
    _check_no_empty_class(class_folders, tree, where, config)
    left_out = {f"images in {printable(folder)}": count for folder, count in sorted(beside.items())}
    spellings: dict[str, set[str]] = defaultdict(set)
    for label in set(labels.values()):
        if fault := fault_of_label(label, from_table=False):
            raise UserError(f"{where}: the class folder {label!a}: {fault}; rename it")
        spellings[class_name(label)].add(label)
    entries = [Entry(image.file, class_name(labels[image.file]), image.split) for image in labelled]
    return Arrangement(
        sorted(entries, key=lambda entry: entry.id),
        unlabelled=len(images) - len(labelled),
        left_out={**left_out, **left_out_of(tree)},
        notes=tuple(look_alikes(spellings, spellings)),
    )


def nothing_found(tree: Tree, where: str) -> UserError:
    """The error of a source without images, which names what is there instead."""
    for suffixes, what in (
        (ARCHIVE_SUFFIXES, "an archive in it, {}; unpack it and give that"),
        (HUB_SUFFIXES, "{} in it; give that file, or the folder, unpacked"),
        (TABLE_SUFFIXES, "a table in it, {}; give that file, unpacked, if it has paths or pixels"),
    ):
        found = [path for path in tree.others if path.lower().endswith(suffixes)]
        if found:
            return UserError(f"{where}: no images found, but {what.format(listed(found, 3))}")
    there = ", ".join(f"{kind}: {count:,}" for kind, count in left_out_of(tree).items())
    there = f", but {there}" if there else ""
    return UserError(f"{where}: no images found{there}; expected train/<class>/… and test/<class>/…, or <class>/…")


# Splits


def _divided(files: Sequence[str], where: str, config: DataConfig) -> tuple[list[_Image], Counter[str]]:
    """Assign each image to a split. Also returns the number of images beside the splits, by folder."""
    wrapper = _wrapper(files)
    prefix = tuple(wrapper.split("/")[:-1])
    paths = [(file, tuple(file[len(wrapper) :].split("/"))) for file in files]
    splits = _splits([parts for _, parts in paths], where, config)
    beside: Counter[str] = Counter()
    if splits is None and config.class_depth in (None, 1) and _is_split_by_class([parts for _, parts in paths], where):
        return [_Image(file, _known(parts[1]), prefix, parts[:1]) for file, parts in paths], beside
    if splits is None:
        return [_Image(file, TRAIN, prefix, parts[:-1]) for file, parts in paths], beside
    images = []
    for file, parts in paths:
        if parts[0] in splits:
            images.append(_Image(file, splits[parts[0]], (*prefix, parts[0]), parts[1:-1]))
        else:
            beside[parts[0] if len(parts) > 1 else "no folder"] += 1
    return _without_doubled(images), beside


def _known(name: str) -> Split:
    split = split_of(name)
    assert split is not None, "checked by the caller"
    return split


def _wrapper(files: Sequence[str]) -> str:
    """Common prefix of all files that is neither a split nor a class; empty or ending in a slash."""
    prefix = ""
    while True:
        rest = [file[len(prefix) :].split("/", 2) for file in (files[0], files[-1])]
        top = rest[0][0]
        # Sorted, all files begin with the same folder if the first and the last do.
        if split_of(top) or any(parts[0] != top or len(parts) < 3 for parts in rest):
            return prefix
        if any(file.count("/", len(prefix)) < 2 for file in files):
            return prefix
        prefix += f"{top}/"


def _splits(paths: Sequence[tuple[str, ...]], where: str, config: DataConfig) -> dict[str, Split] | None:
    """The folders at the top that are splits, or None if they are classes.

    Raises:
        UserError: they may be either, or two are the same split, or there is no folder for training.
    """
    depths: dict[str, int] = {}
    for parts in paths:
        if len(parts) > 1:
            depths[parts[0]] = max(depths.get(parts[0], 0), len(parts) - 1)
    splits = {top: split for top in sorted(depths) if (split := split_of(top)) is not None}
    others = sorted(depths.keys() - splits)
    if not splits:
        return None
    flat = max(depths[top] for top in splits) == 1
    if not others:
        return _only_splits(splits, flat, where, config)
    trained = [top for top, split in splits.items() if split == TRAIN and depths[top] > 1]
    if any(map(is_split_word, trained)) or (trained and len(set(splits.values())) > 1):
        return _each_once(splits, where)
    if config.class_depth is not None:
        return None
    name = printable(next(iter(splits)))
    raise UserError(
        f"{where}: its folder {name} may be a {splits[next(iter(splits))]} split or a class beside {listed(others)}; "
        f"put the class folders into a folder train, or, if {name} is a class, set data.class_depth=1"
    )


def _only_splits(splits: dict[str, Split], flat: bool, where: str, config: DataConfig) -> dict[str, Split] | None:
    names = listed(list(splits))
    if flat and config.class_depth is not None and not all(map(is_split_word, splits)):
        return None
    if TRAIN not in splits.values():
        if len(splits) == 1 and not is_split_word(next(iter(splits))):
            raise UserError(
                f"{where}: its only folder {names} may be a {next(iter(splits.values()))} split without a folder for "
                "training, or the whole set; put a folder train beside it, or rename it"
            )
        split = "test" if TEST in splits.values() else "val"
        raise UserError(f"{where}: a {split} folder without a train folder; expected train/<class>/<image> too")
    hint = ", or, if they are classes, set data.class_depth=1" if flat else ""
    return _each_once(splits, where, hint)


def _each_once(splits: dict[str, Split], where: str, hint: str = "") -> dict[str, Split]:
    for split in (TRAIN, VAL, TEST):
        same = [top for top, found in splits.items() if found == split]
        if len(same) > 1:
            raise UserError(
                f"{where}: its folders {listed(same)} are all named as {split} splits; put them into one{hint}"
            )
    return splits


def _is_split_by_class(paths: Sequence[tuple[str, ...]], where: str) -> bool:
    """Whether the layout is `<class>/train/…`, `<class>/test/…`."""
    if any(len(parts) < 3 or split_of(parts[1]) is None for parts in paths):
        return False
    if any(len(parts) > 3 for parts in paths):
        tops = sorted({parts[0] for parts in paths})
        raise UserError(
            f"{where}: its folders {listed(tops)} have splits and class folders of their own; give one of them"
        )
    splits = {split_of(parts[1]) for parts in paths}
    return TRAIN in splits


def _without_doubled(images: list[_Image]) -> list[_Image]:
    """Skip a split's only folder if it has the name of the same split, as in `test_set/test_set/`."""
    inside: dict[Split, set[str]] = defaultdict(set)
    for image in images:
        inside[image.split].add(image.folders[0] if image.folders else "")
    doubled = {split for split, names in inside.items() if len(names) == 1 and split_of(next(iter(names))) == split}
    if not doubled:
        return images
    return _without_doubled([
        replace(image, above=(*image.above, image.folders[0]), folders=image.folders[1:])
        if image.split in doubled
        else image
        for image in images
    ])  # fmt: skip


# Classes


def _labels_of_folders(
    images: Sequence[_Image], where: str, config: DataConfig
) -> tuple[dict[str, str], dict[str, set[str]]]:
    """Class of each labelled image, and the class folders below each folder that has some."""
    known = [image for image in images if image.split != TEST]
    loose = [image.file for image in known if not image.folders]
    if loose:
        raise _outside(loose, [image for image in known if image.folders], where, config)
    depth = _depth(known, where, config)
    classes = {_folder(image, depth, where) for image in known}
    tested = [image for image in images if image.split == TEST]
    labelled = known + ([] if _is_unlabelled(tested, classes, where) else tested)
    depth = _depth(labelled, where, config)
    labels = {image.file: _folder(image, depth, where) for image in labelled}
    folders: dict[str, set[str]] = defaultdict(set)
    if depth is not None:
        for image in labelled:
            folder = image.class_folder(depth)
            folders[posixpath.dirname(folder)].add(folder)
    return labels, folders


def _folder(image: _Image, depth: int | None, where: str) -> str:
    """The folder that names the class; `depth` None is the last."""
    if depth is not None and len(image.folders) < depth:
        raise UserError(
            f"{where}: {printable(image.file)} is in {len(image.folders)} folder below its split, and "
            f"data.class_depth={depth} names its class by the second; move it, or choose another data.class_depth"
        )
    return image.folders[-1 if depth is None else depth - 1]


def _depth(images: Sequence[_Image], where: str, config: DataConfig) -> int | None:
    """Depth of the class folders below the splits; None is the folder that holds the image.

    Raises:
        UserError: there are several readings, and the configuration does not choose one.
    """
    if config.class_depth is not None:
        return None if config.class_depth == "last" else config.class_depth
    below = {image.folders[1:] for image in images}
    if len(below) <= 1:
        return 1
    readings: dict[str, list[str]] = {}
    for value, depth in (("1", 1), ("2", 2), ("last", None)):
        if all(len(image.folders) >= (depth or 1) for image in images):
            names = sorted({image.folders[-1 if depth is None else depth - 1] for image in images})
            if names not in readings.values():
                readings[value] = names
    choices = "; ".join(
        f"data.class_depth={value} reads {count(len(names), 'class', 'classes')} ({listed(names)})"
        for value, names in readings.items()
    )
    raise UserError(f"{where}: {_odd_folder(images)}: its classes can be read in several ways: {choices}")


def _odd_folder(images: Sequence[_Image]) -> str:
    """Describe a folder with other folders in it."""
    inside: dict[str, Counter[str]] = defaultdict(Counter)
    for image in images:
        inside[image.folders[0]][image.folders[1] if len(image.folders) > 1 else ""] += 1
    name = max(sorted(inside), key=lambda top: len(inside[top].keys() - {""}))
    direct, folders = inside[name][""], sorted(inside[name].keys() - {""})
    held = [count(direct, "image")] if direct else []
    held.append(f"the folder{'s' * (len(folders) > 1)} {listed(folders)}")
    return f"the folder {printable(name)} holds {' and '.join(held)}"


def _is_unlabelled(tested: Sequence[_Image], classes: set[str], where: str) -> bool:
    """Whether test images have no classes: they are in the test folder itself, or in a single folder in it."""
    loose = [image.file for image in tested if not image.folders]
    if loose and len(loose) < len(tested):
        raise UserError(f"{where}: {_several(loose)} outside the class folders, others of test are not; move them")
    tops = {image.folders[0] for image in tested if image.folders}
    return len(tops) <= 1 and not tops & classes


def _outside(loose: Sequence[str], others: Sequence[_Image], where: str, config: DataConfig) -> UserError:
    problem = f"{where}: {_several(loose)} outside the class folders"
    if others or config.label_from == "folder":
        return UserError(f"{problem}; expected <class>/<image>, or train/<class>/<image> and test/<class>/<image>")
    found = [re.search(_PATTERN, posixpath.basename(file)) for file in loose]
    classes = sorted({match[1] for match in found if match is not None})
    number = count(len(classes), "class", "classes")
    reading = f", which reads {number} ({listed(classes)})" if classes and None not in found else ""
    return UserError(
        f"{problem}; if their names begin with their class, as in cat.0.jpg, set data.label_from=filename and "
        f"data.label_pattern='{_PATTERN}'{reading}; if a table has their labels, give it"
    )


_PATTERN = r"^(.+?)[\W_]*\d*\.\w+$"
"""Pattern to try: everything before the number and the suffix."""


def _labels_of_names(images: Sequence[_Image], where: str, config: DataConfig) -> dict[str, str]:
    if config.label_pattern is None:
        raise UserError(
            f"{where}: data.label_from=filename needs data.label_pattern, a regular expression whose first group is "
            f"the class, such as '{_PATTERN}'"
        )
    pattern = re.compile(config.label_pattern)
    labels = {}
    for image in images:
        found = pattern.search(posixpath.basename(image.file))
        if found is not None:
            labels[image.file] = (found[1] if pattern.groups else found[0]) or ""
    for split in (TRAIN, VAL, TEST):
        own = [image.file for image in images if image.split == split]
        missing = [file for file in own if not labels.get(file)]
        if missing and (split != TEST or len(missing) < len(own)):
            raise UserError(
                f"{where}: data.label_pattern={config.label_pattern} finds no class in {len(missing):,} of "
                f"{len(own):,} {split} file names: {listed(missing)}"
            )
    return {file: label for file, label in labels.items() if label}


def _check_no_empty_class(class_folders: Mapping[str, set[str]], tree: Tree, where: str, config: DataConfig) -> None:
    """Raise if a class folder has no image: the model would never learn that class."""
    if config.class_depth == "last":
        return
    for folder in sorted(tree.folders):
        full = class_folders.get(posixpath.dirname(folder), set())
        if full and folder not in full and folder not in tree.unreadable and not is_hidden(folder):
            raise UserError(
                f"{where}: the class folder {printable(folder)} has no image "
                f"({' '.join(sorted(IMAGE_SUFFIXES))} are known); fill it or remove it"
            )


def _several(files: Sequence[str]) -> str:
    first = printable(files[0])
    return f"{first} is" if len(files) == 1 else f"{first} and {len(files) - 1} more images are"
