"""Costs beside the score: measured, on the Pareto front, and to choose a trial by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.config import TrainConfig
from core.data import Splits, load_dataset
from core.models import build_model
from hpo.analysis.study_data import read_study_data
from hpo.dashboard.notes import study_note
from hpo.errors import SpaceError, StudyError
from hpo.report.front import pareto_front
from hpo.search.costs import BATCH, PASSES, measured
from hpo.space import load_space, space_from_yaml, space_to_yaml
from hpo.study import Study, find_study
from hpo.study.front import Point, front, points, select, shown
from hpo.submission.bundle import load_bundle
from tests.hpo.commands import SPACE, RunHpo
from tests.hpo.invented import SPACE as INVENTED
from tests.hpo.invented import invented_study
from tests.hpo.report.pages import cells_of, figures_of, lead_of
from tests.test_docs import ROOT, blocks

PAGE = (ROOT / "docs" / "search-spaces.md").read_text(encoding="utf-8")
CPU = torch.device("cpu")


# Measuring


CONFIG = TrainConfig.model_validate({"model": {"widths": [8], "blocks": [1]}})
DIGITS = Splits(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), *[torch.zeros(2).long()] * 3, ("a", "b"), (0.5,), (0.5,))


def test_parameters_and_megabytes_are_counted() -> None:
    network = build_model(CONFIG.model, num_classes=2, in_channels=1, image_size=(8, 8))
    found = measured(["params", "size"], CONFIG, DIGITS, CPU)
    assert found["params"] == sum(each.numel() for each in network.parameters())
    # Megabytes of 4-byte parameters and of buffers, such as running statistics.
    assert found["size"] == pytest.approx((4 * found["params"] + sum(each.nbytes for each in network.buffers())) / 1e6)


def test_latency_is_the_median_pass_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    lasts = [9.0, 1.0, 1.0, 1.0, 1.0, 5.0, 5.0, 5.0]  # seconds; the first pass warms up
    assert len(lasts) == 1 + PASSES
    times = iter([time for number, last in enumerate(lasts) for time in (100.0 * number, 100.0 * number + last)])
    monkeypatch.setattr("hpo.search.costs.clock", lambda _: next(times))
    assert measured(["latency"], CONFIG, DIGITS, CPU) == {"latency": 1000 / BATCH}


# The front


@pytest.mark.parametrize(
    ("sign", "best"),
    [(1, [0, 1, 3]), (-1, [1, 2, 3, 4])],
)
def test_the_front_is_what_no_other_point_beats(sign: int, best: list[int]) -> None:
    rows = [(0.9, 100, 5), (0.8, 50, 5), (0.7, 60, 5), (0.9, 200, 4), (0.7, 50, 6)]
    found = [Point(number, value, {"params": a, "latency": b}) for number, (value, a, b) in enumerate(rows)]
    assert [point.trial for point in front(found, sign)] == best


def test_equal_points_are_all_on_the_front() -> None:
    assert len(front([Point(0, 0.9, {"params": 1}), Point(1, 0.9, {"params": 1})], 1)) == 2


# Choosing

UNPRUNED = INVENTED.replace("{name: rungs, rungs: [0.2, 0.5], keep: 0.5}", "{name: none}")


@pytest.fixture
def study() -> Study:
    """Six complete trials with 6,000 to 1,000 parameters; the scores are the formula's."""
    images = load_dataset(TrainConfig().data)
    return invented_study(UNPRUNED, images, "front", trials=6, costs=lambda index: {"params": 1000.0 * (6 - index)})


def test_the_best_below_a_bound_is_selected(study: Study) -> None:
    below = [point for point in points(study) if point.costs["params"] < 4000]
    assert {point.trial for point in below} == {3, 4, 5}
    assert select(study, "params<4e3", None) == max(below, key=lambda point: point.value)
    assert select(study, "params < 1e9", None).trial == study.best_trial().number  # type: ignore[union-attr]


