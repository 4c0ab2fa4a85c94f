"""The data of a study that its report is made of, read once: trials, confirmation, baselines and submission models.

Only effective trials (`hpo.trials.effective_trials`) are included, so that all figures and counts are of the same
trials. The test set is never opened: its scores are those recorded by the refits.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from core.errors import CoreError
from hpo.confirmation.result import Confirmation, is_current, read_confirmation
from hpo.paths import cache_root, data_root
from hpo.space import SearchSpace, space_from_yaml
from hpo.space.pruner import RungPruner, build_pruner
from hpo.storage.optuna_access import storage_of
from hpo.study import Study
from hpo.trials import FAILURE, effective_trials, is_baseline, trial_index_of

if TYPE_CHECKING:
    from core.data import Dataset


@dataclass(frozen=True)
class StudyData:
    """A study at one moment. Made by `read_study_data`."""

    study: Study
    space: SearchSpace | None
    """None for studies of versions that did not store it."""
    trials: tuple[FrozenTrial, ...]
    """The effective trials, by index. Not copies: do not change them."""
    confirmation: Confirmation | None
    recipe_runs: Mapping[str, dict[str, Any]]
    """The recipes trained beside the study, by name: their `result.json`, with `failure` or `value`."""
    refits: Mapping[str, dict[str, Any]]
    """The submission models, by label: their `metrics.json`."""
    images_path: Path | None = None
    """Where the images are; None for the path that the study used."""
    notes: list[str] = field(default_factory=list)
    """What could not be shown and why, a sentence each. Sections append to it."""

    @property
    def metric(self) -> str:
        """The objective, a key of `core.metrics.METRICS`."""
        return self.study.metric

    @property
    def maximize(self) -> bool:
        """Whether larger values are better."""
        return self.study.direction == "maximize"

    def gain(self, value: float, over: float) -> float:
        """By how much a value is better than another: positive is better in both directions."""
        return value - over if self.maximize else over - value

    # Trials

    @cached_property
    def complete(self) -> tuple[FrozenTrial, ...]:
        """Trials trained to the end."""
        return self._of(TrialState.COMPLETE)

    @cached_property
    def pruned(self) -> tuple[FrozenTrial, ...]:
        """Trials stopped by the pruner."""
        return tuple(trial for trial in self._of(TrialState.PRUNED) if FAILURE not in trial.user_attrs)

    @cached_property
    def failed(self) -> tuple[FrozenTrial, ...]:
        """Trials that could not be trained; `trial.user_attrs[FAILURE]` is the cause."""
        return tuple(trial for trial in self._of(TrialState.PRUNED) if FAILURE in trial.user_attrs)

    @cached_property
    def running(self) -> tuple[FrozenTrial, ...]:
        """Trials in training."""
        return self._of(TrialState.RUNNING)

    @cached_property
    def waiting(self) -> tuple[FrozenTrial, ...]:
        """Trials in the queue."""
        return self._of(TrialState.WAITING)

    @property
    def finished(self) -> int:
        """The number of trials that count towards the total."""
        return len(self.complete) + len(self.pruned) + len(self.failed)

    @property
    def unfinished(self) -> int:
        """The number of trials missing to the total."""
        return max(0, (self.study.total or 0) - self.finished)

    @cached_property
    def best(self) -> FrozenTrial | None:
        """The complete trial with the best value, the first of equal ones."""
        sign = -1.0 if self.maximize else 1.0
        return min(self.complete, key=lambda trial: (sign * value_of(trial), trial_index_of(trial)), default=None)

    @cached_property
    def baseline(self) -> FrozenTrial | None:
        """The trial of the baseline configuration, in any state."""
        return next((trial for trial in self.trials if is_baseline(trial)), None)

    @property
    def best_gain(self) -> float | None:
        """By how much the best trial is better than the baseline; None if one of them has no value."""
        if self.best is None or self.baseline is None or self.baseline not in self.complete:
            return None
        return self.gain(value_of(self.best), value_of(self.baseline))

    def epochs(self, trial: FrozenTrial) -> int:
        """The number of epochs that the trial has trained, in all folds."""
        return int(trial.user_attrs.get("epochs", len(trial.intermediate_values)))

    def elapsed_s(self, trial: FrozenTrial) -> float:
        """Training time in seconds; of a running trial, from its `metrics.jsonl`."""
        if "elapsed_s" in trial.user_attrs:
            return float(trial.user_attrs["elapsed_s"])
        rows = self.rows(trial.number)
        return float(rows[-1]["elapsed_s"]) if rows else 0.0

    @cached_property
    def devices(self) -> tuple[str, ...]:
        """The devices of the trials, the most frequent first."""
        named = [str(trial.user_attrs["device"]) for trial in self.trials if "device" in trial.user_attrs]
        return tuple(sorted(set(named), key=lambda name: (-named.count(name), name)))

    def rows(self, number: int) -> list[dict[str, Any]]:
        """The lines of the trial's `metrics.jsonl`; empty if the file is on another machine."""
        return read_rows(self.study.paths.trial_metrics(number))

    def _of(self, state: TrialState) -> tuple[FrozenTrial, ...]:
        return tuple(trial for trial in self.trials if trial.state == state)

    # Training

    @property
    def run_epochs(self) -> int:
        """The epochs of one fold of a full trial."""
        return int(self.study.metadata["base"]["epochs"])

    @property
    def folds(self) -> int:
        """The trainings of a trial: 1 without folds."""
        return int(self.study.metadata["base"]["data"].get("folds") or 1)

    @property
    def steps(self) -> int:
        """The epochs of a full trial in all folds, which is the last step reported to Optuna."""
        return self.run_epochs * self.folds

    @cached_property
    def rungs(self) -> dict[int, float]:
        """Step of each rung -> fraction of trials that survive it; empty with other pruners."""
        if self.space is None:
            return {}
        pruner = build_pruner(self.space.pruner, self.run_epochs, self.folds)
        return dict(pruner.keeps) if isinstance(pruner, RungPruner) else {}

    @cached_property
    def confirmed(self) -> bool:
        """Whether there is a confirmation that included all finished trials."""
        return self.confirmation is not None and is_current(self.confirmation, self.finished)

    @cached_property
    def snapshot(self) -> optuna.Study:
        """The Optuna study with exactly these trials, even while others are being trained."""
        return _Snapshot(self.study.optuna, self.trials)

    # Images

    @property
    def dataset(self) -> Dataset | None:
        """The images, loaded on first use; None if they cannot be loaded, with the cause in `dataset_error`."""
        return self._loaded[0]

    @property
    def dataset_error(self) -> str:
        """Why the images could not be loaded, in one line."""
        return self._loaded[1]

    @cached_property
    def _loaded(self) -> tuple[Dataset | None, str]:
        from core.config import TrainConfig
        from core.data import load_dataset
        from hpo.errors import HpoError

        study = self.study
        config = TrainConfig.model_validate_json(json.dumps(study.metadata["base"])).data
        try:
            dataset = load_dataset(
                config,
                data_path=self.images_path or study.data_path,
                data_root=data_root(),
                cache_dir=cache_root(),
                skip_broken=study.skip_broken,
            )
            study.check_data(dataset)
        except (CoreError, HpoError, OSError) as error:
            return None, str(error).partition("\n")[0]
        return dataset, ""


