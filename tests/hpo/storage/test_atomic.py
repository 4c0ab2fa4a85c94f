"""Files are replaced atomically, however their writer ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpo.storage.atomic import UNFINISHED, replacing


@pytest.mark.parametrize("synced", [False, True])
def test_a_file_takes_the_place_of_what_was_there_when_it_is_finished(tmp_path: Path, synced: bool) -> None:
    file = tmp_path / "result.json"
    file.write_text("old")
    with replacing(file, synced=synced) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path, "another disk would make of the rename a copy"
        assert temporary.suffix == UNFINISHED, "so the doctor knows what a killed writer left"
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_two_that_write_the_same_file_do_not_meet(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    with replacing(file) as first, replacing(file) as second:
        first.write_text("first")
        second.write_text("second")
    assert file.read_text() == "first", "it was finished last"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_was_there_stays_where_the_writer_is_stopped(tmp_path: Path, error: type[BaseException]) -> None:
    file = tmp_path / "result.json"
    file.write_text("old")
    with pytest.raises(error), replacing(file) as temporary:
        temporary.write_text("ne")
        raise error
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_is_not_there_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "typo" / "result.json") as temporary:
        temporary.write_text("new")
    assert list(tmp_path.iterdir()) == []
