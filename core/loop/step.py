"""One optimizer step, in two halves: what the host decides beforehand, and what the device then does.

The halves are apart so that the device's half can be captured once as a CUDA graph and replayed: whatever is a Python
number while it is captured stays as it is for ever. So all that decides which kernels run stands in a `StepShape`,
for each of which a step is captured, and all that changes from step to step with the same kernels is a `StepValues`,
which are scalars on the device there, and plain numbers, which cost nothing, where nothing is captured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from core.augment import Augment, MixPlan, apply_mix, mixes, plan_mix, resize, size_at
from core.averaging import Averaging
from core.config import TrainConfig
from core.losses import Criterion, Stage
from core.optim import StepOptimizer

Section = Literal["augment", "forward", "backward", "optimizer", "averaging"]
"""The parts of a step, in their order."""


@dataclass(frozen=True)
class Batch:
    """What one step is made on, on the device."""

    images: Tensor
    """(B, C, H, W) uint8"""
    labels: Tensor
    """(B,) int64"""
    repeats: Tensor | None
    """(B,) bool, whether the image was shown before in this epoch; None where nothing depends on it"""
    flips: Tensor | None
    """(B,) bool, whether the image is flipped; None where that is drawn"""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are there, always in the same order."""
        return [tensor for tensor in (self.images, self.labels, self.repeats, self.flips) if tensor is not None]

    def like(self) -> Batch:
        """Room for another batch of its kind."""
        images, labels = torch.empty_like(self.images), torch.empty_like(self.labels)
        repeats, flips = (None if t is None else torch.empty_like(t) for t in (self.repeats, self.flips))
        return Batch(images, labels, repeats, flips)


@dataclass(frozen=True)
class StepShape:
    """What decides which kernels a step launches: those of two steps of one shape differ in numbers only."""

    images: int
    size: tuple[int, int]
    """Height and width in pixels that the network sees."""
    mix: Literal["mixup", "cutmix"] | None
    weighted: bool
    """Whether class weights hold."""
    optimizer: Hashable
    """Its `phase`."""


@dataclass(frozen=True)
class StepValues:
    """What changes from step to step: numbers, or scalars on the device. 0 where nothing reads it."""

    factor: float | Tensor
    """The learning rate as a factor of its peak."""
    average: float | Tensor
    """The share of the new weights in their average."""
    smoothing: float | Tensor
    """Of the labels."""
    keep: float | Tensor
    """How much of an image stays when it is mixed."""
    box: tuple[int, int, int, int] | Tensor
    """(4,) pixels: the box that CutMix takes from another image; top, bottom, left, right."""


class Launch(Protocol):
    """Runs the device's half of a step, or replays it."""

    def __call__(self, batch: Batch, shape: StepShape, values: StepValues) -> None: ...


