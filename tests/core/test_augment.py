"""`Augment` as a whole: independent random numbers per image, and no synchronization."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from core.augment import MixPlan, alternating_flips, apply_mix, photometry, pipeline, scratch
from core.config import AugmentConfig
from core.loop.graphs import GENERATORS_REGISTER_THEMSELVES
from core.runtime import normalize
from tests.core.augment_cases import (
    EVERY_OPTION,
    EVERYTHING,
    MEAN,
    NOTHING,
    POLICIES,
    STD,
    build,
    each,
    generator,
    hard_cases,
    pictures,
    pixels_of,
)
from tests.core.launches import launches
from tests.core.recorded import HostReads
from tests.core.trainings import forbidden_waits


def test_everything_off_is_bitwise_normalization() -> None:
    images = hard_cases()
    assert torch.equal(build(**NOTHING)(images, generator()), normalize(images, MEAN, STD))


def test_flip_probability_1_flips_every_image() -> None:
    images = pictures(5)
    across = build(flip=1.0, crop_pad_fraction=0.0)(images, generator())
    down = build(flip=0.0, vertical_flip=1.0, crop_pad_fraction=0.0)(images, generator())
    torch.testing.assert_close(across, normalize(images.flip(-1), MEAN, STD))
    torch.testing.assert_close(down, normalize(images.flip(-2), MEAN, STD))


def test_flips_have_the_configured_probability() -> None:
    images = pictures(1).expand(2000, -1, -1, -1)
    out = build(flip=0.3, crop_pad_fraction=0.0)(images, generator())
    flipped = (out - normalize(images, MEAN, STD)).abs().amax((1, 2, 3)) > 0.1
    assert float(flipped.float().mean()) == pytest.approx(0.3, abs=0.04)


def test_crops_match_torchvision_and_are_equally_likely() -> None:
    picture = pictures(1, height=16, width=24)
    out = pixels_of(build(flip=0.0, crop_pad_fraction=0.125)(picture.expand(3500, -1, -1, -1), generator()))
    padded = tv.pad(picture[0], [3, 2])
    crops = {(y, x): tv.crop(padded, y, x, 16, 24) for y in range(5) for x in range(7)}
    counts = [int((out == crop).flatten(1).all(1).sum()) for crop in crops.values()]
    assert sum(counts) == 3500
    assert min(counts) > 50
    assert max(counts) < 160


def test_rotation_preserves_a_round_picture_and_stays_within_its_range() -> None:
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


def test_colour_jitter_matches_torchvision_with_factors_per_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: dict[str, Tensor] = {}
    for name in ("brightness", "contrast", "saturation"):
        original = getattr(photometry, name)

        def spy(pixels: Tensor, factor: Tensor, name: str = name, original: Any = original) -> Tensor:
            drawn[name] = factor
            return original(pixels, factor)

        monkeypatch.setattr(photometry, name, spy)
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


def test_flips_alternate_between_epochs() -> None:
    first = torch.rand(50, generator=generator()) < 0.5
    for epoch in (1, 3, 99):
        assert torch.equal(alternating_flips(first, epoch), first)
    for epoch in (2, 4, 100):
        assert torch.equal(alternating_flips(first, epoch), ~first)


@pytest.mark.parametrize("count", [5, 57])
@pytest.mark.parametrize("rest", [{}, {"ops": 1, "strength": 0.0}, {"policy": "autoaugment_cifar10"}])
def test_given_flips_are_applied_and_affect_nothing_else(
    count: int, rest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_CPU_PASS_BYTES", 2**18)  # several units
    images = pictures(count)
    flips = torch.rand(count, generator=generator(3)) < 0.5
    augment = build(alternate_flip=True, crop_pad_fraction=0.0, **rest)
    turned = torch.where(flips[:, None, None, None], images.flip(-1), images)
    none = torch.zeros(count, dtype=torch.bool)
    out, expected = augment(images, generator(), flips=flips), augment(turned, generator(), flips=none)
    if rest.get("policy"):
        # Interpolated rotations differ by one level, which a threshold may amplify.
        wrong = ((pixels_of(out).int() - pixels_of(expected).int()).abs() > 1).flatten(1).float().mean(1)
        assert wrong.max() < 0.02
    else:
        assert torch.equal(out, expected)
        assert torch.equal(out, normalize(turned, MEAN, STD))


def test_flips_are_only_used_if_they_alternate() -> None:
    images = pictures(20)
    all_of_them = torch.ones(20, dtype=torch.bool)
    drawn = build()(images, generator())
    assert torch.equal(build()(images, generator(), flips=all_of_them), drawn)


@pytest.mark.parametrize("fields", [EVERYTHING, {"policy": "trivialaugment"}, {"erase": 0.9, **NOTHING}, NOTHING])
@pytest.mark.parametrize("channels", [1, 3])
def test_first_visits_are_only_normalized_and_repeats_are_augmented(fields: dict[str, Any], channels: int) -> None:
    images = torch.cat([hard_cases(channels), pictures(60, channels)])
    repeats = torch.rand(len(images), generator=generator(4)) < 0.4
    out = build(channels, apply_to="repeats", **fields)(images, generator(), repeats=repeats)
    plain = normalize(images, MEAN[:channels], STD[:channels])
    everywhere = build(channels, **fields)(images, generator())
    assert torch.equal(out[~repeats], plain[~repeats])
    assert torch.equal(out[repeats], everywhere[repeats])
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.dtype == torch.float32


def test_first_visits_are_not_flipped() -> None:
    images = pictures(8)
    yes, no = torch.ones(8, dtype=torch.bool), torch.zeros(8, dtype=torch.bool)
    augment = build(apply_to="repeats", alternate_flip=True, crop_pad_fraction=0.0)
    assert torch.equal(augment(images, generator(), flips=yes, repeats=no), normalize(images, MEAN, STD))
    assert torch.equal(augment(images, generator(), flips=yes, repeats=yes), normalize(images.flip(-1), MEAN, STD))


def test_repeats_are_only_used_if_configured() -> None:
    images = pictures(20)
    none = torch.zeros(20, dtype=torch.bool)
    assert torch.equal(build()(images, generator(), repeats=none), build()(images, generator()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"alternate_flip": True}, "give `flips`"), ({"apply_to": "repeats"}, "give `repeats`")],
)
def test_missing_flips_or_repeats_are_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**fields)(pictures(2), generator())


def test_256_copies_of_an_image_give_at_least_250_different_results() -> None:
    images = pictures(1, height=96, width=96).expand(256, -1, -1, -1)

    def different(seed: int, **fields: Any) -> int:
        return len(torch.unique(build(**fields)(images, generator(seed)).flatten(1), dim=0))

    for fields in ({"ops": 2, "strength": 0.3}, EVERYTHING):
        assert different(0, **fields) >= 250
    # AutoAugment leaves many images unchanged, whose crops may coincide: half of its draws are above 250.
    assert statistics.median(different(seed, policy="autoaugment_cifar10") for seed in range(5)) >= 250


@pytest.mark.parametrize("size", [(8, 8), (9, 16), (28, 28), (96, 96), (224, 160)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("rotation", [0.0, 15.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_any_size_gives_float32_channels_last_and_keeps_its_input(
    size: tuple[int, int], channels: int, rotation: float, policy: str
) -> None:
    images = pictures(3, channels, *size)
    before = images.clone()
    out = build(channels, **EVERYTHING, policy=policy, rotation_degrees=rotation)(images, generator())
    assert out.shape == images.shape
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.isfinite().all()
    assert torch.equal(images, before)


@pytest.mark.parametrize("count", [1, 2, 13, 14, 15, 57])
@pytest.mark.parametrize("policy", POLICIES)
def test_any_batch_size_works_with_and_without_division(
    count: int, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(count)
    augment = build(**EVERYTHING, policy=policy)
    for pass_bytes in (1, 2**16, 2**30):
        monkeypatch.setattr(pipeline, "_CPU_PASS_BYTES", pass_bytes)
        out = augment(images, generator())
        assert out.shape == images.shape
        assert (out != normalize(images, MEAN, STD)).flatten(1).any(1).float().mean() > 0.5


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rotation", [0.0, 10.0])
def test_results_depend_on_the_generator_state_alone(policy: str, rotation: float) -> None:
    images = pictures(64)
    augment = build(**EVERYTHING, policy=policy, rotation_degrees=rotation)
    first, again, other = (augment(images, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    rng = generator()
    assert not torch.equal(augment(images, rng), augment(images, rng))


@pytest.mark.parametrize("fields", EVERY_OPTION.values(), ids=EVERY_OPTION)
def test_block_size_does_not_change_results(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    images, some = torch.cat([hard_cases(), pictures(50)]), torch.arange(60) % 3 == 0
    outs = []
    for block_bytes in (1, 2**16, 2**30):
        monkeypatch.setattr(scratch, "_CORE_BLOCK_BYTES", block_bytes)
        outs.append(build(**fields)(images, generator(), flips=some, repeats=some))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


BATCHES = [16, 16, 16, 9]


@pytest.mark.parametrize("unit_bytes", [2**16, 2**30], ids=["several units a batch", "one unit a batch"])
@pytest.mark.parametrize("fields", EVERY_OPTION.values(), ids=EVERY_OPTION)
def test_batches_can_be_augmented_in_any_division(
    fields: dict[str, Any], unit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.cat([hard_cases(), pictures(sum(BATCHES) - 10)])
    some = torch.arange(len(images)) % 3 == 0
    augment = build(**fields)
    monkeypatch.setattr(pipeline, "_CPU_PASS_BYTES", unit_bytes)
    draws = augment.draw(BATCHES, images.shape[1:], generator(), flips=some, repeats=some)
    outs = []
    for pass_bytes in (1, 2**30):
        monkeypatch.setattr(pipeline, "_CPU_PASS_BYTES", pass_bytes)
        outs.append(augment.apply(images, draws[:]))
        parts = [augment.apply(images[:32], draws[:2]), augment.apply(images[32:48], draws[2])]
        outs.append(torch.cat([*parts, augment.apply(images[48:], draws[3])]))
    for out in outs[1:]:
        assert torch.equal(out, outs[0])


@pytest.mark.parametrize(
    ("device", "batch", "side", "expected"),
    [
        ("meta", 64, 96, 32), ("meta", 100, 32, 21), ("meta", 64, 224, 6), ("meta", 512, 224, 1),
        ("meta", 4096, 32, 1), ("cpu", 64, 96, 4), ("cpu", 64, 8, 32), ("cpu", 64, 224, 1),
    ],
)  # fmt: skip
def test_2048_images_are_augmented_together_if_the_memory_holds_them(
    device: str, batch: int, side: int, expected: int
) -> None:
    """Any device but a CPU is a GPU."""
    assert build(device=torch.device(device)).batches_at_once(batch, (3, side, side)) == expected


def test_no_two_batches_have_the_same_draws() -> None:
    images = pictures(28)
    augment = build(**EVERYTHING)
    draws = augment.draw([28, 28], images.shape[1:], generator())
    assert not torch.equal(augment.apply(images, draws[0]), augment.apply(images, draws[1]))


@pytest.mark.parametrize("fields", EVERY_OPTION.values(), ids=EVERY_OPTION)
def test_the_number_of_kernels_does_not_depend_on_the_number_of_batches(fields: dict[str, Any]) -> None:
    images = pictures(28 * 8, height=8, width=8)
    some = torch.arange(len(images)) % 3 == 0
    augment = build(**fields)

    def kernels(batches: int) -> tuple[int, int]:
        n = 28 * batches
        drawing: list[Any] = []
        first = launches(
            lambda: drawing.append(
                augment.draw([28] * batches, (3, 8, 8), generator(), flips=some[:n], repeats=some[:n])
            )
        )
        return first, launches(lambda: augment.apply(images[:n], drawing[0][:]))

    assert kernels(8) == kernels(2)


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_layout_of_the_input_does_not_matter(policy: str) -> None:
    images = pictures(20)
    augment = build(**EVERYTHING, policy=policy)
    laid_out = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(images, generator()), augment(laid_out, generator()))


@pytest.mark.parametrize("fields", EVERY_OPTION.values(), ids=EVERY_OPTION)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_float32_rounded_once(fields: dict[str, Any], dtype: torch.dtype) -> None:
    images, some = torch.cat([hard_cases(), pictures(50)]), torch.arange(60) % 3 == 0
    full = build(**fields)(images, generator(), flips=some, repeats=some)
    half = build(**fields, dtype=dtype)(images, generator(), flips=some, repeats=some)
    assert half.dtype == dtype
    assert half.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(half, full.to(dtype))


def test_the_table_of_options_covers_every_augmentation_field() -> None:
    elsewhere = {"name", "kwargs", "mixup", "cutmix", "mix_probability", "mix_off_fraction", "start_size_fraction"}
    used = {name for fields in EVERY_OPTION.values() for name in fields}
    assert used == AugmentConfig.model_fields.keys() - elsewhere - {"full_size_from_fraction"}


# --- erasing --------------------------------------------------------------------------------------------------------


def test_erased_rectangles_match_torchvision() -> None:
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


def test_erased_pixels_are_0() -> None:
    images = pictures(200)
    out = build(**NOTHING, erase=1.0)(images, generator())
    same = out == normalize(images, MEAN, STD)
    assert ((out == 0) | same).all()
    assert (out == 0).flatten(1).any(1).all()


def plan_on(device: torch.device, keep: float, *box: float) -> MixPlan:
    return MixPlan(torch.tensor(keep, device=device), torch.tensor(box, device=device))


PLANS = {
    "mixup": lambda device: plan_on(device, 0.3, 0.0, 0.0, 0.0, 0.0),
    "cutmix": lambda device: plan_on(device, 0.75, 0.0, 16.0, 0.0, 16.0),
    "mixup by a number": lambda _device: MixPlan(0.3),
    "cutmix by numbers": lambda _device: MixPlan(0.75, (0, 16, 0, 16)),
    "none": lambda _device: None,
}


@pytest.mark.parametrize("fields", EVERY_OPTION.values(), ids=EVERY_OPTION)
def test_augmentation_does_not_synchronize(fields: dict[str, Any]) -> None:
    images, some = pictures(30), torch.arange(30) % 3 == 0
    augment = build(**fields)
    with HostReads():
        augment(images, generator(), flips=alternating_flips(some, 2), repeats=some)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_mixing_does_not_synchronize(plan: Any) -> None:
    images, labels, made = torch.randn(30, 3, 32, 32), torch.arange(30) % 5, plan("cpu")
    with HostReads():
        apply_mix(images, labels, 5, made, generator())


# --- on a CUDA device -------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
@pytest.mark.parametrize("fields", EVERY_OPTION.values(), ids=EVERY_OPTION)
def test_cuda_does_not_synchronize(cuda: torch.device, fields: dict[str, Any]) -> None:
    images, labels, some = pictures(30).to(cuda), (torch.arange(30) % 5).to(cuda), (torch.arange(30) % 3 == 0).to(cuda)
    augment, rng = build(**fields, device=cuda, dtype=torch.bfloat16), torch.Generator(cuda).manual_seed(0)
    plans = [plan(cuda) for plan in PLANS.values()]

    def step() -> None:
        out = augment(images, rng, flips=some, repeats=some)
        for plan in plans:
            apply_mix(out, labels, 5, plan, rng)

    step()  # loading kernels may wait
    with forbidden_waits(cuda):
        step()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("fields", EVERY_OPTION.values(), ids=EVERY_OPTION)
def test_a_captured_graph_equals_eager_steps_bitwise(cuda: torch.device, fields: dict[str, Any], kind: str) -> None:
    batches = [pictures(30, seed=seed).to(cuda) for seed in range(3)]
    images, labels, some = batches[0].clone(), (torch.arange(30) % 5).to(cuda), (torch.arange(30) % 3 == 0).to(cuda)
    augment, rng = build(**fields, device=cuda, dtype=torch.bfloat16), torch.Generator(cuda).manual_seed(7)
    plan, keeps = PLANS[kind](cuda), [0.3, 0.55, 0.9]
    assert isinstance(plan.keep, Tensor)

    def step() -> tuple[Tensor, Tensor]:
        return apply_mix(augment(images, rng, flips=some, repeats=some), labels, 5, plan, rng)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # warm-up
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    if not GENERATORS_REGISTER_THEMSELVES:
        graph.register_generator_state(rng)
    with torch.cuda.graph(graph):
        captured = step()

    rng.manual_seed(0)
    replayed = []
    for batch, keep in zip(batches, keeps, strict=True):
        images.copy_(batch)
        plan.keep.fill_(keep)
        graph.replay()
        replayed.append([tensor.clone() for tensor in captured])
    rng.manual_seed(0)
    for batch, keep, (mixed, targets) in zip(batches, keeps, replayed, strict=True):
        images.copy_(batch)
        plan.keep.fill_(keep)
        expected_mixed, expected_targets = step()
        assert torch.equal(mixed, expected_mixed)
        assert torch.equal(targets, expected_targets)


@pytest.mark.gpu
@pytest.mark.parametrize("fields", EVERY_OPTION.values(), ids=EVERY_OPTION)
def test_cuda_results_are_within_the_ranges_of_the_cpu(cuda: torch.device, fields: dict[str, Any]) -> None:
    """Random numbers differ between devices; layout, dtype and range do not."""
    images, some = hard_cases(), torch.arange(10) % 3 == 0
    augment = build(**fields, device=cuda)
    out = augment(images.to(cuda), torch.Generator(cuda).manual_seed(0), flips=some.to(cuda), repeats=some.to(cuda))
    assert out.device == cuda
    assert out.is_contiguous(memory_format=torch.channels_last)
    whole = (out.cpu() * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)) * 255
    erased = out.cpu() == 0
    assert torch.where(erased, 0.0, (whole - whole.round()).abs()).max() < 1e-3
    assert whole.min() > -1e-3
    assert whole.max() < 255 + 1e-3
