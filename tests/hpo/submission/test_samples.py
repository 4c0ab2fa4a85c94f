"""Submissions in the form of a sample: the sample's bytes, except in the cells of labels or probabilities."""

from __future__ import annotations

import csv
import io
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpo import predict
from hpo.errors import BundleError
from hpo.submission.predictions import Predictions
from hpo.submission.samples import Sample
from tests.hpo.commands import hpo
from tests.hpo.submission.test_bundle import CLASSES, write

PETS = ("cat", "dog", "emu")
IDS = ("1.png", "2.png", "10.png")


def predicted(ids: tuple[str, ...] = IDS, classes: tuple[str, ...] = PETS, broken: tuple[str, ...] = ()) -> Predictions:
    """Image i has class i, modulo the number of classes, with a probability of 0.5."""
    labels = torch.arange(len(ids)) % len(classes)
    probabilities = torch.full((len(ids), len(classes)), 0.5 / (len(classes) - 1))
    probabilities[torch.arange(len(ids)), labels] = 0.5
    return Predictions(ids, labels, probabilities, classes, broken)


def written(folder: Path, sample: bytes, predictions: Predictions) -> bytes:
    (folder / "sample.csv").write_bytes(sample)
    predictions.write(folder / "s.csv", like=folder / "sample.csv")
    return (folder / "s.csv").read_bytes()


# The bytes


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (b"id,label\n10.png,x\n1.png,x\n2.png,x\n", b"id,label\n10.png,emu\n1.png,cat\n2.png,dog\n"),
        (b"id,label\r\n10.png,x\r\n1.png,x\r\n2.png,x", b"id,label\r\n10.png,emu\r\n1.png,cat\r\n2.png,dog"),
        (b"\xef\xbb\xbfid;label\n10;0\n1;0\n2;0\n", b"\xef\xbb\xbfid;label\n10;emu\n1;cat\n2;dog\n"),
        (b'"id"\t"label"\n"10"\t""\n1\t\n2\t0\n', b'"id"\t"label"\n"10"\t"emu"\n1\tcat\n2\tdog\n'),
        (b"label,id\nx,10\nx,1\n\nx,2\n\n", b"label,id\nemu,10\ncat,1\n\ndog,2\n\n"),
        (b"Id, Category ,U\n10,?, a\n1,?,\"b,\n\"\n2,?,\n", b"Id, Category ,U\n10,emu, a\n1,cat,\"b,\n\"\n2,dog,\n"),
        (b"file|answer\r1|\r2|\r10|\r", b"file|answer\r1|cat\r2|dog\r10|emu\r"),
    ],
    ids=["order", "CRLF, no last line end", "mark, semicolons", "tabs, quotes", "ids last", "other columns", "old Mac"],
)  # fmt: skip
def test_only_the_cells_of_the_labels_differ_from_the_sample(tmp_path: Path, sample: bytes, expected: bytes) -> None:
    assert written(tmp_path, sample, predicted()) == expected


def test_any_sample_is_read_as_by_pythons_reader_and_written_back_byte_for_byte(tmp_path: Path) -> None:
    draw = random.Random(0)
    cells = ["a", "1.png", "", '"x"', '"a,b"', '"say ""hi"""', '"two\nlines"', "é", 'in"ner']
    for _ in range(200):
        end = draw.choice(["\n", "\r\n"])
        rows = [[draw.choice(cells) for _ in range(3)] for _ in range(4)]
        text = end.join(",".join(row) for row in [["id", "label", "c"], *rows]) + draw.choice(["", end])
        (tmp_path / "sample.csv").write_bytes(text.encode())
        sample = Sample.read(tmp_path / "sample.csv")
        assert [list(row.values) for row in (sample.header, *sample.rows)] == list(
            csv.reader(io.StringIO(text, newline=""))
        )
        assert "".join(",".join(row.cells) + row.end for row in (sample.header, *sample.rows)) == text


def test_a_class_with_a_separator_or_a_quote_in_its_name_is_quoted(tmp_path: Path) -> None:
    found = written(tmp_path, b"id,label\n1,\n2,\n10,\n", predicted(classes=("a,b", 'the "c"', "plain")))
    assert found == b'id,label\n1,"a,b"\n2,"the ""c"""\n10,plain\n'


