"""Intervals against scipy's, and early stopping and comparison on simulated searches.

Simulated scores come from images: a configuration labels each image right or wrong, replicates draw overlapping
stratified splits as real ones do, and each training adds its own noise. The true
score is that on infinitely many images.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import integrate, special, stats

from core.config import TrainConfig
from hpo.confirmation.result import (
    Confirmation,
    Contender,
    is_current,
    read_confirmation,
    searched_best,
    write_confirmation,
)
from hpo.confirmation.statistics import (
    MAX_REPLICATES,
    Allocation,
    Comparison,
    Interval,
    Scores,
    allocate,
    cannot_win,
    compare,
    corrected_interval,
    effective_share,
    optimism,
    own_score,
    paired,
    shrinkage,
)
from hpo.errors import StudyError
from tests.hpo.confirmation.simulated import some_confirmation, some_contender

SEEDS = 200
VALUES = [0.912, 0.907, 0.921, 0.915, 0.899, 0.910]


def scores(*values: float) -> Scores:
    """A value a replicate, without folds."""
    return {replicate: (value,) for replicate, value in enumerate(values)}


def excludes_zero(interval: Interval) -> bool:
    return interval.low > 0 or interval.high < 0


class TestInterval:
    @pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
    def test_without_overlap_it_is_the_t_interval(self, confidence: float) -> None:
        found = corrected_interval(VALUES, test_share=0, confidence=confidence)
        expected = stats.ttest_1samp(VALUES, 0).confidence_interval(confidence)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
        assert found.n == len(VALUES)

    @pytest.mark.parametrize(("test_share", "comparisons"), [(0.25, 1), (1 / 3, 7)])
    def test_overlap_and_comparisons_widen_it_by_the_formula(self, test_share: float, comparisons: int) -> None:
        found = corrected_interval(VALUES, test_share=test_share, comparisons=comparisons)
        n = len(VALUES)
        quantile = stats.t(n - 1).isf(0.05 / 2 / comparisons)
        expected = quantile * np.sqrt((1 / n + test_share) * np.var(VALUES, ddof=1))
        assert found.half_width == pytest.approx(expected, rel=1e-12)
        assert found.mean == pytest.approx(np.mean(VALUES))

    def test_with_folds_every_value_counts_and_n_is_the_replicates(self) -> None:
        with_folds = corrected_interval(VALUES, test_share=0.5, replicates=2)
        assert with_folds.half_width == corrected_interval(VALUES, test_share=0.5).half_width
        assert with_folds.n == 2

    def test_one_replicate_has_no_interval_whatever_its_folds(self) -> None:
        assert corrected_interval([0.9], test_share=0.25) == Interval(0.9, math.inf, 1)
        assert corrected_interval([0.9, 0.8, 0.7], test_share=0.5, replicates=1).half_width == math.inf
        assert not excludes_zero(corrected_interval([0.9], test_share=0.25))

    @pytest.mark.parametrize("noisy", [[0.0, 0.04, 0.08], [0.0, 0.7, 0.3], [-0.9, 0.9, 0.0]])
    def test_the_pooled_spread_is_limited_to_twice_its_own(self, noisy: list[float]) -> None:
        own = [0.01, 0.02, 0.03]
        lent = corrected_interval(own, test_share=0.25, others=[noisy])
        assert lent == corrected_interval(own, test_share=0.25, others=[[0.0, 0.02, 0.04]])

    def test_a_spread_of_zero_is_replaced_by_the_resolution(self) -> None:
        found = corrected_interval([0.0, 0.0, 0.0], test_share=0.25, resolution=0.01, others=[[0.0, 0.7, 0.3]])
        variance = (0 + 4 * 0.01**2) / 2
        assert found.half_width == pytest.approx(stats.t(4).isf(0.025) * np.sqrt((1 / 3 + 0.25) * variance))

    def test_others_are_pooled_up_to_its_own_degrees_of_freedom(self) -> None:
        own, other = [0.01, 0.02, 0.03], [0.0, 0.03, 0.01, 0.04, 0.02]
        found = corrected_interval(own, test_share=0.25, others=[other])
        variance = (np.var(own, ddof=1) + np.var(other, ddof=1)) / 2
        assert found.half_width == pytest.approx(stats.t(4).isf(0.025) * np.sqrt((1 / 3 + 0.25) * variance))
        assert found.mean == pytest.approx(0.02)
        one_more_of_the_same = corrected_interval(own, test_share=0.25, others=[other, other])
        assert one_more_of_the_same.half_width == pytest.approx(found.half_width)
        assert corrected_interval(own, test_share=0.25, others=[[0.5]]) == corrected_interval(own, test_share=0.25)

    @pytest.mark.parametrize("step", [1, 2])
    def test_equal_values_of_few_images_are_not_certain(self, step: int) -> None:
        """Three replicates that all differ by an image or two: the spread is taken for one image."""
        images = 450
        found = corrected_interval([step / images] * 3, test_share=1 / 3, resolution=1 / images)
        assert found.half_width == pytest.approx(4.3027 * math.sqrt(2 / 3) / images, rel=1e-4)
        assert not excludes_zero(found)

    def test_equal_values_that_are_many_images_exclude_zero(self) -> None:
        assert excludes_zero(corrected_interval([0.05] * 3, test_share=1 / 3, resolution=1 / 450))

    @pytest.mark.parametrize("values", [[0.0] * 4, [0.1] * 4, [0.9 - 0.8, 0.5 - 0.4, 0.3 - 0.2]])
    def test_equal_values_of_unknown_resolution_have_no_interval(self, values: list[float]) -> None:
        found = corrected_interval(values, test_share=0.25)
        assert found.half_width == math.inf
        assert not excludes_zero(found)

    @pytest.mark.parametrize(
        ("values", "arguments", "match"),
        [
            ([], {}, "at least one value"),
            ([0.9, math.nan], {}, "finite"),
            ([0.9, 0.8], {"test_share": -0.1}, "test_share -0.1"),
            ([0.9, 0.8], {"confidence": 1.0}, "confidence 1.0"),
            ([0.9, 0.8], {"comparisons": 0}, "0 comparisons"),
            ([0.9, 0.8], {"replicates": 3}, "3 replicates of 2 values"),
        ],
    )
    def test_invalid_arguments_are_errors(self, values: list[float], arguments: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            corrected_interval(values, **{"test_share": 0.25, **arguments})


class TestPairs:
    def test_only_common_replicates_count_in_their_order(self) -> None:
        a = {3: (0.9, 0.8), 1: (0.7, 0.7), 2: (0.5, 0.5)}
        b = {1: (0.6, 0.5), 3: (0.5, 0.5), 7: (0.1, 0.1)}
        found = paired(a, b)
        assert found.values == pytest.approx([0.1, 0.2, 0.4, 0.3])
        assert (found.replicates, found.mean) == (2, pytest.approx(0.25))
        assert paired(a, b, maximize=False).values == pytest.approx([-0.1, -0.2, -0.4, -0.3])

    def test_different_folds_are_a_fault(self) -> None:
        with pytest.raises(ValueError, match=r"shorter|longer"):
            paired({1: (0.9, 0.8)}, {1: (0.9,)})


class TestOverlap:
    @pytest.mark.parametrize("replicates", [1, 2, 5, 20])
    def test_of_free_splits_the_share_is_nadeau_and_bengios(self, replicates: int) -> None:
        assert effective_share(range(replicates), test_share=0.25, per_repeat=1) == pytest.approx(0.25)

    @pytest.mark.parametrize(
        ("numbers", "per_repeat", "within", "pairs"),
        [
            (range(5), 5, 10, 10),
            (range(7), 5, 10 + 1, 21),
            (range(10), 5, 2 * 10, 45),
            ((0, 1, 5, 6, 7), 5, 1 + 3, 10),  # of a race that left some out
            ((0, 0, 0, 1, 1, 1), 1, 3 + 3, 15),  # three folds of two replicates
        ],
    )
    def test_folds_of_a_repeat_correlate_half_as_much(
        self, numbers: Sequence[int], per_repeat: int, within: int, pairs: int
    ) -> None:
        correlation = (0.5 * within + (pairs - within)) / pairs * 0.2
        found = effective_share(numbers, test_share=0.25, per_repeat=per_repeat)
        assert found == pytest.approx(correlation / (1 - correlation))

    def test_it_corrects_the_race_the_comparison_and_its_noise(self) -> None:
        scored = {"baseline": scores(0.86, 0.87, 0.88, 0.87), "trial 3": scores(0.90, 0.915, 0.92, 0.91)}
        share = effective_share(range(4), test_share=0.25, per_repeat=4)
        assert compared(scored, per_repeat=4) == compared(scored, test_share=share)
        behind = {key: scored[key] for key in ("trial 3",)}
        found, expected = (
            cannot_win(scored["baseline"], behind, maximize=True, **how)
            for how in ({"test_share": 0.25, "per_repeat": 4}, {"test_share": share})
        )
        assert found == expected is not None


class TestRace:
    LEADER = scores(0.90, 0.91, 0.92, 0.91)

    def test_a_candidate_clearly_behind_is_stopped_with_the_size_of_the_gap(self) -> None:
        behind = scores(0.85, 0.865, 0.87, 0.86)
        why = cannot_win(behind, {"baseline": scores(0.86, 0.87, 0.88, 0.87), "trial 3": self.LEADER}, **RULES)
        assert why is not None
        assert why.startswith("worse than trial 3 by 0.0488 over 4 replicates, by at least 0.04")

    @pytest.mark.parametrize(("replicates", "error"), [(3, 0.2 / 2), (4, 0.2 / 6), (5, 0.2 / 12), (20, 0.2 / 342)])
    def test_it_is_the_one_sided_paired_test_corrected_for_the_looks(self, replicates: int, error: float) -> None:
        spread = np.random.default_rng(0).normal(0, 0.01, replicates)
        spread -= spread.mean()
        standard_error = spread.std(ddof=1) * np.sqrt(1 / replicates + RULES["test_share"])
        limit = stats.t(replicates - 1).isf(error) * standard_error
        stopped = [
            cannot_win(scores(*[0.5] * replicates), {"trial 3": scores(*(0.5 + gap + spread))}, **RULES) is not None
            for gap in (0.999 * limit, 1.001 * limit)
        ]
        assert stopped == [False, True]

    def test_a_lower_loss_leads(self) -> None:
        low, high = scores(0.30, 0.31, 0.29), scores(0.50, 0.52, 0.49)
        rules = {**RULES, "maximize": False}
        assert cannot_win(low, {"trial 3": high}, **rules) is None
        assert cannot_win(high, {"trial 3": low}, **rules) is not None

    def test_two_common_replicates_are_no_test(self) -> None:
        behind = {0: (0.1,), 1: (0.1,), 9: (0.1,), 10: (0.1,)}
        assert cannot_win(behind, {"trial 3": self.LEADER}, **RULES) is None

    def test_one_image_less_in_each_of_three_replicates_is_no_reason_to_stop(self) -> None:
        behind = scores(0.80, 0.81, 0.82, 0.81)
        ahead = scores(0.81, 0.82, 0.83, 0.82)
        assert cannot_win(behind, {"trial 3": ahead}, **RULES) is None
        assert cannot_win(behind, {"trial 3": ahead}, **RULES, resolution=0.01) is None
        assert cannot_win(behind, {"trial 3": ahead}, **RULES, resolution=0.001) is not None

    def test_a_failed_candidate_is_stopped_and_stops_no_other(self) -> None:
        assert cannot_win(scores(0.9, math.nan, 0.9), {}, **RULES) == "one of its trainings gave no score"
        behind = scores(0.5, 0.51, 0.52)
        assert cannot_win(behind, {"trial 3": scores(0.9, 0.91, math.nan)}, **RULES) is None


RULES: dict[str, Any] = {"test_share": 0.25, "maximize": True}


class TestAllocation:
    @pytest.mark.parametrize(
        ("budget", "candidates", "expected"),
        [
            (0, 8, (2, 3)),  # the smallest useful confirmation, even beyond the budget
            (7, 8, (2, 3)),
            (8, 8, (2, 4)),
            (11, 8, (2, 5)),
            (12, 8, (3, 4)),
            (16, 8, (4, 4)),
            (16, 3, (3, 5)),
            (24, 8, (4, 6)),
            (25, 8, (5, 5)),
            (29, 8, (5, 5)),
            (30, 8, (6, 5)),
            (500, 12, (6, 10)),
            (500, 3, (3, 10)),
            (500, 1, (1, 10)),
        ],
    )
    def test_first_replicates_then_challengers_then_replicates(
        self, budget: int, candidates: int, expected: tuple[int, int]
    ) -> None:
        found = allocate(budget_trainings=budget, candidates=candidates)
        assert (found.candidates, found.replicates) == expected
        assert found.trainings == found.candidates * found.replicates
        assert found.trainings <= max(budget, 6)

    @pytest.mark.parametrize(("budget", "expected"), [(0, 1), (2, 1), (4, 2), (5, 2), (6, 3)])
    def test_without_a_least_number_of_replicates_the_budget_holds(self, budget: int, expected: int) -> None:
        assert allocate(budget_trainings=budget, candidates=4, least=1) == Allocation(2, expected)

    def test_nothing_to_confirm_is_a_fault(self) -> None:
        with pytest.raises(ValueError, match="no configuration"):
            allocate(budget_trainings=10, candidates=0)


def compared(found: dict[str, Scores], *, stopped: Sequence[str] = (), **changes: Any) -> Comparison:
    return compare(found, baseline="baseline", stopped=stopped, **{**RULES, **changes})


class TestComparison:
    BASE = scores(0.86, 0.87, 0.88, 0.87)
    GOOD = scores(0.90, 0.915, 0.92, 0.91)
    FAIR = scores(0.87, 0.875, 0.87, 0.88)

    def test_the_best_challenger_that_beats_the_baseline_wins(self) -> None:
        found = compared({"baseline": self.BASE, "trial 3": self.FAIR, "trial 5": self.GOOD})
        assert (found.leader, found.winner, found.evidence) == ("trial 5", "trial 5", True)
        assert found.advantage is not None
        assert found.advantage.mean == pytest.approx(0.04125)
        assert found.scores["trial 5"] == own_score(self.GOOD, test_share=0.25)

    def test_the_interval_allows_for_every_challenger_that_had_its_chance(self) -> None:
        alone = compared({"baseline": self.BASE, "trial 5": self.GOOD}).advantage
        assert alone == corrected_interval(paired(self.GOOD, self.BASE).values, test_share=0.25)
        failed = compared({"baseline": self.BASE, "trial 5": self.GOOD, "trial 6": scores(math.nan)}).advantage
        assert failed == corrected_interval(paired(self.GOOD, self.BASE).values, test_share=0.25, comparisons=2)
        stopped = compared(
            {"baseline": self.BASE, "trial 5": self.GOOD, "trial 6": self.FAIR}, stopped=["trial 6"]
        ).advantage
        assert stopped == corrected_interval(
            paired(self.GOOD, self.BASE).values,
            test_share=0.25,
            comparisons=2,
            others=[paired(self.FAIR, self.BASE).values],
        )

    def test_an_unstable_challenger_hides_no_clear_winner(self) -> None:
        wild = scores(0.86, 0.15, 0.52)
        found = compared({"baseline": self.BASE, "trial 5": self.GOOD, "trial 6": wild}, stopped=["trial 6"])
        assert (found.winner, found.evidence) == ("trial 5", True)

    def test_a_leader_without_evidence_is_the_better_bet(self) -> None:
        found = compared({"baseline": self.BASE, "trial 3": self.FAIR})
        assert (found.leader, found.winner, found.evidence) == ("trial 3", "trial 3", False)
        assert found.advantage is not None
        assert found.expected is not None
        assert 0 < found.expected < found.advantage.mean

    def test_the_expected_gain_is_the_lead_shrunk_by_half_the_noise_of_a_difference(self) -> None:
        found = compared({"baseline": self.BASE, "trial 3": self.FAIR, "trial 5": self.GOOD})
        leads = [paired(one, self.BASE).values for one in (self.FAIR, self.GOOD)]
        variance = statistics.fmean(map(statistics.variance, leads)) / 2 * (1 / 4 + 0.25)
        share = shrinkage([0.0, *map(statistics.fmean, leads)], variance)
        assert found.expected == pytest.approx(share * statistics.fmean(leads[1]))

    def test_an_expected_gain_within_the_margin_leaves_the_baseline(self) -> None:
        expected = compared({"baseline": self.BASE, "trial 3": self.FAIR}).expected
        assert expected is not None
        by_margin = {
            margin: compared({"baseline": self.BASE, "trial 3": self.FAIR}, margin=margin).winner
            for margin in (0.99 * expected, 1.01 * expected)
        }
        assert list(by_margin.values()) == ["trial 3", "baseline"]

    def test_one_replicate_still_bets_on_the_leader(self) -> None:
        found = compared({"baseline": scores(0.80), "trial 3": scores(0.83), "trial 5": scores(0.70)})
        assert (found.winner, found.evidence) == ("trial 3", False)
        assert found.expected == pytest.approx(0.03 / 4)

    def test_the_stopped_and_the_failed_are_no_bet(self) -> None:
        found = compared(
            {"baseline": self.BASE, "trial 5": self.GOOD, "trial 6": scores(0.99, math.nan)}, stopped=["trial 5"]
        )
        assert (found.leader, found.winner, found.expected) == (None, "baseline", None)

    def test_significantly_worse_than_the_baseline_is_no_evidence(self) -> None:
        found = compared({"baseline": self.GOOD, "trial 3": self.BASE})
        assert (found.leader, found.winner, found.evidence) == ("trial 3", "baseline", False)
        assert found.advantage is not None
        assert excludes_zero(found.advantage)
        assert found.advantage.mean < 0

    def test_a_lower_loss_is_an_advantage(self) -> None:
        found = compared({"baseline": self.GOOD, "trial 3": self.BASE}, maximize=False)
        assert found.winner == "trial 3"
        assert found.advantage is not None
        assert found.advantage.mean > 0

    def test_the_stopped_and_the_failed_do_not_lead(self) -> None:
        found = compared(
            {"baseline": self.BASE, "trial 3": self.FAIR, "trial 5": self.GOOD, "trial 6": scores(0.99, math.nan)},
            stopped=["trial 5"],
        )
        assert found.leader == "trial 3"
        assert "trial 6" not in found.scores
        assert "trial 5" in found.scores

    def test_the_baseline_wins_if_no_challenger_remains(self) -> None:
        found = compared({"baseline": self.BASE, "trial 3": self.FAIR}, stopped=["trial 3"])
        assert (found.leader, found.winner, found.advantage, found.evidence) == (None, "baseline", None, False)

    @pytest.mark.parametrize("base", [{}, {"baseline": scores(0.9, math.nan)}, {"baseline": {}}])
    def test_the_best_challenger_wins_without_evidence_if_the_baseline_failed(self, base: dict[str, Scores]) -> None:
        found = compared({**base, "trial 3": self.FAIR, "trial 5": self.GOOD})
        assert (found.leader, found.winner, found.advantage, found.evidence) == ("trial 5", "trial 5", None, False)

    def test_nothing_trained_is_a_fault(self) -> None:
        with pytest.raises(ValueError, match="neither the baseline nor a challenger"):
            compared({"baseline": scores(math.nan), "trial 3": {}})

    def test_one_lucky_training_does_not_lead_what_others_did_three_times(self) -> None:
        found = compared({"baseline": self.BASE, "trial 5": self.GOOD, "trial 6": scores(0.99)})
        assert found.leader == "trial 5"

    def test_scores_that_are_all_equal_are_no_evidence(self) -> None:
        found = compared({"baseline": scores(1.0, 1.0, 1.0), "trial 3": scores(1.0, 1.0, 1.0)}, resolution=1 / 30)
        assert (found.winner, found.evidence) == ("baseline", False)

    @pytest.mark.parametrize(("maximize", "expected"), [(True, 0.009), (False, -0.009)])
    def test_optimism_is_positive_where_the_search_flattered(self, maximize: bool, expected: float) -> None:
        assert optimism(0.9917, Interval(0.9827, 0.01, 3), maximize=maximize) == pytest.approx(expected)


@pytest.mark.parametrize("variance", [0.0004, 0.01, 1.0])
@pytest.mark.parametrize("means", [(0.0, 0.05), (0.0, 0.05, 0.03, -0.01), (0.0, *[0.02] * 6, 0.04, 0.1)])
def test_the_shrinkage_is_the_posterior_mean_under_a_half_cauchy_prior(
    means: tuple[float, ...], variance: float
) -> None:
    squares = sum((mean - statistics.fmean(means)) ** 2 for mean in means)

    def density(spread: float) -> float:  # of the true scores' spread, the common mean integrated out
        total = variance + spread**2
        prior = 1 / (1 + spread**2 / variance)
        return float(prior * total ** (-(len(means) - 1) / 2) * math.exp(-squares / (2 * total)))

    def kept(spread: float) -> float:
        return density(spread) * spread**2 / (variance + spread**2)

    expected = integrate.quad(kept, 0, math.inf)[0] / integrate.quad(density, 0, math.inf)[0]
    assert shrinkage(means, variance) == pytest.approx(expected, rel=1e-5)


def test_the_shrinkage_of_sure_means_is_continuous_and_of_unknown_noise_is_the_priors() -> None:
    means, sure = (0.0, 1.0), 0.5 / (2 * 500)
    assert shrinkage(means, sure * 0.999) == pytest.approx(shrinkage(means, sure * 1.001), rel=1e-4)
    assert shrinkage(means, math.inf) == pytest.approx(1 / 3)
    assert shrinkage(means, 0.0) == 1.0


def simulated(
    rng: np.random.Generator,
    truths: Sequence[float],
    *,
    images: int = 2000,
    val_fraction: float = 0.25,
    alike: float = 0.7,
    luck: float = 0.2,
    noise: Sequence[float] | float = 0.0,
    per_repeat: int = 1,
) -> Iterator[np.ndarray]:
    """Scores (configurations,) of one replicate after the other: real splits, stratified by ten classes, of images that
    were drawn once.

    Args:
        truths: the share of all images there could be that each configuration labels right.
        alike: how much of an image's difficulty is the same for all configurations.
        luck: how much of what decides about an image is a training's own.
        noise: standard deviation that a training adds to its score, of each configuration.
        per_repeat: so many consecutive splits are disjoint.
    """
    classes, configurations = 10, len(truths)
    of_a_class, per_class = images // classes, round(images * val_fraction / classes)
    shared, own = rng.standard_normal((1, images)), rng.standard_normal((configurations, images))
    difficulty = np.sqrt(alike) * shared + np.sqrt(1 - alike) * own  # (configurations, images)
    limits = special.ndtri(truths)[:, None]
    for replicate in itertools.count():
        if replicate % per_repeat == 0:
            shuffled = rng.random((classes, of_a_class)).argsort(axis=1)
        first = replicate % per_repeat * per_class
        order = shuffled[:, first : first + per_class]
        val = (order + np.arange(classes)[:, None] * of_a_class).ravel()
        chance = rng.standard_normal((configurations, len(val)), dtype=np.float32)
        right = np.sqrt(1 - luck) * difficulty[:, val] + np.sqrt(luck) * chance < limits
        yield right.mean(axis=1) + np.asarray(noise) * rng.standard_normal(configurations)


def race(
    replicates: Iterable[np.ndarray],
    configurations: int,
    *,
    budget: int,
    test_share: float,
    resolution: float = 0.0,
    per_repeat: int = 1,
) -> tuple[dict[str, Scores], set[str], Comparison]:
    """Confirms as `hpo confirm` does: replicate by replicate, the first configuration being the base."""
    names = ["baseline", *(f"trial {number}" for number in range(1, configurations))]
    plan = allocate(budget_trainings=budget, candidates=configurations)
    found: dict[str, dict[int, tuple[float, ...]]] = {name: {} for name in names[: plan.candidates]}
    stopped: set[str] = set()
    rules: dict[str, Any] = {
        "test_share": test_share,
        "maximize": True,
        "resolution": resolution,
        "per_repeat": per_repeat,
    }
    left = plan.trainings
    for replicate, drawn in enumerate(itertools.islice(replicates, MAX_REPLICATES)):
        running = [name for name in found if name not in stopped]
        if len(running) < 2 or len(running) > left:
            break
        for name in running:
            found[name][replicate] = (float(drawn[names.index(name)]),)
        left -= len(running)
        for name in running[1:]:
            rivals = {rival: found[rival] for rival in running if rival != name}
            if cannot_win(found[name], rivals, **rules) is not None:
                stopped.add(name)
    return dict(found), stopped, compare(found, baseline="baseline", stopped=stopped, **rules)


def races(
    truths: Sequence[float],
    *,
    budget: int,
    val_fraction: float = 0.25,
    seeds: int = SEEDS,
    per_repeat: int = 4,
    **drawing: Any,
) -> Iterator[tuple[dict[str, Scores], set[str], Comparison]]:
    test_share = val_fraction / (1 - val_fraction)
    for seed in range(seeds):
        replicates = simulated(
            np.random.default_rng(seed), truths, val_fraction=val_fraction, per_repeat=per_repeat, **drawing
        )
        yield race(replicates, len(truths), budget=budget, test_share=test_share, per_repeat=per_repeat)


def rate(found: Sequence[bool]) -> float:
    return sum(found) / len(found)


def truth_of(key: str, truths: Sequence[float]) -> float:
    return truths[0] if key == "baseline" else truths[int(key.removeprefix("trial "))]


def covers(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


class TestSimulatedRaces:
    """Scores of 500 validation images: the standard deviation of one is 1.3 to 1.5 points."""

    @pytest.mark.parametrize(("candidates", "budget"), [(2, 10), (4, 20), (8, 40)])
    def test_a_planted_advantage_of_five_points_is_found(self, candidates: int, budget: int) -> None:
        truths = [0.85, 0.90, *[0.85] * (candidates - 2)]
        winners = [verdict.winner for _, _, verdict in races(truths, budget=budget, alike=0.85)]
        assert rate([winner == "trial 1" for winner in winners]) >= 0.9

    @pytest.mark.parametrize(("common", "own"), [(0.014, 0.005), (0.009, 0.009), (0.005, 0.012)])
    def test_a_planted_advantage_is_found_whatever_part_of_the_noise_is_the_splits(
        self, common: float, own: float
    ) -> None:
        found = []
        for seed in range(SEEDS):
            rng = np.random.default_rng(seed)
            noise = common * rng.standard_normal((MAX_REPLICATES, 1)) + own * rng.standard_normal((MAX_REPLICATES, 6))
            replicates = np.array([0.85, 0.85, 0.90, 0.85, 0.85, 0.85]) + noise
            found.append(race(replicates, 6, budget=36, test_share=1 / 3)[2].winner == "trial 2")
        assert rate(found) >= 0.9

    @pytest.mark.parametrize(("candidates", "budget"), [(2, 6), (3, 12), (4, 16), (6, 36), (6, 60)])
    def test_among_identical_candidates_a_winner_is_declared_in_five_percent_at_most(
        self, candidates: int, budget: int
    ) -> None:
        found = [verdict.evidence for _, _, verdict in races([0.85] * candidates, budget=budget, seeds=400)]
        assert rate(found) <= 0.05

    @pytest.mark.parametrize(("configurations", "budget"), [(2, 6), (4, 16), (6, 36), (6, 60)])
    def test_pure_noise_is_declared_a_winner_in_five_percent_at_most(self, configurations: int, budget: int) -> None:
        """Scores of free splits, which correlate as Nadeau and Bengio assume."""
        found = []
        for seed in range(400):
            rng = np.random.default_rng(seed)
            lasting, own = math.sqrt(0.2) * rng.standard_normal(configurations), math.sqrt(0.8)
            replicates = 0.85 + 0.02 * (lasting + own * rng.standard_normal((MAX_REPLICATES, configurations)))
            found.append(race(replicates, configurations, budget=budget, test_share=0.25)[2].evidence)
        assert rate(found) <= 0.05

    def test_the_best_of_near_equals_seldom_leaves(self) -> None:
        truths = [0.85, 0.86, *[0.85] * 4]
        stopped = ["trial 1" in stopped for _, stopped, _ in races(truths, budget=60, seeds=400)]
        assert 0 < rate(stopped) <= 0.1

    @pytest.mark.parametrize(("candidates", "budget"), [(2, 6), (4, 20), (6, 30)])
    def test_the_intervals_cover_the_truth_that_of_the_picked_leader_too(self, candidates: int, budget: int) -> None:
        truths = [0.85, *(0.88 - 0.03 * rank / candidates for rank in range(candidates - 1))]
        picked, picked_own, own = [], [], []
        for _, _, verdict in races(truths, budget=budget):
            own += [covers(interval, truth_of(key, truths)) for key, interval in verdict.scores.items()]
            if verdict.leader is not None and verdict.advantage is not None:
                truth = truth_of(verdict.leader, truths)
                picked.append(covers(verdict.advantage, truth - truths[0]))
                picked_own.append(covers(verdict.scores[verdict.leader], truth))
        assert rate(picked) >= 0.9
        assert rate(own) >= 0.9
        assert rate(picked_own) >= 0.9

    def test_the_race_seldom_drops_the_best_and_gives_its_trainings_to_the_others(self) -> None:
        truths = [0.85, 0.90, *[0.85] * 6]
        found = list(races(truths, budget=40, alike=0.85, seeds=50))
        assert rate(["trial 1" in stopped for _, stopped, _ in found]) <= 0.02
        assert np.mean([len(scored["trial 1"]) for scored, _, _ in found]) > 8
        assert all(sum(map(len, scored.values())) <= 40 for scored, _, _ in found)

    def test_one_noisy_challenger_does_not_win_by_its_noise(self) -> None:
        """Its spread is three times that of the others, from which it may borrow."""
        truths, noise = [0.85, 0.85, 0.85, 0.85], [0.01, 0.03, 0.01, 0.01]
        found = list(races(truths, budget=20, noise=noise))
        assert rate([verdict.evidence for _, _, verdict in found]) <= 0.1
        led = [verdict.advantage for _, _, verdict in found if verdict.leader == "trial 1"]
        assert len(led) > 50
        assert rate([covers(advantage, 0) for advantage in led if advantage is not None]) >= 0.9

    @pytest.mark.parametrize("images", [60, 200])
    def test_tiny_sets_give_no_false_certainty(self, images: int) -> None:
        """Scores of 20 or 50 validation images, nearly all right, are often the same in every replicate."""
        false, missed = [], []
        for seed in range(SEEDS):
            replicates = simulated(np.random.default_rng(seed), [0.98] * 4, images=images, alike=0.9, luck=0.05)
            verdict = race(replicates, 4, budget=12, test_share=1 / 3, resolution=4 / images)[2]
            false.append(verdict.evidence)
            missed.append(verdict.advantage is not None and not covers(verdict.advantage, 0))
        assert rate(false) <= 0.1
        assert rate(missed) <= 0.1


@pytest.fixture(scope="module")
def drawn() -> list[np.ndarray]:
    """Scores (10 replicates, 8 configurations) of every seed, all configurations being equally good."""
    return [
        np.stack(list(itertools.islice(simulated(np.random.default_rng(seed), [0.85] * 8, val_fraction=0.2), 10)))
        for seed in range(SEEDS)
    ]


class TestSimulatedReplicates:
    """All candidates have the same number of replicates, without early stopping."""

    @pytest.mark.parametrize("candidates", [2, 4, 8])
    @pytest.mark.parametrize("replicates", [3, 5, 10])
    def test_identical_candidates_win_seldom_and_intervals_cover(
        self, drawn: list[np.ndarray], candidates: int, replicates: int
    ) -> None:
        won, covered, own = [], [], []
        for scored in drawn:
            found = {
                key: scores(*map(float, scored[:replicates, column]))
                for column, key in enumerate(["baseline", *(f"trial {n}" for n in range(1, candidates))])
            }
            verdict = compare(found, baseline="baseline", stopped=[], test_share=0.25, maximize=True)
            assert verdict.advantage is not None
            won.append(verdict.evidence)
            covered.append(covers(verdict.advantage, 0))
            own.append(covers(verdict.scores["baseline"], 0.85))
        assert rate(won) <= 0.1
        assert rate(covered) >= 0.9
        assert rate(own) >= 0.9

    def test_without_the_correction_the_interval_would_be_too_narrow(self, drawn: list[np.ndarray]) -> None:
        plain = [covers(corrected_interval(scored[:, 0].tolist(), test_share=0), 0.85) for scored in drawn]
        corrected = [covers(corrected_interval(scored[:, 0].tolist(), test_share=0.25), 0.85) for scored in drawn]
        assert rate(plain) < 0.9 <= rate(corrected)

    def test_five_folds_a_replicate_cover_too(self) -> None:
        covered = []
        for seed in range(SEEDS):
            rng = np.random.default_rng(seed)
            right = rng.random(1000) < 0.85
            folds = {r: tuple(right[part].mean() for part in rng.permutation(1000).reshape(5, -1)) for r in range(3)}
            interval = own_score(folds, test_share=0.25)
            assert interval is not None
            assert interval.n == 3
            covered.append(covers(interval, 0.85))
        assert rate(covered) >= 0.9


@functools.cache
def equals(alike: float, luck: float, *, per_repeat: int) -> np.ndarray:
    """Differences (1,000 seeds, 10 replicates) of two configurations that are equally good; see `simulated`."""
    how: dict[str, Any] = {"images": 500, "val_fraction": 0.2, "alike": alike, "luck": luck, "per_repeat": per_repeat}
    drawn = [itertools.islice(simulated(np.random.default_rng(seed), [0.85] * 2, **how), 10) for seed in range(1000)]
    return np.array([[found - base for base, found in one] for one in drawn])


class TestSimulatedFolds:
    """Folds of a repeated 5-fold (`per_repeat=5`) and free splits (1)."""

    @pytest.mark.parametrize(("alike", "luck"), [(0.7, 0.2), (0.5, 0.05), (0.9, 0.6)])
    @pytest.mark.parametrize("replicates", [3, 5, 7, 10])
    def test_intervals_cover_and_are_narrower_and_equal_candidates_seldom_win(
        self, alike: float, luck: float, replicates: int
    ) -> None:
        found = {}
        for per_repeat in (1, 5):
            share = effective_share(range(replicates), test_share=0.25, per_repeat=per_repeat)
            drawn = equals(alike, luck, per_repeat=per_repeat)[:, :replicates]
            found[per_repeat] = [corrected_interval(one.tolist(), test_share=share, resolution=0.01) for one in drawn]
        assert rate([covers(interval, 0) for interval in found[5]]) >= 0.94
        assert rate([interval.low > 0 for interval in found[5]]) <= 0.05
        free, folds = (statistics.fmean(one.half_width for one in found[per_repeat]) for per_repeat in (1, 5))
        assert folds < free

    @pytest.mark.parametrize(("replicates", "expected"), [(5, 0.85), (10, 0.92)])
    def test_a_mean_difference_varies_less_where_images_decide_it(self, replicates: int, expected: float) -> None:
        free, folds = (equals(0.5, 0.05, per_repeat=each)[:, :replicates].mean(axis=1).std() for each in (1, 5))
        assert folds / free <= expected


INTERVAL = Interval(0.9123, 0.0041, 5)


def contender(key: str, **changes: Any) -> Contender:
    chosen_for = ("the baseline",) if key == "baseline" else ("best validation score", "best at epoch 6")
    fields: dict[str, Any] = {"search_value": 0.88, "scores": {3: (0.91,), 4: (0.915,)}, "interval": INTERVAL}
    return some_contender(key, TrainConfig(), 0.9, **{"chosen_for": chosen_for, **fields, **changes})


def confirmation(**changes: Any) -> Confirmation:
    """Trial 12 beats the base; trial 7 was stopped, and trial 9 failed."""
    about: dict[str, Any] = {
        "study": "digits",
        "evidence": True,
        "advantage": Interval(0.0311, 0.0062, 5),
        "optimism": 0.009,
        "search_epochs": 1320,
        "budget_epochs": 440,
        "epochs": 408,
        "trainings": 34,
        "replicates": 5,
        "elapsed_s": 754.0,
        "left_out": ("trial 4: more than the budget allows",),
        "search_trials": 50,
        "versions": {"torch": "2.11"},
    }
    contenders = changes.pop("contenders", None) or (
        contender("trial 12", search_value=0.9213),
        contender("baseline", interval=Interval(0.8812, 0.0062, 5)),
        contender("trial 7", stopped="worse than trial 12 by 0.0410 over 3 replicates", interval=INTERVAL),
        contender("trial 9", failure="diverged", interval=None, scores={3: (math.nan,)}),
    )
    return some_confirmation(*contenders, **{"leader": "trial 12", "winner": "trial 12", **about, **changes})


NO_GAIN = {"winner": "baseline", "evidence": False}


def test_on_given_validation_images_the_interval_is_over_seeds_alone() -> None:
    lines = "\n".join(confirmation(on_given_val=True).lines())
    assert "± is a 95 % interval over n seeds on the given validation images" in lines
    assert "splits" not in lines


@pytest.mark.parametrize(
    ("contenders", "maximize", "expected"),
    [
        ([("trial 7", 7, 0.9), ("baseline", 0, 0.8)], True, "trial 7"),
        ([("trial 7", 7, 0.9), ("baseline", 0, 0.8)], False, "baseline"),
        # Of equals the first, as `best_trial` has it, however they stand here.
        ([("trial 7", 7, 0.9), ("baseline", 0, 0.9)], True, "baseline"),
        ([("baseline", 0, 0.9), ("trial 7", 7, 0.9)], True, "baseline"),
        # Trained once beside the search, it is no best of many.
        ([("recipe r", None, 0.95), ("trial 7", 7, 0.9), ("baseline", 0, 0.8)], True, "trial 7"),
        ([("recipe r", None, 0.95), ("baseline", None, None)], True, None),
    ],
)
def test_the_searchs_best_is_the_first_of_its_best_trials(
    contenders: list[tuple[str, int | None, float | None]], maximize: bool, expected: str | None
) -> None:
    found = searched_best(
        [contender(key, trial=trial, search_value=value) for key, trial, value in contenders], maximize=maximize
    )
    assert (None if found is None else found.key) == expected


class TestWords:
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({}, "0.912 ± 0.004 (n = 5), better than the baseline by 0.031 ± 0.006"),
            # With three decimals both numbers would be 0.006.
            ({"advantage": Interval(0.00624, 0.00581, 5)}, "(n = 5), better than the baseline by 0.0062 ± 0.0058"),
            ({"advantage": Interval(0.002, 0.0003, 5)}, "(n = 5), better than the baseline by 0.0020 ± 0.0003"),
            (
                {**NO_GAIN, "advantage": Interval(0.0031, 0.0062, 5)},
                "no significant gain: trial 12, the best of 3 challengers, beats the baseline by 0.003 ± 0.006 (n = 5)",
            ),
            (
                {**NO_GAIN, "advantage": Interval(-0.031, 0.0062, 5)},
                "is worse than the baseline by 0.031 ± 0.006 (n = 5)",
            ),
            ({**NO_GAIN, "advantage": Interval(0.0001, 0.0062, 5)}, "equals the baseline, 0.000 ± 0.006 (n = 5)"),
            (
                {**NO_GAIN, "advantage": Interval(0.031, math.inf, 1)},
                "beats the baseline by 0.031 (n = 1; one replicate gives no interval)",
            ),
            (
                {**NO_GAIN, "advantage": Interval(0.031, math.inf, 3)},
                "beats the baseline by 0.031 (n = 3; equal differences give no interval)",
            ),
            (
                {**NO_GAIN, "leader": None, "advantage": None},
                "all 3 challengers were stopped or failed; the baseline scores 0.881 ± 0.006 (n = 5)",
            ),
            (
                {**NO_GAIN, "leader": None, "advantage": None, "contenders": (contender("baseline"),)},
                "no significant gain: no other trial was compared with the baseline, 0.912 ± 0.004 (n = 5)",
            ),
            (
                {"evidence": False, "advantage": None},
                "0.912 ± 0.004 (n = 5), without a comparison: the baseline could not be trained",
            ),
        ],
    )
    def test_the_verdict_has_the_winner_its_advantage_and_the_interval(
        self, changes: dict[str, Any], expected: str
    ) -> None:
        assert confirmation(**changes).verdict.endswith(expected)

    def test_the_whole_result_as_text(self) -> None:
        assert confirmation().lines() == [
            "the winner is trial 12: accuracy 0.912 ± 0.004 (n = 5), better than the baseline by 0.031 ± 0.006",
            "  trial 12: 0.912 ± 0.004 (n = 5); best validation score, best at epoch 6",
            "  the baseline (trial 0): 0.881 ± 0.006 (n = 5)",
            "  trial 7: 0.912 ± 0.004 (n = 5); best validation score, best at epoch 6; stopped early: worse than "
            "trial 12 by 0.0410 over 3 replicates",
            "  trial 9: no score; best validation score, best at epoch 6; could not be trained: diverged",
            "the best score of the search, 0.9213 of trial 12, was 0.90 points too high",
            "cost: 34 trainings, 408 epochs, 31 % of the search's 1,320, 13 min",
            "left out: trial 4: more than the budget allows",
            "± is a 95 % interval over n seeds and splits, corrected for overlapping splits (Nadeau and Bengio 2003)",
            "the interval of the advantage holds for all 3 challengers at once (Bonferroni)",
        ]

    def test_a_leader_without_evidence_is_the_best_bet(self) -> None:
        bet = {"evidence": False, "advantage": Interval(0.0031, 0.0062, 5), "expected": 0.0021}
        assert confirmation(**bet).lines()[0] == (
            "the winner is trial 12: accuracy 0.912 ± 0.004 (n = 5), the best bet: +0.0021 expected over the baseline; "
            "not a proven gain (0.003 ± 0.006)"
        )

    def test_a_margin_that_keeps_the_baseline_is_named(self) -> None:
        below = {**NO_GAIN, "advantage": Interval(0.0031, 0.0062, 5), "expected": 0.0021, "margin": 0.005}
        first, second = confirmation(**below).lines()[:2]
        assert first.endswith("by 0.003 ± 0.006 (n = 5), +0.0021 expected, and the space asks for more than 0.005")
        assert second.startswith("the winner is the baseline")

    def test_without_evidence_the_baseline_is_named_the_winner(self) -> None:
        first, second = confirmation(**NO_GAIN, advantage=Interval(0.003, 0.0062, 5)).lines()[:2]
        assert first.startswith("no significant gain")
        assert second == "the winner is the baseline (trial 0): accuracy 0.881 ± 0.006 (n = 5)"

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"optimism": -0.004}, "was not too optimistic: the confirmed score is 0.40 points better"),
            ({"optimism": 0.00001}, "of trial 12, was confirmed"),
            (
                {"metric": "nll", "direction": "minimize", "optimism": 0.0123},
                "0.8800 of the baseline (trial 0), was 0.0123 too low",
            ),
            ({"budget_epochs": 40}, "(the budget was 40), 13 min"),
        ],
    )
    def test_a_line_of_the_result(self, changes: dict[str, Any], expected: str) -> None:
        assert any(line.endswith(expected) for line in confirmation(**changes).lines())

    def test_one_replicate_gives_no_interval(self) -> None:
        once = contender("baseline", interval=Interval(0.9, math.inf, 1))
        lines = confirmation(
            contenders=(once,), winner="baseline", leader=None, advantage=None, evidence=False, replicates=1
        ).lines()
        assert "the winner is the baseline (trial 0): accuracy 0.900 (n = 1, no interval)" in lines
        assert lines[-1] == "n = 1: one replicate gives no interval"


class TestFile:
    @pytest.mark.parametrize(
        "changes", [{}, {"advantage": Interval(0.031, math.inf, 1)}, {"advantage": None, "optimism": None}]
    )
    def test_it_is_read_as_it_was_written(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        path = tmp_path / "confirmation.json"
        written = confirmation(**changes)
        write_confirmation(path, written)
        json.loads(path.read_text(), parse_constant=pytest.fail)  # infinity and NaN are no JSON
        found = read_confirmation(path)
        assert found is not None
        # NaN is no equal of itself.
        (failed_one,) = [one for one in found.contenders if one.failure is not None]
        assert math.isnan(failed_one.scores[3][0])
        assert [replace(one, scores={}) for one in found.contenders] == [
            replace(one, scores={}) for one in written.contenders
        ]
        assert found.contenders[0].scores == {3: (0.91,), 4: (0.915,)}
        assert replace(found, contenders=()) == replace(written, contenders=())
        assert [path.name for path in tmp_path.iterdir()] == ["confirmation.json"]

    def test_a_file_of_version_0_1_0_has_the_old_key_of_the_baseline(self, tmp_path: Path) -> None:
        path = tmp_path / "confirmation.json"
        write_confirmation(path, confirmation(**NO_GAIN))
        path.write_text(path.read_text().replace('"baseline"', '"base"'))
        found = read_confirmation(path)
        assert found is not None
        assert (found.winner, found.contender("baseline").trial) == ("baseline", 0)

    def test_a_missing_file_is_none(self, tmp_path: Path) -> None:
        assert read_confirmation(tmp_path / "confirmation.json") is None

    @pytest.mark.parametrize(
        ("damage", "why"),
        [
            (lambda text: text[: len(text) // 2], "Expecting|Unterminated"),
            (lambda text: "[1, 2]", "dictionary|Confirmation"),
            (lambda text: text.replace('"winner": "trial 12"', '"winner": "trial 77"'), "winner: 'trial 77'"),
            (lambda text: text.replace('"trainings": 34', '"trainings": "many"'), "trainings: "),
            (lambda text: text.replace('"metric"', '"measure"'), "metric: Field required"),
            (lambda text: text.replace('"maximize"', '"up"'), "direction: 'up'"),
            (lambda text: text.replace('"key": "baseline"', '"key": "trial 7"'), "two have the same key"),
        ],
    )
    def test_a_damaged_file_is_one_line_with_the_fix(self, tmp_path: Path, damage: Any, why: str) -> None:
        path = tmp_path / "digits" / "confirmation.json"
        path.parent.mkdir()
        write_confirmation(path, confirmation())
        path.write_text(damage(path.read_text()))
        with pytest.raises(StudyError, match=rf"(?s)confirmation\.json: cannot be read \(.*({why})") as raised:
            read_confirmation(path)
        assert str(raised.value).endswith("remove it and run `hpo confirm digits` again")
        assert "\n" not in str(raised.value)

    def test_it_is_outdated_after_further_trials(self) -> None:
        assert is_current(confirmation(search_trials=50), 50)
        assert not is_current(confirmation(search_trials=50), 51)

    def test_a_contender_is_found_by_its_key(self) -> None:
        assert confirmation().contender("trial 7").trial == 7
        with pytest.raises(KeyError, match="trial 99"):
            confirmation().contender("trial 99")
