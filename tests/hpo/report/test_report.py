"""The report: every kind of study has a page, the page loads nothing, and every figure shows every trial."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import plotly.graph_objects as go
import pytest
from markupsafe import Markup

from core.data import Dataset
from core.text import count
from hpo.analysis.costs import progress
from hpo.analysis.study_data import StudyData, read_study_data, value_of
from hpo.api.options import ReportOptions
from hpo.api.study import report
from hpo.confirmation.result import write_confirmation
from hpo.confirmation.statistics import Interval
from hpo.errors import StudyError
from hpo.report import sections_of, write_report
from hpo.report.answer import answer, changed, next_commands, verdict, warnings_of
from hpo.report.baselines import baselines
from hpo.report.charts import around, log_axis
from hpo.report.compare import comparison, progress_figure
from hpo.report.compare import warnings_of as incomparable
from hpo.report.figures import (
    _in_lines,
    curves_figure,
    history_figure,
    importances,
    importances_figure,
    learning_curves,
    parallel_figure,
    slice_figures,
    slices,
)
from hpo.report.page import _plotly_js as PLOTLY_JS
from hpo.report.page import figure, page, paragraph, picture, plain, section, table
from hpo.space import load_space
from hpo.study import Study
from hpo.text import difference, number
from hpo.trials import FAILURE
from tests.hpo.commands import hpo
from tests.hpo.invented import ALL_STATES, BASE, SPACE, invented_confirmation, invented_study
from tests.hpo.report.pages import check_page, lead_of, text_of

ONE_PARAMETER = f"""
data: {{name: digits}}
{BASE}}}
pruner: {{name: none}}
search:
  optim.lr_scale: {{low: 0.5, high: 20, log: true}}
"""
FOLDS = SPACE.replace("data: {name: digits}", "data: {name: digits, folds: 3}")
NLL = SPACE + "objective: {metric: nll}\n"


@pytest.fixture(autouse=True)
def no_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without the megabytes of plotly.js, which take most of a test's time."""
    monkeypatch.setattr("hpo.report.page._plotly_js", lambda: Markup("plotly.js"))


def made(digits: Dataset, space: str = SPACE, *, name: str = "made", **how: Any) -> StudyData:
    """A study without training."""
    return read_study_data(invented_study(space, digits, name, **how))


# Every study gives a page -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "how", "words"),
    [
        pytest.param(SPACE, ALL_STATES, "The search is not over: 12 of 17 trials finished, 2 trials running", id="all"),
        pytest.param(SPACE, {"trials": 1}, "Only the baseline was trained", id="a single trial"),
        pytest.param(SPACE, {"trials": 4, "fails": lambda *_: "oom"}, "No trial is complete yet", id="all failed"),
        pytest.param(SPACE, {"trials": 0, "running": 1, "waiting": 2}, "No trial is complete yet", id="begun"),
        pytest.param(ONE_PARAMETER, {"trials": 6}, "one parameter is searched", id="one parameter"),
        pytest.param(SPACE, {"trials": 5, "value": lambda _: 0.9}, "scores best", id="all alike"),
        pytest.param(FOLDS, {"trials": 8}, "The epochs of the 3 folds follow one another", id="folds"),
        pytest.param(NLL, {"trials": 8}, "NLL (nats)", id="a loss"),
        pytest.param("digits", {"trials": 25}, "scores best", id="the digits space"),
    ],
)  # fmt: skip
def test_every_study_gives_a_whole_page(
    digits: Dataset, tmp_path: Path, space: str, how: dict[str, Any], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    study = invented_study(load_space(space) if space == "digits" else space, digits, "shown", **how)
    capfd.readouterr()
    write_report(study, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    check_page(text)
    assert words in re.sub(r"<[^>]+>", "", text)
    assert capfd.readouterr() == ("", ""), "Optuna's messages are in the page, not on the terminal"


def test_a_study_of_an_older_version_without_its_space_gives_a_page(twelve: StudyData) -> None:
    data = replace(twelve, space=None)
    assert data.rungs == {}
    check_page(page("old", sections_of(data)))


# The parts of a page ------------------------------------------------------------------------------------------------


def test_control_characters_are_escaped_in_every_part_of_a_page() -> None:
    text = page("\x1b[31m", [section("a", "b\x07", "c\u202e", paragraph("d\x9b"), table(["e\x08"], [["f\x7f"]]))])
    shown = text.partition("<body")[2]
    assert [one for one in shown if not one.isprintable() and one not in "\n\xa0"] == []
    assert all(escaped in text for escaped in (r"\x1b[31m", r"b\x07", r"c\u202e", r"d\x9b", r"e\x08", r"f\x7f"))


HOSTILE = "</script><script>alert(1)</script><b>&\"'"


def test_no_text_becomes_markup() -> None:
    fig = go.Figure(go.Scatter(x=[1], y=[1], text=[HOSTILE], name=HOSTILE))
    body = figure(fig, alt=HOSTILE) + table([HOSTILE], [[HOSTILE]]) + paragraph(HOSTILE) + picture(b"x", alt=HOSTILE)
    text = page(HOSTILE, [section("one", HOSTILE, HOSTILE, body, HOSTILE)])
    drawn = check_page(text)
    assert drawn[0]["data"][0]["name"] == HOSTILE
    assert "<b>" not in text.partition("<script>")[0]


def test_plotly_is_embedded_once_and_only_where_a_figure_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpo.report.page._plotly_js", PLOTLY_JS)
    one = section("one", "One", "Lead.", figure(go.Figure(), alt="nothing"))
    assert page("x", [one, replace(one, id="two")]).count("plotly.js v") == 1
    assert len(page("x", [section("one", "One", "Lead.")])) < 20_000


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.123456789, 0.123457),
        (1234567.8, 1234570.0),
        (math.nan, None),
        (math.inf, None),
        (np.array([1.0, math.nan]), [1.0, None]),
        (np.int64(3), 3),
        (np.bool_(True), True),
        ((1, "a", {"b": 0.5}), [1, "a", {"b": 0.5}]),
    ],
)
def test_the_numbers_of_a_figure_are_plain_and_short(value: Any, shown: Any) -> None:
    assert plain(value) == shown
    json.dumps(plain(value), allow_nan=False)


