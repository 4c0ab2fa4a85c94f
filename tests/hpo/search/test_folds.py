"""k-fold: as an objective, as a recorded training, and as an ensemble at refit. Real digits throughout."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from filelock import FileLock
from optuna.trial import TrialState, create_trial
from safetensors.torch import load_file

import core.loop.run
from core.calibration import calibrated_loss, scaled
from core.config import TrainConfig
from core.data import Dataset, folds
from core.loop import EpochMetrics, TrainResult, train
from core.metrics import scores, value
from core.runtime import normalize
from core.schedule import saturated_from
from core.seeds import derive_seed
from core.tta import VIEWS, look, predict_logits
from hpo.dashboard import artifacts
from hpo.errors import StudyError
from hpo.paths import StudyPaths, TrainingPaths
from hpo.reporter import NoProgress
from hpo.search.interrupts import Interrupts
from hpo.search.loop import estimate, run_study
from hpo.search.recipes import run_recipes
from hpo.search.training import Recorded, Watch, of_fold, train_recorded, validation_confusion
from hpo.space import SearchSpace, load_space
from hpo.space.pruner import places_of
from hpo.study import Study, open_study
from hpo.study.results import read_result
from hpo.submission.bundle import load_bundle
from hpo.submission.decision import Forced
from hpo.submission.refit import Refitted, Training, refit
from hpo.trials import RUNG_LOSS, TRIAL_INDEX, trial_index_of
from tests.hpo.commands import RunHpo, studies_in
from tests.hpo.digits import check_predictions, digit_pixels, write_digits

CPU = torch.device("cpu")
FOLDS, EPOCHS = 3, 3
SPACE = """
data: {name: digits, folds: 3}
base: {model: {widths: [8], blocks: [1]}, epochs: 3, batch_size: 128, augment: {flip: 0.0}, optim: {lr_scale: 4.0}}
sampler: {name: random}
pruner: {name: rungs, rungs: [0.3], keep: 0.33}
search:
"""
SEARCH = "optim.lr_scale: {low: 0.5, high: 20, log: true}"
NARROW = ["--set", "model.widths=[8]", "--set", "model.blocks=[1]"]
SMALL = "model: {widths: [8], blocks: [1]}\nepochs: 3\nbatch_size: 128\naugment: {flip: 0.0}\n"


class Watcher(NoProgress):
    """Counts epochs, and stops the study after so many, as Ctrl-C would."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.epochs = 0
        self.recipes: list[str] = []
        self.lines: list[str] = []

    def refresh(self, *, force: bool = False) -> None:
        self.epochs += not force
        if self.epochs == self.stop_after and not force:
            raise KeyboardInterrupt

    def training(self, label: str, *, epochs: int) -> Callable[[EpochMetrics], None]:
        self.recipes.append(label)
        return super().training(label, epochs=epochs)


def a_space(
    folder: Path, *, overrides: list[str] | None = None, recipe: str | None = None, search: str = SEARCH
) -> SearchSpace:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "own.yaml").write_text(f"{SPACE}  {search}\n" + ("recipes: [outside.yaml]\n" if recipe else ""))
    if recipe:
        (folder / "outside.yaml").write_text(SMALL + recipe)
    return load_space(folder / "own.yaml", overrides or [])


def a_study(space: SearchSpace, dataset: Dataset, trials: int) -> Study:
    study = open_study(space, name="own", dataset=dataset)
    study.queue.ensure_trials(trials)
    return study


def run(study: Study, space: SearchSpace, dataset: Dataset, *, stop_after: int | None = None) -> Watcher:
    watcher = Watcher(stop_after)
    splits = folds(dataset, space.baseline.data)
    with Interrupts() as interrupts:
        run_study(study, space, splits, device=CPU, progress=watcher, interrupts=interrupts)
        run_recipes(study, space, splits, device=CPU, interrupts=interrupts, say=watcher.lines.append, progress=watcher)
    return watcher


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Study:
    """A finished study of one trial, for tests that leave it as it is."""
    root = tmp_path_factory.mktemp("folded")
    with studies_in(root):
        space = a_space(root)
        study = a_study(space, digits, 1)
        run(study, space, digits)
    return study


@pytest.fixture(scope="module")
def results(folded: Study, digits: Dataset) -> list[TrainResult]:
    """The trainings of that trial's folds by hand."""
    return by_hand(folded.trained(0).config, digits)


def by_hand(config: TrainConfig, dataset: Dataset, metric: str = "accuracy") -> list[TrainResult]:
    """Every fold's training, written out: the first with the configuration's seed, each other with its own."""
    results = []
    for number, splits in enumerate(folds(dataset, config.data), 1):
        seed = config.seed if number == 1 else derive_seed(config.seed, "fold", number)
        results.append(train(config.override({"seed": seed}), splits, device=CPU, metric=metric))
    return results


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def timeless(file: Path) -> list[dict[str, Any]]:
    return [row | {"elapsed_s": 0, "images_per_s": 0} for row in rows_of(file)]