# Ids


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        (("1.png", "2.png"), ("1.png", "2.png")),
        (("1.png", "2.png"), ("1", "2")),
        (("1.png", "2.png"), ("test/1.png", "test/2.png")),
        (("1.png", "2.png"), ("test\\1", "test\\2")),
        (("1.png", "2.png"), ("./1.png", " 2.png")),
        (("test/1.png", "test/2.png"), ("1.png", "2.png")),
        (("/data/test/1.png", "/data/test/2.png"), ("images/1", "images/2")),
        (("a/1.png", "b/1.png"), ("test/a/1", "test/b/1")),
        (("a/1.png", "a/1.jpg"), ("1.png", "1.jpg")),
        (("1.PNG", "2.jpeg"), ("1.png", "2.jpg")),
        (("v1.2.png", "v1.3.png"), ("v1.2", "v1.3")),
        (("0", "1"), ("0", "1")),
        (("cafe\u0301.png", "2.png"), ("caf\u00e9", "2")),
    ],
)
def test_ids_may_lack_extensions_and_folders_or_have_others(
    tmp_path: Path, ids: tuple[str, ...], wanted: tuple[str, ...]
) -> None:
    for order in (1, -1):
        sample = "id,label\n" + "".join(f"{name},\n" for name in wanted[::order])
        found = written(tmp_path, sample.encode(), predicted(ids, ("first", "second"))).decode()
        expected = dict(zip(wanted, ("first", "second"), strict=True))
        assert found == "id,label\n" + "".join(f"{name},{expected[name]}\n" for name in wanted[::order])


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("id,label\n1,\n2,\n", r"no id for 1 image: 10\.png; give the images that it lists, and no others"),
        ("id,label\n1,\n2,\n10,\n11,\n12,\n", "no image, or several, for 2 ids: 11, 12"),
        ("id,label\n1,\n3,\n4,\n5,\n6,\n", r"for 4 ids: 3, 4, 5 and 1 more; no id for 2 images: 2\.png, 10\.png"),
        ("id,label\n1,\n2,\n10,\n2.png,\n", r"no image, or several, for 3 ids|several rows for one image: 2, 2\.png"),
        ("id,label\n2,\n1,\n10,\n1,\n", "several rows for one image: 1, 1"),
        ("id,label\na,x\nb,y\n", r"none of its columns names the images; its first has a, b, the images are 1\.png"),
        ("id\n1\n", "no column besides the ids"),
        ("", "no column besides the ids"),
        ("id,label\n\n", "no row besides its header"),
        ("id,label\n1,\n2,,\n", r"sample\.csv:3: 3 columns, and the header has 2"),
        ('id,label\n"1\n",\n2\n', r"sample\.csv:4: 1 column,"),
        ("id,x,y\n1,,\n2,,\n10,,\n", r"which of its columns x, y to fill\? .*one for each class: cat, dog, emu"),
        ("id,cat,dog\n1,,\n2,,\n10,,\n", "no column for 1 of the model's 3 classes: emu"),
        ("id,cat,dog,emu,fox\n1,,,,\n2,,,,\n10,,,,\n", "no class for 1 column: fox"),
        ("id,cat,dog,emu,Cat\n1,,,,\n2,,,,\n10,,,,\n", "two columns for one class"),
        ("id,label\n1,0.5\n2,0.5\n10,0.5\n", r"label has 0\.5, a probability; name the column after its class"),
        ("PK\3\4", "the sample is no CSV in UTF-8; unpack it"),
        ("\0i\0d", "the sample is no CSV in UTF-8"),
    ],
)  # fmt: skip
def test_a_sample_that_does_not_fit_is_one_line_with_examples(tmp_path: Path, sample: str, message: str) -> None:
    with pytest.raises(BundleError, match=message) as raised:
        written(tmp_path, sample.encode(), predicted())
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path / "sample.csv"))
    assert not (tmp_path / "s.csv").exists()


def test_an_id_that_fits_two_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no image, or several, for 1 id: 1; no id for 2 images: a/1\.png, b/1\.png"):
        written(tmp_path, b"id,label\n1,\n2,\n", predicted(("a/1.png", "b/1.png", "2.png")))


def test_a_sample_that_is_not_there_or_is_the_output_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"none\.csv: the sample cannot be read \(No such file"):
        predicted().write(tmp_path / "s.csv", like=tmp_path / "none.csv")
    sample = tmp_path / "s.csv"
    sample.write_text("id,label\n1,\n2,\n10,\n")
    with pytest.raises(BundleError, match=r"s\.csv: the sample would be replaced by the output"):
        predicted().write(tmp_path / "s.csv", like=sample)


def test_ids_that_are_numbers_are_told_from_labels_that_are(tmp_path: Path) -> None:
    found = predicted(("0", "1", "2"), ("0", "1", "2"))
    assert written(tmp_path, b"label,id\n0,2\n0,1\n0,0\n", found) == b"label,id\n2,2\n1,1\n0,0\n"


# Columns


def test_one_column_for_each_class_takes_its_probability_in_any_order(tmp_path: Path) -> None:
    found = written(tmp_path, b"id,emu,Cat,p_dog\n10,0,0,0\n2,0,0,0\n1,0,0,0\n", predicted())
    assert found == b"id,emu,Cat,p_dog\n10,0.5,0.25,0.25\n2,0.25,0.25,0.5\n1,0.25,0.5,0.25\n"


