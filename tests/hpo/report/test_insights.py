"""The report's analytic sections: their numbers equal those of scipy, scikit-learn, or a calculation by hand."""

from __future__ import annotations

import copy
import io
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState, create_trial
from PIL import Image
from safetensors.numpy import load_file
from scipy import stats
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from core.config import TrainConfig
from core.data import Dataset, folds
from core.metrics import per_class
from hpo.analysis import baselines as ranked
from hpo.analysis import costs as spent
from hpo.analysis import failures as failed
from hpo.analysis import outputs
from hpo.analysis import pruning as rungs
from hpo.analysis.study_data import StudyData, read_study_data
from hpo.confirmation.result import Confirmation
from hpo.confirmation.statistics import Interval
from hpo.paths import StudyPaths
from hpo.report import baselines, costs, failures, images, pruning, samples
from hpo.report.page import Section
from hpo.space import load_space, space_to_yaml
from hpo.space.pruner import places_of
from hpo.study import Study
from hpo.study.metadata import new_metadata
from hpo.study.results import read_rows
from hpo.trials import (
    BASELINE,
    INTERRUPTED,
    LET_THROUGH,
    RECIPE,
    RESUMED_EPOCH,
    RUNG_LOSS,
    TAKEN_FROM,
    TRIAL_INDEX,
)
from tests.hpo.invented import invented_confirmation, invented_study
from tests.hpo.report.pages import cells_of, figures_of, lead_of, text_of

EPOCHS = 20
SECTIONS: tuple[Callable[[StudyData], Section | None], ...] = (
    baselines.baselines,
    pruning.pruner_safety,
    pruning.edges,
    failures.failures,
    costs.costs,
    images.confusion,
    images.per_class,
    samples.augmented_samples,
    images.confident_errors,
)


# Studies to look at


def invented(
    dataset: Dataset,
    *overrides: str,
    trials: int = 60,
    space_file: str = "digits",
    best_rate: float = 6.0,
    fail: Callable[[Mapping[str, Any]], str] = lambda _: "",
) -> StudyData:
    """A study whose scores depend on the learning rate and the smoothing; `fail` maps parameters to a failure."""

    def value(params: Mapping[str, Any]) -> float:
        return 0.95 - 0.03 * abs(math.log(params["optim.lr_scale"] / best_rate)) - params["loss.smoothing"] / 4

    space = load_space(space_file, [f"epochs={EPOCHS}", *overrides])
    name, fails = f"invented-{next(_NUMBERS)}", lambda _, params: fail(params)
    return read_study_data(invented_study(space, dataset, name, trials=trials, seed=7, fails=fails, value=value))


_NUMBERS = count()