class _Snapshot(optuna.Study):
    """A study whose trials do not change."""

    def __init__(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
        super().__init__(study.study_name, storage_of(study))
        self._frozen = sorted(trials, key=lambda trial: trial.number)

    def get_trials(
        self,
        deepcopy: bool = True,  # noqa: ARG002  (Optuna's signature)
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """Return the trials by number, never copies."""
        return [trial for trial in self._frozen if states is None or trial.state in states]


def value_of(trial: FrozenTrial) -> float:
    """Return the value of a complete trial."""
    assert trial.value is not None, "a complete trial has a value"
    return trial.value


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a `metrics.jsonl`; the last one may be being written. Empty if there is no file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_study_data(study: Study, *, images_path: Path | None = None) -> StudyData:
    """Read a study's data; images and rows of epochs are read when they are used.

    Args:
        study: a search.
        images_path: where the images are; None for the path that the study used.
    """
    from hpo.study.results import read_result
    from hpo.submission.bundle import METRICS

    paths = study.paths
    results = {reference.dir.name: read_result(reference) for reference in paths.references()}
    refits = {
        file.parent.name: json.loads(file.read_text())
        for file in sorted(paths.refit("best").parent.glob(f"[!.]*/{METRICS}"))
    }
    space = study.optuna.user_attrs.get("space")
    trials = effective_trials(study.optuna.get_trials(deepcopy=False))
    return StudyData(
        study=study,
        space=None if space is None else space_from_yaml(space, study.space_name),
        trials=tuple(trials[trial_index] for trial_index in sorted(trials)),
        confirmation=read_confirmation(paths.confirmation),
        recipe_runs={name: result for name, result in results.items() if result is not None},
        refits=refits,
        images_path=images_path,
    )
