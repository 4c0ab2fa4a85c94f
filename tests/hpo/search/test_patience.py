"""`hpo run --patience`: the chance of a better trial, and what a search does when it is small."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.study import find_study
from hpo.study.patience import AHEAD, CHANCE, Patience, chance_of_better
from hpo.study.settings import StudySettings
from hpo.trials import FAILURE, STANDARD_ERROR, TRIAL_INDEX
from tests.hpo.commands import RunHpo
from tests.hpo.storage.journals import finished_of

# The chance


@pytest.mark.parametrize("failed", [0, 40])
def test_the_chance_is_that_of_a_smoothed_bootstrap(failed: int) -> None:
    generator = np.random.default_rng(0)
    scores, error = generator.normal(0.8, 0.05, 30), 0.02
    past = np.concatenate([scores, np.full(failed, -np.inf)])
    drawn = generator.choice(past, (50_000, AHEAD)) + generator.normal(0, error, (50_000, AHEAD))
    better = (drawn.max(1) > scores.max() + error).mean()
    assert chance_of_better(scores.tolist(), error, len(past)) == pytest.approx(better, abs=0.01)


def test_a_best_trial_far_ahead_ends_a_search_of_31_trials_and_none_of_30() -> None:
    scores = [0.9] + [0.1] * 29
    assert chance_of_better(scores, 0.01, 30) > CHANCE
    assert chance_of_better([*scores, 0.1], 0.01, 31) < CHANCE


def test_trials_close_to_the_best_raise_the_chance_and_a_larger_error_too() -> None:
    far, close = [0.9] + [0.1] * 39, [0.9] * 5 + [0.1] * 35
    assert chance_of_better(far, 0.01, 40) < CHANCE < chance_of_better(close, 0.01, 40)
    assert chance_of_better(far, 0.5, 40) > CHANCE


# The outlook of a study


def trial_of(index: int, value: float | None, error: float | None = 0.01, failure: str | None = None) -> FrozenTrial:
    """A complete trial, or a pruned one without a value."""
    attributes = {TRIAL_INDEX: index, STANDARD_ERROR: error, FAILURE: failure}
    return create_trial(
        state=TrialState.PRUNED if value is None or failure else TrialState.COMPLETE,
        value=None if failure else value,
        user_attrs={name: given for name, given in attributes.items() if given is not None},
        intermediate_values={} if value is None else {0: value},
    )


def patience_of(direction: str, *trials: FrozenTrial) -> Patience:
    study = optuna.create_study(direction=direction)
    study.add_trials(trials)
    return Patience(study, StudySettings(study))


def test_the_outlook_reads_the_best_of_either_direction_and_failed_trials_have_no_chance() -> None:
    values, failed = [0.3, 0.1, 0.5], [trial_of(3, 0.0, failure="diverged"), trial_of(4, None)]
    low = patience_of("minimize", *(trial_of(i, value) for i, value in enumerate(values)), *failed).outlook()
    high = patience_of("maximize", *(trial_of(i, -value) for i, value in enumerate(values)), *failed).outlook()
    assert low is not None
    assert high is not None
    assert (low.trials, low.best, high.best) == (5, 0.1, -0.1)
    assert low.chance == high.chance == chance_of_better([-0.3, -0.1, -0.5], 0.01, 5)


def test_trials_of_older_studies_have_the_mean_error_of_the_others_and_without_any_nothing_ends() -> None:
    outlook = patience_of("maximize", trial_of(0, 0.9, None), trial_of(1, 0.1, 0.02), trial_of(2, 0.1, 0.04)).outlook()
    assert outlook is not None
    assert outlook.error == pytest.approx(0.03)
    without = patience_of("maximize", *(trial_of(i, 0.9 if i == 0 else 0.1, None) for i in range(100)))
    without.begin(True)
    assert without.outlook() is None
    assert not without.is_over


def test_only_a_run_with_patience_ends() -> None:
    patience = patience_of("maximize", *(trial_of(i, 0.9 if i == 0 else 0.1) for i in range(40)))
    assert not patience.is_over
    patience.begin(True)
    assert patience.is_over
    patience.begin(False)
    assert not patience.is_over


# A search


@pytest.mark.parametrize("at_once", ["1", "2"])
def test_a_search_ends_continues_without_patience_and_workers_end_too(
    at_once: str, run_hpo: RunHpo, space_file: str, tmp_path: Path
) -> None:
    folder = tmp_path / "studies/own"
    run_hpo("run", space_file, "--trials", "1", "--set", "epochs=1")
    study = find_study("own")
    assert 0 < study.optuna.trials[0].user_attrs[STANDARD_ERROR] < 0.03, "of 360 images"
    parameters = study.optuna.trials[0].distributions
    for index in range(1, 30):  # one more trial will be enough
        attributes = {TRIAL_INDEX: index, **({STANDARD_ERROR: 1e-4} if index == 1 else {})}
        values = {"value": 1.0} if index == 1 else {"state": TrialState.PRUNED}
        study.optuna.add_trial(
            create_trial(params={"optim.lr_scale": 1.0}, distributions=parameters, user_attrs=attributes, **values)
        )
    arguments = ("run", space_file, "--trials", "40", "--set", "epochs=1", "--per-device", at_once)
    said = run_hpo(*arguments, "--patience")
    found = len(finished_of(folder))
    assert 31 <= found <= 30 + 2 * int(at_once)
    assert f"a better trial is unlikely: after {found} trials, the chance that one of 20 more beats the best" in said
    end = r"\(accuracy 1.0000\) by more than its standard error \(0.0001\) is (10|9) %; continue without --patience"
    assert re.search(end, said)
    joined = run_hpo("worker", "own")
    assert "a better trial is unlikely" in joined
    assert f"{40 - found} waiting" in joined
    again = run_hpo(*arguments, "--patience")
    assert "a better trial is unlikely" in again
    assert "this will take" not in again
    assert len(finished_of(folder)) == found
    run_hpo(*arguments)
    assert len(finished_of(folder)) == 40
