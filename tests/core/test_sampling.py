"""Visits of classes and images per epoch, their order, and repeats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import WeightedRandomSampler

from core.config import SamplingConfig
from core.errors import ConfigError
from core.sampling import class_caps, epoch_length, epoch_order, repeats
from tests.core.trainings import forbidden_waits

LABELS = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)

# Two of nine classes dominate, in random order.
IMAGES = (1000, 850, 400, 150, 90, 70, 50, 21, 3)
IMBALANCED = torch.cat([torch.full((n,), c) for c, n in enumerate(IMAGES)])
IMBALANCED = IMBALANCED[torch.randperm(len(IMBALANCED), generator=torch.Generator().manual_seed(0))]

# (oversample, undersample) -> visits per class: min(k · n, s · 1000).
VISITS = {
    (7, 0.8): (800, 800, 800, 800, 630, 490, 350, 147, 21),
    (12, 0.6): (600, 600, 600, 600, 600, 600, 600, 252, 36),
    (7, 1.0): (1000, 1000, 1000, 1000, 630, 490, 350, 147, 21),
    (1, 0.6): (600, 600, 400, 150, 90, 70, 50, 21, 3),
    (1, 0.0001): (1,) * 9,
    (100, 1.0): (1000,) * 7 + (1000, 300),
}

CONFIGS = [
    SamplingConfig(name=name, oversample=oversample, undersample=undersample)
    for name in ("shuffled", "balanced")
    for oversample, undersample in ((1, 1.0), *VISITS)
]


def order(config: SamplingConfig, seed: int = 0, labels: Tensor = LABELS) -> Tensor:
    """Draw an epoch's order with that seed."""
    return epoch_order(labels, config, torch.Generator().manual_seed(seed), epoch_length(labels, config))


# ---- shuffled


@pytest.mark.parametrize("seed", [0, 1])
def test_shuffled_equals_torchs_permutation(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    assert torch.equal(order(SamplingConfig(), seed), torch.randperm(len(LABELS), generator=generator))


def test_shuffled_does_not_use_the_classes() -> None:
    labels = torch.tensor([70, 3, 99])  # more classes than images
    assert order(SamplingConfig(), labels=labels).sort().values.tolist() == [0, 1, 2]


@pytest.mark.parametrize("setting", VISITS)
@pytest.mark.parametrize("seed", range(3))
def test_visits_are_spread_evenly_over_the_images_of_a_class(setting: tuple[int, float], seed: int) -> None:
    config = SamplingConfig(oversample=setting[0], undersample=setting[1])
    times = torch.bincount(order(config, seed, IMBALANCED), minlength=len(IMBALANCED))
    for label, (images, visits) in enumerate(zip(IMAGES, VISITS[setting], strict=True)):
        whole, rest = divmod(visits, images)
        of_class = times[torch.eq(IMBALANCED, label)].sort().values
        assert of_class.tolist() == [whole] * (images - rest) + [whole + 1] * rest


def test_no_image_is_shown_more_often_than_oversample() -> None:
    for oversample in (1, 2, 7, 12):
        config = SamplingConfig(oversample=oversample, undersample=0.8)
        assert torch.bincount(order(config, labels=IMBALANCED)).max() == oversample


def test_balanced_classes_are_neither_repeated_nor_cut() -> None:
    labels = torch.arange(4).repeat(50)
    visited = order(SamplingConfig(oversample=7), labels=labels)
    assert torch.equal(visited.sort().values, torch.arange(200))


def test_a_cut_class_is_shown_completely_over_several_epochs() -> None:
    config = SamplingConfig(undersample=0.6)
    generator = torch.Generator().manual_seed(0)
    epochs = [epoch_order(LABELS, config, generator, epoch_length(LABELS, config)) for _ in range(200)]
    shown = torch.stack([torch.bincount(epoch, minlength=len(LABELS)) for epoch in epochs])  # (200, n)
    assert not torch.equal(shown[0], shown[1])
    # 0.6 of 200 epochs show an image of the cut class; four standard errors are 4 · sqrt(200 · 0.24) = 28, and of
    # 900 images a few may be further off.
    times = shown[:, LABELS == 0].sum(0).double()
    assert times.mean().item() == pytest.approx(120)
    assert ((times - 120).abs() < 28).double().mean() > 0.99
    assert (shown[:, LABELS != 0] == 1).all()


def test_additional_repeats_vary_between_epochs() -> None:
    config = SamplingConfig(oversample=7)
    labels = torch.tensor([0] * 90 + [1] * 60)  # 60 images have 90 visits: half of them are shown twice
    more = [torch.bincount(order(config, seed, labels))[90:] == 2 for seed in range(2)]
    assert [int(images.sum()) for images in more] == [30, 30]
    assert not torch.equal(more[0], more[1])


def test_the_order_is_random() -> None:
    config = SamplingConfig(oversample=7, undersample=0.8)
    visited = IMBALANCED[order(config, labels=IMBALANCED)]
    halves = [torch.bincount(half, minlength=9)[:4].double() for half in visited.chunk(2)]
    # Each of the four largest classes has 800 visits: about 400 fall in either half, ± 4 · sqrt(800 / 4) = 57.
    for half in halves:
        assert half.tolist() == pytest.approx([400] * 4, abs=57)
    # Repeats are not consecutive: one in about 5,000 pairs is equal.
    positions = order(config, labels=IMBALANCED)
    assert (positions[1:] == positions[:-1]).double().mean() < 0.01


# ---- balanced


def test_balanced_draws_every_class_equally_often() -> None:
    drawn = torch.cat([LABELS[order(SamplingConfig(name="balanced"), seed)] for seed in range(30)])  # 30,000 draws
    shares = torch.bincount(drawn).double() / len(drawn)
    # Three standard errors of a share of 1/3 in 30,000 draws: 3 · sqrt(2/9 / 30,000) = 0.008
    assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=0.0082)


