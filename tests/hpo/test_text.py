"""Sentences that several views share."""

from __future__ import annotations

import pytest

from core.data import DataReport
from core.errors import CheckpointError
from hpo.errors import BundleError
from hpo.text import data_facts


@pytest.mark.parametrize("kind", [CheckpointError, BundleError])
def test_the_message_of_an_error_has_no_control_characters(kind: type[Exception]) -> None:
    assert str(kind("a\x1b[2J\0\nb\r")) == "a\\x1b[2J\\x00\nb\\r"


def test_the_content_of_a_data_set_is_described_by_heading() -> None:
    counts = {f"c{i:02d}": {"train": 1000, "test": 1} for i in range(13)}
    report = DataReport(
        counts=counts,
        unlabelled=5,
        left_out={".txt files": 2, "images in extra": 1200},
        notes=("a", "b"),
        broken=("x",),
    )
    facts = data_facts(report.plain(), most=10)
    assert facts["classes"].startswith("c00 1,001, c01 1,001, ")
    assert facts["classes"].endswith("c09 1,001, … and 3 more")
    assert facts["given splits"] == "13,000 train, 13 test"
    assert facts["left out"] == (
        "test images without a class: 5, .txt files: 2, images in extra: 1,200, broken files: 1"
    )
    assert facts["note"] == "a; b"
    assert data_facts(report.plain())["classes"].endswith("c12 1,001")


def test_what_there_is_not_is_left_out() -> None:
    assert data_facts({}) == {}
    assert data_facts(DataReport(counts={"a": {"train": 3}}).plain()) == {"classes": "a 3"}
