"""Facts about a data set, as the terminal, the report and the model card show them."""

from __future__ import annotations

from typing import Any

import pytest

from hpo.text import data_facts

COUNTS = {"counts": {"cat": {"train": 200, "test": 20}, "dog": {"train": 1000}}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"grey": 1220, "channels": 1}, "all grey; one channel"),
        ({"grey": 0, "channels": 3}, "all in colour; three channels"),
        ({"grey": 20, "channels": 3}, "20 grey and 1,200 in colour; three channels"),
        ({"grey": 1200, "channels": 1, "top": 4095}, "1,200 grey and 20 in colour; one channel; "
         "16-bit samples from 0 to 4,095"),
    ],
)  # fmt: skip
def test_grey_colour_and_the_range_of_16_bit_samples_are_told(content: dict[str, Any], expected: str) -> None:
    assert data_facts({**COUNTS, **content})["pixels"] == expected


def test_groups_are_told_where_there_are_some() -> None:
    assert data_facts({**COUNTS, "groups": 1204})["groups"] == "1,204, each on one side of every split"
    assert "groups" not in data_facts({**COUNTS, "groups": 0})


def test_an_older_study_has_neither() -> None:
    assert data_facts(COUNTS).keys() == {"classes", "given splits"}
    assert data_facts({}) == {}
