"""`hpo data audit`: planted wrong labels are found by networks that were not trained on them."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpo.paths import StudyPaths, confirmation_of
from tests.hpo.commands import RunHpo, hpo, studies_in
from tests.hpo.digits import digit_pixels, rows_of

IMAGES, WRONG = 600, 30
SPACE = """
data: {{name: {images}, folds: 3}}
base:
  model: {{widths: [16, 32], blocks: [1, 1]}}
  epochs: 16
  batch_size: 32
  optim: {{lr_scale: 8}}
  augment: {{flip: 0.0}}
pruner: {{name: none}}
search:
  loss.smoothing: {{low: 0.0, high: 0.1}}
"""


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A finished study of folds on images of which some have another label, and their names with the true one."""
    root = tmp_path_factory.mktemp("noisy")
    rng = np.random.default_rng(0)
    wrong = set(rng.choice(IMAGES, WRONG, replace=False).tolist())
    truth = {}
    for number, (pixels, label) in enumerate(zip(*digit_pixels(), strict=True)):
        if number == IMAGES:
            break
        given = (label + 1 + number % 8) % 10 if number in wrong else label
        file = root / "images" / str(given) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        if number in wrong:
            truth[f"{given}/{number}.png"] = str(label)
    space = root / "noisy.yaml"
    space.write_text(SPACE.format(images=root / "images"))
    with studies_in(root) as patch:
        assert hpo(patch, "run", str(space), "--trials", "2") == 0
    return root, truth


@pytest.fixture(autouse=True)
def _there(noisy: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("studies", "cache"):
        monkeypatch.setenv(f"HPO_{name.upper()}", str(noisy[0] / name))


def test_planted_wrong_labels_are_among_the_first_suspects(
    noisy: tuple[Path, dict[str, str]], run_hpo: RunHpo, tmp_path: Path
) -> None:
    rows = list(csv.DictReader(run_hpo("data", "audit", "noisy", "--csv").splitlines()))
    first = [row for row in rows[:15] if row["image"] in noisy[1]]
    assert len(first) >= 7  # of about 24 in 480
    assert sum(row["suggested"] == noisy[1][row["image"]] for row in first) >= 6
    assert all(row["label"] == row["image"].split("/")[0] for row in rows)
    assert {row["networks"] for row in rows} == {"2"}  # of each trial, the network of one fold

    run_hpo("data", "audit", "noisy", "-o", str(tmp_path / "suspects.csv"))
    assert rows_of(tmp_path / "suspects.csv") == rows


def test_the_table_says_how_many_images_were_checked(run_hpo: RunHpo) -> None:
    output = run_hpo("data", "audit", "noisy")
    assert re.search(r"of 4[78]\d images", output)  # a fifth is the test set
    assert "contradicted by the 6 networks of study noisy, not trained on them" in output.replace("\n", " ")
    assert "p(suggested)" in output


def test_the_report_shows_the_suspects(noisy: tuple[Path, dict[str, str]], run_hpo: RunHpo, tmp_path: Path) -> None:
    run_hpo("report", "noisy", "-o", str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    assert 'id="labels"' in page
    assert sum(name in page for name in noisy[1]) >= 10
    assert "hpo data audit noisy --csv" in page


def test_without_stored_outputs_the_way_to_some_is_named(noisy: tuple[Path, dict[str, str]], run_hpo: RunHpo) -> None:
    files = StudyPaths.of("noisy").validation_outputs()
    contents = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    try:
        assert "hpo confirm noisy" in run_hpo.fails("data", "audit", "noisy")
    finally:
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)


def test_each_training_of_a_confirmation_stores_its_outputs(run_hpo: RunHpo) -> None:
    run_hpo("confirm", "noisy", "--budget", "0.3")
    confirmation = StudyPaths.of(confirmation_of("noisy"))
    complete = [
        folder for folder in confirmation.trials.iterdir() if (folder / "validation.fold3.safetensors").exists()
    ]
    assert len(complete) >= 2
    rows = list(csv.DictReader(run_hpo("data", "audit", "noisy", "--csv").splitlines()))
    assert max(int(row["networks"]) for row in rows) == 2 + len(complete)  # each is in a fold of every division
