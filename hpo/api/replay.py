"""A trial, to be trained again alone: its very configuration, and whether it came out the same.

A trial follows from the study's record, its parameters and its slot. On a CPU it comes out bit for bit the same with as
many threads of torch, since one and two do not add in the same order. A pruned trial is trained to its end: the epochs
that it had are compared, and the others say what it would have become.
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

# What a row of `metrics.jsonl` says of the machine, and not of the training.
_TIMES = ("images_per_s", "elapsed_s")
# The packages that the numbers of a training come from.
_NUMERIC = ("torch", "torchvision", "timm", "numpy")


@dataclass(frozen=True)
class Replay:
    """A trial that has ended, as it was trained."""

    study: Study
    trial: FrozenTrial
    config: TrainConfig
    """Its seed included."""

    @property
    def name(self) -> str:
        """That of the folder it is trained into."""
        return f"{self.study.name}-trial-{self.trial.number:05d}"

    @property
    def was(self) -> str:
        """What it came to, in words."""
        trial, study = self.trial, self.study
        if FAILURE in trial.user_attrs:
            return str(trial.user_attrs[FAILURE])
        epochs = len(trial.intermediate_values)
        if trial.state == TrialState.COMPLETE:
            return f"complete, {study.metric} {trial.value:.4f}"
        ended = "pruned" if trial.state == TrialState.PRUNED else "cut off"
        return f"{ended} after {epochs} of {self.config.epochs * (self.config.data.folds or 1)} epochs"

    def check(self, dataset: Dataset) -> None:
        """Raises StudyError where the images or the weights are not those that the trial began from."""
        self.study.check_data(dataset)
        self.study.check_weights(self.config)

    @contextmanager
    def threads(self) -> Iterator[None]:
        """As many threads of torch as the trial had, if that is known."""
        before = torch.get_num_threads()
        torch.set_num_threads(int(self.trial.user_attrs.get("torch_threads", before)))
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def verdict(self, recorded: Recorded, device: torch.device) -> str:
        """Whether the epochs that the trial had came out the same, in a line."""
        trial = f"trial {self.trial.number}"
        pairs = self._pairs(recorded)
        if not pairs:
            return f"{trial} left no epoch to compare with"
        for place, here, there in pairs:
            for key in here:
                if key not in _TIMES and _as_text(here[key]) != _as_text(there.get(key)):
                    return (
                        f"{trial} came out another way from {place} on: {key} {here[key]!r} against {there.get(key)!r} "
                        f"({self._apart(device)})"
                    )
        return f"the {len(pairs)} epochs of {trial} came out bit for bit the same"

    def _pairs(self, recorded: Recorded) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
        """(which epoch, what it came to here, what it came to in the trial) of each that both have."""
        file = self.study.paths.trial_metrics(self.trial.number)
        if file.exists():
            lines = file.read_text().rpartition("\n")[0].splitlines()  # behind the last newline, what a kill has torn
            if lines:
                there = [json.loads(line) for line in lines]
                return [(_place(row), dict(row), was) for row, was in zip(recorded.rows, there, strict=False)]
        reported = self.trial.intermediate_values  # on another machine than the trial's folder
        here = _reports(recorded, self.study.metric, self.config.epochs)
        return [
            (f"step {step}", {self.study.metric: here[step]}, {self.study.metric: reported[step]})
            for step in sorted(reported.keys() & here.keys())
        ]

    def _apart(self, device: torch.device) -> str:
        """What is known to be other here than it was for the trial."""
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
            words.append("how many threads of torch it had is not known")
        return "; ".join(words) or "nothing that is known of it says why"


def replay_of(given: str, *, storage: str | None) -> Replay:
    """The trial that `--from` names: `STUDY/NUMBER`.

    Raises:
        StudyError: there is no such study or trial, or nothing of the trial that could be trained again.
    """
    name, slash, number = given.rpartition("/")
    if not (slash and name and number.isdecimal()):
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
    """Raises StudyError where a trial is not over, or may not have been given all its parameters."""
    if trial.state == TrialState.WAITING:
        raise StudyError(f"--from {given}: that trial waits to be trained; choose one that has ended")
    if trial.state == TrialState.RUNNING:
        raise StudyError(f"--from {given}: that trial is running; choose one that has ended")
    cut_off = trial.state == TrialState.FAIL or trial.user_attrs.get(FAILURE) == "crashed"
    if cut_off and not trial.intermediate_values:
        raise StudyError(
            f"--from {given}: that trial was cut off before its first epoch; choose one that has trained an epoch"
        )


def _reports(recorded: Recorded, metric: str, epochs: int) -> dict[int, float]:
    """Step -> what a trial reports there: with folds, the mean of those before and this epoch's score."""
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


def _as_text(value: Any) -> str:
    """As a line of `metrics.jsonl` has it, bit for bit; not a number equals itself."""
    return json.dumps(value)
