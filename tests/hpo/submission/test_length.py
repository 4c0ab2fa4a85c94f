"""The ladder of lengths: which trainings it makes, what it decides, and how a refit follows it.

Decisions are tested with invented predictions in place of trainings, the rest on real digits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import one_hot

from core.config import TrainConfig
from core.data import Dataset, Division, Splits
from core.errors import DivergedError
from core.loop import EpochMetrics
from core.metrics import paired_gain
from core.runtime import make_generator
from hpo.analysis.study_data import read_study_data
from hpo.confirmation.trials import replicated
from hpo.errors import StudyError
from hpo.paths import StudyPaths, TrainingPaths
from hpo.report.length import length as report_section
from hpo.search.held_out import write_outputs
from hpo.space import to_yaml
from hpo.study import find_study
from hpo.study.results import json_line, read_rows
from hpo.submission import length
from hpo.submission.bundle import load_bundle
from hpo.submission.ladder import Ladder, read_ladder
from hpo.submission.length import Budget, Climber, Site, climb, default_budget
from tests.hpo.commands import RunHpo

CPU = torch.device("cpu")
EPOCHS = 3
WINNER, BASELINE = (Climber(key, key, TrainConfig(epochs=EPOCHS, seed=7)) for key in ("trial 4", "baseline"))
WINNER, BASELINE = (
    Climber(one.key, one.name, one.config.override({"batch_size": size}))
    for one, size in ((WINNER, 32), (BASELINE, 64))
)
PLENTY = 10_000

Accuracy = Callable[[TrainConfig], float]


class Trainer:
    """Invents trainings: each of its predictions is right with a probability."""

    def __init__(self, accuracy: Accuracy) -> None:
        self.accuracy = accuracy
        self.trained: list[tuple[int, int]] = []
        """Batch size and epochs of each training."""
        self.killed_at: int | None = None

    def __call__(self, config: TrainConfig, splits: Sequence[Splits], paths: TrainingPaths, **_: Any) -> None:
        paths.dir.mkdir(parents=True, exist_ok=True)
        paths.config.write_text(to_yaml(config))
        if len(self.trained) == self.killed_at:
            self.killed_at = None
            raise KeyboardInterrupt
        self.trained.append((config.batch_size, config.epochs))
        for fold, divided in enumerate(splits, 1):
            generator = make_generator(CPU, config.seed, config.batch_size, config.epochs, fold)
            labels = divided.labels[divided.val]
            right = torch.rand(len(labels), generator=generator) < self.accuracy(config)
            logits = one_hot(torch.where(right, labels, (labels + 1) % 10), 10).float()
            result: Any = SimpleNamespace(val_logits=logits)
            write_outputs(paths.validation(fold), result, divided)
            paths.model(fold).write_text("weights")
        rows = [{"epoch": epoch, "elapsed_s": float(epoch)} for epoch in range(1, config.epochs + 1)]
        paths.metrics.write_text("".join(map(json_line, rows)))


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Accuracy], Trainer]:
    def install(accuracy: Accuracy) -> Trainer:
        invented = Trainer(accuracy)
        monkeypatch.setattr(length, "train_recorded", invented)
        return invented

    return install


@contextmanager
def unseen(name: str, epochs: int) -> Iterator[Callable[[str], Callable[[EpochMetrics], None]]]:
    yield lambda label: lambda epoch: None


def site_of(folder: Path, dataset: Dataset, metric: str = "accuracy", replicates: int = 2) -> Site:
    return Site(
        paths=StudyPaths(folder / "own"),
        metric=metric,
        division=Division(dataset),
        device=CPU,
        replicate=lambda config, replicate: replicated(config, replicate, seed=0, dataset=dataset),
        replicates=replicates,
        shown=unseen,
        say=lambda line: None,
    )


def by_length(*accuracies: float) -> Accuracy:
    """The accuracy at 1, 2, 4 and 8 times the epochs."""
    return lambda config: dict(zip((1, 2, 4, 8), accuracies, strict=True))[config.epochs // EPOCHS]


# The ladder ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "times", "ended"),
    [
        ((0.3, 0.5, 0.7, 0.9), 8, "8 times the epochs of the search is the longest"),
        ((0.3, 0.5, 0.7, 0.4), 4, "no gain beyond its error"),
        ((0.3, 0.7, 0.4, 0.9), 2, "no gain beyond its error"),  # a length is not skipped
        ((0.7, 0.4, 0.9, 0.9), 1, "no gain beyond its error"),
    ],
)
def test_a_configuration_climbs_as_long_as_a_doubling_gains_more_than_its_error(
    accuracies: tuple[float, ...], times: int, ended: str, tmp_path: Path, digits: Dataset, trainer: Any
) -> None:
    invented = trainer(by_length(*accuracies))
    ladder, config, folder = climb([WINNER], site_of(tmp_path, digits), Budget(PLENTY))
    assert (ladder.chosen, ladder.epochs, ladder.searched) == ("trial 4", times * EPOCHS, EPOCHS)
    assert ended in ladder.ended
    tried = [1, 2, 4, 8][: min(4, times.bit_length() + 1)]
    assert [rung.epochs for rung in ladder.rungs] == [each * EPOCHS for each in tried]
    assert [rung.climbs for rung in ladder.rungs[1:]] == [each <= times for each in tried[1:]]
    # Differences so clear need one replicate each.
    assert invented.trained == [(32, each * EPOCHS) for each in tried]
    assert config == replicated(WINNER.config.override({"epochs": times * EPOCHS}), 0, seed=0, dataset=digits)
    weights = {file.parent for file in tmp_path.rglob("model*.safetensors")}
    assert weights == {folder.dir}
    assert Ladder.from_json(json.loads(json.dumps(ladder.to_json()))) == ladder


def test_an_unclear_gain_is_measured_on_a_second_replicate(tmp_path: Path, digits: Dataset, trainer: Any) -> None:
    """On the free splits of a confirmation that an earlier version began, which overlap."""
    invented = trainer(lambda config: 0.7)
    free = partial(replicated, seed=0, dataset=digits, parts=False)
    ladder, _, _ = climb([WINNER], replace(site_of(tmp_path, digits), replicate=free), Budget(PLENTY))
    first, second = ladder.rungs[:2]
    assert (first.replicates, second.replicates) == (1, 2)
    assert invented.trained[:4] == [(32, 3), (32, 6), (32, 6), (32, 3)]
    paths = StudyPaths(tmp_path / "own")
    shorter, longer = (
        [load_file(paths.longer("trial 4", epochs, replicate).validation()) for replicate in (0, 1)]
        for epochs in (3, 6)
    )
    images = torch.cat([each["indices"] for each in longer])
    assert len(images.unique()) < len(images)  # the predictions of an image in both are exchanged together
    logits, others = (torch.cat([each["logits"] for each in outputs]) for outputs in (longer, shorter))
    generator = make_generator(CPU, "length")
    expected = paired_gain(logits, others, digits.labels[images], "accuracy", generator=generator, images=images)
    assert second.gain == expected


def test_the_loss_is_compared_at_the_best_temperature_of_each_length(
    tmp_path: Path, digits: Dataset, trainer: Any
) -> None:
    """Every prediction has the same confidence, so that undivided logits of 0.9 and of 0.95 differ by this alone."""
    trainer(by_length(0.3, 0.9, 0.3, 0.3))
    ladder, _, _ = climb([WINNER], site_of(tmp_path, digits, metric="nll"), Budget(PLENTY))
    assert ladder.epochs == 2 * EPOCHS
    gain = ladder.rungs[1].gain
    assert gain is not None
    assert gain.value == pytest.approx(ladder.rungs[0].score - ladder.rungs[1].score, abs=1e-6)
    assert ladder.rungs[1].score < 0.6  # at temperature 1 the loss of these logits is 1.56


@pytest.mark.parametrize(("theirs", "chosen"), [((0.3, 0.5, 0.7, 0.9), "baseline"), ((0.3, 0.5, 0.55, 0.1), "trial 4")])
def test_the_baseline_is_refitted_if_it_is_ahead_at_the_final_lengths(
    theirs: tuple[float, ...], chosen: str, tmp_path: Path, digits: Dataset, trainer: Any
) -> None:
    winners = by_length(0.5, 0.7, 0.5, 0.5)
    trainer(lambda config: (winners if config.batch_size == 32 else by_length(*theirs))(config))
    ladder, config, folder = climb([WINNER, BASELINE], site_of(tmp_path, digits), Budget(PLENTY))
    assert ladder.chosen == chosen
    assert ladder.ahead is not None
    assert (ladder.ahead.value > ladder.ahead.error) == (chosen == "baseline")
    assert config.batch_size == (64 if chosen == "baseline" else 32)
    assert config.epochs == ladder.epochs == (8 if chosen == "baseline" else 2) * EPOCHS
    assert folder.dir.name == f"{chosen.replace(' ', '-')}-{ladder.epochs}-0"
    words = "\n".join(ladder.lines())
    assert ("baseline is refitted instead of trial 4" in words) == (chosen == "baseline")
    assert ("baseline is not better than trial 4 beyond the error" in words) == (chosen == "trial 4")


def test_without_a_longer_training_the_confirmation_stays_as_it_is(
    tmp_path: Path, digits: Dataset, trainer: Any
) -> None:
    trainer(lambda config: (0.5 if config.batch_size == 32 else 0.8) * (config.epochs == EPOCHS))
    ladder, _, _ = climb([WINNER, BASELINE], site_of(tmp_path, digits), Budget(PLENTY))
    assert (ladder.chosen, ladder.ahead, ladder.epochs) == ("trial 4", None, EPOCHS)


def test_a_budget_ends_the_ladder_and_is_named(tmp_path: Path, digits: Dataset, trainer: Any) -> None:
    invented = trainer(by_length(0.3, 0.5, 0.7, 0.9))
    least = default_budget(0, [WINNER, BASELINE])
    assert least == 2 * (1 + 2 + 4) * EPOCHS
    assert default_budget(10 * least, [WINNER, BASELINE]) == 10 * least // 3
    ladder, _, _ = climb([WINNER, BASELINE], site_of(tmp_path, digits), Budget(least - 1))
    assert ladder.ended == f"the budget of {least - 1} epochs allows no further doubling"
    assert {epochs for _, epochs in invented.trained} == {EPOCHS, 2 * EPOCHS}
    assert ladder.epochs == 2 * EPOCHS


def test_a_time_limit_ends_the_ladder_before_what_it_cannot_hold(tmp_path: Path, digits: Dataset, trainer: Any) -> None:
    """An invented epoch takes a second; the refit has a third more images than a training without those to validate."""
    trainer(by_length(0.3, 0.5, 0.7, 0.9))
    climb([WINNER], site_of(tmp_path, digits), Budget(PLENTY))  # records the pace
    for epochs in (12, 24):
        shutil.rmtree(tmp_path / "own" / "length" / f"trial-4-{epochs}-0")
    needed_s = length.SLACK * (12 + 12 * 4 / 3)
    for seconds, times in ((needed_s - 1, 2), (needed_s + 1, 4)):
        ladder, _, _ = climb([WINNER], site_of(tmp_path, digits), Budget(None, seconds))
        assert ladder.epochs == times * EPOCHS
    shutil.rmtree(tmp_path / "own")
    invented = trainer(by_length(0.3, 0.5, 0.7, 0.9))
    ladder, _, _ = climb([WINNER], site_of(tmp_path, digits), Budget(None, 0.01))
    assert (ladder.rungs, ladder.epochs, invented.trained) == ((), EPOCHS, [])
    assert "too little for another doubling" in ladder.ended


def test_a_length_that_diverges_is_not_taken(tmp_path: Path, digits: Dataset, trainer: Any) -> None:
    def accuracy(config: TrainConfig) -> float:
        if config.epochs > 2 * EPOCHS:
            raise DivergedError("the loss is nan")
        return by_length(0.3, 0.6, 0, 0)(config)

    invented = trainer(accuracy)
    for _ in range(2):
        ladder, _, _ = climb([WINNER], site_of(tmp_path, digits), Budget(PLENTY))
        assert (ladder.epochs, ladder.rungs[-1].failure) == (2 * EPOCHS, "diverged")
        assert Ladder.from_json(json.loads(json.dumps(ladder.to_json()))).rungs[-1].failure == "diverged"
    assert len(invented.trained) == 3  # the failure is recorded too


def test_a_winner_that_cannot_be_trained_again_stays_the_winner(tmp_path: Path, digits: Dataset, trainer: Any) -> None:
    """The refit then shows the reason, as without a ladder."""

    def accuracy(config: TrainConfig) -> float:
        if config.batch_size == 32:
            raise DivergedError("the loss is nan")
        return by_length(0.3, 0.6, 0.1, 0.1)(config)

    trainer(accuracy)
    ladder, _, _ = climb([WINNER, BASELINE], site_of(tmp_path, digits), Budget(PLENTY))
    assert (ladder.chosen, ladder.epochs, ladder.ahead) == ("trial 4", EPOCHS, None)


def test_a_damaged_record_of_a_ladder_is_named(tmp_path: Path) -> None:
    assert read_ladder(tmp_path / "length.json") is None
    (tmp_path / "length.json").write_text('{"rungs": []}')
    with pytest.raises(StudyError, match=r"length\.json: cannot be read"):
        read_ladder(tmp_path / "length.json")


def test_a_probe_has_no_length(tmp_path: Path, digits: Dataset, trainer: Any) -> None:
    probe = {"optim.name": "logistic", "model.name": "timm/resnet18", "model.pretrained": True, "epochs": 1}
    climber = Climber("trial 4", "trial 4", TrainConfig().override(probe))
    ladder, _, _ = climb([climber], site_of(tmp_path, digits), Budget(PLENTY))
    assert (ladder.epochs, ladder.ended) == (1, "a probe is not trained in epochs")


@pytest.mark.parametrize("killed_at", range(5))
def test_an_interrupted_ladder_resumes_with_the_same_decision(
    killed_at: int, tmp_path: Path, digits: Dataset, trainer: Any
) -> None:
    undisturbed = trainer(by_length(0.3, 0.5, 0.7, 0.5))
    expected, _, _ = climb([WINNER, BASELINE], site_of(tmp_path / "a", digits), Budget(60))
    invented = trainer(by_length(0.3, 0.5, 0.7, 0.5))
    invented.killed_at = killed_at
    with pytest.raises(KeyboardInterrupt):
        climb([WINNER, BASELINE], site_of(tmp_path / "b", digits), Budget(60))
    ladder, _, _ = climb([WINNER, BASELINE], site_of(tmp_path / "b", digits), Budget(60))
    assert ladder == expected
    assert invented.trained == undisturbed.trained


# A refit ------------------------------------------------------------------------------------------------------------

LEARNS = """
data: {name: digits}
base: {model: {widths: [16], blocks: [1]}, epochs: 1, batch_size: 64, augment: {flip: 0.0}, optim: {lr_scale: 40}}
pruner: {name: none}
sampler: {name: random}
search:
  optim.lr_scale: {low: 30, high: 60, log: true}
