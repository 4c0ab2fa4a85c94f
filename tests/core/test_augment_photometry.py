"""Photometric operations equal torchvision's, with a magnitude per image."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from core.augment import photometry
from core.augment.operations import PHOTOMETRIC_OPS, STANDARD
from tests.core.augment_cases import each, hard_cases


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (photometry.brightness, tv.adjust_brightness),
        (photometry.contrast, tv.adjust_contrast),
        (photometry.saturation, tv.adjust_saturation),
        (photometry.sharpness, tv.adjust_sharpness),
    ],
)
def test_factors_match_torchvision_up_to_one_level_in_a_thousandth_of_the_pixels(
    ours: Callable[[Tensor, Tensor], Tensor], theirs: Callable[[Tensor, float], Tensor], channels: int
) -> None:
    images = hard_cases(channels)
    for shift in range(4):
        # Uneven factors: at 0.3, a tenth of the exact results are whole numbers, so rounding decides.
        factors = torch.linspace(0.1037, 1.8911, len(images)).roll(3 * shift)
        difference = (ours(images.float(), factors) - each(theirs, images, factors).float()).abs()
        assert difference.max() <= 1
        # Constant pictures may differ completely: 77 × f + 77 × (1 - f) is 77 or slightly less.
        assert (difference[:6] > 0).float().mean() < 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_posterize_equals_torchvision(channels: int) -> None:
    images = hard_cases(channels)
    bits = torch.arange(len(images)) % 9
    expected = each(lambda image, b: tv.posterize(image, int(b)), images, bits)
    torch.testing.assert_close(photometry.posterize(images.float(), bits.float()), expected.float(), rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_solarize_equals_torchvision(channels: int) -> None:
    images = hard_cases(channels)
    thresholds = torch.linspace(0, 255, len(images))
    expected = each(tv.solarize, images, thresholds)
    torch.testing.assert_close(photometry.solarize(images.float(), thresholds), expected.float(), rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("ours", "theirs"), [(photometry.autocontrast, tv.autocontrast), (photometry.equalize, tv.equalize)]
)
def test_autocontrast_and_equalize_equal_torchvision_at_full_amount(
    ours: Callable[[Tensor, Tensor], Tensor], theirs: Callable[[Tensor], Tensor], channels: int
) -> None:
    images = hard_cases(channels)
    torch.testing.assert_close(ours(images.float(), torch.ones(len(images))), theirs(images).float(), rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_inversion_equals_torchvision_at_full_amount(channels: int) -> None:
    images = hard_cases(channels)
    inverted = photometry.invert(images.float(), torch.ones(len(images)))
    torch.testing.assert_close(inverted, tv.invert(images).float(), rtol=0, atol=0)


@pytest.mark.parametrize("operation", [photometry.autocontrast, photometry.equalize, photometry.invert])
def test_half_the_amount_blends_half(operation: Callable[[Tensor, Tensor], Tensor]) -> None:
    images = hard_cases().float()
    full = operation(images, torch.ones(len(images)))
    half = operation(images, torch.full((len(images),), 0.5))
    assert (half - (images + full) / 2).abs().max() <= 0.5


def test_saturation_does_nothing_to_greyscale() -> None:
    images = hard_cases(1).float()
    assert torch.equal(photometry.saturation(images, torch.zeros(len(images))), images)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", list(PHOTOMETRIC_OPS))
def test_uint8_and_float_input_give_equal_results(name: str, channels: int) -> None:
    images = hard_cases(channels)
    levels = torch.linspace(-1, 1, len(images))
    ours = PHOTOMETRIC_OPS[name](images, levels, STANDARD)
    assert ours.dtype == torch.uint8
    assert torch.equal(ours.float(), PHOTOMETRIC_OPS[name](images.float(), levels, STANDARD))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 2), (2, 2), (3, 3)])
def test_sharpness_keeps_borders_of_tiny_images(size: tuple[int, int]) -> None:
    images = hard_cases()[..., : size[0], : size[1]].contiguous()
    sharp = photometry.sharpness(images, torch.full((len(images),), 1.9))
    border = torch.ones(size, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert torch.equal(sharp[..., border], images[..., border])