class TrainStep:
    """Makes the steps of one training.

    Args:
        network: maps normalised images to logits: the model, or what a compiler made of it.
        generator: the device's; seeded anew by the loop at every epoch, and always this object.
    """

    def __init__(
        self,
        config: TrainConfig,
        network: Callable[[Tensor], Tensor],
        *,
        augment: Augment,
        criterion: Criterion,
        optimizer: StepOptimizer,
        averaging: Averaging | None,
        num_classes: int,
        autocast: Callable[[], AbstractContextManager[object]],
        generator: torch.Generator,
    ) -> None:
        self.config, self.network = config, network
        self.augment, self.criterion, self.optimizer, self.averaging = augment, criterion, optimizer, averaging
        self.num_classes, self.autocast, self.generator = num_classes, autocast, generator
        self.micro_batch: int | None = None
        """The images of one pass through the network; None: the whole batch."""
        self.loss_sum = torch.zeros((), device=generator.device)
        """The losses of the images since it was last set to zero."""
        self.launch: Launch | None = None
        """How the device's half is run; None: as it is."""
        self.section: Callable[[Section], AbstractContextManager[object]] = lambda _: contextlib.nullcontext()
        """What each part of the step runs in: a stopwatch, where the time is taken."""

    def __call__(self, batch: Batch, progress: float, factor: float, host_generator: torch.Generator) -> None:
        """Makes one step, and adds the losses of its images to `loss_sum`.

        Args:
            batch: what it is made on.
            progress: the share of the run's steps that are over, in [0, 1).
            factor: the learning rate as a factor of its peak.
            host_generator: the CPU's, for what is drawn once a batch.
        """
        self.optimizer.begin_step(progress)
        height, width = batch.images.shape[-2:]
        size = size_at(self.config.augment, progress, (height, width))
        mix = None
        if mixes(self.config.augment, progress):
            mix = plan_mix(self.config.augment, host_generator, (*batch.images.shape[:2], *size))
        stage = self.criterion.stage(progress)
        weight = None if self.averaging is None else self.averaging.next_weight()
        shape = StepShape(len(batch), size, None if mix is None else mix.kind, stage.weighted, self.optimizer.phase)
        values = StepValues(
            factor,
            0.0 if weight is None else weight,
            stage.smoothing,
            0.0 if mix is None else mix.keep,
            (0, 0, 0, 0) if mix is None or mix.box is None else mix.box,
        )
        (self.launch or self.run)(batch, shape, values)
        self.optimizer.end_step(factor)
        if self.averaging is not None:
            self.averaging.end_update()

    def run(self, batch: Batch, shape: StepShape, values: StepValues) -> None:
        """The device's half. Nothing in it waits for the device, or depends on more of Python than the shape."""
        with self.section("augment"):
            images, targets = self.inputs(batch, shape, values)
        self.optimizer.zero_grad()
        self.forward_and_back(images, targets, Stage(self._smoothing(values), shape.weighted))
        with self.section("optimizer"):
            self.optimizer.step(values.factor)
        if self.averaging is not None:
            with self.section("averaging"):
                self.averaging.update(values.average)

    def try_memory(self, images: Tensor, labels: Tensor) -> None:
        """Goes forward and back as a step would at its most: no weight moves, but gradients and batch norm's counts do.

        `images` (B, C, H, W) uint8 and `labels` (B,) on the device.
        """
        flags = torch.zeros_like(labels, dtype=torch.bool)
        seen = self.augment(images, self.generator, flips=flags, repeats=flags)
        self.forward_and_back(seen, labels, self.criterion.stage(1.0))

    def inputs(self, batch: Batch, shape: StepShape, values: StepValues) -> tuple[Tensor, Tensor]:
        """What the network sees, (B, C, h, w), and what it is to say: labels (B,), or mixtures (B, K)."""
        images = self.augment(batch.images, self.generator, flips=batch.flips, repeats=batch.repeats)
        images = resize(images, shape.size)
        if shape.mix is None:
            return images, batch.labels
        plan = MixPlan(shape.mix, values.keep, values.box if shape.mix == "cutmix" else None)
        return apply_mix(images, batch.labels, self.num_classes, plan, self.generator)

    def forward_and_back(self, images: Tensor, targets: Tensor, stage: Stage) -> None:
        """Adds the gradients of the batch's loss, micro-batch by micro-batch where it does not fit as a whole.

        Mixing, class weights and the loss are the whole batch's either way. Batch norm is not: it sees a micro-batch.
        """
        parts = [(images, targets)]
        if self.micro_batch is not None:
            sizes = batch_sizes(len(images), self.micro_batch)
            parts = list(zip(torch.split(images, sizes), torch.split(targets, sizes), strict=True))
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

    def _smoothing(self, values: StepValues) -> float | Tensor:
        """A number where it is the same for the whole run: torch's own loss takes only that."""
        constant = self.config.loss.smoothing_final is None
        return self.config.loss.smoothing if constant else values.smoothing


def batch_sizes(images: int, batch_size: int) -> list[int]:
    """Sizes of an epoch's batches: all full but the last; a last one of a single image joins the one before.

    No image is dropped, and batch norm cannot normalise one image by itself.
    """
    sizes = [batch_size] * (images // batch_size)
    rest = images % batch_size
    if rest == 1 and sizes:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes
