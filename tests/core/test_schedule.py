"""The schedule is torch's own warm-up and decay, as a function of progress."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from core.config import ScheduleConfig
from core.schedule import factor

STEPS, WARMUP_STEPS = 200, 20


def torch_factors(decay: type[LRScheduler], **options: float) -> list[float]:
    """The factors of torch's warm-up from 0.1 followed by that decay, for a peak of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = SequentialLR(
        optimizer,
        [
            LinearLR(optimizer, start_factor=0.1, end_factor=1.0, total_iters=WARMUP_STEPS),
            decay(optimizer, **options),  # type: ignore[arg-type]
        ],
        milestones=[WARMUP_STEPS],
    )
    factors = []
    for _ in range(STEPS):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR warns about its own use of `epoch`
            scheduler.step()
    return factors


@pytest.mark.parametrize("final_factor", [0.0, 0.25])
def test_cosine_is_torchs(final_factor: float) -> None:
    config = ScheduleConfig(
        name="cosine", warmup_fraction=WARMUP_STEPS / STEPS, warmup_start=0.1, final_factor=final_factor
    )
    ours = [factor(config, step / STEPS) for step in range(STEPS)]
    theirs = torch_factors(CosineAnnealingLR, T_max=STEPS - WARMUP_STEPS, eta_min=final_factor)
    assert ours == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("final_factor", [0.0, 0.25])
def test_linear_is_torchs(final_factor: float) -> None:
    config = ScheduleConfig(
        name="linear", warmup_fraction=WARMUP_STEPS / STEPS, warmup_start=0.1, final_factor=final_factor
    )
    ours = [factor(config, step / STEPS) for step in range(STEPS)]
    theirs = torch_factors(LinearLR, start_factor=1.0, end_factor=final_factor, total_iters=STEPS - WARMUP_STEPS)
    assert ours == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_fraction", [0.05, 0.3])
def test_the_warmup_rises_linearly_to_one(name: str, warmup_fraction: float) -> None:
    config = ScheduleConfig(name=name, warmup_fraction=warmup_fraction, warmup_start=0.2)  # type: ignore[arg-type]
    assert factor(config, 0) == pytest.approx(0.2)
    assert factor(config, warmup_fraction / 2) == pytest.approx(0.6)
    assert factor(config, warmup_fraction) == 1


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_without_warmup_the_first_step_is_at_the_peak(name: str) -> None:
    assert factor(ScheduleConfig(name=name, warmup_fraction=0.0), 0) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "end"), [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)])
def test_the_run_ends_at_the_final_factor_unless_constant(name: str, end: float) -> None:
    config = ScheduleConfig(name=name, final_factor=0.1)  # type: ignore[arg-type]
    assert factor(config, 1) == pytest.approx(end)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_it_never_rises_after_the_warmup(name: str) -> None:
    config = ScheduleConfig(name=name, final_factor=0.3)  # type: ignore[arg-type]
    factors = [factor(config, progress / 1000) for progress in range(50, 1001)]
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
def test_progress_outside_the_run_is_refused(progress: float) -> None:
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        factor(ScheduleConfig(), progress)
