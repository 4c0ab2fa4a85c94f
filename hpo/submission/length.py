"""The length of a refit: a ladder of trainings of 1, 2, 4 and 8 times a trial's epochs, judged out of fold.

The trials of a search are short, and all of them may be too short. A configuration climbs as long as a doubling of its
epochs gains more than the standard error of that gain, and the budget allows. The winner of the search and the
baseline climb side by side, since the order of configurations can change with their length.

All trainings of a ladder are recorded in the study's folder: an interrupted ladder resumes, and another refit of the
study finds them.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from safetensors.torch import load_file
from torch import Tensor

from core import metrics
from core.calibration import fit_temperature, scaled
from core.config import MOST_EPOCHS, TrainConfig
from core.data import Division, Splits
from core.loop import seconds_per_epoch
from core.metrics import Gain
from core.runtime import make_generator
from core.text import count
from hpo.paths import StudyPaths, TrainingPaths
from hpo.search.recipes import is_training_of, recording_failure
from hpo.search.training import Watch, train_recorded
from hpo.study.results import read_result, read_rows
from hpo.study.settings import StudySettings
from hpo.submission.ladder import Ladder, Rung
from hpo.text import duration

logger = logging.getLogger(__name__)

MULTIPLES = (2, 4, 8)
REPLICATES = 2
"""Most seeds and splits of a comparison."""
CLEAR = 2.0
"""A gain of more standard errors on the first replicate, in either direction, needs no second one."""
SHARE = 3
"""A ladder trains at most the search's epochs divided by this, but always its first two doublings, once each."""
SLACK = 1.25
"""Factor of estimated times under a limit."""


@dataclass(frozen=True)
class Climber:
    """A configuration that may be trained longer."""

    key: str
    """`baseline`, `trial 12` or `recipe NAME`."""
    name: str
    """Name for the user: "the baseline (trial 0)"."""
    config: TrainConfig
    """As the search trained it."""
    known: Mapping[int, TrainingPaths] = field(default_factory=dict)
    """Replicate -> folder with the recorded predictions of a training of this length."""

    def times(self, multiple: int) -> int:
        """Return the number of epochs of a longer training."""
        return self.config.epochs * multiple


@dataclass(frozen=True)
class Site:
    """Where and how a ladder's trainings run."""

    paths: StudyPaths
    metric: str
    division: Division
    device: torch.device
    replicate: Callable[[TrainConfig, int], TrainConfig]
    """Gives a configuration the seed and split of a replicate, counted from 0."""
    replicates: int
    """Most replicates of a comparison."""
    shown: Callable[[str, int], AbstractContextManager[Watch]]
    """Shows a training by its name and number of epochs."""
    say: Callable[[str], None]
    settings: StudySettings | None = None


class Budget:
    """Epochs and seconds that a ladder may take.

    Args:
        epochs: Of all its trainings together, whether trained now or found; None without a limit.
        seconds: Together with the refit that follows; None without a limit.
    """

    def __init__(self, epochs: int | None, seconds: float | None = None) -> None:
        self.epochs, self.seconds = epochs, seconds
        self._spent = 0
        self._began = time.monotonic()

    @property
    def limit(self) -> str:
        """Describe the limits: "at most 336 epochs together"."""
        parts = [] if self.epochs is None else [f"at most {count(self.epochs, 'epoch')} together"]
        return ", ".join(parts if self.seconds is None else [*parts, f"{duration(self.seconds)} with the refit"])

    def refuses(self, epochs: int, new_s: float, later_s: float) -> str | None:
        """Explain why no more epochs can be trained; None if they can.

        Args:
            new_s: Time of those that are not recorded yet.
            later_s: Time of the refit that would follow.
        """
        if self.epochs is not None and self._spent + epochs > self.epochs:
            return f"the budget of {count(self.epochs, 'epoch')} allows no further doubling"
        if self.seconds is None:
            return None
        left_s = self.seconds - (time.monotonic() - self._began)
        if SLACK * (new_s + later_s) <= left_s:
            return None
        return f"{duration(max(0.0, left_s))} are left, too little for another doubling and a refit of that length"

    def spend(self, epochs: int) -> None:
        self._spent += epochs


