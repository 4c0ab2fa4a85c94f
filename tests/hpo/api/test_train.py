"""`hpo train`: the configuration beside a training names its images, and trains them again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpo.paths import studies_root
from hpo.space import load_recipe
from tests.hpo.commands import SPACE, RunHpo
from tests.hpo.digits import digit_pixels


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Thirty images of each of two classes in the working directory."""
    monkeypatch.chdir(tmp_path)
    pixels, labels = digit_pixels()
    for digit in (0, 1):
        (Path("photos") / str(digit)).mkdir(parents=True)
        for number, at in enumerate(np.flatnonzero(labels == digit)[:30]):
            Image.fromarray(pixels[at]).save(f"photos/{digit}/{number:02d}.png")
    return Path("photos")


RECIPE = "model: {widths: [8], blocks: [1]}\nepochs: 1\nbatch_size: 16\n"


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("data: {name: path/to/images}\n", ["--data", "photos"]), ("data: {name: photos}\n", [])],
    ids=["--data", "data.name"],
)
def test_a_training_can_be_repeated_from_its_configuration_alone(
    photos: Path, run_hpo: RunHpo, monkeypatch: pytest.MonkeyPatch, recipe: str, options: list[str]
) -> None:
    Path("small.yaml").write_text(recipe + RECIPE)
    run_hpo("train", "small.yaml", *options)
    [folder] = studies_root().glob("trainings/small-*")
    assert load_recipe(str(folder / "config.yaml")).config.data.name == str(photos.resolve())
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    run_hpo("train", str(folder / "config.yaml"))
    [again] = studies_root().glob("trainings/config-*")
    first, second = (json.loads((each / "result.json").read_text()) for each in (folder, again))
    for result in (first, second):
        for key in ("images_per_s", "elapsed_s"):
            result.pop(key, None)
    assert first == second


def test_the_configuration_of_a_trial_names_the_images_of_its_study(photos: Path, run_hpo: RunHpo) -> None:
    Path("own.yaml").write_text(SPACE)
    run_hpo("run", "own.yaml", "--trials", "1", "--data", "photos", "--set", "epochs=1")
    config = load_recipe(str(studies_root() / "own/trials/00000/config.yaml")).config
    assert config.data.name == str(photos.resolve())


def test_a_built_in_set_keeps_its_name(run_hpo: RunHpo, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("data: {name: digits}\n" + RECIPE)
    run_hpo("train", str(tmp_path / "small.yaml"))
    [folder] = studies_root().glob("trainings/small-*")
    assert load_recipe(str(folder / "config.yaml")).config.data.name == "digits"
