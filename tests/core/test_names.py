"""Names of splits and classes, and files recognized by content."""

from __future__ import annotations

import itertools

import pytest

from core.data.names import class_order, fault_of_label, listed, look_alikes
from core.data.roles import is_split_word, split_of
from core.data.sniffing import looks_like_image
from tests.core.layouts import picture


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"), ("Training", "train"), ("TRAIN", "train"), ("seg_train", "train"),
        ("training_set", "train"),
        ("trainset", "train"), ("TrainImages", "train"), ("trainLabels", "train"), ("train2017", "train"),
        ("val", "val"), ("valid", "val"), ("validation", "val"), ("val_256", "val"),
        ("test", "test"), ("test1", "test"), ("Testing", "test"), ("test-images", "test"), ("PublicTest", "test"),
        ("contest", None), ("valve", None), ("trainer", None), ("latest", None), ("retrain", None), ("cat", None),
        ("train_test", None), ("train_val", None), ("", None), ("2017", None),
    ],
)  # fmt: skip
def test_a_split_is_named_by_a_word(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_a_word_alone_is_told_from_a_joined_one() -> None:
    assert is_split_word("Train")
    assert not is_split_word("train_1")


@pytest.mark.parametrize(
    "names",
    [
        ("01", "1", "001", "2"), ("9", "10", "100"), ("0.0", "2.0", "10.0"), ("1", "1.5", "2"), ("B", "a", "b"),
        ("1", "10", "x"), ("-1", "1", "10"),
    ],
)  # fmt: skip
def test_the_order_of_classes_does_not_depend_on_theirs(names: tuple[str, ...]) -> None:
    orders = {class_order(order) for order in itertools.permutations(names)}
    assert len(orders) == 1
    assert sorted(orders.pop()) == sorted(names)


def test_numbers_are_ordered_by_value_and_equal_ones_by_name() -> None:
    assert class_order(["10.0", "0.0", "2.0"]) == ("0.0", "2.0", "10.0")
    assert class_order(["2", "1", "01", "001"]) == ("001", "01", "1", "2")
    assert class_order(["10", "9", "nine"]) == ("10", "9", "nine")


@pytest.mark.parametrize("label", ["nan", "NaN", "inf", "-Infinity", "", "a\tb", "a\0"])
def test_a_label_that_is_no_class_has_a_fault(label: str) -> None:
    assert fault_of_label(label) is not None


@pytest.mark.parametrize("label", ["naan", "info", "0", "é", "a b", "None"])
def test_other_labels_have_none(label: str) -> None:
    assert fault_of_label(label) is None


def test_a_folder_may_be_called_nan() -> None:
    assert fault_of_label("nan", from_table=False) is None


def test_classes_that_look_alike_are_named_together() -> None:
    assert look_alikes(["Cat", "cat", "dog", "01", "1", "10", "0.5"]) == [
        "the classes 01, 1 differ only by case or leading zeros",
        "the classes Cat, cat differ only by case or leading zeros",
    ]


def test_a_list_of_names_is_cut_and_escaped() -> None:
    assert listed(["a", "b\n"]) == "a, b\\n"
    assert listed([str(i) for i in range(1005)], 2) == "0, 1 and 1,003 more"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF"])
def test_images_are_recognized_by_their_first_bytes(kind: str) -> None:
    assert looks_like_image(picture("x", kind)[:32])


@pytest.mark.parametrize(
    "content", [b"", b"BMW is a car, not an image", b"P6\x01", b"\xff\xd8", b"GIF", b"RIFF1234WAVE"]
)
def test_other_files_are_not(content: bytes) -> None:
    assert not looks_like_image(content[:32])
