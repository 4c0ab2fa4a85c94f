"""Train a trial again, alone, and compare it with the original by epoch.

On a CPU the result is bit for bit the same with the same number of torch threads.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from optuna.trial import FrozenTrial, TrialState

from core.config import TrainConfig
from core.data import Dataset
from core.runtime import describe_device
from hpo.errors import StudyError
from hpo.search.training import Recorded
from hpo.storage.lease import LEASE, host
from hpo.study import Study, find_study
from hpo.study.versions import versions
from hpo.trials import FAILURE

# Columns of `metrics.jsonl` that depend on the machine and not on the training.
_TIMES = ("images_per_s", "elapsed_s")
# Packages that determine the numbers of a training.
_NUMERIC = ("torch", "torchvision", "timm", "numpy")


@dataclass(frozen=True)
class Replay:
    """A finished trial, as it was trained."""

    study: Study
    trial: FrozenTrial
    config: TrainConfig
    """Including its seed."""

    @property
    def name(self) -> str:
        return f"{self.study.name}-trial-{self.trial.number:05d}"

    @property
    def was(self) -> str:
        trial, study = self.trial, self.study
        if FAILURE in trial.user_attrs:
            return str(trial.user_attrs[FAILURE])
        epochs = len(trial.intermediate_values)
        if trial.state == TrialState.COMPLETE:
            return f"complete, {study.metric} {trial.value:.4f}"
        ended = "pruned" if trial.state == TrialState.PRUNED else "cut off"
        return f"{ended} after {epochs} of {self.config.epochs * (self.config.data.folds or 1)} epochs"

    def check(self, dataset: Dataset) -> None:
        """Raise StudyError unless images and pretrained weights are the trial's."""
        self.study.check_data(dataset)
        self.study.check_sources(self.config)

    @contextmanager
    def threads(self) -> Iterator[None]:
        """Use as many torch threads as the trial, if known."""
        before = torch.get_num_threads()
        torch.set_num_threads(int(self.trial.user_attrs.get("torch_threads", before)))
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def verdict(self, recorded: Recorded, device: torch.device) -> str:
        """Compare the trial's epochs with a training's, in one sentence."""
        trial = f"trial {self.trial.number}"
        pairs = self._pairs(recorded)
        if not pairs:
            return f"{trial} has no epoch to compare with"
        for place, here, there in pairs:
            for key in here:
                # As JSON, so that values compare bit for bit and NaN equals itself.
                if key not in _TIMES and json.dumps(here[key]) != json.dumps(there.get(key)):
                    return (
                        f"{trial} differs from {place} on: {key} {here[key]!r} against {there.get(key)!r} "
                        f"({self._apart(device)})"
                    )
        return f"the {len(pairs)} epochs of {trial} are reproduced bit for bit"

    def _pairs(self, recorded: Recorded) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
        """(name, values here, values in the trial) of each epoch that both have."""
        file = self.study.paths.trial_metrics(self.trial.number)
        if file.exists():
            lines = file.read_text().rpartition("\n")[0].splitlines()  # a killed process may have cut the last line off
            if lines:
                there = [json.loads(line) for line in lines]
                return [(_place(row), dict(row), was) for row, was in zip(recorded.rows, there, strict=False)]
        reported = self.trial.intermediate_values  # the trial's folder is on another machine
        here = _reports(recorded, self.study.metric, self.config.epochs)
        return [
            (f"step {step}", {self.study.metric: here[step]}, {self.study.metric: reported[step]})
            for step in sorted(reported.keys() & here.keys())
        ]

    def _apart(self, device: torch.device) -> str:
        known: dict[str, Any] = self.study.metadata.get("versions", {})
        now = versions()
        attributes = self.trial.user_attrs
        words = [f"{p} {now.get(p)} here, {known[p]} there" for p in _NUMERIC if p in known and known[p] != now.get(p)]
        if "device" in attributes and attributes["device"] != describe_device(device):
            words.append(f"another device: {describe_device(device)} here, {attributes['device']} there")
        ran_on = attributes.get(LEASE, {}).get("host", host())
        if ran_on != host():
            words.append(f"another machine: it ran on {ran_on}")
        if "torch_threads" not in attributes:
            words.append("its number of torch threads is not known")
        return "; ".join(words) or "for no known reason"


def replay_of(given: str, *, storage: str | None) -> Replay:
    """Look up `--from STUDY/NUMBER`; StudyError if it cannot be trained again."""
    name, _, number = given.rpartition("/")
    if not (name and number.isdecimal()):
        raise StudyError(f"--from {given}: give STUDY/TRIAL, as in digits/7")
    study = find_study(name, storage_url=storage)
    trials = study.optuna.get_trials(deepcopy=False)
    if int(number) >= len(trials):
        there = f"its trials are 0 to {len(trials) - 1}" if trials else "it has none yet"
        raise StudyError(f"--from {given}: study {name} has no trial {int(number)}; {there}")
    trial = trials[int(number)]
    _check_has_run(given, trial)
    return Replay(study, trial, study.config_of(trial))


def _check_has_run(given: str, trial: FrozenTrial) -> None:
    """Raise StudyError if a trial is not finished, or may lack parameters."""
    if not trial.state.is_finished():
        raise StudyError(f"--from {given}: that trial is {trial.state.name.lower()}; choose a finished one")
    cut_off = trial.state == TrialState.FAIL or trial.user_attrs.get(FAILURE) == "crashed"
    if cut_off and not trial.intermediate_values:
        raise StudyError(f"--from {given}: that trial ended before its first epoch; choose one that trained an epoch")


def _reports(recorded: Recorded, metric: str, epochs: int) -> dict[int, float]:
    """Step -> the value that a trial reports."""
    folds = len(recorded.results)
    reports: dict[int, float] = {}
    for fold, result in enumerate(recorded.results, 1):
        before = recorded.values[: fold - 1]
        steps = {epoch.epoch: epoch.score(metric) for epoch in result.history}
        begun = (fold - 1) * epochs
        reports |= {begun + epoch: statistics.fmean([*before, score]) for epoch, score in steps.items()}
        if folds > 1:
            reports[begun + epochs] = statistics.fmean(recorded.values[:fold])
    return reports


def _place(row: Mapping[str, Any]) -> str:
    return f"epoch {row['epoch']}" + (f" of fold {row['fold']}" if "fold" in row else "")
