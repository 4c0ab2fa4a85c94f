"""Predictions: from any source of images to a CSV."""

from __future__ import annotations

import csv
import socket
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from hpo.bundle import load_bundle
from hpo.errors import BundleError
from hpo.predict import Predictions, predict, write_submission
from tests.hpo.test_bundle import CLASSES, write, write_ensemble

CPU = torch.device("cpu")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle for colour images of 12 × 16."""
    return write(tmp_path / "best")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six photographs in two folders, larger than the network's input."""
    root, rng = tmp_path / "photos", np.random.default_rng(0)
    for number in range(6):
        path = root / ("x" if number % 2 else "y") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(path)
    return root


def rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def as_zip(photos: Path) -> Path:
    archive = photos.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(photos.rglob("*.png")):
            file.write(path, path.relative_to(photos))
    return archive


def as_csv(photos: Path) -> Path:
    table = photos / "list.csv"
    table.write_text("path\n" + "".join(f"{path.relative_to(photos)}\n" for path in sorted(photos.rglob("*.png"))))
    return table


@pytest.mark.parametrize("pack", [lambda photos: photos, as_zip, as_csv], ids=["folder", "zip", "csv"])
def test_every_source_gives_the_same_labels_under_relative_paths(bundle: Path, photos: Path, pack: Any) -> None:
    expected = predict(bundle, photos, device=CPU)
    found = predict(bundle, pack(photos), device=CPU)
    assert set(found.ids) == {"y/0.png", "x/1.png", "y/2.png", "x/3.png", "y/4.png", "x/5.png"}
    assert dict(zip(found.ids, found.names, strict=True)) == dict(zip(expected.ids, expected.names, strict=True))


def test_an_npz_gives_positions_and_the_bundles_own_answers(bundle: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (7, 12, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    found = predict(bundle, tmp_path / "images.npz", device=CPU, batch_size=3)
    expected = load_bundle(bundle, CPU).probabilities(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert [int(name) for name in found.ids] == list(range(7))
    torch.testing.assert_close(found.probabilities, expected)
    assert torch.equal(found.labels, expected.argmax(1))


def test_an_ensemble_labels_images_as_one_network_does(photos: Path, tmp_path: Path) -> None:
    ensemble = write_ensemble(tmp_path / "best.folds3")
    found = predict(ensemble, photos, device=CPU)
    assert len(found.ids) == 6
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(6))
    assert torch.equal(found.labels, found.probabilities.argmax(1))
    torch.testing.assert_close(predict(ensemble, photos, device=CPU, batch_size=1).probabilities, found.probabilities)


def test_the_csv_has_id_and_label_and_on_request_the_probabilities(bundle: Path, photos: Path, tmp_path: Path) -> None:
    found = predict(bundle, photos, device=CPU)
    found.write(tmp_path / "plain.csv")
    found.write(tmp_path / "full.csv", probabilities=True)
    plain, full = rows(tmp_path / "plain.csv"), rows(tmp_path / "full.csv")
    assert plain[0] == ["id", "label"]
    assert full[0] == ["id", "label", *CLASSES]
    assert (
        [row[:2] for row in full[1:]] == plain[1:] == [list(pair) for pair in zip(found.ids, found.names, strict=True)]
    )
    for row in full[1:]:
        shares = [float(share) for share in row[2:]]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert CLASSES[int(np.argmax(shares))] == row[1]


def test_broken_images_are_an_error_or_left_out_and_named(bundle: Path, photos: Path) -> None:
    (photos / "x" / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1\.png"):
        predict(bundle, photos, device=CPU)
    found = predict(bundle, photos, device=CPU, skip_broken=True)
    assert found.broken == ("x/1.png",)
    assert len(found.ids) == len(found.labels) == 5


def test_no_image_at_all_is_one_line(bundle: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="empty"):
        predict(bundle, empty, device=CPU)
    (empty / "a.png").write_bytes(b"no picture")
    with pytest.raises((UserError, BundleError)) as raised:
        predict(bundle, empty, device=CPU, skip_broken=True)
    assert "\n" not in str(raised.value)


def test_the_network_is_not_used(bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert len(predict(bundle, photos, device=CPU).ids) == 6


# The file


def test_names_with_commas_quotes_and_lines_come_back_as_they_are(tmp_path: Path) -> None:
    ids, classes = ('a,"b".png', "c\nd.png", "é.png"), ("x, y", 'the "z"')
    write_submission(tmp_path / "s.csv", ids, torch.tensor([0, 1, 0]), classes)
    assert rows(tmp_path / "s.csv")[1:] == [[ids[0], "x, y"], [ids[1], 'the "z"'], [ids[2], "x, y"]]


def test_a_file_name_that_is_no_utf8_keeps_its_bytes(tmp_path: Path) -> None:
    write_submission(
        tmp_path / "s.csv", (b"caf\xe9.png".decode("utf-8", "surrogateescape"),), torch.tensor([0]), ("a",)
    )
    assert (tmp_path / "s.csv").read_bytes() == b"id,label\ncaf\xe9.png,a\n"


def test_classes_called_id_or_label_do_not_make_two_columns_of_one_name(tmp_path: Path) -> None:
    classes = ("id", "label", "cat")
    found = Predictions(("0",), torch.tensor([1]), torch.tensor([[1e-9, 0.75, 0.25]]), classes, ())
    found.write(tmp_path / "s.csv", probabilities=True)
    assert rows(tmp_path / "s.csv") == [
        ["id", "label", "p_id", "p_label", "cat"],
        ["0", "label", "1e-09", "0.75", "0.25"],
    ]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"none/s\.csv: cannot be written \(No such file or directory\)"):
        write_submission(tmp_path / "none" / "s.csv", ("0",), torch.tensor([0]), ("a",))


def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("old")
    with pytest.raises(IndexError):
        write_submission(path, ("0", "1"), torch.tensor([0, 5]), ("a",))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
