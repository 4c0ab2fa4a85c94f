"""What a report says is taken from here: a study as it stands, read once, with what its folder holds beside it.

A trial here is what stands for a slot of the study's total (`hpo.trials`): attempts that were cut off are not in it, so
that every figure and every count speaks of the same trials. The test set is never opened for a report: its numbers are
those that a refit wrote down.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from core.errors import CoreError
from hpo import text
from hpo.confirmation.result import Confirmation, is_current, read_confirmation
from hpo.confirmation.statistics import Interval
from hpo.paths import cache_root, data_root
from hpo.space import SearchSpace, space_from_yaml
from hpo.space.pruner import RungPruner, build_pruner
from hpo.storage.optuna_access import storage_of
from hpo.study import Study
from hpo.text import score
from hpo.trials import FAILURE, RECIPE, effective_trials, is_baseline, trial_index_of

if TYPE_CHECKING:
    from core.data import Dataset

METRIC_WORDS = {**text.METRIC_WORDS, "nll": f"{text.METRIC_WORDS['nll']} (nats)"}
"""A metric's name on an axis; shares of one have no unit."""


@dataclass(frozen=True)
class Facts:
    """A study as it stands. Made by `gather`."""

    study: Study
    space: SearchSpace | None
    """None where the study does not hold its space, as those of older versions."""
    trials: tuple[FrozenTrial, ...]
    """One a slot, by slot. Not copies: do not change them."""
    confirmation: Confirmation | None
    references: Mapping[str, dict[str, Any]]
    """The recipes that were trained beside the study, by name: their `result.json`, which has `failure` in place of
    `value` where one could not be trained."""
    refits: Mapping[str, dict[str, Any]]
    """The submission models, by label: their `metrics.json`."""
    data: Path | None = None
    """Where the images are, in place of where the study had them."""
    notes: list[str] = field(default_factory=list)
    """What could not be shown and why, a sentence each. Whoever leaves something out adds to it."""

    # How it is judged

    @property
    def metric(self) -> str:
        """The objective, as the metrics' own columns name it: `accuracy`, `macro_f1`, …"""
        return self.study.metric

    @property
    def metric_words(self) -> str:
        """The objective's name on an axis, with its unit where it has one."""
        return METRIC_WORDS.get(self.metric, self.metric)

    @property
    def maximize(self) -> bool:
        return self.study.direction == "maximize"

    def gain(self, value: float, over: float) -> float:
        """By how much a value is better than another: positive is better, whatever the direction."""
        return value - over if self.maximize else over - value

    # Its trials

    @cached_property
    def complete(self) -> tuple[FrozenTrial, ...]:
        return self._of(TrialState.COMPLETE)

    @cached_property
    def pruned(self) -> tuple[FrozenTrial, ...]:
        """By the pruner."""
        return tuple(trial for trial in self._of(TrialState.PRUNED) if FAILURE not in trial.user_attrs)

    @cached_property
    def failed(self) -> tuple[FrozenTrial, ...]:
        """Those that could not be trained to their end: `trial.user_attrs[FAILURE]` says why."""
        return tuple(trial for trial in self._of(TrialState.PRUNED) if FAILURE in trial.user_attrs)

    @cached_property
    def running(self) -> tuple[FrozenTrial, ...]:
        return self._of(TrialState.RUNNING)

    @cached_property
    def waiting(self) -> tuple[FrozenTrial, ...]:
        return self._of(TrialState.WAITING)

    @property
    def finished(self) -> int:
        """What counts towards the total."""
        return len(self.complete) + len(self.pruned) + len(self.failed)

    @property
    def unfinished(self) -> int:
        """How many trials are missing to the total; of trials that wait beyond it none."""
        return max(0, (self.study.total or 0) - self.finished)

    @cached_property
    def best(self) -> FrozenTrial | None:
        """The complete trial with the best value, of equals the first; None before any is complete."""
        sign = -1.0 if self.maximize else 1.0
        return min(self.complete, key=lambda trial: (sign * value_of(trial), trial_index_of(trial)), default=None)

    @cached_property
    def baseline(self) -> FrozenTrial | None:
        """The trial that trains the space's base, whatever its state."""
        return next((trial for trial in self.trials if is_baseline(trial)), None)

    def epochs(self, trial: FrozenTrial) -> int:
        """How many epochs the trial has trained so far, in all folds."""
        return int(trial.user_attrs.get("epochs", len(trial.intermediate_values)))

    def elapsed_s(self, trial: FrozenTrial) -> float:
        """How long the trial has trained; its lines of `metrics.jsonl` say it of a trial that runs."""
        if "elapsed_s" in trial.user_attrs:
            return float(trial.user_attrs["elapsed_s"])
        rows = self.rows(trial.number)
        return float(rows[-1]["elapsed_s"]) if rows else 0.0

    @cached_property
    def devices(self) -> tuple[str, ...]:
        """What the trials were trained on, the most frequent first."""
        named = [str(trial.user_attrs["device"]) for trial in self.trials if "device" in trial.user_attrs]
        return tuple(sorted(set(named), key=lambda name: (-named.count(name), name)))

    def rows(self, number: int) -> list[dict[str, Any]]:
        """The lines of the trial's `metrics.jsonl`; none where another machine has the file."""
        file = self.study.paths.trial_metrics(number)
        if not file.exists():
            return []
        # A trial that runs may be writing its last line.
        return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def _of(self, state: TrialState) -> tuple[FrozenTrial, ...]:
        return tuple(trial for trial in self.trials if trial.state == state)

    # How they were run

    @property
    def run_epochs(self) -> int:
        """The epochs of a trial in full, of one fold."""
        return int(self.study.metadata["base"]["epochs"])

    @property
    def folds(self) -> int:
        """The trainings of a trial: 1 without folds."""
        return int(self.study.metadata["base"]["data"].get("folds") or 1)

    @property
    def steps(self) -> int:
        """The epochs of a trial in full, of all folds one after the other: the last step that Optuna is told."""
        return self.run_epochs * self.folds

    @cached_property
    def rungs(self) -> dict[int, float]:
        """Epoch, over all folds -> the share that survives it; empty with another pruner than the rungs'."""
        if self.space is None:
            return {}
        pruner = build_pruner(self.space.pruner, self.run_epochs, self.folds)
        return dict(pruner.keeps) if isinstance(pruner, RungPruner) else {}

    @cached_property
    def confirmed(self) -> bool:
        """Whether there is a confirmation, made of all trials that are finished now."""
        return self.confirmation is not None and is_current(self.confirmation, self.finished)

    @cached_property
    def still(self) -> optuna.Study:
        """The study for Optuna's own functions, with these very trials, whatever is trained meanwhile."""
        return _Still(self.study.optuna, self.trials)

    # Its images

    def dataset(self) -> Dataset | None:
        """The study's images, loaded on first use; None where they cannot be: `dataset_missing` says why."""
        return self._loaded[0]

    @property
    def dataset_missing(self) -> str:
        """Why there are no images, in one line; empty where there are."""
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
                data_path=self.data or study.data_path,
                data_root=data_root(),
                cache_dir=cache_root(),
                skip_broken=study.skip_broken,
            )
            study.check_data(dataset)
        except (CoreError, HpoError, OSError) as error:
            return None, str(error).partition("\n")[0]
        return dataset, ""


