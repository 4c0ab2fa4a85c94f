"""A training as torchvision's classification reference and timm's script write it: what a person runs today.

A DataLoader whose workers crop, flip and RandAugment image by image with torchvision v2; pinned batches of uint8, sent
without waiting; normalisation and timm's random erasing on the device, as timm's loader does it; channels_last,
autocast to bf16 on CUDA, a fused AdamW, a cosine schedule with warm-up, moved at every step. Where the references
differ, the faster way is taken. The images lie decoded in memory, while the references decode JPEG files in every
epoch: that is to this side's advantage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image


@dataclass(frozen=True)
class Loading:
    """What is tried, so that the fastest can be compared."""

    workers: int
    """Processes; 0 loads in the training's own."""
    pil: bool
    """Transforms PIL images, the default of both references; else uint8 tensors."""

    def __str__(self) -> str:
        return f"{self.workers} workers, {'PIL images' if self.pil else 'tensors'}"


class Images(Dataset[tuple[Tensor, int]]):
    """Decoded images and their classes, transformed one by one; an item is (C, H, W) uint8 and its class."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[..., Tensor], *, pil: bool) -> None:
        self.items = [to_pil_image(image) for image in images] if pil else list(images)
        self.labels: list[int] = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.items[index]), self.labels[index]


def transforms(side: int, *, crop_pad: int, ops: int, magnitude: int, pil: bool) -> v2.Compose:
    """The workers' part of the augmentation: one image of that side, PIL or (C, H, W) uint8, to (C, H, W) uint8."""
    return v2.Compose(
        [
            v2.RandomCrop(side, padding=crop_pad),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(num_ops=ops, magnitude=magnitude, interpolation=v2.InterpolationMode.BILINEAR),
            *([v2.Lambda(pil_to_tensor)] if pil else []),
        ]
    )


def train(
    model: nn.Module,
    images: Tensor,  # (N, C, H, W) uint8 on the host
    labels: Tensor,  # (N,) int64
    transform: Callable[..., Tensor],  # one image, as `transforms` makes it
    loading: Loading,
    *,
    device: torch.device,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    erase: float,
    epochs: int,
    batch_size: int,
    lr: float,
    decay: float,  # the share of a weight that is taken off a step, at the schedule's peak
    warmup: float,  # the share of the run
    warmup_start: float,
    smoothing: float,
    on_epoch_end: Callable[[], object],
) -> float:
    """Returns the last epoch's training loss."""
    cuda = device.type == "cuda"
    loader = DataLoader(
        Images(images, labels, transform, pil=loading.pil),
        batch_size,
        shuffle=True,
        num_workers=loading.workers,
        pin_memory=cuda,
        persistent_workers=loading.workers > 0,
    )
    model = model.to(device, memory_format=torch.channels_last)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay / lr}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    steps = epochs * len(loader)

    def factor(step: int) -> float:
        progress = step / steps
        if progress < warmup:
            return warmup_start + (1 - warmup_start) * progress / warmup
        return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    shift = torch.tensor([255 * m for m in mean], device=device).view(1, -1, 1, 1)
    scale = torch.tensor([1 / (255 * s) for s in std], device=device).view(1, -1, 1, 1)
    erasing = RandomErasing(erase, mode="const", device=device)
    model.train()
    for _ in range(epochs):
        loss_sum = torch.zeros((), device=device)
        for batch, targets in loader:
            pixels = batch.to(device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last)
            classes = targets.to(device, non_blocking=True)
            pixels = erasing(pixels.sub_(shift).mul_(scale))
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                logits = model(pixels)
            loss = F.cross_entropy(logits.float(), classes, label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.detach() * len(classes)
        train_loss = loss_sum.item() / len(labels)
        on_epoch_end()
    return train_loss
