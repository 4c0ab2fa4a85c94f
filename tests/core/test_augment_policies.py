"""Policies use torchvision's operations, ranges and tables, assigned to equal groups of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import AutoAugmentPolicy, InterpolationMode

from core.augment import geometry, operations, photometry, policies
from core.augment.operations import GEOMETRIC_OPS, OPS, PHOTOMETRIC_OPS, STANDARD, WIDE, Ranges
from core.augment.policies import AUTOAUGMENT_CIFAR10, SIX, Assignment, build_policy
from core.config import AugmentConfig
from core.runtime import normalize
from tests.core.augment_cases import CPU, MEAN, NOTHING, STD, build, generator, hard_cases, pictures, pixels_of

THEIRS: dict[str, tuple[Any, int]] = {
    "randaugment": (v2.RandAugment(interpolation=InterpolationMode.BILINEAR), 31),
    "trivialaugment": (v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR), 31),
    "autoaugment_cifar10": (
        v2.AutoAugment(AutoAugmentPolicy.CIFAR10, interpolation=InterpolationMode.BILINEAR), 10,
    ),
}  # fmt: skip
"""torchvision's transform and its number of magnitude bins."""
THEIRS["six"] = THEIRS["randaugment"]

SETTINGS: dict[str, dict[str, Any]] = {
    # Below 1, AutoContrast and Equalize are weaker than torchvision's.
    "randaugment": {"policy": "randaugment", "ops": 1, "strength": 1.0},
    "six": {"policy": "six", "ops": 1, "strength": 0.8},
    "trivialaugment": {"policy": "trivialaugment"},
    "autoaugment_cifar10": {"policy": "autoaugment_cifar10"},
}


def assign(slots: int, seed: int = 0, **fields: Any) -> list[Assignment]:
    return build_policy(AugmentConfig(**fields), CPU).assign([slots], generator(seed))


def operation_of(one: Assignment, slot: int) -> tuple[str, float]:
    """Return the operation assigned to an image, and its level."""
    names = [name for name, rows in one.rows.items() if slot in rows.tolist()]
    assert len(names) == 1
    return names[0], float(one.levels[slot])


def magnitude_of(policy: str, name: str, level: float, size: tuple[int, int]) -> float:
    """Return torchvision's magnitude of a level, interpolated between bins."""
    transform, bins = THEIRS[policy]
    row, signed = transform._AUGMENTATION_SPACE[name]
    magnitudes = row(bins, *size)
    if magnitudes is None:
        return 0.0
    place = abs(level) * (bins - 1)
    low = min(int(place + 1e-4), bins - 1)
    high = min(low + 1, bins - 1)
    magnitude = float(magnitudes[low])
    if place - low > 1e-4:
        magnitude += (place - low) * (float(magnitudes[high]) - magnitude)
    if name.startswith("Translate"):
        if policy == "trivialaugment":
            magnitude *= min(size[name == "TranslateX"] / 32, 1)  # ours ends at the image's side
        magnitude = round(magnitude, 4)  # linspace's 15.999999 is 16, and not cut to 15
    return -magnitude if signed and level < 0 else magnitude


def apply_theirs(policy: str, image: Tensor, name: str, level: float) -> Tensor:
    """Apply torchvision's operation to an image (C, H, W) uint8."""
    transform, _ = THEIRS[policy]
    magnitude = magnitude_of(policy, name, level, (image.shape[-2], image.shape[-1]))
    if name == "Solarize":
        magnitude *= 256 / 255  # ours counts from 256, as AutoAugment's paper does
    applied: Tensor = transform._apply_image_or_video_transform(
        image, name, magnitude, interpolation=InterpolationMode.BILINEAR, fill=transform._fill
    )
    return applied


# --- operations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [STANDARD, WIDE])
@pytest.mark.parametrize("name", list(PHOTOMETRIC_OPS))
@pytest.mark.parametrize("channels", [1, 3])
def test_level_0_is_the_identity(name: str, channels: int, ranges: Ranges) -> None:
    images = hard_cases(channels).float()
    assert torch.equal(PHOTOMETRIC_OPS[name](images, torch.zeros(len(images)), ranges), images)


@pytest.mark.parametrize("ranges", [STANDARD, WIDE])
@pytest.mark.parametrize("name", list(GEOMETRIC_OPS))
def test_level_0_is_the_identity_matrix(name: str, ranges: Ranges) -> None:
    for zero in (torch.zeros(1), -torch.zeros(1)):
        matrix = GEOMETRIC_OPS[name](zero, (20, 44), ranges)
        assert torch.equal(matrix, geometry.affine(zero))


