"""The main job from start to end: run, stop, resume, refit, predict. Real digits, real processes, real signals."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import subprocess
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.hpo.commands import hpo
from tests.hpo.storage.journals import finished_of, trials_of
from tests.hpo.zygote import Hpo

# A study small enough for a test: three epochs, and rungs after the first and the second.
SMALL = ["--set", "epochs=3", "--set", "batch_size=64", "--set", "pruner.rungs=[0.3, 0.6]"]


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The studies folder of a finished and refitted study of four trials."""
    studies = tmp_path_factory.mktemp("main") / "studies"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_STUDIES", str(studies))
        patch.setenv("HPO_CACHE", str(studies.parent / "cache"))
        assert hpo(patch, "run", "digits", "--trials", "4", *SMALL) == 0
        assert hpo(patch, "refit", "best", "--no-confirm") == 0
    return studies


def test_the_studys_folder_has_the_documented_layout(finished: Path) -> None:
    study = finished / "digits"
    for name in ("journal.log", "study.yaml", "artifacts", "trials/00000/config.yaml", "trials/00003/metrics.jsonl"):
        assert (study / name).exists(), name
    assert [path.name for path in sorted((study / "trials").iterdir())] == ["00000", "00001", "00002", "00003"]
    rows = [json.loads(line) for line in (study / "trials/00000/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert not list((study / "checkpoints").glob("*")) if (study / "checkpoints").exists() else True


def test_the_baseline_is_trial_0_and_never_pruned(finished: Path) -> None:
    first = trials_of(finished / "digits")[0]
    assert first.state.name == "COMPLETE"
    assert len(first.intermediate_values) == 3


def test_the_bundle_has_the_documented_files_and_no_pickle(finished: Path) -> None:
    bundle = finished / "digits/refit/best"
    assert {path.name for path in bundle.iterdir()} >= {
        "model.safetensors", "config.yaml", "classes.json", "metrics.json", "confusion.png", "submission.csv",
        "README.md",
    }  # fmt: skip
    metrics = json.loads((bundle / "metrics.json").read_text())
    for part in ("test", "val"):
        for tta in ("with_tta", "without_tta"):
            assert 0 < metrics[part][tta]["accuracy"] <= 1
            assert len(metrics[part][tta]["per_class"]) == 10
    assert metrics["tta"]["chosen"] in metrics["tta"]["val_candidates"]
    assert metrics["test"]["opened"] == 1
    rows = rows_of(bundle / "submission.csv")
    assert len(rows) == metrics["test"]["images"] == 359
    for path in bundle.iterdir():
        assert not path.read_bytes().startswith((b"\x80", b"PK")), f"{path.name} may be a pickle"


def test_a_second_refit_counts_a_second_opening_and_writes_the_same_weights(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HPO_STUDIES", str(finished))
    weights = finished / "digits/refit/best/model.safetensors"
    before = weights.read_bytes()
    assert hpo(monkeypatch, "refit", "best", "--no-confirm", "--study", "digits") == 0
    assert weights.read_bytes() == before
    assert "2 times" in capsys.readouterr().out


def test_a_trial_without_kept_weights_can_be_refitted(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_STUDIES", str(finished))
    (finished / "digits/trials/00000/model.safetensors").unlink(missing_ok=True)
    assert hpo(monkeypatch, "refit", "0") == 0
    assert (finished / "digits/refit/00000/metrics.json").exists()


@pytest.mark.parametrize("number", ["17", "-1", "worst"])
def test_a_missing_trial_cannot_be_refitted(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: str
) -> None:
    monkeypatch.setenv("HPO_STUDIES", str(finished))
    assert hpo(monkeypatch, "refit", number) == 2
    assert number in capsys.readouterr().err


def test_a_bundle_labels_a_folder_of_images(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_digits()
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(50):
        pixels = (source.images[number] * (255 / 16)).round().astype(np.uint8)
        Image.fromarray(pixels).save(photos / f"{number:03d}.png")
    out = tmp_path / "submission.csv"
    bundle = str(finished / "digits/refit/best")
    assert hpo(monkeypatch, "predict", bundle, str(photos), "-o", str(out), "--probabilities") == 0
    rows = rows_of(out)
    assert list(rows[0]) == ["id", "label", *"0123456789"]
    assert [row["id"] for row in rows] == [f"{number:03d}.png" for number in range(50)]
    for row in rows:
        chances = {name: float(row[name]) for name in "0123456789"}
        assert sum(chances.values()) == pytest.approx(1, abs=1e-3)
        assert row["label"] == max(chances, key=chances.__getitem__)


def test_the_same_command_with_a_larger_total_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hpo(monkeypatch, "run", "digits", "--trials", "2", *SMALL) == 0
    assert hpo(monkeypatch, "run", "digits", "--trials", "3", *SMALL) == 0
    study = tmp_path / "studies/digits"
    assert sorted(finished_of(study)) == [0, 1, 2]
    capsys.readouterr()
    assert hpo(monkeypatch, "run", "digits", "--trials", "3", *SMALL) == 0  # nothing left to do
    assert sorted(finished_of(study)) == [0, 1, 2]
    assert "hpo refit best" in capsys.readouterr().out


def test_a_changed_space_shows_the_difference_and_the_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hpo(monkeypatch, "run", "digits", "--trials", "1", *SMALL) == 0
    assert hpo(monkeypatch, "run", "digits", "--trials", "2", *SMALL, "--set", "loss.smoothing=0.1") == 2
    told = capsys.readouterr().err
    assert "search.loss.smoothing: removed" in told
    assert "--study" in told


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return Hpo(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def wait_for_line(path: Path, process: subprocess.Popen[str], *, seconds: float = 120) -> None:
    """Until the file has a line."""
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text().count("\n")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


INTERRUPTED = ("run", "digits", "--trials", "4", "--seed", "3", "--set", "epochs=20")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Any, ...]]:
    """The same study without an interrupt."""
    studies = tmp_path_factory.mktemp("twin") / "studies"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_STUDIES", str(studies))
        patch.setenv("HPO_CACHE", str(studies.parent / "cache"))
        assert hpo(patch, *INTERRUPTED) == 0
    return finished_of(studies / "digits")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda stop: stop.name)
def test_an_interrupted_study_ends_like_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: signal.Signals, uninterrupted: dict[int, tuple[Any, ...]]
) -> None:
    study = tmp_path / "studies/digits"
    process = start(*INTERRUPTED)
    wait_for_line(study / "trials/00001/metrics.jsonl", process)  # one trial finished, one running
    process.send_signal(stop)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if stop != signal.SIGKILL else -signal.SIGKILL), said
    if stop != signal.SIGKILL:
        assert "Traceback" not in said
        assert [trial.state.name for trial in trials_of(study)].count("RUNNING") == 0
    assert hpo(monkeypatch, *INTERRUPTED) == 0
    resumed = finished_of(study)
    assert resumed == uninterrupted
    assert sorted(resumed) == [0, 1, 2, 3]
    assert [trial.state.name for trial in trials_of(study)].count("RUNNING") == 0


def digits_npz(path: Path, *, shuffle_test: bool) -> None:
    """Digits with a test set of their own, whose labels may be shuffled."""
    source = load_digits()
    images = (source.images * (255 / 16)).round().astype(np.uint8)
    labels = source.target
    test = labels[1400:].copy()
    if shuffle_test:
        np.random.default_rng(0).shuffle(test)
    np.savez(path, x_train=images[:1400], y_train=labels[:1400], x_test=images[1400:], y_test=test)


def test_with_the_test_labels_shuffled_refit_writes_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, accuracies = [], []
    for shuffled in (False, True):
        folder = tmp_path / f"shuffled_{shuffled}"
        folder.mkdir()
        digits_npz(folder / "own.npz", shuffle_test=shuffled)
        monkeypatch.setenv("HPO_STUDIES", str(folder / "studies"))
        own = str(folder / "own.npz")
        assert hpo(monkeypatch, "run", "digits", "--trials", "2", *SMALL, "--data", own) == 0
        assert hpo(monkeypatch, "refit", "best", "--no-confirm") == 0
        bundle = folder / "studies/digits/refit/best"
        weights.append(hashlib.sha256((bundle / "model.safetensors").read_bytes()).hexdigest())
        accuracies.append(json.loads((bundle / "metrics.json").read_text())["test"]["with_tta"]["accuracy"])
    assert weights[0] == weights[1]
    assert accuracies[1] < 0.3 < accuracies[0]


def test_a_missing_download_names_the_url_the_folder_and_the_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("socket.getaddrinfo", _no_network)
    assert hpo(monkeypatch, "run", "stl10_small", "--trials", "200") == 2
    *downloading, error = capsys.readouterr().err.strip().splitlines()
    assert len(downloading) == 1
    assert "GB" in downloading[0]
    assert error.startswith("hpo: ")
    assert "stl10_binary" in error
    assert "hpo run digits" in error


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.widths=[8, 8, 8, 8, 8]", "model.blocks=[1, 1, 1, 1, 1]"], "down to a side of 1 pixel"),
        (["model.name=timm/resnet10t", "model.widths=[64, 128, 256, 512]", "model.blocks=[2, 2, 2, 2]",
          "model.width=1.0", "model.pretrained=true", "model.pretrained_file=no.pth"], "no.pth: no such file"),
    ],
)  # fmt: skip
def test_a_baseline_that_cannot_be_built_starts_no_study(
    settings: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [word for setting in settings for word in ("--set", setting)]
    assert hpo(monkeypatch, "run", "digits", *options) == 2
    [error] = capsys.readouterr().err.strip().splitlines()
    assert said in error
    assert not (tmp_path / "studies" / "digits").exists()


def _no_network(*arguments: Any, **options: Any) -> Any:
    raise OSError("Temporary failure in name resolution")


def stl10_binaries(root: Path) -> None:
    """Files as torchvision leaves STL-10, with a few random images in them."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for part, count in (("train", 60), ("test", 40)):
        draw.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tofile(folder / f"{part}_X.bin")
        (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(folder / f"{part}_y.bin")
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    (folder / "class_names.txt").write_text("\n".join(names) + "\n")
    (folder / "fold_indices.txt").write_text(" ".join(map(str, range(60))) + "\n")


def test_stl10_reads_torchvisions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stl10_binaries(tmp_path / "data")
    tiny = [
        "epochs=2",
        "model.width=0.125",
        "model.depth=0.5",
        "batch_size=32",
        "model.stem_stride=2",
        "averaging.name=ema",
    ]
    sets = [part for assignment in tiny for part in ("--set", assignment)]
    arguments = ["run", "stl10_small", "--trials", "2", "--data", str(tmp_path / "data"), *sets]
    assert hpo(monkeypatch, *arguments, "--set", "data.val_fraction=0.25") == 0
    assert len(finished_of(tmp_path / "studies/stl10_small")) == 2


@pytest.mark.slow
def test_real_photographs_go_from_a_zip_to_a_submission(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Search, refit and predict on 5,000 photographs, made small enough for two cores."""
    values = {
        "epochs": 3,
        "pruner.rungs": "[0.3]",
        "model.width": 0.25,
        "model.depth": 0.5,
        "model.stem_stride": 2,
        "model.max_pool": "true",
        "batch_size": 128,
        "augment.ops": 1,
        "data.image_size": 56,
    }
    sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    archive = shared_data / "scenes5k.zip"
    own = tmp_path / "space.yaml"  # the space's recipes would be trained too: a minute each
    own.write_text(
        "base: recipes/stl10_custom_resnet.yaml\n"
        "data: {val_fraction: 0.1}\n"
        "search: {optim.lr_scale: {low: 0.1, high: 10, log: true}, augment.strength: {low: 0, high: 1}}\n"
    )
    assert hpo(monkeypatch, "run", str(own), "--data", str(archive), "--trials", "2", "--study", "scenes", *sets) == 0
    assert hpo(monkeypatch, "refit", "best", "--no-confirm") == 0
    bundle = tmp_path / "studies/scenes/refit/best"
    metrics = json.loads((bundle / "metrics.json").read_text())
    assert metrics["test"]["images"] == 2997
    assert metrics["test"]["without_tta"]["accuracy"] > 0.4  # six classes

    photos, truth = tmp_path / "photos", {}
    photos.mkdir()
    with zipfile.ZipFile(archive) as packed:
        members = [name for name in packed.namelist() if "test/" in name and name.endswith(".jpg")]
        for number, member in enumerate(members[:: len(members) // 60]):
            (photos / f"{number}.jpg").write_bytes(packed.read(member))
            truth[f"{number}.jpg"] = Path(member).parent.name
    assert hpo(monkeypatch, "predict", str(bundle), str(photos), "-o", str(tmp_path / "out.csv")) == 0
    rows = rows_of(tmp_path / "out.csv")
    assert {row["id"] for row in rows} == truth.keys()
    assert sum(row["label"] == truth[row["id"]] for row in rows) / len(rows) > 0.4
