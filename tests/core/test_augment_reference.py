"""Every augmentation operation against torchvision's on photographs, within tabulated tolerances.

`OPERATIONS` are those of the policies at levels from -1 to 1 of RandAugment's ranges, `STEPS` the others as `Augment`
draws them. A tolerance is a maximum difference in levels of 255, and a fraction of pixels that may exceed it, since
float32 rounds positions at borders and values at thresholds differently. 0 levels and fraction 0 is bitwise equality.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from core.augment import geometry, photometry, pipeline, scratch
from core.augment.cropping import draw_crops
from core.augment.operations import GEOMETRIC_OPS, INTERPOLATED_OPS, PHOTOMETRIC_OPS, STANDARD
from core.augment.policies import IN_FULL
from core.augment.scratch import Scratch
from tests.core.augment_cases import MEAN, NOTHING, STD, build, each, generator, photographs, pictures, pixels_of

BILINEAR = v2.InterpolationMode.BILINEAR
SIDE = 96


class Tolerance(NamedTuple):
    levels: int
    share: float

    def check(self, ours: Tensor, theirs: Tensor) -> None:
        """Compare images (N, C, H, W) in levels of 255."""
        assert ours.shape == theirs.shape
        far = (ours.float() - theirs.float()).abs() > self.levels
        assert far.float().mean() <= self.share


EXACT = Tolerance(0, 0)
WITHIN_A_LEVEL = Tolerance(1, 0)
INTERPOLATED = Tolerance(1, 1e-3)


def sheared(image: Tensor, x: float, y: float) -> Tensor:
    degrees = [math.degrees(math.atan(slope)) for slope in (x, y)]
    return tv.affine(image, 0.0, [0, 0], 1.0, degrees, interpolation=BILINEAR, center=[0, 0])


def shifted(image: Tensor, x: int, y: int) -> Tensor:
    return tv.affine(image, 0.0, [x, y], 1.0, [0.0, 0.0])


Reference = Callable[[Tensor, float], Tensor]
"""Function of an image (C, H, W) uint8 and a level in [-1, 1]."""
FARTHEST_SHIFT = 150 / 331 * SIDE

OPERATIONS: dict[str, tuple[Reference, Tolerance]] = {
    "ShearX": (lambda image, level: sheared(image, 0.3 * level, 0), INTERPOLATED),
    "ShearY": (lambda image, level: sheared(image, 0, 0.3 * level), INTERPOLATED),
    "Rotate": (lambda image, level: tv.rotate(image, 30 * level, BILINEAR), INTERPOLATED),
    "TranslateX": (lambda image, level: shifted(image, int(FARTHEST_SHIFT * level), 0), EXACT),
    "TranslateY": (lambda image, level: shifted(image, 0, int(FARTHEST_SHIFT * level)), EXACT),
    "Brightness": (lambda image, level: tv.adjust_brightness(image, 1 + 0.9 * level), WITHIN_A_LEVEL),
    "Color": (lambda image, level: tv.adjust_saturation(image, 1 + 0.9 * level), WITHIN_A_LEVEL),
    "Contrast": (lambda image, level: tv.adjust_contrast(image, 1 + 0.9 * level), WITHIN_A_LEVEL),
    "Sharpness": (lambda image, level: tv.adjust_sharpness(image, 1 + 0.9 * level), WITHIN_A_LEVEL),
    "Posterize": (lambda image, level: tv.posterize(image, 8 - round(4 * abs(level))), EXACT),
    "Solarize": (lambda image, level: tv.solarize(image, 256 * (1 - abs(level))), EXACT),
    # Full amount only, since torchvision has no other.
    "AutoContrast": (lambda image, _level: tv.autocontrast(image), EXACT),
    "Equalize": (lambda image, _level: tv.equalize(image), EXACT),
    "Invert": (lambda image, _level: tv.invert(image), EXACT),
}


@pytest.fixture(scope="module")
def photos(shared_data: Path) -> Tensor:
    return photographs(shared_data, 26)


def test_the_table_covers_every_operation() -> None:
    assert OPERATIONS.keys() == GEOMETRIC_OPS.keys() | PHOTOMETRIC_OPS.keys()


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_match_torchvision(name: str, photos: Tensor) -> None:
    reference, tolerance = OPERATIONS[name]
    levels = torch.linspace(-1, 1, len(photos))
    if name in (*IN_FULL, "Invert"):
        levels = torch.ones_like(levels)
    if name in PHOTOMETRIC_OPS:
        ours = PHOTOMETRIC_OPS[name](photos.float(), levels, STANDARD)
    else:
        matrices = GEOMETRIC_OPS[name](levels, (SIDE, SIDE), STANDARD)
        ours = geometry.warp(photos, matrices)
        if name not in INTERPOLATED_OPS:
            every = torch.arange(len(photos))
            copied = geometry.shift(photos, every, matrices, reach=SIDE, mirrored=False, scratch=Scratch())
            EXACT.check(copied, ours)
    tolerance.check(ours, each(reference, photos, levels))


Drawn = dict[str, Any]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Random numbers of `Augment`, by the name of the function that uses or returns them."""
    seen: Drawn = {}

    def record(module: Any, name: str, *, argument: int | None) -> None:
        original = getattr(module, name)

        def spy(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            seen[name] = result if argument is None else args[argument]
            return result

        monkeypatch.setattr(module, name, spy)

    monkeypatch.setattr(scratch, "_CORE_BLOCK_BYTES", 2**30)  # one block, so one call
    record(pipeline, "draw_crops", argument=None)
    record(pipeline, "draw_erased", argument=None)
    record(pipeline, "rotation", argument=0)
    zoom = pipeline.zoom_and_shear
    monkeypatch.setattr(
        pipeline, "zoom_and_shear", lambda scale, slant: zoom(*seen.update(scale=scale, slant=slant) or (scale, slant))
    )
    for name in ("brightness", "contrast", "saturation"):
        record(photometry, name, argument=1)
    return seen


def crops_by_area(photos: Tensor, drawn: Drawn) -> Tensor:
    boxes = torch.stack(drawn["draw_crops"], dim=1).int().tolist()
    return torch.stack([tv.resized_crop(photo, *box, [SIDE, SIDE]) for photo, box in zip(photos, boxes, strict=False)])


def rotated(photos: Tensor, drawn: Drawn) -> Tensor:
    degrees = drawn["rotation"][: len(photos)]
    return each(lambda photo, angle: tv.rotate(photo, angle, BILINEAR), photos, degrees)


def zoomed(photos: Tensor, drawn: Drawn) -> Tensor:
    return torch.stack([
        tv.affine(photo, angle=0.0, translate=[0, 0], scale=scale, shear=[slant, 0.0], interpolation=BILINEAR)
        for photo, scale, slant in zip(photos, drawn["scale"].tolist(), drawn["slant"].tolist(), strict=False)
    ])  # fmt: skip


def jittered(photos: Tensor, drawn: Drawn) -> Tensor:
    for name in ("brightness", "contrast", "saturation"):
        photos = each(getattr(tv, f"adjust_{name}"), photos, drawn[name][: len(photos)])
    return photos


def erased(photos: Tensor, drawn: Drawn) -> Tensor:
    mean = torch.tensor(MEAN).view(3, 1, 1).mul(255).round().to(torch.uint8)
    out = []
    for photo, rows, columns in zip(photos, *drawn["draw_erased"].lines((SIDE, SIDE)), strict=True):
        y, x = (rows == 0).nonzero().flatten(), (columns == 0).nonzero().flatten()
        out.append(tv.erase(photo, int(y[0]), int(x[0]), len(y), len(x), mean) if len(y) else photo)
    return torch.stack(out)


STEPS: dict[str, tuple[dict[str, Any], Callable[[Tensor, Drawn], Tensor], Tolerance]] = {
    "horizontal flip": ({"flip": 1.0}, lambda photos, _: tv.horizontal_flip(photos), EXACT),
    "vertical flip": ({"vertical_flip": 1.0}, lambda photos, _: tv.vertical_flip(photos), EXACT),
    # torchvision rounds after each of two passes.
    "crop by area": ({"crop_area_min": 0.08}, crops_by_area, WITHIN_A_LEVEL),
    "rotation": ({"rotation_degrees": 45.0}, rotated, INTERPOLATED),
    "zoom": ({"scale": 0.4}, zoomed, INTERPOLATED),
    "shear": ({"shear_degrees": 40.0}, zoomed, INTERPOLATED),
    "zoom and shear": ({"scale": 0.4, "shear_degrees": 40.0}, zoomed, INTERPOLATED),
    # Three operations, each within a level, and factors of up to 1.4.
    "colour jitter": ({"color_jitter": 0.4}, jittered, Tolerance(3, 0)),
    "erasing": ({"erase": 0.9}, erased, EXACT),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_match_torchvision(name: str, photos: Tensor, drawn: Drawn) -> None:
    fields, reference, tolerance = STEPS[name]
    out = build(**{**NOTHING, **fields})(photos, generator())
    tolerance.check(pixels_of(out), reference(photos, drawn))


def test_padded_crops_equal_torchvision(photos: Tensor) -> None:
    """Compares with all 49 crops of three pixels of padding."""
    out = pixels_of(build(flip=0.0, crop_pad_fraction=3 / SIDE)(photos, generator()))
    padded = tv.pad(photos, [3])
    crops = torch.stack([tv.crop(padded, y, x, SIDE, SIDE) for y in range(7) for x in range(7)])
    same = (out == crops).flatten(2).all(2)  # (49, N)
    assert same.any(0).all()
    assert same.any(1).sum() > 10


def test_normalization_matches_torchvision_within_float32(photos: Tensor) -> None:
    expected = tv.normalize(tv.to_dtype(photos, torch.float32, scale=True), list(MEAN), list(STD))
    for fields in (NOTHING, {**NOTHING, "vertical_flip": 1.0}):
        ours = build(**fields)(photos, generator())
        torch.testing.assert_close(ours.flip(-2) if "vertical_flip" in fields else ours, expected, rtol=0, atol=2e-6)


# --- crops by area ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (20, 44), (64, 28)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("area_min", [0.05, 0.5, 0.95])
def test_crops_by_area_match_torchvision_at_any_size(size: tuple[int, int], channels: int, area_min: float) -> None:
    images = torch.cat([pictures(30, channels, *size), torch.full((2, channels, *size), 255, dtype=torch.uint8)])
    crops = draw_crops(len(images), size, area_min, generator())
    ours = geometry.warp(images, crops.matrices(size), crops.frames(size))
    boxes = torch.stack(crops, dim=1).int().tolist()
    theirs = [tv.resized_crop(image, *box, list(size)) for image, box in zip(images, boxes, strict=True)]
    WITHIN_A_LEVEL.check(ours, torch.stack(theirs))


@pytest.mark.parametrize("size", [(96, 96), (48, 40), (20, 44), (64, 28), (90, 30)])
@pytest.mark.parametrize("area_min", [0.08, 0.5, 0.9])
def test_areas_aspects_and_positions_are_distributed_as_in_torchvision(size: tuple[int, int], area_min: float) -> None:
    """The last size is more elongated than any aspect, so some of its crops are the central one."""
    height, width = size
    ours = torch.stack(draw_crops(3000, size, area_min, generator()), dim=1)
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(size, scale=(area_min, 1.0))
    image = torch.zeros(1, height, width, dtype=torch.uint8)
    params = [transform.make_params([image]) for _ in range(3000)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in params]).float()
    for top, left, high, wide in (ours.unbind(1), theirs.unbind(1)):
        assert ((top >= 0) & (left >= 0) & (top + high <= height) & (left + wide <= width)).all()
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])

    def spread(crops: Tensor) -> Tensor:
        top, left, high, wide = crops.unbind(1)
        shares = (high * wide / (height * width), (high / wide).log(), (top + high / 2) / height)
        return torch.stack([share.quantile(quantiles) for share in (*shares, (left + wide / 2) / width)])

    torch.testing.assert_close(spread(ours), spread(theirs), atol=0.05, rtol=0)
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.02 * max(size), rtol=0)


