"""From a competition's unzipped data to its submission: run, refit, predict, on photographs of TrashNet."""

from __future__ import annotations

import random
import shutil
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest

from tests.hpo.commands import hpo

SPACE = """
data: {image_size: 16}
base: {model: {widths: [8], blocks: [1]}, epochs: 2, batch_size: 64}
pruner: {name: none}
search:
  optim.lr_scale: {low: 0.5, high: 4, log: true}
"""
PER_CLASS = {"train": 30, "val": 8, "test": 6}


@pytest.fixture
def competition(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`trash/train/<class>`, `trash/val/<class>`, and `trash/test` with numbered images, and a sample submission."""
    photos: dict[str, list[str]] = defaultdict(list)
    with zipfile.ZipFile(shared_data / "trashnet96.zip") as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".jpg"):
                photos[name.split("/")[0]].append(name)
        archive.extractall(tmp_path / "unzipped", [name for names in photos.values() for name in names[:44]])
    root, numbers = tmp_path / "trash", iter(range(1, 100))
    for label, names in photos.items():
        left = iter(names)
        for part, count in PER_CLASS.items():
            folder = root / part if part == "test" else root / part / label
            folder.mkdir(parents=True, exist_ok=True)
            for _ in range(count):
                photo = tmp_path / "unzipped" / next(left)
                shutil.copy(photo, folder / (f"{next(numbers)}.jpg" if part == "test" else photo.name))
    ids = sorted(int(photo.stem) for photo in (root / "test").iterdir())
    random.Random(0).shuffle(ids)
    sample = "".join(f"{number},{sorted(photos)[0]}\r\n" for number in ids)
    (root.parent / "sample_submission.csv").write_text(f"\ufeffid,label\r\n{sample}", newline="")
    (root.parent / "space.yaml").write_text(SPACE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_STUDIES", str(tmp_path / "studies"))
    monkeypatch.setenv("HPO_CACHE", str(tmp_path / "cache"))
    return root


@pytest.mark.slow
def test_a_submission_differs_from_its_sample_in_the_label_column_only(
    competition: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hpo(monkeypatch, "run", "space.yaml", "--data", "trash", "--study", "trash", "--trials", "2") == 0
    assert hpo(monkeypatch, "refit", "best") == 0
    capsys.readouterr()
    assert hpo(monkeypatch, "predict", "best", "trash/test", "--like", "sample_submission.csv") == 0
    assert "36 images labelled: submission.csv" in capsys.readouterr().out
    classes = {folder.name for folder in (competition / "train").iterdir()}
    sample, submission = (Path(f"{name}.csv").read_bytes().decode() for name in ("sample_submission", "submission"))
    assert len(sample.split("\r\n")) == len(submission.split("\r\n")) == 36 + 2
    labels = []
    for before, after in zip(sample.split("\r\n"), submission.split("\r\n"), strict=True):
        assert before.split(",")[0] == after.split(",")[0]
        assert before.count(",") == after.count(",")
        labels += after.split(",")[1:]
    assert labels[0] == "label"
    assert set(labels[1:]) <= classes
    assert len(set(labels[1:])) > 1
