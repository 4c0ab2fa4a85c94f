"""Callbacks that send finished trials to TensorBoard, MLflow or Weights & Biases, through their own packages.

Each is called with Optuna's study and a finished trial, as `hpo.run(callbacks=[...])` calls them. It logs the trial's
parameters, the columns of its `metrics.jsonl` over the epochs, its state and its value.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from hpo.errors import HpoError
from hpo.paths import StudyPaths
from hpo.study.results import read_rows
from hpo.trials import FAILURE

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

Callback: TypeAlias = "Callable[[optuna.Study, FrozenTrial], None]"
"""Called after each trial with Optuna's study and the finished trial, like a callback of Optuna."""


class TensorBoard:
    """Writes event files, a folder for each trial, with the trials' parameters in the tab HPARAMS.

    Args:
        folder: Where to write; by default `tensorboard/` in the study's folder.

    Raises:
        HpoError: The package tensorboard is not installed.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        _imported("tensorboard")
        self._folder = None if folder is None else Path(folder).expanduser()

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Write the files of a trial."""
        tensorboard: Any = importlib.import_module("torch.utils.tensorboard")
        top = self._folder or StudyPaths.of(study.study_name).dir / "tensorboard"
        with tensorboard.SummaryWriter(str(top / f"{trial.number:05d}")) as writer:
            for step, row in _curve(study, trial):
                for name, value in row.items():
                    writer.add_scalar(name, value, step)
            shown = {name: _plain(value) for name, value in {"state": _state(trial), **trial.params}.items()}
            writer.add_hparams(shown, _value(trial), run_name=".")


class MLflow:
    """Logs each trial as a run of an experiment.

    Args:
        tracking_uri: MLflow's server or file store; by default `MLFLOW_TRACKING_URI`, or MLflow's own default.
        experiment: Its name; by default the study's.

    Raises:
        HpoError: The package mlflow is not installed.
    """

    def __init__(self, tracking_uri: str | None = None, experiment: str | None = None) -> None:
        _imported("mlflow")
        self._uri, self._experiment = tracking_uri, experiment

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Log a trial as a run."""
        entities, client = _imported("mlflow.entities"), _imported("mlflow").MlflowClient(tracking_uri=self._uri)
        name = self._experiment or study.study_name
        found = client.get_experiment_by_name(name)
        experiment = client.create_experiment(name) if found is None else found.experiment_id
        began, ended = (_milliseconds(time) for time in (trial.datetime_start, trial.datetime_complete))
        run = client.create_run(experiment, start_time=began, run_name=f"trial {trial.number}")
        identifier = run.info.run_id
        metrics = [entities.Metric(name, value, ended, 0) for name, value in _value(trial).items()]
        for step, row in _curve(study, trial):
            metrics += [entities.Metric(name, value, ended, step) for name, value in row.items()]
        params = [entities.Param(name, str(value)) for name, value in trial.params.items()]
        for start in range(0, max(len(metrics), len(params)), _BATCH):
            part = slice(start, start + _BATCH)
            client.log_batch(identifier, metrics=metrics[part], params=params[part])
        client.set_tag(identifier, "state", _state(trial))
        client.set_terminated(identifier, "FINISHED", ended)


class WandB:
    """Logs each trial as a run of a Weights & Biases project.

    Args:
        project: Its name; by default the study's.
        arguments: Further arguments of `wandb.init`, such as `entity` or `mode="offline"`.

    Raises:
        HpoError: The package wandb is not installed.
    """

    def __init__(self, project: str | None = None, **arguments: Any) -> None:
        _imported("wandb")
        self._project, self._arguments = project, arguments

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Log a trial as a run."""
        run = _imported("wandb").init(
            project=self._project or study.study_name,
            group=study.study_name,
            name=f"trial {trial.number}",
            config=dict(trial.params),
            **self._arguments,
        )
        try:
            for step, row in _curve(study, trial):
                run.log(row, step=step)
            run.summary.update({**_value(trial), "state": _state(trial)})
        finally:
            run.finish()


_BATCH = 100  # MLflow accepts 1,000 metrics and 100 parameters in one request


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise HpoError(f"{package} is not installed; pip install 'hpo-vision[{package}]'") from error


def _curve(study: optuna.Study, trial: FrozenTrial) -> list[tuple[int, dict[str, float]]]:
    """The columns of `metrics.jsonl` by epoch, counted over all folds; without the file, the reported scores."""
    rows = read_rows(StudyPaths.of(study.study_name).trial_metrics(trial.number))
    if not rows:
        return [(step, {"score": value}) for step, value in sorted(trial.intermediate_values.items())]
    left_out = ("epoch", "fold")
    return [
        (step, {name: float(value) for name, value in row.items() if name not in left_out and value is not None})
        for step, row in enumerate(rows, 1)
    ]


def _value(trial: FrozenTrial) -> dict[str, float]:
    return {} if trial.value is None else {"value": trial.value}


def _state(trial: FrozenTrial) -> str:
    return str(trial.user_attrs.get(FAILURE, trial.state.name.lower()))


def _plain(value: Any) -> str | float | bool:
    return value if isinstance(value, str | int | float | bool) else json.dumps(value)


def _milliseconds(time: datetime | None) -> int:
    return int((time or datetime.now(UTC)).timestamp() * 1000)
