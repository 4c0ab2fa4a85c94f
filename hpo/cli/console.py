"""The terminal: the one progress display, the tables, and the words. Bars only where there is a terminal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from core.loop import EpochMetrics

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

_UNBOUNDED = 100_000  # columns: of what goes into a file or another command, which nobody cuts
_GAP = 2  # columns that a table leaves between two of its own


def set_up_logging() -> None:
    """Sends log records to the terminal: warnings and worse, and what we say ourselves."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_TerminalHandler()], force=True)
    for package in ("core", "hpo"):
        logging.getLogger(package).setLevel(logging.INFO)


class _TerminalHandler(logging.Handler):
    """A line a record, around a progress bar that may be on the screen, never wrapped."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        errors.print(escape(f"{level}{self.format(record)}"), soft_wrap=True)


def say(text: str = "") -> None:
    """One line, as it is: no markup, no wrapping, so that it can be copied."""
    console.print(escape(text), soft_wrap=True)
    console.file.flush()  # before what is logged next, where both go into one file


def bars() -> Progress:
    """The layout that all bars share; nothing without a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


class TrainProgress:
    """One bar for one training; without a terminal, a line for every tenth of it."""

    def __init__(self, label: str, *, epochs: int, metric: str = "accuracy") -> None:
        self.label, self.epochs, self.metric = label, epochs, metric
        self.progress = bars()
        self.task = self.progress.add_task(label, total=epochs, note="")

    def __enter__(self) -> TrainProgress:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def epoch_ended(self, epoch: EpochMetrics) -> None:
        scored = "" if epoch.raw is None else f"  {self.metric} {epoch.score(self.metric):.4f}"
        note = f"loss {epoch.train_loss:.3f}{scored}  {epoch.images_per_s:,.0f} images/s"
        self.progress.update(self.task, completed=epoch.epoch, note=note)
        every = max(1, self.epochs // 10)
        if not console.is_terminal and (epoch.epoch % every == 0 or epoch.epoch == self.epochs):
            say(f"{self.label}: epoch {epoch.epoch} of {self.epochs}, {note}")


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = (), cut: bool = False
) -> None:
    """A plain table; `right` names the columns to align to the right.

    Args:
        cut: whether the last column ends in … where the terminal does, a row a line; else it is folded. Without a
            terminal nothing is cut.
    """
    if cut and not console.is_terminal:
        wide = Console(file=console.file, width=_UNBOUNDED, highlight=False)
        wide.print(_grid(columns, rows, right=right, width=None))
    else:
        console.print(_grid(columns, rows, right=right, width=console.width if cut else None))


def _grid(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int], width: int | None) -> Table:
    """A table; with a width, its last column is cut off there."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        grid.add_column(column, justify="right" if number in right else "left", overflow="fold")
    cells = [[Text(str(cell)) for cell in row] for row in rows]
    if width is not None:
        taken = [
            max(cell_len(line) for line in (name, *(row[at].plain for row in cells))) for at, name in enumerate(columns)
        ]
        for row in cells:
            row[-1].truncate(max(1, width - sum(taken[:-1]) - _GAP * (len(columns) - 1)), overflow="ellipsis")
    for row in cells:
        grid.add_row(*row)
    return grid


@dataclass(frozen=True)
class TableOf:
    """A table among the parts of a screen."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    right: Sequence[int] = ()
    """The columns that are aligned to the right. The last column is cut where the terminal ends."""


Screen = Sequence["str | TableOf"]
"""Lines and tables, one below the other."""


def say_screen(screen: Screen) -> None:
    """Prints a screen once."""
    for part in screen:
        if isinstance(part, str):
            say(part)
        else:
            table(part.columns, part.rows, right=part.right, cut=True)


@contextmanager
def live_screen() -> Iterator[Callable[[Screen], None]]:
    """What is yielded shows a screen in place of the one before; the last one stays. Only for a terminal."""
    with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:

        def show(screen: Screen) -> None:
            parts = [
                Text(part, overflow="fold")
                if isinstance(part, str)
                else _grid(part.columns, part.rows, right=part.right, width=console.width)
                for part in screen
            ]
            live.update(Group(*parts), refresh=True)

        yield show
