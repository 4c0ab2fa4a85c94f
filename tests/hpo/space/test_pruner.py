"""The rung pruner's rule, and the other pruners by name."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from hpo.space import grammar, load_space
from hpo.space.pruner import RungPruner, build_pruner, lets_through, mark_loss, rung_epochs
from hpo.trials import BASELINE, COSTS, LET_THROUGH, RECIPE, RUNG_LOSS, TRIAL_INDEX

NAN = math.nan


def study_with(
    pruner: RungPruner, *others: Mapping[int, float], direction: str = "maximize", first: int = 0
) -> optuna.Study:
    """A study with pruned trials that have reported these values, at indices from `first`."""
    study = optuna.create_study(direction=direction, pruner=pruner)
    for trial_index, values in enumerate(others, first):
        add(study, trial_index, values)
    return study


def add(
    study: optuna.Study, trial_index: int, values: Mapping[int, float], state: TrialState = TrialState.PRUNED
) -> None:
    """Add a trial that has reported these values."""
    value = 0.0 if state == TrialState.COMPLETE else None
    study.add_trial(
        create_trial(state=state, value=value, intermediate_values=dict(values), user_attrs={TRIAL_INDEX: trial_index})
    )


def retried(study: optuna.Study, first: optuna.Trial, **pruner: Any) -> optuna.Trial:
    """The next attempt at a trial whose process was killed, in another process with another instance of the pruner."""
    study.tell(first, state=TrialState.FAIL)
    was = study.trials[first.number]
    study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=was.user_attrs, system_attrs=was.system_attrs))
    keeps = study.pruner.keeps
    study.pruner = RungPruner(list(keeps), next(iter(keeps.values())), **pruner)
    again = study.ask()
    assert again.number != first.number
    return again


def verdict(study: optuna.Study, trial: optuna.Trial) -> str:
    return str(study.pruner.verdict(study, trial))


def running(study: optuna.Study, trial_index: int, **attributes: Any) -> optuna.Trial:
    study.enqueue_trial({}, user_attrs={TRIAL_INDEX: trial_index, **attributes})
    return study.ask()


def judge(trial: optuna.Trial, epoch: int, value: float) -> bool:
    trial.report(value, epoch)
    return trial.should_prune()


@pytest.mark.parametrize(
    ("fractions", "epochs", "rungs"),
    [
        ((0.03, 0.1, 0.3), 60, (2, 6, 18)),
        ((0.03, 0.1, 0.3), 20, (1, 2, 6)),
        ((0.03, 0.1, 0.3), 3, (1,)),  # 0.09, 0.3 and 0.9 epochs are all the first
        ((0.5,), 1, ()),  # no rung at the last epoch
        ((0.3, 0.1), 60, (6, 18)),
    ],
)
def test_rungs_are_distinct_epochs_before_the_last(
    fractions: tuple[float, ...], epochs: int, rungs: tuple[int, ...]
) -> None:
    assert rung_epochs(fractions, epochs) == rungs


@pytest.mark.parametrize(
    ("epochs", "folds", "steps"),
    [
        (20, None, (1, 2, 6)),
        (20, 2, (1, 2, 6, 20)),
        (20, 5, (1, 2, 6, 20, 40, 60, 80)),  # not at 100: the last fold ends with the trial
        (1, 3, (1, 2)),  # of one epoch, there are no rungs within a fold
    ],
)
def test_with_folds_the_end_of_every_fold_but_the_last_is_a_rung_too(
    epochs: int, folds: int | None, steps: tuple[int, ...]
) -> None:
    pruner = build_pruner(grammar.RungsPruner(), epochs, folds)
    assert isinstance(pruner, RungPruner)
    assert pruner.rungs == steps


def test_the_fold_ends_together_keep_as_much_as_one_rung() -> None:
    pruner = build_pruner(grammar.RungsPruner(rungs=(0.1,), keep=0.3), 10, 5)
    assert isinstance(pruner, RungPruner)
    assert pruner.keeps[1] == 0.3
    assert math.prod(pruner.keeps[end] for end in (10, 20, 30, 40)) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("rungs", "keep", "match"), [((0, 3), 0.5, "from 1"), ((3,), 0.0, "keep"), ((3,), 1.5, "keep")]
)
def test_impossible_rungs_are_refused(rungs: tuple[int, ...], keep: float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RungPruner(rungs, keep)


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("keep", [0.25, 1 / 3, 0.5, 1.0])
@pytest.mark.parametrize("rivals", [0, 1, 2, 5, 11])
def test_survivors_are_the_best_ceil_of_keep_times_n(direction: str, keep: float, rivals: int) -> None:
    sign = 1 if direction == "maximize" else -1
    kept = [rank for rank in range(1, rivals + 2) if rank <= math.ceil(keep * (rivals + 1) - 1e-9)]
    survived = []
    for rank in range(1, rivals + 2):  # the same trial, at each place that it could have
        study = study_with(RungPruner([3], keep), direction=direction)
        for rival in range(rivals):
            add(study, rival, {3: sign * -(rival + 1.0)})
        if not judge(running(study, 99), 3, sign * -(rank - 0.5)):
            survived.append(rank)
    assert survived == kept


def test_a_trial_is_compared_with_the_trials_that_reached_the_rung_so_far() -> None:
    study = study_with(RungPruner([2], 1 / 3))
    trials = [running(study, trial_index) for trial_index in range(4)]
    verdicts = [judge(trial, 2, value) for trial, value in zip(trials, (0.1, 0.5, 0.2, 0.4), strict=True)]
    # ceil(n/3) of those so far survive: 1 of 1, 1 of 2, 1 of 3, 2 of 4. The first is not called back.
    assert verdicts == [False, False, True, False]


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING])
def test_trials_of_any_state_count_if_they_have_a_value_at_the_rung(state: TrialState) -> None:
    study = study_with(RungPruner([2], 0.5))
    add(study, 0, {2: 0.9}, state)
    add(study, 1, {1: 0.9}, state)  # has not reached the rung
    trial = running(study, 2)
    assert judge(trial, 2, 0.1)
    assert verdict(study, trial) == "rung 2: 2nd of 2, pruned"


def with_loss(study: optuna.Study, trial_index: int, value: float, loss: float) -> None:
    """Add a trial that has this value and this calibrated loss at step 2."""
    study.add_trial(
        create_trial(
            state=TrialState.PRUNED,
            intermediate_values={2: value},
            user_attrs={TRIAL_INDEX: trial_index},
            system_attrs={f"{RUNG_LOSS}2": loss},
        )
    )


def test_a_rung_ranks_by_the_calibrated_loss_where_all_trials_have_one() -> None:
    study = study_with(RungPruner([2], 0.5))
    for trial_index, loss in enumerate((0.4, 0.6, 0.8)):
        with_loss(study, trial_index, 0.9, loss)
    verdicts = {}
    for trial_index, (value, loss) in enumerate([(0.1, 0.5), (0.95, 0.7), (0.99, NAN)], 3):
        trial = running(study, trial_index)
        mark_loss(study, trial, 2, loss)
        verdicts[trial_index] = judge(trial, 2, value), verdict(study, trial)
    assert verdicts == {
        3: (False, "rung 2: 2nd of 4, kept"),
        4: (True, "rung 2: 4th of 5, pruned"),
        5: (True, "rung 2: 6th of 6, pruned"),
    }


def test_a_rung_ranks_by_the_value_if_a_trial_has_no_calibrated_loss() -> None:
    study = study_with(RungPruner([2], 0.5), {2: 0.5})  # as trials of earlier versions
    with_loss(study, 1, 0.6, 0.1)
    with_loss(study, 2, 0.7, 0.2)
    trial = running(study, 3)
    mark_loss(study, trial, 2, 9.0)
    assert not judge(trial, 2, 0.65)
    assert verdict(study, trial) == "rung 2: 2nd of 4, kept"


def costing(study: optuna.Study, trial_index: int, score: float, **costs: float) -> None:
    """Add a trial with this value at step 2, and these costs."""
    attributes = {TRIAL_INDEX: trial_index, **({COSTS: costs} if costs else {})}
    study.add_trial(create_trial(state=TrialState.PRUNED, intermediate_values={2: score}, user_attrs=attributes))


@pytest.mark.parametrize(
    ("own", "standing"),
    [
        ({"params": 100.0}, "2nd of 3"),  # with the trials of 100 and 125
        ({"params": 99.0}, "1st of 2"),
        ({"params": 1e6}, "4th of 5"),
        ({"params": 1e6, "latency": 1.0}, "4th of 5"),  # latency is known of no other trial
        ({"params": 100.0, "size": 1.0}, "1st of 2"),  # the trial of 125 has a size of 2
        ({}, "4th of 5"),
    ],
)
def test_a_trial_is_compared_with_those_that_cost_at_most_a_quarter_more_in_anything(
    own: dict[str, float], standing: str
) -> None:
    study = study_with(RungPruner([2], 0.1))
    costing(study, 0, 0.2, params=100.0)
    costing(study, 1, 0.7, params=125.0, size=2.0)
    costing(study, 2, 0.8, params=126.0)
    costing(study, 3, 0.9, params=1e5)
    trial = running(study, 4, **({COSTS: own} if own else {}))
    judge(trial, 2, 0.5)
    assert verdict(study, trial).startswith(f"rung 2: {standing}, ")


def test_a_trial_without_costs_is_a_rival_of_all() -> None:
    study = study_with(RungPruner([2], 0.5))
    costing(study, 0, 0.9)  # as before the space had costs
    assert judge(running(study, 1, **{COSTS: {"params": 1.0}}), 2, 0.5)


def front_area(seed: int, *, told: bool) -> tuple[float, float]:
    """Simulate 60 trials of 60 epochs: larger networks score higher, and the early scores are noisy.

    Returns:
        The mean, over the logarithm of the parameters, of the best final score so far; and the share of epochs trained.
    """
    draw = random.Random(seed)
    study, trained = study_with(RungPruner([2, 6, 18], 0.33)), 0
    complete: list[tuple[float, float]] = []
    for trial_index in range(60):
        size, slowness = draw.random(), draw.uniform(2, 12)
        final = 0.88 - 0.18 * math.exp(-2 * size) - 0.12 * draw.random() ** 1.5
        noise = [draw.gauss(0, 0.012) for _ in range(3)]
        trial = running(study, trial_index, **({COSTS: {"params": 1e4 * 300**size}} if told else {}))
        for rung, error in zip((2, 6, 18), noise, strict=True):
            if judge(trial, rung, final * (1 - 0.9 * math.exp(-rung / slowness)) + error):
                trained += rung
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            trained += 60
            study.tell(trial, final)
            complete.append((size, final))
    heights = [max([0.5, *(final for size, final in complete if size <= at / 100)]) for at in range(101)]
    return sum(heights) / len(heights), trained / (60 * 60)


def test_with_costs_the_small_networks_of_the_front_survive() -> None:
    blind, told = ([front_area(seed, told=told) for seed in range(5)] for told in (False, True))
    (score_alone, few), (with_costs, more) = (
        [sum(each) / 5 for each in zip(*found, strict=True)] for found in (blind, told)
    )
    assert with_costs > score_alone + 0.04
    assert few < more < 0.5


def test_equals_survive_together() -> None:
    study = study_with(RungPruner([1], 0.25), *[{1: 0.7}] * 4)
    assert not judge(running(study, 9), 1, 0.7)


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_nan_ranks_worst(direction: str) -> None:
    study = study_with(RungPruner([1], 0.5), {1: NAN}, direction=direction)
    assert not judge(running(study, 1), 1, 1000.0 if direction == "minimize" else -1000.0)
    add(study, 2, {1: 0.0})
    assert judge(running(study, 3), 1, NAN)


@pytest.mark.parametrize(
    ("attribute", "name"), [({BASELINE: True}, "the baseline"), ({RECIPE: "theirs"}, "recipe theirs")]
)
def test_the_baseline_and_recipes_are_never_pruned_but_count(attribute: Mapping[str, Any], name: str) -> None:
    study = study_with(RungPruner([1], 0.5, let_through=0.5), {1: 0.9})
    spared = running(study, 1, **attribute)
    assert not judge(spared, 1, 0.5)
    assert verdict(study, spared) == f"{name}, never pruned"
    assert LET_THROUGH not in study.trials[spared.number].user_attrs
    assert judge(running(study, 2), 1, 0.1)
    assert not judge(running(study, 4), 1, 0.6)  # 2nd of 4


def test_nothing_is_pruned_between_rungs() -> None:
    study = study_with(RungPruner([2, 6], 0.5), dict.fromkeys(range(1, 9), 0.9))
    trial = running(study, 1)
    assert [judge(trial, epoch, 1.0 if epoch == 2 else 0.0) for epoch in range(1, 7)] == [False] * 5 + [True]


def test_a_rung_is_decided_once_for_a_trial() -> None:
    study = study_with(RungPruner([2], 0.5))
    trial = running(study, 0)
    assert not judge(trial, 2, 0.1)
    for trial_index in range(1, 9):
        add(study, trial_index, {2: 0.9})
    assert not trial.should_prune()
    assert not judge(trial, 3, 0.1)


def test_a_retried_trial_keeps_the_decisions_of_rungs_that_it_passed() -> None:
    study = study_with(RungPruner([2, 4], 0.5))
    first = running(study, 0)
    assert not judge(first, 2, 0.1)
    for trial_index in range(1, 9):
        add(study, trial_index, {2: 0.9, 4: 0.9})
    again = retried(study, first)
    assert not judge(again, 1, 0.1)
    assert verdict(study, again) == "first rung: 2"
    assert not judge(again, 2, 0.1)
    assert verdict(study, again) == "rung 2: 1st of 1, kept"
    assert judge(again, 4, 0.1)


def test_a_retried_trial_is_pruned_at_the_same_rung_as_its_first_attempt() -> None:
    """The process was killed after storing the decision, before the trial ended."""
    study = study_with(RungPruner([1, 3], 0.5), *[{1: 0.1, 3: 0.9}] * 8, first=1)
    first = running(study, 0)
    assert [judge(first, epoch, 0.5) for epoch in (1, 2, 3)] == [False, False, True]
    again = retried(study, first)
    verdicts = [(judge(again, epoch, 0.5), verdict(study, again)) for epoch in (1, 2, 3)]
    passed = "rung 1: 1st of 9, kept"
    assert verdicts == [(False, passed), (False, passed), (True, "rung 3: 9th of 9, pruned")]


def test_a_rung_without_a_decision_is_decided_at_the_next_report() -> None:
    study = study_with(RungPruner([2], 0.5), {2: 0.9})
    trial = running(study, 1)
    trial.report(0.1, 2)
    assert judge(trial, 3, 1.0)
    assert verdict(study, trial) == "rung 2: 2nd of 2, pruned"


def test_a_trial_index_counts_once_with_its_latest_attempt() -> None:
    study = study_with(RungPruner([1], 0.5))
    add(study, 0, {1: 0.9}, TrialState.FAIL)
    add(study, 0, {1: 0.2}, TrialState.COMPLETE)
    trial = running(study, 1)
    judge(trial, 1, 0.5)
    assert verdict(study, trial) == "rung 1: 1st of 2, kept"


def test_failed_trials_do_not_count() -> None:
    study = study_with(RungPruner([1], 0.5))
    add(study, 0, {1: 0.9}, TrialState.FAIL)
    assert not judge(running(study, 1), 1, 0.1)


def test_the_verdict_before_the_first_rung_names_it() -> None:
    study = study_with(RungPruner([3], 0.5))
    assert verdict(study, running(study, 0)) == "first rung: 3"


@pytest.mark.parametrize(
    ("rank", "words"), [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (22, "22nd")]
)
def test_the_verdict_is_a_phrase(rank: int, words: str) -> None:
    study = study_with(RungPruner([1], 1.0), *[{1: 0.9}] * (rank - 1), first=1)
    trial = running(study, 0)
    judge(trial, 1, 0.5)
    assert verdict(study, trial) == f"rung 1: {words} of {rank}, kept"


# Noise


@pytest.mark.parametrize("keep", [0.25, 0.33, 0.5])
@pytest.mark.parametrize("images", [50, 400])
def test_among_equal_trials_the_true_best_is_cut_at_most_as_often_as_intended(keep: float, images: int) -> None:
    """All trials are equally good, so each of them is the true best: the fraction of trials that are cut."""
    draw, trials, cut = random.Random(0), 40, 0
    for _ in range(6):
        study = study_with(RungPruner([1], keep))
        for trial_index in range(trials):
            hits = sum(draw.random() < 0.7 for _ in range(images))
            cut += judge(running(study, trial_index), 1, hits / images)
    assert cut / (6 * trials) <= 1 - keep + 0.05


# Trials let through

SHARES = [0.5, 0.3, 1 / 3, 0.1, 0.02, 0.013]


def chosen(share: float, trial_indices: int) -> list[int]:
    return [trial_index for trial_index in range(trial_indices) if lets_through(trial_index, share)]


def test_the_default_fraction_lets_four_of_200_trials_through() -> None:
    assert chosen(grammar.RungsPruner().let_through, 200) == [25, 75, 125, 175]


def test_a_fraction_of_zero_lets_no_trial_through() -> None:
    assert chosen(0.0, 1000) == []


@pytest.mark.parametrize("share", SHARES)
def test_trial_indices_are_let_through_evenly_and_none_early(share: float) -> None:
    trial_indices = chosen(share, 2000)
    first = 1 / (2 * share)
    assert first <= trial_indices[0] < first + 1
    assert {later - earlier for earlier, later in pairwise(trial_indices)} <= {
        math.floor(1 / share),
        math.ceil(1 / share),
    }
    assert all(abs(len([s for s in trial_indices if s < n]) - share * n) <= 0.5 + share for n in range(2000))


@pytest.mark.parametrize("share", [-0.1, 0.51, NAN])
def test_a_fraction_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="let_through"):
        RungPruner([3], 0.5, let_through=share)


def test_the_fraction_comes_from_the_space_and_is_not_part_of_its_hash() -> None:
    usual, more, off = (load_space("digits", [f"pruner.let_through={share}"]) for share in (0.02, 0.5, 0))
    assert usual.hash == more.hash == off.hash == load_space("digits").hash
    pruners = [build_pruner(space.pruner, epochs=20, folds=3) for space in (usual, more, off)]
    assert [pruner.let_through for pruner in pruners if isinstance(pruner, RungPruner)] == [0.02, 0.5, 0]


def test_a_trial_that_is_let_through_is_never_pruned_and_marked() -> None:
    study = study_with(RungPruner([2, 4], 0.5, let_through=0.5), *[{2: 0.9, 4: 0.9}] * 2, first=2)
    trial = running(study, 1)
    assert not judge(trial, 1, 0.1)
    assert verdict(study, trial) == "first rung: 2"
    for epoch in (2, 3, 4, 5):
        assert not judge(trial, epoch, 0.1)
        assert verdict(study, trial) == "rung 2: 3rd of 3, let through on purpose"
    frozen = study.trials[trial.number]
    assert frozen.user_attrs[LET_THROUGH] == 2
    assert frozen.system_attrs["rung:2"] == [3, 3, False]
    assert "rung:4" not in frozen.system_attrs


def test_a_chosen_trial_that_passes_all_rungs_is_not_marked() -> None:
    study = study_with(RungPruner([2, 4], 0.5, let_through=0.5), {2: 0.1, 4: 0.1})
    trial = running(study, 1)
    assert not any(judge(trial, epoch, 0.5) for epoch in range(1, 6))
    assert LET_THROUGH not in study.trials[trial.number].user_attrs
    assert verdict(study, trial) == "rung 4: 1st of 2, kept"


def test_a_trial_that_was_let_through_does_not_count_at_later_rungs() -> None:
    study = study_with(RungPruner([2, 4], 0.5, let_through=0.5), {2: 0.9, 4: 0.5})
    late = running(study, 1)
    assert not any(judge(late, epoch, value) for epoch, value in ((2, 0.1), (3, 0.9), (4, 0.9)))
    other = running(study, 2)
    assert not judge(other, 2, 0.95)
    assert verdict(study, other) == "rung 2: 1st of 3, kept"  # there it counts
    assert not judge(other, 4, 0.6)
    assert verdict(study, other) == "rung 4: 1st of 2, kept"  # there it does not


@pytest.mark.parametrize("share", [0.5, 0.0], ids=["the same share", "none are let through any more"])
def test_a_retried_trial_is_let_through_as_its_first_attempt_was(share: float) -> None:
    study = study_with(RungPruner([2, 4], 0.5, let_through=0.5), {2: 0.9})
    first = running(study, 1)
    assert not judge(first, 2, 0.1)
    again = retried(study, first, let_through=share)
    assert not any(judge(again, epoch, 0.1) for epoch in range(1, 6))
    assert verdict(study, again) == "rung 2: 2nd of 2, let through on purpose"
    assert study.trials[again.number].user_attrs[LET_THROUGH] == 2


def test_a_trial_gets_its_mark_though_the_process_died_before_storing_it() -> None:
    study = study_with(RungPruner([2, 4], 0.5, let_through=0.5))
    study.add_trial(
        create_trial(state=TrialState.WAITING, user_attrs={TRIAL_INDEX: 1}, system_attrs={"rung:2": [2, 2, False]})
    )
    again = study.ask()
    assert not any(judge(again, epoch, 0.1) for epoch in (1, 2, 3))
    assert study.trials[again.number].user_attrs[LET_THROUGH] == 2


def played(pruner: RungPruner, curves: list[list[float]], starts: list[float]) -> dict[int, tuple[Any, ...]]:
    """Run trials in parallel, one step per tick from each start; returns trial number -> state and decisions."""
    study = study_with(pruner)
    trials = [running(study, trial_index) for trial_index in range(len(curves))]
    over = set()
    steps = sorted(
        (starts[trial_index] + step, trial_index, step)
        for trial_index, curve in enumerate(curves)
        for step in range(len(curve))
    )
    for _, trial_index, step in steps:
        if trial_index in over:
            continue
        pruned = judge(trials[trial_index], step + 1, curves[trial_index][step])
        if pruned or step + 1 == len(curves[trial_index]):
            study.tell(trials[trial_index], state=TrialState.PRUNED if pruned else None, values=None if pruned else 0.0)
            over.add(trial_index)
    return {
        trial.number: (trial.state, {key: mark for key, mark in trial.system_attrs.items() if "rung" in key})
        for trial in study.trials
        if LET_THROUGH not in trial.user_attrs
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("fold_ends", "steps"), [((), 12), ((12, 24), 36)], ids=["one split", "three folds"])
def test_other_trials_are_pruned_as_if_none_were_let_through(seed: int, fold_ends: tuple[int, ...], steps: int) -> None:
    draw = random.Random(seed)
    # The curves cross, so that a trial that is let through would often rank among the best later.
    curves = [[draw.random() for _ in range(steps)] for _ in range(60)]
    starts = [
        trial_index * draw.choice((1.0, 4.0, 20.0)) for trial_index in range(60)
    ]  # one after the other, or many at once
    without = played(RungPruner([1, 2, 6], 0.5, fold_ends), curves, starts)
    share = draw.choice((0.1, 0.3, 0.5))
    others = played(RungPruner([1, 2, 6], 0.5, fold_ends, let_through=share), curves, starts)
    assert others == {trial_index: without[trial_index] for trial_index in others}
    missing = without.keys() - others.keys()
    assert missing == {s for s in chosen(share, 60) if without[s][0] == TrialState.PRUNED} != set()


# Pruners by name

PRUNERS: dict[str, tuple[Any, type[optuna.pruners.BasePruner]]] = {
    "rungs": (grammar.RungsPruner(), RungPruner),
    "none": (grammar.NoPruner(name="none"), optuna.pruners.NopPruner),
    "median": (grammar.MedianPruner(name="median", startup_trials=0), optuna.pruners.MedianPruner),
    "percentile": (
        grammar.PercentilePruner(name="percentile", keep=0.25, startup_trials=0),
        optuna.pruners.PercentilePruner,
    ),
    "successive_halving": (
        grammar.SuccessiveHalvingPruner(name="successive_halving"),
        optuna.pruners.SuccessiveHalvingPruner,
    ),
    "hyperband": (grammar.HyperbandPruner(name="hyperband"), optuna.pruners.HyperbandPruner),
}


@pytest.mark.parametrize("name", PRUNERS)
def test_each_name_builds_its_pruner(name: str) -> None:
    config, kind = PRUNERS[name]
    assert isinstance(build_pruner(config, epochs=60), kind)


def study_with_good(pruner: optuna.pruners.BasePruner, curve: list[float]) -> optuna.Study:
    """A study with eleven complete trials of this curve."""
    # Hyperband chooses a bracket by the study's name; with a random name some brackets prune too late.
    study = optuna.create_study(direction="maximize", pruner=pruner, study_name="s")
    for trial_index in range(1, 12):
        good = running(study, trial_index)
        for step, value in enumerate(curve, 1):
            judge(good, step, value)
        study.tell(good, 0.9)
    return study


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "none"])
def test_every_pruner_prunes_bad_trials_but_not_the_baseline_and_the_recipes(name: str) -> None:
    epochs = 30
    study = study_with_good(build_pruner(PRUNERS[name][0], epochs), [0.9] * epochs)
    for trial_index, attribute in ((0, {BASELINE: True}), (12, {RECIPE: "theirs"})):
        spared = running(study, trial_index, **attribute)
        assert not any(judge(spared, epoch, 0.0) for epoch in range(1, epochs + 1))
    bad = running(study, 99)
    assert any(judge(bad, epoch, -0.1 * epoch) for epoch in range(1, epochs + 1))


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "none"])
def test_every_pruner_prunes_a_trial_that_gets_worse_in_a_later_fold(name: str) -> None:
    epochs, folds = 10, 3
    rising = [0.8 + 0.001 * step for step in range(1, epochs * folds + 1)]
    study = study_with_good(build_pruner(PRUNERS[name][0], epochs, folds), rising)
    late = running(study, 99)
    verdicts = [judge(late, s, 0.8 + 0.001 * s if s < epochs else 0.1) for s in range(1, epochs * folds + 1)]
    assert not any(verdicts[: epochs - 1])
    assert any(verdicts)


def test_the_warm_up_of_the_median_pruner_is_a_fraction_of_the_run() -> None:
    config = grammar.MedianPruner(name="median", startup_trials=0, warmup_fraction=0.5)
    study = optuna.create_study(direction="maximize", pruner=build_pruner(config, epochs=10))
    add(study, 0, dict.fromkeys(range(1, 11), 0.9), TrialState.COMPLETE)
    trial = running(study, 1)
    assert [judge(trial, epoch, 0.1) for epoch in range(1, 7)] == [False] * 4 + [True, True]
