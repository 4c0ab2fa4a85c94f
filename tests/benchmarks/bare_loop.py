"""A training loop in bare PyTorch, of the steps that `core.loop` takes: what its overhead is measured against.

The data set lies on the device as uint8; a batch is a gather, an augmentation, a forward and a backward pass in
channels_last and a fused step; an epoch ends with the validation scores. Nothing else: no checkpoint, no callback, no
averaging, no early stop. At most 80 lines, and only torch is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F


def train(
    model: nn.Module,
    images: Tensor,  # (N, C, H, W) uint8, all that are not test images
    labels: Tensor,  # (N,) int64
    train_rows: Tensor,  # (n,) int64
    val_rows: Tensor,  # (m,) int64
    *,
    augment: Callable[[Tensor, Generator], Tensor],  # (B, C, H, W) uint8 to normalised floats, augmented
    prepare: Callable[[Tensor], Tensor],  # the same without augmentation
    generator: Callable[[int], Generator],  # of an epoch, counted from 1
    epochs: int,
    batch_size: int,
    lr: float,
    decay: float,  # the share of a weight that is taken off a step, at the schedule's peak
    warmup: float,  # the share of the run
    warmup_start: float,
    smoothing: float,
    bf16: bool,
    on_epoch_end: Callable[[], object],
) -> tuple[float, float, float]:
    """Returns the last epoch's training loss, validation loss and validation accuracy."""
    device = images.device
    model = model.to(device, memory_format=torch.channels_last)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay / lr}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    total_steps = epochs * math.ceil(len(train_rows) / batch_size)
    step = 0
    for epoch in range(1, epochs + 1):
        model.train()
        draws = generator(epoch)
        loss_sum = torch.zeros((), device=device)
        order = torch.randperm(len(train_rows), generator=draws, device=device)
        for rows in train_rows[order].split(batch_size):
            progress = step / total_steps
            if progress < warmup:
                factor = warmup_start + (1 - warmup_start) * progress / warmup
            else:
                factor = (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(augment(images[rows], draws))
            loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach() * len(rows)
            step += 1
        train_loss = loss_sum.item() / len(train_rows)
        model.eval()
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = torch.cat([model(prepare(images[rows])).float() for rows in val_rows.split(512)])
        val_loss = F.cross_entropy(logits, labels[val_rows]).item()
        accuracy = (logits.argmax(1) == labels[val_rows]).float().mean().item()
        on_epoch_end()
    return train_loss, val_loss, accuracy
