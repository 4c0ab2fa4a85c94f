"""One training outside a study, recorded in a folder: what `hpo train` does, and what a study does with its recipes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model

from core.config import TrainConfig
from core.data import Splits
from core.loop import EpochMetrics, TrainResult, train
from hpo.paths import TrainingPaths
from hpo.search_space import to_yaml


def train_recorded(
    config: TrainConfig,
    splits: Splits,
    paths: TrainingPaths,
    *,
    metric: str,
    device: torch.device,
    on_epoch_end: Callable[[EpochMetrics], None],
) -> TrainResult:
    """Trains into the folder: its configuration first, then checkpoints to go on from, and at the end what came of it.

    `metric` names the value that the result is to be judged by. The result file is written last: where it stands, the
    training is over.
    """
    paths.dir.mkdir(parents=True, exist_ok=True)
    paths.config.write_text(to_yaml(config))
    result = train(
        config,
        splits,
        device=device,
        on_epoch_end=on_epoch_end,
        resume_from=paths.checkpoint,
        checkpoint_to=paths.checkpoint,
        metric=metric,
    )
    paths.metrics.write_text("".join(json_line(epoch.row(metric)) for epoch in result.history))
    save_model(result.model, str(paths.model))
    write_result(paths, {"metric": metric, "value": result.value(metric), **result.kept.row(metric)})
    paths.checkpoint.unlink(missing_ok=True)
    return result


def write_result(paths: TrainingPaths, result: dict[str, Any]) -> None:
    """Says what came of a training, whole or not at all: `value`, or `failure` where it could not be trained."""
    temporary = paths.result.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    temporary.replace(paths.result)


def read_result(paths: TrainingPaths) -> dict[str, Any] | None:
    """What came of a training; None where it is not over."""
    if not paths.result.exists():
        return None
    result: dict[str, Any] = json.loads(paths.result.read_text())
    return result


def json_line(row: dict[str, Any]) -> str:
    """One JSON object as a line."""
    return json.dumps(row) + "\n"


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Appends one JSON object as a line."""
    with path.open("a") as file:
        file.write(json_line(row))
