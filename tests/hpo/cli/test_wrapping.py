"""Lines that are longer than the terminal is wide, and those that come while bars are drawn."""

from __future__ import annotations

import io
import logging
import shlex
import subprocess

import pytest
from rich.cells import cell_len
from rich.console import Console

import hpo.cli.console
from hpo.cli.console import bars, complain, say
from hpo.cli.wrapping import wrapped

COMMANDS = [
    ["optuna-dashboard", "studies/digits/journal.log", "--artifact-dir", "studies/digits/artifacts"],
    ["hpo", "run", "my space.yaml", "--data", "/a b/its", "--set", "model.name=vgg", "--trials", "300", "--quiet"],
    ["hpo", "run", "it's.yaml", "--data", "a" * 90, "--set", "notes=$HOME `id` \\ \"x\"", "-o", "out"],
    ["hpo", "refit", "params<1e6", "--study", "digits; rm -r x", "--metric", "macro_f1", "--ensemble", "3", "--onnx"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_command_that_is_broken_is_the_same_command_to_a_shell(command: list[str], width: int) -> None:
    shown = wrapped(f"  {shlex.join(command)}", width)
    assert "\n" in shown
    script = f'set -- {shown}\nprintf "%s\\n" "$@"'
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == command


def test_a_comment_after_a_command_stays_on_its_last_line() -> None:
    lines = wrapped(
        "  hpo confirm a-long-name --budget 1.3  # twice the trainings, for more certainty", 40
    ).splitlines()
    assert lines == [
        "  hpo confirm a-long-name --budget 1.3  # twice the trainings, for more certainty",
    ]
    shown = wrapped("  hpo confirm a-longer-name --budget 1.3 --hours 3  # twice the trainings", 40)
    assert shown == "  hpo confirm a-longer-name \\\n    --budget 1.3 --hours 3  # twice the trainings"


def test_an_option_stays_with_its_value() -> None:
    lines = wrapped(f"  {shlex.join(COMMANDS[0])}", 80).splitlines()
    assert lines == [
        "  optuna-dashboard studies/digits/journal.log \\",
        "    --artifact-dir studies/digits/artifacts",
    ]


@pytest.mark.parametrize("width", [10, 33, 80])
@pytest.mark.parametrize(
    "line",
    [
        "study digits: 7 trials of 20 epochs, 0 done; sampler tpe, pruner rungs at epoch 2, 5, 10; CPU, 1 thread",
        "  classes: 雪 120, 月 121, 花 122, 鳥 123, 風 124, 山 125, 川 126, 海 127, 空 128, 森 129, 石 130, 火 131",
    ],
)
def test_prose_is_broken_between_words_and_fits(line: str, width: int) -> None:
    lines = wrapped(line, width).split("\n")
    assert [word for part in lines for word in part.split()] == line.split()
    assert all(cell_len(part) <= width or len(part.split()) == 1 for part in lines)
    indent = len(line) - len(line.lstrip())
    assert all(len(part) - len(part.lstrip()) == indent + 2 for part in lines[1:])


def test_a_command_in_a_sentence_stays_whole() -> None:
    line = "study mine has another name in its file (studies/mine); hpo study rename own mine, or begin another"
    for width in (30, 60, 90):
        assert "hpo study rename own mine," in wrapped(line, width)


def test_a_line_that_fits_stays_as_it_is() -> None:
    assert wrapped("  hpo run digits   --trials 3", 29) == "  hpo run digits   --trials 3"


class Shared:
    """Both consoles of the command line on one terminal, or on one file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> None:
        self.file = io.StringIO()
        for name in ("console", "errors"):
            shown = Console(file=self.file, width=40, force_terminal=terminal, highlight=False, color_system=None)
            monkeypatch.setattr(hpo.cli.console, name, shown)

    def handle(self, words: str) -> None:
        record = logging.LogRecord("hpo", logging.WARNING, "", 0, words, None, None)
        hpo.cli.console._TerminalHandler().emit(record)


def test_a_warning_stands_above_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Shared(monkeypatch, terminal=True)
    with bars() as progress:
        progress.add_task("study", total=3, note="")
        progress.refresh()
        shared.handle("the CPU has 1 core")
    drawn, _, _ = shared.file.getvalue().partition("warning: the CPU has 1 core")
    assert "study" in drawn
    assert drawn.endswith(("\n", "\x1b[2K")), "else it goes on in the line of the bar"


@pytest.mark.parametrize(("terminal", "lines"), [(True, 2), (False, 1)])
def test_lines_are_broken_in_a_terminal_alone(monkeypatch: pytest.MonkeyPatch, terminal: bool, lines: int) -> None:
    for show in (say, complain):
        shared = Shared(monkeypatch, terminal=terminal)
        show("four words, five words, six words, and seven words")
        assert len(shared.file.getvalue().splitlines()) == lines


def test_a_warning_is_shown_where_all_else_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Shared(monkeypatch, terminal=True)
    hpo.cli.console.console.quiet = True
    shared.handle("the CPU has 1 core")
    assert shared.file.getvalue() == "warning: the CPU has 1 core\n"
