"""The list of a study's images in its folder, by which a refused run names those that changed."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.data.names import listed
from core.text import count, printable
from hpo.paths import StudyPaths
from hpo.storage.atomic import replacing

if TYPE_CHECKING:
    from core.data import Dataset

logger = logging.getLogger(__name__)

_SHOWN, _CLASSES_SHOWN = 3, 5
"""Images of each kind of change, and changed classes, that a message lists."""

_Images = dict[str, tuple[str, int] | None]
"""Class and checksum of each image by its path; None for test images."""


@dataclass(frozen=True)
class _List:
    stamp: str
    """Changes with the names, sizes and times of the source's files."""
    images: _Images


def write_list(paths: StudyPaths, dataset: Dataset) -> None:
    """Write the images of a study, whose fingerprint was checked, unless they are written already."""
    known = _read(paths)
    if known is not None and known.stamp == dataset.stamp:
        return
    content = {"stamp": dataset.stamp, "images": dataset.checksums()}
    with replacing(paths.images) as temporary:
        temporary.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))


def stamp_of(paths: StudyPaths) -> str | None:
    """Return the stamp of the images' source when the study was last run; None if it is not known."""
    known = _read(paths)
    return None if known is None else known.stamp


def changed_images(paths: StudyPaths, metadata: Mapping[str, Any], dataset: Dataset) -> str:
    """Describe how images differ from the study's: by file, or by class where their list is not on this machine."""
    known = _read(paths)
    if known is None:
        content = metadata["data"].get("content", {})
        return _changed_counts(content.get("counts", {}), dataset.report.plain()["counts"])
    return "; ".join(_changes(known.images, dataset.checksums())) or "the same files, in other groups"


def _read(paths: StudyPaths) -> _List | None:
    """None for a study on another machine or of an older version."""
    try:
        content = json.loads(gzip.decompress(paths.images.read_bytes()))
        images = {path: row and (str(row[0]), int(row[1])) for path, row in content["images"].items()}
        return _List(str(content["stamp"]), images)
    except FileNotFoundError:
        return None
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be read (%s); the next run of the study writes it again", paths.images, error)
        return None


def _changes(before: _Images, now: _Images) -> list[str]:
    """Return a phrase for each kind of change, such as `1 image more: train/metal/new.jpg`."""
    gone = {row[1]: path for path, row in before.items() if row and path not in now}
    moved = {gone[row[1]]: path for path, row in now.items() if row and row[1] in gone and path not in before}
    both = [(path, old, now[path]) for path, old in before.items() if path in now]
    known = [(path, old, new) for path, old, new in both if old and new]
    changes = _phrases(
        {
            "more": [path for path in now if path not in before and path not in moved.values()],
            "fewer": [path for path in before if path not in now and path not in moved],
            "moved": [f"{old} → {new}" for old, new in moved.items()],
            "of another class": [f"{path} ({old[0]} → {new[0]})" for path, old, new in known if old[0] != new[0]],
            "of other content": [path for path, old, new in known if old[1] != new[1]],
        }
    )
    # Where the test set is cut from the images, these follow from the changes above.
    return changes or _phrases(
        {"now in the test set or no longer": [p for p, old, new in both if bool(old) != bool(new)]}
    )


def _phrases(changes: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{count(len(paths), 'image')} {what}: {listed(paths, _SHOWN)}" for what, paths in changes.items() if paths]


def _changed_counts(before: Mapping[str, Mapping[str, int]], now: Mapping[str, Mapping[str, int]]) -> str:
    """Describe the numbers of images that differ: `1 train image more of metal`."""
    if not before or not now:
        return "their files differ"
    changes = []
    for label in dict.fromkeys([*before, *now]):
        for split in ("train", "val", "test"):
            more = now.get(label, {}).get(split, 0) - before.get(label, {}).get(split, 0)
            if more:
                what = count(abs(more), f"{split} image")
                changes.append(f"{what} {'more' if more > 0 else 'fewer'} of {printable(label)}")
    if not changes:
        return "as many of each class, with other content, names or labels"
    left = len(changes) - _CLASSES_SHOWN
    return ", ".join(changes[:_CLASSES_SHOWN]) + (f" and {left} more changes" if left > 0 else "")
