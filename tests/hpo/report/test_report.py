"""The report: every kind of study has a page, the page loads nothing, and every figure shows every trial."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import plotly.graph_objects as go
import pytest
from markupsafe import Markup

from core.data import Dataset
from hpo.analysis.study_data import StudyData, read_study_data, value_of
from hpo.api.options import ReportOptions
from hpo.api.study import report
from hpo.confirmation.result import write_confirmation
from hpo.confirmation.statistics import Interval
from hpo.errors import StudyError
from hpo.report import sections_of, write_report
from hpo.report.answer import answer, changed, contenders_figure, next_commands, verdict, warnings_of
from hpo.report.charts import STATES, log_axis
from hpo.report.compare import comparison, progress, progress_figure
from hpo.report.compare import warnings_of as incomparable
from hpo.report.figures import (
    curves_figure,
    history_figure,
    importances,
    importances_figure,
    learning_curves,
    parallel_figure,
    slice_figures,
    slices,
    states,
)
from hpo.report.page import Section, figure, page, paragraph, picture, plain, section, table
from hpo.space import load_space
from hpo.study import Study
from hpo.text import count, difference, number
from hpo.trials import FAILURE
from tests.hpo.commands import hpo
from tests.hpo.invented import ALL_STATES, BASE, SPACE, invented_confirmation, invented_study

ONE_PARAMETER = f"""
data: {{name: digits}}
{BASE}}}
pruner: {{name: none}}
search:
  optim.lr_scale: {{low: 0.5, high: 20, log: true}}
"""
FOLDS = SPACE.replace("data: {name: digits}", "data: {name: digits, folds: 3}")
NLL = SPACE + "objective: {metric: nll}\n"


@pytest.fixture
def no_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without the megabytes of plotly.js, which take most of a test's time."""
    monkeypatch.setattr("hpo.report.page._plotly_js", lambda: Markup("plotly.js"))


