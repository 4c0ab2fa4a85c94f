"""Output on the terminal: lines, tables and progress bars. Without a terminal, there are no bars."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from core.text import printable_lines
from hpo.cli.wrapping import wrapped
from hpo.errors import StudyError

if TYPE_CHECKING:
    from core.loop import EpochMetrics

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

_UNBOUNDED = 100_000  # columns of a table in a file or a pipe, which is never cut
_GAP = 2  # characters between the columns of a table


def set_up_logging() -> None:
    """Send log records to the terminal: warnings of any package, and information of our own."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_TerminalHandler()], force=True)
    _set_level(logging.INFO)


@contextmanager
def detail(*, as_json: bool = False, quiet: bool = False, verbose: bool = False) -> Iterator[None]:
    """Show less or more than usual, or all of it on standard error.

    Raises:
        StudyError: Less and more are asked for.
    """
    if quiet and verbose:
        raise StudyError("--quiet and --verbose exclude each other; give one")
    before = console.stderr, console.quiet
    console.stderr, console.quiet = as_json, quiet
    _set_level(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    try:
        yield
    finally:
        console.stderr, console.quiet = before
        _set_level(logging.INFO)


def is_verbose() -> bool:
    """Whether every detail is shown."""
    return logging.getLogger("hpo").isEnabledFor(logging.DEBUG)


def _set_level(level: int) -> None:
    for package in ("core", "hpo"):
        logging.getLogger(package).setLevel(level)


class _TerminalHandler(logging.Handler):
    """Print a record as a line on standard error, above a progress bar if one is drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        bars_are_drawn = console.is_terminal and errors.is_terminal and not console.quiet
        _print(f"{level}{self.format(record)}", console if bars_are_drawn else errors)


def say(text: str = "") -> None:
    """Print a line without markup, in a terminal broken between words."""
    _print(text, console)
    console.file.flush()  # keeps the order with log records in the same file


def complain(text: str) -> None:
    """Print a line on standard error, as `say` does."""
    _print(text, errors)


def _print(text: str, where: Console) -> None:
    lines = printable_lines(text).split("\n")
    if where.is_terminal:
        lines = [wrapped(line, where.width) for line in lines]
    where.print(escape("\n".join(lines)), soft_wrap=True)


def put(text: str) -> None:
    """Print a file's text as it is."""
    console.file.write(text)


def bars() -> Progress:
    """Return a progress display in the common layout; without a terminal, it shows nothing."""
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


def epoch_note(epoch: EpochMetrics, metric: str) -> str:
    """Describe an epoch beside its bar: loss, score if it was validated, and speed."""
    scored = f"  {metric} {epoch.score(metric):.4f}" if epoch.validated else ""
    return f"loss {epoch.train_loss:.3f}{scored}  {epoch.images_per_s:,.0f} images/s"


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = (), cut: bool = False
) -> None:
    """Print a plain table, with some columns aligned to the right.

    `cut` cuts the last column at the width of the terminal instead of folding it. Without a terminal, nothing is cut.
    """
    if cut and not console.is_terminal:
        wide = Console(file=console.file, width=_UNBOUNDED, highlight=False)
        wide.print(_grid(columns, rows, right=right, width=None))
    else:
        console.print(_grid(columns, rows, right=right, width=console.width if cut else None))


def _grid(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int], width: int | None) -> Table:
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        grid.add_column(column, justify="right" if number in right else "left", overflow="fold")
    cells = [[Text(printable_lines(str(cell))) for cell in row] for row in rows]
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
    """A table on a screen."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    right: Sequence[int] = ()
    """Columns aligned to the right. The last column is cut at the width of the terminal."""


Screen = Sequence["str | TableOf"]
"""Lines and tables from top to bottom."""


def say_screen(screen: Screen) -> None:
    """Print a screen once."""
    for part in screen:
        if isinstance(part, str):
            say(part)
        else:
            table(part.columns, part.rows, right=part.right, cut=True)


@contextmanager
def live_screen() -> Iterator[Callable[[Screen], None]]:
    """Yield a function that replaces the shown screen by another; the last one stays. Needs a terminal."""
    with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:

        def show(screen: Screen) -> None:
            parts = [
                Text(printable_lines(part), overflow="fold")
                if isinstance(part, str)
                else _grid(part.columns, part.rows, right=part.right, width=console.width)
                for part in screen
            ]
            live.update(Group(*parts), refresh=True)

        yield show
