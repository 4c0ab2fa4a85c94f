"""The digits, and one browser for all tests that need one: Playwright allows one session in a process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from core.config import TrainConfig
from core.data import Dataset, load_dataset
from tests.hpo.browser import open_browser

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
