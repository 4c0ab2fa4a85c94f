"""The main job from start to end: run, stop, resume, refit, predict. Real digits, real processes, real signals."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.hpo.commands import RunHpo, hpo, studies_in
from tests.hpo.digits import check_predictions, digit_pixels, rows_of, write_digits
from tests.hpo.storage.journals import finished_of, trials_of
from tests.hpo.workers.processes import wait_until
from tests.hpo.zygote import Hpo

# A study small enough for a test: three epochs, and rungs after the first and the second.
TINY = ["--set", "model.widths=[16]", "--set", "model.blocks=[1]", "--set", "batch_size=64"]
SMALL = ["--set", "epochs=3", "--set", "pruner.rungs=[0.3, 0.6]", *TINY]


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The studies folder of a finished and refitted study of four trials."""
    studies = tmp_path_factory.mktemp("main") / "studies"
    with studies_in(studies.parent) as patch:
        assert hpo(patch, "run", "digits", "--trials", "4", *SMALL) == 0
        assert hpo(patch, "refit", "best", "--no-confirm") == 0
    return studies


@pytest.fixture
def finished(finished_once: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder, in which commands find the study."""
    monkeypatch.setenv("HPO_STUDIES", str(finished_once))
    return finished_once


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
    tried = [(each["step"], each["name"]) for each in metrics["decision"]["candidates"]]
    averages = [("average", name) for name in ("own", "ema_0.01", "ema_0.03", "ema_0.1")]
    assert tried[:5] == [*averages, ("views", "none")]
    assert tried[5:] in ([], [("views", "shift")])  # shifts only if the winner's crops shift by a pixel of eight
    assert metrics["test"]["opened"] == 1
    rows = rows_of(bundle / "submission.csv")
    assert len(rows) == metrics["test"]["images"] == 359
    for path in bundle.iterdir():
        assert not path.read_bytes().startswith((b"\x80", b"PK")), f"{path.name} may be a pickle"


def test_a_second_refit_counts_a_second_opening_and_writes_the_same_weights(finished: Path, run_hpo: RunHpo) -> None:
    weights = finished / "digits/refit/best/model.safetensors"
    before = weights.read_bytes()
    said = run_hpo("refit", "best", "--no-confirm", "--study", "digits")
    assert weights.read_bytes() == before
    assert "2 times" in said


def test_a_trial_without_kept_weights_can_be_refitted(finished: Path, run_hpo: RunHpo) -> None:
    (finished / "digits/trials/00000/model.safetensors").unlink(missing_ok=True)
    run_hpo("refit", "0")
    assert (finished / "digits/refit/00000/metrics.json").exists()


@pytest.mark.parametrize("number", ["17", "-1", "worst"])
def test_a_missing_trial_cannot_be_refitted(finished: Path, number: str, run_hpo: RunHpo) -> None:
    run_hpo("refit", number, code=2)
    assert number in run_hpo.error


def test_a_bundle_labels_a_folder_of_images(finished: Path, tmp_path: Path, run_hpo: RunHpo) -> None:
    photos, out = write_digits(tmp_path / "photos", 50), tmp_path / "submission.csv"
    bundle = str(finished / "digits/refit/best")
    run_hpo("predict", bundle, str(photos), "-o", str(out), "--probabilities")
    check_predictions(out, 50)


def test_the_same_command_with_a_larger_total_resumes(tmp_path: Path, run_hpo: RunHpo) -> None:
    run_hpo("run", "digits", "--trials", "2", *SMALL)
    run_hpo("run", "digits", "--trials", "3", *SMALL)
    study = tmp_path / "studies/digits"
    assert sorted(finished_of(study)) == [0, 1, 2]
    said = run_hpo("run", "digits", "--trials", "3", *SMALL)  # nothing left to do
    assert sorted(finished_of(study)) == [0, 1, 2]
    assert "hpo refit best" in said


def test_a_changed_space_shows_the_difference_and_the_fix(run_hpo: RunHpo) -> None:
    run_hpo("run", "digits", "--trials", "1", *SMALL)
    run_hpo("run", "digits", "--trials", "2", *SMALL, "--set", "loss.smoothing=0.1", code=2)
    assert "search.loss.smoothing: removed" in run_hpo.error
    assert "--study" in run_hpo.error


INTERRUPTED = ("run", "digits", "--trials", "4", "--seed", "3", "--set", "epochs=20", *TINY)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Any, ...]]:
    """The same study without an interrupt."""
    studies = tmp_path_factory.mktemp("twin") / "studies"
    with studies_in(studies.parent) as patch:
        assert hpo(patch, *INTERRUPTED) == 0
    return finished_of(studies / "digits")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda stop: stop.name)
def test_an_interrupted_study_ends_like_an_uninterrupted_one(
    tmp_path: Path, stop: signal.Signals, uninterrupted: dict[int, tuple[Any, ...]], run_hpo: RunHpo
) -> None:
    study = tmp_path / "studies/digits"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = Hpo(INTERRUPTED, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    rows = study / "trials/00001/metrics.jsonl"
    wait_until(lambda: rows.exists() and rows.stat().st_size, "trial 1 has ended an epoch", process=process)
    process.send_signal(stop)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if stop != signal.SIGKILL else -signal.SIGKILL), said
    if stop != signal.SIGKILL:
        assert "Traceback" not in said
        assert [trial.state.name for trial in trials_of(study)].count("RUNNING") == 0
    run_hpo(*INTERRUPTED)
    resumed = finished_of(study)
    assert resumed == uninterrupted
    assert sorted(resumed) == [0, 1, 2, 3]
    assert [trial.state.name for trial in trials_of(study)].count("RUNNING") == 0


def digits_npz(path: Path, *, shuffle_test: bool) -> None:
    """Digits with a test set of their own, whose labels may be shuffled."""
    images, labels = digit_pixels()
    test = labels[1400:].copy()
    if shuffle_test:
        np.random.default_rng(0).shuffle(test)
    np.savez(path, x_train=images[:1400], y_train=labels[:1400], x_test=images[1400:], y_test=test)


def test_with_the_test_labels_shuffled_refit_writes_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo
) -> None:
    weights, accuracies = [], []
    for shuffled in (False, True):
        folder = tmp_path / f"shuffled_{shuffled}"
        folder.mkdir()
        digits_npz(folder / "own.npz", shuffle_test=shuffled)
        monkeypatch.setenv("HPO_STUDIES", str(folder / "studies"))
        own = str(folder / "own.npz")
        run_hpo("run", "digits", "--trials", "2", *SMALL, "--set", "optim.lr_scale=30", "--data", own)
        run_hpo("refit", "best", "--no-confirm")
        bundle = folder / "studies/digits/refit/best"
        weights.append(hashlib.sha256((bundle / "model.safetensors").read_bytes()).hexdigest())
        accuracies.append(json.loads((bundle / "metrics.json").read_text())["test"]["with_tta"]["accuracy"])
    assert weights[0] == weights[1]
    assert accuracies[1] < 0.3 < accuracies[0]


def test_a_missing_download_names_the_url_the_folder_and_the_size(
    monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("socket.getaddrinfo", _no_network)
    run_hpo("run", "stl10_small", "--trials", "200", code=2)
    *downloading, error = run_hpo.error.strip().splitlines()
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
    settings: list[str], said: str, tmp_path: Path, run_hpo: RunHpo
) -> None:
    options = [word for setting in settings for word in ("--set", setting)]
    assert said in run_hpo.fails("run", "digits", *options)
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


def test_stl10_reads_torchvisions_files(tmp_path: Path, run_hpo: RunHpo) -> None:
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
    run_hpo(*arguments, "--set", "data.val_fraction=0.25")
    assert len(finished_of(tmp_path / "studies/stl10_small")) == 2


@pytest.mark.slow
def test_real_photographs_go_from_a_zip_to_a_submission(shared_data: Path, tmp_path: Path, run_hpo: RunHpo) -> None:
    """Search, refit and predict on 5,000 photographs, made small enough for two cores."""
    values = {
        "epochs": 2,
        "pruner.rungs": "[0.5]",
        "model.width": 0.25,
        "model.depth": 0.5,
        "model.stem_stride": 2,
        "model.max_pool": "true",
        "batch_size": 128,
        "augment.ops": 1,
        "data.image_size": 40,
        "data.near_duplicates": "ignored",  # looking for them takes longer than the training
    }
    sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    archive = shared_data / "scenes5k.zip"
    own = tmp_path / "space.yaml"  # the space's recipes would be trained too: a minute each
    own.write_text(
        "base: recipes/stl10_custom_resnet.yaml\n"
        "data: {val_fraction: 0.1}\n"
        "search: {optim.lr_scale: {low: 0.1, high: 10, log: true}, augment.strength: {low: 0, high: 1}}\n"
    )
    run_hpo("run", str(own), "--data", str(archive), "--trials", "2", "--study", "scenes", *sets)
    run_hpo("refit", "best", "--no-confirm")
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
    run_hpo("predict", str(bundle), str(photos), "-o", str(tmp_path / "out.csv"))
    rows = rows_of(tmp_path / "out.csv")
    assert {row["id"] for row in rows} == truth.keys()
    assert sum(row["label"] == truth[row["id"]] for row in rows) / len(rows) > 0.4
