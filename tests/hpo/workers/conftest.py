"""Fixtures of the workers' tests: a small search space, and `hpo run` as a process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hpo.commands import SPACE, Start, started_runs


@pytest.fixture
def space_file(tmp_path: Path) -> str:
    """The file of the search space `own`."""
    file = tmp_path / "own.yaml"
    file.write_text(SPACE)
    return str(file)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `hpo run` as the head of a process group, which is killed at the end of the test."""
    with started_runs() as begin:
        yield begin
