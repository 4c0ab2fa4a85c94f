"""The digits, a small search space, `hpo run` as a process, and one browser for all tests that need one.

Playwright allows one session in a process.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from core.config import TrainConfig
from core.data import Dataset, load_dataset
from tests.hpo.browser import open_browser
from tests.hpo.commands import SPACE, Start, started_runs

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """scikit-learn's digits."""
    return load_dataset(TrainConfig().data)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def space_file(tmp_path: Path) -> str:
    """The file of the search space `own`."""
    file = tmp_path / "own.yaml"
    file.write_text(SPACE)
    return str(file)


@pytest.fixture
def closed_databases(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes the connections of all databases that a test opens."""
    from hpo.storage.database import _Database

    engines = []
    open_ = _Database.__init__

    def opened(self: _Database, url: str) -> None:
        open_(self, url)
        engines.append(self.engine)

    monkeypatch.setattr(_Database, "__init__", opened)
    yield
    for engine in engines:
        engine.dispose()


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `hpo run` as the head of a process group, which is killed at the end of the test."""
    with started_runs() as begin:
        yield begin
