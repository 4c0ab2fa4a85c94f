"""A training recorded in a folder, and functions that it shares with trials.

The value of a training with folds is the mean over them. The first fold keeps the configuration's seed.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from optuna.trial import FrozenTrial
from safetensors.torch import save_model
from torch import Tensor

from core import metrics
from core.config import TrainConfig
from core.data import Splits, located
from core.errors import CheckpointError, GraphError
from core.loop import EpochMetrics, TrainResult, train
from core.metrics import confusion, per_class
from core.seeds import derive_seed
from hpo.paths import TrainingPaths
from hpo.search.held_out import half_lives, outputs_of, write_outputs
from hpo.space import to_yaml
from hpo.storage.atomic import exclusive, write_file
from hpo.study.results import json_line, write_result
from hpo.study.settings import StudySettings

logger = logging.getLogger(__name__)

Watch = Callable[[str], Callable[[EpochMetrics], None]]
"""Called before each training with the label of its fold. Returns a function that is called after each epoch."""


@dataclass(frozen=True)
class Recorded:
    """The result of a recorded training."""

    results: tuple[TrainResult, ...]
    """One, or one per fold."""
    values: tuple[float, ...]
    """The metric of each."""
    rows: tuple[dict[str, float | int], ...]
    """The rows of its `metrics.jsonl`."""
    per_class: tuple[dict[str, str | float | int], ...]
    """Scores of each class over the validation images of all folds together."""

    @property
    def value(self) -> float:
        """The mean over the folds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        return spread(self.values)


def train_recorded(
    config: TrainConfig,
    splits: Sequence[Splits],
    paths: TrainingPaths,
    *,
    metric: str,
    device: torch.device,
    watch: Watch,
    settings: StudySettings | None = None,
    evidence: bool = False,
    written: TrainConfig | None = None,
) -> Recorded:
    """Train, and write configuration, checkpoints and, last, the result into the folder.

    Args:
        splits: One, or one per fold.
        metric: The objective, also for early stopping and the choice of the kept epoch.
        settings: Of the study that it belongs to, if any.
        written: Content of `config.yaml`, if it names the images in another way.
        evidence: Whether to keep EMAs beside it and write all outputs on validation images, for the choices of a refit.

    Raises:
        StudyError: Another process trains into the folder.
    """
    with exclusive(paths.lock, f"{paths.dir} is being trained"):
        write_file(paths.config, to_yaml(written or config))
        folds = len(splits)
        results: list[TrainResult] = []
        for fold, divided in enumerate(splits, 1):
            checkpoint = paths.checkpoint(fold)
            own = of_fold(config, fold)
            with nullcontext(own) if settings is None else without_failed_graphs(settings, own) as trained:
                result = train(
                    trained,
                    divided,
                    device=device,
                    on_epoch_end=watch(fold_label(fold, folds)),
                    resume_from=checkpoint,
                    checkpoint_to=checkpoint,
                    checkpoint_at_end=folds > 1,
                    metric=metric,
                    averages=half_lives(own) if evidence else (),
                )
            results.append(result if folds == 1 else on_host(result))  # the next fold needs the device's memory
        recorded = Recorded(
            tuple(results),
            tuple(result.value(metric) for result in results),
            tuple(fold_rows([result.history for result in results], metric)),
            tuple(per_class(validation_confusion(results, splits), splits[0].classes)),
        )
        write_file(paths.metrics, "".join(map(json_line, recorded.rows)))
        for fold, result in enumerate(results, 1):
            save_model(result.model, str(paths.model(fold)))
            if evidence:
                divided = splits[fold - 1]
                write_outputs(paths.validation(fold), result, divided, outputs_of(result, config, divided))
        write_result(paths, _result(recorded, metric))
        for checkpoint in paths.checkpoints(folds):
            checkpoint.unlink(missing_ok=True)
    return recorded


def naming_images(config: TrainConfig, data_path: Path | None) -> TrainConfig:
    """Return the configuration with the path of the user's own images, to be trained again without `--data`."""
    return config.model_copy(update={"data": located(config.data, data_path)})


