"""Averages of weights over time and over networks.

EMA: an exponential moving average of parameters and batch-norm statistics after every step, with a decay of min(d, (1 +
t) / (10 + t)) at update t, as in TensorFlow. SWA: the mean of the weights at the ends of the last epochs (Izmailov et
al. 2018, arXiv 1803.05407). `mean_of`: a uniform soup of networks (Wortsman et al. 2022, arXiv 2203.05482), accurate
only if the loss is low between them. The latter two need `recalibrate`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from core.config import AveragingConfig
from core.runtime import evaluating

# Fraction of the run from which the EMA is used for decisions. Its accuracy on digits (60 epochs of 16 steps, 3 seeds,
# half-lives from 0.005 to 0.5 of the run) is lower than that of the weights by 0.09 after 2 epochs of AdamW, 0.008
# after 6, 0.005 after 12, 0.002 after 18; with SGD by 0.001 after 6.
CAUGHT_UP_FRACTION = 0.25
# (1 + t) / (10 + t), as in TensorFlow's `ExponentialMovingAverage`.
WARMUP_OFFSET = 10


class Averaging(ABC):
    """A copy of a network whose weights are an average over time.

    Args:
        model: the network on its device; its tensors must keep their storage.
    """

    needs_recalibration = False
    """Whether `module` needs `recalibrate` before it is evaluated."""

    def __init__(self, model: nn.Module) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        """The averaged network, in evaluation mode."""
        self._count = 0  # number of averaged states
        self._own, self._theirs = _tensors(self.module), _tensors(model)

    @property
    def ready(self) -> bool:
        """Whether at least one state was averaged."""
        return self._count > 0

    @abstractmethod
    def next_weight(self) -> float | None:
        """Return the share of the network in the next update, in (0, 1]; None if steps are not averaged."""

    @abstractmethod
    def update(self, weight: float | Tensor) -> None:
        """Average the current weights after a step, with `next_weight()` as a number or scalar on the device."""

    @abstractmethod
    def end_update(self) -> None:
        """Count the update. Call after every `update` (host part)."""

    @abstractmethod
    def end_epoch(self, epoch: int) -> None:
        """Call at the end of every epoch, counted from 1."""

    @abstractmethod
    def caught_up(self, epoch: int) -> bool:
        """Return whether the average at the end of this epoch, counted from 1, no longer lags behind the weights."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`. Tensors are live: save or copy them before the next step."""
        return {"module": self.module.state_dict(), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state, bitwise."""
        self.module.load_state_dict(state["module"])
        self._count = state["count"]

    @torch.no_grad()
    def _blend(self, weight: float | Tensor) -> None:
        """Move the average towards the network by `weight` in [0, 1]; integer tensors are copied."""
        (floats, integers), (their_floats, their_integers) = self._own, self._theirs
        if isinstance(weight, Tensor):
            # No foreach lerp accepts a scalar on the device, so the difference is allocated.
            way = torch._foreach_sub(their_floats, floats)
            torch._foreach_mul_(way, weight)
            torch._foreach_add_(floats, way)
        else:
            torch._foreach_lerp_(floats, their_floats, weight)
        if integers:
            torch._foreach_copy_(integers, their_integers)


class ExponentialAveraging(Averaging):
    """EMA; see the module docstring."""

    def __init__(self, config: AveragingConfig, model: nn.Module, total_steps: int, epochs: int) -> None:
        super().__init__(model)
        self._decay: float = 0.5 ** (1 / (config.half_life_fraction * total_steps))
        self._epochs = epochs

    def decay_at(self, t: int) -> float:
        """Return the decay at update t, counted from 0."""
        return min(self._decay, (1 + t) / (WARMUP_OFFSET + t))

    def next_weight(self) -> float:
        return 1 - self.decay_at(self._count)

    def update(self, weight: float | Tensor) -> None:
        self._blend(weight)

    def end_update(self) -> None:
        self._count += 1

    def end_epoch(self, epoch: int) -> None:
        """Do nothing."""

    def caught_up(self, epoch: int) -> bool:
        return epoch >= CAUGHT_UP_FRACTION * self._epochs


class StochasticAveraging(Averaging):
    """SWA; see the module docstring."""

    def __init__(self, config: AveragingConfig, model: nn.Module, epochs: int) -> None:
        super().__init__(model)
        self._start_epoch = config.swa_start_fraction * epochs
        self.needs_recalibration = bool(_batch_norms(model))

    def next_weight(self) -> None:
        """Return None."""

    def update(self, weight: float | Tensor) -> None:
        """Do nothing."""

    def end_update(self) -> None:
        """Do nothing."""

    def end_epoch(self, epoch: int) -> None:
        if epoch >= self._start_epoch:
            self._blend(1 / (self._count + 1))
            self._count += 1

    def caught_up(self, epoch: int) -> bool:
        return epoch - 1 >= max(self._start_epoch, 1)


def build_averaging(config: AveragingConfig, model: nn.Module, total_steps: int, epochs: int) -> Averaging | None:
    """Create the averaging of a run of that length, or None."""
    if config.name == "ema":
        return ExponentialAveraging(config, model, total_steps, epochs)
    if config.name == "swa":
        return StochasticAveraging(config, model, epochs)
    return None


def validations_per_epoch(config: AveragingConfig) -> float:
    """Return the mean number of validations: weights and EMA are both scored until the EMA has caught up."""
    return 1 + CAUGHT_UP_FRACTION if config.name == "ema" else 1


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Recompute the running statistics of all batch norms as the mean over batches (N, C, H, W).

    Like `torch.optim.swa_utils.update_bn`, but dropout and drop path stay off, and modes are restored.

    Raises:
        ValueError: there is no batch.
    """
    norms = _batch_norms(module)
    if not norms:
        return
    momenta = {norm: norm.momentum for norm in norms}
    seen = 0
    try:
        with evaluating(module):
            for norm in norms:
                norm.reset_running_stats()
                norm.train()
                norm.momentum = None  # cumulative mean over batches
            for images in batches:
                module(images)
                seen += 1
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
    if not seen:
        raise ValueError("no batch to recalibrate batch norm with")


@torch.no_grad()
def mean_of(models: Sequence[nn.Module]) -> nn.Module:
    """Return the mean of several networks in evaluation mode; integer buffers are the first one's. Needs `recalibrate`.

    Raises:
        ValueError: there is no model, or their tensors differ in names or shapes.
    """
    if not models:
        raise ValueError("no networks to average")
    mean = copy.deepcopy(models[0]).eval().requires_grad_(False)
    states = [model.state_dict(keep_vars=True) for model in models]
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    if any(each != shapes[0] for each in shapes):
        raise ValueError("the networks are not of one architecture")
    for name, tensor in mean.state_dict().items():
        if tensor.is_floating_point():
            # In float64, so that the mean of equal weights is bitwise equal to them.
            tensor.copy_(torch.stack([state[name].detach().double() for state in states]).mean(0))
    return mean


def _batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [child for child in module.modules() if isinstance(child, _BatchNorm) and child.track_running_stats]


def _tensors(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    tensors = [tensor.detach() for tensor in chain(module.parameters(), module.buffers())]
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]