@pytest.mark.parametrize("ranges", [STANDARD, WIDE])
@pytest.mark.parametrize("name", list(PHOTOMETRIC_OPS))
def test_operations_are_independent_per_image_and_keep_their_input(name: str, ranges: Ranges) -> None:
    images = hard_cases().float()
    before = images.clone()
    levels = torch.linspace(-1, 1, len(images))
    operation = PHOTOMETRIC_OPS[name]
    together = operation(images, levels, ranges)
    alone = torch.cat([operation(images[k : k + 1], levels[k : k + 1], ranges) for k in range(len(images))])
    assert torch.equal(images, before)
    assert (together - alone).abs().max() <= 1  # contrast's mean may round otherwise
    assert together.min() >= 0
    assert together.max() <= 255
    assert torch.equal(together, together.round())


@pytest.mark.parametrize(
    ("ranges", "policy", "bins"),
    [(STANDARD, "randaugment", 31), (STANDARD, "autoaugment_cifar10", 10), (WIDE, "trivialaugment", 31)],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_every_bin_of_every_range_matches_torchvision(
    ranges: Ranges, policy: str, bins: int, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strength 0.3 is RandAugment's default magnitude 9 of 30."""
    size = (64, 96)
    seen: dict[str, Tensor] = {}
    for function in ("brightness", "saturation", "contrast", "sharpness", "posterize", "solarize"):
        spy: Callable[..., None] = lambda _pixels, m, function=function: seen.update({function: m})  # noqa: E731
        monkeypatch.setattr(photometry, function, spy)
    levels = sign * torch.arange(bins) / (bins - 1)
    for operation in PHOTOMETRIC_OPS.values():
        operation(torch.zeros(bins, 3, 8, 8), levels, ranges)

    def theirs(name: str) -> Tensor:
        return torch.tensor([magnitude_of(policy, name, float(level), size) for level in levels])

    torch.testing.assert_close(seen["brightness"], 1 + theirs("Brightness"))
    torch.testing.assert_close(seen["saturation"], 1 + theirs("Color"))
    torch.testing.assert_close(seen["contrast"], 1 + theirs("Contrast"))
    torch.testing.assert_close(seen["sharpness"], 1 + theirs("Sharpness"))
    assert torch.equal(seen["posterize"], theirs("Posterize"))
    torch.testing.assert_close(seen["solarize"], 256 * theirs("Solarize"))
    matrices = {name: operation(levels, size, ranges) for name, operation in GEOMETRIC_OPS.items()}
    torch.testing.assert_close(matrices["ShearX"][:, 0, 1], theirs("ShearX"))
    torch.testing.assert_close(matrices["ShearY"][:, 1, 0], theirs("ShearY"))
    assert torch.equal(matrices["TranslateX"][:, 0, 2], -theirs("TranslateX").trunc())
    assert torch.equal(matrices["TranslateY"][:, 1, 2], -theirs("TranslateY").trunc())
    torch.testing.assert_close(matrices["Rotate"], geometry.rotation(theirs("Rotate")))


@pytest.mark.parametrize(("side", "pixels"), [(8, 8), (28, 28), (32, 32), (96, 32)])
def test_wide_shifts_are_32_pixels_within_the_image(side: int, pixels: int) -> None:
    assert WIDE.translate(side) == pixels


# --- policies against torchvision, image by image --------------------------------------------------------------------


def test_the_operations_match_torchvision() -> None:
    assert set(OPS) == set(v2.RandAugment._AUGMENTATION_SPACE) == set(v2.TrivialAugmentWide._AUGMENTATION_SPACE)
    assert {*GEOMETRIC_OPS, *PHOTOMETRIC_OPS} == set(v2.AutoAugment._AUGMENTATION_SPACE)
    assert set(operations.INTERPOLATED_OPS) < set(GEOMETRIC_OPS)


def test_autoaugments_table_matches_torchvision() -> None:
    assert list(AUTOAUGMENT_CIFAR10) == THEIRS["autoaugment_cifar10"][0]._policies


@pytest.mark.parametrize("policy", list(SETTINGS))
@pytest.mark.parametrize(("channels", "size"), [(3, (32, 32)), (1, (28, 28)), (3, (20, 44)), (3, (64, 64))])
def test_every_image_matches_torchvision(policy: str, channels: int, size: tuple[int, int]) -> None:
    """Its operations, one after the other, at the magnitudes of torchvision's table."""
    fields = SETTINGS[policy]
    count = 111  # not a multiple of any number of choices
    images = torch.cat([pictures(105, channels, *size), torch.zeros(2, channels, *size, dtype=torch.uint8)])
    images = torch.cat([images, torch.full((2, channels, *size), 77, dtype=torch.uint8), 255 - images[-2:]])
    out = pixels_of(build(channels, **NOTHING, **fields)(images, generator()))
    choices = build_policy(AugmentConfig(**fields), CPU).choices
    assignments = assign(-(-count // choices) * choices, **fields)  # the first random numbers of `Augment`
    for k, image in enumerate(images):
        expected, comparable = image, torch.full_like(image, 255)
        steps = [operation_of(one, k) for one in assignments]
        for name, level in steps:
            if level != 0 or policy == "trivialaugment":
                expected = apply_theirs(policy, expected, name, level)
                if name in GEOMETRIC_OPS:
                    comparable = apply_theirs(policy, comparable, name, level)
        wrong = (out[k].int() - expected.int()).abs() > 1
        if all(name in GEOMETRIC_OPS for name, _ in steps) and len(steps) > 1:
            wrong &= comparable == 255  # unless moved out of the image before
        # float32 rounds a few positions and thresholds differently.
        assert wrong.float().mean() < 0.01, (k, steps)


def test_only_one_sub_policy_shifts_after_a_colour_change() -> None:
    """The pipeline relies on this to apply geometry first."""
    late = [
        (first, second) for (first, *_), (second, *_) in AUTOAUGMENT_CIFAR10
        if first in PHOTOMETRIC_OPS and second in GEOMETRIC_OPS
    ]  # fmt: skip
    assert late == [("Color", "TranslateX")]


# --- assignment of operations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["randaugment", "six", "trivialaugment"])
def test_operations_are_assigned_to_equal_groups(policy: str) -> None:
    names = SIX if policy == "six" else OPS
    fields = {**SETTINGS[policy], "ops": 3}
    assignments = assign(5 * len(names), **fields)
    assert len(assignments) == (1 if policy == "trivialaugment" else 3)
    for one in assignments:
        assert {name: len(rows) for name, rows in one.rows.items()} == dict.fromkeys(names, 5)
        assert sorted(torch.cat(list(one.rows.values())).tolist()) == list(range(5 * len(names)))


@pytest.mark.parametrize("policy", list(SETTINGS))
def test_every_unit_is_divided_evenly(policy: str) -> None:
    fields = SETTINGS[policy]
    chosen = build_policy(AugmentConfig(**fields), CPU)
    units = [2 * chosen.choices, 2 * chosen.choices, chosen.choices]
    for one in chosen.assign(units, generator()):
        expected = {name: one.names.count(name) for name in one.names}
        for unit in range(len(units)):
            part = one.of_units(unit, unit + 1)
            times = units[unit] // chosen.choices
            assert {name: len(rows) for name, rows in part.rows.items()} == {k: times * n for k, n in expected.items()}
            assert sorted(part.order.tolist()) == list(range(units[unit]))
        for name, rows in one.rows.items():
            firsts = torch.tensor([0, units[0], 2 * units[0]])
            by_unit = [one.of_units(unit, unit + 1).rows[name] + firsts[unit] for unit in range(len(units))]
            assert sorted(rows.tolist()) == sorted(torch.cat(by_unit).tolist())


def test_every_operation_is_equally_likely_at_every_position() -> None:
    """On black pictures with one grey level, only `Solarize` at full strength creates white."""
    images = torch.full((5, 3, 8, 8), 10, dtype=torch.uint8)
    augment, rng = build(**NOTHING, ops=1, strength=1.0), generator()
    hits = torch.stack([pixels_of(augment(images, rng)).amax((1, 2, 3)) == 245 for _ in range(800)]).float()
    assert hits.mean(0).tolist() == pytest.approx([1 / 14] * 5, abs=0.03)


def test_randaugments_levels_are_its_strength_with_random_signs() -> None:
    levels = torch.cat([one.levels for one in assign(2800, ops=2, strength=0.3)])
    assert set(levels.abs().tolist()) == {torch.tensor(0.3).item()}
    assert float((levels > 0).float().mean()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("name", SIX)
def test_levels_of_six_are_uniform_up_to_the_strength(name: str) -> None:
    (one,) = assign(6 * 2000, policy="six", ops=1, strength=0.6)
    levels = one.level_of(name)
    assert levels.abs().max() <= 0.6
    counts = torch.histc(levels, bins=6, min=-0.6, max=0.6)
    assert counts.tolist() == pytest.approx([2000 / 6] * 6, abs=75)


@pytest.mark.parametrize("name", OPS)
def test_trivialaugments_levels_are_31_equally_likely_bins_with_random_signs(name: str) -> None:
    (one,) = assign(14 * 3100, policy="trivialaugment")
    levels = one.level_of(name)
    if name in policies.IN_FULL:
        assert torch.equal(levels, torch.ones(3100))
        return
    bins = levels.abs() * 30
    torch.testing.assert_close(bins, bins.round())
    counts = torch.bincount(bins.round().long(), minlength=31)
    assert counts.tolist() == pytest.approx([100] * 31, abs=45)
    assert float((levels > 0).float().mean()) == pytest.approx(0.5 * 30 / 31, abs=0.04)


def test_sub_policies_are_assigned_to_equal_groups() -> None:
    assignments = assign(25 * 4, policy="autoaugment_cifar10")
    held = [tuple(operation_of(one, k)[0] for one in assignments) for k in range(100)]
    expected = [tuple(name for name, _, _ in pair) for pair in AUTOAUGMENT_CIFAR10 for _ in range(4)]
    assert sorted(held) == sorted(expected)


def test_autoaugments_operations_are_independent_with_their_probabilities(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Uses groups in order, so that the images of each sub-policy are known."""
    share = 4000
    monkeypatch.setattr(policies, "shuffle", lambda units, _generator: torch.arange(*units))
    first, second = (one.levels.view(25, share) for one in assign(25 * share, policy="autoaugment_cifar10"))
    for k, pair in enumerate(AUTOAUGMENT_CIFAR10):
        for levels, (_name, probability, magnitude) in zip((first[k], second[k]), pair, strict=True):
            level = torch.tensor(1.0 if magnitude is None else magnitude / 9)
            allowed = {0.0, float(level), -float(level)}
            assert set(levels.tolist()) <= allowed
            if level > 0:
                assert float((levels != 0).float().mean()) == pytest.approx(probability, abs=0.03)
                assert float((levels > 0).float().mean()) == pytest.approx(probability / 2, abs=0.03)
        if all(magnitude != 0 for _, _, magnitude in pair):
            both = float(((first[k] != 0) & (second[k] != 0)).float().mean())
            assert both == pytest.approx(pair[0][1] * pair[1][1], abs=0.03)


def test_autoaugment_leaves_the_expected_fraction_of_images_unchanged() -> None:
    """On coloured noise without black and white, every operation changes an image.

    Two opposite shifts cancel each other, since all geometry of an image is one transformation.
    """
    picture = torch.randint(1, 255, (1, 3, 32, 32), dtype=torch.uint8, generator=generator(1))
    images = picture.expand(5000, -1, -1, -1)
    out = build(**NOTHING, policy="autoaugment_cifar10")(images, generator())
    alone = (out == normalize(images, MEAN, STD)).flatten(1).all(1).float().mean()
    expected = 0.0
    for pair in AUTOAUGMENT_CIFAR10:
        left = 1.0
        for _, probability, magnitude in pair:
            left *= 1 if magnitude == 0 else 1 - probability
        (name, probability, magnitude), (other, its_probability, its_magnitude) = pair
        if name == other and name in GEOMETRIC_OPS and magnitude == its_magnitude:
            left += probability * its_probability / 2
        expected += left / 25
    assert float(alone) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("policy", ["randaugment", "six"])
@pytest.mark.parametrize("ops", [1, 2, 4])
def test_strength_0_changes_nothing(policy: str, ops: int) -> None:
    images = hard_cases()
    out = build(**NOTHING, policy=policy, ops=ops, strength=0.0)(images, generator())
    assert torch.equal(out, normalize(images, MEAN, STD))


@pytest.mark.parametrize("policy", ["trivialaugment", "autoaugment_cifar10"])
def test_ops_and_strength_do_not_affect_other_policies(policy: str) -> None:
    images = pictures(60)
    plain = build(**NOTHING, policy=policy, ops=0, strength=0.0)(images, generator())
    other = build(**NOTHING, policy=policy, ops=3, strength=0.9)(images, generator())
    assert torch.equal(plain, other)
    assert not torch.equal(plain, normalize(images, MEAN, STD))


@pytest.mark.parametrize("policy", ["randaugment", "six"])
def test_images_differ_more_at_greater_strength(policy: str) -> None:
    images = pictures(112)
    change = [
        float(
            (
                build(**NOTHING, policy=policy, ops=2, strength=s)(images, generator()) - normalize(images, MEAN, STD)
            ).abs().mean()
        )
        for s in (0.1, 0.4, 1.0)
    ]  # fmt: skip
    assert change[0] < change[1] < change[2]


@pytest.mark.parametrize("policy", list(SETTINGS))
def test_shifts_stay_within_the_declared_reach(policy: str) -> None:
    """`geometry.shift` allocates memory for it."""
    for strength in (0.3, 1.0):
        for width in (8, 28, 33, 96):
            fields = {"ops": 2, **SETTINGS[policy], "strength": strength}
            dealer = build_policy(AugmentConfig(**fields), CPU)
            moves = torch.zeros(dealer.choices * 40)
            for one in dealer.assign([len(moves)], generator()):
                if "TranslateX" in one.rows:
                    step = GEOMETRIC_OPS["TranslateX"](one.level_of("TranslateX"), (width, width), dealer.ranges)
                    moves[one.rows["TranslateX"]] += step[:, 0, 2]
            assert moves.abs().max() <= dealer.reach(width)
            if policy != "six":  # rarely draws the last pixel
                assert moves.abs().max() >= dealer.reach(width) // 2