confirm: {budget: 0.1}
"""


def test_a_refit_is_as_long_as_its_ladder_decides(tmp_path: Path, run_hpo: RunHpo) -> None:
    """One epoch is too short for digits: the ladder ends at its budget, and the refit uses its recorded training."""
    (tmp_path / "own.yaml").write_text(LEARNS)
    run_hpo("run", str(tmp_path / "own.yaml"), "--trials", "2")
    said, study = run_hpo("refit", "best"), find_study("own")
    report = json.loads((study.paths.refit("best") / "metrics.json").read_text())
    ladder = Ladder.from_json(report["length"])
    assert ladder.epochs == report["epochs"] == 4
    assert all(line in said for line in ladder.lines())
    assert ladder.verdict in (study.paths.refit("best") / "README.md").read_text()
    bundle = load_bundle(study.paths.refit("best"), CPU)
    assert (bundle.meta.config.epochs, report["trial"]) == (4, int(ladder.name.split()[-1].strip(")")))
    # Trainings of one epoch are the confirmation's; the decisions use the recorded network of the chosen length.
    folders = sorted(folder.name for folder in (study.paths.dir / "length").iterdir())
    assert not [name for name in folders if name.split("-")[-2] == "1"]
    assert len(read_rows(study.paths.longer(ladder.chosen, 4, 0).metrics)) == 4
    assert "refit: epoch 1 of 4" in said
    assert "trial 0 kept no weights" not in said

    section = report_section(read_study_data(study))
    assert section is not None
    assert f"{ladder.verdict[1:]}." in section.lead
    assert all(f"{rung.score:.4f}" in section.body for rung in ladder.rungs)

    again = run_hpo("refit", "best", "--members", "2")
    assert ladder.verdict in again
    assert json.loads(study.paths.ladder.read_text()) == ladder.to_json()
    assert "best, 4 epochs: epoch" not in again


@pytest.mark.parametrize("searched", [True, False], ids=["trial", "recipe"])
def test_a_length_can_be_given_or_looked_for_on_the_split_of_a_trial_or_recipe(
    searched: bool, tmp_path: Path, run_hpo: RunHpo
) -> None:
    (tmp_path / "own.yaml").write_text(LEARNS)
    what = ["0", "--study", "own"]
    if searched:
        run_hpo("run", str(tmp_path / "own.yaml"), "--trials", "1")
    else:
        (tmp_path / "one.yaml").write_text(to_yaml(TrainConfig().override({
            "epochs": 1, "batch_size": 64, "model.widths": (16,), "model.blocks": (1,), "augment.flip": 0.0,
            "optim.lr_scale": 40.0})))  # fmt: skip
        what = [str(tmp_path / "one.yaml")]

    def refitted(*options: str) -> dict[str, Any]:
        said = run_hpo("refit", *what, *options)
        folder = Path(said.partition("written to ")[2].partition(",")[0])
        report: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
        assert load_bundle(folder, CPU).meta.config.epochs == report["epochs"]
        return report

    assert (refitted()["epochs"], refitted("--epochs", "1")["epochs"]) == (1, 1)
    given = refitted("--epochs", "3")
    assert (given["epochs"], given["length"]) == (3, None)
    assert given["trial"] == (0 if searched else None)
    found = refitted("--epochs", "auto")
    assert found["epochs"] == found["length"]["epochs"] == 4
    assert {rung["replicates"] for rung in found["length"]["rungs"]} == {1}


@pytest.mark.parametrize("epochs", ["0", "many", "1.5", "100001"])
def test_epochs_are_a_number_or_auto(epochs: str, run_hpo: RunHpo) -> None:
    assert f"--epochs {epochs}: give a number from 1 to 100,000, or auto" in run_hpo.fails(
        "refit", "best", "--epochs", epochs
    )
