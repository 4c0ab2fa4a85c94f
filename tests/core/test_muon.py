"""Muon equals timm's, with a tenth of its kernels."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import timm.optim.muon
import torch
from torch import Tensor, nn

from core.config import TrainConfig
from core.models import head_parameters
from core.optim import build_optimizer, muon
from tests.core.launches import launches
from tests.core.networks import build

STEPS = 5
BETAS = (0.9, 0.99)
# The first two are timm's limits.
SHAPES = [(4, 512), (4, 513), (3, 8, 3, 3), (16, 1, 3, 3), (1, 16, 8), (8, 3, 3, 3), (8, 3, 3, 3), (40, 4, 2, 2),
          (12, 40), (40, 12), (6, 5, 4), (6, 5, 2, 3, 2), (16,), (1,)]  # fmt: skip


def parameters(layout: torch.memory_format) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [nn.Parameter(t.to(memory_format=layout) if t.ndim == 4 else t) for t in tensors]


def moved(optimizer: torch.optim.Optimizer, given: list[nn.Parameter], steps: int) -> list[Tensor]:
    """Make steps with random gradients at a decreasing rate, and return the weights."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in given:
            values = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(values)
        if step == 2:
            given[5].grad = None
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(0.1 / (step + 1))
            else:
                group["lr"] = 0.1 / (step + 1)
        optimizer.step()
    return [parameter.detach() for parameter in given]


def groups(given: list[nn.Parameter]) -> list[dict[str, Any]]:
    """All but the last matrix, which is the classifier's."""
    return [{"params": [*given[:8], *given[9:]]}, {"params": [given[8]], "use_fallback": True}]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("padding", [0, 1e5, float("inf")])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_equals_timms_up_to_rounding(
    dtype: torch.dtype,
    nesterov: bool,
    padding: float,
    lr: float | Tensor,
    layout: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(muon, "_PADDING_OPERATIONS", {"cpu": padding})
    monkeypatch.setattr(muon, "_DTYPE", dtype)
    theirs = timm.optim.muon.zeropower_via_newtonschulz
    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", partial(theirs, dtype=dtype))
    rate = lr.clone() if isinstance(lr, Tensor) else lr

    mine, others = parameters(layout), parameters(layout)
    before = [parameter.detach().clone() for parameter in mine]
    reference = timm.optim.Muon(groups(others), lr=0.1, momentum=0.8, nesterov=nesterov, betas=BETAS)
    ours = muon.Muon(groups(mine), lr=rate, momentum=0.8, nesterov=nesterov, betas=BETAS)
    pairs = zip(moved(ours, mine, STEPS), moved(reference, others, STEPS), before, strict=True)
    for place, (one, other, start) in enumerate(pairs):
        scale = (other - start).abs().max()
        tolerance = (2**-6 if dtype == torch.bfloat16 else 1e-4) if place in (0, 5, 6, 7, 9, 10, 11) else 1e-5
        assert (one - other).abs().max() <= tolerance * scale, SHAPES[place]


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_resumed_muon_continues_bitwise(nesterov: bool) -> None:
    def fresh(given: list[nn.Parameter]) -> muon.Muon:
        return muon.Muon(groups(given), lr=0.1, momentum=0.8, nesterov=nesterov, betas=BETAS)

    whole, half = (parameters(torch.channels_last) for _ in range(2))
    expected = moved(fresh(whole), whole, STEPS)
    stopped = fresh(half)
    moved(stopped, half, 3)
    state = copy.deepcopy(stopped.state_dict())
    resumed = fresh(half)
    resumed.load_state_dict(state)
    for step in range(3, STEPS):
        for parameter in half:
            parameter.grad = None
        generator = torch.Generator().manual_seed(step)
        for parameter in half:
            parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
        for group in resumed.param_groups:
            group["lr"] = 0.1 / (step + 1)
        resumed.step()
    for one, other in zip(half, expected, strict=True):
        assert torch.equal(one, other)


def test_a_step_of_resnet18_launches_at_most_150_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's Muon launches 1,667 by the same count."""
    monkeypatch.setattr(muon, "_PADDING_OPERATIONS", {"cpu": muon._PADDING_OPERATIONS["cuda"]})
    model = build(num_classes=10, in_channels=3, image_size=(32, 32))
    config = TrainConfig().override({"optim.name": "muon"})
    optimizer = build_optimizer(config, model, 10, head_parameters(model), capturable=True)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).fill_(1e-3)
    factor = torch.ones(())
    optimizer.step(factor)
    assert launches(lambda: optimizer.step(factor)) <= 150
