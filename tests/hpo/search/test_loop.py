"""A study worked off in this process: recipes beside it, failures that teach, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import TrialState

import core.loop.run
import hpo.search.loop
from core.data import folds, load_dataset, split
from core.errors import ConfigError, DivergedError, GraphError
from core.loop import EpochMetrics, train
from hpo.analysis.study_data import read_study_data
from hpo.analysis.summary import summarize
from hpo.confirmation.candidates import candidates
from hpo.paths import LONG_BASELINE
from hpo.report.baselines import baselines
from hpo.report.words import margins
from hpo.search.interrupts import Interrupts
from hpo.search.loop import estimate, run_study
from hpo.search.objective import failure_of
from hpo.search.recipes import pending_recipes, run_recipes
from hpo.search.weights import DEFAULTS
from hpo.space import SearchSpace, load_recipe, load_space
from hpo.study import Study, find_study, open_study
from hpo.study.results import read_result
from hpo.trials import CRASHES, FAILURE, REASON, VAL_LOSS
from tests.hpo.commands import RunHpo

CPU = torch.device("cpu")
SMALL = "model: {widths: [8], blocks: [1]}\nepochs: 2\nbatch_size: 128\naugment: {flip: 0.0}\n"
SPACE = """
data: {name: digits}
base: {model: {widths: [8], blocks: [1]}, epochs: 2, batch_size: 128, augment: {flip: 0.0}}
pruner: {name: none}
search:
  optim.lr_scale: {low: 0.5, high: 20, log: true}
