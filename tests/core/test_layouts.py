"""Every layout of `tests.core.layouts` is read as the table says, as a folder and as an archive, on every machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import UserError
from tests.core.layouts import LAYOUTS, Layout, counts_of

CASES = [
    pytest.param(layout, zipped, id=f"{name}{', zipped' if zipped else ''}")
    for name, layout in LAYOUTS.items()
    for zipped in ((False, True) if layout.is_zipped_too else (False,))
]


@pytest.mark.parametrize(("layout", "zipped"), CASES)
def test_a_layout_is_read_as_the_table_says(layout: Layout, zipped: bool, tmp_path: Path) -> None:
    path = layout.write(tmp_path, zipped=zipped)
    if layout.error:
        with pytest.raises(UserError) as raised:
            layout.load(path)
        assert layout.error in str(raised.value)
        assert str(raised.value).isprintable(), "one line"
        return
    found = layout.load(path)
    assert found.classes == layout.classes
    assert counts_of(found) == layout.counts
    assert found.report.unlabelled == layout.unlabelled
    assert found.report.left_out == layout.left_out
    assert any(layout.note in note for note in found.report.notes) or not layout.note
    assert len(found.report.broken) == (1 if layout.skip_broken else 0)


def test_there_are_at_least_forty_layouts_of_both_kinds() -> None:
    refused = sum(bool(layout.error) for layout in LAYOUTS.values())
    assert refused >= 20
    assert len(LAYOUTS) - refused >= 20


def test_processes_with_other_hashes_and_caches_read_the_same(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    found = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)}
        command = [sys.executable, "-m", "tests.core.layouts", str(tmp_path / f"cache{seed}")]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
    assert len(found[0]) == sum(not layout.error for layout in LAYOUTS.values())