@pytest.fixture(scope="module")
def sixty(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> StudyData:
    """Such a study of sixty trials without failures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_STUDIES", str(tmp_path_factory.mktemp("sixty")))
        return invented(digits)


def given(dataset: Dataset, trials: Sequence[FrozenTrial], *overrides: str) -> StudyData:
    """A study in memory with these trials."""
    space = load_space("digits", [f"epochs={EPOCHS}", *overrides])
    found = optuna.create_study(direction=space.direction)
    found.set_user_attr("space", space_to_yaml(space))
    found.add_trials(trials)
    metadata = new_metadata(space, dataset, seed=0, data_path=None)
    return read_study_data(Study(found, StudyPaths.of("given"), metadata, "memory", space))


def a_trial(
    trial_index: int,
    reported: Mapping[int, float],
    value: float | None = None,
    *,
    state: TrialState | None = None,
    places: Mapping[int, tuple[int, int, bool]] | None = None,
    **attributes: Any,
) -> FrozenTrial:
    """A complete trial, or without a value a pruned one."""
    return create_trial(
        state=state or (TrialState.PRUNED if value is None else TrialState.COMPLETE),
        value=value,
        intermediate_values=dict(reported),
        user_attrs={TRIAL_INDEX: trial_index, **attributes},
        system_attrs={f"rung:{rung}": list(place) for rung, place in (places or {}).items()},
    )


@pytest.fixture(scope="module")
def sections(real: StudyData) -> dict[str, Section | None]:
    """All sections of the real search, by their functions' names."""
    return {section.__name__: section(real) for section in SECTIONS}


# Every section


@pytest.mark.parametrize("name", [section.__name__ for section in SECTIONS])
def test_every_section_has_a_short_summary_and_figures_whose_series_differ_without_color(
    sections: Mapping[str, Section | None], name: str
) -> None:
    found = sections[name]
    assert found is not None
    assert re.fullmatch(r"[a-z]+", found.id)
    assert found.lead.endswith(".")
    assert len(found.lead) < 600
    assert "None" not in text_of(found).replace("None: each", "")
    assert "nan" not in text_of(found)
    for fig in figures_of(found):
        assert all(fig["layout"][axis]["title"]["text"] for axis in ("xaxis", "yaxis"))
        symbols = [trace["marker"]["symbol"] for trace in fig["data"] if trace["type"] == "scatter"]
        assert len(set(symbols)) == len(symbols)
        assert sum(trace["type"] == "bar" for trace in fig["data"]) <= 1


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_a_study_without_trials_has_no_sections(
    digits: Dataset, section: Callable[[StudyData], Section | None]
) -> None:
    assert section(given(digits, [])) is None


# The pruner's safety


def test_the_rank_correlation_is_scipys_over_the_complete_trials_alone(sixty: StudyData) -> None:
    assert list(sixty.rungs) == [2, 5, 10]
    complete = [trial for trial in sixty.trials if trial.state == TrialState.COMPLETE]
    for rung in sixty.rungs:
        found = rungs.agreement(sixty, rung)
        early, final = [t.intermediate_values[rung] for t in complete], [t.value for t in complete]
        assert found.rho == pytest.approx(stats.spearmanr(early, final).statistic)
        assert len(found.points) == len(complete) < len(sixty.trials)


def test_the_rank_correlation_is_of_the_calibrated_losses_where_rungs_rank_by_them(digits: Dataset) -> None:
    trials = [a_trial(trial_index, {2: 0.5}, 0.1 * trial_index) for trial_index in range(5)]
    for trial, loss in zip(trials, (0.9, 0.8, 0.6, 0.7, 0.5), strict=True):
        trial.system_attrs[f"{RUNG_LOSS}2"] = loss
    found = rungs.agreement(given(digits, trials), 2)
    assert found.rho == pytest.approx(0.9)  # 1 - 6 × 2 / (5 × 24): two neighbours are exchanged
    assert [early for early, _ in found.points] == [0.5] * 5


@pytest.mark.parametrize(
    ("a", "b"),
    [([0.1, 0.2], [0.1, 0.2]), ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]), ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5]), ([], [])],
    ids=["two", "equal at the rung", "equal at the end", "none"],
)
def test_values_without_an_order_have_no_rank_correlation(a: list[float], b: list[float]) -> None:
    assert rungs.spearman(a, b) is None


def test_nan_at_a_rung_is_left_out(digits: Dataset) -> None:
    trials = [
        a_trial(trial_index, {2: 0.1 * trial_index, 5: 0.1, 10: 0.1}, 0.1 * trial_index) for trial_index in range(5)
    ]
    data = given(digits, [*trials, a_trial(5, {2: math.nan, 5: 0.1, 10: 0.1}, 0.9)])
    assert rungs.agreement(data, 2).rho == pytest.approx(1.0)
    assert len(rungs.agreement(data, 2).points) == 5


@pytest.mark.parametrize("n", [8, 30])
@pytest.mark.parametrize("r", [0.0, 0.5, 0.9])
def test_the_interval_of_a_rank_correlation_covers_the_truth(n: int, r: float) -> None:
    rng = np.random.default_rng(n)
    truth = 6 / math.pi * math.asin(r / 2)  # Spearman's of two normal variables with correlation r
    covered = []
    for _ in range(150):
        a = rng.standard_normal(n)
        b = r * a + math.sqrt(1 - r * r) * rng.standard_normal(n)
        rho = rungs.spearman(list(a), list(b))
        assert rho is not None
        interval = rungs.fisher_interval(rho, n)
        covered.append(interval is None or interval[0] <= truth <= interval[1])
    assert sum(covered) / 150 >= 0.9


def test_few_trials_and_a_perfect_agreement_have_no_interval() -> None:
    assert rungs.fisher_interval(0.5, 3) is None
    assert rungs.fisher_interval(1.0, 10) is None
    assert rungs.fisher_interval(-1.0, 10) is None


@pytest.mark.parametrize(("k", "n"), [(0, 3), (1, 3), (3, 3), (2, 40)])
def test_the_interval_of_a_fraction_is_the_exact_one(k: int, n: int) -> None:
    exact = stats.binomtest(k, n).proportion_ci(method="exact")
    assert rungs.fraction_interval(k, n) == pytest.approx((exact.low, exact.high))


