"""The data of a study's report, read once: effective trials, confirmation, baselines and submission models.

The test set is never opened: its scores are those recorded by the refits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
from hpo.space.pruner import build_pruner, keeps_of
from hpo.study import Study
from hpo.study.results import read_recipe_runs, read_rows
from hpo.trials import FAILURE, best_first, effective_trials, is_baseline, is_paused

if TYPE_CHECKING:
    from core.data import Dataset


@dataclass(frozen=True)
class StudyData:
    """A study at one moment. Made by `read_study_data`."""

    study: Study
    space: SearchSpace | None
    """None for studies of versions that did not store it."""
    trials: tuple[FrozenTrial, ...]
    """The effective trials (`hpo.trials.effective_trials`), by index. Not copies: do not change them."""
    confirmation: Confirmation | None
    recipe_runs: Mapping[str, dict[str, Any]]
    """The recipes trained beside the study, by name: their `result.json`, with `failure` or `value`."""
    refits: Mapping[str, dict[str, Any]]
    """The submission models, by label: their `metrics.json`."""
    images_path: Path | None = None
    """Folder of the images; None for the path that the study used."""
    notes: list[str] = field(default_factory=list)
    """Missing parts with the reason, a sentence each. Sections append to it."""

    @property
    def metric(self) -> str:
        return self.study.metric

    @property
    def maximize(self) -> bool:
        return self.study.direction == "maximize"

    def gain(self, value: float, over: float) -> float:
        """Improvement of a value over another, positive in both directions."""
        return value - over if self.maximize else over - value

    # Trials

    @cached_property
    def complete(self) -> tuple[FrozenTrial, ...]:
        return self._of(TrialState.COMPLETE)

    @cached_property
    def pruned(self) -> tuple[FrozenTrial, ...]:
        return tuple(trial for trial in self._of(TrialState.PRUNED) if FAILURE not in trial.user_attrs)

    @cached_property
    def failed(self) -> tuple[FrozenTrial, ...]:
        """Trials that could not be trained; `trial.user_attrs[FAILURE]` is the cause."""
        return tuple(trial for trial in self._of(TrialState.PRUNED) if FAILURE in trial.user_attrs)

    @cached_property
    def running(self) -> tuple[FrozenTrial, ...]:
        return self._of(TrialState.RUNNING)

    @cached_property
    def waiting(self) -> tuple[FrozenTrial, ...]:
        """The trials that have not begun."""
        return tuple(trial for trial in self._of(TrialState.WAITING) if not is_paused(trial))

    @cached_property
    def paused(self) -> tuple[FrozenTrial, ...]:
        """The trials that wait at a rung to be promoted."""
        return tuple(filter(is_paused, self.trials))

    @cached_property
    def states(self) -> dict[str, tuple[FrozenTrial, ...]]:
        """The trials that have begun, by state."""
        return {
            "complete": self.complete,
            "pruned": self.pruned,
            "failed": self.failed,
            "paused": self.paused,
            "running": self.running,
        }

    @property
    def finished(self) -> int:
        return len(self.complete) + len(self.pruned) + len(self.failed)

    @property
    def unfinished(self) -> int:
        """The number of trials missing to the total."""
        return max(0, (self.study.total or 0) - self.finished)

    @cached_property
    def best(self) -> FrozenTrial | None:
        """The complete trial with the best value; see `best_first` for equals."""
        return min(self.complete, key=lambda trial: best_first(trial, self.study.sign), default=None)

    @cached_property
    def baseline(self) -> FrozenTrial | None:
        return next((trial for trial in self.trials if is_baseline(trial)), None)

    @property
    def best_gain(self) -> float | None:
        """Gain over the baseline; None if either has no value."""
        if self.best is None or self.baseline is None or self.baseline not in self.complete:
            return None
        return self.gain(value_of(self.best), value_of(self.baseline))

    def epochs(self, trial: FrozenTrial) -> int:
        """Epochs trained in all folds."""
        return int(trial.user_attrs.get("epochs", len(trial.intermediate_values)))

    def elapsed_s(self, trial: FrozenTrial) -> float:
        """Training time in seconds; of a running trial, from its `metrics.jsonl`."""
        if "elapsed_s" in trial.user_attrs:
            return float(trial.user_attrs["elapsed_s"])
        rows = read_rows(self.study.paths.trial_metrics(trial.number))
        return float(rows[-1]["elapsed_s"]) if rows else 0.0

    @cached_property
    def devices(self) -> tuple[str, ...]:
        named = [str(trial.user_attrs["device"]) for trial in self.trials if "device" in trial.user_attrs]
        return tuple(sorted(set(named), key=lambda name: (-named.count(name), name)))

    def _of(self, state: TrialState) -> tuple[FrozenTrial, ...]:
        return tuple(trial for trial in self.trials if trial.state == state)

    # Training

    @property
    def run_epochs(self) -> int:
        """The epochs of one fold of a full trial."""
        return fold_steps(self.study)[0]

    @property
    def folds(self) -> int:
        """The trainings of a trial: 1 without folds."""
        return fold_steps(self.study)[1]

    @property
    def steps(self) -> int:
        """The epochs of a full trial in all folds."""
        return self.run_epochs * self.folds

    @cached_property
    def rungs(self) -> dict[int, float]:
        """Step -> surviving fraction; empty with other pruners."""
        if self.space is None:
            return {}
        return keeps_of(build_pruner(self.space.pruner, self.run_epochs, self.folds), len(self.trials))

    @cached_property
    def confirmed(self) -> bool:
        """Whether there is a confirmation that included all finished trials."""
        return self.confirmation is not None and is_current(self.confirmation, self.finished)

    @cached_property
    def snapshot(self) -> optuna.Study:
        """The complete trials as a study in memory, for Optuna's figures."""
        snapshot = optuna.create_study(direction=self.study.optuna.direction)
        snapshot.add_trials(self.complete)
        return snapshot

    # Images

    @property
    def dataset(self) -> Dataset | None:
        """The images, loaded on first use; None with `dataset_error` if that fails."""
        return self._loaded[0]

    @property
    def dataset_error(self) -> str:
        return self._loaded[1]

    @cached_property
    def _loaded(self) -> tuple[Dataset | None, str]:
        from hpo.errors import HpoError

        try:
            dataset = load_images(self.study, self.images_path)
            self.study.check_data(dataset)
        except (CoreError, HpoError, OSError) as error:
            return None, str(error).partition("\n")[0]
        return dataset, ""