def test_a_figure_is_not_changed_by_rendering() -> None:
    fig = go.Figure(go.Scatter(x=[1.23456789], y=[2]), {"title": "kept", "width": 300})
    before = fig.to_json()
    (drawn,) = check_page(page("x", [section("one", "One", "Lead.", figure(fig, alt="a point"))]))
    assert fig.to_json() == before
    assert "title" not in drawn["layout"]
    assert drawn["layout"]["autosize"] is True


@pytest.mark.parametrize(
    ("value", "words"),
    [(22.1234, "22.1"), (4.47e-6, "4.47e-6"), (1e-4, "1e-4"), (0.0, "0"), (0.05, "0.05"), (12345, "1.23e4"), (1, "1")],
)  # fmt: skip
def test_numbers_are_written_short(value: float, words: str) -> None:
    assert number(value) == words
    assert float(words) == pytest.approx(value, rel=0.01)


@pytest.mark.parametrize(
    ("metric", "gain", "half", "words"),
    [
        ("accuracy", 0.031, 0.006, "+3.10 ± 0.60 points"),
        ("macro_f1", -0.002, math.inf, "−0.20 points"),
        ("nll", 0.0123, math.inf, "+0.0123"),
    ],
)
def test_a_difference_of_fractions_is_written_in_points(metric: str, gain: float, half: float, words: str) -> None:
    assert difference(metric, gain, half) == words


def test_a_number_has_its_noun() -> None:
    assert (count(1, "trial"), count(2, "trial"), count(12345, "epoch")) == ("1 trial", "2 trials", "12,345 epochs")


@pytest.mark.parametrize(("low", "high"), [(1, 30), (1e-6, 1e-3), (0.5, 20), (3, 4), (1e-8, 1), (2, 2)])
def test_each_tick_of_a_logarithmic_axis_is_named_by_its_value(low: float, high: float) -> None:
    axis = log_axis(low, high)
    assert axis["ticktext"] == [number(tick) for tick in axis["tickvals"]]
    assert [float(text) for text in axis["ticktext"]] == pytest.approx(axis["tickvals"])
    assert 1 <= len(axis["tickvals"]) <= 10
    assert all(10 ** axis["range"][0] <= tick <= 10 ** axis["range"][1] for tick in axis["tickvals"])


@pytest.mark.parametrize(
    ("values", "limits"), [([0.8, 0.9], [0.79, 0.92]), ([0.98, 0.98], [0.9751, 0.9898]), ([0.0], [-0.005, 0.01])]
)
def test_an_axis_is_a_little_wider_than_its_values(values: list[float], limits: list[float]) -> None:
    assert around(values, 0.1, 0.2) == pytest.approx(limits)


