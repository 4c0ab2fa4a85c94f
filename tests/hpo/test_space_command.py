"""`hpo space schema`: a file that editors read, or one line that says why there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpo.commands.space import schema_command
from hpo.errors import HpoError
from hpo.search_space import json_schema


def test_the_schema_is_written_as_json(tmp_path: Path) -> None:
    schema_command(tmp_path / "space.json")
    assert json.loads((tmp_path / "space.json").read_text(encoding="utf-8")) == json.loads(json.dumps(json_schema()))


@pytest.mark.parametrize("place", ["nodir/space.json", "."])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, place: str) -> None:
    with pytest.raises(HpoError, match=r"cannot be written \(.+\); give -o") as caught:
        schema_command(tmp_path / place)
    assert str(caught.value).startswith(str(tmp_path / place))
    assert "\n" not in str(caught.value)
