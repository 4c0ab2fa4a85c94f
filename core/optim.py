"""Parameter groups and optimizers: SGD, AdamW, NAdam, Muon, and SWATS, which begins as AdamW and becomes SGD.

Weight decay has one form for all of them, that of Loshchilov and Hutter (2019, arXiv 1711.05101): every step first
shrinks each weight, w *= 1 - factor × weight_decay, where `factor` is the schedule's, and then moves it by its
gradient. The learning rate plays no part, so the same number means the same under every optimizer. Vectors (norms and
biases) are not decayed. AdamW without decay is Adam.

Fine-tuning: everything before the classifier can have a lower learning rate (`backbone_lr_scale`), or wait while the
classifier alone is trained (`head_only_fraction`). What waits takes no part in the backward pass; its batch norms go on
counting, since the network is in training mode.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) is timm's: torch's refuses convolutions. Filters
are matrices of (out, in × height × width). Their updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv
2502.16982), so one rate serves both them and what AdamW does: vectors, the classifier, as its author advises, and the
filters that timm does not take for matrices: of one input channel, say, or very long ones. With `nesterov`, timm does
these by NAdamW.

SWATS (Keskar and Socher 2017, arXiv 1712.07628) leaves Adam for SGD with momentum, beginning at v = 0:

- `fraction`: at a fixed share of the run. From there on the peak rate is what SGD would have had all along:
  `lr_scale` × SGD's reference at this batch size. An absolute `lr` is first turned into the `lr_scale` that means it.
- `criterion`: the paper's Algorithm 1. In each Adam step p for the gradient g, γ = pᵀp / (−pᵀg) is the SGD rate whose
  step would project onto p; λ is its moving average with Adam's β₂. Once |λ / (1 − β₂ᵏ) − γ| < tolerance the rate
  has settled, and Λ = λ / (1 − β₂ᵏ) is it. SGD then moves by (1 − momentum) Λ v. Three points where the paper is
  silent: p is divided by the schedule's factor, so γ, Λ and the tolerance are of the rate at the schedule's peak, and a
  schedule that falls does not look like a rate that changes; nothing is judged during the warm-up, though λ averages
  from the first step on; and noise can make γ negative, which λ takes in as the paper has it, but a Λ that is not
  positive never switches, since it would climb.
  The verdict is kept on the device and read at the end of an epoch: SGD begins with the next one, at the rate of the
  step at which the criterion was first met.

A step never waits for the device: nothing is read back.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from core.config import REFERENCE_LR, OptimConfig, TrainConfig

logger = logging.getLogger(__name__)

_COUNTERS = {"step", "mu_product"}  # torch's and timm's names for them
ADAM_EPS = 1e-8  # Kingma and Ba 2015, arXiv 1412.6980; torch's default


class StepOptimizer:
    """An optimizer that is told at every step where the run stands."""

    switched_at: float | None = None
    """SWATS: the progress of the first step that SGD made; None before."""
    sgd_lr: float | None = None
    """SWATS: the peak learning rate of SGD, as torch's SGD takes it; None before the switch."""

    def __init__(self, config: TrainConfig, model: nn.Module, head: Collection[nn.Parameter] = ()) -> None:
        self._config = config.optim
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._head = {id(p) for p in head}
        self._frozen = False
        self.lr = config.optim.peak_lr(config.batch_size)
        """The learning rate of the last step, the classifier's; its peak before the first."""
        self._begin(config.optim.name, self.lr)

    def begin_step(self, progress: float) -> None:
        """To be called before a step's forward pass: takes the backbone out of it while the classifier trains alone.

        Args:
            progress: the share of the run's steps that are over, in [0, 1).
        """
        frozen = progress < self._config.head_only_fraction
        if frozen == self._frozen:
            return
        for parameter in self._params:
            if id(parameter) not in self._head:
                parameter.requires_grad_(not frozen)
                parameter.grad = None
        self._frozen = frozen

    def step(self, progress: float, factor: float) -> None:
        """Clips the gradients, shrinks the weights, and moves them.

        Args:
            progress: the share of the run's steps that are over, in [0, 1).
            factor: the schedule's, in [0, 1]: `core.schedule.factor` at this progress.
        """
        self._before_step(progress)
        self.lr = self._peak_lr * factor
        for group in self._inner.param_groups:
            group["lr"] = self.lr * group["lr_scale"]
        if self._config.grad_clip is not None:
            nn.utils.clip_grad_norm_(self._params, self._config.grad_clip, foreach=True)
        if self._shrinks_by_hand and self._config.weight_decay:
            decayed: list[Tensor] = [p for p in self._params if _is_decayed(p) and p.grad is not None]
            if decayed:
                with torch.no_grad():
                    torch._foreach_mul_(decayed, 1 - factor * self._config.weight_decay)
        self._inner.step()
        self._after_step(progress)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, or fills them with zeros."""
        self._inner.zero_grad(set_to_none)

    def end_epoch(self) -> None:
        """To be called at the end of every epoch. May wait for the device."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs. The tensors are the live ones: save or copy them before the next step."""
        return {"lr": self.lr, "moments": self._inner.state_dict()["state"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a state, bitwise. The state is copied, and rates come from the configuration."""
        self.lr = state["lr"]
        moments = {
            index: {name: value.clone() if isinstance(value, Tensor) else value for name, value in moment.items()}
            for index, moment in state["moments"].items()
        }
        self._inner.load_state_dict({"state": moments, "param_groups": self._inner.state_dict()["param_groups"]})
        if not self._inner.defaults.get("fused"):
            # What is not fused counts on the CPU, and would wait for the device at each step if a checkpoint moved it.
            for moment in self._inner.state.values():
                for name in _COUNTERS & moment.keys():
                    moment[name] = moment[name].cpu()

    def _before_step(self, progress: float) -> None:
        """For an optimizer that changes over the run."""

    def _after_step(self, progress: float) -> None:
        """For an optimizer that watches its own steps."""

    def _begin(self, name: str, peak_lr: float) -> None:
        """From here on steps are made by torch's optimizer of that name, in its fastest form, without moments yet."""
        config = self._config
        self._peak_lr = peak_lr
        # torch's SGD would send the decay through its momentum, and timm's Muon knows one for all its kinds of update.
        self._shrinks_by_hand = name in ("sgd", "muon")
        betas = (config.beta1, config.beta2)
        groups = self._groups(peak_lr, decay=0.0 if self._shrinks_by_hand else config.weight_decay)
        if name == "sgd":
            # Without momentum Nesterov's form is the same step, and torch refuses it.
            nesterov = config.nesterov and config.momentum > 0
            self._inner: torch.optim.Optimizer = torch.optim.SGD(
                groups, lr=peak_lr, momentum=config.momentum, nesterov=nesterov, fused=True
            )
        elif name == "nadam":  # has no fused form
            self._inner = torch.optim.NAdam(
                groups, lr=peak_lr, betas=betas, eps=ADAM_EPS, decoupled_weight_decay=True, foreach=True
            )
        elif name == "muon":
            from timm.optim.muon import Muon

            self._inner = Muon(groups, lr=peak_lr, momentum=config.momentum, nesterov=config.nesterov, betas=betas)
        else:
            self._inner = torch.optim.AdamW(groups, lr=peak_lr, betas=betas, eps=ADAM_EPS, fused=True)

    def _groups(self, peak_lr: float, *, decay: float) -> list[dict[str, Any]]:
        """Parameters by whether they are decayed (matrices and filters) and belong to the classifier; none is empty."""
        groups = []
        for decayed in (True, False):
            for of_head in (False, True):
                params = [p for p in self._params if _is_decayed(p) == decayed and (id(p) in self._head) == of_head]
                scale = 1.0 if of_head else self._config.backbone_lr_scale
                # torch's AdamW and NAdam shrink by lr × weight_decay = factor × peak_lr × lr_scale × weight_decay.
                per_lr = decay / (peak_lr * scale) if decayed else 0.0
                group = {"params": params, "weight_decay": per_lr, "lr_scale": scale}
                if self._config.name == "muon" and (of_head or not decayed):
                    group["use_fallback"] = True
                if params:
                    groups.append(group)
        return groups


class Swats(StepOptimizer):
    """Adam that becomes SGD; see the module."""

    def __init__(self, config: TrainConfig, model: nn.Module, head: Collection[nn.Parameter] = ()) -> None:
        super().__init__(config, model, head)
        self._adam_lr = self._peak_lr
        (sgd, sgd_power), (adam, adam_power) = REFERENCE_LR["sgd"], REFERENCE_LR["swats"]
        self._sgd_over_adam = sgd / adam * (config.batch_size / 256) ** (sgd_power - adam_power)
        self._warmup_fraction = config.schedule.warmup_fraction
        self._projection: _Projection | None = None
        if config.optim.swats.switch == "criterion":
            self._projection = _Projection(config.optim, self._adam_lr, self._params[0].device)
        self._settled_lr: float | None = None  # Λ, once the criterion was met and read

    def _before_step(self, progress: float) -> None:
        if self.switched_at is None:
            self._switch_if_due(progress)

    def _after_step(self, progress: float) -> None:
        if self.switched_at is None and self._projection is not None:
            moved = [p for p in self._params if p.grad is not None]
            moments = [self._inner.state[p] for p in moved]
            self._projection.observe(
                [p.grad for p in moved if p.grad is not None],
                [moment["exp_avg"] for moment in moments],
                [moment["exp_avg_sq"] for moment in moments],
                judged=progress >= self._warmup_fraction,
            )

    def end_epoch(self) -> None:
        if self.switched_at is None and self._projection is not None:
            self._settled_lr = self._projection.read()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "switched_at": self.switched_at,
            "sgd_lr": self.sgd_lr,
            "settled_lr": self._settled_lr,
            "projection": None if self._projection is None else self._projection.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.switched_at, self.sgd_lr = state["switched_at"], state["sgd_lr"]
        self._settled_lr = state["settled_lr"]
        if self._projection is not None:
            self._projection.load_state_dict(state["projection"])
        if self.sgd_lr is None:
            self._begin("swats", self._adam_lr)
        else:
            self._begin("sgd", self.sgd_lr)
        super().load_state_dict(state)

    def _switch_if_due(self, progress: float) -> None:
        if self._projection is None:
            if progress < self._config.swats.switch_fraction:
                return
            self.sgd_lr = self._adam_lr * self._sgd_over_adam
        else:
            if self._settled_lr is None:
                return
            self.sgd_lr = (1 - self._config.momentum) * self._settled_lr
        self.switched_at = progress
        self._begin("sgd", self.sgd_lr)
        logger.debug(
            "SWATS goes on as SGD at %.3g of the run, with a peak learning rate of %.3g", progress, self.sgd_lr
        )


class _Projection:
    """Algorithm 1's estimate of SGD's rate, kept on the device in float64.

    In the paper's letters: a step of Adam at the schedule's peak is p = −α d, so γ = pᵀp / (−pᵀg) = α dᵀd / dᵀg.
    """

    def __init__(self, config: OptimConfig, peak_lr: float, device: torch.device) -> None:
        self._beta1, self._beta2 = config.beta1, config.beta2
        self._tolerance, self._peak_lr = config.swats.tolerance, peak_lr
        self._k = 0
        self._average = torch.zeros((), dtype=torch.float64, device=device)  # λ
        self._settled_lr = torch.zeros((), dtype=torch.float64, device=device)  # Λ where it was met, 0 before

    @torch.no_grad()
    def observe(self, gradients: list[Tensor], first: list[Tensor], second: list[Tensor], *, judged: bool) -> None:
        """Takes in one step of Adam: its gradients and both moments after it, a tensor for each parameter."""
        self._k += 1
        root_correction = math.sqrt(1 - self._beta2**self._k)
        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, root_correction)
        torch._foreach_add_(roots, ADAM_EPS)
        directions = torch._foreach_div(first, roots)  # d, but for the first moment's correction
        squares = torch.stack(torch._foreach_norm(directions)).double().square().sum()
        product = _sum(torch._foreach_mul(directions, gradients))

        defined = product != 0
        gamma = self._peak_lr / (1 - self._beta1**self._k) * squares / product
        self._average = torch.where(defined, self._average.lerp(gamma, 1 - self._beta2), self._average)
        if judged and self._k > 1:
            lr = self._average / (1 - self._beta2**self._k)
            met = defined & ((lr - gamma).abs() < self._tolerance) & (lr > 0) & (self._settled_lr == 0)
            self._settled_lr = torch.where(met, lr, self._settled_lr)

    def read(self) -> float | None:
        """Λ, or None while the criterion has not been met. Waits for the device."""
        return self._settled_lr.item() or None

    def state_dict(self) -> dict[str, Any]:
        return {"k": self._k, "average": self._average, "settled_lr": self._settled_lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._k = state["k"]
        self._average, self._settled_lr = state["average"], state["settled_lr"]


def needs_head(config: OptimConfig) -> bool:
    """Whether the optimizer must know which parameters are the classifier's."""
    return config.name == "muon" or config.backbone_lr_scale != 1 or config.head_only_fraction > 0


def build_optimizer(
    config: TrainConfig, model: nn.Module, total_steps: int, head: Collection[nn.Parameter] = ()
) -> StepOptimizer:
    """The optimizer of a run of that many steps.

    The model lies on its device already. Parameters that need no gradient are left alone. `head` are the classifier's
    parameters, where `needs_head`.
    """
    if config.optim.name != "swats":
        return StepOptimizer(config, model, head)
    swats = config.optim.swats
    if swats.switch == "fraction" and (total_steps - 1) / total_steps < swats.switch_fraction:
        logger.warning(
            "optim.swats.switch_fraction %g: a run of %d step(s) ends before the switch",
            swats.switch_fraction,
            total_steps,
        )
    return Swats(config, model, head)


def _is_decayed(parameter: Tensor) -> bool:
    return parameter.ndim >= 2


def _sum(tensors: tuple[Tensor, ...]) -> Tensor:
    """The sum of all elements, a float64 scalar. Overwrites the tensors.

    There is no foreach sum, but a foreach 1-norm, and a sum is twice its positive part's less all absolute values.
    """
    absolute = torch.stack(torch._foreach_norm(tensors, 1)).double().sum()
    torch._foreach_clamp_min_(tensors, 0)
    return 2 * torch.stack(torch._foreach_norm(tensors, 1)).double().sum() - absolute
