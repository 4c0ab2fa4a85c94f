"""Run `hpo` in this process or as a process of its own, and the search space that most tests use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