def test_our_own_output_with_probabilities_is_a_sample_of_itself(tmp_path: Path) -> None:
    found = predicted(classes=("id", "label", "cat"))
    found.write(tmp_path / "own.csv", probabilities=True)
    own = (tmp_path / "own.csv").read_bytes()
    assert written(tmp_path, own.replace(b"0.5", b"0").replace(b"0.25", b"0"), found) == own


@pytest.mark.parametrize(
    ("header", "value", "classes"),
    [("dog", "0", ("cat", "dog")), ("has_cactus", "0.5", ("0", "1")), ("1", ".5", ("0", "1"))],
)
def test_one_column_of_two_classes_may_be_a_probability(
    tmp_path: Path, header: str, value: str, classes: tuple[str, ...]
) -> None:
    sample = f"id,{header}\n1,{value}\n2,{value}\n10,{value}\n"
    assert (
        written(tmp_path, sample.encode(), predicted(classes=classes)).decode()
        == f"id,{header}\n1,0.5\n2,0.5\n10,0.5\n"
    )


def test_probabilities_of_one_column_are_those_of_the_second_of_the_classes_0_and_1(tmp_path: Path) -> None:
    found = predicted(classes=("0", "1"))
    found.probabilities[:] = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    assert written(tmp_path, b"id,x\n1,0.5\n2,0.5\n10,0.5\n", found) == b"id,x\n1,0.1\n2,0.8\n10,0.6\n"
    assert written(tmp_path, b"id,x\n1,0\n2,0\n10,0\n", found) == b"id,x\n1,0\n2,1\n10,0\n"


def test_a_sample_of_other_labels_is_filled_with_class_names_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert written(tmp_path, b"id,label\n1,0\n2,0\n10,0\n", predicted()) == b"id,label\n1,cat\n2,dog\n10,emu\n"
    assert "its column label has 0, which is no class; class names such as cat are written" in caplog.text
    caplog.clear()
    written(tmp_path, b"id,label\n1,cat\n2,cat\n10,?\n", predicted())
    written(tmp_path, b"id,label\n1,\n2,\n10,\n", predicted())
    assert not caplog.text


def test_rows_of_skipped_images_stay_as_in_the_sample(tmp_path: Path) -> None:
    found = written(tmp_path, b"id,label\nbad,emu\n1,emu\n2,emu\n", predicted(IDS[:2], broken=("bad.png",)))
    assert found == b"id,label\nbad,emu\n1,cat\n2,dog\n"


# The command


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for number in range(1, 12):
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def test_plain_output_is_in_natural_order(tmp_path: Path, photos: Path) -> None:
    found = predict(write(tmp_path / "best"), photos, device="cpu")
    assert found.ids == tuple(f"{number}.png" for number in range(1, 12))


def test_the_command_fills_the_sample_with_the_labels_of_the_images(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write(tmp_path / "best")
    sample, output = tmp_path / "sample.csv", tmp_path / "s.csv"
    ids = [5, 11, 1, 2, 10, 3, 4, 9, 8, 7, 6]
    sample.write_text("image;class\n" + "".join(f"{number};?\n" for number in ids))
    command = ["predict", str(bundle), str(photos), "-o", str(output), "--like", str(sample), "--device", "cpu"]
    assert hpo(monkeypatch, *command) == 0
    found = predict(bundle, photos, device="cpu")
    label_of = dict(zip(found.ids, found.names, strict=True))
    assert output.read_text() == "image;class\n" + "".join(f"{n};{label_of[f'{n}.png']}\n" for n in ids)
    with sample.open("w", newline="") as file:
        csv.writer(file).writerows([["image", *reversed(CLASSES)], *([number, *[0] * len(CLASSES)] for number in ids)])
    assert hpo(monkeypatch, *command) == 0
    rows = list(csv.DictReader(output.read_text().splitlines()))
    for row in rows:
        shares = found.probabilities[found.ids.index(f"{row['image']}.png")].tolist()
        assert [float(row[name]) for name in CLASSES] == pytest.approx(shares, rel=1e-4)


def test_a_misfit_is_found_before_anything_is_labelled(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "3.png").write_bytes(b"no picture")  # would be an error of its own
    sample = tmp_path / "sample.csv"
    sample.write_text("id,label\n1,\n77,\n")
    command = [
        "predict",
        str(write(tmp_path / "best")),
        str(photos),
        "-o",
        str(tmp_path / "s.csv"),
        "--like",
        str(sample),
    ]
    assert hpo(monkeypatch, *command) == 2
    assert "no image, or several, for 1 id: 77; no id for 10 images: 2.png, 3.png, 4.png and 7 more" in (
        capsys.readouterr().err
    )
    assert hpo(monkeypatch, *command, "--probabilities") == 2
    assert "--like writes the columns of the sample, --probabilities adds others" in capsys.readouterr().err