@pytest.mark.parametrize("metric", ["accuracy", "nll"])
@pytest.mark.parametrize("off", [-0.05, 0.0, 0.02])
def test_the_gain_of_a_trial_that_was_let_through_is_over_the_best_of_the_others(
    digits: Dataset, metric: str, off: float
) -> None:
    sign = 1 if metric == "accuracy" else -1
    trials = [
        a_trial(0, {2: 0.5}, 0.5),
        a_trial(1, {2: 0.1}, 0.5 + sign * off, places={2: (4, 4, False)}, let_through=2),
        a_trial(2, {2: 0.6}, 0.5 - sign * 0.2),
        a_trial(3, {2: 0.1}, places={2: (4, 4, False)}),
        a_trial(4, {2: 0.1}, state=TrialState.RUNNING, let_through=5),
    ]
    data = given(digits, trials, f"objective.metric={metric}")
    ended, running = rungs.let_through(data)
    assert ended.gain == pytest.approx(off)
    assert (ended.rung, running.rung, running.gain) == (2, 5, None)
    lead = lead_of(pruning.pruner_safety(data))
    assert ("1 ended better than all others" in lead) == (off > 0)
    assert "Of the 1 trial that" in lead  # the one that runs has no final value


def test_the_table_and_the_figures_of_the_pruner_show_every_trial(digits: Dataset) -> None:
    data = invented(digits, "pruner.let_through=0.2")
    section = pruning.pruner_safety(data)
    rows = cells_of(section)
    assert [row[0] for row in rows] == ["epoch 2", "epoch 5", "epoch 10"]
    for row, rung in zip(rows, data.rungs, strict=True):
        came = [trial for trial in data.trials if rung in places_of(trial)]
        through = [trial for trial in data.trials if trial.user_attrs.get(LET_THROUGH) == rung]
        cut = [trial for trial in data.pruned if trial.last_step == rung]
        assert [int(cell) for cell in row[2:6]] == [len(came), len(cut), len(through), len(data.complete)]
    assert sum(int(row[4]) for row in rows) == len(rungs.let_through(data)) > 0
    drawn = [[len(trace["x"]) for trace in fig["data"]] for fig in figures_of(section)]
    assert all(kept + through == len(data.complete) for _, kept, through in drawn)
    assert sum(cut for cut, _, _ in drawn) == len(data.pruned)


@pytest.mark.parametrize(
    ("share", "words"),
    [
        ("0", r"lets no trial through .*is 0"),
        ("0.005", "index 100 is the first"),
        ("0.02", "index 25 would continue past a rung that prunes them, and none was pruned"),
    ],
)
def test_without_let_through_trials_there_is_a_reason_and_a_command(digits: Dataset, share: str, words: str) -> None:
    trials = [a_trial(trial_index, {2: 0.1 * trial_index}, 0.5) for trial_index in range(30)]
    section = pruning.pruner_safety(given(digits, trials, f"pruner.let_through={share}"))
    assert re.search(words, text_of(section))
    assert "--set pruner.let_through=0.1" in text_of(section)


def test_other_pruners_have_no_section(digits: Dataset) -> None:
    assert pruning.pruner_safety(given(digits, [a_trial(0, {2: 0.1}, 0.5)], "pruner.name=none")) is None


def test_with_folds_a_rung_is_named_by_its_fold(folded: StudyData, digits: Dataset) -> None:
    assert pruning.rung_text(folded, 1) == "the end of fold 1"
    three = given(digits, [], "data.folds=3")
    words = [pruning.rung_text(three, rung) for rung in three.rungs]
    ends = ["the end of fold 1", "the end of fold 2"]
    assert words == ["epoch 2 of fold 1", "epoch 5 of fold 1", "epoch 10 of fold 1", *ends]


# Edges


def test_with_few_trials_edges_are_unknown(digits: Dataset) -> None:
    section = pruning.edges(given(digits, [a_trial(0, {}, 0.5)]))
    assert "is unknown" in text_of(section)


def with_rates(folder: Path, low: float, high: float) -> str:
    """The digits' space with other bounds of the learning rate."""
    here = load_space("digits").path
    text = here.read_text().replace("recipes/", f"{here.parent}/recipes/")
    changed = text.replace("optim.lr_scale: {low: 1, high: 30,", f"optim.lr_scale: {{low: {low}, high: {high},")
    assert changed != text
    (folder / "rates.yaml").write_text(changed)
    return str(folder / "rates.yaml")


def test_an_edge_is_shown_with_the_line_that_widens_the_space(digits: Dataset, tmp_path: Path) -> None:
    data = invented(digits, "pruner.name=none", space_file=with_rates(tmp_path, 0.5, 10), best_rate=30)
    section = pruning.edges(data)
    assert "best values of `optim.lr_scale` are at its upper bound" in lead_of(section)
    assert re.search(r"optim\.lr_scale: \{low: .*high: .*\}", text_of(section))


def test_a_parameter_without_best_values_at_a_bound_is_not_named(digits: Dataset, tmp_path: Path) -> None:
    data = invented(digits, "pruner.name=none", space_file=with_rates(tmp_path, 0.5, 60))
    assert "optim.lr_scale" not in lead_of(pruning.edges(data))


