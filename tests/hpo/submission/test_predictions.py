"""Predictions: from files or pixels to labels, in little memory, and to a CSV."""

from __future__ import annotations

import csv
import os
import socket
import tarfile
import weakref
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from core.data import ingest, unlabelled
from core.data.arrays import NpzSource
from core.errors import UserError
from hpo import predict
from hpo.errors import BundleError
from hpo.submission.bundle import load_bundle
from hpo.submission.predictions import Predictions, write_submission
from tests.hpo.commands import RunHpo
from tests.hpo.submission.test_bundle import CLASSES, write, write_ensemble

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
    found.write(str(tmp_path / "plain.csv"))
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


# Pixels that are at hand already


def some_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)


STACK = some_pixels(5, 12, 16, 3)
EXPECTED_SHAPES: dict[str, Any] = {
    "an array (N, H, W, C)": STACK,
    "a tensor (N, C, H, W)": torch.from_numpy(STACK).permute(0, 3, 1, 2),
    "arrays (H, W, C)": list(STACK),
    "tensors (C, H, W)": tuple(torch.from_numpy(STACK).permute(0, 3, 1, 2)),
    "Pillow images": [Image.fromarray(image) for image in STACK],
    "a mixture": [Image.fromarray(STACK[0]), STACK[1], torch.from_numpy(STACK[2]).permute(2, 0, 1), *STACK[3:]],
}


@pytest.mark.parametrize("kind", EXPECTED_SHAPES)
def test_the_same_pixels_have_the_same_labels_however_they_are_held(bundle: Path, kind: str) -> None:
    model = load_bundle(bundle, CPU)
    found = model.predict(EXPECTED_SHAPES[kind], batch_size=2)
    expected = model.probabilities(torch.from_numpy(STACK).permute(0, 3, 1, 2))
    assert found.ids == ("0", "1", "2", "3", "4")
    torch.testing.assert_close(found.probabilities, expected)
    assert torch.equal(found.labels, expected.argmax(1))
    assert found.names == tuple(CLASSES[label] for label in expected.argmax(1))
    assert torch.equal(found.confidences, found.probabilities.max(1).values)
    assert len(found) == 5


@pytest.mark.parametrize(
    "image",
    [some_pixels(12, 16), some_pixels(12, 16, 1), torch.from_numpy(some_pixels(1, 12, 16)), some_pixels(30, 50, 3)],
    ids=["grey (H, W)", "grey (H, W, 1)", "grey (1, H, W)", "of another size"],
)
def test_one_image_may_be_given_by_itself(bundle: Path, image: Any) -> None:
    assert load_bundle(bundle, CPU).predict(image).ids == ("0",)


