"""Studies that the report's tests share; tests that change a study make their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.data import Dataset, load_dataset
from hpo.analysis.study_data import StudyData, read_study_data
from hpo.space import load_space
from hpo.study import find_study
from tests.hpo.commands import hpo
from tests.hpo.invented import ALL_STATES, SPACE, invented_study

SMALL = """
data: {name: digits}
base:
  model: {widths: [8], blocks: [1]}
  epochs: 3
  batch_size: 128
  optim: {lr_scale: 6.0}
  augment: {flip: 0.0, crop_pad_fraction: 0.125}
pruner: {name: rungs, rungs: [0.34, 0.67], keep: 0.3, let_through: 0.5}
sampler: {name: random}
search:
  optim.lr_scale: {low: 4, high: 60, log: true}
  batch_size: {choices: [64, 128]}
"""


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset(load_space("digits").baseline.data)


@pytest.fixture(scope="session")
def twelve(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> StudyData:
    """A finished study of twelve trials."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_STUDIES", str(tmp_path_factory.mktemp("twelve")))
        return read_study_data(invented_study(SPACE, digits, "twelve", trials=12))


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> StudyData:
    """A study with trials in every state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_STUDIES", str(tmp_path_factory.mktemp("everything")))
        return read_study_data(invented_study(SPACE, digits, "everything", **ALL_STATES))


def _searched(folder: Path, trials: int, *options: str) -> StudyData:
    (folder / "small.yaml").write_text(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_STUDIES", str(folder / "studies"))
        patch.setenv("HPO_CACHE", str(folder / "cache"))
        assert hpo(patch, "run", str(folder / "small.yaml"), "--trials", str(trials), *options) == 0
        return read_study_data(find_study())


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> StudyData:
    """A real search of five trials, some of them pruned and some let through."""
    return _searched(tmp_path_factory.mktemp("real"), 5)


@pytest.fixture(scope="session")
def folded(tmp_path_factory: pytest.TempPathFactory) -> StudyData:
    """A real search whose trials train two folds of an epoch."""
    return _searched(tmp_path_factory.mktemp("folded"), 1, "--set", "data.folds=2", "--set", "epochs=1")
