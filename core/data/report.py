"""`DataReport`: how a data set was understood."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class DataReport:
    """How a data set was understood, and problems that do not prevent its use."""

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Images of each class, by the split that the source gives them: `train`, `val`, `test`."""
    unlabelled: int = 0
    """Number of test images without a class, which were left out."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of other files and rows that are not used, by kind."""
    notes: tuple[str, ...] = ()
    """Columns that are used, classes that look alike, and the like."""
    broken: tuple[str, ...] = ()
    """Ids of unreadable images, which were left out."""
    leaked: int = 0
    """Number of test images identical to an image outside the test set."""
    leaked_val: int = 0
    """Number of given validation images identical to a training image."""
    near: int = 0
    """Number of images with a near-duplicate, in the test set too."""
    near_leaked: int = 0
    """Number of test images with a near-duplicate, but no identical image, outside the test set."""
    near_leaked_val: int = 0
    """Number of given validation images with a near-duplicate, but no identical image, among the training images."""
    conflicting: int = 0
    """Number of images identical to an image of another class."""
    grey: int = 0
    """Number of grey images, in the test set too."""
    channels: int = 0
    """Channels of all images as they are given to a network: 1 or 3."""
    top: int = 0
    """The sample of 16-bit images that is white, if it is not 65,535 because the set's own range is smaller."""
    groups: int = 0
    """Number of groups of images, in the test set too; 0 without `data.group`."""

    def plain(self) -> dict[str, Any]:
        """Return the report as JSON data, with the number of broken images."""
        return {**asdict(self), "notes": list(self.notes), "broken": len(self.broken)}
