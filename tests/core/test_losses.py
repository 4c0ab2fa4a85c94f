"""Losses equal torch's, timm's and the papers', in float32 under any autocast."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from core.config import LossConfig
from core.losses import Criterion, class_weights, smoothing_at
from tests.core.recorded import HostReads
from tests.core.trainings import forbidden_waits

# A long tail, with a class that has no training images.
COUNTS = torch.tensor([500, 300, 200, 100, 60, 40, 20, 10, 5, 0])
EVEN = torch.full((10,), 50)


@pytest.fixture
def logits() -> Tensor:
    return 5 * torch.randn(64, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(0, 10, (64,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def targets() -> Tensor:
    return torch.rand(64, 10, generator=torch.Generator().manual_seed(2)).softmax(1)


def criterion(counts: Tensor = COUNTS, **fields: Any) -> Criterion:
    return Criterion(LossConfig(**fields), counts)


def hard(logits: Tensor, labels: Tensor, counts: Tensor = COUNTS, progress: float = 0.0, **fields: Any) -> Tensor:
    loss = criterion(counts, **fields)
    return loss(logits, labels, loss.stage(progress))


def mixed(logits: Tensor, targets: Tensor, counts: Tensor = COUNTS, progress: float = 0.0, **fields: Any) -> Tensor:
    loss = criterion(counts, **fields)
    return loss.mixed(logits, targets, loss.stage(progress))


def weights_of(scheme: str, counts: Tensor = COUNTS) -> Tensor:
    weights = class_weights(LossConfig(class_weights=scheme), counts)  # type: ignore[arg-type]
    assert weights is not None
    return weights


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


# ---- cross-entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_equals_torch(logits: Tensor, labels: Tensor, smoothing: float) -> None:
    theirs = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    assert torch.equal(hard(logits, labels, smoothing=smoothing), theirs)


def test_mixed_cross_entropy_equals_timm(logits: Tensor, targets: Tensor) -> None:
    torch.testing.assert_close(mixed(logits, targets), SoftTargetCrossEntropy()(logits, targets))


def test_gradients_are_softmax_minus_target(logits: Tensor, targets: Tensor) -> None:
    logits.requires_grad_()
    expected = (logits.detach().softmax(1) - targets) / len(logits)
    torch.testing.assert_close(gradient(mixed(logits, targets), logits), expected)


# ---- smoothing


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "bce"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_smoothing_is_a_soft_target(logits: Tensor, labels: Tensor, name: str, smoothing: float) -> None:
    targets = (1 - smoothing) * F.one_hot(labels, 10) + smoothing / 10
    torch.testing.assert_close(
        hard(logits, labels, name=name, smoothing=smoothing), mixed(logits, targets, name=name, smoothing=0.0)
    )


@pytest.mark.parametrize(
    ("config", "progress", "expected"),
    [
        (LossConfig(smoothing=0.1), 0.7, 0.1),
        (LossConfig(smoothing=0.2, smoothing_final=0.0), 0.0, 0.2),
        (LossConfig(smoothing=0.2, smoothing_final=0.0), 0.25, 0.15),
        (LossConfig(smoothing=0.0, smoothing_final=0.1), 1.0, 0.1),
    ],
)
def test_smoothing_is_interpolated_linearly(config: LossConfig, progress: float, expected: float) -> None:
    assert smoothing_at(config, progress) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "bce"])
def test_the_loss_uses_the_interpolated_smoothing(logits: Tensor, labels: Tensor, name: str) -> None:
    falling = hard(logits, labels, progress=0.25, name=name, smoothing=0.2, smoothing_final=0.0)
    torch.testing.assert_close(falling, hard(logits, labels, name=name, smoothing=0.15))


# ---- focal loss


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_is_the_papers_formula(logits: Tensor, labels: Tensor, targets: Tensor, gamma: float) -> None:
    p = logits.double().softmax(1)
    terms = -((1 - p) ** gamma) * p.log()
    expected = terms[torch.arange(64), labels].mean()
    torch.testing.assert_close(hard(logits, labels, name="focal", gamma=gamma).double(), expected)
    expected = (targets * terms).sum(1).mean()
    torch.testing.assert_close(mixed(logits, targets, name="focal", gamma=gamma).double(), expected)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_of_two_classes_equals_torchvision(gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    difference = 5 * torch.randn(64, generator=generator)
    labels = torch.randint(0, 2, (64,), generator=generator)
    logits = torch.stack([torch.zeros(64), difference], dim=1)
    theirs = sigmoid_focal_loss(difference, labels.float(), alpha=-1, gamma=gamma, reduction="mean")
    torch.testing.assert_close(hard(logits, labels, torch.tensor([9, 9]), name="focal", gamma=gamma), theirs)


@pytest.mark.parametrize("weights", ["none", "inverse", "effective"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_focal_with_gamma_0_is_cross_entropy(
    logits: Tensor, labels: Tensor, targets: Tensor, weights: str, smoothing: float
) -> None:
    fields = {"class_weights": weights, "smoothing": smoothing, "logit_adjustment": 1.0}
    logits.requires_grad_()
    focal = hard(logits, labels, name="focal", gamma=0.0, **fields)
    cross_entropy = hard(logits, labels, **fields)
    torch.testing.assert_close(focal, cross_entropy)
    torch.testing.assert_close(gradient(focal, logits), gradient(cross_entropy, logits))
    focal = mixed(logits, targets, name="focal", gamma=0.0, **fields)
    torch.testing.assert_close(focal, mixed(logits, targets, **fields))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focals_gradient_is_finite_for_certain_predictions(gamma: float) -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)  # the first is right, the second wrong
    loss = hard(logits, torch.tensor([0, 0]), torch.tensor([9, 9]), name="focal", gamma=gamma)
    assert loss.item() == pytest.approx(100)
    assert gradient(loss, logits).tolist() == [[0.0, 0.0], [pytest.approx(-0.5), pytest.approx(0.5)]]


# ---- a binary cross-entropy of each class


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bce_equals_timm(logits: Tensor, labels: Tensor, targets: Tensor, smoothing: float) -> None:
    theirs = BinaryCrossEntropy(smoothing=smoothing, sum_classes=True)
    torch.testing.assert_close(hard(logits, labels, name="bce", smoothing=smoothing), theirs(logits, labels))
    torch.testing.assert_close(mixed(logits, targets, name="bce"), theirs(logits, targets))


def test_bces_gradients_are_sigmoid_minus_target(logits: Tensor, targets: Tensor) -> None:
    logits.requires_grad_()
    expected = (logits.detach().sigmoid() - targets) / len(logits)
    torch.testing.assert_close(gradient(mixed(logits, targets, name="bce"), logits), expected)


# ---- logit adjustment


def test_tau_1_is_balanced_softmax(logits: Tensor, labels: Tensor) -> None:
    counts = torch.tensor([500, 300, 200, 100, 60, 40, 20, 10, 5, 3])
    weighted = counts * logits.double().exp()  # Ren et al. 2020, equation 4: n_j exp(eta_j)
    expected = -(weighted / weighted.sum(1, keepdim=True))[torch.arange(64), labels].log().mean()
    torch.testing.assert_close(hard(logits, labels, counts, logit_adjustment=1.0).double(), expected)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_logit_adjustment_is_equation_10(logits: Tensor, labels: Tensor, tau: float) -> None:
    counts = torch.tensor([500, 300, 200, 100, 60, 40, 20, 10, 5, 3])
    prior, f = counts / counts.sum(), logits.double()
    # Menon et al. 2021: log(1 + sum over y' ≠ y of (pi_y' / pi_y)^tau · exp(f_y' - f_y))
    ratio = (prior / prior[labels, None]) ** tau * (f - f[torch.arange(64), labels, None]).exp()
    expected = ratio.sum(1).log().mean()  # the term of y' = y is the 1
    torch.testing.assert_close(hard(logits, labels, counts, logit_adjustment=tau).double(), expected)


@pytest.mark.parametrize("name", ["cross_entropy", "focal"])
def test_logit_adjustment_is_the_loss_of_shifted_logits(
    logits: Tensor, labels: Tensor, targets: Tensor, name: str
) -> None:
    shifted = logits + 0.5 * COUNTS.clamp(min=1).log()
    ours = hard(logits, labels, name=name, smoothing=0.1, logit_adjustment=0.5)
    torch.testing.assert_close(ours, hard(shifted, labels, name=name, smoothing=0.1))
    ours = mixed(logits, targets, name=name, logit_adjustment=0.5)
    torch.testing.assert_close(ours, mixed(shifted, targets, name=name))


def test_logit_adjustment_has_no_effect_on_balanced_classes(logits: Tensor, labels: Tensor) -> None:
    torch.testing.assert_close(hard(logits, labels, EVEN, logit_adjustment=1.0), hard(logits, labels, EVEN))


# ---- class weights


def test_inverse_weights_are_inverse_frequencies_of_mean_1() -> None:
    assert weights_of("inverse", torch.tensor([100, 50, 25])).tolist() == pytest.approx([3 / 7, 6 / 7, 12 / 7])


def test_effective_weights_are_the_papers_formula() -> None:
    counts, beta = [20000, 500, 1], 0.9999
    expected = torch.tensor([(1 - beta) / (1 - beta**n) for n in counts], dtype=torch.float64)
    assert weights_of("effective", torch.tensor(counts)).tolist() == pytest.approx(
        (expected / expected.mean()).tolist()
    )


@pytest.mark.parametrize("scheme", ["inverse", "effective"])
def test_class_weights_average_1_and_favour_the_small(scheme: str) -> None:
    weights = weights_of(scheme)
    assert weights.mean().item() == pytest.approx(1)
    assert weights.tolist() == sorted(weights.tolist())


@pytest.mark.parametrize("scheme", ["inverse", "effective"])
@pytest.mark.parametrize("name", ["cross_entropy", "focal", "bce"])
def test_class_weights_have_no_effect_on_balanced_classes(
    logits: Tensor, labels: Tensor, targets: Tensor, name: str, scheme: str
) -> None:
    weighted = hard(logits, labels, EVEN, name=name, smoothing=0.1, class_weights=scheme)
    torch.testing.assert_close(weighted, hard(logits, labels, EVEN, name=name, smoothing=0.1))
    weighted = mixed(logits, targets, EVEN, name=name, class_weights=scheme)
    torch.testing.assert_close(weighted, mixed(logits, targets, EVEN, name=name))


@pytest.mark.parametrize("scheme", ["inverse", "effective"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_cross_entropy_equals_torch(
    logits: Tensor, labels: Tensor, targets: Tensor, scheme: str, smoothing: float
) -> None:
    weights = weights_of(scheme)
    theirs = F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing)
    torch.testing.assert_close(
        hard(logits, labels, class_weights=scheme, smoothing=smoothing), theirs, rtol=3e-7, atol=0
    )
    theirs = F.cross_entropy(logits, targets, weight=weights, reduction="sum") / (targets * weights).sum()
    torch.testing.assert_close(mixed(logits, targets, class_weights=scheme), theirs)


def test_weighted_focal_is_the_mean_weighted_by_the_labels(logits: Tensor, labels: Tensor) -> None:
    weights = weights_of("inverse")
    each = torch.stack([hard(logits[i : i + 1], labels[i : i + 1], name="focal") for i in range(64)])
    expected = (weights[labels] * each).sum() / weights[labels].sum()
    torch.testing.assert_close(hard(logits, labels, name="focal", class_weights="inverse"), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_bce_is_the_mean_weighted_by_the_labels(logits: Tensor, labels: Tensor, smoothing: float) -> None:
    weights = weights_of("inverse")
    timms = BinaryCrossEntropy(smoothing=smoothing, sum_classes=True)
    each = torch.stack([timms(logits[i : i + 1], labels[i : i + 1]) for i in range(64)])
    expected = (weights[labels] * each).sum() / weights[labels].sum()
    torch.testing.assert_close(hard(logits, labels, name="bce", class_weights="inverse", smoothing=smoothing), expected)


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "bce"])
@pytest.mark.parametrize("weights", ["none", "inverse"])
@pytest.mark.parametrize("smoothing", [{}, {"smoothing": 0.1}, {"smoothing": 0.2, "smoothing_final": 0.0}])
def test_one_hot_targets_have_the_loss_of_their_labels(
    logits: Tensor, labels: Tensor, name: str, weights: str, smoothing: dict[str, float]
) -> None:
    pure = F.one_hot(labels, logits.shape[1]).float()
    fields = {"name": name, "class_weights": weights, "logit_adjustment": 0.0 if name == "bce" else 1.0, **smoothing}
    logits.requires_grad_()
    soft, hard_ = mixed(logits, pure, progress=0.5, **fields), hard(logits, labels, progress=0.5, **fields)
    torch.testing.assert_close(soft, hard_)
    torch.testing.assert_close(gradient(soft, logits), gradient(hard_, logits))


def test_weighted_mixed_bce_uses_the_mean_weight_of_the_mixture(logits: Tensor, targets: Tensor) -> None:
    weights = weights_of("inverse")
    timms = BinaryCrossEntropy(sum_classes=True)
    each = torch.stack([timms(logits[i : i + 1], targets[i : i + 1]) for i in range(64)])
    expected = (targets @ weights * each).sum() / (targets @ weights).sum()
    torch.testing.assert_close(mixed(logits, targets, name="bce", class_weights="inverse"), expected)


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "bce"])
def test_deferred_weights_apply_from_their_fraction(logits: Tensor, labels: Tensor, targets: Tensor, name: str) -> None:
    deferred = {"name": name, "class_weights": "inverse", "class_weights_from_fraction": 0.8}
    always = {"name": name, "class_weights": "inverse"}
    assert torch.equal(hard(logits, labels, progress=0.79, **deferred), hard(logits, labels, name=name))
    assert torch.equal(mixed(logits, targets, progress=0.79, **deferred), mixed(logits, targets, name=name))
    assert torch.equal(hard(logits, labels, progress=0.8, **deferred), hard(logits, labels, **always))
    assert torch.equal(mixed(logits, targets, progress=0.8, **deferred), mixed(logits, targets, **always))


# ---- every combination

COMBINATIONS = [
    {"name": name, "logit_adjustment": tau, "class_weights": scheme, "smoothing": smoothing}
    for name, tau, scheme, smoothing in itertools.product(
        ["cross_entropy", "focal", "bce"], [0.0, 1.0], ["none", "inverse", "effective"], [0.0, 0.1]
    )
    if name != "bce" or tau == 0
]


@pytest.mark.parametrize("fields", COMBINATIONS, ids=lambda fields: "-".join(map(str, fields.values())))
class TestEveryCombination:
    def test_is_finite_with_an_empty_class(
        self, logits: Tensor, labels: Tensor, targets: Tensor, fields: dict[str, Any]
    ) -> None:
        assert COUNTS[-1] == 0
        logits.requires_grad_()
        for loss in (
            hard(logits, labels, **fields),
            hard(logits, torch.full_like(labels, 9), **fields),
            mixed(logits, targets, **fields),
            hard(1000 * logits, labels, **fields),
            mixed(1000 * logits, targets, **fields),
        ):
            assert loss.shape == ()
            assert loss.isfinite()
            assert gradient(loss, logits).isfinite().all()

    def test_counts_an_empty_class_as_one_image(
        self, logits: Tensor, labels: Tensor, targets: Tensor, fields: dict[str, Any]
    ) -> None:
        assert torch.equal(hard(logits, labels, COUNTS, **fields), hard(logits, labels, COUNTS.clamp(min=1), **fields))
        assert torch.equal(
            mixed(logits, targets, COUNTS, **fields), mixed(logits, targets, COUNTS.clamp(min=1), **fields)
        )

    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_is_float32_for_any_logits(
        self,
        logits: Tensor,
        labels: Tensor,
        targets: Tensor,
        fields: dict[str, Any],
        autocast: bool,
        dtype: torch.dtype,
    ) -> None:
        other = logits.to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            losses = hard(other, labels, **fields), mixed(other, targets.to(dtype), **fields)
        expected = hard(other.float(), labels, **fields), mixed(other.float(), targets.to(dtype).float(), **fields)
        for loss, reference in zip(losses, expected, strict=True):
            assert loss.dtype == torch.float32
            assert torch.equal(loss, reference)

    def test_does_not_synchronize(
        self, logits: Tensor, labels: Tensor, targets: Tensor, fields: dict[str, Any]
    ) -> None:
        loss = criterion(**fields)
        logits.requires_grad_()
        for progress in (0.0, 0.5):
            stage = loss.stage(progress)
            with HostReads():
                loss(logits, labels, stage).backward()
                loss.mixed(logits, targets, stage).backward()
                loss.share(labels[:3], labels, stage)

    def test_accepts_smoothing_as_a_tensor(
        self, logits: Tensor, labels: Tensor, targets: Tensor, fields: dict[str, Any]
    ) -> None:
        """Captured steps need changing values as tensors."""
        loss = criterion(**fields)
        stage = loss.stage(0.5)
        on_device = stage._replace(smoothing=torch.tensor(stage.smoothing))
        x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        expected, found = loss(x, labels, stage), loss(y, labels, on_device)
        assert torch.allclose(found, expected, rtol=1e-6, atol=0)
        assert torch.allclose(gradient(found, y), gradient(expected, x), rtol=1e-5, atol=1e-8)

    def test_is_the_weighted_sum_of_parts_of_a_batch(
        self, logits: Tensor, labels: Tensor, targets: Tensor, fields: dict[str, Any]
    ) -> None:
        loss = criterion(**fields)
        stage = loss.stage(0.9)
        parts = [slice(0, 3), slice(3, None)]
        hard_parts = sum(loss(logits[p], labels[p], stage) * loss.share(labels[p], labels, stage) for p in parts)
        assert torch.allclose(torch.as_tensor(hard_parts), loss(logits, labels, stage), rtol=1e-5)
        mixed_parts = sum(
            loss.mixed(logits[p], targets[p], stage) * loss.share(targets[p], targets, stage) for p in parts
        )
        assert torch.allclose(torch.as_tensor(mixed_parts), loss.mixed(logits, targets, stage), rtol=1e-5)

    @pytest.mark.gpu
    def test_does_not_synchronize_on_cuda(
        self, logits: Tensor, labels: Tensor, targets: Tensor, fields: dict[str, Any]
    ) -> None:
        loss = criterion(COUNTS.cuda(), **fields)
        logits, labels, targets = logits.cuda().requires_grad_(), labels.cuda(), targets.cuda()
        stage = loss.stage(0.5)
        gradient(loss(logits, labels, stage) + loss.mixed(logits, targets, stage), logits)
        with forbidden_waits(torch.device("cuda")):
            gradient(loss(logits, labels, stage) + loss.mixed(logits, targets, stage), logits)