def rung_losses(trial: optuna.trial.FrozenTrial) -> dict[int, float]:
    """Step -> the calibrated loss there."""
    found = {key: loss for key, loss in trial.system_attrs.items() if key.startswith(RUNG_LOSS)}
    return {int(key.removeprefix(RUNG_LOSS)): loss for key, loss in found.items()}


# The objective


@pytest.mark.parametrize("metric", ["accuracy", "nll"])
def test_a_trial_is_worth_the_mean_of_its_folds(tmp_path: Path, digits: Dataset, metric: str) -> None:
    space = a_space(tmp_path, overrides=[f"objective.metric={metric}"])
    study = a_study(space, digits, 1)
    run(study, space, digits)
    [trial] = study.optuna.get_trials()
    results = by_hand(study.trained(0).config, digits, metric)
    values = [result.value(metric) for result in results]
    assert trial.value == statistics.fmean(values)
    assert trial.user_attrs["fold_values"] == values
    assert trial.user_attrs["epochs"] == FOLDS * EPOCHS
    assert trial.user_attrs["kept_epoch"] == study.trained(0).epochs == EPOCHS


def test_a_trial_reports_the_mean_of_the_finished_folds_and_the_current_score(
    folded: Study, results: list[TrainResult]
) -> None:
    expected: dict[int, float] = {}
    for fold, result in enumerate(results, 1):
        finished = [earlier.value("accuracy") for earlier in results[: fold - 1]]
        for epoch in result.history:
            step = (fold - 1) * EPOCHS + epoch.epoch
            expected[step] = statistics.fmean([*finished, epoch.score("accuracy")])
    [trial] = folded.optuna.get_trials()
    assert trial.intermediate_values == expected
    assert sorted(expected) == list(range(1, FOLDS * EPOCHS + 1))


def test_the_first_fold_is_what_a_trial_without_folds_would_be_on_its_images(folded: Study, digits: Dataset) -> None:
    config = folded.trained(0).config
    plain = train(config.override({"data.folds": None}), folds(digits, config.data)[0], device=CPU)
    kept = load_file(folded.paths.trial_model(0))
    assert all(torch.equal(kept[name], weights) for name, weights in plain.model.state_dict().items())


def test_each_fold_has_a_seed_of_its_own() -> None:
    config = TrainConfig(seed=5)
    assert of_fold(config, 1) == config
    assert of_fold(config, 2).seed == derive_seed(5, "fold", 2)
    assert len({of_fold(config, fold).seed for fold in range(1, 21)}) == 20


def test_what_a_folded_trial_leaves_behind(folded: Study, results: list[TrainResult]) -> None:
    rows = rows_of(folded.paths.trial_metrics(0))
    assert [(row["fold"], row["epoch"]) for row in rows] == [(f, e) for f in (1, 2, 3) for e in (1, 2, 3)]
    elapsed = [row["elapsed_s"] for row in rows]
    assert elapsed == sorted(elapsed)  # it runs on over the folds
    for fold, result in enumerate(results, 1):
        kept = load_file(folded.paths.trial_model(0, fold))
        assert all(torch.equal(kept[name], weights) for name, weights in result.model.state_dict().items())
    artifacts.draw(folded, [0])
    for picture in (folded.paths.trial_curves(0), folded.paths.trial_confusion(0)):
        assert picture.exists()
    assert not list((folded.paths.dir / "checkpoints").iterdir())


def test_the_confusion_counts_every_image_of_the_pool_once(digits: Dataset) -> None:
    config = TrainConfig().override({"data.folds": 3, "epochs": 1, "model.widths": (8,), "model.blocks": (1,)})
    results = by_hand(config, digits)
    table = validation_confusion(results, folds(digits, config.data))
    assert torch.equal(table.sum(1), torch.bincount(digits.labels))
    right = sum(
        round(result.value("accuracy") * len(splits.val))
        for result, splits in zip(results, folds(digits, config.data), strict=True)
    )
    assert int(table.trace()) == right


def test_only_the_best_few_trials_keep_their_weights_and_those_keep_all_folds(tmp_path: Path, digits: Dataset) -> None:
    space = a_space(tmp_path, overrides=["epochs=1", "pruner.name=none"])
    study = a_study(space, digits, 5)
    run(study, space, digits)
    found = {
        number: [study.paths.trial_model(number, fold).exists() for fold in (1, 2, 3)] for number in range(5)
    }  # fmt: skip
    assert sorted(found.values()) == [[False] * 3] * 2 + [[True] * 3] * 3


