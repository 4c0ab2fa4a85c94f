"""EMAs beside a training change nothing in it, and equal a plain loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import core.loop.graphs
from core.config import TrainConfig
from core.data import Splits
from core.errors import CheckpointError
from core.loop import Execution, TrainResult, train
from core.loop.run import Run
from core.loop.step import Batch
from tests.core.conftest import Train
from tests.core.recorded import RecordedGraph, let_the_cpu_capture
from tests.core.trainings import CPU, STATEFUL, EveryStepByPython, same

HALF_LIVES = (0.05, 0.3)


def alternatives(result: TrainResult) -> dict[str, dict[str, Tensor]]:
    return {name: model.state_dict() for name, model in result.averages.items()}


@pytest.mark.parametrize("case", STATEFUL)
def test_averages_change_nothing_in_a_training(digits: Splits, trained: Train, case: str) -> None:
    config = trained.config(case)
    plain, watched = trained(case), train(config, digits, device=CPU, averages=HALF_LIVES)
    assert same(plain, watched)
    assert not plain.averages
    own = {"none"} if config.averaging.name != "none" else set()
    assert watched.averages.keys() == own | {"ema_0.05", "ema_0.3"}


def test_averages_equal_a_plain_loop_in_float64(digits: Splits, tiny: TrainConfig) -> None:
    seen: list[dict[str, Tensor]] = []

    class Watching(Run):
        def step(self, batch: Batch) -> None:
            super().step(batch)
            seen.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})

    with Watching(tiny, digits, CPU, averages=HALF_LIVES) as run:
        start = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        for _ in range(tiny.epochs):
            run.epoch(final=False)
        found = run.result().averages
    for half_life in HALF_LIVES:
        expected = {name: tensor.double() for name, tensor in start.items()}
        for t, weights in enumerate(seen):
            decay = min(0.5 ** (1 / (half_life * len(seen))), (1 + t) / (10 + t))
            expected = {name: decay * expected[name] + (1 - decay) * weights[name].double() for name in expected}
        for name, tensor in found[f"ema_{half_life}"].state_dict().items():
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(tensor, seen[-1][name])


@pytest.mark.parametrize("case", ["adamw, ema, mixup, dropout", "early stopping"])
def test_averages_resume_bitwise(digits: Splits, tiny: TrainConfig, tmp_path: Path, case: str) -> None:
    config, file = tiny.override(STATEFUL[case]), tmp_path / "checkpoint.pt"
    whole = train(config, digits, device=CPU, averages=HALF_LIVES)
    train(config, digits, device=CPU, averages=HALF_LIVES, checkpoint_to=file, checkpoint_at_end=True, stop_after=2)
    resumed = train(config, digits, device=CPU, averages=HALF_LIVES, resume_from=file)
    assert same(whole, resumed)
    for name, weights in alternatives(whole).items():
        assert all(torch.equal(alternatives(resumed)[name][key], tensor) for key, tensor in weights.items()), name


def test_a_checkpoint_without_the_averages_is_refused(digits: Splits, tiny: TrainConfig, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    train(tiny, digits, device=CPU, averages=(0.05,), checkpoint_to=file, checkpoint_at_end=True, stop_after=1)
    with pytest.raises(CheckpointError, match=r"lacks ema_0\.3"):
        train(tiny, digits, device=CPU, averages=HALF_LIVES, resume_from=file)
    assert not train(tiny, digits, device=CPU, resume_from=file).averages


def test_early_stopping_keeps_the_averages_of_the_best_epoch(digits: Splits, tiny: TrainConfig) -> None:
    config = tiny.override({"early_stop.patience_fraction": 0.3, "optim.lr_scale": 30.0, "epochs": 8})
    stopped = train(config, digits, device=CPU, averages=HALF_LIVES)
    kept = stopped.kept.epoch
    assert kept < len(stopped.history), "the best epoch is not the last"
    best = train(config, digits, device=CPU, averages=HALF_LIVES, stop_after=kept)
    assert best.kept.epoch == kept
    for name, weights in alternatives(best).items():
        assert all(torch.equal(alternatives(stopped)[name][key], tensor) for key, tensor in weights.items()), name


def test_averages_in_a_captured_training_equal_the_launched_ones(
    digits: Splits, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_the_cpu_capture(monkeypatch)
    monkeypatch.setattr(core.loop.graphs, "FEWEST_REPLAYS", 1)
    config = tiny.override({"averaging.name": "ema", "averaging.half_life_fraction": 0.1})
    captured, launched = (
        train(config, digits, device=CPU, averages=HALF_LIVES, execution=Execution(capture=capture))
        for capture in (RecordedGraph, EveryStepByPython)
    )
    assert same(captured, launched)
    for name, weights in alternatives(launched).items():
        assert all(torch.equal(alternatives(captured)[name][key], tensor) for key, tensor in weights.items()), name