def saved(folder: Path, name: str, image: Image.Image, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    image.save(folder / name, **options)
    return folder / name


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn it by a quarter
    return exif


@pytest.mark.parametrize(
    ("name", "image", "options"),
    [
        ("large.png", Image.fromarray(some_pixels(40, 61, 3)), {}),
        ("small.png", Image.fromarray(some_pixels(5, 7, 3)), {}),
        ("palette.png", Image.fromarray(some_pixels(12, 16, 3)).quantize(16), {}),
        ("transparent.png", Image.fromarray(some_pixels(12, 16, 4)), {}),
        ("sixteen.png", Image.fromarray(some_pixels(12, 16).astype(np.uint16) * 257), {}),
        ("turned.jpg", Image.fromarray(some_pixels(24, 30, 3)), {"exif": turned()}),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_an_opened_image_is_read_as_its_file_and_left_as_it_was(
    tmp_path: Path, name: str, image: Image.Image, options: dict[str, Any], channels: int
) -> None:
    path = saved(tmp_path / "photos", name, image, **options)
    model = load_bundle(write(tmp_path / "best", channels=channels), CPU)
    with Image.open(path) as opened:
        before = (opened.mode, opened.size, opened.tobytes())
        found = model.predict([opened, opened])
        assert (opened.mode, opened.size, opened.tobytes()) == before
    expected = model.predict(path)
    assert expected.ids == (name,)
    for row in found.probabilities:
        torch.testing.assert_close(row, expected.probabilities[0])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no image in the list"),
        (STACK.astype(np.float32) / 255, r"the images: pixels of type float32; give uint8 from 0 to 255"),
        (torch.rand(2, 3, 12, 16), r"the images: pixels of type float32; give uint8 from 0 to 255, not normalised"),
        ([STACK[0], STACK[1].astype(np.int64)], r"image 1: pixels of type int64"),
        (some_pixels(5, 12, 16), r"an array of shape \(5, 12, 16\).*of N grey images images\[\.\.\., None\]"),
        (
            some_pixels(5, 3, 12, 16),
            r"an array of shape \(5, 3, 12, 16\); give \(H, W\), \(H, W, C\) or \(N, H, W, C\)",
        ),
        (torch.from_numpy(STACK), r"a tensor of shape \(5, 12, 16, 3\).*channels stand before height and width"),
        (torch.from_numpy(some_pixels(12, 16)), r"a tensor of shape \(12, 16\); give \(C, H, W\) or \(N, C, H, W\)"),
        (STACK[:0], r"an array of shape \(0, 12, 16, 3\)"),
        ([STACK[0], STACK[:2]], r"image 1 of the list is a stack of 2 images; give a stack without a list"),
        (["a.png", STACK[0]], "paths and pixels in one list"),
        (7, "the images: int is not supported; give paths, Pillow images, numpy arrays or torch tensors"),
        ([None], "image 0: NoneType is not supported"),
        (Image.fromarray(np.ones((4, 4), np.float32)), r"image 0 cannot be read: floating-point pixels"),
    ],
)
def test_what_cannot_be_labelled_is_refused_in_one_line(bundle: Path, images: Any, message: str) -> None:
    with pytest.raises(BundleError, match=message) as raised:
        load_bundle(bundle, CPU).predict(images)
    assert "\n" not in str(raised.value)


def test_pixels_that_cannot_be_read_may_be_left_out(bundle: Path) -> None:
    floats = Image.fromarray(np.ones((4, 4), np.float32))
    found = load_bundle(bundle, CPU).predict([STACK[0], floats, STACK[1]], skip_broken=True, batch_size=2)
    assert (found.ids, found.broken) == (("0", "2"), ("1",))
    with pytest.raises(BundleError, match="none of 1 image can be read"):
        load_bundle(bundle, CPU).predict(floats, skip_broken=True)


# Several paths


def test_several_paths_are_labelled_in_their_order_under_their_names(bundle: Path, photos: Path) -> None:
    alone = load_bundle(bundle, CPU).predict(photos)
    by_id = dict(zip(alone.ids, alone.probabilities, strict=True))
    paths = [photos / "x" / "5.png", str(photos / "y"), as_zip(photos), photos / "x" / "5.png"]
    found = load_bundle(bundle, CPU).predict(paths)
    inside = ["x/1.png", "x/3.png", "x/5.png", "y/0.png", "y/2.png", "y/4.png"]
    assert found.ids == (
        str(photos / "x" / "5.png"),
        *(str(photos / "y" / name) for name in ("0.png", "2.png", "4.png")),
        *(str(photos.with_suffix(".zip") / name) for name in inside),
        str(photos / "x" / "5.png"),
    )
    for row, name in zip(
        found.probabilities, ["x/5.png", "y/0.png", "y/2.png", "y/4.png", *inside, "x/5.png"], strict=True
    ):
        torch.testing.assert_close(row, by_id[name])


def test_a_path_among_several_that_holds_nothing_is_named(bundle: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    model = load_bundle(bundle, CPU)
    with pytest.raises(UserError, match=r"empty: no images found"):
        model.predict([photos, tmp_path / "empty"])
    with pytest.raises(UserError, match=r"gone\.png: no such file"):
        model.predict([photos, tmp_path / "gone.png"])
    (photos / "x" / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"2 paths: 1 of 4 images cannot be read: .*1\.png \(not an image\)"):
        model.predict([photos / "x", photos / "y" / "0.png"])


def test_of_a_name_that_a_tar_holds_twice_the_later_image_counts(bundle: Path, photos: Path, tmp_path: Path) -> None:
    model = load_bundle(bundle, CPU)
    first, later = photos / "x" / "1.png", photos / "x" / "3.png"
    (tmp_path / "torn.png").write_bytes(b"no picture")
    for name, members in {"twice": (first, later), "mended": (tmp_path / "torn.png", later)}.items():
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            for member in members:
                archive.add(member, "a.png")
        found = model.predict(tmp_path / f"{name}.tar")
        assert found.ids == ("a.png",)
        torch.testing.assert_close(found.probabilities, model.predict(later).probabilities)
    with tarfile.open(tmp_path / "torn.tar", "w") as archive:
        archive.add(first, "a.png")
        archive.add(tmp_path / "torn.png", "a.png")
    with pytest.raises(UserError, match=r"1 of 1 images cannot be read: a\.png"):
        model.predict(tmp_path / "torn.tar")


# Memory


def as_tar(photos: Path) -> Path:
    with tarfile.open(photos.with_suffix(".tar.gz"), "w:gz") as archive:
        for path in sorted(photos.rglob("*.png"), reverse=True):
            archive.add(path, path.relative_to(photos))
    return photos.with_suffix(".tar.gz")


@pytest.mark.parametrize("pack", [lambda photos: photos, as_zip, as_tar, as_csv], ids=["folder", "zip", "tar", "csv"])
def test_however_many_images_there_are_few_are_in_memory_at_once(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Any
) -> None:
    for number in range(400):
        saved(tmp_path / "many", f"{number:03}.png", Image.fromarray(some_pixels(12, 16, 3)))
    asked = freed = most = 0

    def asking(payloads: Any) -> Any:
        nonlocal asked, most
        for batch in batches(payloads):
            asked += len(batch)
            most = max(most, asked - freed)
            yield batch

    def free() -> None:
        nonlocal freed
        freed += 1

    def watched(*arguments: Any) -> Any:
        for position, result in ingest.decode_all(*arguments):
            weakref.finalize(result.pixels, free)
            yield position, result

    batches = ingest._batches
    monkeypatch.setattr(ingest, "_batches", asking)
    monkeypatch.setattr(unlabelled, "decode_all", watched)
    monkeypatch.setattr(ingest, "BATCH", 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    found = load_bundle(bundle, CPU).predict(pack(tmp_path / "many"), batch_size=16)
    assert found.ids == tuple(f"{number:03}.png" for number in range(400))
    in_flight = 4 * (2 * ingest.IN_FLIGHT + 2)  # batches of 4 of two processes, and the one that is read out
    assert 0 < most <= in_flight + 2 * 16 < 400


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("layout", ["channels last", "channels first", "by columns"])
def test_an_npz_answers_alike_mapped_and_in_memory(bundle: Path, tmp_path: Path, save: Any, layout: str) -> None:
    stored = {
        "channels last": STACK,
        "channels first": STACK.transpose(0, 3, 1, 2).copy(),
        "by columns": np.asfortranarray(STACK),
    }
    save(tmp_path / "images.npz", other=np.arange(7), images=stored[layout])
    found = load_bundle(bundle, CPU).predict(tmp_path / "images.npz")
    torch.testing.assert_close(found.probabilities, load_bundle(bundle, CPU).predict(STACK).probabilities)


def test_an_npz_that_is_not_compressed_is_mapped_and_its_checksum_compared(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, images=STACK)
    [part] = NpzSource(path).load()
    assert isinstance(part.images, np.memmap)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"images\.npz: cannot be read as an \.npz of plain arrays \(Bad CRC-32"):
        NpzSource(path).load()


# The file


def test_a_folder_that_is_not_there_is_said_before_anything_is_labelled(
    bundle: Path, tmp_path: Path, run_hpo: RunHpo
) -> None:
    assert "none/s.csv: cannot be written (there is no such folder); give another file" in run_hpo.fails(
        "predict", str(bundle), "no_photos", "-o", str(tmp_path / "none" / "s.csv")
    )


def test_the_command_writes_what_the_model_says(bundle: Path, photos: Path, tmp_path: Path, run_hpo: RunHpo) -> None:
    (photos / "x" / "1.png").write_bytes(b"no picture")
    command = ["predict", str(bundle), str(photos), "-o", str(tmp_path / "s.csv"), "--device", "cpu", "--probabilities"]
    assert "1 of 6 images cannot be read: x/1.png" in run_hpo.fails(*command)
    assert "5 images labelled" in run_hpo(*command, "--skip-broken")
    load_bundle(bundle, CPU).predict(photos, skip_broken=True).write(tmp_path / "same.csv", probabilities=True)
    assert rows(tmp_path / "s.csv") == rows(tmp_path / "same.csv")


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