# Failures


def test_failures_are_counted_by_cause_the_most_frequent_first(digits: Dataset) -> None:
    causes = ["diverged", "oom", "diverged", "invalid", "crashed", "diverged"]
    trials = [a_trial(trial_index, {}, failure=cause) for trial_index, cause in enumerate(causes)]
    data = given(digits, [*trials, a_trial(6, {1: 0.5}), a_trial(7, {1: 0.5}, 0.5)])
    counts = {cause: len(found) for cause, found in failed.by_cause(data).items()}
    assert counts == {"diverged": 3, "oom": 1, "invalid": 1, "crashed": 1}
    assert next(iter(counts)) == "diverged"
    section = failures.failures(data)
    assert cells_of(section)[0][:3] == ["diverged", "3", "38 %"]
    assert "6 of 8 finished trials could not be trained" in text_of(section)


def test_interrupted_attempts_are_counted_separately(digits: Dataset) -> None:
    trials = [
        a_trial(0, {1: 0.1}, state=TrialState.FAIL, interrupted=True),
        a_trial(0, {1: 0.1, 2: 0.2}, 0.5, resumed_epoch=1, crashes=1),
        a_trial(1, {1: 0.1}, 0.5),
    ]
    data = given(digits, trials)
    assert len(failed.interrupted(data)) == 1
    text = text_of(failures.failures(data))
    assert "None: each of the 2 finished trials" in text
    assert (
        "1 attempt ended before the trial did; 1 of them when their process died; 1 trial resumed from a checkpoint, "
        "which saved 1 epoch." in text
    )
    assert {INTERRUPTED, RESUMED_EPOCH} <= {key for t in trials for key in t.user_attrs}


@pytest.mark.parametrize(
    ("cause", "path", "limit", "words", "axis"),
    [
        ("diverged", "optim.lr_scale", 20, "a higher `optim.lr_scale`", {"type": "log"}),
        ("oom", "batch_size", 127, "`batch_size` = 128, of the others 0 of", {"ticktext": ["32", "64", "128"]}),
    ],
    ids=["a number", "a choice"],
)
def test_a_parameter_that_causes_failures_is_found(
    digits: Dataset, cause: str, path: str, limit: float, words: str, axis: dict[str, Any]
) -> None:
    data = invented(digits, fail=lambda params: cause if params[path] > limit else "")
    found = failed.pattern_of(data, cause)
    assert found is not None
    assert found.path == path
    section = failures.failures(data)
    assert words in lead_of(section)
    [fig] = figures_of(section)
    assert sum(len(trace["x"]) for trace in fig["data"]) == len(data.trials)
    assert axis.items() <= fig["layout"]["xaxis"].items()


def test_random_failures_rarely_have_a_pattern(digits: Dataset) -> None:
    told = 0
    for seed in range(5):
        draw = random.Random(seed)
        data = invented(digits, trials=40, fail=lambda _, draw=draw: "diverged" if draw.random() < 0.2 else "")
        told += failed.pattern_of(data, "diverged") is not None
    assert told <= 1


def test_two_failures_have_no_pattern(sixty: StudyData) -> None:
    trials = copy.deepcopy(sixty.trials)
    for trial in [trial for trial in trials if trial.state == TrialState.PRUNED][:2]:
        trial.set_user_attr("failure", "diverged")
    assert len(replace(sixty, trials=trials).failed) == 2
    assert failed.pattern_of(replace(sixty, trials=trials), "diverged") is None


# Costs


def test_epochs_and_times_are_the_sums_over_trials(digits: Dataset) -> None:
    data = invented(digits, fail=lambda params: "diverged" if params["optim.lr_scale"] > 25 else "")
    found = {cost.kind: cost for cost in spent.costs_of(data)}
    assert set(found) == {"complete trials", "pruned trials", "failed trials"}
    assert sum(cost.epochs or 0 for cost in found.values()) == sum(t.user_attrs["epochs"] for t in data.trials)
    whole = sum(cost.seconds or 0 for cost in found.values())
    assert whole == pytest.approx(sum(trial.user_attrs["elapsed_s"] for trial in data.trials))
    assert found["complete trials"].epochs == found["complete trials"].full_epochs == EPOCHS * len(data.complete)


def test_times_of_real_trials_are_those_of_their_metrics_files(real: StudyData) -> None:
    whole = sum(cost.seconds or 0 for cost in spent.costs_of(real) if cost.kind.endswith("trials"))
    last = [read_rows(real.study.paths.trial_metrics(trial.number))[-1]["elapsed_s"] for trial in real.trials]
    assert whole == pytest.approx(sum(last), abs=0.01)