def test_balanced_draws_the_images_of_a_class_equally_often() -> None:
    drawn = torch.cat([order(SamplingConfig(name="balanced"), seed) for seed in range(100)])
    counts = torch.bincount(drawn, minlength=len(LABELS))[-10:].double()  # the rare class: 3,333 draws per image
    assert counts.tolist() == pytest.approx([counts.mean().item()] * 10, rel=0.07)


def test_balanced_matches_torchs_weighted_random_sampler() -> None:
    config = SamplingConfig(name="balanced", oversample=7, undersample=0.8)
    ours = torch.cat([order(config, seed, IMBALANCED) for seed in range(20)])
    weights = 1 / torch.bincount(IMBALANCED)[IMBALANCED].double()
    sampler = WeightedRandomSampler(weights.tolist(), len(ours), generator=torch.Generator().manual_seed(0))
    theirs = torch.tensor(list(sampler))
    assert len(ours) == 20 * sum(VISITS[7, 0.8])
    ours_shares, theirs_shares = (torch.bincount(IMBALANCED[drawn]).double() / len(drawn) for drawn in (ours, theirs))
    # Four standard errors of the difference of two shares of 1/9 in 96,760 draws: 4 · sqrt(2 · 8/81 / 96,760) = 0.0057
    assert ours_shares.tolist() == pytest.approx(theirs_shares.tolist(), abs=0.0057)


def test_balanced_draws_a_balanced_set_uniformly() -> None:
    labels = torch.arange(4).repeat(5000)
    shares = torch.bincount(labels[order(SamplingConfig(name="balanced"), labels=labels)]).double() / len(labels)
    assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.01)


# ---- caps of named classes

NAMES = tuple("abcdefghi")


@pytest.mark.parametrize(
    ("config", "visits"),
    [
        (SamplingConfig(caps={"a": 0.8, "b": 0.8}), (800, 680, 400, 150, 90, 70, 50, 21, 3)),  # type: ignore[arg-type]
        (SamplingConfig(caps={"a": 300, "d": 40}), (300, 850, 400, 40, 90, 70, 50, 21, 3)),  # type: ignore[arg-type]
        # The largest class is then the second.
        (
            SamplingConfig(oversample=7, caps={"a": 0.5}),  # type: ignore[arg-type]
            (500, 850, 850, 850, 630, 490, 350, 147, 21),
        ),
        (
            SamplingConfig(oversample=7, undersample=0.5, caps=(("a", 0.8), ("i", 5))),
            (425, 425, 425, 425, 425, 425, 350, 147, 5),
        ),
        (SamplingConfig(caps={"i": 0.01}), (*IMAGES[:-1], 1)),  # type: ignore[arg-type]
    ],
)
def test_caps_limit_the_visits_of_named_classes(config: SamplingConfig, visits: tuple[int, ...]) -> None:
    caps = class_caps(IMBALANCED, config, NAMES)
    length = epoch_length(IMBALANCED, config, caps)
    generator = torch.Generator().manual_seed(0)
    epochs = [epoch_order(IMBALANCED, config, generator, length, caps) for _ in range(6)]
    for epoch in epochs:
        assert torch.bincount(IMBALANCED[epoch]).tolist() == list(visits)
    assert len({tuple(epoch.unique().tolist()) for epoch in epochs}) > 1, "other images are left out"


