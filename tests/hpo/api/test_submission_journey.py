"""From a folder of photos to a submission, with the mistakes of a first day, in one study."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpo.study import find_study
from tests.hpo.commands import RunHpo
from tests.hpo.workers.processes import wait_until
from tests.hpo.zygote import Hpo

SPACE = """
base: {model: {widths: [8], blocks: [1]}, epochs: 30, batch_size: 16, augment: {flip: 0.0}}
pruner: {name: none}
sampler: {name: random}
search:
  optim.lr_scale: {low: 0.5, high: 20, log: true}
"""
CLASSES = ("glass", "metal", "paper")
ORDER = (10, 2, 11, *range(3, 10), 1)
"""Of the images in the sample of the submission."""


def photo(seed: int, level: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """Noise of a class's brightness, (height, width)."""
    pixels = np.random.default_rng(seed).integers(level, level + 60, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with labelled photos of several sizes, unlabelled ones, and a sample of the submission."""
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(SPACE)
    for index, label in enumerate(CLASSES):
        Path("photos", label).mkdir(parents=True)
        for number in range(20):
            size = (16, 20) if number == 7 else (16, 16)
            photo(100 * index + number, 80 * index, size).save(Path("photos", label, f"{number}.png"))
    Path("new").mkdir()
    for number in range(1, 12):
        photo(1000 + number, 80 * (number % 3)).save(Path("new", f"{number}.png"))
    Path("sample_submission.csv").write_text("image;class\n" + "".join(f"{number};glass\n" for number in ORDER))
    return tmp_path


RUN = ("run", "own.yaml", "--data", "photos", "--trials", "3", "--device", "cpu")
SIZED = (*RUN, "--set", "data.image_size=16")


@pytest.mark.slow
def test_a_folder_becomes_a_submission_despite_the_mistakes_of_a_first_day(folder: Path, run_hpo: RunHpo) -> None:
    refuse_mistakes_before_a_study_begins(folder, run_hpo)
    resume_after_a_killed_worker(run_hpo)
    refuse_a_renamed_folder_and_an_added_image(folder, run_hpo)

    again = run_hpo(*SIZED, "--study", "mine")
    assert again.startswith("study mine is finished: all 3 trials are done; continue it with")
    assert "data.image_size=16" in again

    model = folder / "studies" / "mine" / "refit" / "best"
    assert f"hpo predict {model}" in run_hpo("refit", "best", "--no-confirm", "--device", "cpu")
    sample = ("--like", "sample_submission.csv", "-o", "submission.csv", "--device", "cpu")
    assert "11 images labelled" in run_hpo("predict", str(model), "new", *sample)
    header, *rows = Path("submission.csv").read_text().splitlines()
    assert header == "image;class"
    assert [row.split(";")[0] for row in rows] == [str(number) for number in ORDER]
    right = [row.split(";")[1] == CLASSES[number % 3] for row, number in zip(rows, ORDER, strict=True)]
    assert sum(right) >= 9, rows


def refuse_mistakes_before_a_study_begins(folder: Path, run_hpo: RunHpo) -> None:
    assert "fotos: no such file or folder" in run_hpo.fails("run", "own.yaml", "--data", "fotos")
    sizes = run_hpo.fails(*RUN)
    assert "differ in size" in sizes
    assert "glass/7.png" in sizes
    assert "--set data.image_size=" in sizes
    assert "did you mean data.image_size?" in run_hpo.fails(*RUN, "--set", "data.image_sise=16")
    run_hpo("run", "own.yaml", "--trails", "3", code=2)
    assert "No such option: --trails" in run_hpo.error
    assert "--trials" in run_hpo.error
    assert not (folder / "studies" / "own").exists()


def resume_after_a_killed_worker(run_hpo: RunHpo) -> None:
    run_hpo(*SIZED, "--workers", "0")
    worker = Hpo(["worker", "own", "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_until(lambda: find_study("own").counts().running, "a trial runs", process=worker)
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate()
    top = run_hpo("study", "top", "own", "--once")
    assert "1 left by a dead process" in top
    assert top.rstrip().endswith("hpo worker own")
    assert "3 of 3 trials finished" in run_hpo(*SIZED)


def refuse_a_renamed_folder_and_an_added_image(folder: Path, run_hpo: RunHpo) -> None:
    (folder / "studies" / "own").rename(folder / "studies" / "mine")
    assert "hpo study rename own mine" in run_hpo.fails(*SIZED, "--study", "mine")
    run_hpo("study", "rename", "own", "mine")
    added = folder / "photos" / "metal" / "new.png"
    photo(999, 80).save(added)
    assert "1 image more: metal/new.png; " in run_hpo.fails(*SIZED, "--study", "mine")
    added.unlink()
