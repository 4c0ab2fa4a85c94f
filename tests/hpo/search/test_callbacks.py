"""Callbacks after each trial, with Optuna's signature."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

import hpo
from hpo.errors import HpoError
from hpo.study import find_study
from tests.hpo.commands import SPACE
from tests.test_docs import ROOT, blocks


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A search of two epochs a trial, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("space.yaml").write_text(SPACE)
    return "space.yaml"


def search(space: str, *callbacks: Callable[[optuna.Study, FrozenTrial], None], **options: Any) -> hpo.Study:
    return hpo.run(space, device="cpu", quiet=True, callbacks=callbacks, **options)


def test_each_is_called_in_order_after_each_trial_which_is_stored_by_then(space: str) -> None:
    calls: list[tuple[str, int]] = []

    def first(study: optuna.Study, trial: FrozenTrial) -> None:
        assert study.trials[trial.number].state == TrialState.COMPLETE == trial.state
        assert study.trials[trial.number].value == trial.value
        trial.params.clear()  # the study's own is another
        calls.append(("first", trial.number))

    def second(study: optuna.Study, trial: FrozenTrial) -> None:
        assert study.trials[trial.number].params
        calls.append(("second", trial.number))

    search(space, first, second, trials=2)
    assert calls == [("first", 0), ("second", 0), ("first", 1), ("second", 1)]
    search(space, first, trials=3)  # trials of earlier runs are not called for again
    assert calls[4:] == [("first", 2)]


def test_pruned_trials_are_called_for_too(space: str) -> None:
    Path(space).write_text(SPACE.replace("{name: none}", "{name: median, startup_trials: 0}"))
    states: list[TrialState] = []
    study = search(space, lambda _, trial: states.append(trial.state), trials=6)
    assert states == [trial.state for trial in study.optuna.trials]
    assert TrialState.PRUNED in states


def test_an_exception_ends_the_run_and_keeps_the_trial(space: str) -> None:
    def failing(study: optuna.Study, trial: FrozenTrial) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        search(space, failing, trials=3)
    study = find_study("space")
    assert [trial.state for trial in study.optuna.trials] == [TrialState.COMPLETE] + 2 * [TrialState.WAITING]
    before = copy.deepcopy(study.optuna.trials[0])
    search(space, trials=2)
    assert find_study("space").optuna.trials[0] == before
    assert find_study("space").counts().complete == 2


@pytest.mark.parametrize("options", [{"workers": 2}, {"workers": 1}, {"workers": 0}, {"per_device": "2"}])
def test_callbacks_are_refused_where_trials_run_in_other_processes(space: str, options: dict[str, Any]) -> None:
    with pytest.raises(HpoError, match=r"callbacks are called in this process, and these trials run in others"):
        search(space, lambda *_: None, trials=2, **options)
    assert not Path("studies").exists()


def test_the_example_of_the_docs_runs(space: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    [example] = [block for block in blocks(page, "python") if "def record" in block]
    exec(compile(example.replace('"digits", trials=20', f'"{space}", trials=2, device="cpu"'), "python.md", "exec"), {})
    lines = Path("trials.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines] == [["0", "COMPLETE"], ["1", "COMPLETE"]]
