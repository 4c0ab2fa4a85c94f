"""Whatever write of a search, a confirmation or a refit fails, the same command again makes the study exact.

A sample of the writes fails in the suite; each of them, on a full disk and in a killed process, by

    HPO_SIEGE_EVERY=1 uv run pytest -m chaos tests/hpo/siege/test_writes.py
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hpo.analysis.doctor.check import Finding, StudyCheck
from hpo.analysis.doctor.run import run_checks
from tests.hpo.analysis.test_doctor import draw_images
from tests.hpo.siege.writes import NAME, Ended, Mode, copied, finished, outcome, run

SEED = int(os.environ.get("HPO_SIEGE_SEED", "58"))
EVERY = int(os.environ.get("HPO_SIEGE_EVERY", "1"))
SAMPLE = 2  # operations that fail of each command in each way, in the suite
SPACE = """
data: {name: digits}
base: {model: {widths: [8], blocks: [1]}, epochs: 2, batch_size: 16, augment: {flip: 0.0}}
pruner: {name: promote, rungs: [0.5]}
sampler: {name: random}
search:
  optim.lr_scale: {low: 0.5, high: 20, log: true}
"""


NEEDS_CC = pytest.mark.skipif(shutil.which("cc") is None, reason="the failing library is compiled by cc")


@dataclass(frozen=True)
class Stage:
    """A command of a study's life."""

    command: list[str]
    before: Path
    """The studies before it."""
    after: dict[str, Any]
    """The outcome without a failure."""
    operations: int


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Stage]]:
    """Search, confirmation and refit of a tiny study, undisturbed."""
    root = tmp_path_factory.mktemp("siege")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_CACHE", str(root / "cache"))
        images = draw_images(root / "images")
        folder = root / "twin"
        (folder / "studies").mkdir(parents=True)
        (folder / "own.yaml").write_text(SPACE)
        search = ["run", "own.yaml", "--data", str(images), "--trials", "4"]
        found = []
        for command in (search, ["confirm", NAME], ["refit", "best", "--study", NAME]):
            before = copied(folder, root / command[0])
            ended = run([*command, "--device", "cpu"], folder)
            assert ended.code == 0, ended.said
            found.append(Stage([*command, "--device", "cpu"], before, outcome(folder / "studies"), ended.operations))
        yield found


def problems(folder: Path) -> list[str]:
    """What `hpo study doctor` finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_STUDIES", str(folder / "studies"))
        return [found.problem for found in run_checks(StudyCheck(NAME)) if isinstance(found, Finding)]


def check(stage: Stage, folder: Path, n: int, mode: Mode) -> Ended:
    """Fail the n-th operation of a command, run the command again, and compare with the undisturbed twin."""
    copied(stage.before, folder)
    struck = run(stage.command, folder, n, mode)
    assert "Traceback" not in struck.said, struck.said
    if not struck.failed:
        assert struck.code == 0, struck.said
        return struck
    assert struck.code in ((-9,) if mode == "kill" else (0, 2)), struck.said
    check_again(stage, folder)
    return struck


def check_again(stage: Stage, folder: Path) -> None:
    """Run a command again after a failure, and compare with the undisturbed twin."""
    studies = folder / "studies"
    before = finished(studies)
    again = run(stage.command, folder)
    assert again.code == 0, again.said
    assert "Traceback" not in again.said, again.said
    after = finished(studies)
    assert {key: after.get(key) for key in before} == before
    assert outcome(studies) == stage.after
    assert problems(folder) == []


@pytest.mark.slow
@NEEDS_CC
@pytest.mark.parametrize("every", [0, pytest.param(EVERY, marks=pytest.mark.chaos)], ids=["sample", "all"])
def test_after_any_failed_write_the_same_command_makes_the_study_exact(
    stages: list[Stage], every: int, tmp_path: Path
) -> None:
    draw = random.Random(SEED)
    faults, struck = [], 0
    modes: tuple[Mode, ...] = ("full", "kill")
    for stage in stages:
        for mode in modes:
            numbers = range(1, stage.operations + 1)
            for n in numbers[draw.randrange(every) :: every] if every else sorted(draw.sample(numbers, SAMPLE)):
                folder = tmp_path / f"{stage.command[0]}-{mode}-{n}"
                try:
                    ended = check(stage, folder, n, mode)
                except (AssertionError, OSError, ValueError) as error:
                    faults.append(f"{folder.name}: {error}")
                else:
                    struck += bool(ended.failed)
                    shutil.rmtree(folder)
    print(f"{struck} operations failed of {[stage.operations for stage in stages]}")
    assert not faults, "\n\n".join(faults)


@pytest.mark.slow
@NEEDS_CC
@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.chaos)])
def test_after_kills_in_a_row_each_command_ends_with_the_exact_study(
    stages: list[Stage], kills: int, tmp_path: Path
) -> None:
    """SIGKILL of a search with promotions, of a confirmation and of a refit, all processes at once."""
    draw = random.Random(SEED)
    for stage in stages:
        folder = copied(stage.before, tmp_path / stage.command[0])
        for _ in range(kills):
            struck = run(stage.command, folder, draw.randrange(1, stage.operations // 2), "kill")
            assert struck.code == (-9 if struck.failed else 0), struck.said
        check_again(stage, folder)
