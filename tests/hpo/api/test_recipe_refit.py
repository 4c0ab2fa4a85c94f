"""`hpo refit RECIPE`: a recipe becomes a submission model without a study. Real digits throughout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import hpo
from core.config import TrainConfig
from core.data import load_dataset, split
from core.loop import EpochMetrics, train
from hpo.paths import recipe_refits
from hpo.submission.bundle import load_bundle
from hpo.submission.locate import locate_bundle
from tests.hpo.commands import SPACE, RunHpo
from tests.hpo.digits import check_predictions, digit_pixels, write_digits

RECIPE = """
description: a small network
data: {name: digits}
epochs: 3
batch_size: 64
model: {widths: [8], blocks: [1]}
augment: {flip: 0.0}
optim: {lr_scale: 20}
"""
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe `own.yaml` in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_STUDIES", "studies")
    path = tmp_path / "own.yaml"
    path.write_text(RECIPE)
    return path


def refitted() -> Path:
    [folder] = recipe_refits("own")
    return folder


def metrics_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


def same_weights(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)


def test_a_recipe_is_decided_on_a_part_and_then_trained_on_all_images(tmp_path: Path, run_hpo: RunHpo) -> None:
    said = run_hpo("refit", "own.yaml")
    assert "refitting recipe own" in said
    assert "1,078 for training, 360 for validation, 359 in the locked test set" in said
    folder, report = refitted(), metrics_of(refitted())
    assert f"written to {folder}" in said
    assert folder.parent.parent.parent == Path("studies/trainings")
    config = hpo.space.load_recipe("own.yaml").config
    dataset = load_dataset(config.data)
    splits = split(dataset, config.data)
    first, whole = (train(config, images, device=CPU) for images in (splits, splits.whole()))
    model = load_bundle(folder, CPU)
    assert model.meta.config == config
    assert same_weights(model.models[0], whole.model)
    assert report["val"]["without_tta"]["accuracy"] == pytest.approx(first.value("accuracy"))
    assert (report["recipe"], report["trial"], report["epochs"]) == ("own", None, 3)
    assert (report["search"], report["confirmation"]) == (None, None)
    assert report["test"]["images"] == dataset.n_test
    card = (folder / "README.md").read_text()
    assert "Written by `hpo refit` from the recipe `own`. It takes grey images" in card
    assert "The test images were used once" in card
    assert not list(folder.parent.glob(".*.pt"))
    photos = write_digits(tmp_path / "photos", 20)
    run_hpo("predict", "own", str(photos), "-o", str(tmp_path / "out.csv"), "--probabilities")
    check_predictions(tmp_path / "out.csv", 20)


def test_early_stopping_gives_the_length_of_the_training_on_all_images(run_hpo: RunHpo) -> None:
    settings = ["--set", "early_stop.patience_fraction=0.2", "--set", "epochs=12", "--metric", "macro_f1"]
    run_hpo("refit", "own.yaml", *settings, "--set", "optim.lr_scale=200")
    config, report = load_bundle(refitted(), CPU).meta.config, metrics_of(refitted())
    splits = split(load_dataset(config.data), config.data)
    result = train(config, splits, metric="macro_f1", device=CPU)
    assert result.kept.epoch < config.epochs
    assert (report["epochs"], report["objective"]) == (result.kept.epoch, "macro_f1")


@pytest.mark.parametrize(("options", "networks"), [(["--folds", "2"], 2), (["--members", "2"], 2)])
def test_ensembles_and_onnx_are_as_for_a_trial(options: list[str], networks: int, run_hpo: RunHpo) -> None:
    pytest.importorskip("onnxruntime")
    run_hpo("refit", "own.yaml", *options, "--onnx")
    assert refitted().name == f"recipe.{options[0][2:]}2"
    assert metrics_of(refitted())["epochs"] == ([3, 3] if "--folds" in options else 3)
    assert len(load_bundle(refitted(), CPU).models) in ({networks} if "--folds" in options else {1, networks})
    assert (refitted() / "model.onnx").exists()


def test_the_users_images_with_a_broken_file_and_folds_in_the_recipe(tmp_path: Path, run_hpo: RunHpo) -> None:
    pixels, labels = digit_pixels()
    for label in range(3):
        folder = tmp_path / "own_images" / f"class{label}"
        folder.mkdir(parents=True)
        for number, image in enumerate(pixels[labels == label][:40]):
            Image.fromarray(image).save(folder / f"{number}.png")
    (tmp_path / "own_images/class0/broken.png").write_bytes(b"no image")
    arguments = ["refit", "own.yaml", "--data", "own_images", "--set", "data.folds=2"]
    assert "broken.png" in run_hpo.fails(*arguments)
    said = run_hpo(*arguments, "--skip-broken")
    assert "3 classes" in said
    assert "out-of-fold" in said
    assert load_bundle(refitted(), CPU).meta.classes == ("class0", "class1", "class2")


def test_a_stopped_refit_resumes_and_a_second_one_replaces_its_folder_and_counts_the_opening(
    monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo
) -> None:
    run_hpo("refit", "own.yaml")
    first = load_bundle(refitted(), CPU).models[0]
    epochs: list[int] = []

    def stopping(config: TrainConfig, *arguments: Any, on_epoch_end: Any, **options: Any) -> Any:
        def watched(epoch: EpochMetrics) -> None:
            on_epoch_end(epoch)
            epochs.append(epoch.epoch)
            if len(epochs) == 5:
                raise KeyboardInterrupt

        return train(config, *arguments, on_epoch_end=watched, **options)

    monkeypatch.setattr("hpo.submission.networks.train", stopping)
    run_hpo("refit", "own.yaml", code=130)
    said = run_hpo("refit", "own.yaml")
    assert epochs == [1, 2, 3, 1, 2, 3], "the second run begins after its last epoch"
    assert "has now been opened 2 times by refits of recipes" in said
    assert same_weights(first, load_bundle(refitted(), CPU).models[0])
    [file] = Path("studies/trainings/test_openings").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["label"], row["recipe"], row["trial"]) for row in rows] == [("recipe", "own", None)] * 2
    assert "The test images of this data set have been used 2 times" in (refitted() / "README.md").read_text()


def test_other_settings_have_a_folder_of_their_own_and_the_name_lists_both(run_hpo: RunHpo) -> None:
    run_hpo("refit", "own.yaml")
    assert locate_bundle("own") == refitted()
    run_hpo("refit", "own.yaml", "--set", "epochs=1")
    both = ", ".join(map(str, recipe_refits("own")))
    assert f"recipe own has 2 models; give one of {both}" in run_hpo.fails("predict", "own", "images")
    [openings] = Path("studies/trainings/test_openings").iterdir()
    assert len(openings.read_text().splitlines()) == 2, "they share the test set"


def test_a_study_and_a_recipe_of_one_name_are_both_listed(recipe: Path, run_hpo: RunHpo) -> None:
    Path("space.yaml").write_text(SPACE)
    run_hpo("run", "space.yaml", "--study", "own", "--trials", "1")
    run_hpo("refit", "own.yaml")
    assert locate_bundle("own") == refitted()
    run_hpo("refit", "0", "--study", "own")
    assert "study own has 2 models; give one of studies/own/refit/00000, " in run_hpo.fails("predict", "own", "x")
    wrong = run_hpo.fails("refit", "own")
    assert "give `best`, the number of a complete trial, or a recipe from hpo space list" in wrong
    assert "own is a study: hpo refit best --study own" in wrong


def test_python_refits_a_recipe_too(recipe: Path) -> None:
    model = hpo.refit(trial=recipe, set={"epochs": 1}, quiet=True)
    assert model.folder == refitted()
    assert model.meta.config.epochs == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits_bas"], "did you mean"),
        (["digits"], "digits is a space: hpo run digits"),
        (["none.yaml"], "none.yaml: no such file"),
        (["own.yaml", "--study", "x"], "hpo refit own.yaml --study: a recipe belongs to no study"),
        (["own.yaml", "--storage", "x"], "hpo refit own.yaml --storage: a recipe belongs to no study"),
        (["own.yaml", "--metric", "f1"], "--metric f1: no such metric"),
        (["own.yaml", "--set", "epoch=3"], "epoch"),
        (["own.yaml", "--folds", "2", "--members", "2"], "--folds and --members"),
        (["best", "--set", "epochs=3"], "hpo refit best --set: a trial is refitted as it was trained"),
        (["12", "--metric", "nll"], "hpo refit 12 --metric: a trial is refitted as it was trained"),
        (["12", "--skip-broken"], "hpo refit 12 --skip-broken"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, run_hpo: RunHpo) -> None:
    assert message in run_hpo.fails("refit", *arguments)
    assert not Path("studies").exists()
