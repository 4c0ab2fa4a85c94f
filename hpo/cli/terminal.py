"""The reporter that shows a command's course on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from core.text import printable
from hpo.cli.console import bars, console, epoch_note, is_verbose, say, table
from hpo.search.interrupts import Interrupts

if TYPE_CHECKING:
    from core.loop import EpochMetrics
    from hpo.cli.progress import StudyProgress
    from hpo.reporter import Reporter
    from hpo.study import Study


_QUICKLY_READ = 2000  # images that are read in less than a second, without a bar


class TrainProgress:
    """One bar for one training; without a terminal, a line for every tenth of it."""

    def __init__(self, label: str, *, epochs: int, metric: str = "accuracy") -> None:
        self.label, self.epochs, self.metric = label, epochs, metric
        self.progress = bars()
        self.task = self.progress.add_task(escape(printable(label)), total=epochs, note="")

    def epoch_ended(self, epoch: EpochMetrics) -> None:
        note = epoch_note(epoch, self.metric)
        self.progress.update(self.task, completed=epoch.epoch, note=note)
        every = 1 if is_verbose() else max(1, self.epochs // 10)
        shown = epoch.epoch % every == 0 or epoch.epoch == self.epochs
        if shown and (is_verbose() or not console.is_terminal):
            say(f"{self.label}: epoch {epoch.epoch} of {self.epochs}, {note}")


class Terminal:
    """Shows a command's course on the terminal. Implements `hpo.reporter.Reporter`."""

    def say(self, line: str = "") -> None:
        say(line)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = ()) -> None:
        table(columns, rows, right=right)

    @contextmanager
    def reading(self, label: str) -> Iterator[Callable[[str, int, int], None]]:
        progress = bars()
        tasks = {
            step: progress.add_task(escape(printable(f"{step} {label}")), total=None, note="images", visible=False)
            for step in ("reading", "comparing")
        }

        def show(running: str, done: int, total: int) -> None:
            for step in tasks.keys() - {running}:
                progress.update(tasks[step], visible=False)
            progress.update(tasks[running], completed=done, total=total, visible=total > _QUICKLY_READ)

        with progress:
            yield show
            for task in tasks.values():
                progress.update(task, visible=False)

    @contextmanager
    def training(self, label: str, *, epochs: int, metric: str) -> Iterator[Callable[[EpochMetrics], None]]:
        bar = TrainProgress(label, epochs=epochs, metric=metric)
        with bar.progress:
            yield bar.epoch_ended

    def study(self, study: Study) -> StudyProgress:
        from hpo.cli.progress import StudyProgress  # with torch

        return StudyProgress(study)


def stoppable(reporter: Reporter) -> Interrupts:
    """Handle Ctrl-C: the first one waits for the end of the epoch, and is reported."""
    return Interrupts(
        told=lambda: reporter.say(
            "stopping: the running epoch is finished and saved first; press Ctrl-C again to stop at once"
        )
    )
