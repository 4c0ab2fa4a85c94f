"""The outcome of `hpo run`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpo.storage.lease import Held
    from hpo.study import Study


@dataclass(frozen=True)
class SearchResult:
    """The outcome of `search`."""

    study: Study
    queued: int = 0
    """Number of trials left to workers, with `workers=0`."""
    held: tuple[Held, ...] = ()
    """Running trials of other machines."""