def load_images(study: Study, path: Path | None = None, *, download: bool = True) -> Dataset:
    """Load a study's images, by default from where it found them; CoreError if they cannot be read."""
    from core.config import TrainConfig
    from core.data import load_dataset

    return load_dataset(
        TrainConfig.model_validate_json(json.dumps(study.metadata["base"])).data,
        data_path=path or study.data_path,
        data_root=data_root(),
        cache_dir=cache_root(),
        skip_broken=study.skip_broken,
        download=download,
    )


def value_of(trial: FrozenTrial) -> float:
    """Return the value of a complete trial."""
    assert trial.value is not None, "a complete trial has a value"
    return trial.value


def fold_steps(study: Study) -> tuple[int, int]:
    """Return the epochs of a fold, and the number of folds; 1 without folds."""
    base = study.metadata["base"]
    return int(base["epochs"]), int(base["data"].get("folds") or 1)


def read_study_data(study: Study, *, images_path: Path | None = None) -> StudyData:
    """Read a search. Images, in `images_path` if they were moved, are read on first use."""
    from hpo.submission.bundle import METRICS

    paths = study.paths
    refits = {
        file.parent.name: json.loads(file.read_text())
        for file in sorted(paths.refit("best").parent.glob(f"[!.]*/{METRICS}"))
    }
    space = study.settings.space
    trials = effective_trials(study.optuna.get_trials(deepcopy=False))
    return StudyData(
        study=study,
        space=None if space is None else space_from_yaml(space, study.space_name),
        trials=tuple(trials[trial_index] for trial_index in sorted(trials)),
        confirmation=read_confirmation(paths.confirmation),
        recipe_runs=read_recipe_runs(study.paths),
        refits=refits,
        images_path=images_path,
    )
