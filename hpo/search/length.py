"""The length probe: a training of the baseline that predicts the scores of longer and shorter ones.

At a constant learning rate, the averaged weights after an epoch score about as well as a whole annealed training of
that many epochs (Hägele et al. 2024, arXiv 2405.18392). So one training shows all shorter lengths, and a power law
through its scores the longer ones. `tests/benchmarks/bench_length.py` compares the predictions with such trainings.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import TypeAdapter

from core.config import TrainConfig
from core.data import Splits
from core.text import count
from hpo.paths import TrainingPaths
from hpo.search.training import Watch, train_recorded
from hpo.study.results import read_rows
from hpo.study.settings import StudySettings

FEWEST_EPOCHS = 8
"""With fewer, there are too few points for the law."""
FROM_FRACTION = 0.25  # of the training: before, the average has not caught up, and the warm-up has its effect
HALF_LIFE_FRACTION = 0.06  # of 0.02 and 0.06 the one with the smaller errors in the benchmark
MIN_TRAININGS = 20
"""A search of fewer trainings is not probed: the probe costs one."""
TOO_FEW = 0.02
"""A doubling that gains more accuracy is advised."""
ENOUGH = 0.005
"""Half the epochs are advised if they lose less accuracy."""
FURTHEST = 4
"""Largest extrapolation, as a multiple of the probe's epochs."""


@dataclass(frozen=True)
class LengthProbe:
    """The predicted error of the baseline, `floor + scale · epochs ** -power`."""

    epochs: int
    """Of the probe and of the space."""
    floor: float
    scale: float
    power: float

    def accuracy(self, epochs: float) -> float:
        """Predict the validation accuracy of an annealed training."""
        return 1 - self.floor - self.scale * float(epochs**-self.power)

    def gain(self, times: float) -> float:
        """Predict the gain in accuracy of a training that is longer by a factor."""
        return self.accuracy(times * self.epochs) - self.accuracy(self.epochs)

    @property
    def advised(self) -> int:
        """The number of epochs to search with."""
        epochs = self.epochs
        while epochs < FURTHEST * self.epochs and self.accuracy(2 * epochs) - self.accuracy(epochs) > TOO_FEW:
            epochs *= 2
        if epochs > self.epochs:
            return epochs
        halves = [self.epochs // 2, self.epochs // 4]
        enough = [each for each in halves if each and self.accuracy(self.epochs) - self.accuracy(each) < ENOUGH]
        return min(enough, default=self.epochs)

    def lines(self, *, taken: bool = False) -> list[str]:
        """Describe the prediction and the advice, which may have been taken."""
        lengths = [self.epochs * factor for factor in (1, 2, FURTHEST)]
        predicted = ", ".join(f"{epochs}: {self.accuracy(epochs):.3f}" for epochs in lengths)
        points = [f"{100 * self.gain(factor):.1f}" for factor in (2, FURTHEST)]
        head = f"predicted accuracy of the baseline by epochs, from one training at a constant rate: {predicted}"
        here = count(self.epochs, "epoch")
        advice = f"so trials have {self.advised}" if taken else f"better: --set epochs={self.advised}"
        if self.advised > self.epochs:
            return [
                head,
                f"{here} are too few for these data: twice as many would gain about {points[0]} points, four times as "
                f"many {points[1]}; {advice}",
            ]
        if self.advised < self.epochs:
            return [
                head,
                f"{here} are more than these data need: {self.advised} would do for a search, with more trials in the "
                f"same time; {advice}",
            ]
        return [head, f"{here} suit these data: twice as many would gain about {points[0]} points"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> LengthProbe:
        return TypeAdapter(cls).validate_python(content)


def probed(config: TrainConfig) -> TrainConfig | None:
    """Return the configuration of a length probe; None if it would be too short, or is not trained in epochs."""
    if config.is_probe or config.epochs < FEWEST_EPOCHS:
        return None
    return config.override(
        {
            "schedule.name": "constant",
            "averaging.name": "ema",
            "averaging.half_life_fraction": HALF_LIFE_FRACTION,
            "early_stop.patience_fraction": None,
        }
    )


def probe_length(
    config: TrainConfig,
    splits: Splits,
    paths: TrainingPaths,
    *,
    device: torch.device,
    watch: Watch,
    settings: StudySettings | None = None,
) -> LengthProbe | None:
    """Train a length probe, or resume it, and fit the law to its validation accuracies.

    Args:
        config: See `probed`.
        splits: On the device; of several folds the first.

    Returns:
        None if no law fits.

    Raises:
        DivergedError: The baseline cannot be trained at a constant rate.
    """
    train_recorded(config, [splits], paths, metric="accuracy", device=device, watch=watch, settings=settings)
    rows = [row for row in read_rows(paths.metrics) if row["epoch"] >= FROM_FRACTION * config.epochs]
    return fit_length([row["epoch"] for row in rows], [row["val_accuracy"] for row in rows], config.epochs)


def probe_of(content: dict[str, Any] | None) -> LengthProbe | None:
    """Return the length probe of a study's setting; None if there was none, or no law fitted."""
    return None if content is None or content["law"] is None else LengthProbe.from_json(content["law"])


def fit_length(epochs: Sequence[int], accuracies: Sequence[float], probe_epochs: int) -> LengthProbe | None:
    """Fit the power law to the accuracy after each epoch; None if none fits."""
    import numpy as np
    from scipy.optimize import OptimizeWarning, curve_fit  # takes a third of a second to import

    x, errors = np.array(epochs, dtype=float), 1 - np.array(accuracies, dtype=float)
    start = (0.8 * errors.min() + 1e-3, max(errors[0] - errors.min(), 1e-2) * x[0] ** 0.5, 0.5)
    bounds = ([0, 0, 0.05], [1, 50, 3])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)  # a flat curve has many laws, which agree
            found, _ = curve_fit(lambda e, a, b, c: a + b * e**-c, x, errors, p0=start, bounds=bounds, maxfev=20_000)
    except RuntimeError:
        return None
    floor, scale, power = map(float, found)
    return LengthProbe(probe_epochs, floor, scale, power)
