"""The length probe: its law, its advice, and when `hpo run` trains it. The trainings are on real digits."""

from __future__ import annotations

from pathlib import Path

import pytest

import hpo.api.run
from core.config import TrainConfig
from core.errors import DivergedError
from hpo.analysis.study_data import read_study_data
from hpo.report.length import length
from hpo.search import length as probing
from hpo.search.interrupts import Interrupts
from hpo.search.length import LengthProbe, fit_length, probe_of, probed
from hpo.study import find_study
from hpo.study.results import read_rows
from tests.hpo.commands import RunHpo

SPACE = """
data: {name: digits}
base: {model: {widths: [8], blocks: [1]}, epochs: 8, batch_size: 256, augment: {flip: 0.0}, optim: {lr_scale: 40}}
pruner: {name: none}
sampler: {name: random}
search:
  optim.lr_scale: {low: 30, high: 60, log: true}
"""


@pytest.mark.parametrize(("floor", "scale", "power"), [(0.05, 0.9, 0.5), (0.3, 0.6, 1.0), (0.0, 0.8, 0.2)])
def test_the_law_of_a_curve_is_found(floor: float, scale: float, power: float) -> None:
    def accuracy(epochs: float) -> float:
        return 1 - floor - scale * float(epochs**-power)

    epochs = range(5, 21)
    found = fit_length(epochs, list(map(accuracy, epochs)), 20)
    assert found is not None
    for longer in (5, 20, 40, 80):
        assert found.accuracy(longer) == pytest.approx(accuracy(longer), abs=1e-4)
    assert LengthProbe.from_json(found.to_json()) == found


def test_a_flat_curve_predicts_no_gain() -> None:
    found = fit_length(range(5, 21), [0.9] * 16, 20)
    assert found is not None
    assert found.gain(4) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("probe", "advised", "words"),
    [
        (LengthProbe(16, 0.0, 1.2, 0.3), 64, "16 epochs are too few for these data"),
        (LengthProbe(16, 0.0, 1.0, 1.2), 32, "16 epochs are too few for these data"),
        (LengthProbe(16, 0.05, 0.4, 0.8), 16, "16 epochs suit these data"),
        (LengthProbe(64, 0.0, 1.0, 1.5), 32, "64 epochs are more than these data need: 32"),
        (LengthProbe(64, 0.1, 1.0, 2.5), 16, "64 epochs are more than these data need: 16"),
    ],
)
def test_the_advice_follows_from_the_law(probe: LengthProbe, advised: int, words: str) -> None:
    assert probe.advised == advised
    _, said = probe.lines()
    assert said.startswith(words)
    assert (f"--set epochs={advised}" in said) == (advised != probe.epochs)
    longest = 4 * probe.epochs
    if probe.epochs < advised < longest:
        assert probe.accuracy(2 * advised) - probe.accuracy(advised) < 0.02


def test_a_short_training_and_a_probe_of_features_are_not_probed() -> None:
    logistic = {"optim.name": "logistic", "model.name": "timm/resnet18", "model.pretrained": True}
    assert probed(TrainConfig().override(logistic)) is None
    assert probed(TrainConfig(epochs=7)) is None
    stopping = TrainConfig(epochs=8).override({"early_stop.patience_fraction": 0.2, "schedule.name": "plateau"})
    found = probed(stopping)
    assert found is not None
    assert (found.schedule.name, found.averaging.name, found.early_stop.patience_fraction) == ("constant", "ema", None)
    assert found.epochs == 8


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The file of a space whose searches end before their first trial."""
    monkeypatch.setattr(hpo.api.run, "train_all", lambda work, view: True)
    (tmp_path / "own.yaml").write_text(SPACE)
    return str(tmp_path / "own.yaml")


def test_a_search_of_twenty_trainings_begins_with_a_probe_which_resumes_and_is_not_repeated(
    own: str, run_hpo: RunHpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs = 0

    def check(self: Interrupts) -> None:
        nonlocal epochs
        epochs += 1
        if epochs == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Interrupts, "check", check)
        run_hpo("run", own, "--trials", "20", code=130)
    study = find_study("own")
    assert probe_of(study.settings.length_probe) is None

    said = run_hpo("run", own, "--trials", "20")
    assert "length probe: epoch 3 of 8" not in said
    assert "length probe: epoch 4 of 8" in said
    found = probe_of(find_study("own").settings.length_probe)
    assert found is not None
    assert all(line in said for line in found.lines())
    rows = read_rows(study.paths.length_probe.metrics)
    assert [row["epoch"] for row in rows] == list(range(1, 9))
    used = [row for row in rows if row["epoch"] >= 2]
    assert found == fit_length([row["epoch"] for row in used], [row["val_accuracy"] for row in used], 8)

    section = length(read_study_data(find_study("own")))
    assert section is not None
    assert found.lines()[0] in section.body
    assert "length probe" not in run_hpo("run", own, "--trials", "20")


@pytest.mark.parametrize("options", [["--trials", "19"], ["--trials", "20", "--set", "epochs=7"]])
def test_a_small_search_has_no_probe(options: list[str], own: str, run_hpo: RunHpo) -> None:
    assert "length probe" not in run_hpo("run", own, *options)
    assert length(read_study_data(find_study("own"))) is None


def test_a_baseline_that_diverges_at_a_constant_rate_is_searched_all_the_same(
    own: str, run_hpo: RunHpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: object, **__: object) -> None:
        raise DivergedError("the training loss of epoch 1 is nan")

    monkeypatch.setattr(probing, "train_recorded", diverge)
    assert "no prediction: at a constant rate, the training loss" in run_hpo("run", own, "--trials", "20")
    assert "length probe" not in run_hpo("run", own, "--trials", "20")
