"""Augmentation: every operation is torchvision's, every image draws its own, and nothing waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from core import augment as A
from core.augment import Augment, MixPlan, symmetric_beta
from core.config import AugmentConfig
from core.runtime import normalize

CPU = torch.device("cpu")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
NOTHING: dict[str, Any] = {"flip": 0.0, "crop_pad_fraction": 0.0}
EVERYTHING: dict[str, Any] = {
    "flip": 0.5,
    "vertical_flip": 0.5,
    "crop_pad_fraction": 0.125,
    "color_jitter": 0.4,
    "ops": 2,
    "strength": 0.5,
    "erase": 0.5,
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, channels: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """(N, C, H, W) uint8: smooth shapes of differing contrast with a little noise, as photographs have."""
    rng = generator(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=rng) * torch.rand(count, 1, 1, 1, generator=rng)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return ((smooth + 0.03 * torch.randn(smooth.shape, generator=rng) + 0.2).clamp(0, 1) * 255).to(torch.uint8)


def hard_cases(channels: int = 3) -> Tensor:
    """(N, C, 32, 32) uint8: pictures, all levels at random, flat ones, two levels only, black and white."""
    noise = torch.randint(0, 256, (2, channels, 32, 32), dtype=torch.uint8, generator=generator(1))
    flat = torch.full((1, channels, 32, 32), 77, dtype=torch.uint8)
    two = torch.where(noise[:1] > 200, 90, 60).to(torch.uint8)
    return torch.cat([pictures(4, channels), noise, flat, two, torch.zeros_like(flat), torch.full_like(flat, 255)])


def build(channels: int = 3, **fields: Any) -> Augment:
    return Augment(AugmentConfig(**fields), MEAN[:channels], STD[:channels], CPU)


def pixels_of(out: Tensor) -> Tensor:
    """Undoes the normalisation: (N, C, H, W) uint8."""
    channels = out.shape[1]
    mean = torch.tensor(MEAN[:channels]).view(1, -1, 1, 1)
    std = torch.tensor(STD[:channels]).view(1, -1, 1, 1)
    return ((out * std + mean) * 255).round().to(torch.uint8)


def each(function: Callable[[Tensor, float], Tensor], images: Tensor, magnitudes: Tensor) -> Tensor:
    """torchvision's function image by image, each with its own magnitude."""
    return torch.stack([function(image, float(m)) for image, m in zip(images, magnitudes, strict=True)])


