"""The losses are torch's and timm's, in float32 under any autocast; smoothing runs on a line."""

from __future__ import annotations

import pytest
import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor
from torch.nn import functional as F

from core.config import LossConfig
from core.losses import hard_cross_entropy, smoothing_at, soft_target_cross_entropy


@pytest.fixture
def logits() -> Tensor:
    return 5 * torch.randn(64, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(0, 10, (64,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def targets() -> Tensor:
    return torch.rand(64, 10, generator=torch.Generator().manual_seed(2)).softmax(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_hard_cross_entropy_is_torchs(logits: Tensor, labels: Tensor, smoothing: float) -> None:
    theirs = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    assert torch.equal(hard_cross_entropy(logits, labels, smoothing), theirs)


def test_soft_target_cross_entropy_is_timms(logits: Tensor, targets: Tensor) -> None:
    torch.testing.assert_close(soft_target_cross_entropy(logits, targets), SoftTargetCrossEntropy()(logits, targets))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_smoothing_is_a_soft_target(logits: Tensor, labels: Tensor, smoothing: float) -> None:
    targets = (1 - smoothing) * F.one_hot(labels, 10) + smoothing / 10
    torch.testing.assert_close(
        hard_cross_entropy(logits, labels, smoothing), soft_target_cross_entropy(logits, targets)
    )


def test_gradients_are_softmax_less_target(logits: Tensor, targets: Tensor) -> None:
    logits.requires_grad_()
    soft_target_cross_entropy(logits, targets).backward()
    torch.testing.assert_close(logits.grad, (logits.detach().softmax(1) - targets) / len(logits))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_is_float32_whatever_the_logits_are(
    logits: Tensor, labels: Tensor, targets: Tensor, autocast: bool
) -> None:
    half = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        hard = hard_cross_entropy(half, labels, 0.1)
        soft = soft_target_cross_entropy(half, targets)
    assert torch.equal(hard, F.cross_entropy(half.float(), labels, label_smoothing=0.1))
    assert torch.equal(soft, F.cross_entropy(half.float(), targets))
    assert hard.dtype == soft.dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "progress", "expected"),
    [
        (LossConfig(smoothing=0.1), 0.7, 0.1),
        (LossConfig(smoothing=0.2, smoothing_final=0.0), 0.0, 0.2),
        (LossConfig(smoothing=0.2, smoothing_final=0.0), 0.25, 0.15),
        (LossConfig(smoothing=0.0, smoothing_final=0.1), 1.0, 0.1),
    ],
)
def test_smoothing_runs_on_a_line(config: LossConfig, progress: float, expected: float) -> None:
    assert smoothing_at(config, progress) == pytest.approx(expected)
