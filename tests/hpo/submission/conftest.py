"""A search whose trials are refitted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hpo.study import Study, find_study
from tests.hpo.commands import SPACE, hpo, studies_in


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The studies folder of a search `own` of three trials of two epochs."""
    folder = tmp_path_factory.mktemp("searched")
    (folder / "own.yaml").write_text(f"{SPACE}confirm: {{budget: 0.1}}\n")  # the least
    with studies_in(folder) as patch:
        assert hpo(patch, "run", str(folder / "own.yaml"), "--trials", "3") == 0
    return folder / "studies"


@pytest.fixture
def study(searched: Path, tmp_path: Path) -> Study:
    """A copy of that study, to be refitted."""
    shutil.copytree(searched, tmp_path / "studies")
    return find_study("own")
