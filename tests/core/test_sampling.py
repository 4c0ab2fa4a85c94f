"""What an epoch visits."""

from __future__ import annotations

import pytest
import torch

from core.config import SamplingConfig
from core.sampling import epoch_order

LABELS = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)


def order(name: str, seed: int = 0, labels: torch.Tensor = LABELS) -> torch.Tensor:
    return epoch_order(labels, SamplingConfig(name=name), torch.Generator().manual_seed(seed))


def test_shuffled_visits_every_image_once() -> None:
    positions = order("shuffled")
    assert torch.equal(positions.sort().values, torch.arange(len(LABELS)))
    assert not torch.equal(positions, torch.arange(len(LABELS)))


def test_balanced_draws_every_class_equally_often() -> None:
    drawn = torch.cat([LABELS[order("balanced", seed)] for seed in range(30)])  # 30,000 draws
    shares = torch.bincount(drawn).double() / len(drawn)
    # Three standard errors of a share of 1/3 in 30,000 draws: 3 · sqrt(2/9 / 30,000) = 0.008
    assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=0.0082)


def test_balanced_draws_the_images_of_a_class_equally_often() -> None:
    drawn = torch.cat([order("balanced", seed) for seed in range(100)])
    counts = torch.bincount(drawn, minlength=len(LABELS))[-10:].double()  # the rare class: 3,333 draws an image
    assert counts.tolist() == pytest.approx([counts.mean().item()] * 10, rel=0.07)


@pytest.mark.parametrize("name", ["shuffled", "balanced"])
class TestEveryOrder:
    def test_is_as_long_as_the_training_set(self, name: str) -> None:
        positions = order(name)
        assert positions.shape == LABELS.shape
        assert positions.dtype == torch.int64
        assert positions.min() >= 0
        assert positions.max() < len(LABELS)

    def test_follows_from_the_generator_alone(self, name: str) -> None:
        torch.manual_seed(1)
        first = order(name, seed=7)
        torch.manual_seed(2)
        assert torch.equal(first, order(name, seed=7))
        assert not torch.equal(first, order(name, seed=8))

    def test_leaves_the_global_generator_alone(self, name: str) -> None:
        before = torch.get_rng_state()
        order(name)
        assert torch.equal(before, torch.get_rng_state())


def test_balanced_is_indifferent_to_a_set_that_is_balanced_already() -> None:
    labels = torch.arange(4).repeat(5000)
    shares = torch.bincount(labels[order("balanced", labels=labels)]).double() / len(labels)
    assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["shuffled", "balanced"])
def test_the_device_is_never_waited_for(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    labels = LABELS.cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    epoch_order(labels, SamplingConfig(name=name), generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        positions = epoch_order(labels, SamplingConfig(name=name), generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert positions.device == labels.device