def test_pruning_saved_the_missing_epochs_at_each_trials_pace(digits: Dataset) -> None:
    trials = [
        a_trial(0, {1: 0.1}, 0.5, epochs=20, elapsed_s=40.0),
        a_trial(1, {1: 0.1}, epochs=2, elapsed_s=6.0),
        a_trial(2, {1: 0.1}, epochs=5, elapsed_s=5.0),
        a_trial(3, {1: 0.1}, epochs=1, elapsed_s=1.0, failure="diverged"),  # a failure saves nothing
        a_trial(4, {1: 0.1}, epochs=1, elapsed_s=1.0, taken_from="other/3"),
    ]
    less = spent.saved(given(digits, trials))
    assert less == spent.Saved(18 + 15, 18 * 3.0 + 15 * 1.0)


def test_trials_of_another_study_cost_nothing_here(digits: Dataset) -> None:
    trials = [a_trial(0, {}, 0.5, epochs=20, elapsed_s=40.0, taken_from="other/0"), a_trial(1, {}, 0.5, elapsed_s=8.0)]
    data = given(digits, trials)
    assert [(cost.trainings, cost.seconds) for cost in spent.costs_of(data)] == [(1, 8.0)]
    assert "1 trial imported" in text_of(costs.costs(data))
    assert trials[0].user_attrs[TAKEN_FROM]


def test_the_wall_clock_leaves_out_pauses_and_counts_parallel_trials_once(digits: Dataset) -> None:
    begun = datetime(2026, 1, 1)
    spans = [(0, 10), (5, 20), (8, 9), (100, 130)]
    trials = []
    for trial_index, (start, end) in enumerate(spans):
        trial = a_trial(trial_index, {}, 0.5, elapsed_s=1.0)
        trial.datetime_start, trial.datetime_complete = begun + timedelta(seconds=start), begun + timedelta(seconds=end)
        trials.append(trial)
    assert spent.wall_clock(given(digits, trials)) == (130.0, 50.0)


def test_the_costs_of_a_confirmation_and_a_refit_are_listed(real: StudyData) -> None:
    refits = {"best": {"networks": 2, "epochs": [3, 2], "elapsed_s": 4.0, "test": {}}}
    found = spent.costs_of(replace(real, refits=refits, confirmation=a_confirmation(real)))
    assert [(cost.kind, cost.trainings, cost.epochs, cost.seconds) for cost in found[-2:]] == [
        ("confirmation", 10, 30, 12.0),
        ("refit best", 2, 5, 4.0),
    ]


def test_the_parameter_that_makes_an_epoch_slow_is_found(sixty: StudyData) -> None:
    (path, explained), *_ = spent.pace_parameters(sixty)
    assert path == "model.width"
    assert explained > 0.8
    assert "model.width" in text_of(costs.costs(sixty))


@pytest.mark.parametrize("kind", ["groups", "numbers"])
def test_the_fraction_explained_is_one_for_a_cause_and_near_zero_for_noise(kind: str) -> None:
    rng = np.random.default_rng(0)
    values = list(rng.integers(0, 4, 200)) if kind == "groups" else list(rng.random(200))
    assert spent.explained(values, [2.0 * v + 1 for v in values]) == pytest.approx(1.0)
    assert spent.explained(values, list(rng.random(200))) < 0.05
    assert spent.explained(values, [1.0] * 200) == 0.0


# Baselines


def a_confirmation(data: StudyData) -> Confirmation:
    """A confirmation of the best trial, the baseline and a recipe."""
    made = invented_confirmation(data, lead=0.1, base=0.8, evidence=True, epochs=30, elapsed_s=12.0)
    theirs = replace(
        made.contenders[1],
        key="recipe theirs",
        trial=None,
        recipe="theirs",
        stopped="cannot win: worse by 0.2",
        interval=Interval(0.7, 0.01, 5),
    )
    return replace(made, contenders=(*made.contenders, theirs))