def default_budget(search_epochs: int, climbers: Sequence[Climber]) -> int:
    """Return the epochs that a ladder may train: a third of the search's, at least two doublings of each climber."""
    least = sum(one.times(1 + 2 + 4) * (one.config.data.folds or 1) for one in climbers)
    return max(search_epochs // SHARE, least)


def climb(climbers: Sequence[Climber], site: Site, budget: Budget) -> tuple[Ladder, TrainConfig, TrainingPaths]:
    """Find the length of a refit.

    Args:
        climbers: The winner of the search first; then the baseline, if that is another configuration.

    Returns:
        The ladder; the chosen configuration on its first replicate; and the folder with its recorded training, whose
        weights are kept if it is longer than in the search.

    Raises:
        KeyboardInterrupt: Interrupted; the same call resumes.
    """
    return _Climb(climbers, site, budget).run()


@dataclass(frozen=True)
class _Held:
    """Predictions of validation images."""

    logits: Tensor  # (M, K) float32 on the CPU
    labels: Tensor  # (M,) int64
    images: Tensor  # (M,) int64; an image may be in several replicates
    elapsed_s: float


class _FailedError(Exception):
    """A configuration cannot be trained at this length."""


class _Climb:
    def __init__(self, climbers: Sequence[Climber], site: Site, budget: Budget) -> None:
        self._climbers, self._site, self._budget = climbers, site, budget
        self._heights = {one.key: 1 for one in climbers}
        self._held: dict[tuple[str, int, int], _Held] = {}
        self._rungs: list[Rung] = []
        self._timed: dict[str, float] = {}  # seconds per epoch, by a few steps

    def run(self) -> tuple[Ladder, TrainConfig, TrainingPaths]:
        ended = self._climb()
        chosen, ahead = self._compare()
        multiple = self._heights[chosen.key]
        ladder = Ladder(
            metric=self._site.metric,
            rungs=tuple(self._rungs),
            chosen=chosen.key,
            name=chosen.name,
            epochs=chosen.times(multiple),
            searched=chosen.config.epochs,
            ended=ended,
            other=next((one.name for one in self._climbers if one is not chosen), None),
            ahead=ahead,
        )
        for line in ladder.lines()[len(self._rungs) :]:
            self._site.say(line)
        self._drop_weights(but=self._folder(chosen, multiple, 0))
        return ladder, self._config(chosen, multiple, 0), self._folder(chosen, multiple, 0)

    def _climb(self) -> str:
        """Train longer and longer; return why it ends."""
        going = [one for one in self._climbers if not one.config.is_probe]
        if not going:
            return "a probe is not trained in epochs"
        for multiple in MULTIPLES:
            if any(one.times(multiple) > MOST_EPOCHS for one in going):
                return f"a training has at most {count(MOST_EPOCHS, 'epoch')}"
            if (why := self._refused(going, multiple)) is not None:
                return why
            going = [one for one in going if self._climbs(one, multiple)]
            if not going:
                return "a longer training shows no gain beyond its error"
        return f"{MULTIPLES[-1]} times the epochs of the search is the longest that is tried"

    def _climbs(self, climber: Climber, multiple: int) -> bool:
        """Train a length, and return whether it is better than the one before."""
        if multiple == MULTIPLES[0] and not self._add(self._first(climber)).replicates:
            return False
        climbs = self._add(self._rung(climber, multiple)).climbs
        if climbs:
            self._heights[climber.key] = multiple
        return climbs

    def _add(self, rung: Rung) -> Rung:
        self._rungs.append(rung)
        self._site.say(rung.line(self._site.metric))
        return rung

    def _refused(self, climbers: Sequence[Climber], multiple: int, replicate: int = 0) -> str | None:
        """Explain why the budget does not allow this length on a replicate for all climbers; None if it does."""
        epochs, new_s = 0, 0.0
        for one in climbers:
            for each in (multiple // 2, multiple):
                if not self._is_free(one, each, replicate):
                    cost = one.times(each) * (one.config.data.folds or 1)
                    epochs += cost
                    new_s += 0.0 if self._is_over(one, each, replicate) else cost * self._pace(one)
        return self._budget.refuses(epochs, new_s, max(self._refit_s(one, multiple) for one in climbers))

    def _is_free(self, climber: Climber, multiple: int, replicate: int) -> bool:
        """Whether a training is already paid for."""
        return (climber.key, multiple, replicate) in self._held or (multiple == 1 and replicate in climber.known)

    def _pace(self, climber: Climber) -> float:
        """Seconds per epoch."""
        if self._budget.seconds is None:
            return 0.0
        if self._is_over(climber, 1, 0):
            rows = read_rows(self._folder(climber, 1, 0).metrics)
            if rows:
                return float(rows[-1]["elapsed_s"]) / len(rows)
        if climber.key not in self._timed:
            config = self._config(climber, 1, 0)
            splits = self._site.division.on(self._site.device, config.data)
            self._timed[climber.key] = seconds_per_epoch(config, splits[0], device=self._site.device)
        return self._timed[climber.key]

    def _refit_s(self, climber: Climber, multiple: int) -> float:
        """Estimate the duration of a training on training and validation images."""
        splits = self._site.division.here(self._config(climber, 1, 0).data)[0]
        return climber.times(multiple) * self._pace(climber) * (1 + len(splits.val) / len(splits.train))

    def _first(self, climber: Climber) -> Rung:
        """The training of the search's length."""
        try:
            return self._made(climber, 1, 1, None, self._trained(climber, 1, 0))
        except _FailedError as error:
            return self._failed(climber, 1, error)

    def _rung(self, climber: Climber, multiple: int) -> Rung:
        """Compare a length with half of it, on a second replicate too if the first is not clear."""
        half = multiple // 2
        gain, done = None, 0
        try:
            for replicate in range(self._site.replicates):
                if replicate and self._refused([climber], multiple, replicate):
                    break
                longer, shorter = (self._pooled(climber, each, replicate + 1) for each in (multiple, half))
                gain, done = self._gain(longer, shorter), replicate + 1
                if abs(gain.value) > CLEAR * gain.error:
                    break
        except _FailedError as error:
            return self._failed(climber, multiple, error)
        return self._made(climber, multiple, done, gain, self._pooled(climber, multiple, done))

    def _made(self, climber: Climber, multiple: int, replicates: int, gain: Gain | None, held: _Held) -> Rung:
        score = metrics.value(metrics.scores(_fitted(held, self._site.metric), held.labels), self._site.metric)
        epochs = climber.times(multiple)
        return Rung(climber.key, climber.name, epochs, score, gain, replicates, held.elapsed_s)

    def _failed(self, climber: Climber, multiple: int, error: _FailedError) -> Rung:
        return Rung(climber.key, climber.name, climber.times(multiple), math.nan, None, 0, 0.0, str(error))

    def _gain(self, held: _Held, other: _Held) -> Gain:
        metric = self._site.metric
        generator = make_generator(torch.device("cpu"), "length")
        return metrics.paired_gain(
            _fitted(held, metric),
            _fitted(other, metric),
            held.labels,
            metric,
            generator=generator,
            images=held.images,
        )

    def _compare(self) -> tuple[Climber, Gain | None]:
        """The configuration to refit, and the gain of the baseline over the winner."""
        winner, *others = self._climbers
        if not others or set(self._heights.values()) == {1}:
            return winner, None
        [baseline] = others
        replicates = 1
        for replicate in range(1, self._site.replicates):
            if not all((one.key, self._heights[one.key], replicate) in self._held for one in self._climbers):
                break
            replicates += 1
        try:
            ours, theirs = (self._pooled(one, self._heights[one.key], replicates) for one in (winner, baseline))
        except _FailedError:  # at the length of the search
            return winner, None
        ahead = self._gain(theirs, ours)
        return (baseline if ahead.value > ahead.error else winner), ahead

    # Trainings

    def _pooled(self, climber: Climber, multiple: int, replicates: int) -> _Held:
        """The predictions of the first replicates together."""
        parts = [self._trained(climber, multiple, replicate) for replicate in range(replicates)]
        return _Held(
            logits=torch.cat([part.logits for part in parts]),
            labels=torch.cat([part.labels for part in parts]),
            images=torch.cat([part.images for part in parts]),
            elapsed_s=sum(part.elapsed_s for part in parts),
        )

    def _trained(self, climber: Climber, multiple: int, replicate: int) -> _Held:
        """The predictions of one training, which is trained now unless it is recorded."""
        key = (climber.key, multiple, replicate)
        if key not in self._held:
            config, folder = self._config(climber, multiple, replicate), self._folder(climber, multiple, replicate)
            splits = self._site.division.on(self._site.device, config.data)
            if not self._is_free(climber, multiple, replicate):
                self._budget.spend(climber.times(multiple) * len(splits))
                if not self._is_over(climber, multiple, replicate):
                    self._train(climber, config, splits, folder)
            if failure := (read_result(folder) or {}).get("failure"):
                raise _FailedError(failure)
            self._held[key] = _read(folder, splits)
        return self._held[key]

    def _config(self, climber: Climber, multiple: int, replicate: int) -> TrainConfig:
        longer = climber.config.override({"epochs": climber.times(multiple)})
        return self._site.replicate(longer, replicate)

    def _folder(self, climber: Climber, multiple: int, replicate: int) -> TrainingPaths:
        known = climber.known.get(replicate) if multiple == 1 else None
        return known or self._site.paths.longer(climber.key, climber.times(multiple), replicate)

    def _is_over(self, climber: Climber, multiple: int, replicate: int) -> bool:
        """Whether a training is recorded, or has failed."""
        config, folder = self._config(climber, multiple, replicate), self._folder(climber, multiple, replicate)
        if folder in climber.known.values():
            return True
        if not folder.config.exists() or not is_training_of(folder, config):
            return False
        failed = "failure" in (read_result(folder) or {})
        return failed or all(folder.validation(fold).exists() for fold in range(1, (config.data.folds or 1) + 1))

    def _train(self, climber: Climber, config: TrainConfig, splits: Sequence[Splits], folder: TrainingPaths) -> None:
        site, name = self._site, f"{climber.name}, {count(config.epochs, 'epoch')}"
        failing = recording_failure(config, folder, folds=len(splits), metric=site.metric)
        with failing, site.shown(name, config.epochs) as watch:
            train_recorded(
                config,
                splits,
                folder,
                metric=site.metric,
                device=site.device,
                watch=watch,
                settings=site.settings,
                evidence=True,
            )

    def _drop_weights(self, but: TrainingPaths) -> None:
        """Delete the weights of all trainings but that of the refit."""
        for climber, multiple, replicate in self._recorded():
            folder = self._folder(climber, multiple, replicate)
            if folder == but or folder in climber.known.values():
                continue
            for fold in range(1, (climber.config.data.folds or 1) + 1):
                folder.model(fold).unlink(missing_ok=True)

    def _recorded(self) -> Iterator[tuple[Climber, int, int]]:
        climbers = {one.key: one for one in self._climbers}
        for key, multiple, replicate in self._held:
            yield climbers[key], multiple, replicate


def _read(folder: TrainingPaths, splits: Sequence[Splits]) -> _Held:
    outputs = [load_file(folder.validation(fold)) for fold in range(1, len(splits) + 1)]
    images = torch.cat([each["indices"] for each in outputs])
    return _Held(
        logits=torch.cat([each["logits"] for each in outputs]),
        labels=splits[0].labels.cpu()[images],
        images=images,
        elapsed_s=float(read_rows(folder.metrics)[-1]["elapsed_s"]),
    )


def _fitted(held: _Held, metric: str) -> Tensor:
    """The logits; for the loss at their best temperature, since longer trainings are more confident."""
    return scaled(held.logits, fit_temperature(held.logits, held.labels)) if metric == "nll" else held.logits
