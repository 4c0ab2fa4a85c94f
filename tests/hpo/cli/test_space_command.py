"""`hpo space list` and `hpo space schema`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

import hpo.cli.console
from hpo.api.options import Options, SchemaOptions
from hpo.api.space import schema
from hpo.cli.app import space_list
from hpo.errors import HpoError
from hpo.space import json_schema, list_spaces


@pytest.mark.parametrize("width", [80, 120])
def test_names_results_and_descriptions_are_listed_whole(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hpo.cli.console, "console", Console(width=width, highlight=False))
    space_list(Options())
    *lines, last = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    for entry in list_spaces():
        [at] = [number for number, line in enumerate(lines) if line.startswith(f"{entry.name} ")]
        assert entry.result in lines[at]
        assert len(lines[at].split()) > 2, "the description starts on the line of the name"
    longest = max(len(entry.name) for entry in list_spaces())
    wrapped = sum(line.startswith(" " * longest) for line in lines)
    assert wrapped == 0 or width < 120, "one line each on a terminal of 120 columns"
    assert "search_spaces/recipes" in last


def test_the_schema_is_written_as_json(tmp_path: Path) -> None:
    schema(SchemaOptions(output=tmp_path / "space.json"))
    assert json.loads((tmp_path / "space.json").read_text(encoding="utf-8")) == json.loads(json.dumps(json_schema()))


@pytest.mark.parametrize("place", ["nodir/space.json", "."])
def test_an_unwritable_output_is_a_one_line_error(tmp_path: Path, place: str) -> None:
    with pytest.raises(HpoError, match=r"(cannot be written \(.+\)|is a folder); give -o") as caught:
        schema(SchemaOptions(output=tmp_path / place))
    assert str(caught.value).startswith(str(tmp_path / place))
    assert "\n" not in str(caught.value)
