"""Probes from the command line: trained alone, searched, confirmed, refitted, predicted with, and beside a study."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from tests.hpo.commands import RunHpo
from tests.hpo.digits import rows_of

PROBE = """
description: a probe
data: {name: digits, normalize: half}
epochs: 3
model: {name: timm/test_resnet, pretrained: true, pretrained_file: weights.safetensors}
optim: {name: logistic}
"""
SPACE = """
data: {{name: digits{folds}}}
base: probe.yaml
pruner: {{name: rungs, rungs: [0.34]}}
search:
  loss.class_weights: {{choices: [none, inverse]}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with weights, a recipe of a probe, and a space around it."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", pretrained=False, num_classes=1000, in_chans=1)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "probe.yaml").write_text(PROBE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_probe_is_trained_like_any_recipe(folder: Path, run_hpo: RunHpo) -> None:
    first = run_hpo("train", "probe.yaml")
    assert "validation accuracy 0." in first
    again = run_hpo("train", "probe.yaml")
    line = next(line for line in first.splitlines() if "validation accuracy" in line)
    assert line.partition("(")[0] in again
    assert "leave out --profile" in run_hpo.fails("train", "probe.yaml", "--profile")


@pytest.mark.parametrize("folds", ["", ", folds: 3"])
def test_a_probe_is_searched_confirmed_refitted_and_predicts(folds: str, folder: Path, run_hpo: RunHpo) -> None:
    (folder / "space.yaml").write_text(SPACE.format(folds=folds))
    run_hpo("run", "space.yaml", "--trials", "2", "--study", "own")
    run_hpo("refit", "best", "--onnx")
    bundle = folder / "studies/own/refit/best"
    kept, before = load_file(bundle / "model.safetensors"), load_file(folder / "weights.safetensors")
    changed = {name for name in kept if not torch.equal(kept[name], before[name])}
    assert changed == {"fc.weight", "fc.bias"}, "the rest is as it was pretrained"
    metrics = json.loads((bundle / "metrics.json").read_text())
    assert metrics["epochs"] == 1
    assert metrics["test"]["with_tta"]["accuracy"] > 0.7
    assert "own" in run_hpo("report")
    digits = load_digits()
    np.savez(folder / "some.npz", images=(digits.images[:40] * 255 / 16).round().astype(np.uint8))
    run_hpo("predict", str(bundle), str(folder / "some.npz"), "-o", str(folder / "out.csv"))
    right = [int(row["label"]) == digit for row, digit in zip(rows_of(folder / "out.csv"), digits.target, strict=False)]
    assert len(right) == 40
    assert sum(right) > 30