# Figures hold as many points as the study has -----------------------------------------------------------------------


def points(fig: go.Figure, name: str) -> int:
    """Count the points of the traces whose names begin so, without gaps."""
    return sum(y is not None for trace in fig.data if (trace.name or "").startswith(name) for y in trace.y)


def test_the_shared_study_has_trials_in_every_state(everything: StudyData) -> None:
    empty = [state for state, trials in everything.states.items() if not trials]
    assert empty == ["paused"], "no trial pauses under `rungs`"
    assert len(everything.waiting) == 3
    assert sum(map(len, everything.states.values())) + 3 == len(everything.trials) == 17


def test_the_history_shows_every_trial_that_has_begun(everything: StudyData) -> None:
    fig = history_figure(everything)
    above = [trace for trace in fig.data if trace.yaxis == "y"]
    below = [trace for trace in fig.data if trace.yaxis == "y2"]
    numbers = [t.number for t in everything.trials if t not in everything.waiting]
    assert sorted(x for trace in below for x in trace.x) == numbers
    values = next(trace for trace in above if trace.mode == "markers")
    assert dict(zip(values.x, values.y, strict=True)) == {t.number: t.value for t in everything.complete}
    best = next(trace for trace in above if trace.name == "best so far")
    assert everything.best is not None
    assert best.y[-1] == everything.best.value
    assert [line.y0 for line in fig.layout.shapes] == [value_of(everything.complete[0])], "the baseline"


def test_the_learning_curves_show_every_reported_value(everything: StudyData) -> None:
    fig = curves_figure(everything)
    for state, trials in everything.states.items():
        assert points(fig, state) == sum(len(trial.intermediate_values) for trial in trials)
    assert {int(line.x0) for line in fig.layout.shapes} == set(everything.rungs) == {2, 5}
    assert "14 curves" in lead_of(learning_curves(everything))


def test_the_slices_show_every_trial_that_has_the_parameter(everything: StudyData) -> None:
    figures = slice_figures(everything)
    assert list(figures) == ["optim.name", "optim.lr_scale", "optim.momentum", "loss.smoothing"]
    for path, fig in figures.items():
        for state, trials in everything.states.items():
            assert points(fig, state) == sum(path in trial.params for trial in trials)
    assert "these exist only sometimes: optim.momentum" in text_of(slices(everything))


def test_the_parallel_coordinates_have_a_line_for_every_complete_trial(everything: StudyData) -> None:
    fig = parallel_figure(everything)
    assert fig is not None
    lines = [trace for trace in fig.data if trace.mode == "lines"]
    assert len(lines) == len(everything.complete)
    assert lines[-1].y[0] == max(line.y[0] for line in lines), "the best is on top"
    assert [text.replace("<br>", "") for text in fig.layout.xaxis.ticktext] == [
        "accuracy", "loss.smoothing", "optim.lr_scale", "optim.momentum", "optim.name"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("balanced accuracy", "balanced <br>accuracy"),
        ("batch_size", "batch_size"),
        ("optim.weight_decay", "optim.<br>weight_decay"),
        ("augment.crop_pad_fraction", "augment.<br>crop_pad_<br>fraction"),
        ("model.kwargs.incomprehensibilities", "model.<br>kwargs.<br>incomprehensibilities"),
    ],
)
def test_a_name_below_an_axis_is_broken_where_it_would_be_wider_than_the_axis(name: str, shown: str) -> None:
    assert _in_lines(name) == shown


def test_learning_curves_begin_at_the_first_epoch(twelve: StudyData) -> None:
    fig = curves_figure(twelve)
    assert min(epoch for trace in fig.data for epoch in trace.x if epoch is not None) == 1
    assert 0 < fig.layout.xaxis.range[0] < 1


def test_importances_of_few_trials_warn_above_the_picture(twelve: StudyData) -> None:
    found = importances(twelve)
    assert found is not None
    assert 0 < found.body.index("fewer than 20 complete trials") < found.body.index("<figure")


def test_the_importances_are_optunas(digits: Dataset) -> None:
    study = invented_study(load_space("digits"), digits, "many", trials=60)
    fig, warned = importances_figure(read_study_data(study))
    assert fig is not None
    assert warned == []
    assert dict(zip(fig.data[0].y, fig.data[0].x, strict=True)) == pytest.approx(
        optuna.importance.get_param_importances(study.optuna)
    )


