"""One optimizer step: decisions on the host, then work on the device.

A CUDA graph captures the latter, with Python numbers as constants. So `StepShape` selects kernels, and `StepValues` are
all other numbers that change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from core.augment import MixPlan, apply_mix, mixes, plan_mix, size_at
from core.averaging import Averaging
from core.config import TrainConfig
from core.losses import Criterion, Stage
from core.optim import StepOptimizer
from core.runtime import resize, tuned_convolutions

Section = Literal["augment", "forward", "backward", "optimizer", "averaging"]
"""Parts of a step, in order."""


@dataclass(frozen=True)
class Batch:
    """Input of one step, on the device."""

    images: Tensor  # (B, C, H, W), augmented and normalized, channels_last
    labels: Tensor  # (B,) int64

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors in a fixed order."""
        return [self.images, self.labels]

    def like(self) -> Batch:
        """Allocate a batch of the same shapes."""
        return Batch(torch.empty_like(self.images), torch.empty_like(self.labels))


@dataclass(frozen=True)
class StepShape:
    """Selects a step's kernels."""

    images: int
    size: tuple[int, int]  # Height and width in pixels of the network's input
    mixes: bool  # Whether batches may be mixed
    weighted: bool  # Whether class weights apply
    optimizer: Hashable  # The optimizer's `phase`

    @property
    def stage(self) -> Hashable:
        """All but the number of images. A run never returns to a stage."""
        return self.size, self.mixes, self.weighted, self.optimizer


@dataclass(frozen=True)
class StepValues:
    """Numbers, or scalars on the device, that change between steps; 0 if unused."""

    factor: float | Tensor  # Of the peak learning rate
    smoothing: float | Tensor
    mix: MixPlan | None  # None mixes nothing
    averages: Sequence[float | Tensor] = ()  # Weight of the network in each average


class Launch(Protocol):
    """Runs or replays the device part of a step."""

    def __call__(self, batch: Batch, shape: StepShape, values: StepValues) -> None: ...


class TrainStep:
    """Makes the steps of one training. The loop reseeds `generator`, the device's, in every epoch."""

    def __init__(
        self,
        config: TrainConfig,
        network: Callable[[Tensor], Tensor],
        *,
        criterion: Criterion,
        optimizer: StepOptimizer,
        averages: Sequence[Averaging],
        num_classes: int,
        autocast: Callable[[], AbstractContextManager[object]],
        generator: torch.Generator,
    ) -> None:
        self.config, self.network = config, network
        self.criterion, self.optimizer, self.averages = criterion, optimizer, averages
        self.num_classes, self.autocast, self.generator = num_classes, autocast, generator
        self.micro_batch: int | None = None
        """Images per pass; None: the whole batch."""
        self.loss_sum = torch.zeros((), device=generator.device)
        """Sum of losses over images."""
        self.launch: Launch | None = None
        """Runs the device part; None: `run`."""
        self.section: Callable[[Section], AbstractContextManager[object]] = lambda _: contextlib.nullcontext()
        """Context of each part, for timing."""

    def __call__(self, batch: Batch, progress: float, factor: float, host_generator: torch.Generator) -> None:
        """Make a step at this progress of the run, in [0, 1), with this factor of the peak learning rate."""
        self.optimizer.begin_step(progress)
        height, width = batch.images.shape[-2:]
        shape = self.shape_at(progress, len(batch), (height, width))
        mix = None
        if shape.mixes:
            mix = plan_mix(self.config.augment, host_generator, (*batch.images.shape[:2], *shape.size))
        # Mixed targets are not smoothed.
        smoothing = self.criterion.stage(progress).smoothing if mix is None else 0.0
        weights = [average.next_weight() or 0.0 for average in self.averages]
        values = StepValues(factor, smoothing, mix, weights)
        (self.launch or self.run)(batch, shape, values)
        self.optimizer.end_step(factor)
        for average in self.averages:
            average.end_update()

    def shape_at(self, progress: float, images: int, size: tuple[int, int]) -> StepShape:
        """Return the shape of a step on this many images of a `size`, in the optimizer's present phase."""
        return StepShape(
            images,
            size_at(self.config.augment, progress, size),
            mixes(self.config.augment, progress),
            self.criterion.stage(progress).weighted,
            self.optimizer.phase,
        )

    def run(self, batch: Batch, shape: StepShape, values: StepValues) -> None:
        """The device part. Depends on Python values through the shape only."""
        with self.section("augment"):
            images, targets = self.inputs(batch, shape, values)
        self.optimizer.zero_grad()
        self.forward_and_back(images, targets, Stage(self._smoothing(shape, values), shape.weighted))
        with self.section("optimizer"):
            self.optimizer.step(values.factor)
        if self.averages:
            with self.section("averaging"):
                for average, weight in zip(self.averages, values.averages, strict=True):
                    average.update(weight)

    def try_memory(self, images: Tensor, labels: Tensor) -> None:
        """Run the passes of the step that needs most memory."""
        self.forward_and_back(images, labels, self.criterion.stage(1.0))
        self.loss_sum.zero_()

    def inputs(self, batch: Batch, shape: StepShape, values: StepValues) -> tuple[Tensor, Tensor]:
        """Return the network's input (B, C, h, w), and labels (B,) or mixtures (B, K)."""
        images = resize(batch.images, shape.size)
        if not shape.mixes:
            return images, batch.labels
        return apply_mix(images, batch.labels, self.num_classes, values.mix, self.generator)

    def forward_and_back(self, images: Tensor, targets: Tensor, stage: Stage) -> None:
        """Accumulate the gradients of the batch's loss. Only batch norm sees micro-batches."""
        parts = [(images, targets)]
        if self.micro_batch is not None:
            sizes = batch_sizes(len(images), self.micro_batch)
            parts = list(zip(torch.split(images, sizes), torch.split(targets, sizes), strict=True))
        with tuned_convolutions(images.device):
            for part, its_targets in parts:
                with self.section("forward"):
                    with self.autocast():
                        logits = self.network(part)
                    loss = (self.criterion if targets.ndim == 1 else self.criterion.mixed)(logits, its_targets, stage)
                    if len(parts) > 1:
                        loss = loss * self.criterion.share(its_targets, targets, stage)
                with self.section("backward"):
                    loss.backward()  # type: ignore[no-untyped-call]
                self.loss_sum += loss.detach() * len(images)

    def _smoothing(self, shape: StepShape, values: StepValues) -> float | Tensor:
        """A number if it is constant, as torch's own loss requires."""
        loss = self.config.loss
        constant = loss.smoothing_final is None and not (shape.mixes and loss.smoothing)
        return loss.smoothing if constant else values.smoothing


def batch_sizes(images: int, batch_size: int) -> list[int]:
    """Return the sizes of an epoch's batches. A single image joins the batch before it: batch norm needs two."""
    sizes = [batch_size] * (images // batch_size)
    rest = images % batch_size
    if rest == 1 and sizes:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes
