"""Geometry matches torchvision within one level if interpolated, and exactly otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from core.augment import geometry
from core.augment.scratch import Scratch
from tests.core.augment_cases import assert_same_geometry, each, pictures


def tv_affine(image: Tensor, *, shear: tuple[float, float], center: list[float] | None) -> Tensor:
    degrees = [float(torch.rad2deg(torch.atan(torch.tensor(s)))) for s in shear]
    return tv.affine(
        image, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=center,
        interpolation=v2.InterpolationMode.BILINEAR,
    )  # fmt: skip


@pytest.mark.parametrize("size", [(32, 32), (20, 44)])
@pytest.mark.parametrize("channels", [1, 3])
def test_rotation_matches_torchvision_within_one_level(size: tuple[int, int], channels: int) -> None:
    images = pictures(12, channels, *size)
    degrees = torch.linspace(-180, 180, 12)
    rotate = lambda image, angle: tv.rotate(image, angle, v2.InterpolationMode.BILINEAR)  # noqa: E731
    assert_same_geometry(geometry.warp(images, geometry.rotation(degrees)), each(rotate, images, degrees))


@pytest.mark.parametrize("size", [(32, 32), (20, 44)])
def test_shears_match_randaugment_within_one_level(size: tuple[int, int]) -> None:
    images = pictures(9, 3, *size)
    slopes = torch.linspace(-0.3, 0.3, 9)
    along_x = each(lambda image, s: tv_affine(image, shear=(s, 0.0), center=[0, 0]), images, slopes)
    along_y = each(lambda image, s: tv_affine(image, shear=(0.0, s), center=[0, 0]), images, slopes)
    assert_same_geometry(geometry.warp(images, geometry.shear_x(slopes, size)), along_x)
    assert_same_geometry(geometry.warp(images, geometry.shear_y(slopes, size)), along_y)


@pytest.mark.parametrize("size", [(32, 32), (20, 44)])
def test_zoom_shear_and_rotation_match_torchvisions_affine_within_one_level(size: tuple[int, int]) -> None:
    images = pictures(9, 3, *size)
    scales, slants, turns = torch.linspace(0.6, 1.6, 9), torch.linspace(-30, 30, 9), torch.linspace(40, -40, 9)
    expected = torch.stack([
        tv.affine(image, angle=-float(turn), translate=[0, 0], scale=float(scale), shear=[float(slant), 0.0],
                  interpolation=v2.InterpolationMode.BILINEAR)
        for image, scale, slant, turn in zip(images, scales, slants, turns, strict=True)
    ])  # fmt: skip
    matrices = geometry.then(geometry.zoom_and_shear(scales, slants), geometry.rotation(turns))
    assert_same_geometry(geometry.warp(images, matrices), expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (15, 22)])
def test_shifts_and_flips_are_exact_copies(size: tuple[int, int], channels: int) -> None:
    images = pictures(6, channels, *size)
    x = torch.tensor([0.0, 3.0, -3.0, 1.0, 8.0, -25.0])
    y = torch.tensor([0.0, -2.0, 7.0, 40.0, 0.0, 1.0])
    flip_x, flip_y = torch.tensor([1.0, -1, 1, -1, -1, 1]), torch.tensor([1.0, 1, -1, -1, 1, 1])
    moved = geometry.affine(x, x=-x, y=-y)
    matrices = geometry.then(moved, geometry.affine(x, a=flip_x, d=flip_y))
    ours = geometry.shift(images, torch.arange(6), matrices, reach=25, mirrored=True, scratch=Scratch())
    for k, image in enumerate(images):
        expected = tv.affine(image, angle=0.0, translate=[int(x[k]), int(y[k])], scale=1.0, shear=[0.0, 0.0])
        expected = expected.flip(-1) if flip_x[k] < 0 else expected
        expected = expected.flip(-2) if flip_y[k] < 0 else expected
        assert torch.equal(ours[k], expected)
    interpolated = geometry.warp(images, matrices)
    assert torch.equal(interpolated, ours.float()), "both ways read matrices alike"


def test_matrices_compose_in_the_order_of_the_images() -> None:
    images = pictures(5)
    degrees = torch.linspace(-170, 170, 5)
    turned = geometry.rotation(torch.full((5,), 90.0))
    once = geometry.warp(images, geometry.then(turned, geometry.rotation(degrees)))
    twice = geometry.warp(geometry.warp(images, turned), geometry.rotation(degrees))
    assert_same_geometry(once, twice)
    moved = geometry.then(geometry.translate_x(torch.full((5,), 4.0)), turned)
    expected = torch.rot90(torch.nn.functional.pad(images, (4, 0))[..., :32], dims=(-2, -1))
    assert_same_geometry(geometry.warp(images, moved), expected)
