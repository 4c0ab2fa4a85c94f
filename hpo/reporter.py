"""Interfaces for progress, which the terminal implements, and a silent default."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from core.loop import EpochMetrics


class StudyView(Protocol):
    """Shows the trials of a study, as its storage has them."""

    def refresh(self, *, force: bool = False) -> None:
        """Read the storage again and show the changes; without `force`, not more often than is worthwhile."""

    def training(self, label: str, *, epochs: int) -> Callable[[EpochMetrics], None]:
        """Show a training that is not a trial; the returned function is called after each epoch."""


class NoProgress:
    """Shows nothing."""

    def refresh(self, *, force: bool = False) -> None:
        pass

    def training(self, label: str, *, epochs: int) -> Callable[[EpochMetrics], None]:
        return lambda epoch: None


NO_PROGRESS = NoProgress()


class Reporter(Protocol):
    """Shows the course of one command; implemented by `hpo.cli.terminal.Terminal`."""

    def say(self, line: str = "") -> None:
        """Show one line of plain text."""

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = ()) -> None:
        """`right` lists the right-aligned columns."""

    def reading(self, label: str) -> AbstractContextManager[Callable[[str, int, int], None]]:
        """The yielded function takes the step, `reading` or `comparing`, the number of images done, and of all."""

    def training(
        self, label: str, *, epochs: int, metric: str
    ) -> AbstractContextManager[Callable[[EpochMetrics], None]]:
        """The yielded function is called after each epoch."""

    def study(self, study: Any) -> AbstractContextManager[StudyView]:
        """Show the progress of a `hpo.study.Study`."""


class Silent:
    """A reporter that shows nothing."""

    def say(self, line: str = "") -> None:
        pass

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = ()) -> None:
        pass

    @contextmanager
    def reading(self, label: str) -> Iterator[Callable[[str, int, int], None]]:
        yield lambda step, done, total: None

    @contextmanager
    def training(self, label: str, *, epochs: int, metric: str) -> Iterator[Callable[[EpochMetrics], None]]:
        yield lambda epoch: None

    @contextmanager
    def study(self, study: Any) -> Iterator[StudyView]:
        yield NO_PROGRESS