@pytest.mark.parametrize(
    ("space", "how", "why"),
    [
        (SPACE, {"trials": 1}, "it takes two complete trials, and there is 1"),
        (SPACE, {"trials": 3, "fails": lambda *_: "oom"}, "it takes two complete trials, and there is none"),
        (ONE_PARAMETER, {"trials": 4}, "one parameter is searched"),
    ],
)
def test_missing_importances_have_a_reason(digits: Dataset, space: str, how: dict[str, Any], why: str) -> None:
    found = importances(made(digits, space, **how))
    assert why in lead_of(found)
    assert found is not None
    assert found.body == ""


def test_trials_added_while_the_report_is_written_are_not_in_it(digits: Dataset) -> None:
    data = made(digits, trials=8)
    before = len(data.complete)
    data.study.optuna.add_trial(optuna.trial.create_trial(value=0.99, user_attrs={"trial_index": 99}))
    fig = parallel_figure(data)
    assert fig is not None
    assert len([trace for trace in fig.data if trace.mode == "lines"]) == before
    assert len(read_study_data(data.study).complete) == before + 1


def test_a_few_outliers_do_not_flatten_the_curves_of_a_loss(digits: Dataset) -> None:
    study = invented_study(NLL, digits, "loss", trials=10)
    diverging = optuna.trial.create_trial(
        state=optuna.trial.TrialState.PRUNED,
        intermediate_values={1: 1e6, 2: math.nan},
        user_attrs={"trial_index": 20, FAILURE: "diverged"},
    )
    study.optuna.add_trial(diverging)
    data = read_study_data(study)
    assert curves_figure(data).layout.yaxis.range[1] < 10
    assert "The axis leaves out the worst values" in lead_of(learning_curves(data))


# The answer ---------------------------------------------------------------------------------------------------------


def confirmed(data: StudyData, lead: float = 0.031, *, evidence: bool = True, **changes: Any) -> StudyData:
    return replace(data, confirmation=invented_confirmation(data, lead=lead, evidence=evidence, **changes))


def test_the_answer_begins_with_the_confirmed_winner(twelve: StudyData) -> None:
    data = confirmed(twelve)
    assert re.match(r"Tuning helped: accuracy 0\.931\s±\s.*0\.031\s±\s0\.006", answer(data).lead)
    words = text_of(answer(data))
    for part in (
        "Yes, +3.10 ± 0.60 points",
        "95 %, n = 5 Each was trained on 5 other seeds and 5 splits.",
        "was flattering: confirmed, it is 1.10 points worse",
        "confirmation 75 s.",
        f"22 trainings, {100 + sum(map(data.epochs, data.trials))} epochs in all",
    ):
        assert part in words
    assert "hpo confirm" not in words
    assert next_commands(data) == ["hpo refit best --study twelve"]


def test_the_best_bet_is_not_called_proven(twelve: StudyData) -> None:
    found = answer(confirmed(twelve, 0.002, evidence=False))
    lead = " ".join(found.lead.split())
    assert lead.endswith("the best bet: +0.001 expected over the baseline; not a proven gain (0.002 ± 0.006).")
    words = text_of(found)
    assert "Not proven" in words
    assert "Expected are +0.10 points." in words


def test_without_a_gain_the_baseline_wins(twelve: StudyData) -> None:
    found = answer(confirmed(twelve, -0.002, evidence=False))
    assert found.lead.startswith("No significant gain")
    assert "(trial 0): the unchanged baseline." in text_of(found)


def test_without_a_confirmation_the_lead_is_called_flattering(twelve: StudyData) -> None:
    assert twelve.best is not None
    assert twelve.baseline is not None
    assert twelve.best is not twelve.baseline
    found = answer(twelve)
    assert found.lead.startswith("Not confirmed: ")
    assert difference("accuracy", value_of(twelve.best) - value_of(twelve.baseline)) in found.lead
    assert "partly luck, so this is flattering" in text_of(found)
    assert "hpo confirm twelve" in text_of(found)


def test_there_is_a_warning_about_a_confirmation_older_than_the_study(twelve: StudyData) -> None:
    data = confirmed(twelve, search_trials=7)
    assert any("made when 7 trials were finished, and now 12 are" in words for words in warnings_of(data))
    assert "hpo confirm twelve" in next_commands(data)