def test_the_smallest_within_a_distance_of_the_best_is_selected(study: Study) -> None:
    best, *others = points(study)
    assert select(study, "smallest", 0.0) == best
    assert select(study, "smallest", 1.0).trial == 5
    second = max(point.value for point in others)
    near = [point for point in (best, *others) if point.value >= second]
    assert select(study, "smallest", best.value - second) == min(near, key=lambda point: point.costs["params"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("params<10", "no complete trial is below; the least is 1,000"),
        ("latency<1", r"latency was not measured in study front; give the space objective: \{metrics: \[accuracy, lat"),
    ],
)
def test_a_selection_without_a_trial_is_refused(study: Study, words: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        select(study, words, None)


def test_a_study_without_costs_has_none_to_choose_by() -> None:
    plain = invented_study(UNPRUNED, load_dataset(TrainConfig().data), "plain", trials=2)
    assert points(plain) == []
    with pytest.raises(StudyError, match="params was not measured in study plain"):
        select(plain, "smallest", 0.01)


def test_costs_have_their_units() -> None:
    assert [shown("params", 12345), shown("latency", 0.1234), shown("size", 3.5)] == ["12,345", "0.123 ms", "3.5 MB"]


# The report and the dashboard


@pytest.fixture(params=["maximize", "minimize"])
def two_costs(request: pytest.FixtureRequest) -> Study:
    """Eight complete trials with two costs, one of them on a logarithmic axis."""
    metric = "" if request.param == "maximize" else "objective: {metric: nll}\n"
    images = load_dataset(TrainConfig().data)
    return invented_study(
        f"{UNPRUNED}{metric}", images, "front", trials=8,
        costs=lambda index: {"params": 1e3 * 2.0**index, "latency": 1.0 + index % 3},
    )  # fmt: skip


def test_the_report_marks_the_front_over_each_cost_and_lists_it(two_costs: Study) -> None:
    best = front(points(two_costs), two_costs.sign)
    assert 1 < len(best) < 8
    section = pareto_front(read_study_data(two_costs))
    assert [int(row[0]) for row in cells_of(section)] == [point.trial for point in best]
    assert cells_of(section)[0][2:] == [shown(name, cost) for name, cost in best[0].costs.items()]
    assert f"the Pareto front, {len(best)} of 8 complete trials" in lead_of(section)
    figures = figures_of(section)
    assert [fig["layout"]["xaxis"]["title"]["text"] for fig in figures] == ["parameters", "latency (ms an image)"]
    for fig, name in zip(figures, ("params", "latency"), strict=True):
        series = {trace["name"]: trace for trace in fig["data"]}
        assert sorted(series["Pareto front"]["x"]) == sorted(point.costs[name] for point in best)
        assert series["baseline"]["x"] == [1e3 if name == "params" else 1.0]
        assert len(series["complete"]["x"]) == 8 - len(best)
        line = [two_costs.sign * value for value in series["best up to this cost"]["y"]]
        assert line == sorted(line)
        assert len({trace["marker"]["symbol"] for trace in fig["data"] if "marker" in trace}) == 3
    assert [fig["layout"]["xaxis"].get("type") for fig in figures] == ["log", None]


def test_the_studys_note_lists_the_front(two_costs: Study) -> None:
    note = study_note(two_costs, two_costs.space())
    best = front(points(two_costs), two_costs.sign)
    lines = note.splitlines()
    head = lines.index(f"| trial | {two_costs.metric} | params | latency |")
    assert lines[head + 1] == "| ---: | ---: | ---: | ---: |"
    assert [line.split(" | ")[0] for line in lines[head + 2 : head + 2 + len(best)]] == [
        f"| {point.trial}" for point in best
    ]


def test_a_study_without_costs_has_no_front() -> None:
    plain = invented_study(UNPRUNED, load_dataset(TrainConfig().data), "plain", trials=2)
    assert pareto_front(read_study_data(plain)) is None
    assert "Pareto" not in study_note(plain, plain.space())


# The commands


def test_the_example_of_the_docs_is_searched_shown_and_refitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo
) -> None:
    monkeypatch.chdir(tmp_path)
    [example] = [block for block in blocks(PAGE, "yaml") if "metrics:" in block]
    Path("small.yaml").write_text(example + "pruner: {name: none}\n")
    short = ("--set", "epochs=1", "--set", "batch_size=256", "--device", "cpu")
    said = run_hpo("run", "small.yaml", "--trials", "4", *short)
    found = find_study("small")
    measured_points = points(found)
    assert len(measured_points) == 4
    assert all(set(point.costs) == {"params", "latency"} for point in measured_points)
    assert "Pareto front: no trial beats these in accuracy, params and latency" in said
    assert f"{measured_points[0].costs['params']:,.0f}" in said
    least = min(measured_points, key=lambda point: point.costs["params"])
    said = run_hpo("refit", "smallest", "--within", "1", "--study", "small", "--device", "cpu")
    assert f"not confirmed: smallest is trial {least.trial}: accuracy {least.value:.4f}, params " in said
    bundle = load_bundle(found.paths.refit(f"{least.trial:05d}"), "cpu")
    assert sum(each.numel() for each in bundle.models[0].parameters()) == least.costs["params"]
    assert "costs.params" in run_hpo("study", "trials", "small", "--csv")


@pytest.mark.parametrize("words", [("smallest",), ("best", "--within", "0.1"), ("3", "--within", "0.1")])
def test_smallest_and_within_belong_together(run_hpo: RunHpo, words: tuple[str, ...]) -> None:
    assert "refit smallest --within 0.01: give both, or none" in run_hpo.fails("refit", *words)


@pytest.mark.parametrize(
    ("objective", "fault"),
    [
        (
            "{metrics: [params, accuracy]}",
            "begins with the score by which trials are drawn and pruned, not",
        ),
        ("{metrics: [accuracy, nll]}", "has a second score, nll; the others are params, latency, size"),
        ("{metrics: [accuracy, params, params]}", "names one twice"),
        ("{metric: nll, metrics: [accuracy, params]}", "begins with accuracy, and metric is nll"),
        ("{metrics: [accuracy, flops]}", "flops"),
    ],
)
def test_invalid_objectives_are_refused(tmp_path: Path, objective: str, fault: str) -> None:
    (tmp_path / "space.yaml").write_text(f"{SPACE}objective: {objective}\n")
    with pytest.raises(SpaceError, match=fault):
        load_space(tmp_path / "space.yaml")


def test_the_score_is_the_first_metric(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(f"{SPACE}objective: {{metrics: [nll, size]}}\n")
    space = load_space(tmp_path / "space.yaml")
    assert (space.metric, space.direction, space.objective.costs) == ("nll", "minimize", ("size",))
    assert space_from_yaml(space_to_yaml(space), "space").objective == space.objective
    (tmp_path / "space.yaml").write_text(f"{SPACE}objective: {{metric: nll}}\n")
    assert load_space(tmp_path / "space.yaml").hash == space.hash  # costs may be added later