def test_entries_are_the_best_the_baseline_and_the_recipes_best_first(digits: Dataset) -> None:
    trials = [
        a_trial(0, {}, 0.5, baseline=True),
        a_trial(1, {}, 0.9),
        a_trial(2, {}, 0.7, recipe="theirs"),
        a_trial(3, {}, 0.8),  # neither the best, nor to be beaten
        a_trial(4, {}, failure="oom", recipe="large"),
    ]
    data = replace(given(digits, trials), recipe_runs={"beside": {"value": 0.95}, "lost": {"failure": "oom"}})
    found = ranked.ranked_entries(data)
    assert [(entry.key, entry.value) for entry in found] == [
        ("recipe beside", 0.95),
        ("trial 1", 0.9),
        ("recipe theirs", 0.7),
        ("baseline", 0.5),
        ("recipe large", None),
        ("recipe lost", None),
    ]
    section = baselines.baselines(data)
    assert lead_of(section) == "Best: trial 1, validation accuracy 0.9000; not confirmed on other seeds and splits."
    for words in (
        "40.00 points better than the baseline (trial 0), 0.5000",
        "20.00 points better than recipe theirs (trial 2), 0.7000",
        "5.00 points worse than recipe beside, 0.9500",
        "recipe large (trial 4) could not be trained",
    ):
        assert words in text_of(section)
    assert [row[2] for row in cells_of(section)] == ["+0.4500", "+0.4000", "+0.2000", "–", "–", "–"]
    assert "could not be trained: oom" in text_of(section)
    assert {BASELINE, RECIPE} <= {key for trial in trials for key in trial.user_attrs}


def test_a_best_trial_that_is_the_baseline_is_listed_once(digits: Dataset) -> None:
    data = given(digits, [a_trial(0, {}, 0.9, baseline=True), a_trial(1, {}, 0.7, recipe="theirs")])
    assert [entry.key for entry in ranked.ranked_entries(data)] == ["baseline", "recipe theirs"]
    assert "it is the baseline (trial 0): the search found nothing better" in text_of(baselines.baselines(data))


def test_confirmed_scores_are_shown_with_their_intervals(real: StudyData) -> None:
    confirmed = replace(real, confirmation=a_confirmation(real))
    section = baselines.baselines(confirmed)
    assert "0.900 ± 0.010" in text_of(section)
    assert "better than the baseline by" in lead_of(section)
    assert "cannot win: worse by 0.2" in text_of(section)
    assert "Left out: trial 3, for which it is too small." in text_of(section)
    [fig] = figures_of(section)
    searched, squares, trainings = fig["data"]
    assert squares["error_x"]["array"] == [0.01, 0.01, 0.01]
    assert sorted(squares["x"]) == [0.7, 0.8, 0.9]
    assert len(trainings["x"]) == 15
    # Every mark is in the row of its own name.
    names = dict(zip(fig["layout"]["yaxis"]["tickvals"], fig["layout"]["yaxis"]["ticktext"], strict=True))
    for series, below in ((searched, 0), (squares, 0.22), (trainings, 0.22)):
        assert all(t.startswith(names[round(y + below)]) for y, t in zip(series["y"], series["text"], strict=True))


def test_one_replicate_has_a_mark_and_no_interval(real: StudyData) -> None:
    made = a_confirmation(real)
    alone = replace(made.contenders[0], interval=Interval(0.9, math.inf, 1))
    section = baselines.baselines(replace(real, confirmation=replace(made, contenders=(alone, *made.contenders[1:]))))
    assert "0.900 (no interval)" in text_of(section)


def test_there_is_a_warning_about_a_confirmation_of_fewer_trials(real: StudyData) -> None:
    made = replace(a_confirmation(real), search_trials=3)
    section = baselines.baselines(replace(real, confirmation=made))
    assert "was made when 3 trials were finished, and now 5 are" in text_of(section)


# Images


def test_confusion_and_class_scores_equal_those_of_scikit_learn(
    real: StudyData, sections: Mapping[str, Section | None], digits: Dataset
) -> None:
    assert real.best is not None
    kept = load_file(real.study.paths.trial_validation(real.best.number))
    labels, predicted = digits.labels.numpy()[kept["indices"]], kept["logits"].argmax(1)
    found = outputs.read_outputs(real)
    assert found is not None
    assert (found.confusion == confusion_matrix(labels, predicted, labels=range(10))).all()
    right = int((labels == predicted).sum())
    assert f"{right:,} of {len(labels)} validation images are right" in text_of(sections["confusion"])
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=range(10), zero_division=0
    )
    rows = cells_of(sections["per_class"])
    assert [float(row[3]) for row in rows] == pytest.approx(sorted(f1), abs=5e-4)
    for row in rows:
        k = digits.classes.index(row[0].removeprefix("▼ "))
        assert [float(c) for c in row[1:4]] == pytest.approx([precision[k], recall[k], f1[k]], abs=5e-4)
        assert int(row[4]) == support[k]
    assert sum(row[0].startswith("▼") for row in rows) == images.MARKED


def test_with_folds_every_image_is_counted_once(folded: StudyData, digits: Dataset) -> None:
    found = outputs.read_outputs(folded)
    assert found is not None
    assert sorted(found.indices) == list(range(len(digits.images)))
    assert found.confusion.sum() == len(digits.images)
    assert "each by the network of its fold of 2" in text_of(images.confusion(folded))


