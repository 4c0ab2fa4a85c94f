"""Mixing of images and targets, with one draw per batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from core.augment import MixPlan, apply_mix, mixes, plan_mix, symmetric_beta
from core.config import AugmentConfig
from tests.core.augment_cases import generator


@pytest.mark.parametrize("alpha", [0.001, 0.1, 0.5, 1.0, 3.0, 10.0])
def test_symmetric_beta_has_its_mean_and_variance(alpha: float) -> None:
    rng = generator()
    draws = torch.tensor([symmetric_beta(alpha, rng) for _ in range(4000)], dtype=torch.float64)
    assert ((draws >= 0) & (draws <= 1)).all()
    assert float(draws.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(draws.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)


def test_mixup_is_the_weighted_mean_of_images_and_targets() -> None:
    images, labels = torch.randn(8, 3, 6, 6), torch.arange(8)
    mixed, targets = apply_mix(images, labels, 8, MixPlan(0.7), generator())
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    torch.testing.assert_close(mixed, torch.einsum("nk,kchw->nchw", targets, images))
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_cutmix_pastes_the_box_and_weights_targets_by_area() -> None:
    images, labels = torch.randn(8, 3, 10, 10), torch.arange(8)
    config, rng = AugmentConfig(cutmix=1.0), generator()
    plan = next(p for p in (plan_mix(config, rng, images.shape) for _ in range(99)) if p and 0.2 < p.keep < 0.8)
    assert isinstance(plan.box, tuple)
    top, bottom, left, right = plan.box
    mixed, targets = apply_mix(images, labels, 8, plan, generator())
    assert plan.keep == pytest.approx(1 - (bottom - top) * (right - left) / 100)
    for k in range(8):
        weights = targets[k]
        partner = int(weights.clone().index_fill_(0, torch.tensor([k]), 0).argmax()) if weights[k] < 0.99 else k
        expected = images[k].clone()
        expected[:, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
        assert torch.equal(mixed[k], expected)
        assert float(weights[k]) == pytest.approx(1.0 if partner == k else plan.keep)
        assert float(weights.sum()) == pytest.approx(1.0)


KEEPS = [0.0, 0.3, 0.5, 0.87, 1.0]


def on_device(keep: float, *box: int) -> MixPlan:
    """A plan as a captured step reads it."""
    return MixPlan(torch.tensor(keep), torch.tensor(box).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", KEEPS)
def test_mixup_accepts_tensors(keep: float, dtype: torch.dtype) -> None:
    images, labels = torch.randn(16, 3, 9, 7).to(dtype), torch.arange(16) % 5
    plans = MixPlan(keep), MixPlan(torch.tensor(keep)), on_device(keep, 0, 0, 0, 0)
    (number, its_targets), *tensors = (apply_mix(images, labels, 5, plan, generator()) for plan in plans)
    for mixed, targets in tensors:
        assert number.dtype == mixed.dtype == dtype
        assert targets.dtype == torch.float32
        torch.testing.assert_close(mixed, number, rtol=torch.finfo(dtype).eps, atol=torch.finfo(torch.float32).eps)
        torch.testing.assert_close(targets, its_targets, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("box", [(0, 9, 0, 7), (2, 5, 1, 4), (4, 4, 3, 3), (0, 1, 6, 7)])
def test_cutmix_accepts_tensors(box: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    images, labels = torch.randn(16, 3, 9, 7).to(dtype, memory_format=torch.channels_last), torch.arange(16) % 5
    keep = 1 - (box[1] - box[0]) * (box[3] - box[2]) / 63
    plans = MixPlan(keep, box), on_device(keep, *box)
    (number, its_targets), (tensor, targets) = (apply_mix(images, labels, 5, plan, generator()) for plan in plans)
    assert tensor.dtype == dtype
    assert torch.equal(tensor, number)
    assert tensor.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(targets, its_targets, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_all_changes_nothing(dtype: torch.dtype) -> None:
    images, labels = torch.randn(16, 3, 9, 7).to(dtype), torch.arange(16) % 5
    rngs = generator(), generator()
    same, its_labels = apply_mix(images, labels, 5, None, rngs[0])
    mixed, targets = apply_mix(images, labels, 5, on_device(1.0, 0, 0, 0, 0), rngs[1])
    assert same is images
    assert its_labels is labels
    assert torch.equal(mixed, images)
    assert torch.equal(targets, torch.nn.functional.one_hot(labels, 5).float())
    assert torch.equal(rngs[0].get_state(), rngs[1].get_state())


@pytest.mark.parametrize("keep", KEEPS)
def test_targets_do_not_depend_on_the_images_dtype(keep: float) -> None:
    images, labels = torch.randn(16, 3, 4, 4), torch.arange(16) % 5
    _, targets = apply_mix(images, labels, 5, MixPlan(keep), generator())
    _, of_half = apply_mix(images.bfloat16(), labels, 5, MixPlan(keep), generator())
    assert torch.equal(targets, of_half)


def test_partners_are_a_permutation_and_images_are_unchanged() -> None:
    images, labels = torch.randn(50, 1, 4, 4), torch.arange(50)
    before = images.clone()
    _, targets = apply_mix(images, labels, 50, MixPlan(0.25), generator())
    torch.testing.assert_close(targets.sum(0), torch.ones(50))
    assert torch.equal(images, before)


def test_mixing_within_a_class_keeps_the_label() -> None:
    images, labels = torch.randn(4, 1, 4, 4), torch.full((4,), 2)
    _, targets = apply_mix(images, labels, 3, MixPlan(0.3), generator())
    torch.testing.assert_close(targets, torch.tensor([[0.0, 0.0, 1.0]]).expand(4, 3))


@pytest.mark.parametrize(
    ("fields", "none", "cut"),
    [
        ({"mixup": 1.0}, 0.0, 0.0),
        ({"cutmix": 1.0}, 0.0, 1.0),
        ({"mixup": 0.2, "cutmix": 1.0}, 0.0, 0.5),
        ({"mixup": 0.2, "cutmix": 1.0, "mix_probability": 0.6}, 0.4, 0.5),
        ({"mix_probability": 1.0}, 1.0, 0.0),
    ],
)
def test_batches_are_mixed_with_the_configured_probabilities(fields: dict[str, Any], none: float, cut: float) -> None:
    config, rng = AugmentConfig(**fields), generator()
    plans = [plan_mix(config, rng, (8, 3, 32, 32)) for _ in range(2000)]
    mixed = [plan for plan in plans if plan]
    assert 1 - len(mixed) / 2000 == pytest.approx(none, abs=0.04)
    if mixed:
        assert sum(plan.box is not None for plan in mixed) / len(mixed) == pytest.approx(cut, abs=0.04)
        assert all(0 <= plan.keep <= 1 for plan in mixed)


def test_plans_depend_on_the_generator_alone() -> None:
    config = AugmentConfig(mixup=0.2, cutmix=1.0)
    first, again = ([plan_mix(config, rng, (8, 3, 32, 32)) for _ in range(20)] for rng in (generator(), generator()))
    assert first == again
    assert len({plan.keep for plan in first if plan}) > 10


@pytest.mark.parametrize(
    ("fields", "progress", "expected"),
    [
        ({}, 0.0, False),
        ({"mixup": 0.2}, 0.0, True),
        ({"cutmix": 1.0}, 0.99, True),
        ({"cutmix": 1.0, "mix_off_fraction": 0.5}, 0.49, True),
        ({"cutmix": 1.0, "mix_off_fraction": 0.5}, 0.5, False),
        ({"mixup": 1.0, "mix_off_fraction": 0.0}, 0.0, False),
        ({"mixup": 1.0, "mix_probability": 0.0}, 0.0, False),
    ],
)
def test_mixing_ends_at_its_fraction_of_the_run(fields: dict[str, Any], progress: float, expected: bool) -> None:
    assert mixes(AugmentConfig(**fields), progress) is expected