# Every study gives a page -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_plotly")
@pytest.mark.parametrize(
    ("space", "how", "words"),
    [
        pytest.param(SPACE, ALL_STATES, "The search is not over: 12 of 17 trials finished, 2 trials running", id="all"),
        pytest.param(SPACE, {"trials": 1}, "nothing better than the baseline", id="a single trial"),
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


@pytest.mark.usefixtures("no_plotly")
def test_a_study_of_an_older_version_without_its_space_gives_a_page(digits: Dataset, tmp_path: Path) -> None:
    study = invented_study(SPACE, digits, "old", trials=5)
    data = replace(read_study_data(study), space=None)
    assert data.rungs == {}
    check_page(page("old", sections_of(data)))


class _Checker(HTMLParser):
    """Checks that the elements of a page are balanced, and collects ids, links and headings."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.faults: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [found[name] or "" for name in ("href", "src") if name in found]
        if tag == "img" and not found.get("alt"):
            self.faults.append("a picture without a description")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> ends what did not begin, at {self.getpos()}")


def check_page(text: str) -> list[dict[str, Any]]:
    """Assert that the page is well-formed and loads nothing. Returns its figures."""
    checker = _Checker()
    checker.feed(text)
    checker.close()
    assert checker.faults == []
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert checker.links, "there is a navigation"
    for link in checker.links:
        assert link.startswith(("#", "data:")), f"the page asks for {link}"
        assert not link.startswith("#") or link[1:] in checker.ids
    assert "@import" not in text
    assert not re.search(r"url\(\s*['\"]?http", text.partition("<script>")[0])
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert '<meta name="viewport"' in text
    assert checker.headings[0] == 1
    assert all(b <= a + 1 for a, b in zip(checker.headings, checker.headings[1:], strict=False))
    assert "Infinity" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    return [json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', text, re.S)]


# The parts of a page ------------------------------------------------------------------------------------------------


HOSTILE = "</script><script>alert(1)</script><b>&\"'"


@pytest.mark.usefixtures("no_plotly")
def test_no_text_becomes_markup() -> None:
    fig = go.Figure(go.Scatter(x=[1], y=[1], text=[HOSTILE], name=HOSTILE))
    body = figure(fig, alt=HOSTILE) + table([HOSTILE], [[HOSTILE]]) + paragraph(HOSTILE) + picture(b"x", alt=HOSTILE)
    text = page(HOSTILE, [section("one", HOSTILE, HOSTILE, body)])
    drawn = check_page(text)
    assert drawn[0]["data"][0]["name"] == HOSTILE
    assert "<b>" not in text.partition("<script>")[0]


def test_plotly_is_embedded_once_and_only_where_a_figure_needs_it() -> None:
    one = section("one", "One", "Lead.", figure(go.Figure(), alt="nothing"))
    two = replace(one, id="two")
    assert page("x", [one, two]).count("plotly.js v") == 1
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


@pytest.mark.usefixtures("no_plotly")
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


# Figures hold as many points as the study has -----------------------------------------------------------------------


def points(fig: go.Figure, *names: str) -> int:
    """Count the points of all traces, or of those whose names begin so, without gaps."""
    traces = [trace for trace in fig.data if not names or (trace.name or "").startswith(names)]
    return sum(y is not None for trace in traces for y in trace.y)


def test_the_shared_study_has_trials_in_every_state(everything: StudyData) -> None:
    assert all(states(everything)[state] for state in STATES)
    assert len(everything.waiting) == 3
    assert sum(map(len, states(everything).values())) + 3 == len(everything.trials) == 17


def test_the_history_shows_every_trial_that_has_begun(everything: StudyData) -> None:
    fig = history_figure(everything)
    above = [trace for trace in fig.data if trace.yaxis == "y"]
    below = [trace for trace in fig.data if trace.yaxis == "y2"]
    numbers = [t.number for t in everything.trials if t not in everything.waiting]
    assert sorted(x for trace in below for x in trace.x) == numbers
    values = next(trace for trace in above if trace.mode == "markers")
    assert dict(zip(values.x, values.y, strict=True)) == {t.number: t.value for t in everything.complete}
    best = next(trace for trace in above if trace.name == "best so far")
    assert [y for y in best.y if math.isfinite(y)][-1] == value_of(everything.best)


def test_the_learning_curves_show_every_reported_value(everything: StudyData) -> None:
    fig = curves_figure(everything)
    for state, name in (("complete", "complete"), ("pruned", "pruned"), ("failed", "failed"), ("running", "running")):
        assert points(fig, name) == sum(len(trial.intermediate_values) for trial in states(everything)[state])
    assert {int(line.x0) for line in fig.layout.shapes} == set(everything.rungs) == {2, 5}
    found = learning_curves(everything)
    assert found is not None
    assert "14 curves" in found.lead


def test_the_slices_show_every_trial_that_has_the_parameter(everything: StudyData) -> None:
    figures = slice_figures(everything)
    assert list(figures) == ["optim.name", "optim.lr_scale", "optim.momentum", "loss.smoothing"]
    for path, fig in figures.items():
        scored = [trial for trial in everything.complete if path in trial.params]
        assert len(fig.data[0].x) == len(scored)
        for state, name in (("pruned", "pruned"), ("failed", "failed"), ("running", "running")):
            assert points(fig, name) == sum(path in trial.params for trial in states(everything)[state])
    found = slices(everything)
    assert found is not None
    assert "these exist only sometimes: optim.momentum" in found.body


def test_the_parallel_coordinates_have_a_line_for_every_complete_trial(everything: StudyData) -> None:
    fig = parallel_figure(everything)
    assert fig is not None
    lines = [trace for trace in fig.data if trace.mode == "lines"]
    assert len(lines) == len(everything.complete)
    assert lines[-1].y[0] == max(line.y[0] for line in lines), "the best lies on top"
    assert [text.replace(".<br>", ".") for text in fig.layout.xaxis.ticktext] == [
        "accuracy", "loss.smoothing", "optim.lr_scale", "optim.momentum", "optim.name"
    ]  # fmt: skip


def test_the_importances_are_optunas(digits: Dataset) -> None:
    study = invented_study(load_space("digits"), digits, "many", trials=60)
    data = read_study_data(study)
    fig, warned = importances_figure(data)
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
    found = importances(read_study_data(invented_study(space, digits, "few", **how)))
    assert found is not None
    assert why in found.lead
    assert found.body == ""


def test_trials_added_while_the_report_is_written_are_not_in_it(digits: Dataset) -> None:
    study = invented_study(SPACE, digits, "growing", trials=8)
    data = read_study_data(study)
    before = len(data.complete)
    study.optuna.add_trial(optuna.trial.create_trial(value=0.99, user_attrs={"trial_index": 99}))
    assert len([trace for trace in parallel_figure(data).data if trace.mode == "lines"]) == before
    assert len(read_study_data(study).complete) == before + 1


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
    found = learning_curves(data)
    assert found is not None
    assert "The axis leaves out the worst values" in found.lead


# The answer ---------------------------------------------------------------------------------------------------------


def text_of(found: Section) -> str:
    """The section's words."""
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", found.lead + " " + found.body)))


def test_the_answer_begins_with_the_confirmed_winner(twelve: StudyData) -> None:
    data = replace(twelve, confirmation=invented_confirmation(twelve, lead=0.031, evidence=True))
    found = answer(data)
    assert found.lead.startswith("Tuning helped: accuracy 0.931 ± ")
    assert "0.031 ± 0.006" in found.lead
    words = text_of(found)
    assert "Yes, +3.10 ± 0.60 points" in words
    assert "95 %, n = 5 Each was trained on 5 other seeds and 5 splits." in words
    assert "was flattering: confirmed, it is 1.10 points worse" in words
    assert "confirmation 75 s." in words
    assert f"22 trainings, {100 + sum(map(data.epochs, data.trials))} epochs in all" in words
    assert "trial 3, for which it is too small" in words
    assert "hpo confirm" not in words
    assert next_commands(data) == ["hpo refit best --study twelve"]


def test_without_a_significant_gain_the_baseline_wins(twelve: StudyData) -> None:
    data = replace(twelve, confirmation=invented_confirmation(twelve, lead=0.002, evidence=False))
    found = answer(data)
    assert found.lead.startswith("No significant gain")
    assert "(trial 0): the unchanged baseline." in text_of(found)


def test_without_a_confirmation_the_lead_is_called_flattering(twelve: StudyData) -> None:
    assert twelve.best is not None
    assert twelve.baseline is not None
    assert twelve.best is not twelve.baseline
    found = answer(twelve)
    gain = difference("accuracy", value_of(twelve.best) - value_of(twelve.baseline))
    assert found.lead.startswith("Not confirmed: ")
    assert gain in found.lead
    assert "partly luck, so this is flattering" in text_of(found)
    assert "hpo confirm twelve" in text_of(found)


def test_there_is_a_warning_about_a_confirmation_older_than_the_study(twelve: StudyData) -> None:
    data = twelve
    made = replace(invented_confirmation(data, lead=0.03, evidence=True), search_trials=7)
    data = replace(data, confirmation=made)
    assert any("made when 7 trials were finished, and now 12 are" in words for words in warnings_of(data))
    assert "hpo confirm twelve" in next_commands(data)


def test_the_contenders_figure_shows_every_score(twelve: StudyData) -> None:
    made = invented_confirmation(twelve, lead=0.031, evidence=True)
    scores, winner, base = contenders_figure(made, "accuracy").data
    assert len(scores.x) == 10
    assert winner.error_x.array[0] == pytest.approx(made.contenders[0].interval.half_width)
    assert base.marker.symbol == "square"
    assert winner.marker.symbol != base.marker.symbol


@pytest.mark.usefixtures("no_plotly")
def test_one_replicate_gives_a_figure_without_a_bar(twelve: StudyData) -> None:
    made = invented_confirmation(twelve, lead=0.031, evidence=False)
    alone = [replace(each, scores={0: (0.9,)}, interval=Interval(0.9, math.inf, 1)) for each in made.contenders]
    made = replace(made, contenders=tuple(alone), advantage=Interval(0.03, math.inf, 1), replicates=1)
    text = page("x", [answer(replace(twelve, confirmation=made))])
    check_page(text)
    assert "n = 1<" in text


def test_a_refits_test_score_has_its_interval(digits: Dataset) -> None:
    scores = {"accuracy": 0.9123, "loss": 0.3}
    report = {
        "trial": 3, "epochs": 10, "networks": 1, "val": {"with_tta": scores},
        "test": {"images": 360, "opened": 2, "with_tta": scores | {"intervals": {"accuracy": [0.88, 0.94]}}},
    }  # fmt: skip
    data = read_study_data(invented_study(SPACE, digits, "refitted", trials=6))
    words = text_of(answer(replace(data, refits={"best": report})))
    assert "0.9123 accuracy of the refit best , trial 3, on 360 images, 95 % between 0.8800 and 0.9400" in words
    assert "The test set was opened 2 times." in words
    report["test"]["with_tta"].pop("intervals")
    assert "on 360 images." in text_of(answer(replace(data, refits={"best": report})))


def test_there_is_a_warning_about_a_submission_model_that_is_not_the_winners(twelve: StudyData) -> None:
    data = twelve
    assert data.best is not None
    data = replace(data, confirmation=invented_confirmation(data, lead=0.031, evidence=True))
    of_base = {"best": {"trial": 0, "recipe": None}}
    of_winner = {"best": {"trial": data.best.number, "recipe": None}}
    assert any("`best` is of trial 0, and the winner is trial" in w for w in warnings_of(replace(data, refits=of_base)))
    assert warnings_of(replace(data, refits=of_winner)) == []


def test_changed_fields_do_not_include_the_seed() -> None:
    base = {"seed": 1, "a": 8.0, "b": None, "c": (1, 2)}
    assert changed(base, base | {"seed": 2}) == []
    assert changed(base, base | {"a": 22.0831, "b": 1e-6, "c": (1, 3)}) == [
        ("a", "8", "22.1"), ("b", "off", "1e-6"), ("c", "[1, 2]", "[1, 3]")
    ]  # fmt: skip


def test_lower_is_better_for_a_loss(digits: Dataset) -> None:
    data = read_study_data(invented_study(NLL, digits, "loss", trials=12))
    assert data.best is not None
    assert data.best.value == min(map(value_of, data.complete))
    assert data.gain(0.1, 0.3) == pytest.approx(0.2)
    assert "+" in verdict(data)


# Side by side -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_plotly")
def test_the_same_study_twice_differs_in_nothing(twelve: StudyData) -> None:
    made = {section.id: section for section in comparison([twelve, twelve])}
    assert incomparable([twelve, twelve]) == []
    assert "Nothing: space, data, seed and versions are the same." in made["differences"].body
    assert "score the same" in made["answer"].lead
    check_page(page("same", list(made.values())))


def test_progress_is_the_best_complete_trial_so_far(everything: StudyData) -> None:
    begun = [trial for trial in everything.trials if trial not in everything.waiting]
    for along, costs in (("trials", [1.0] * len(begun)), ("epochs", [float(everything.epochs(t)) for t in begun])):
        spent, best, numbers, end = progress(everything, along)
        assert numbers == [trial.number for trial in everything.complete]
        assert spent == [sum(costs[: at + 1]) for at in numbers]
        assert best == [max(value_of(t) for t in everything.complete if t.number <= at) for at in numbers]
        (line,) = progress_figure([everything], along).data
        assert line.x[-1] == end == sum(costs)
        assert line.y[-1] == best[-1]


@pytest.mark.usefixtures("no_plotly")
@pytest.mark.parametrize(
    ("space", "words"),
    [
        (NLL, "have other objectives: accuracy and nll"),
        (SPACE.replace("name: digits}", "name: digits, val_fraction: 0.4}"), "split or read the images differently"),
    ],
)
def test_the_page_begins_with_why_scores_cannot_be_compared(digits: Dataset, space: str, words: str) -> None:
    a = read_study_data(invented_study(SPACE, digits, "a", trials=6))
    b = read_study_data(invented_study(space, digits, "b", trials=6, seed=1))
    made = comparison([a, b])
    assert any(words in line for line in incomparable([a, b]))
    assert "cannot be compared directly" in made[0].lead
    assert words in made[0].body
    assert "seed: 0 → 1" in made[-1].body
    check_page(page("a and b", made))


def test_there_is_a_warning_about_other_images(digits: Dataset) -> None:
    a = read_study_data(invented_study(SPACE, digits, "a", trials=4))
    b = read_study_data(invented_study(SPACE, replace(digits, fingerprint="f" * 64), "b", trials=4))
    assert any("were run on other images" in line for line in incomparable([a, b]))


@pytest.mark.usefixtures("no_plotly")
def test_confirmed_studies_are_compared_by_their_confirmed_scores(twelve: StudyData, digits: Dataset) -> None:
    other = read_study_data(invented_study(SPACE, digits, "b", trials=12))
    a = replace(twelve, confirmation=invented_confirmation(twelve, lead=0.02, evidence=True))
    b = replace(other, confirmation=invented_confirmation(other, lead=0.05, evidence=True))
    made = {section.id: section for section in comparison([a, b])}
    assert made["answer"].lead == "The confirmed winner of b is ahead by 3.00 points: 0.9500."
    assert "confirmed" in made
    check_page(page("a and b", list(made.values())))


# The command --------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_prints_its_path(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = invented_study(SPACE, digits, "told", trials=12)
    data = read_study_data(study)
    made = invented_confirmation(data, lead=0.031, evidence=True)
    write_confirmation(study.paths.confirmation, made)
    assert hpo(monkeypatch, "report", "told") == 0
    said = capsys.readouterr().out
    assert re.match(
        rf"written to {re.escape(str(study.paths.report))} \(\d\.\d MB\) in .* s; open it in a browser", said
    )
    text = study.paths.report.read_text(encoding="utf-8")
    check_page(text)
    assert "0.031 ± 0.006" in text
    assert len(text) < 8e6
    assert not list(study.paths.dir.glob(".report*"))


@pytest.mark.usefixtures("no_plotly")
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
        (["full", "-o", "."], "--output . is a folder; give the HTML file's name"),
        (
            ["full", "-o", "/proc/nothing/page.html"],
            "/proc/nothing/page.html cannot be written (No such file or directory)",
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


def test_a_report_that_fails_leaves_the_old_one(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    study = invented_study(SPACE, digits, "kept", trials=3)
    study.paths.report.write_text("the old one")
    study.paths.confirmation.write_text("{")
    with pytest.raises(StudyError, match="cannot be read"):
        write_report(study, study.paths.report)
    assert study.paths.report.read_text() == "the old one"


@pytest.mark.usefixtures("no_plotly")
def test_a_password_is_never_in_the_page(digits: Dataset, tmp_path: Path) -> None:
    study = invented_study(SPACE, digits, "secret", trials=3)
    hidden = Study(study.optuna, study.paths, study.metadata, "postgresql://me:hush-hush@db/hpo")
    write_report(hidden, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "hush-hush" not in text
    assert "postgresql://me:***@db/hpo" in text
