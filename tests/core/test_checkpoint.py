"""Checkpoints are written atomically and at limited cost, and errors name the file."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import math
import os
import pickle
import resource
import signal
import stat
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import core.checkpoint
from core.checkpoint import LONGEST_INTERVAL_S, Checkpoints, load_checkpoint, save_checkpoint
from core.errors import CheckpointError

CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trial.pt"


def test_saved_state_is_loaded_unchanged(path: Path) -> None:
    save_checkpoint(path, {"weights": torch.arange(3), "epoch": 2})
    state = load_checkpoint(path, CPU)
    assert torch.equal(state["weights"], torch.arange(3))
    assert state["epoch"] == 2
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, OSError])
def test_an_interrupted_save_keeps_only_the_old_checkpoint(
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


def test_leftovers_of_a_killed_process_are_overwritten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_truncated_checkpoint_is_a_one_line_error(path: Path) -> None:
    save_checkpoint(path, {"weights": torch.arange(100), "epoch": 2})
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"trial\.pt: not a checkpoint .*; delete it") as caught:
            load_checkpoint(path, CPU)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("state", [{"format": 99}, {"epoch": 1}, [1, 2]])
def test_a_checkpoint_of_another_format_is_refused(path: Path, state: Any) -> None:
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"trial\.pt: not a checkpoint of this version; delete it"):
        load_checkpoint(path, CPU)


def test_out_of_memory_is_not_blamed_on_the_checkpoint(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    save_checkpoint(path, {"epoch": 1})
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_checkpoint(path, CPU)


# Failures of the disk


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[int]:
    """A file system of 256 kB, and its error when full."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may mount no file system")
    try:
        yield errno.ENOSPC
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def small_files(folder: Path) -> Iterator[int]:
    """A file size limit of 128 kB, and its error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, hard))
    try:
        yield errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limited", [small_disk, small_files])
@pytest.mark.parametrize("tensors", [1, 1000], ids=["in a tensor", "between tensors"])
def test_a_full_disk_keeps_the_old_checkpoint_and_raises_oserror(tmp_path: Path, limited: Any, tensors: int) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    path = folder / "trial.pt"
    with limited(folder) as expected:
        save_checkpoint(path, {"weights": torch.arange(1000), "epoch": 1})
        too_much = {str(index): torch.zeros(100_000 // tensors) for index in range(tensors)}
        with pytest.raises(OSError, match=os.strerror(expected)) as caught:
            save_checkpoint(path, {"weights": too_much, "epoch": 2})
        assert caught.value.errno == expected
        assert list(folder.iterdir()) == [path]
        assert load_checkpoint(path, CPU)["epoch"] == 1
        save_checkpoint(path, {"epoch": 3})
        assert load_checkpoint(path, CPU)["epoch"] == 3


def test_an_interrupt_while_writing_is_propagated(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(io.FileIO):
        def write(self, data: Any) -> int:
            raise KeyboardInterrupt

    save_checkpoint(path, {"epoch": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode: Interrupted(self, mode))
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(path, {"epoch": 2})
    assert list(path.parent.iterdir()) == [path]
    assert load_checkpoint(path, CPU)["epoch"] == 1


def test_the_file_is_synced_before_the_rename_and_the_folder_after_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []

    def note(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        synced.append((kind, path.exists()))

    monkeypatch.setattr(os, "fsync", note)
    save_checkpoint(path, {"epoch": 1})
    assert synced == [("file", False), ("folder", True)]


# Refused files


class Code:
    """Runs a command when unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["torch's archive", "torch's old format", "a plain pickle"])
def test_a_checkpoint_with_code_is_refused(path: Path, tmp_path: Path, kind: str) -> None:
    state = {"format": 3, "weights": Code(f"touch {tmp_path / 'ran'}")}
    if kind == "a plain pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "torch's archive")
    with pytest.raises(CheckpointError, match=r"trial\.pt: not a checkpoint \(.*\); delete it") as caught:
        load_checkpoint(path, CPU)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_decompression_bomb_is_refused(path: Path) -> None:
    save_checkpoint(path, {"weights": torch.zeros(10_000_000)})
    members = zipfile.ZipFile(path)
    bomb = path.with_name("bomb.pt")
    with members, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in members.namelist():
            packed.writestr(name, members.read(name))
    with pytest.raises(CheckpointError, match=r"bomb\.pt: not a checkpoint \(it unpacks to more than it is\)"):
        load_checkpoint(bomb, CPU)


def test_a_flipped_bit_in_a_tensor_is_detected(path: Path) -> None:
    save_checkpoint(path, {"weights": torch.full((1000,), 7.0)})
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((2,), 7.0).numpy().tobytes()) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"trial\.pt: not a checkpoint \(.* is damaged\); delete it"):
        load_checkpoint(path, CPU)


# Intervals


@pytest.mark.parametrize("cost_s", [0.001, 0.1, 5.0, 60.0])
@pytest.mark.parametrize("epoch_s", [0.02, 3.0, 400.0])
def test_saving_takes_at_most_its_share_of_the_time(
    path: Path, monkeypatch: pytest.MonkeyPatch, cost_s: float, epoch_s: float
) -> None:
    now = 0.0
    saved: list[float] = []

    def save(*_: Any) -> None:
        nonlocal now
        now += cost_s

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(core.checkpoint, "save_checkpoint", save)
    checkpoints = Checkpoints(path, dict, on_saved=lambda _: saved.append(now), share=0.02)
    for _ in range(80):
        now += epoch_s
        if checkpoints.due:
            checkpoints.save()
    apart = [later - earlier for earlier, later in itertools.pairwise(saved)]
    interval_s = min(cost_s / 0.02, LONGEST_INTERVAL_S)
    assert saved[0] == pytest.approx(epoch_s + cost_s)  # the first is due at once
    assert all(interval_s <= gap - cost_s + 1e-6 and gap - cost_s <= interval_s + epoch_s + 1e-6 for gap in apart)
    if cost_s <= 0.02 * LONGEST_INTERVAL_S:
        assert len(saved[1:]) * cost_s <= 0.02 * now


def test_an_infinite_share_is_always_due(path: Path) -> None:
    checkpoints = Checkpoints(path, lambda: {"epoch": 1}, share=math.inf)
    assert checkpoints.due
    checkpoints.save()
    assert checkpoints.due