def test_one_replicate_gives_a_page_without_intervals(twelve: StudyData) -> None:
    found = invented_confirmation(twelve, lead=0.031, evidence=False)
    alone = [replace(each, scores={0: (0.9,)}, interval=Interval(0.9, math.inf, 1)) for each in found.contenders]
    found = replace(found, contenders=tuple(alone), advantage=Interval(0.03, math.inf, 1), replicates=1)
    text = page("x", list(filter(None, (part(replace(twelve, confirmation=found)) for part in (answer, baselines)))))
    check_page(text)
    assert "n = 1<" in text


def test_a_refits_test_score_has_its_interval(twelve: StudyData) -> None:
    scores = {"accuracy": 0.9123, "loss": 0.3}
    test: dict[str, Any] = {"images": 360, "opened": 2, "with_tta": scores | {"intervals": {"accuracy": [0.88, 0.94]}}}
    refitted = {"trial": 3, "epochs": 10, "networks": 1, "val": {"with_tta": scores}, "test": test}
    words = text_of(answer(replace(twelve, refits={"best": refitted})))
    assert "0.9123 accuracy of the refit best , trial 3, on 360 images, 95 % between 0.8800 and 0.9400" in words
    assert "The test set was opened 2 times." in words
    test["with_tta"].pop("intervals")
    assert "on 360 images." in text_of(answer(replace(twelve, refits={"best": refitted})))


def test_there_is_a_warning_about_a_submission_model_that_is_not_the_winners(twelve: StudyData) -> None:
    data = confirmed(twelve)
    assert data.best is not None
    of_base, of_winner = ({"best": {"trial": number, "recipe": None}} for number in (0, data.best.number))
    [warning] = warnings_of(replace(data, refits=of_base))
    assert "`best` is of trial 0, and the winner is trial" in warning
    assert warnings_of(replace(data, refits=of_winner)) == []


def test_changed_fields_do_not_include_the_seed() -> None:
    base = {"seed": 1, "a": 8.0, "b": None, "c": (1, 2)}
    assert changed(base, base | {"seed": 2}) == []
    assert changed(base, base | {"a": 22.0831, "b": 1e-6, "c": (1, 3)}) == [
        ("a", "8", "22.1"), ("b", "off", "1e-6"), ("c", "[1, 2]", "[1, 3]")
    ]  # fmt: skip


def test_lower_is_better_for_a_loss(digits: Dataset) -> None:
    data = made(digits, NLL, trials=12)
    assert data.best is not None
    assert data.best.value == min(map(value_of, data.complete))
    assert data.gain(0.1, 0.3) == pytest.approx(0.2)
    assert "+" in verdict(data)


# Side by side -------------------------------------------------------------------------------------------------------


def test_the_same_study_twice_differs_in_nothing(twelve: StudyData) -> None:
    found = {section.id: section for section in comparison([twelve, twelve])}
    assert incomparable([twelve, twelve]) == []
    assert "Nothing: space, data, seed and versions are the same." in found["differences"].body
    assert "score the same" in found["answer"].lead
    check_page(page("same", list(found.values())))


@pytest.mark.parametrize("along", ["trials", "epochs"])
def test_progress_is_the_best_complete_trial_so_far(everything: StudyData, along: str) -> None:
    begun = [trial for trial in everything.trials if trial not in everything.waiting]
    costs = [1.0 if along == "trials" else float(everything.epochs(trial)) for trial in begun]
    found = progress(everything, (lambda _: 1.0) if along == "trials" else everything.epochs)
    assert found.trials == [trial.number for trial in everything.complete]
    assert found.spent == [sum(costs[: at + 1]) for at in found.trials]
    assert found.best == [max(value_of(t) for t in everything.complete if t.number <= at) for at in found.trials]
    (line,) = progress_figure([everything], along).data
    assert line.x[-1] == found.total == sum(costs)
    assert line.y[-1] == found.best[-1]


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (NLL, "have other objectives: accuracy and nll"),
        (SPACE.replace("name: digits}", "name: digits, val_fraction: 0.4}"), "split or read the images differently"),
    ],
)
def test_the_page_begins_with_why_scores_cannot_be_compared(
    twelve: StudyData, digits: Dataset, space: str, words: str
) -> None:
    pair = [twelve, made(digits, space, trials=6, seed=1)]
    found = comparison(pair)
    assert any(words in line for line in incomparable(pair))
    assert "cannot be compared directly" in found[0].lead
    assert words in found[0].body
    assert "seed: 0 → 1" in found[-1].body
    check_page(page("both", found))


