"""A study survives failures in any order: its total is exact, and its results equal an undisturbed twin's.

The suite injects ten; fifty, with another seed, by

    HPO_CHAOS_SEED=7 uv run pytest -m chaos
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hpo.workers.chaos import (
    ANYWHERE,
    Chaos,
    DiskFull,
    JournalTorn,
    ServerRestarted,
    check_twins,
    own_server,
    plan,
    run,
    small_disk,
)

SEED = int(os.environ.get("HPO_CHAOS_SEED", "1"))


@contextlib.contextmanager
def noting_how_to_repeat(events: int) -> Iterator[None]:
    """Add the command that repeats a failure to its message."""
    try:
        yield
    except BaseException as error:
        chosen = "-m chaos" if events == 50 else "tests/hpo/workers/test_chaos.py"
        again = f"HPO_CHAOS_SEED={SEED} uv run pytest {chosen}"
        error.add_note(f"seed {SEED}; repeat with\n    {again}")
        raise


@pytest.mark.slow
@pytest.mark.parametrize("events", [10, pytest.param(50, marks=pytest.mark.chaos)])
def test_after_any_failures_the_total_is_exact_and_every_result_equals_its_undisturbed_twin(
    events: int, tmp_path: Path
) -> None:
    """Without the right to mount a disk, or without PostgreSQL, that kind of event is left out."""
    with (
        noting_how_to_repeat(events),
        small_disk(tmp_path / "journal" / "disk") as disk,
        small_disk(tmp_path / "server" / "disk"),
        own_server() as server,
    ):
        on_journal, on_server = plan(SEED, events, disk=disk, server=server is not None)
        studies = [Chaos(tmp_path / "journal", SEED, len(on_journal))]
        results = [run(studies[0], on_journal)]
        if server is not None:
            studies.append(Chaos(tmp_path / "server", SEED, len(on_server), server))
            results.append(run(studies[1], on_server))
        twin = Chaos(tmp_path / "twin", SEED, 0)
        twin.total = max(study.total for study in studies)
        undisturbed = run(twin, [])
        for disturbed in results:
            check_twins(disturbed, undisturbed)
        assert sum(len(study.struck) for study in studies) == events


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("events", [10, 50])
def test_a_plan_follows_from_its_seed_and_has_every_kind_equally_often(events: int, seed: int) -> None:
    planned = [[event.name for event in events] for events in plan(seed, events, disk=True, server=True)]
    assert planned == [[event.name for event in events] for events in plan(seed, events, disk=True, server=True)]
    kinds = {kind.name for kind in (*ANYWHERE, DiskFull, JournalTorn, ServerRestarted)}
    numbers = Counter(planned[0] + planned[1])
    assert numbers.keys() == kinds
    assert min(numbers.values()) == events // len(kinds)
    assert max(numbers.values()) <= 1 + events // len(kinds)
    assert JournalTorn.name not in planned[1]
    assert ServerRestarted.name not in planned[0]