# Pruning


def test_a_rung_has_the_mean_calibrated_loss_of_the_finished_folds_and_the_current_one(
    folded: Study, results: list[TrainResult], digits: Dataset
) -> None:
    [trial] = folded.optuna.get_trials()
    config = folded.trained(0).config
    ends = []
    for result, splits in zip(results, folds(digits, config.data), strict=True):
        assert result.val_logits is not None
        ends.append(calibrated_loss(result.val_logits, splits.labels[splits.val]))
    first = train(config, folds(digits, config.data)[0], device=CPU, calibrate_at={1}).history[0].calibrated_loss
    means = {EPOCHS * fold: statistics.fmean(ends[:fold]) for fold in (1, 2, 3)}
    assert rung_losses(trial) == {1: first, **means}


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([], {1}),
        (["objective.metric=macro_f1"], set()),
        (["objective.metric=nll"], set()),
        (["pruner.name=none"], set()),
    ],
)
def test_rungs_have_a_calibrated_loss_if_the_metric_is_accuracy(
    tmp_path: Path, digits: Dataset, overrides: list[str], steps: set[int]
) -> None:
    space = a_space(tmp_path, overrides=["data.folds=null", *overrides])
    study = a_study(space, digits, 1)
    run(study, space, digits)
    [trial] = study.optuna.get_trials()
    assert rung_losses(trial).keys() == steps


def with_rivals(study: Study, values: dict[int, float]) -> None:
    """Adds trials that reported these values, by step, and are over, to the study and to its total."""
    assert study.total is not None
    study.settings.total = study.total + 8
    for trial_index in range(50, 58):
        study.optuna.add_trial(
            create_trial(
                state=TrialState.COMPLETE, value=0.0, intermediate_values=values, user_attrs={TRIAL_INDEX: trial_index}
            )
        )


