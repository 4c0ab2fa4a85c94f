"""Whether a study has enough validation images: the line that says so, and when `hpo run` shows it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

import hpo.api.run
from core.config import DataConfig
from core.data import Splits
from hpo.search.noise import ASSUMED_LEVEL, FOLDS, TOO_LARGE, noise_line
from hpo.study import find_study
from tests.hpo.commands import RunHpo

CLASSES = 5


def split(val: int, train: int = 1000) -> Splits:
    labels = torch.arange(train + val) % CLASSES
    images = torch.zeros(train + val, 1, 1, 1, dtype=torch.uint8)
    names = tuple(map(str, range(CLASSES)))
    return Splits(images, labels, torch.arange(train), torch.arange(train, train + val), names, (0.5,), (0.5,))


def line(val: int, level: float | None = None, *, train: int = 1000, metric: str = "accuracy") -> str:
    return noise_line([split(val, train)], DataConfig(), metric, level, given=False)


@pytest.mark.parametrize("level", [0.3, 0.6, 0.9])
def test_a_validation_set_is_too_small_if_its_standard_error_is_over_two_points(level: float) -> None:
    enough = level * (1 - level) / TOO_LARGE**2
    assert line(math.ceil(1.2 * enough), level) == ""
    found = line(round(0.8 * enough), level)
    assert f"at accuracy {level:.2f}" in found
    error = math.sqrt(level * (1 - level) / round(0.8 * enough))
    assert float(re.findall(r"is ([\d.]+) points", found)[0]) == pytest.approx(100 * error, rel=0.15)


def test_without_a_trained_baseline_its_level_is_assumed() -> None:
    assert line(100) == line(100, ASSUMED_LEVEL) != line(100, 0.5)


@pytest.mark.parametrize("metric", ["balanced_accuracy", "macro_f1"])
def test_means_over_classes_have_the_error_of_their_classes(metric: str) -> None:
    assert line(50, metric=metric)
    assert not line(1000, metric=metric)


def test_a_log_loss_has_no_line() -> None:
    assert line(10, metric="nll") == ""


def test_the_advised_fraction_is_enough() -> None:
    found = line(100, 0.8, train=1900)
    fraction = float(re.findall(r"--set data\.val_fraction=([\d.]+)", found)[0])
    images = round(2000 * fraction)
    assert line(images, 0.8, train=2000 - images) == ""
    assert f"--set data.folds={FOLDS}" in found


def test_over_half_of_the_images_are_not_advised() -> None:
    found = line(50, 0.8, train=450)
    assert "val_fraction" not in found
    assert f"--set data.folds={FOLDS}" in found


def test_validation_images_of_the_data_are_drawn_first() -> None:
    found = noise_line([split(100, 1900)], DataConfig(), "accuracy", 0.8, given=True)
    assert "--set data.val=drawn --set data.val_fraction=" in found


def test_folds_count_their_images_together() -> None:
    config = DataConfig(folds=5)
    assert noise_line([split(100)] * 5, config, "accuracy", 0.9, given=False) == ""
    found = noise_line([split(10)] * 5, config, "accuracy", 0.9, given=False)
    assert found.startswith("50 validation images: the standard error is 4.")
    assert "hpo confirm" in found
    assert "--set" not in found


SPACE = """
data: {name: digits, val_fraction: 0.05}
base: {model: {widths: [8], blocks: [1]}, epochs: 2, batch_size: 256, augment: {flip: 0.0}}
pruner: {name: none}
sampler: {name: random}
search:
  optim.lr_scale: {low: 0.5, high: 60, log: true}
"""


def test_a_search_shows_it_before_its_trials_at_the_level_of_its_baseline(
    tmp_path: Path, run_hpo: RunHpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hpo.api.run, "train_all", lambda work, view: True)
    own = tmp_path / "own.yaml"
    own.write_text(SPACE)
    assert "points at accuracy 0.90, too much to tell close trials apart" in run_hpo("run", str(own), "--trials", "3")
    study = find_study("own").optuna
    study.tell(study.ask(), 0.7)  # trial 0, the baseline
    assert "points at accuracy 0.70" in run_hpo("run", str(own), "--trials", "3")
