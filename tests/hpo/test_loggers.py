"""Trials in TensorBoard, MLflow and Weights & Biases, read back through their own packages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hpo
from hpo.errors import HpoError
from hpo.loggers import MLflow, TensorBoard, WandB
from hpo.study import find_study
from tests.hpo.commands import SPACE, RunHpo
from tests.test_docs import ROOT, blocks

PAGE = (ROOT / "docs" / "own-code.md").read_text(encoding="utf-8")


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A search of two epochs a trial, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("space.yaml").write_text(SPACE)
    return "space.yaml"


def test_an_own_network_is_watched_in_tensorboard_from_two_workers(
    own_module: Callable[[str], str], run_hpo: RunHpo
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    name = own_module(blocks(PAGE, "python")[0])
    Path("tiny.yaml").write_text(blocks(PAGE, "yaml")[0].replace("nets:", f"{name}:") + "pruner: {name: none}\n")
    options = ("--set", "epochs=3", "--set", "batch_size=128", "--device", "cpu")
    run_hpo("run", "tiny.yaml", "--trials", "3", "--workers", "2", "--tensorboard", *options)
    study = find_study("tiny")
    for trial in study.optuna.trials:
        events = EventAccumulator(str(study.paths.dir / "tensorboard" / f"{trial.number:05d}")).Reload()
        curve = events.Scalars("val_accuracy")
        assert [point.step for point in curve] == [1, 2, 3]
        assert [point.value for point in curve] == pytest.approx([*trial.intermediate_values.values()])
        assert {"train_loss", "val_loss", "lr"} <= set(events.Tags()["scalars"])
        assert events.Scalars("value")[0].value == pytest.approx(trial.value)
        session = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        assert b"model.kwargs.width" in session
        assert b"model.kwargs.activation" in session


def test_mlflow_has_a_run_for_each_trial(space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = (tmp_path / "mlruns").as_uri()
    study = hpo.run(space, trials=2, device="cpu", quiet=True, callbacks=[MLflow(store)])
    client = MlflowClient(tracking_uri=store)
    [experiment] = client.search_experiments(filter_string="name = 'space'")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"trial 0", "trial 1"}
    for trial in study.optuna.trials:
        run = runs[f"trial {trial.number}"]
        assert run.info.status == "FINISHED"
        assert run.data.params == {name: str(value) for name, value in trial.params.items()}
        assert run.data.metrics["value"] == pytest.approx(trial.value)
        history = client.get_metric_history(run.info.run_id, "val_accuracy")
        assert [point.step for point in history] == [1, 2]
        assert [point.value for point in history] == pytest.approx([*trial.intermediate_values.values()])


def test_weights_and_biases_has_a_run_for_each_trial(
    space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    hpo.run(space, trials=2, device="cpu", quiet=True, callbacks=[WandB(mode="offline", dir=str(tmp_path))])
    written = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(written) == 2
    for number, file in enumerate(written):
        content = file.read_bytes()
        assert f"trial {number}".encode() in content
        assert b"optim.lr_scale" in content
        assert b"val_accuracy" in content


@pytest.mark.parametrize(
    ("logger", "package"), [(TensorBoard, "tensorboard"), (MLflow, "mlflow"), (WandB, "wandb")]
)  # fmt: skip
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, logger: Callable[[], object], package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(HpoError, match=rf"{package} is not installed; pip install 'hpo-vision\[{package}\]'"):
        logger()


def test_tensorboard_without_its_package_is_refused_before_a_study_begins(
    space: str, run_hpo: RunHpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert "tensorboard is not installed" in run_hpo.fails("run", space, "--tensorboard")
    assert not Path("studies").exists()
