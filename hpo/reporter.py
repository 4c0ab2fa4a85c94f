"""How running work is reported to the user: interfaces that the terminal implements, and a silent default."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from core.config import TrainConfig
    from core.loop import EpochMetrics
    from hpo.trials import Outcome


class Listener(Protocol):
    """Whoever wants to see a study run, one training at a time."""

    def trial_started(self, label: str, config: TrainConfig) -> None: ...

    def epoch_ended(self, epoch: EpochMetrics, verdict: str) -> None: ...

    def trial_ended(self, outcome: Outcome) -> None: ...

    def reference_ended(self, name: str, result: dict[str, Any]) -> None: ...


class Reporter(Protocol):
    """Shows the user the course of one command. `hpo.cli.console` implements it for the terminal."""

    def say(self, line: str = "") -> None:
        """Shows one line of plain text."""

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = ()) -> None:
        """Shows a table; `right` lists the columns that are aligned to the right."""

    def training(
        self, label: str, *, epochs: int, metric: str
    ) -> AbstractContextManager[Callable[[EpochMetrics], None]]:
        """Shows the progress of one training; the yielded function is called after each epoch."""


class Silent:
    """A reporter that shows nothing."""

    def say(self, line: str = "") -> None:
        pass

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = ()) -> None:
        pass

    @contextmanager
    def training(self, label: str, *, epochs: int, metric: str) -> Iterator[Callable[[EpochMetrics], None]]:
        yield lambda epoch: None