def test_mistakes_are_the_most_confident_ones(
    real: StudyData, sections: Mapping[str, Section | None], digits: Dataset
) -> None:
    found = outputs.read_outputs(real)
    assert found is not None
    errors = images.mistakes(found, digits.ids, most=7)
    confidences = [error["confidence"] for error in errors]
    assert confidences == sorted(confidences, reverse=True)
    wrong = found.predicted != found.labels
    assert confidences[0] == pytest.approx(found.probabilities[wrong].max())
    for error in errors:
        assert error["true"] != error["predicted"]
        assert digits.classes[int(digits.labels[error["index"]])] == error["true"]
        assert digits.ids[error["index"]] == error["id"]
    section = sections["confident_errors"]
    assert section is not None
    assert section.body.count("data:image/png") == 1


def test_a_network_without_mistakes_has_none_to_show(real: StudyData, monkeypatch: pytest.MonkeyPatch) -> None:
    found = outputs.read_outputs(real)
    assert found is not None
    perfect = np.eye(10, dtype=np.float32)[found.labels]
    monkeypatch.setattr(images, "read_outputs", lambda _: replace(found, probabilities=perfect))
    assert "no mistake at all" in text_of(images.confusion(real))
    assert "every validation image is right" in text_of(images.confident_errors(real))
    assert "▼" not in text_of(images.per_class(real))