# --- photometric operations, one by one ---------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (A.brightness, tv.adjust_brightness),
        (A.contrast, tv.adjust_contrast),
        (A.saturation, tv.adjust_saturation),
        (A.sharpness, tv.adjust_sharpness),
    ],
)
def test_factors_are_torchvisions_within_a_level_in_a_thousandth_of_the_pixels(
    ours: Callable[[Tensor, Tensor], Tensor], theirs: Callable[[Tensor, float], Tensor], channels: int
) -> None:
    images = hard_cases(channels)
    for shift in range(4):
        # Uneven factors: at 0.3, a tenth of the exact results are whole, and rounding decides which side they fall.
        factors = torch.linspace(0.1037, 1.8911, len(images)).roll(3 * shift)
        difference = (ours(images.float(), factors) - each(theirs, images, factors).float()).abs()
        assert difference.max() <= 1
        # A flat picture may go as a whole: 77 × f + 77 × (1 - f) is 77 or a hair less.
        assert (difference[:6] > 0).float().mean() < 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_posterize_is_torchvisions_exactly(channels: int) -> None:
    images = hard_cases(channels)
    bits = torch.arange(len(images)) % 9
    expected = each(lambda image, b: tv.posterize(image, int(b)), images, bits)
    torch.testing.assert_close(A.posterize(images.float(), bits.float()), expected.float(), rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_solarize_is_torchvisions_exactly(channels: int) -> None:
    images = hard_cases(channels)
    thresholds = torch.linspace(0, 255, len(images))
    expected = each(tv.solarize, images, thresholds)
    torch.testing.assert_close(A.solarize(images.float(), thresholds), expected.float(), rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("ours", "theirs"), [(A.autocontrast, tv.autocontrast), (A.equalize, tv.equalize)])
def test_autocontrast_and_equalize_are_torchvisions_exactly_at_full_amount(
    ours: Callable[[Tensor, Tensor], Tensor], theirs: Callable[[Tensor], Tensor], channels: int
) -> None:
    images = hard_cases(channels)
    torch.testing.assert_close(ours(images.float(), torch.ones(len(images))), theirs(images).float(), rtol=0, atol=0)


@pytest.mark.parametrize("operation", [A.autocontrast, A.equalize])
def test_half_the_amount_goes_half_the_way(operation: Callable[[Tensor, Tensor], Tensor]) -> None:
    images = hard_cases().float()
    full = operation(images, torch.ones(len(images)))
    half = operation(images, torch.full((len(images),), 0.5))
    assert (half - (images + full) / 2).abs().max() <= 0.5


@pytest.mark.parametrize("name", list(A.PHOTOMETRIC_OPS))
@pytest.mark.parametrize("channels", [1, 3])
def test_level_0_changes_no_bit(name: str, channels: int) -> None:
    images = hard_cases(channels).float()
    assert torch.equal(A.PHOTOMETRIC_OPS[name](images, torch.zeros(len(images))), images)


@pytest.mark.parametrize("name", list(A.PHOTOMETRIC_OPS))
def test_an_operation_does_not_depend_on_the_rest_of_the_batch_and_leaves_its_input_alone(name: str) -> None:
    images = hard_cases().float()
    before = images.clone()
    levels = torch.linspace(-1, 1, len(images))
    together = A.PHOTOMETRIC_OPS[name](images, levels)
    alone = torch.cat([A.PHOTOMETRIC_OPS[name](images[k : k + 1], levels[k : k + 1]) for k in range(len(images))])
    assert torch.equal(images, before)
    assert (together - alone).abs().max() <= 1  # contrast's mean may round otherwise
    assert together.min() >= 0
    assert together.max() <= 255
    assert torch.equal(together, together.round())


def test_saturation_does_nothing_to_greyscale() -> None:
    images = hard_cases(1).float()
    assert torch.equal(A.saturation(images, torch.zeros(len(images))), images)


# --- geometric operations, one by one -----------------------------------------------------------------------------


def tv_affine(image: Tensor, *, shear: tuple[float, float], center: list[float] | None) -> Tensor:
    degrees = [float(torch.rad2deg(torch.atan(torch.tensor(s)))) for s in shear]
    return tv.affine(
        image, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=center,
        interpolation=v2.InterpolationMode.BILINEAR,
    )  # fmt: skip


@pytest.mark.parametrize("size", [(32, 32), (20, 44)])
@pytest.mark.parametrize("channels", [1, 3])
def test_rotation_is_torchvisions_within_a_level(size: tuple[int, int], channels: int) -> None:
    images = pictures(12, channels, *size)
    degrees = torch.linspace(-180, 180, 12)
    rotate = lambda image, angle: tv.rotate(image, angle, v2.InterpolationMode.BILINEAR)  # noqa: E731
    assert_same_geometry(A.warp(images, A.rotation(degrees)), each(rotate, images, degrees))


@pytest.mark.parametrize("size", [(32, 32), (20, 44)])
def test_shears_are_randaugments_within_a_level(size: tuple[int, int]) -> None:
    images = pictures(9, 3, *size)
    slopes = torch.linspace(-0.3, 0.3, 9)
    along_x = each(lambda image, s: tv_affine(image, shear=(s, 0.0), center=[0, 0]), images, slopes)
    along_y = each(lambda image, s: tv_affine(image, shear=(0.0, s), center=[0, 0]), images, slopes)
    assert_same_geometry(A.warp(images, A.shear_x(slopes, size)), along_x)
    assert_same_geometry(A.warp(images, A.shear_y(slopes, size)), along_y)


def assert_same_geometry(ours: Tensor, theirs: Tensor) -> None:
    """Within a level, but for the few pixels whose place float32 puts on either side of the border."""
    difference = (ours - theirs.float()).abs()
    assert (difference > 1).float().mean() < 1e-3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (15, 22)])