@contextmanager
def without_failed_graphs(settings: StudySettings, config: TrainConfig) -> Iterator[TrainConfig]:
    """Yield the configuration, with CUDA graphs off if they have failed in this study, and remember if they fail.

    Raises:
        GraphError: They failed in the body. The training resumes from its checkpoint in another process.
    """
    network = config.model.name
    off = settings.trains_without_graphs(network)
    try:
        yield config.override({"precision.cuda_graphs": False}) if off else config
    except GraphError as error:
        settings.train_without_graphs(network)
        raise GraphError(f"{error}; after a restart, the study trains model.name {network} without") from error


def on_host(result: TrainResult) -> TrainResult:
    """Move the networks of a result to host memory."""
    averages = {name: model.cpu() for name, model in result.averages.items()}
    return replace(result, model=result.model.cpu(), averages=averages)


def resume_or_restart(checkpoint: Path, name: str, attempt: Callable[[], TrainResult]) -> TrainResult:
    """Run `attempt`; if its checkpoint cannot be used, warn, delete it and run again."""
    try:
        return attempt()
    except CheckpointError as error:
        logger.warning("%s starts again from the first epoch: %s", name, error)
        checkpoint.unlink()
        return attempt()


def of_fold(config: TrainConfig, fold: int) -> TrainConfig:
    """Return the configuration of a fold, counted from 1: each fold but the first has a seed of its own."""
    return config if fold == 1 else config.override({"seed": derive_seed(config.seed, "fold", fold)})


def fold_label(fold: int, folds: int) -> str:
    """Name a fold: `fold 2 of 5`; empty without folds."""
    return "" if folds == 1 else f"fold {fold} of {folds}"


def trial_label(trial: FrozenTrial, *, epochs: int, folds: int) -> str:
    """Name a running trial and its fold: `trial 3, fold 2 of 5`; `epochs` are those of one fold."""
    fold = min(folds, (trial.last_step or 0) // epochs + 1)
    return ", ".join(filter(None, (f"trial {trial.number}", fold_label(fold, folds))))


def fold_rows(histories: Sequence[Sequence[EpochMetrics]], metric: str) -> list[dict[str, float | int]]:
    """Return the rows of `metrics.jsonl`; with folds each has its fold, and the elapsed time continues over them."""
    if len(histories) == 1:
        return [epoch.row(metric) for epoch in histories[0]]
    rows: list[dict[str, float | int]] = []
    before_s = 0.0
    for fold, history in enumerate(histories, 1):
        rows += [{"fold": fold, **e.row(metric), "elapsed_s": before_s + e.elapsed_s} for e in history]
        before_s += history[-1].elapsed_s if history else 0.0
    return rows


def validation_confusion(results: Sequence[TrainResult], splits: Sequence[Splits]) -> Tensor:
    """Return the confusion matrix (K, K) int64 of the kept networks on their validation images, on the CPU."""
    tables = []
    for result, divided in zip(results, splits, strict=True):
        assert result.val_logits is not None, "a recorded training has validation images"
        tables.append(confusion(result.val_logits, divided.labels[divided.val]).cpu())
    return torch.stack(tables).sum(0)


def standard_error(results: Sequence[TrainResult], splits: Sequence[Splits], metric: str) -> float:
    """Return the standard error of a metric, of several folds of its mean, by the number of validation images."""
    squares = 0.0
    for result, divided in zip(results, splits, strict=True):
        assert result.val_logits is not None, "a recorded training has validation images"
        squares += metrics.standard_error(result.val_logits, divided.labels[divided.val], metric) ** 2
    return math.sqrt(squares) / len(results)


def spread(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation; None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def _result(recorded: Recorded, metric: str) -> dict[str, Any]:
    """The content of `result.json`; with folds the means of the kept epochs, and each of them."""
    kept = [result.kept.row(metric) for result in recorded.results]
    head: dict[str, Any] = {"metric": metric, "value": recorded.value}
    classes = {"per_class": list(recorded.per_class)}
    if len(kept) == 1:
        return {**head, **kept[0], **classes}
    scored = [key for key in kept[0] if key.startswith("val_")]
    means = {key: statistics.fmean(row[key] for row in kept) for key in scored}
    folds = [{"fold": fold, **row} for fold, row in enumerate(kept, 1)]
    return {**head, "spread": recorded.spread, **means, "folds": folds, **classes}
