"""Studies that version 0.1.0 left behind still open, continue, refit and report.

The archive holds one study on a journal and one in SQLite, made by that version: six finished trials, a confirmation,
a refitted model, two trials that two workers saved in the middle when they were stopped, and two waiting trials. Its
storages name trial indices `slot` and the baseline `base`. Its pictures are replaced by single pixels.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from hpo import load_bundle
from hpo.confirmation.result import read_confirmation
from hpo.confirmation.trials import trainings
from hpo.study import Study, find_study
from hpo.trials import effective_trials, is_baseline
from tests.hpo.commands import RunHpo
from tests.hpo.digits import digit_pixels

ARCHIVE = Path(__file__).parent / "old" / "studies-0.1.0.tar.xz"
STORAGE = {"journal": [], "sqlite": ["--storage", "sqlite:///sqlite.db"]}

pytestmark = pytest.mark.parametrize("kind", ["journal", "sqlite"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the archive was made in, with both studies."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def study(folder: Path, kind: str) -> Study:
    return find_study(kind)


def test_its_trials_are_counted_and_its_best_and_baseline_are_known(study: Study) -> None:
    counts = study.counts()
    assert (counts.complete, counts.pruned, counts.running, counts.waiting) == (3, 3, 0, 4)
    trials = effective_trials(study.optuna.trials)
    assert sorted(trials) == list(range(10))
    assert [index for index, trial in trials.items() if is_baseline(trial)] == [0]
    best = study.best_trial()
    assert best is not None
    assert best.number == 5


def test_it_continues_from_its_checkpoints_to_exactly_its_total(study: Study, kind: str, run_hpo: RunHpo) -> None:
    before = {index: trial.value for index, trial in effective_trials(study.optuna.trials).items()}
    run_hpo("run", "own.yaml", "--study", kind, "--trials", "10", "--set", "epochs=6", *STORAGE[kind])
    trials = effective_trials(find_study(kind).optuna.trials)
    assert sorted(trials) == list(range(10))
    assert all(trial.state.is_finished() for trial in trials.values())
    assert {index: trials[index].value for index in range(6)} == {index: before[index] for index in range(6)}
    assert all(trials[index].user_attrs["resumed_epoch"] > 0 for index in (6, 7))
    assert not any((study.paths.checkpoint(index)).exists() for index in range(10))
    assert "Traceback" not in run_hpo.error


def test_its_confirmation_is_read_and_a_refit_needs_no_other(study: Study, kind: str, run_hpo: RunHpo) -> None:
    printed = run_hpo("refit", "best", "--study", kind)
    assert "on other seeds and splits" not in printed, "confirmed a second time"
    assert "trial 0" in printed, "the confirmation's winner is the baseline"
    openings = [json.loads(line) for line in study.paths.test_openings.read_text().splitlines()]
    assert [opening["trial"] for opening in openings] == [0, 0]


def test_its_confirmation_continues_on_its_own_splits(study: Study, kind: str, run_hpo: RunHpo) -> None:
    before = trainings(find_study(f"{kind}.confirm"))
    run_hpo("confirm", kind, "--budget", "4")
    after = trainings(find_study(f"{kind}.confirm"))
    assert len(after) > len(before) == 10
    assert {(training.val_part, training.is_over) for training in after} == {(None, True)}
    confirmation = read_confirmation(study.paths.confirmation)
    assert confirmation is not None
    assert confirmation.per_repeat == 1
    assert all(
        set(range(5)) <= one.scores.keys() for one in confirmation.contenders if one.key in ("baseline", "trial 5")
    )


def test_its_model_still_labels_images(folder: Path, kind: str) -> None:
    bundle = load_bundle(folder / "studies" / kind / "refit" / "best", "cpu")
    assert len(bundle.predict(list(digit_pixels()[0][:20])).names) == 20


@pytest.mark.parametrize("command", [("report",), ("study", "show"), ("study", "trials"), ("study", "doctor")])
def test_it_is_shown_and_checked(study: Study, kind: str, command: tuple[str, ...], run_hpo: RunHpo) -> None:
    run_hpo(*command, kind)
    assert "Traceback" not in run_hpo.error
