"""Which trials keep their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from optuna.trial import create_trial

from core.data import Dataset, folds
from core.loop import TrainResult
from hpo.search.options import TrialOptions
from hpo.search.weights import keep_best_weights, keep_weights
from hpo.space import space_from_yaml
from hpo.study import Study, open_study
from hpo.trials import TRIAL_INDEX, VAL_LOSS, Outcome
from tests.hpo.invented import SPACE

EQUAL = ((0.9, 0.3), (0.8, 0.05), (0.9, 0.1), (0.9, 0.2))
"""Accuracy and validation loss of trials."""


def study_of(digits: Dataset, trials: Sequence[tuple[float, float]], *, keep: int) -> Study:
    """A study whose trials kept their weights as they ended."""
    space = space_from_yaml(SPACE, "own")
    study, splits = open_study(space, name="own", dataset=digits), folds(digits, space.baseline.data)
    for number, (value, loss) in enumerate(trials):
        study.paths.trial(number).mkdir(parents=True)
        logits = torch.zeros(len(splits[0].val), 10)
        result = TrainResult(torch.nn.Linear(1, 1), (), kept=cast(Any, None), val_logits=logits)
        attributes = {VAL_LOSS: loss}
        outcome = Outcome(number, number, "complete", value, None, {}, results=(result,), attributes=attributes)
        keep_weights(study, splits, outcome, keep)
        study.optuna.add_trial(create_trial(value=value, user_attrs={TRIAL_INDEX: number, **attributes}))
    return study


@pytest.mark.parametrize(("keep", "kept"), [(1, {2}), (2, {2, 3}), (3, {0, 2, 3})])
def test_of_trials_with_the_same_value_those_with_the_lower_loss_keep_their_weights(
    digits: Dataset, keep: int, kept: set[int]
) -> None:
    study = study_of(digits, EQUAL, keep=keep)
    assert study.paths.numbers_with_weights() == kept
    best = study.best_trial()
    assert best is not None
    assert best.number in kept


def test_weights_that_two_workers_kept_and_those_beyond_the_limit_are_deleted_in_the_same_order(
    digits: Dataset,
) -> None:
    study = study_of(digits, EQUAL, keep=4)
    size = study.paths.trial_model(0).stat().st_size
    keep_best_weights(study, folds=1, options=TrialOptions(keep=3))
    assert study.paths.numbers_with_weights() == {0, 2, 3}
    keep_best_weights(study, folds=1, options=TrialOptions(keep_gb=1.5 * size / 1e9))
    assert study.paths.numbers_with_weights() == {2}
