"""Hostile input at each entrance: one line and no traceback, no hang, and nothing accepted that makes no sense.

The suite takes two hundred inputs for each entrance, the same in every run; five thousand others by

    HPO_FUZZ_SEED=7 uv run pytest -m chaos tests/hpo/siege/test_fuzz.py
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from core.data import Dataset
from tests.hpo.commands import studies_in
from tests.hpo.siege.hostile import ENTRANCES, KINDS, Edits

EDITS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder, far enough from the root for names like `../x`."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    with studies_in(inner):
        yield inner


@pytest.mark.parametrize("inputs", [200, pytest.param(5000, marks=pytest.mark.chaos)])
@pytest.mark.parametrize("name", ENTRANCES)
def test_hostile_input_is_refused_in_a_line_or_makes_sense(
    name: str, inputs: int, folder: Path, digits: Dataset
) -> None:
    kind: Any = ENTRANCES[name]
    entrance = kind(folder, digits) if len(inspect.signature(kind).parameters) > 1 else kind(folder)
    accepted = []

    @settings(
        max_examples=inputs,
        derandomize=inputs == 200,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(edits=EDITS)
    def takes(edits: Edits) -> None:
        accepted.append(entrance.take(edits))

    (takes if inputs == 200 else seed(int(os.environ.get("HPO_FUZZ_SEED", "1")))(takes))()
    print(f"{name}: {sum(accepted)} of {len(accepted)} inputs accepted")
    assert not all(accepted)