def test_missing_outputs_are_reported_with_a_command(
    real: StudyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert real.best is not None
    elsewhere = StudyPaths(tmp_path / "elsewhere")
    monkeypatch.setattr(real.study, "paths", elsewhere)
    data = replace(real, notes=[])
    text = text_of(images.confusion(data))
    assert f"trials/{real.best.number:05d}/validation.safetensors" in text
    assert f"hpo refit {real.best.number}" in text
    assert len(data.notes) == 1
    assert images.per_class(data) is None
    assert images.confident_errors(data) is None
    assert samples.augmented_samples(data) is not None  # that needs the images alone


def test_missing_images_are_reported_with_a_command(real: StudyData, tmp_path: Path) -> None:
    data = replace(real, images_path=tmp_path / "nowhere", notes=[])
    for section in (images.confusion(data), samples.augmented_samples(data)):
        assert "The images are not here" in text_of(section)
        assert "--data IMAGES" in text_of(section)


def test_the_outputs_are_the_winners_or_else_the_best_trials(real: StudyData) -> None:
    assert real.best is not None
    base = replace(a_confirmation(real), winner="baseline", evidence=False)
    kept = real.study.paths.trial_validation(0).exists()
    found = outputs.read_outputs(replace(real, confirmation=base))
    assert found is not None
    shown = text_of(images.confusion(replace(real, confirmation=base)))
    if kept:
        assert found.choice.trial == 0
        assert "trial 0 (the confirmed winner)" in shown
    else:
        assert found.choice.trial == real.best.number
        assert "the best trial of the search, because the confirmed winner's outputs were not stored" in shown


def test_the_recorded_scores_of_the_test_images_are_shown_with_the_name_of_the_refit(
    real: StudyData, digits: Dataset
) -> None:
    table = torch.eye(10, dtype=torch.int64) * 9
    table[3, 5] = 4
    test = {
        "images": 94,
        "confusion": table.tolist(),
        "with_tta": {"per_class": per_class(table, digits.classes)},
    }
    data = replace(real, refits={"best": {"networks": 1, "epochs": 3, "test": test}})
    text = text_of(images.confusion(data))
    assert re.search("Test images, refit +best", text)
    assert "90 of 94 test images are right (95.7 %); the most frequent mistake: 3 taken for 5 (4)." in text
    assert len(figures_of(images.confusion(data))) == 2
    assert {row[0] for row in cells_of(images.per_class(data), 1)[:2]} == {"▼ 3", "▼ 5"}


@pytest.mark.parametrize(
    ("counts", "why"),
    [
        ([[0, 9, 1], [0, 5, 0], [0, 0, 5]], "it is never predicted; its 10 images were taken for b (9) and c (1)"),
        ([[0, 1, 0], [0, 5, 0], [0, 0, 5]], "it is never predicted; its image was taken for b (1)"),
        ([[0, 2, 0], [1, 5, 0], [0, 0, 5]], "it is predicted for other images only; its 2 images were taken for b (2)"),
        ([[1, 9, 0], [0, 5, 0], [0, 0, 5]], "mostly its own images are missed"),
        ([[5, 0, 0], [9, 9, 0], [0, 0, 5]], "mostly others are taken for it"),
        ([[0, 0, 0], [1, 5, 0], [0, 0, 5]], "there is no image of it, but others are taken for it"),
    ],
)
def test_the_reason_of_the_worst_class_follows_from_where_its_images_went(counts: list[list[int]], why: str) -> None:
    table = np.asarray(counts)
    rows = images._class_scores(table, ("a", "b", "c"))
    by_class = {name: dict(zip("abc", row, strict=True)) for name, row in zip("abc", counts, strict=True)}
    [worst] = [row for row in rows if row["class"] == "a"]
    assert images._why_bad(worst, by_class) == why


@pytest.mark.parametrize("size", [2, 20, 100])
def test_a_confusion_matrix_has_numbers_if_its_cells_are_large_enough(size: int) -> None:
    counts = np.eye(size, dtype=np.int64) * 5
    counts[0, 1] = 3
    [fig] = figures_of(images._matrix(counts, [f"class {k}" for k in range(size)]))
    numbers, labels = (
        [text for trace in fig["data"] for row in trace.get(key, ()) for text in row if text]
        for key in ("text", "hovertext")
    )
    assert sorted(numbers) == ([3, *[5] * size] if size <= 20 else [])
    assert len(labels) == size + 1
    assert "class 0 taken for class 1" in "".join(labels)


# What the network was shown


def tiles_of(sheet: bytes, side: int = 64) -> list[list[np.ndarray[Any, Any]]]:
    """The sheet's tiles, a row an image, 3 pixels apart; the first column is framed by 3 pixels on both sides."""
    pixels = np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB"))
    tops = range(3, pixels.shape[0], side + 3)
    lefts = [3, *range(side + 9, pixels.shape[1], side + 3)]
    return [[pixels[top : top + side, left : left + side] for left in lefts] for top in tops]


def with_augment(data: StudyData, values: Mapping[str, Any]) -> TrainConfig:
    assert data.best is not None
    off = {"augment.flip": 0.0, "augment.crop_pad_fraction": 0.0}
    return data.study.config_of(data.best).override({**off, **values})


def test_the_sheet_begins_with_the_images_and_its_draws_are_reproducible(real: StudyData, digits: Dataset) -> None:
    places = samples.examples(digits, 8)
    config = with_augment(real, {"augment.rotation_degrees": 30.0})
    sheet = samples.draw_sheet(digits, places, config, 8)
    tiles = tiles_of(sheet)
    assert (len(tiles), len(tiles[0])) == (8, 9)
    for row, place in zip(tiles, places, strict=True):
        grey = digits.images[place, 0].numpy().repeat(8, 0).repeat(8, 1)
        assert np.abs(row[0][..., 0].astype(int) - grey).max() <= 4  # the sheet has 256 colours
        assert all((tile != row[0]).any() for tile in row[1:])
    assert sheet == samples.draw_sheet(digits, places, config, 8)


@pytest.mark.parametrize(
    "values",
    [
        {"augment.flip": 0.5, "augment.alternate_flip": True},
        {"augment.apply_to": "repeats", "augment.rotation_degrees": 20.0, "sampling.oversample": 2},
        {"augment.mixup": 1.0},
        {"augment.cutmix": 1.0},
        {"augment.policy": "trivialaugment"},
        {"augment.erase": 1.0},
        {"augment.scale": 0.4, "augment.shear_degrees": 20.0},
    ],
    ids=str,
)
def test_whatever_a_training_does_to_its_images_is_drawn(
    real: StudyData, digits: Dataset, values: dict[str, Any]
) -> None:
    config = with_augment(real, values)
    tiles = tiles_of(samples.draw_sheet(digits, samples.examples(digits, 8), config, 8))
    assert any((tile != row[0]).any() for row in tiles for tile in row[1:])
    assert samples.augmentations(config.augment)


def test_erased_parts_have_the_mean_color(real: StudyData, digits: Dataset) -> None:
    config = with_augment(real, {"augment.erase": 1.0})
    mean = round(255 * folds(digits, config.data)[0].mean[0])
    for row in tiles_of(samples.draw_sheet(digits, samples.examples(digits, 8), config, 8)):
        for tile in row[1:]:
            assert ((tile == mean).all(-1) | (tile == row[0]).all(-1)).all()
            assert (tile == mean).any()


def test_a_configuration_without_augmentation_lists_none(real: StudyData) -> None:
    assert samples.augmentations(with_augment(real, {}).augment) == []


def test_examples_are_of_as_many_classes_as_possible(digits: Dataset) -> None:
    eight = samples.examples(digits, 8)
    assert len({int(digits.labels[place]) for place in eight}) == 8
    twelve = samples.examples(digits, 12)
    assert len(set(twelve)) == 12
    assert {int(digits.labels[place]) for place in twelve} == set(range(10))