def test_a_crop_by_area_of_a_padded_crop_matches_torchvision(drawn: Drawn) -> None:
    """Crops may include padding."""
    images = 255 - pictures(56) // 2
    out = pixels_of(build(flip=0.0, crop_pad_fraction=0.25, crop_area_min=0.5)(images, generator()))
    boxes = torch.stack(drawn["draw_crops"], dim=1).int().tolist()
    padded = tv.pad(images, [8])
    for k, box in enumerate(boxes):
        shifts = torch.stack([tv.crop(padded[k], y, x, 32, 32) for y in range(17) for x in range(17)])
        candidates = tv.resized_crop(shifts, *box, [32, 32])
        assert (out[k].int() - candidates.int()).abs().flatten(1).amax(1).min() <= 1


def test_flips_rotations_and_shears_follow_the_crop_by_area(drawn: Drawn) -> None:
    images = pictures(56)
    fields = {**NOTHING, "crop_area_min": 0.3}
    cropped = pixels_of(build(**fields)(images, generator()))
    flipped = pixels_of(build(**{**fields, "flip": 1.0, "vertical_flip": 1.0})(images, generator()))
    WITHIN_A_LEVEL.check(flipped, cropped.flip(-1, -2))
    turned = pixels_of(build(**fields, rotation_degrees=90.0)(images, generator()))
    expected = rotated(cropped, drawn)
    # A rotated crop shows image content where torchvision has black; inside, images interpolated once and twice differ
    # by a few levels.
    inside = rotated(torch.full_like(cropped, 255), drawn) == 255
    difference = (turned.int() - expected.int()).abs()
    assert difference[inside].float().mean() < 2


def test_an_area_of_1_draws_nothing() -> None:
    first, second = generator(), generator()
    build()(pictures(20), first)
    build(crop_area_min=1.0)(pictures(20), second)
    assert torch.equal(first.get_state(), second.get_state())
    third = generator()
    build(crop_area_min=0.99)(pictures(20), third)
    assert not torch.equal(first.get_state(), third.get_state())