def test_shifts_and_flips_are_exact_copies(size: tuple[int, int], channels: int) -> None:
    images = pictures(6, channels, *size)
    x = torch.tensor([0.0, 3.0, -3.0, 1.0, 8.0, -25.0])
    y = torch.tensor([0.0, -2.0, 7.0, 40.0, 0.0, 1.0])
    flip_x, flip_y = torch.tensor([1.0, -1, 1, -1, -1, 1]), torch.tensor([1.0, 1, -1, -1, 1, 1])
    moved = A.affine(x, x=-x, y=-y)
    matrices = A.then(moved, A.affine(x, a=flip_x, d=flip_y))
    ours = A.shift(images, torch.arange(6), matrices, reach=25, mirrored=True)
    for k, image in enumerate(images):
        expected = tv.affine(image, angle=0.0, translate=[int(x[k]), int(y[k])], scale=1.0, shear=[0.0, 0.0])
        expected = expected.flip(-1) if flip_x[k] < 0 else expected
        expected = expected.flip(-2) if flip_y[k] < 0 else expected
        assert torch.equal(ours[k], expected)
    interpolated = A.warp(images, matrices)
    assert torch.equal(interpolated, ours.float()), "both ways read matrices alike"


def test_matrices_compose_in_the_order_of_the_images() -> None:
    images = pictures(5)
    degrees = torch.linspace(-170, 170, 5)
    turned = A.rotation(torch.full((5,), 90.0))
    once = A.warp(images, A.then(turned, A.rotation(degrees)))
    twice = A.warp(A.warp(images, turned), A.rotation(degrees))
    assert_same_geometry(once, twice)
    moved = A.then(A.translate_x(torch.full((5,), 4.0)), turned)
    expected = torch.rot90(torch.nn.functional.pad(images, (4, 0))[..., :32], dims=(-2, -1))
    assert_same_geometry(A.warp(images, moved), expected)


