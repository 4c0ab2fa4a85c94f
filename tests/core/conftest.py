"""A data set and a network that train in a tenth of a second, and trainings shared by tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits

from core.config import TrainConfig
from core.data import Splits
from core.loop import Execution, TrainResult, train
from tests.core.trainings import CASES, CPU


@pytest.fixture(scope="session")
def digits() -> Splits:
    """192 training and 96 validation images of real digits."""
    source = load_digits()
    images = torch.tensor(source.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)[:288]
    labels = torch.tensor(source.target, dtype=torch.int64)[:288]
    pixels = images[:192].float() / 255
    return Splits(
        images=images,
        labels=labels,
        train=torch.arange(192),
        val=torch.arange(192, 288),
        classes=tuple("0123456789"),
        mean=(pixels.mean().item(),),
        std=(pixels.std().item(),),
    )


@pytest.fixture(scope="session")
def tiny() -> TrainConfig:
    """Four epochs of a network of two blocks."""
    return TrainConfig().override(
        {
            "epochs": 4,
            "batch_size": 64,
            "model.widths": (8, 16),
            "model.blocks": (1, 1),
            "optim.lr_scale": 4.0,
            "augment.flip": 0.0,
        }
    )


class Train:
    """Trains each case of `CASES` for five epochs once for each kind of execution."""

    def __init__(self, tiny: TrainConfig, splits: Splits) -> None:
        self._tiny, self._splits = tiny, splits
        self._results: dict[Any, TrainResult] = {}

    def config(self, case: str) -> TrainConfig:
        return self._tiny.override({"epochs": 5, **CASES[case]})

    def __call__(
        self, case: str, *, streamed: bool = False, capture: Any = None, batches_at_once: int | None = None
    ) -> TrainResult:
        key = (case, streamed, capture, batches_at_once)
        if key not in self._results:
            execution = Execution(streamed, capture, batches_at_once=batches_at_once)
            self._results[key] = train(self.config(case), self._splits, device=CPU, execution=execution)
        return self._results[key]


@pytest.fixture(scope="session")
def trained(tiny: TrainConfig, digits: Splits) -> Train:
    return Train(tiny, digits)
