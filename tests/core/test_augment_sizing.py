"""Progressive resizing grows linearly in few steps, and resizing does not alias."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from core.augment import size_at
from core.config import AugmentConfig
from core.runtime import resize
from tests.core.recorded import HostReads


def config(start: float = 0.5, full_from: float = 0.5) -> AugmentConfig:
    return AugmentConfig(start_size_fraction=start, full_size_from_fraction=full_from)


@pytest.mark.parametrize(
    ("side", "progress", "expected"),
    [
        (96, 0.0, 48), (96, 0.06, 48), (96, 0.07, 60), (96, 0.25, 72), (96, 0.43, 84), (96, 0.44, 96),
        (96, 0.5, 96), (96, 1.0, 96),
        (32, 0.0, 16), (32, 0.25, 24), (100, 0.25, 75), (100, 0.125, 63),
        (8, 0.0, 4), (8, 0.25, 6), (28, 0.0, 14), (28, 0.02, 15), (28, 0.25, 21), (28, 0.49, 28),
    ],
)  # fmt: skip
def test_the_side_grows_in_eighths_or_in_pixels_for_small_images(side: int, progress: float, expected: int) -> None:
    assert size_at(config(), progress, (side, side)) == (expected, expected)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (28, 28), (32, 32), (96, 96), (224, 160), (20, 300)])
@pytest.mark.parametrize(("start", "full_from"), [(0.25, 1.0), (0.6, 0.3), (1.0, 0.5)])
def test_the_size_is_monotonic_near_the_line_and_full_at_its_end(
    size: tuple[int, int], start: float, full_from: float
) -> None:
    seen = [size_at(config(start, full_from), k / 1000, size) for k in range(1001)]
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(seen))
    assert seen[round(1000 * full_from)] == seen[-1] == size
    steps = 8 if min(size) >= 32 else min(size)
    assert len(set(seen)) <= steps
    for k, now in enumerate(seen):
        fraction = min(start + (1 - start) * k / 1000 / full_from, 1)
        for side, whole in zip(now, size, strict=True):
            assert side >= 1
            assert abs(side - fraction * whole) <= whole / steps / 2 + 0.51


def test_size_1_is_off() -> None:
    assert {size_at(AugmentConfig(), k / 10, (96, 96)) for k in range(11)} == {(96, 96)}


@pytest.mark.parametrize("progress", [-0.01, 1.01])
def test_progress_outside_the_run_is_refused(progress: float) -> None:
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        size_at(config(), progress, (32, 32))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(96, 96), (28, 28), (8, 8), (20, 44)])
def test_resized_images_match_torchvisions_antialiased_ones(channels: int, size: tuple[int, int]) -> None:
    images = torch.randn(5, channels, *size).contiguous(memory_format=torch.channels_last)
    for progress in (0.0, 0.2, 0.3):
        smaller = size_at(config(), progress, size)
        small = resize(images, smaller)
        assert small.shape == (5, channels, *smaller)
        assert small.dtype == torch.float32
        assert small.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(small, tv.resize(images, list(smaller), antialias=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_resized_images_of_other_dtypes_are_float32_rounded_once(dtype: torch.dtype) -> None:
    images = torch.randn(5, 3, 32, 32).to(dtype, memory_format=torch.channels_last)
    small = resize(images, (20, 24))
    assert small.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(small, resize(images.float(), (20, 24)).to(dtype))


def test_fine_patterns_average_out() -> None:
    stripes = (torch.arange(64) % 2 * 2.0 - 1).expand(1, 1, 64, 64).contiguous(memory_format=torch.channels_last)
    aliased = F.interpolate(stripes, size=(40, 40), mode="bilinear")
    small = resize(stripes, (40, 40))
    assert small.shape == (1, 1, 40, 40)
    assert small[..., 2:-2].abs().max() < 0.5 * aliased.abs().max()


def test_constant_images_are_unchanged() -> None:
    flat = torch.full((2, 3, 96, 96), 0.7).contiguous(memory_format=torch.channels_last)
    small = resize(flat, (36, 36))
    torch.testing.assert_close(small, torch.full_like(small, 0.7))


def test_full_size_returns_the_same_tensor() -> None:
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    assert resize(images, (32, 32)) is images


def test_resizing_does_not_synchronize() -> None:
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with HostReads():
        resize(images, (20, 20))
