"""Helpers of the augmentation tests: pictures, edge cases, and torchvision applied image by image."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.augment import Augment
from core.config import AugmentConfig

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

POLICIES = ["randaugment", "six", "trivialaugment", "autoaugment_cifar10"]
EVERY_OPTION: dict[str, dict[str, Any]] = {
    "nothing": NOTHING,
    "the defaults": {},
    "crops by area": {**EVERYTHING, "crop_area_min": 0.3},
    "rotation": {**EVERYTHING, "rotation_degrees": 10.0},
    "zoom and shear": {**EVERYTHING, "scale": 0.2, "shear_degrees": 10.0},
    "flips in turn": {**EVERYTHING, "alternate_flip": True},
    "repeats only": {**EVERYTHING, "apply_to": "repeats"},
    "nothing but repeats": {**NOTHING, "apply_to": "repeats"},
    "erasing alone": {**NOTHING, "erase": 0.5},
    "all at once": {
        **EVERYTHING, "crop_area_min": 0.3, "rotation_degrees": 10.0, "alternate_flip": True, "apply_to": "repeats",
        "ops": 4, "scale": 0.2, "shear_degrees": 10.0,
    },
    **{policy: {**EVERYTHING, "policy": policy} for policy in POLICIES},
}  # fmt: skip
"""Configurations that together use every field of augmentation."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, channels: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """Smooth random shapes with noise: (N, C, H, W) uint8."""
    rng = generator(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=rng) * torch.rand(count, 1, 1, 1, generator=rng)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return ((smooth + 0.03 * torch.randn(smooth.shape, generator=rng) + 0.2).clamp(0, 1) * 255).to(torch.uint8)


def hard_cases(channels: int = 3) -> Tensor:
    """Pictures, random levels, constant images, two levels, black and white: (N, C, 32, 32) uint8."""
    noise = torch.randint(0, 256, (2, channels, 32, 32), dtype=torch.uint8, generator=generator(1))
    flat = torch.full((1, channels, 32, 32), 77, dtype=torch.uint8)
    two = torch.where(noise[:1] > 200, 90, 60).to(torch.uint8)
    return torch.cat([pictures(4, channels), noise, flat, two, torch.zeros_like(flat), torch.full_like(flat, 255)])


def photographs(shared_data: Path, count: int) -> Tensor:
    """Photographs of the scenes data set: (N, 3, 96, 96) uint8."""
    with zipfile.ZipFile(shared_data / "scenes5k.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        chosen = names[:: len(names) // count][:count]
        arrays = [np.array(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in chosen]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def build(
    channels: int = 3, *, device: torch.device = CPU, dtype: torch.dtype = torch.float32, **fields: Any
) -> Augment:
    return Augment(AugmentConfig(**fields), MEAN[:channels], STD[:channels], device, dtype)


def pixels_of(out: Tensor) -> Tensor:
    """Undo the normalization: (N, C, H, W) uint8."""
    channels = out.shape[1]
    mean = torch.tensor(MEAN[:channels]).view(1, -1, 1, 1)
    std = torch.tensor(STD[:channels]).view(1, -1, 1, 1)
    return ((out * std + mean) * 255).round().to(torch.uint8)


def each(function: Callable[[Tensor, float], Tensor], images: Tensor, magnitudes: Tensor) -> Tensor:
    """Apply torchvision's function image by image, each with its own magnitude."""
    return torch.stack([function(image, float(m)) for image, m in zip(images, magnitudes, strict=True)])


def assert_same_geometry(ours: Tensor, theirs: Tensor) -> None:
    """Compare within one level, except for a few pixels at borders that float32 rounds differently."""
    difference = (ours - theirs.float()).abs()
    assert (difference > 1).float().mean() < 1e-3