def test_an_unknown_class_of_caps_is_refused_with_the_list() -> None:
    config = SamplingConfig(caps={"a": 5, "z": 0.5})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"sampling.caps: z is no class of the data; its classes are a, b, c, d,"):
        class_caps(IMBALANCED, config, NAMES)


@pytest.mark.parametrize(
    ("caps", "message"),
    [((("a", 1), ("a", 2)), "names a twice"), ({"a": 2.5}, "a has 2.5"), ({"a": 0}, "greater than 0")],
)
def test_invalid_caps_are_refused(caps: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SamplingConfig(caps=caps)


def test_drawing_with_caps_does_not_synchronize() -> None:
    config = SamplingConfig(oversample=7, caps={"a": 0.5})  # type: ignore[arg-type]
    caps = class_caps(IMBALANCED, config, NAMES)
    length = epoch_length(IMBALANCED, config, caps)
    with FakeTensorMode():  # reading a meta tensor raises
        labels, its_caps = (torch.zeros(len(IMBALANCED), dtype=torch.int64) for _ in range(2))
        generator = torch.Generator().manual_seed(0)
        assert epoch_order(labels, config, generator, length, its_caps).shape == (length,)


# ---- every order


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.name}-{c.oversample}-{c.undersample}")
class TestEveryOrder:
    def test_has_the_length_of_epoch_length(self, config: SamplingConfig) -> None:
        visits = VISITS.get((config.oversample, config.undersample), IMAGES)
        assert epoch_length(IMBALANCED, config) == sum(visits)
        positions = order(config, labels=IMBALANCED)
        assert positions.shape == (sum(visits),)
        assert positions.dtype == torch.int64
        assert positions.min() >= 0
        assert positions.max() < len(IMBALANCED)

    def test_depends_on_the_generator_alone(self, config: SamplingConfig) -> None:
        torch.manual_seed(1)
        first = order(config, seed=7)
        torch.manual_seed(2)
        assert torch.equal(first, order(config, seed=7))
        assert not torch.equal(first, order(config, seed=8))

    def test_does_not_use_the_global_generator(self, config: SamplingConfig) -> None:
        before = torch.get_rng_state()
        order(config)
        assert torch.equal(before, torch.get_rng_state())

    def test_does_not_synchronize(self, config: SamplingConfig) -> None:
        length, generator = epoch_length(IMBALANCED, config), torch.Generator().manual_seed(0)
        with FakeTensorMode():  # reading a meta tensor raises
            positions = epoch_order(torch.zeros(len(IMBALANCED), dtype=torch.int64), config, generator, length)
            assert positions.shape == repeats(positions).shape == (length,)

    @pytest.mark.gpu
    def test_does_not_synchronize_on_cuda(self, config: SamplingConfig) -> None:
        labels = IMBALANCED.cuda()
        generator = torch.Generator("cuda").manual_seed(0)
        length = epoch_length(labels, config)
        repeats(epoch_order(labels, config, generator, length))
        with forbidden_waits(torch.device("cuda")):
            positions = epoch_order(labels, config, generator, length)
            again = repeats(positions)
        assert positions.device == again.device == labels.device
        assert positions.shape == again.shape == (length,)


# ---- repeats


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([3, 1, 3, 0, 1, 3], [False, False, True, False, True, True]),
        ([2, 0, 1], [False, False, False]),
        ([5, 5, 5], [False, True, True]),
        ([0], [False]),
    ],
)
def test_repeats_are_visits_after_the_first(positions: list[int], expected: list[bool]) -> None:
    again = repeats(torch.tensor(positions))
    assert again.dtype == torch.bool
    assert again.tolist() == expected


@pytest.mark.parametrize("name", ["shuffled", "balanced"])
def test_repeats_match_a_plain_loop(name: str) -> None:
    positions = order(SamplingConfig(name=name, oversample=7, undersample=0.8), labels=IMBALANCED)  # type: ignore[arg-type]
    seen: set[int] = set()
    expected = []
    for position in positions.tolist():
        expected.append(position in seen)
        seen.add(position)
    assert repeats(positions).tolist() == expected


def test_a_plain_epoch_has_no_repeats() -> None:
    assert not repeats(order(SamplingConfig())).any()
