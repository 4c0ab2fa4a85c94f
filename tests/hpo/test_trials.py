"""The order of complete trials."""

from __future__ import annotations

import pytest
from optuna.trial import FrozenTrial, create_trial

from hpo.trials import TRIAL_INDEX, VAL_LOSS, best_first


def trial(index: int, value: float, loss: float | None) -> FrozenTrial:
    attributes = {TRIAL_INDEX: index} if loss is None else {TRIAL_INDEX: index, VAL_LOSS: loss}
    return create_trial(value=value, user_attrs=attributes)


@pytest.mark.parametrize("sign", [1, -1])
def test_trials_are_ordered_by_value_then_loss_then_index(sign: int) -> None:
    in_order = [
        trial(9, sign * 0.9, 0.8),
        trial(7, sign * 0.8, 0.1),
        trial(2, sign * 0.8, 0.2),
        trial(3, sign * 0.8, 0.2),
    ]
    assert (
        sorted((in_order[2], in_order[3], in_order[1], in_order[0]), key=lambda each: best_first(each, sign))
        == in_order
    )


def test_trials_of_earlier_versions_stay_the_first_of_equals() -> None:
    old, new = trial(5, 0.8, None), trial(1, 0.8, 0.1)
    assert min((new, old), key=lambda each: best_first(each, 1)) is old
