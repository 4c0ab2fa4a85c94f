"""Probes from the command line: trained alone, searched, confirmed, refitted, predicted with, and beside a study."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from core.data import load_dataset, split
from core.loop import train
from core.models import timm_models
from hpo.analysis.kinds import best_of_kinds
from hpo.confirmation.result import read_confirmation
from hpo.space import load_recipe, load_space
from hpo.study import find_study
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
SCRATCH = """
data: {name: digits}
base: {model: {widths: [8], blocks: [1]}, epochs: 2, batch_size: 128}
search:
  optim.lr_scale: {low: 0.5, high: 20, log: true}
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


def test_a_study_goes_on_without_the_weights_of_its_recipes(
    folder: Path, run_hpo: RunHpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    unplugged = ConnectionError("no route to host")

    def no_session() -> None:
        raise unplugged

    monkeypatch.setattr(huggingface_hub, "get_session", no_session)
    monkeypatch.setattr(timm_models.hub, "HF_HUB_CACHE", str(folder / "hub"))
    published = PROBE.replace(", pretrained_file: weights.safetensors", "").replace(
        "test_resnet", "mobilenetv3_large_100"
    )
    (folder / "published.yaml").write_text(published)
    (folder / "space.yaml").write_text(
        SCRATCH.replace("digits}", "digits, image_size: 32}") + "recipes: [published.yaml, probe.yaml]\n"
    )
    said = run_hpo("run", "space.yaml", "--trials", "1", "--study", "own", "--minutes", "5")
    [line] = [line for line in said.splitlines() if line.startswith("recipe published  left out")]
    assert "reserved_s" not in (find_study("own").settings.deadline or {}), "it gets no time"
    for words in ("timm/mobilenetv3_large_100", "model.safetensors", str(folder / "hub"), "no route to host"):
        assert words in line
    assert "recipe probe  accuracy 0." in said
    assert not (folder / "studies/own/references/published/result.json").exists(), "the next run tries again"
    assert "1 of 1 trial finished" in run_hpo("study", "show", "own")


def test_a_probe_beside_a_study_keeps_its_own_normalization_also_in_its_refit(folder: Path, run_hpo: RunHpo) -> None:
    (folder / "space.yaml").write_text(SCRATCH + "recipes: [probe.yaml]\n")
    said = run_hpo("run", "space.yaml", "--trials", "1", "--study", "own")
    assert said.index("recipe probe") < said.index("trial   0"), "a score to beat from the first trial on"
    beside = load_recipe(folder / "studies/own/references/probe/config.yaml").config
    assert (beside.data.normalize, beside.epochs) == ("half", 2)
    alone = load_recipe(folder / "probe.yaml").config.override({"data.val_fraction": beside.data.val_fraction})
    result = json.loads((folder / "studies/own/references/probe/result.json").read_text())
    splits = split(load_dataset(alone.data), alone.data)
    wanted = train(alone.override({"seed": beside.seed}), splits, device=torch.device("cpu"))
    assert result["value"] == wanted.value("accuracy")
    said = run_hpo("refit", "best", "--no-confirm")
    assert f"recipe probe is the best by its one validation score, accuracy {result['value']:.4f}" in said
    assert "refitting recipe probe" in run_hpo("refit", "best")
    preprocess = json.loads((folder / "studies/own/refit/best/preprocess.json").read_text())
    assert preprocess["networks"][0]["mean"] == [0.5]
    assert load_space(folder / "space.yaml", ["data.normalize=train"]).recipes[0].config.data.normalize == "train"


def test_a_probe_is_left_out_where_pretraining_is_ruled_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    scratch = SCRATCH.replace("{widths: [8], blocks: [1]}", "{name: timm/test_resnet, pretrained: true}")
    (folder / "space.yaml").write_text(scratch + "recipes: [probe.yaml]\n")
    assert load_space(folder / "space.yaml", ["model.pretrained=false"]).recipes == ()
    assert "recipe probe is left out" in caplog.text


def test_a_probe_is_refitted_without_a_study(folder: Path, run_hpo: RunHpo) -> None:
    assert "opened once by refits of recipes" in run_hpo("refit", "probe.yaml")
    [bundle] = (folder / "studies/trainings").glob("probe-*/refit/recipe")
    assert json.loads((bundle / "metrics.json").read_text())["test"]["with_tta"]["accuracy"] > 0.7


def test_report_and_terminal_name_the_best_of_each_kind_and_its_lead(folder: Path, run_hpo: RunHpo) -> None:
    tuned = PROBE.replace("optim: {name: logistic}", "batch_size: 128").replace("epochs: 3", "epochs: 2")
    (folder / "tuned.yaml").write_text(tuned)
    (folder / "space.yaml").write_text(SCRATCH + "recipes: [probe.yaml, tuned.yaml]\n")
    run_hpo("run", "space.yaml", "--trials", "2", "--study", "own")
    study = find_study("own")
    searched = {best.kind: best for best in best_of_kinds(study, None)}
    assert set(searched) == {"probe", "fine-tuning", "from scratch"}
    assert searched["probe"].behind is None
    scratch = searched["from scratch"]
    best = study.best_trial()
    assert best is not None
    assert scratch.value == best.value
    assert scratch.behind is not None
    assert scratch.behind.mean == pytest.approx(searched["probe"].value - scratch.value)
    assert math.isinf(scratch.behind.half_width)

    run_hpo("confirm", "own", "--budget", "11")
    confirmation = read_confirmation(study.paths.confirmation)
    assert confirmation is not None
    shown = run_hpo("study", "show", "own")
    first, *others = best_of_kinds(study, confirmation)
    assert len(others) == 2
    assert f"  probe: accuracy {first.value:.4f} (recipe probe)" in shown
    for other in others:
        one, two = (confirmation.contender(best.key).scores for best in (first, other))
        gains = [one[n][0] - two[n][0] for n in sorted(set(one) & set(two))]
        assert other.behind is not None
        assert other.behind.mean == pytest.approx(statistics.fmean(gains))
        assert 0 < other.behind.half_width < math.inf
        assert f"{100 * other.behind.mean:.2f} ± {100 * other.behind.half_width:.2f} points worse" in shown
    run_hpo("report", "own")
    page = (folder / "studies/own/report.html").read_text()
    assert f"The best of each kind, probe: accuracy {first.value:.4f} (recipe probe); " in page
