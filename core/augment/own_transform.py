"""Transforms of the user's own code: `augment.name: PACKAGE.MODULE:NAME`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core.config import AugmentConfig
from core.errors import ConfigError
from core.imports import blaming, built, kind_of
from core.runtime import isolated_rng


class OwnTransform:
    """Applies the user's transform to batches that are augmented and normalized.

    It gets pixels from 0 to 1, (N, C, H, W) float32 on the device, and returns as many of the same shape. It runs
    outside of CUDA graphs, and draws from torch's global generators, which are seeded in every epoch.

    Raises:
        ConfigError: it does not take its arguments, or fails.
        UserError: it cannot be imported.
    """

    def __init__(
        self, config: AugmentConfig, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
    ) -> None:
        assert config.name is not None
        self._name = config.name
        transform = built(config.name, "augment", config.kwargs, {})
        if not callable(transform):
            raise ConfigError(f"augment.name: {config.name} returns {kind_of(transform)}, not a function of images")
        self._transform = transform.to(device) if isinstance(transform, nn.Module) else transform
        self._mean, self._std = (torch.tensor(each, device=device).view(1, -1, 1, 1) for each in (mean, std))

    def check(self, image: tuple[int, int, int], dtype: torch.dtype) -> None:
        """Try it on two grey images (C, H, W), and raise ConfigError unless it returns images of this shape."""
        device = self._mean.device
        images = torch.zeros(2, *image, dtype=dtype, device=device)
        with isolated_rng(device), blaming(f"augment.name: {self._name} fails with images {tuple(images.shape)}"):
            self(images)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Transform normalized images (N, C, H, W), channels_last."""
        pixels = torch.addcmul(self._mean, images.float(), self._std)
        seen = self._transform(pixels)
        if not isinstance(seen, Tensor) or seen.shape != images.shape or not seen.is_floating_point():
            shape = f" {tuple(seen.shape)} {seen.dtype}" if isinstance(seen, Tensor) else ""
            raise ConfigError(
                f"augment.name: {self._name} returns {kind_of(seen)}{shape} for images {tuple(images.shape)}, not "
                "floats of the same shape"
            )
        return ((seen - self._mean) / self._std).to(images.dtype, memory_format=torch.channels_last)
