"""The command as tests give it: in this process, or as a process of its own; and the search that most of them run."""

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

# Trials that know nothing of each other, so that they are the same whatever runs beside them.
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
    """Runs the command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["hpo", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@contextmanager
def started_runs() -> Iterator[Start]:
    """What starts `hpo run` as the head of a process group of its own, which the end of this ends."""
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
