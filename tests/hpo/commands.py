"""Run `hpo` in this process or as a process of its own, and the search space that most tests use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpo import cli
from tests.hpo.zygote import Hpo

# Independent trials, so that a trial's result does not depend on those run at the same time.
SPACE = """
data: {name: digits}
base: {model: {widths: [8], blocks: [1]}, epochs: 2, batch_size: 128, augment: {flip: 0.0}}
pruner: {name: none}
sampler: {name: random}
search:
  optim.lr_scale: {low: 0.5, high: 20, log: true}
"""

Start = Callable[..., "subprocess.Popen[str]"]


def hpo(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["hpo", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@contextmanager
def studies_in(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """Keep studies and cached images in `folder/studies` and `folder/cache`, for fixtures that tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_STUDIES", str(folder / "studies"))
        patch.setenv("HPO_CACHE", str(folder / "cache"))
        yield patch


class RunHpo:
    """Runs `hpo` in this process. A test gets it as the fixture `run_hpo`."""

    error: str
    """The standard error of the last command."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capture = capture

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Run a command, which must exit with this code, and return its standard output."""
        self._capture.readouterr()
        ended = hpo(self._monkeypatch, *arguments)
        output, self.error = self._capture.readouterr()
        assert ended == code, output + self.error
        return output

    def fails(self, *arguments: str) -> str:
        """Run a command with a mistake of the user and return its only line on standard error."""
        self(*arguments, code=2)
        [line] = self.error.strip().splitlines()
        assert line.startswith("hpo: ")
        assert line.isprintable()
        return line


@contextmanager
def started_runs() -> Iterator[Start]:
    """Yield a function that starts `hpo run` in a process group of its own, which is killed at the end."""
    processes = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        processes.append(
            Hpo(
                ["run", *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        )
        return processes[-1]

    yield begin
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