def test_there_is_a_warning_about_other_images(twelve: StudyData, digits: Dataset) -> None:
    other = made(replace(digits, fingerprint="f" * 64), trials=4)
    assert any("were run on other images" in line for line in incomparable([twelve, other]))


def test_confirmed_studies_are_compared_by_their_confirmed_scores(twelve: StudyData, digits: Dataset) -> None:
    pair = [confirmed(twelve, 0.02), confirmed(made(digits, name="b", trials=12), 0.05)]
    found = {section.id: section for section in comparison(pair)}
    assert found["answer"].lead == "The confirmed winner of b is ahead by 3.00 points: 0.9500."
    assert "confirmed" in found
    check_page(page("a and b", list(found.values())))


# The command --------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_prints_its_path(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hpo.report.page._plotly_js", PLOTLY_JS)
    study = invented_study(SPACE, digits, "told", trials=12)
    found = invented_confirmation(read_study_data(study), lead=0.031, evidence=True)
    write_confirmation(study.paths.confirmation, found)
    assert hpo(monkeypatch, "report", "told") == 0
    said = capsys.readouterr().out
    file = re.escape(str(study.paths.report))
    assert re.match(rf"written to {file} \(\d\.\d MB\) in .* s; open it in a browser", said)
    text = study.paths.report.read_text(encoding="utf-8")
    check_page(text)
    assert "0.031 ± 0.006" in text
    assert len(text) < 8e6
    assert not list(study.paths.dir.glob(".report*"))


def test_the_command_sets_studies_side_by_side_and_leaves_the_report_alone(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = invented_study(SPACE, digits, "a", trials=6)
    invented_study(SPACE, digits, "b", trials=6, seed=1)
    assert hpo(monkeypatch, "report", "a", "--compare", "b") == 0
    assert f"written to {study.paths.report.with_name('report-b.html')}" in capsys.readouterr().out
    assert not study.paths.report.exists()
    assert hpo(monkeypatch, "report", "a", "--compare", "b", "-o", str(tmp_path / "deep" / "both.html")) == 0
    check_page((tmp_path / "deep" / "both.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nobody"], "no study nobody"),
        (["empty"], "study empty has no trials yet; run it with: hpo run"),
        (["full", "--compare", "empty"], "study empty has no trials yet"),
        (["full", "--compare", "full"], "--compare full: that is the study itself"),
        (["full", "-o", "."], ". is a folder; give -o the name of a file"),
        (
            ["full", "-o", "/proc/nothing/page.html"],
            "/proc/nothing/page.html: cannot be written (No such file or directory)",
        ),
    ],
)
def test_a_wrong_argument_is_one_line(
    digits: Dataset,
    arguments: Sequence[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    invented_study(SPACE, digits, "full", trials=2)
    invented_study(SPACE, digits, "empty", trials=0, waiting=2)
    assert hpo(monkeypatch, "report", *arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("hpo: ")
    assert words in said.err
    assert said.err.count("\n") == 1


def test_the_study_of_a_confirmation_has_no_report(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    study = invented_study(SPACE, digits, "won", trials=2)
    monkeypatch.setitem(study.metadata["identity"], "confirms", "search")
    monkeypatch.setattr("hpo.api.study.find_study", lambda *_, **__: study)
    with pytest.raises(StudyError, match="study won confirms search, whose report shows it: hpo report search"):
        report(ReportOptions(study="won"))


def test_a_report_that_fails_leaves_the_old_one(digits: Dataset) -> None:
    study = invented_study(SPACE, digits, "kept", trials=3)
    study.paths.report.write_text("the old one")
    study.paths.confirmation.write_text("{")
    with pytest.raises(StudyError, match="cannot be read"):
        write_report(study, study.paths.report)
    assert study.paths.report.read_text() == "the old one"


def test_a_password_is_never_in_the_page(twelve: StudyData, tmp_path: Path) -> None:
    study = twelve.study
    hidden = Study(study.optuna, study.paths, study.metadata, "postgresql://me:hush-hush@db/hpo")
    write_report(hidden, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "hush-hush" not in text
    assert "postgresql://me:***@db/hpo" in text
