"""Training steps on CUDA tensors without memory, for machines without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.augment import Augment, MixPlan
from core.averaging import ExponentialAveraging, _tensors, build_averaging
from core.config import TrainConfig
from core.loop.step import Batch, StepValues, TrainStep
from core.losses import Criterion, Stage
from core.models import build_model, head_parameters, layer_scales
from core.optim import build_optimizer, needs_head
from core.runtime import scale_and_shift

CUDA = torch.device("cuda:0")


class CopyError(RuntimeError):
    """A step copies between the host and the device."""


class FakeGenerator(torch.Generator):
    """Draws nothing, since tensors have no memory."""

    @property
    def device(self) -> torch.device:
        return CUDA


class FakeStep(TrainStep):
    """A step without backward pass, which autograd refuses without a driver."""

    def forward_and_back(self, images: Tensor, targets: Tensor, stage: Stage) -> None:
        with self.autocast():
            logits = self.network(images)
        loss = (self.criterion if targets.ndim == 1 else self.criterion.mixed)(logits, targets, stage)
        self.loss_sum += loss.detach() * len(images)
        assert isinstance(self.network, nn.Module)
        for parameter in self.network.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None


class NoCopies(TorchDispatchMode):
    """Raises CopyError if an operation has tensors on the host, other than scalars, and on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_fused_" in str(func):  # torch has no kernels of fused optimizers for fake tensors
            return None
        out = func(*args, **(kwargs or {}))
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        if len({tensor.device.type for tensor in tensors if tensor.ndim or copies}) > 1:
            raise CopyError(f"{func} copies between the host and the device")
        return out


@contextlib.contextmanager
def cuda_autocast() -> Iterator[None]:
    """bf16 autocast on CUDA tensors. torch.autocast does nothing without a GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@contextlib.contextmanager
def _empty_cache() -> Iterator[None]:
    """Keep fake tensors out of other tests."""
    scale_and_shift.cache_clear()
    try:
        yield
    finally:
        scale_and_shift.cache_clear()


def to_fake(model: nn.Module, device: torch.device) -> None:
    """Replace a network's tensors by fake ones of the same strides. Call within a FakeTensorMode."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                    held[name] = nn.Parameter(fake) if held is module._parameters else fake


def run_fake_step(config: TrainConfig, progress: float) -> None:
    """Augment two batches of images of 16 × 16, and run a step as captured on CUDA at this progress of the run.

    Raises:
        CopyError: the step copies to or from the host.
    """
    model = build_model(config.model, num_classes=3, in_channels=3, image_size=(16, 16))
    own = build_averaging(config.averaging, model, 100, 10)  # fake tensors cannot be copied
    averages = [*([] if own is None else [own]), ExponentialAveraging(0.03, model, 100, 10)]
    with FakeTensorMode(), _empty_cache():
        to_fake(model, CUDA)
        for average in averages:
            to_fake(average.module, CUDA)
            average._own, average._theirs = _tensors(average.module), _tensors(model)
        head = head_parameters(model) if needs_head(config.optim) else ()
        decay = config.optim.layer_decay
        scales = None if decay == 1 else layer_scales(model, decay)
        step = FakeStep(
            config,
            model,
            criterion=Criterion(config.loss, torch.empty(3, dtype=torch.int64, device=CUDA)),
            optimizer=build_optimizer(config, model, 100, head, layer_scales=scales, capturable=True),
            averages=averages,
            num_classes=3,
            autocast=cuda_autocast,
            generator=FakeGenerator(),
        )
        augment = Augment(config.augment, (0.5,) * 3, (0.25,) * 3, CUDA, dtype=torch.bfloat16)
        images = torch.empty(32, 3, 16, 16, dtype=torch.uint8, device=CUDA)
        flags = torch.empty(32, dtype=torch.bool, device=CUDA)
        scalar = torch.empty((), device=CUDA)
        values = StepValues(scalar, scalar, MixPlan(scalar, torch.empty(4, device=CUDA)), [scalar] * len(averages))
        step.optimizer.begin_step(progress)
        with NoCopies():
            draws = augment.draw([16, 16], images.shape[1:], step.generator, flips=flags, repeats=flags)
            batch = Batch(augment.apply(images, draws[:])[:16], torch.empty(16, dtype=torch.int64, device=CUDA))
            step.run(batch, step.shape_at(progress, 16, (16, 16)), values)