def trained(study: Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that are no rivals."""
    return sorted((trial for trial in study.optuna.get_trials() if trial_index_of(trial) < 50), key=trial_index_of)


@pytest.mark.parametrize(
    ("step", "fold", "epochs"),
    [(1, 1, 1), (EPOCHS, 1, EPOCHS), (2 * EPOCHS, 2, 2 * EPOCHS)],
    ids=["at a rung of the first fold", "at the end of the first", "at the end of the second"],
)
def test_a_trial_that_falls_behind_is_pruned_and_its_later_folds_are_not_trained(
    tmp_path: Path, digits: Dataset, step: int, fold: int, epochs: int
) -> None:
    space = a_space(tmp_path)
    study = a_study(space, digits, 2)
    with_rivals(study, {step: 2.0})
    run(study, space, digits)
    base, other = trained(study)
    assert base.state == TrialState.COMPLETE  # never pruned
    assert other.state == TrialState.PRUNED
    assert not places_of(other)[step].kept
    rows = rows_of(study.paths.trial_metrics(other.number))
    assert (len(rows), rows[-1]["fold"]) == (epochs, fold)
    assert other.last_step == step
    assert other.value == other.intermediate_values[step]
    assert len(other.user_attrs.get("fold_values", [])) == epochs // EPOCHS
    assert not list((study.paths.dir / "checkpoints").iterdir())


def test_a_trial_is_not_pruned_at_its_very_end(tmp_path: Path, digits: Dataset) -> None:
    space = a_space(tmp_path)
    study = a_study(space, digits, 2)
    with_rivals(study, {FOLDS * EPOCHS: 2.0})
    run(study, space, digits)
    assert [trial.state for trial in trained(study)] == [TrialState.COMPLETE] * 2


def test_optunas_own_pruners_get_the_same_steps(tmp_path: Path, digits: Dataset) -> None:
    space = a_space(tmp_path, overrides=["pruner.name=median", "pruner.startup_trials=0"])
    study = a_study(space, digits, 2)
    assert isinstance(study.optuna.pruner, optuna.pruners.MedianPruner)
    with_rivals(study, {2 * EPOCHS: 2.0})
    run(study, space, digits)
    base, other = trained(study)
    assert (base.state, other.state) == (TrialState.COMPLETE, TrialState.PRUNED)
    assert other.last_step == len(rows_of(study.paths.trial_metrics(other.number))) == 2 * EPOCHS


def test_a_fold_that_stops_early_reports_its_end_at_the_step_where_all_end(tmp_path: Path, digits: Dataset) -> None:
    # At so small a rate hardly anything changes, so a patience of one epoch soon runs out.
    slow = ["epochs=12", "early_stop.patience_fraction=0.1", "optim.lr=1e-7", "pruner.name=none"]
    space = a_space(tmp_path, overrides=slow, search="loss.smoothing: {low: 0.0, high: 0.2}")
    study = a_study(space, digits, 1)
    run(study, space, digits)
    results = by_hand(study.trained(0).config, digits)
    assert any(len(result.history) < 12 for result in results)
    [trial] = study.optuna.get_trials()
    values = [result.value("accuracy") for result in results]
    for fold in (1, 2, 3):
        assert trial.intermediate_values[12 * fold] == statistics.fmean(values[:fold])
    assert trial.user_attrs["epochs"] == sum(len(result.history) for result in results)
    mean = statistics.fmean(result.kept.epoch for result in results)
    assert abs(trial.user_attrs["kept_epoch"] - mean) <= 0.5


def test_the_estimate_counts_the_folds(tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpo.search.loop.seconds_per_epoch", lambda *arguments, **options: 2.0)
    space = a_space(tmp_path, overrides=["epochs=10", "pruner.rungs=[0.1]", "pruner.keep=0.5"])
    splits = folds(digits, space.baseline.data)
    found = estimate(space, splits, trials=4, recipes=1, device=CPU)
    assert found.in_full_s == 5 * 30 * 2.0
    # All run the first epoch, half of them the rest of fold 1; the ends of folds 1 and 2 halve them together.
    assert found.pruned_s == pytest.approx(2.0 * (4 * (1 + 9 / 2 + 10 / 2**1.5 + 10 / 4) + 30))


# Cut off, and going on


@pytest.mark.parametrize("stop_after", [1, EPOCHS, EPOCHS + 2, 2 * EPOCHS, 2 * EPOCHS + 1])
@pytest.mark.parametrize("share", [float("inf"), 1e-9], ids=["checkpoints each epoch", "checkpoints rarely"])
def test_a_trial_cut_off_in_any_fold_ends_as_its_undisturbed_twin(
    tmp_path: Path, digits: Dataset, folded: Study, monkeypatch: pytest.MonkeyPatch, stop_after: int, share: float
) -> None:
    monkeypatch.setattr(core.loop.run, "CHECKPOINT_SHARE", share)
    space = a_space(tmp_path)
    study = a_study(space, digits, 1)
    with pytest.raises(KeyboardInterrupt):
        run(study, space, digits, stop_after=stop_after)
    finished = (stop_after - 1) // EPOCHS
    left = [study.paths.checkpoint(0, fold).exists() for fold in range(1, finished + 1)]
    assert all(left)
    resumed = run(study, space, digits)
    assert resumed.epochs == FOLDS * EPOCHS - stop_after  # no epoch is trained again
    first, second = study.optuna.get_trials()
    assert (first.state, second.state) == (TrialState.FAIL, TrialState.COMPLETE)
    [expected] = folded.optuna.get_trials()
    assert (second.value, second.intermediate_values) == (expected.value, expected.intermediate_values)
    for key in ("fold_values", "kept_epoch", "epochs", "raw_accuracy"):
        assert second.user_attrs[key] == expected.user_attrs[key]
    for fold in (1, 2, 3):
        assert study.paths.trial_model(1, fold).read_bytes() == folded.paths.trial_model(0, fold).read_bytes()
    assert timeless(study.paths.trial_metrics(1)) == timeless(folded.paths.trial_metrics(0))
    assert rung_losses(second) == rung_losses(expected)
    assert not list((study.paths.dir / "checkpoints").iterdir())


def test_a_torn_checkpoint_of_a_fold_costs_that_fold_alone(
    tmp_path: Path, digits: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    space = a_space(tmp_path)
    study = a_study(space, digits, 1)
    with pytest.raises(KeyboardInterrupt):
        run(study, space, digits, stop_after=2 * EPOCHS + 1)
    study.paths.checkpoint(0, 2).write_bytes(b"torn")
    resumed = run(study, space, digits)
    assert "starts again from the first epoch" in caplog.text
    assert resumed.epochs == 2 * EPOCHS - 1  # of the third fold, all but the epoch that was interrupted at its end
    assert study.counts().complete == 1


# Recorded trainings


def record_training(
    config: TrainConfig, dataset: Dataset, paths: TrainingPaths, *, stop_after: int | None = None
) -> Recorded:
    seen: list[int] = []

    def watch(label: str) -> Callable[[EpochMetrics], None]:
        def ended(epoch: EpochMetrics) -> None:
            seen.append(epoch.epoch)
            if len(seen) == stop_after:
                raise KeyboardInterrupt

        return ended

    return train_recorded(config, folds(dataset, config.data), paths, metric="accuracy", device=CPU, watch=watch)


@pytest.fixture
def small() -> TrainConfig:
    tiny = {"model.widths": (8,), "model.blocks": (1,), "epochs": 2, "batch_size": 128, "data.folds": 3}
    return TrainConfig(seed=3).override(tiny)


def test_a_recorded_training_reports_mean_and_spread_over_its_folds(
    tmp_path: Path, digits: Dataset, small: TrainConfig
) -> None:
    paths = TrainingPaths(tmp_path / "training")
    recorded = record_training(small, digits, paths)
    values = [result.value("accuracy") for result in by_hand(small, digits)]
    assert recorded.values == tuple(values)
    assert recorded.value == statistics.fmean(values)
    assert recorded.spread == statistics.stdev(values)
    result = json.loads(paths.result.read_text())
    assert (result["value"], result["spread"]) == (recorded.value, recorded.spread)
    assert result["val_accuracy"] == recorded.value
    assert [fold["val_accuracy"] for fold in result["folds"]] == values
    assert sum(row["support"] for row in result["per_class"]) == len(digits.labels)
    assert [(row["fold"], row["epoch"]) for row in rows_of(paths.metrics)] == [
        (f, e) for f in (1, 2, 3) for e in (1, 2)
    ]
    assert sorted(path.name for path in paths.dir.iterdir()) == [
        ".training", "config.yaml", "metrics.jsonl", "model.fold2.safetensors", "model.fold3.safetensors",
        "model.safetensors", "result.json",
    ]  # fmt: skip


def test_without_folds_there_is_no_spread_and_the_result_is_the_kept_epochs(
    tmp_path: Path, digits: Dataset, small: TrainConfig
) -> None:
    paths = TrainingPaths(tmp_path / "training")
    recorded = record_training(small.override({"data.folds": None}), digits, paths)
    assert recorded.spread is None
    result = json.loads(paths.result.read_text())
    assert result["epoch"] == 2
    assert "spread" not in result
    assert "fold" not in rows_of(paths.metrics)[0]


def test_a_recorded_training_cut_off_in_a_later_fold_goes_on(
    tmp_path: Path, digits: Dataset, small: TrainConfig
) -> None:
    paths, twin = TrainingPaths(tmp_path / "training"), TrainingPaths(tmp_path / "twin")
    with pytest.raises(KeyboardInterrupt):
        record_training(small, digits, paths, stop_after=3)
    assert paths.checkpoint(1).exists()
    assert not paths.result.exists()
    recorded, expected = record_training(small, digits, paths), record_training(small, digits, twin)
    assert recorded.values == expected.values
    for fold in (1, 2, 3):
        assert paths.model(fold).read_bytes() == twin.model(fold).read_bytes()
        assert not paths.checkpoint(fold).exists()


def test_a_recipe_beside_the_study_trains_the_studys_folds(tmp_path: Path, digits: Dataset) -> None:
    space = a_space(tmp_path, recipe="loss: {smoothing: 0.1}\n")
    study = a_study(space, digits, 1)
    watcher = run(study, space, digits)
    assert watcher.recipes == [f"recipe outside, fold {fold} of 3" for fold in (1, 2, 3)]
    [recipe] = space.recipes
    config = recipe.config.override({"seed": derive_seed(study.seed, "reference", "outside")})
    values = [result.value("accuracy") for result in by_hand(config, digits)]
    result = read_result(study.paths.reference("outside"))
    assert result is not None
    assert (result["value"], result["spread"]) == (statistics.fmean(values), statistics.stdev(values))
    assert watcher.lines == [f"recipe outside  accuracy {result['value']:.4f}"]


# Refit


def do_refit(
    study: Study, dataset: Dataset, label: str, *, ensemble: int | None = None, watch: Watch | None = None
) -> Refitted:
    chosen = study.trained(0)
    own = Forced("own")  # the trial's networks then suffice
    return refit(
        study.paths,
        number=0,
        label=label,
        kept=TrainingPaths(study.paths.trial(0)),
        config=chosen.config,
        training=Training(chosen.epochs, ensemble=ensemble, forced=own),
        dataset=dataset,
        metric="accuracy",
        device=CPU,
        watch=watch,
    )


def scores_of(done: Refitted) -> dict[str, float]:
    """Score of each choice of views."""
    return {each.name: each.score for each in done.decision.candidates if each.step == "views"}


def out_of_fold(results: list[TrainResult], config: TrainConfig, dataset: Dataset, views: str) -> torch.Tensor:
    """(N, K) for every image of the pool, in its own order, by the one network that had not seen it."""
    found = torch.zeros(len(dataset.labels), len(dataset.classes))
    for result, each in zip(results, folds(dataset, config.data), strict=True):
        prepare = lambda x, each=each: normalize(x, each.mean, each.std)  # noqa: E731
        found[each.val] = predict_logits(result.model, dataset.images[each.val], prepare=prepare, views=views)
    return found


def test_a_folded_trial_is_refitted_on_everything_with_views_chosen_out_of_fold(
    folded: Study, results: list[TrainResult], digits: Dataset
) -> None:
    done = do_refit(folded, digits, "single")
    config = folded.trained(0).config
    for views, score in scores_of(done).items():
        expected = value(scores(out_of_fold(results, config, digits, views), digits.labels), "accuracy")
        assert score == pytest.approx(expected, abs=1e-12)
    assert done.networks == 1
    expected = train(config, folds(digits, config.data)[0].whole(), device=CPU, stop_after=folded.trained(0).epochs)
    kept = load_file(done.dir / "model.safetensors")
    assert all(torch.equal(kept[name], weights) for name, weights in expected.model.state_dict().items())
    meta = load_bundle(done.dir, CPU).meta
    assert meta.normalizations[0].mean == folds(digits, config.data)[0].whole().mean
    report = json.loads((done.dir / "metrics.json").read_text())
    assert report["val"]["images"] == len(digits.labels)


@pytest.fixture(scope="module")
def three(folded: Study, digits: Dataset) -> Refitted:
    """The trial refitted as an ensemble of its folds, which needs no training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hpo.submission.networks.train", lambda *arguments, **options: pytest.fail("a training"))
        return do_refit(folded, digits, "three", ensemble=3)


@pytest.fixture(scope="module")
def four(folded: Study, digits: Dataset) -> Refitted:
    """The trial refitted as an ensemble of four, one more than its folds."""
    return do_refit(folded, digits, "four", ensemble=4)


@pytest.mark.parametrize("members", [3, 4], ids=["as many as the trial's folds", "another number"])
def test_an_ensemble_averages_the_probabilities_of_its_members_over_test_images_and_views(
    folded: Study, results: list[TrainResult], three: Refitted, four: Refitted, digits: Dataset, members: int
) -> None:
    done = three if members == 3 else four
    config = folded.trained(0).config.override({"data.folds": members})
    trained, divided = results if members == 3 else by_hand(config, digits), folds(digits, config.data)
    for views, score in scores_of(done).items():
        expected = value(scores(out_of_fold(trained, config, digits, views), digits.labels), "accuracy")
        assert score == pytest.approx(expected, abs=1e-12)
    test = digits.open_test()
    total = torch.zeros(len(test.labels), 10)
    for result, each in zip(trained, divided, strict=True):
        result.model.eval()
        for view in VIEWS[done.decision.views]:
            with torch.inference_mode():
                total += result.model(normalize(look(test.images, view), each.mean, each.std)).softmax(1)
    mean = scaled((total / (members * len(VIEWS[done.decision.views]))).log(), done.decision.temperature.value).exp()
    assert done.test.accuracy == (mean.argmax(1) == test.labels).double().mean().item()
    assert done.test.loss == pytest.approx(-mean[range(len(mean)), test.labels].log().mean().item(), abs=1e-5)

    loaded = load_bundle(done.dir, CPU)
    torch.testing.assert_close(loaded.probabilities(test.images), mean)
    assert [each.mean for each in loaded.meta.normalizations] == [each.mean for each in divided]
    assert loaded.meta.config == config
    rows = list(csv.DictReader((done.dir / "submission.csv").read_text().splitlines()))
    assert [row["label"] for row in rows] == [digits.classes[label] for label in mean.argmax(1).tolist()]


def test_an_ensemble_that_was_cut_off_goes_on_with_the_members_that_it_has(
    folded: Study, four: Refitted, digits: Dataset
) -> None:
    def cut_off(label: str) -> Callable[[EpochMetrics], None]:
        def epoch_ended(epoch: EpochMetrics) -> None:
            if label == "fold 3 of 4":
                raise KeyboardInterrupt

        return epoch_ended

    trained: list[str] = []

    def count(label: str) -> Callable[[EpochMetrics], None]:
        return lambda epoch: trained.append(label)

    with pytest.raises(KeyboardInterrupt):
        do_refit(folded, digits, "cut", ensemble=4, watch=cut_off)
    assert not folded.paths.refit("cut").exists()
    done = do_refit(folded, digits, "cut", ensemble=4, watch=count)
    assert trained == ["fold 3 of 4"] * (EPOCHS - 1) + ["fold 4 of 4"] * EPOCHS
    assert done.decision.candidates == four.decision.candidates
    assert done.test == four.test
    assert not folded.paths.refit_checkpoints("cut")


def test_the_members_that_a_trial_has_trained_are_not_trained_again(folded: Study, three: Refitted) -> None:
    for fold in (1, 2, 3):
        kept = (three.dir / f"member_{fold}.safetensors").read_bytes()
        assert kept == folded.paths.trial_model(0, fold).read_bytes()


def test_with_the_trials_weights_gone_the_ensemble_is_the_same(folded: Study, three: Refitted, digits: Dataset) -> None:
    weights = folded.paths.trial_model(0, 2)
    content = weights.read_bytes()
    weights.unlink()
    after = do_refit(folded, digits, "after", ensemble=3)
    weights.write_bytes(content)
    for fold in (1, 2, 3):
        name = f"member_{fold}.safetensors"
        assert (after.dir / name).read_bytes() == (three.dir / name).read_bytes()
    assert (after.val, after.test) == (three.val, three.test)


def test_the_test_set_is_opened_once_when_all_is_decided(
    folded: Study, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    opened, trained = digits.open_test, train
    monkeypatch.setattr("core.data.Dataset.open_test", lambda dataset: events.append("test") or opened())
    monkeypatch.setattr(
        "hpo.submission.networks.train",
        lambda *arguments, **options: events.append("train") or trained(*arguments, **options),
    )
    do_refit(folded, digits, "watched", ensemble=4)
    assert events == ["train"] * 4 + ["test"]
    metadata = [json.loads(line) for line in folded.paths.test_openings.read_text().splitlines()]
    assert metadata[-1]["label"] == "watched"


def test_the_members_stop_early_by_their_own_validation_images(
    tmp_path: Path, digits: Dataset, small: TrainConfig
) -> None:
    config = small.override({"epochs": 12, "early_stop.patience_fraction": 0.1, "optim.lr_scale": 8.0})
    paths = StudyPaths(tmp_path / "early")
    training = Training(12, ensemble=3, forced=Forced("own"))
    about: dict[str, Any] = {"dataset": digits, "metric": "macro_f1", "device": CPU}
    done = refit(paths, number=0, label="best", config=config, training=training, **about)
    results = by_hand(config, digits, "macro_f1")
    assert any(len(result.history) < 12 for result in results)
    report = json.loads((done.dir / "metrics.json").read_text())
    assert report["epochs"] == [result.kept.epoch for result in results]
    for fold, result in enumerate(results, 1):
        kept = load_file(done.dir / f"member_{fold}.safetensors")
        assert all(torch.equal(kept[name], weights) for name, weights in result.model.state_dict().items())


def test_rate_and_smoothing_fall_in_the_refit_where_they_fell_in_the_trial(tmp_path: Path, digits: Dataset) -> None:
    plateau = {
        "schedule.name": "plateau", "schedule.patience_fraction": 0.1, "schedule.warmup_fraction": 0.0,
        "loss.smoothing": 0.1, "loss.smoothing_final": 0.0, "loss.smoothing_patience_fraction": 0.1,
    }  # fmt: skip
    config = TrainConfig().override(
        {"model.widths": (8,), "model.blocks": (1,), "epochs": 10, "batch_size": 64, "optim.lr_scale": 20.0, **plateau}
    )
    paths = StudyPaths(tmp_path / "plateau")  # without a trial's files: the refit trains it again
    rows: dict[str, list[dict[str, Any]]] = {}

    def watch(label: str) -> Callable[[EpochMetrics], None]:
        return lambda epoch: rows.setdefault(label, []).append(
            {"lr": epoch.lr, "val_loss": epoch.score("nll") if label else None}
        )

    done = refit(
        paths, number=0, label="best", config=config, training=Training(10), dataset=digits, metric="accuracy",
        device=CPU, watch=watch,
    )  # fmt: skip
    rates, whole = ([epoch["lr"] for epoch in rows[label]] for label in ("trial 0", ""))
    assert rates == whole
    assert len(set(rates)) > 1
    refitted = load_bundle(done.dir, CPU).meta.config
    assert refitted.schedule.name == "pieces"
    losses = [epoch["val_loss"] for epoch in rows["trial 0"]]
    assert refitted.loss.smoothing_final_from == (saturated_from(config.loss, losses, epochs=10) or 0) / 10 > 0


# The commands


def test_from_a_folded_search_to_the_predictions_of_an_ensemble(tmp_path: Path, run_hpo: RunHpo) -> None:
    tiny = ["--set", "epochs=2", "--set", "data.folds=3", *NARROW]
    told = run_hpo("run", "digits", "--trials", "2", *tiny)
    assert "in the first of 3 folds; every image is in the validation set of one fold" in told
    assert "and after each of the first 2 folds" in told
    run_hpo("refit", "best", "--no-confirm")
    told = run_hpo("refit", "best", "--no-confirm", "--folds", "3")
    assert "out-of-fold" in told
    assert "2 times" in told
    refits = tmp_path / "studies/digits/refit"
    assert (refits / "best/model.safetensors").exists()
    members = {path.name for path in (refits / "best.folds3").glob("*.safetensors")}
    assert members == {f"member_{fold}.safetensors" for fold in (1, 2, 3)}

    photos = write_digits(tmp_path / "photos", 20)
    for label in ("best", "best.folds3"):
        out = tmp_path / f"{label}.csv"
        run_hpo("predict", str(refits / label), str(photos), "-o", str(out), "--probabilities")
        check_predictions(out, 20)


def test_more_folds_than_the_smallest_class_has_images_is_one_line(tmp_path: Path, run_hpo: RunHpo) -> None:
    own = imbalanced_npz(tmp_path / "own.npz", smallest=12)  # a fifth of them is the test set
    error = run_hpo.fails("train", "digits_base", "--data", str(own), "--set", "data.folds=15")
    assert "data.folds=15 needs as many images of every class" in error


def imbalanced_npz(path: Path, *, smallest: int) -> Path:
    """Digits of which there are 90 of each class but the last."""
    images, labels = digit_pixels()
    kept = [np.flatnonzero(labels == digit)[: 90 if digit < 9 else smallest] for digit in range(10)]
    rows = np.concatenate(kept)
    np.savez(path, images=images[rows], labels=labels[rows])
    return path


def test_train_reports_the_folds_mean_and_spread_and_every_score(tmp_path: Path, run_hpo: RunHpo) -> None:
    told = run_hpo("train", "digits_base", "--set", "epochs=1", "--set", "data.folds=3", *NARROW)
    [folder] = (tmp_path / "studies/trainings").iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert f"validation accuracy {result['value']:.4f} ± {result['spread']:.4f}" in told
    for name in ("balanced accuracy", "macro-F1", "loss"):
        assert f"{name} " in told
    assert "class by class" not in told  # the digits are balanced
    assert (folder / "learning_curves.png").exists()


def test_the_metric_is_what_is_reported_and_part_of_the_folder_where_it_is_not_accuracy(
    tmp_path: Path, run_hpo: RunHpo
) -> None:
    tiny = ["train", "digits_base", "--set", "epochs=1", *NARROW]
    trainings = tmp_path / "studies/trainings"
    run_hpo(*tiny)
    run_hpo(*tiny, "--metric", "accuracy")
    assert len(list(trainings.iterdir())) == 1
    told = run_hpo(*tiny, "--metric", "macro_f1")
    assert len(list(trainings.iterdir())) == 2
    found = {
        result["metric"]: result
        for folder in trainings.iterdir()
        for result in [json.loads((folder / "result.json").read_text())]
    }
    assert found.keys() == {"accuracy", "macro_f1"}
    assert found["macro_f1"]["value"] == found["macro_f1"]["val_macro_f1"]
    assert f"validation macro-F1 {found['macro_f1']['value']:.4f}, accuracy" in told


def test_early_stopping_of_train_watches_the_metric(monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo) -> None:
    watched: list[str] = []

    def spied(*arguments: Any, metric: str, **options: Any) -> TrainResult:
        watched.append(metric)
        return train(*arguments, metric=metric, **options)

    monkeypatch.setattr("hpo.search.training.train", spied)
    run_hpo("train", "digits_base", "--set", "epochs=1", "--metric", "nll", *NARROW)
    assert watched == ["nll"]


def test_an_imbalanced_set_is_told_class_by_class(tmp_path: Path, run_hpo: RunHpo) -> None:
    own = str(imbalanced_npz(tmp_path / "own.npz", smallest=30))
    tiny = ["--data", own, "--set", "epochs=2", "--set", "data.folds=3", *NARROW]
    told = run_hpo("train", "digits_base", *tiny)
    assert "class by class, 672 validation images:" in told  # all of the pool: four fifths of 90 × 9 + 30
    lines = [line.split() for line in told.splitlines() if line.strip()]
    at = lines.index(["class", "images", "precision", "recall", "F1"])
    table = lines[at + 1 : at + 11]
    [folder] = (tmp_path / "studies/trainings").iterdir()
    rows = json.loads((folder / "result.json").read_text())["per_class"]
    assert table == [
        [row["class"], str(row["support"]), *(f"{row[key]:.4f}" for key in ("precision", "recall", "f1"))]
        for row in rows
    ]
    run_hpo("run", "digits", "--trials", "1", *tiny)
    assert "class by class, 168 test images:" in run_hpo("refit", "best", "--no-confirm", "--folds", "3")


def test_a_folder_that_another_process_trains_into_is_left_to_it(tmp_path: Path) -> None:
    paths = TrainingPaths(tmp_path)
    watch: Any = None
    with (
        FileLock(paths.lock),
        pytest.raises(StudyError, match=f"^{tmp_path} is being trained by another process; wait for its end$"),
    ):
        train_recorded(TrainConfig(), [], paths, metric="accuracy", device=torch.device("cpu"), watch=watch)
    assert list(tmp_path.iterdir()) == [paths.lock]
