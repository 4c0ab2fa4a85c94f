"""Averages of the weights over time, which are what is evaluated and kept, and over several networks.

EMA: an exponential moving average of parameters and batch-norm statistics, after every step. Its half-life is a
fraction of the run, and its decay warms up as min(d, (1 + t) / (10 + t)) at the t-th update: so at first it averages
the last tenth of the steps so far, and the initial weights are forgotten at once. A plain 0.999 would still hold 70 %
of them after 350 steps. The warm-up is that of TensorFlow's `ExponentialMovingAverage(num_updates=)`.

SWA: the plain mean of the weights at the ends of the last epochs (Izmailov et al. 2018, arXiv 1803.05407). Batch-norm
statistics are no mean of weights, so they must be computed anew before it is evaluated: `recalibrate`.

The mean over networks that were trained alike (Wortsman et al. 2022, arXiv 2203.05482, their uniform soup) costs no
more to use than one of them. It is a good network only where the loss is low all the way between them: as a rule that
holds of networks fine-tuned from one set of weights, and not of networks from scratch. So nothing takes it unseen.

An update has two halves, so that the device's, `update`, can be captured as a CUDA graph: there the share of the new
weights is a scalar on the device. The host counts, in `next_weight` and `end_update`.
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

# The fraction of the run from which an EMA speaks for it. The warm-up keeps the average within about a tenth of the
# steps so far, whatever the half-life, so it lags only while accuracy climbs fast. Measured on digits (60 epochs of 16
# steps, 3 seeds, 797 validation images, half-lives from 0.005 to 0.5 of the run): the average's accuracy lies 0.09
# under the weights' own after 2 epochs of AdamW, 0.008 after 6, 0.005 after 12, 0.002 after 18; of SGD, 0.001 after 6.
CAUGHT_UP_FRACTION = 0.25
# (1 + t) / (10 + t): the numbers of TensorFlow's `ExponentialMovingAverage`.
WARMUP_OFFSET = 10


class Averaging(ABC):
    """A copy of a network whose weights are an average of the network's over time.

    Args:
        model: the network, on its device; its tensors must stay where they are.
    """

    needs_recalibration = False
    """Whether `recalibrate` must see `module` before it is evaluated."""

    def __init__(self, model: nn.Module) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        """The averaged network, in evaluation mode."""
        self._count = 0  # how many states the average holds
        self._own, self._theirs = _tensors(self.module), _tensors(model)

    @property
    def ready(self) -> bool:
        """Whether there is an average yet."""
        return self._count > 0

    @abstractmethod
    def next_weight(self) -> float | None:
        """The share of the next update that the network's weights are, in (0, 1]; None where steps are not averaged."""

    @abstractmethod
    def update(self, weight: float | Tensor) -> None:
        """To be called after every optimizer step: the device's half.

        Args:
            weight: `next_weight()`, as a number or as a float32 scalar () on the device. Not read where that is None.
        """

    @abstractmethod
    def end_update(self) -> None:
        """To be called after every `update`: the host's half."""

    @abstractmethod
    def end_epoch(self, epoch: int) -> None:
        """To be called at the end of every epoch, counted from 1."""

    @abstractmethod
    def caught_up(self, epoch: int) -> bool:
        """Whether the average at the end of this epoch, counted from 1, speaks for the run: before, it lags behind."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs. The tensors are the live ones: save or copy them before the next step."""
        return {"module": self.module.state_dict(), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a state, bitwise."""
        self.module.load_state_dict(state["module"])
        self._count = state["count"]

    @torch.no_grad()
    def _blend(self, weight: float | Tensor) -> None:
        """Moves the average towards the network by this share of the way, in [0, 1]; integers are copied."""
        (floats, integers), (their_floats, their_integers) = self._own, self._theirs
        if isinstance(weight, Tensor):
            # There is no foreach lerp by one scalar on the device, so the way is made, which takes a model's memory.
            way = torch._foreach_sub(their_floats, floats)
            torch._foreach_mul_(way, weight)
            torch._foreach_add_(floats, way)
        else:
            torch._foreach_lerp_(floats, their_floats, weight)
        if integers:
            torch._foreach_copy_(integers, their_integers)


class ExponentialAveraging(Averaging):
    """EMA; see the module."""

    def __init__(self, config: AveragingConfig, model: nn.Module, total_steps: int, epochs: int) -> None:
        super().__init__(model)
        self._decay: float = 0.5 ** (1 / (config.half_life_fraction * total_steps))
        self._epochs = epochs

    def decay_at(self, t: int) -> float:
        """The share that the average keeps of itself at the t-th update, counted from 0."""
        return min(self._decay, (1 + t) / (WARMUP_OFFSET + t))

    def next_weight(self) -> float:
        return 1 - self.decay_at(self._count)

    def update(self, weight: float | Tensor) -> None:
        self._blend(weight)

    def end_update(self) -> None:
        self._count += 1

    def end_epoch(self, epoch: int) -> None:
        """Nothing: every step has been averaged."""

    def caught_up(self, epoch: int) -> bool:
        return epoch >= CAUGHT_UP_FRACTION * self._epochs


class StochasticAveraging(Averaging):
    """SWA; see the module."""

    def __init__(self, config: AveragingConfig, model: nn.Module, epochs: int) -> None:
        super().__init__(model)
        self._start_epoch = config.swa_start_fraction * epochs
        self.needs_recalibration = bool(_batch_norms(model))

    def next_weight(self) -> None:
        """None: epochs are averaged, not steps."""

    def update(self, weight: float | Tensor) -> None:
        """Nothing, as for `next_weight`."""

    def end_update(self) -> None:
        """Nothing, as for `next_weight`."""

    def end_epoch(self, epoch: int) -> None:
        if epoch >= self._start_epoch:
            self._blend(1 / (self._count + 1))
            self._count += 1

    def caught_up(self, epoch: int) -> bool:
        """With one epoch the average is the weights themselves; from two on it is its own."""
        return epoch - 1 >= max(self._start_epoch, 1)


def build_averaging(config: AveragingConfig, model: nn.Module, total_steps: int, epochs: int) -> Averaging | None:
    """The averaging of a run of that many steps in that many epochs; None where it is off.

    The model lies on its device already: the average is a copy, beside it.
    """
    if config.name == "ema":
        return ExponentialAveraging(config, model, total_steps, epochs)
    if config.name == "swa":
        return StochasticAveraging(config, model, epochs)
    return None


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Computes the running statistics of all batch norms anew: the mean over these batches' own.

    As `torch.optim.swa_utils.update_bn`, but only batch norms are put into training mode: dropout and drop path stay
    off, as they are when the network is used, and no random number is drawn. Without batch norms, nothing is read.

    Args:
        module: the network; its modes are as before afterwards.
        batches: normalised images, each (N, C, H, W); each batch counts alike.

    Raises:
        ValueError: there is no batch.
    """
    norms = _batch_norms(module)
    if not norms:
        return
    modes = {child: child.training for child in module.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # torch's word for the mean over all batches
    try:
        seen = 0
        for images in batches:
            module(images)
            seen += 1
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for child, training in modes.items():
            child.training = training
    if not seen:
        raise ValueError("no batch to recalibrate batch norm with")


@torch.no_grad()
def mean_of(models: Sequence[nn.Module]) -> nn.Module:
    """A network whose weights are the mean of those of several, in evaluation mode, where the first one lies.

    Buffers are averaged too, but integers, which are the first one's. Batch-norm statistics are no mean of weights:
    `recalibrate` the network before it is used.

    Args:
        models: at least one; all of one architecture, on one device. They stay as they are.

    Raises:
        ValueError: there is none, or their tensors have other names or shapes.
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
            # In float64: the mean of equal weights is then bitwise those weights.
            tensor.copy_(torch.stack([state[name].detach().double() for state in states]).mean(0))
    return mean


def _batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Those that keep running statistics: the others need no recalibration."""
    return [child for child in module.modules() if isinstance(child, _BatchNorm) and child.track_running_stats]


def _tensors(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers, floating ones first, integer ones second: the same order for a module and its copy."""
    tensors = [tensor.detach() for tensor in chain(module.parameters(), module.buffers())]
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]