# --- RandAugment ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1.0, 0.3, -0.3, -1.0])
def test_ranges_are_torchvisions(level: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strength 1 is the last of torchvision's 31 bins and 0.3 its magnitude 9, the default."""
    space = v2.RandAugment._AUGMENTATION_SPACE
    assert set(A.OPS) == set(space)

    def theirs(name: str) -> float:
        return float(space[name][0](31, 64, 96)[round(abs(level) * 30)])

    sign = 1 if level > 0 else -1
    levels, seen = torch.tensor([level]), {}
    for function in ("brightness", "saturation", "contrast", "sharpness", "posterize", "solarize"):
        monkeypatch.setattr(A, function, lambda _pixels, m, function=function: seen.update({function: float(m)}))
    for operation in A.PHOTOMETRIC_OPS.values():
        operation(pictures(1).float(), levels)
    assert seen["brightness"] == pytest.approx(1 + sign * theirs("Brightness"))
    assert seen["saturation"] == pytest.approx(1 + sign * theirs("Color"))
    assert seen["contrast"] == pytest.approx(1 + sign * theirs("Contrast"))
    assert seen["sharpness"] == pytest.approx(1 + sign * theirs("Sharpness"))
    assert seen["posterize"] == theirs("Posterize")
    assert seen["solarize"] == pytest.approx(255 * theirs("Solarize"), abs=1)
    matrices = {name: operation(levels, (64, 96))[0] for name, operation in A.GEOMETRIC_OPS.items()}
    assert matrices["ShearX"][0, 1] == pytest.approx(sign * theirs("ShearX"))
    assert matrices["ShearY"][1, 0] == pytest.approx(sign * theirs("ShearY"))
    assert matrices["TranslateX"][0, 2] == -sign * int(theirs("TranslateX"))
    assert matrices["TranslateY"][1, 2] == -sign * int(theirs("TranslateY"))
    torch.testing.assert_close(matrices["Rotate"], A.rotation(torch.tensor([sign * theirs("Rotate")]))[0])


def test_every_image_gets_one_whole_operation_and_each_operation_its_equal_share() -> None:
    picture = pictures(1)
    count = 4 * len(A.OPS)
    images = picture.expand(count, -1, -1, -1)
    out = pixels_of(build(**NOTHING, ops=1, strength=1.0)(images, generator()))
    candidates = {}
    for sign in (-1.0, 1.0):
        level = torch.tensor([sign])
        for name, geometric in A.GEOMETRIC_OPS.items():
            candidates[name, sign] = A.warp(picture, geometric(level, (32, 32)))[0]
        for name, photometric in A.PHOTOMETRIC_OPS.items():
            candidates[name, sign] = photometric(picture.float(), level)[0]
    candidates["Identity", 1.0] = picture[0].float()
    drawn = []
    for image in out:
        distance = {key: float((image.float() - want).abs().max()) for key, want in candidates.items()}
        key = min(distance, key=distance.__getitem__)
        assert distance[key] <= 1
        drawn.append(key)
    for name in A.OPS:
        assert [key[0] for key in drawn].count(name) == 4
    assert {sign for name, sign in drawn if name == "Rotate"} | {s for n, s in drawn if n == "Color"} == {-1.0, 1.0}


def test_every_operation_is_equally_likely_at_every_place_of_a_batch() -> None:
    """Black pictures with one grey level: only `Solarize` at full strength makes them bright, by 255."""
    images = torch.full((5, 3, 8, 8), 10, dtype=torch.uint8)
    augment, rng = build(**NOTHING, ops=1, strength=1.0), generator()
    hits = torch.stack([pixels_of(augment(images, rng)).amax((1, 2, 3)) == 245 for _ in range(800)]).float()
    assert hits.mean(0).tolist() == pytest.approx([1 / 14] * 5, abs=0.03)


@pytest.mark.parametrize("ops", [1, 2, 4])
def test_strength_0_changes_nothing(ops: int) -> None:
    images = hard_cases()
    out = build(**NOTHING, ops=ops, strength=0.0)(images, generator())
    assert torch.equal(out, normalize(images, MEAN, STD))


def test_images_differ_more_at_greater_strength() -> None:
    images = pictures(112)
    change = [
        float((build(**NOTHING, ops=2, strength=s)(images, generator()) - normalize(images, MEAN, STD)).abs().mean())
        for s in (0.1, 0.4, 1.0)
    ]
    assert change[0] < change[1] < change[2]


# --- the whole -----------------------------------------------------------------------------------------------------


def test_everything_off_is_normalisation_to_the_bit() -> None:
    images = hard_cases()
    assert torch.equal(build(**NOTHING)(images, generator()), normalize(images, MEAN, STD))


def test_certain_flips_flip() -> None:
    images = pictures(5)
    across = build(flip=1.0, crop_pad_fraction=0.0)(images, generator())
    down = build(flip=0.0, vertical_flip=1.0, crop_pad_fraction=0.0)(images, generator())
    torch.testing.assert_close(across, normalize(images.flip(-1), MEAN, STD))
    torch.testing.assert_close(down, normalize(images.flip(-2), MEAN, STD))


def test_flips_come_as_often_as_asked() -> None:
    images = pictures(1).expand(2000, -1, -1, -1)
    out = build(flip=0.3, crop_pad_fraction=0.0)(images, generator())
    flipped = (out - normalize(images, MEAN, STD)).abs().amax((1, 2, 3)) > 0.1
    assert float(flipped.float().mean()) == pytest.approx(0.3, abs=0.04)


def test_crops_are_torchvisions_crops_all_equally_likely() -> None:
    picture = pictures(1, height=16, width=24)
    out = pixels_of(build(flip=0.0, crop_pad_fraction=0.125)(picture.expand(3500, -1, -1, -1), generator()))
    padded = tv.pad(picture[0], [3, 2])
    crops = {(y, x): tv.crop(padded, y, x, 16, 24) for y in range(5) for x in range(7)}
    counts = [int((out == crop).flatten(1).all(1).sum()) for crop in crops.values()]
    assert sum(counts) == 3500
    assert min(counts) > 50
    assert max(counts) < 160


def test_rotation_leaves_a_round_picture_and_stays_within_its_range() -> None:
    y, x = torch.meshgrid(torch.arange(33) - 16, torch.arange(33) - 16, indexing="ij")
    round_picture = (200 * torch.exp(-(x**2 + y**2) / 60)).to(torch.uint8).expand(64, 3, 33, 33)
    out = pixels_of(build(**NOTHING, rotation_degrees=180.0)(round_picture, generator()))
    assert (out.float() - round_picture.float()).abs().max() <= 4
    bar = torch.zeros(200, 3, 33, 33, dtype=torch.uint8)
    bar[:, :, 16, 16:] = 255
    turned = pixels_of(build(**NOTHING, rotation_degrees=30.0)(bar, generator()))[:, 0].float()
    angle = torch.rad2deg(torch.atan2(-(turned * y).sum((1, 2)), (turned * x).sum((1, 2))))
    assert angle.abs().max() < 31
    assert angle.min() < -24
    assert angle.max() > 24
    assert abs(float(angle.mean())) < 4


def test_colour_jitter_is_torchvisions_three_in_turn_each_image_with_its_own_factors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: dict[str, Tensor] = {}
    for name in ("brightness", "contrast", "saturation"):
        original = getattr(A, name)

        def spy(pixels: Tensor, factor: Tensor, name: str = name, original: Any = original) -> Tensor:
            drawn[name] = factor
            return original(pixels, factor)

        monkeypatch.setattr(A, name, spy)
    images = pictures(300, height=8, width=8)
    out = pixels_of(build(**NOTHING, color_jitter=0.4)(images, generator()))
    assert list(drawn) == ["brightness", "contrast", "saturation"]
    for factors in drawn.values():
        assert len(factors.unique()) > 295
        assert 0.6 <= factors.min() < 0.62
        assert 1.38 < factors.max() <= 1.4
    expected = each(tv.adjust_brightness, images, drawn["brightness"])
    expected = each(tv.adjust_contrast, expected, drawn["contrast"])
    expected = each(tv.adjust_saturation, expected, drawn["saturation"])
    assert (out.int() - expected.int()).abs().max() <= 3
    assert (out != expected).float().mean() < 1e-3


def test_256_copies_of_an_image_come_out_as_at_least_250() -> None:
    images = pictures(1, height=96, width=96).expand(256, -1, -1, -1)
    for fields in ({"ops": 2, "strength": 0.3}, EVERYTHING):
        out = build(**fields)(images, generator())
        assert len(torch.unique(out.flatten(1), dim=0)) >= 250


@pytest.mark.parametrize("size", [(8, 8), (9, 16), (28, 28), (96, 96), (224, 160)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("rotation", [0.0, 15.0])
def test_any_size_comes_out_float32_channels_last_and_the_input_stays(
    size: tuple[int, int], channels: int, rotation: float
) -> None:
    images = pictures(3, channels, *size)
    before = images.clone()
    out = build(channels, **EVERYTHING, rotation_degrees=rotation)(images, generator())
    assert out.shape == images.shape
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.isfinite().all()
    assert torch.equal(images, before)


@pytest.mark.parametrize("count", [1, 2, 13, 14, 15, 57])
def test_any_batch_size_works_in_chunks_or_at_once(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(count)
    augment = build(**EVERYTHING)
    for chunk_bytes in (1, 2**16, 2**30):
        monkeypatch.setattr(A, "_CPU_CHUNK_BYTES", chunk_bytes)
        out = augment(images, generator())
        assert out.shape == images.shape
        assert (out != normalize(images, MEAN, STD)).flatten(1).any(1).float().mean() > 0.5


def test_the_same_generator_state_gives_the_same_bits_and_another_other_ones() -> None:
    images = pictures(64)
    augment = build(**EVERYTHING, rotation_degrees=10.0)
    first, again, other = (augment(images, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    rng = generator()
    assert not torch.equal(augment(images, rng), augment(images, rng))


def test_memory_layout_of_the_input_does_not_matter() -> None:
    images = pictures(20)
    augment = build(**EVERYTHING)
    laid_out = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(images, generator()), augment(laid_out, generator()))


# --- erasing --------------------------------------------------------------------------------------------------------


def test_erasing_draws_torchvisions_rectangles() -> None:
    images = torch.full((3000, 3, 32, 24), 255, dtype=torch.uint8)
    erased = build(**NOTHING, erase=0.5)(images, generator()) == 0
    assert torch.equal(erased[:, 0], erased[:, 2])
    area = erased[:, 0].flatten(1).sum(1)
    share = area[area > 0] / (32 * 24)
    assert float((area > 0).float().mean()) == pytest.approx(0.5, abs=0.04)
    torch.manual_seed(0)
    transform = v2.RandomErasing(1.0)
    reference = torch.stack([(transform(torch.ones(1, 32, 24)) == 0).sum() / (32 * 24) for _ in range(1500)])
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    torch.testing.assert_close(share.quantile(quantiles), reference.quantile(quantiles), atol=0.02, rtol=0)
    for mask in erased[:50, 0]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None, :]), "a rectangle"


def test_certain_erasing_fills_with_the_mean_which_is_0() -> None:
    images = pictures(200)
    out = build(**NOTHING, erase=1.0)(images, generator())
    same = out == normalize(images, MEAN, STD)
    assert ((out == 0) | same).all()
    assert (out == 0).flatten(1).any(1).all()


# --- no wait for the device ------------------------------------------------------------------------------------------


class _RefuseToWait(TorchDispatchMode):
    """Fails on every call whose result the host would have to wait for."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert not name.startswith(self.WAITING), f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a mask as an index waits for the device"
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    images, labels = pictures(30), torch.arange(30) % 5
    for fields in (EVERYTHING, {**EVERYTHING, "rotation_degrees": 10.0}, {}, NOTHING):
        augment = build(**fields)
        with _RefuseToWait():
            out = augment(images, generator())
            for plan in (MixPlan(0.3, None), MixPlan(0.75, (0, 16, 0, 16))):
                augment.apply_mix(out, labels, 5, plan, generator())
    with pytest.raises(AssertionError, match="waits"), _RefuseToWait():
        float(images.sum())


# --- mixing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.001, 0.1, 0.5, 1.0, 3.0, 10.0])
def test_beta_has_its_mean_and_variance(alpha: float) -> None:
    rng = generator()
    draws = torch.tensor([symmetric_beta(alpha, rng) for _ in range(4000)], dtype=torch.float64)
    assert ((draws >= 0) & (draws <= 1)).all()
    assert float(draws.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(draws.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)


def test_mixup_is_the_weighted_mean_of_images_and_targets_alike() -> None:
    images, labels = torch.randn(8, 3, 6, 6), torch.arange(8)
    augment = build(mixup=1.0)
    mixed, targets = augment.apply_mix(images, labels, 8, MixPlan(0.7, None), generator())
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    torch.testing.assert_close(mixed, torch.einsum("nk,kchw->nchw", targets, images))
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_cutmix_pastes_the_box_and_weighs_the_targets_by_its_area() -> None:
    images, labels = torch.randn(8, 3, 10, 10), torch.arange(8)
    augment = build(cutmix=1.0)
    rng = generator()
    plan = next(p for p in (augment.plan_mix(rng, images.shape) for _ in range(99)) if p and 0.2 < p.keep < 0.8)
    assert plan.box is not None
    top, bottom, left, right = plan.box
    mixed, targets = augment.apply_mix(images, labels, 8, plan, generator())
    assert plan.keep == pytest.approx(1 - (bottom - top) * (right - left) / 100)
    for k in range(8):
        weights = targets[k]
        partner = int(weights.clone().index_fill_(0, torch.tensor([k]), 0).argmax()) if weights[k] < 0.99 else k
        expected = images[k].clone()
        expected[:, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
        assert torch.equal(mixed[k], expected)
        assert float(weights[k]) == pytest.approx(1.0 if partner == k else plan.keep)
        assert float(weights.sum()) == pytest.approx(1.0)


def test_partners_are_a_permutation_and_images_stay() -> None:
    images, labels = torch.randn(50, 1, 4, 4), torch.arange(50)
    before = images.clone()
    _, targets = build(mixup=1.0).apply_mix(images, labels, 50, MixPlan(0.25, None), generator())
    torch.testing.assert_close(targets.sum(0), torch.ones(50))
    assert torch.equal(images, before)


def test_an_image_mixed_with_its_own_class_has_that_class_whole() -> None:
    _, targets = build(mixup=1.0).apply_mix(
        torch.randn(4, 1, 4, 4), torch.full((4,), 2), 3, MixPlan(0.3, None), generator()
    )
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
def test_batches_are_mixed_as_often_as_asked_in_the_way_asked(fields: dict[str, Any], none: float, cut: float) -> None:
    augment, rng = build(**fields), generator()
    plans = [augment.plan_mix(rng, (8, 3, 32, 32)) for _ in range(2000)]
    mixed = [plan for plan in plans if plan]
    assert 1 - len(mixed) / 2000 == pytest.approx(none, abs=0.04)
    if mixed:
        assert sum(plan.box is not None for plan in mixed) / len(mixed) == pytest.approx(cut, abs=0.04)
        assert all(0 <= plan.keep <= 1 for plan in mixed)


def test_plans_follow_the_generator_alone() -> None:
    augment = build(mixup=0.2, cutmix=1.0)
    first, again = ([augment.plan_mix(rng, (8, 3, 32, 32)) for _ in range(20)] for rng in (generator(), generator()))
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
    ],
)
def test_mixing_ends_at_its_fraction_of_the_run(fields: dict[str, Any], progress: float, expected: bool) -> None:
    assert build(**fields).mixes(progress) is expected