"""


def write_space(folder: Path, more: str = "", **recipes: str) -> SearchSpace:
    folder.mkdir(exist_ok=True)
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(SMALL + text)
    names = ", ".join(f"{name}.yaml" for name in recipes)
    (folder / "own.yaml").write_text(f"{SPACE}{more}recipes: [{names}]\n")
    return load_space(folder / "own.yaml")


def run(space: SearchSpace, trials: int) -> tuple[Study, list[str]]:
    """The study, and the lines about its recipes."""
    dataset = load_dataset(space.baseline.data)
    splits = folds(dataset, space.baseline.data)
    study = open_study(space, name="own", dataset=dataset)
    study.queue.ensure_trials(trials)
    lines: list[str] = []
    with Interrupts() as interrupts:
        run_study(study, space, splits, device=CPU, interrupts=interrupts)
        run_recipes(study, space, splits, device=CPU, interrupts=interrupts, say=lines.append)
    return study, lines


def result_of(study: Study, recipe: str) -> dict[str, Any]:
    result = read_result(study.paths.reference(recipe))
    assert result is not None
    return result


def test_a_recipe_that_the_space_can_express_is_a_trial_and_another_is_trained_beside(tmp_path: Path) -> None:
    space = write_space(
        tmp_path, inside="optim: {lr_scale: 4.0}\n", outside="optim: {lr_scale: 4.0}\nloss: {smoothing: 0.1}\n"
    )
    study, lines = run(space, 3)
    assert [trial.user_attrs.get("recipe") for trial in study.optuna.get_trials()] == [None, "inside", None]
    assert lines == [f"recipe outside  accuracy {result_of(study, 'outside')['value']:.4f}"]
    found = [(entry.key, entry.trial) for entry in summarize(study).baselines]
    assert found == [("baseline", 0), ("recipe inside", 1), ("recipe outside", None)]
    lines = margins(summarize(study), "accuracy", "maximize")
    assert len(lines) == 4


def test_a_reference_is_trained_once_and_again_when_its_recipe_changes(tmp_path: Path) -> None:
    space = write_space(tmp_path, outside="loss: {smoothing: 0.1}\n")
    study, _ = run(space, 1)
    first = result_of(study, "outside")
    _, lines = run(space, 1)
    assert not lines
    space = write_space(tmp_path, outside="loss: {smoothing: 0.3}\n")
    assert [recipe.name for recipe in pending_recipes(study, space)] == ["outside"]
    run(space, 1)
    assert result_of(study, "outside")["val_loss"] != first["val_loss"]


def test_the_baseline_is_trained_once_for_the_whole_budget_and_stays_out_of_the_confirmation(
    run_hpo: RunHpo, space_file: str
) -> None:
    said, study = run_hpo("run", space_file, "--trials", "2", "--long-baseline"), find_study("own")
    trained = study.paths.reference(LONG_BASELINE)
    result = result_of(study, LONG_BASELINE)
    assert f"the baseline for 4 epochs  accuracy {result['value']:.4f}" in said
    assert load_recipe(trained.config).config.epochs == result["epoch"] == 4
    assert "better than the baseline for 4 epochs, " in said or "than the baseline for 4 epochs, " in said
    assert "the baseline for 4 epochs" in [entry.key for entry in summarize(study).baselines]
    assert not [one.key for one in candidates(study, study.space()) if "4 epochs" in one.key or "long" in one.key]

    before = trained.result.stat().st_mtime_ns
    again = run_hpo("run", space_file, "--trials", "2", "--long-baseline")
    assert "epochs  accuracy" not in again
    assert trained.result.stat().st_mtime_ns == before
    run_hpo("run", space_file, "--trials", "3", "--long-baseline")
    assert result_of(study, LONG_BASELINE)["epoch"] == 6
    section = baselines(read_study_data(find_study("own")))
    assert section is not None
    assert "the baseline for 6 epochs" in section.body.replace("\u00a0", " ")


def test_a_search_of_one_training_has_no_longer_baseline(run_hpo: RunHpo, space_file: str) -> None:
    assert "epochs  accuracy" not in run_hpo("run", space_file, "--trials", "1", "--long-baseline")


def test_a_recipe_that_cannot_be_trained_does_not_stop_the_study(tmp_path: Path) -> None:
    impossible = "model: {widths: [8, 8, 8, 8, 8, 8], blocks: [1, 1, 1, 1, 1, 1]}\n"  # 8×8 images do not shrink so far
    space = write_space(tmp_path)
    (tmp_path / "deep.yaml").write_text(impossible + "epochs: 2\n")
    (tmp_path / "own.yaml").write_text(f"{SPACE}recipes: [deep.yaml]\n")
    space = load_space(tmp_path / "own.yaml")
    study, lines = run(space, 1)
    assert lines[0].startswith("recipe deep  accuracy invalid  (")
    assert result_of(study, "deep")["failure"] == "invalid"
    assert "  recipe deep could not be trained" in margins(summarize(study), "accuracy", "maximize")
    _, lines = run(space, 1)
    assert not lines  # it is not tried again


def test_a_configuration_that_cannot_be_trained_is_pruned_and_counts(tmp_path: Path) -> None:
    space = write_space(tmp_path, more="")
    (tmp_path / "own.yaml").write_text(
        SPACE.replace("widths: [8], blocks: [1]", "widths: [8, 8, 8], blocks: [1, 1, 1]")
        + "  model.stem_stride: {choices: [1, 2]}\n  model.max_pool: {choices: [false, true]}\n"
        "sampler: {name: random}\n"
    )
    space = load_space(tmp_path / "own.yaml")
    study, _ = run(space, 8)
    failed = [trial.user_attrs for trial in study.optuna.get_trials() if FAILURE in trial.user_attrs]
    assert failed
    assert {(attributes[FAILURE], bool(attributes[REASON])) for attributes in failed} == {("invalid", True)}
    assert study.counts().failures == len(failed)
    assert study.counts().finished == 8


def test_only_the_best_few_trials_keep_their_weights(tmp_path: Path) -> None:
    study, _ = run(write_space(tmp_path), 6)
    ranked = sorted(study.optuna.get_trials(), key=lambda trial: (-(trial.value or 0), trial.number))
    kept = {trial.number for trial in ranked if study.paths.trial_model(trial.number).exists()}
    assert kept == {trial.number for trial in ranked[: DEFAULTS.keep]}


def test_a_picture_that_cannot_be_attached_costs_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full_disk(*arguments: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("hpo.dashboard.artifacts.attach", full_disk)
    study, _ = run(write_space(tmp_path), 2)
    assert study.counts().complete == 2
    assert "pictures are missing" in caplog.text
    assert "No space left" in caplog.text


def test_a_fault_of_ours_goes_through_and_the_slot_is_queued_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = write_space(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(hpo.search.loop, "keep_weights", lambda *arguments: (_ for _ in ()).throw(AssertionError("ours")))
        with pytest.raises(AssertionError, match="ours"):
            run(space, 2)
    study, _ = run(space, 2)
    states = [trial.state for trial in study.optuna.get_trials()]
    assert TrialState.RUNNING not in states
    assert study.counts().complete == 2


def test_a_study_whose_graphs_fail_resumes_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound, graphs = core.loop.run.Run.epoch, []

    def epoch(training: core.loop.run.Run, *, final: bool) -> EpochMetrics:
        graphs.append(training.config.precision.cuda_graphs)
        if graphs[-1] and training.history:
            raise GraphError("recording a step failed")
        return sound(training, final=final)

    monkeypatch.setattr(core.loop.run.Run, "epoch", epoch)
    monkeypatch.setattr(core.loop.run, "CHECKPOINT_SHARE", float("inf"))
    space = write_space(tmp_path, outside="loss: {smoothing: 0.1}\n")
    with pytest.raises(GraphError, match=r"^recording a step failed; after a restart, .* resnet without$"):
        run(space, 2)
    study, _ = run(space, 2)
    assert graphs == [True, True] + [False] * 5  # trial 0 resumes after its first epoch
    assert study.counts().complete == 2
    assert not any(CRASHES in trial.user_attrs for trial in study.optuna.trials)
    assert study.config_of(study.optuna.trials[-1]).precision.cuda_graphs
    assert "value" in result_of(study, "outside")


def test_a_checkpoint_of_another_configuration_is_left_and_the_trial_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    space = write_space(tmp_path)
    dataset = load_dataset(space.baseline.data)
    study = open_study(space, name="own", dataset=dataset)
    monkeypatch.setattr(core.loop.run, "CHECKPOINT_SHARE", float("inf"))
    other = space.baseline.override({"loss.smoothing": 0.2})
    train(other, split(dataset, space.baseline.data), device=CPU, checkpoint_to=study.paths.checkpoint(0))
    study, _ = run(space, 1)
    assert study.counts().complete == 1
    assert "starts again from the first epoch" in caplog.text
    assert not study.paths.checkpoint(0).exists()


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (DivergedError("nan"), "diverged"),
        (ConfigError("too deep"), "invalid"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), "oom"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), None),
        (RuntimeError("anything else"), None),
    ],
)
def test_failures_are_told_apart_by_what_is_to_be_learnt_from_them(error: Exception, failure: str | None) -> None:
    assert failure_of(error) == failure


def test_the_estimate_grows_with_trials_and_recipes_and_shrinks_with_pruning(tmp_path: Path) -> None:
    space = load_space("digits", ["epochs=10", "model.widths=[8]", "model.blocks=[1]"])
    splits = folds(load_dataset(space.baseline.data), space.baseline.data)
    found = estimate(space, splits, trials=10, recipes=0, device=CPU)
    assert 0 < found.pruned_s < found.in_full_s
    unpruned = load_space("digits", ["epochs=10", "model.widths=[8]", "model.blocks=[1]", "pruner.name=none"])
    same = estimate(unpruned, splits, trials=10, recipes=0, device=CPU)
    assert same.in_full_s == same.pruned_s == pytest.approx(10 * same.trial_s)


def test_the_lines_of_metrics_are_json_and_one_an_epoch(tmp_path: Path) -> None:
    study, _ = run(write_space(tmp_path), 2)
    for number in (0, 1):
        rows = [json.loads(line) for line in study.paths.trial_metrics(number).read_text().splitlines()]
        assert [row["epoch"] for row in rows] == [1, 2]


def test_a_complete_trial_stores_the_validation_loss_of_its_kept_epoch(tmp_path: Path) -> None:
    study, _ = run(write_space(tmp_path), 1)
    (trial,) = study.optuna.trials
    rows = [json.loads(line) for line in study.paths.trial_metrics(0).read_text().splitlines()]
    assert trial.user_attrs[VAL_LOSS] == rows[-1]["val_loss"]