class _Still(optuna.Study):
    """A study that shows the trials that it was given."""

    def __init__(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
        super().__init__(study.study_name, storage_of(study))
        self._shown = sorted(trials, key=lambda trial: trial.number)

    def get_trials(
        self,
        deepcopy: bool = True,  # noqa: ARG002  (Optuna's signature)
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """The trials, by number; never copies."""
        return [trial for trial in self._shown if states is None or trial.state in states]


def value_of(trial: FrozenTrial) -> float:
    """A complete trial's value."""
    assert trial.value is not None, "a complete trial has a value"
    return trial.value


def name_of(trial: FrozenTrial) -> str:
    """What a trial is called: `trial 12`, and what else it is."""
    more = ["the base"] if is_baseline(trial) else []
    more += [f"recipe {trial.user_attrs[RECIPE]}"] if RECIPE in trial.user_attrs else []
    return f"trial {trial.number}" + (f" ({', '.join(more)})" if more else "")


def interval_words(interval: Interval) -> str:
    """A confirmed score in a cell of a table: `0.9123 ± 0.0041`; of one replicate without what it has not."""
    spread = f" ± {interval.half_width:.4f}" if math.isfinite(interval.half_width) else ""
    return f"{score(interval.mean)}{spread}"


def gather(study: Study, *, data: Path | None = None) -> Facts:
    """Reads all that a report says of the study, but its images and its trials' epochs, which wait for their use.

    Args:
        data: where the images are, in place of where the study had them.
    """
    from hpo.study.results import read_result
    from hpo.submission.bundle import METRICS

    paths = study.paths
    results = {reference.dir.name: read_result(reference) for reference in paths.references()}
    refits = {
        file.parent.name: json.loads(file.read_text())
        for file in sorted(paths.refit("best").parent.glob(f"[!.]*/{METRICS}"))
    }
    trial_indices = effective_trials(study.optuna.get_trials(deepcopy=False))
    return Facts(
        study=study,
        space=_space_of(study),
        trials=tuple(trial_indices[trial_index] for trial_index in sorted(trial_indices)),
        confirmation=read_confirmation(paths.confirmation),
        references={name: result for name, result in results.items() if result is not None},
        refits=refits,
        data=data,
    )


def _space_of(study: Study) -> SearchSpace | None:
    """The space, as the study holds it for workers that join."""
    text = study.optuna.user_attrs.get("space")
    return None if text is None else space_from_yaml(text, study.space_name)
