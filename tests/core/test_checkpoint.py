"""Checkpoints: whole or absent, one temporary name, and errors that name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core.checkpoint import load_checkpoint, save_checkpoint
from core.errors import CheckpointError

CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trial.pt"


def test_what_is_saved_is_what_is_loaded(path: Path) -> None:
    save_checkpoint(path, {"weights": torch.arange(3), "epoch": 2})
    state = load_checkpoint(path, CPU)
    assert torch.equal(state["weights"], torch.arange(3))
    assert state["epoch"] == 2
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, OSError])
def test_an_interrupted_save_leaves_the_old_checkpoint_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException]
) -> None:
    def torn(state: dict[str, Any], file: Any) -> None:
        file.write(b"half")
        raise interrupt

    save_checkpoint(path, {"epoch": 1})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", torn)
        with pytest.raises(interrupt):
            save_checkpoint(path, {"epoch": 2})
    assert list(path.parent.iterdir()) == [path]
    assert load_checkpoint(path, CPU)["epoch"] == 1


def test_what_a_killed_writer_left_is_overwritten_by_the_next(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    save = torch.save

    def noting(state: dict[str, Any], file: Any) -> None:
        names.append(file.name)
        save(state, file)

    monkeypatch.setattr(torch, "save", noting)
    save_checkpoint(path, {"epoch": 1})
    Path(names[0]).write_bytes(b"half of another process")
    save_checkpoint(path, {"epoch": 2})
    assert names == [f"{path}.tmp"] * 2
    assert list(path.parent.iterdir()) == [path]


def test_a_checkpoint_cut_anywhere_is_named_in_one_line(path: Path) -> None:
    save_checkpoint(path, {"weights": torch.arange(100), "epoch": 2})
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"trial\.pt: not a checkpoint .*; delete it") as caught:
            load_checkpoint(path, CPU)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("state", [{"format": 99}, {"epoch": 1}, [1, 2]])
def test_a_checkpoint_of_another_format_is_named(path: Path, state: Any) -> None:
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"trial\.pt: not a checkpoint of this version; delete it"):
        load_checkpoint(path, CPU)


def test_a_device_without_room_is_no_fault_of_the_checkpoint(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    save_checkpoint(path, {"epoch": 1})
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_checkpoint(path, CPU)
