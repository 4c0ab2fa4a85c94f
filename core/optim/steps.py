"""Optimizers: SGD, AdamW, NAdam, Muon, and SWATS, which starts as AdamW and becomes SGD.

Weight decay is decoupled from the learning rate (arXiv 1711.05101): every step first shrinks each matrix or filter, w
*= 1 - factor × weight_decay, with the schedule's factor.

Muon handles matrices and filters, AdamW vectors and the classifier at the same rate; see `core.optim.muon`.

SWATS (arXiv 1712.07628) switches to SGD with momentum, starting at v = 0: at a `fraction` of the run to `lr_scale` ×
SGD's reference rate, or by the `criterion` of Algorithm 1. In each Adam step p for the gradient g, γ = pᵀp / (−pᵀg) is
the SGD rate whose step projects onto p, and λ its moving average with β₂. Once |λ / (1 − β₂ᵏ) − γ| < tolerance after
the warm-up, SGD starts in the next epoch with the rate (1 − momentum) Λ, Λ = λ / (1 − β₂ᵏ), if Λ > 0. Rates refer to
the schedule's peak.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from core.config import REFERENCE_LR, OptimConfig, TrainConfig, is_own
from core.errors import ConfigError
from core.optim.muon import Muon
from core.optim.own_optimizer import build_own, try_own

logger = logging.getLogger(__name__)

_COUNTERS = {"step", "mu_product"}
ADAM_EPS = 1e-8  # arXiv 1412.6980; torch's default


class StepOptimizer:
    """An optimizer driven by the schedule's factor and the progress of the run.

    A step is `begin_step` on the host, both passes, `step` on the device, `end_step` on the host. `head` are the
    classifier's parameters, if `needs_head`; `layer_scales` the factors of `optim.layer_decay`, by parameter. A CUDA
    graph can capture `step` if `capturable`, which torch's NAdam supports on CUDA only.
    """

    switched_at: float | None = None
    """Progress at the switch of SWATS."""
    sgd_lr: float | None = None
    """Peak learning rate after it."""

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        head: Collection[nn.Parameter] = (),
        *,
        layer_scales: Mapping[nn.Parameter, float] | None = None,
        capturable: bool = False,
    ) -> None:
        self._config = config.optim
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._checked: set[Hashable] = set()  # phases
        self._head = {id(p) for p in head}
        self._scales = {id(p): self._scale_of(p, layer_scales or {}) for p in self._params}
        self._frozen = False
        self._capturable = capturable
        self.lr = config.optim.peak_lr(config.batch_size)
        """Of the classifier in the last step; at first the peak."""
        self._begin(config.optim.name, self.lr)

    @property
    def capturable(self) -> bool:
        """Whether `step` can be captured, with its factor as a tensor."""
        return self._capturable

    @property
    def phase(self) -> Hashable:
        """Key of the kernels of `step`. The first step of a phase creates state, so it cannot be captured."""
        return (self._frozen,)

    @property
    def phase_end(self) -> float:
        """Progress of the run at which the phase is known to end; 1 if it may last."""
        return self._config.head_only_fraction if self._frozen else 1.0

    @property
    def moments(self) -> int:
        """Maximum number of state tensors per parameter."""
        return int(self._config.momentum > 0) if self._config.name == "sgd" else 2

    def begin_step(self, progress: float) -> None:
        """Freeze or unfreeze the backbone, at `progress` in [0, 1) of the run."""
        frozen = progress < self._config.head_only_fraction
        if frozen == self._frozen:
            return
        for parameter in self._params:
            if id(parameter) not in self._head:
                parameter.requires_grad_(not frozen)
                parameter.grad = None
        self._frozen = frozen

    def step(self, factor: float | Tensor) -> None:
        """Clip gradients, decay weights and update them. The schedule's `factor` is a tensor only if `capturable`.

        Raises:
            ConfigError: gradients are in another memory order than their weights, in the first step of a phase.
        """
        if self.phase not in self._checked:
            self._check_layouts()
            self._checked.add(self.phase)
        self._set_rates(factor)
        if self._config.grad_clip is not None:
            nn.utils.clip_grad_norm_(self._params, self._config.grad_clip, foreach=True)
        if self._shrinks_by_hand and self._config.weight_decay:
            decayed: list[Tensor] = [p for p in self._params if _is_decayed(p) and p.grad is not None]
            if decayed:
                with torch.no_grad():
                    torch._foreach_mul_(decayed, 1 - factor * self._config.weight_decay)
        self._inner.step()
        self._observe()

    def end_step(self, factor: float) -> None:
        """Record the rate of the step."""
        self.lr = self._peak_lr * factor

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients or fill them with zeros."""
        self._inner.zero_grad(set_to_none)

    def end_epoch(self) -> None:
        """Read device state. May wait for the device."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, of live tensors."""
        return {"lr": self.lr, "moments": self._inner.state_dict()["state"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state, also from another device."""
        self.lr = state["lr"]
        moments = {
            index: {name: value.clone() if isinstance(value, Tensor) else value for name, value in moment.items()}
            for index, moment in state["moments"].items()
        }
        self._inner.load_state_dict({"state": moments, "param_groups": self._inner.state_dict()["param_groups"]})
        self._hold_rates()  # torch has copied the groups
        if not self._capturable and not self._inner.defaults.get("fused"):
            # These count on the CPU, and each step would wait for counters that `map_location` moved to the device.
            for moment in self._inner.state.values():
                for name in _COUNTERS & moment.keys():
                    moment[name] = moment[name].cpu()

    def _observe(self) -> None:
        """End the device part."""

    def _check_layouts(self) -> None:
        """Check that gradients are in their weights' order in memory, by which fused kernels pair elements."""
        if not self._inner.defaults.get("fused"):
            return
        for parameter in self._params:
            gradient = parameter.grad
            if gradient is not None and not _same_order(gradient, parameter):
                raise ConfigError(
                    f"optim.name: {self._config.name} needs gradients in the memory order of their weights, but the "
                    f"strides of {self._names[id(parameter)]} are {parameter.stride()} and those of its gradient "
                    f"{gradient.stride()}; set it to nadam, or choose another model.name"
                )

    def _begin(self, name: str, peak_lr: float) -> None:
        config = self._config
        self._peak_lr = peak_lr
        # torch's SGD decays through the momentum.
        self._shrinks_by_hand = name in ("sgd", "muon") or is_own(name)
        betas = (config.beta1, config.beta2)
        groups = self._groups(peak_lr, decay=0.0 if self._shrinks_by_hand else config.weight_decay)
        if name == "sgd":
            # torch rejects Nesterov's form without momentum.
            nesterov = config.nesterov and config.momentum > 0
            self._inner: torch.optim.Optimizer = torch.optim.SGD(
                groups, lr=peak_lr, momentum=config.momentum, nesterov=nesterov, fused=True
            )  # always capturable
        elif name == "nadam":  # has no fused form
            self._inner = torch.optim.NAdam(
                groups,
                lr=peak_lr,
                betas=betas,
                eps=ADAM_EPS,
                decoupled_weight_decay=True,
                foreach=True,
                capturable=self._capturable,
            )
        elif is_own(name):
            self._inner = build_own(config, groups, peak_lr)
        elif name == "muon":
            self._inner = Muon(groups, lr=peak_lr, momentum=config.momentum, nesterov=config.nesterov, betas=betas)
        else:
            self._inner = torch.optim.AdamW(
                groups, lr=peak_lr, betas=betas, eps=ADAM_EPS, fused=True, capturable=self._capturable
            )
        if self._capturable:
            device = self._params[0].device
            peaks = [peak_lr * group["lr_scale"] for group in self._inner.param_groups]
            # Copying numbers from the host would wait.
            self._peak_rates = torch.stack([torch.full((), peak, dtype=torch.float32, device=device) for peak in peaks])
            self._rates = self._peak_rates.clone()
            self._hold_rates()

    def _hold_rates(self) -> None:
        if self._capturable:
            for group, rate in zip(self._inner.param_groups, self._rates.unbind(), strict=True):
                group["lr"] = rate

    def _set_rates(self, factor: float | Tensor) -> None:
        if self._capturable:
            torch.mul(self._peak_rates, factor, out=self._rates)
            return
        if isinstance(factor, Tensor):
            raise TypeError("this optimizer is not capturable: its factor must be a number")
        for group in self._inner.param_groups:
            group["lr"] = self._peak_lr * factor * group["lr_scale"]

    def _groups(self, peak_lr: float, *, decay: float) -> list[dict[str, Any]]:
        members: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
        for p in self._params:
            members.setdefault((not _is_decayed(p), id(p) in self._head, self._scales[id(p)]), []).append(p)
        groups = []
        for (exempt, of_head, scale), params in sorted(members.items(), key=lambda each: each[0]):
            # Both shrink by lr × weight_decay.
            per_lr = 0.0 if exempt else decay / (peak_lr * scale)
            group = {"params": params, "weight_decay": per_lr, "lr_scale": scale}
            if self._config.name == "muon" and (of_head or exempt):
                group["use_fallback"] = True
            groups.append(group)
        return groups

    def _scale_of(self, parameter: nn.Parameter, layer_scales: Mapping[nn.Parameter, float]) -> float:
        """Learning rate of a parameter as a fraction of the classifier's."""
        backbone = 1.0 if id(parameter) in self._head else self._config.backbone_lr_scale
        return backbone * layer_scales.get(parameter, 1.0)


class OwnOptimizer(StepOptimizer):
    """An optimizer of the user's own, whose rate is a number."""

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        head: Collection[nn.Parameter] = (),
        *,
        layer_scales: Mapping[nn.Parameter, float] | None = None,
    ) -> None:
        self._moments = try_own(config.optim)
        super().__init__(config, model, head, layer_scales=layer_scales)

    @property
    def moments(self) -> int:
        return self._moments

    def state_dict(self) -> dict[str, Any]:
        state = self._inner.state_dict()
        plain = [{name: value for name, value in group.items() if name != "params"} for group in state["param_groups"]]
        return super().state_dict() | {"groups": plain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state, with numbers that the optimizer keeps in its groups."""
        self.lr = state["lr"]
        groups = self._inner.state_dict()["param_groups"]
        kept = [group | known for group, known in zip(groups, state["groups"], strict=True)]
        self._inner.load_state_dict({"state": state["moments"], "param_groups": kept})


class Swats(StepOptimizer):
    """SWATS."""

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        head: Collection[nn.Parameter] = (),
        *,
        layer_scales: Mapping[nn.Parameter, float] | None = None,
        capturable: bool = False,
    ) -> None:
        super().__init__(config, model, head, layer_scales=layer_scales, capturable=capturable)
        self._adam_lr = self._peak_lr
        (sgd, sgd_power), (adam, adam_power) = REFERENCE_LR["sgd"], REFERENCE_LR["swats"]
        self._sgd_over_adam = sgd / adam * (config.batch_size / 256) ** (sgd_power - adam_power)
        self._warmup_fraction = config.schedule.warmup_fraction
        self._projection: _Projection | None = None
        if config.optim.swats.switch == "criterion":
            self._projection = _Projection(config.optim, self._adam_lr, self._params[0].device)
        self._settled_lr: float | None = None  # Λ, once the criterion was met and read
        self._judged = False

    @property
    def phase(self) -> Hashable:
        return (super().phase, self.switched_at is not None, self._judged)

    @property
    def phase_end(self) -> float:
        end = super().phase_end
        if self.switched_at is None and self._projection is None:
            return min(end, self._config.swats.switch_fraction)
        if self.switched_at is None and not self._judged:
            return min(end, self._warmup_fraction)
        return end

    def begin_step(self, progress: float) -> None:
        super().begin_step(progress)
        if self.switched_at is None:
            self._switch_if_due(progress)
        watches = self.switched_at is None and self._projection is not None
        self._judged = watches and progress >= self._warmup_fraction

    def _observe(self) -> None:
        if self.switched_at is None and self._projection is not None:
            moved = [p for p in self._params if p.grad is not None]
            moments = [self._inner.state[p] for p in moved]
            self._projection.observe(
                [p.grad for p in moved if p.grad is not None],
                [moment["exp_avg"] for moment in moments],
                [moment["exp_avg_sq"] for moment in moments],
                judged=self._judged,
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
            "SWATS switches to SGD at %.3g of the run, with a peak learning rate of %.3g", progress, self.sgd_lr
        )


class _Projection:
    """Estimate of SGD's rate in float64. With an Adam step p = −α d at the schedule's peak, γ = α dᵀd / dᵀg."""

    def __init__(self, config: OptimConfig, peak_lr: float, device: torch.device) -> None:
        self._beta1, self._beta2 = config.beta1, config.beta2
        self._tolerance, self._peak_lr = config.swats.tolerance, peak_lr
        # On the device and changed in place, for captured steps.
        self._k = torch.zeros((), dtype=torch.float64, device=device)
        self._average = torch.zeros((), dtype=torch.float64, device=device)  # λ
        self._settled_lr = torch.zeros((), dtype=torch.float64, device=device)  # Λ when met, else 0

    @torch.no_grad()
    def observe(self, gradients: list[Tensor], first: list[Tensor], second: list[Tensor], *, judged: bool) -> None:
        self._k += 1
        # `**` of a number and a tensor was not always capturable.
        first_correction, second_correction = (1 - torch.pow(beta, self._k) for beta in (self._beta1, self._beta2))
        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, second_correction.sqrt().to(roots[0].dtype))
        torch._foreach_add_(roots, ADAM_EPS)
        directions = torch._foreach_div(first, roots)  # d without the first moment's correction
        squares = torch.stack(torch._foreach_norm(directions)).double().square().sum()
        product = _sum(torch._foreach_mul(directions, gradients))

        defined = product != 0
        gamma = self._peak_lr / first_correction * squares / product
        self._average.copy_(torch.where(defined, self._average.lerp(gamma, 1 - self._beta2), self._average))
        if judged:
            lr = self._average / second_correction
            met = defined & (self._k > 1) & ((lr - gamma).abs() < self._tolerance) & (lr > 0) & (self._settled_lr == 0)
            self._settled_lr.copy_(torch.where(met, lr, self._settled_lr))

    def read(self) -> float | None:
        """Return Λ once the criterion was met. Waits for the device."""
        return self._settled_lr.item() or None

    def state_dict(self) -> dict[str, Any]:
        return {"k": self._k, "average": self._average, "settled_lr": self._settled_lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._k.copy_(state["k"])
        self._average.copy_(state["average"])
        self._settled_lr.copy_(state["settled_lr"])


def needs_head(config: OptimConfig) -> bool:
    """Return whether the optimizer treats the classifier differently."""
    return config.name == "muon" or config.backbone_lr_scale != 1 or config.head_only_fraction > 0


def build_optimizer(
    config: TrainConfig,
    model: nn.Module,
    total_steps: int,
    head: Collection[nn.Parameter] = (),
    *,
    layer_scales: Mapping[nn.Parameter, float] | None = None,
    capturable: bool = False,
) -> StepOptimizer:
    """Create a run's optimizer; see `StepOptimizer`."""
    if is_own(config.optim.name):
        return OwnOptimizer(config, model, head, layer_scales=layer_scales)
    if config.optim.name != "swats":
        return StepOptimizer(config, model, head, layer_scales=layer_scales, capturable=capturable)
    swats = config.optim.swats
    if swats.switch == "fraction" and (total_steps - 1) / total_steps < swats.switch_fraction:
        logger.warning(
            "optim.swats.switch_fraction %g: a run of steps=%d ends before the switch",
            swats.switch_fraction,
            total_steps,
        )
    return Swats(config, model, head, layer_scales=layer_scales, capturable=capturable)


def _is_decayed(parameter: Tensor) -> bool:
    return parameter.ndim >= 2


def _same_order(one: Tensor, other: Tensor) -> bool:
    sides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(size == 1 or stride == its_stride for size, stride, its_stride in sides)


def _sum(tensors: tuple[Tensor, ...]) -> Tensor:
    """Sum of all elements from 1-norms, for want of a foreach sum. Overwrites the tensors."""
    absolute = torch.stack(torch._foreach_norm(tensors, 1)).double().sum()
    torch._foreach_clamp_min_(tensors, 0)
    return 2 * torch.stack(torch._foreach_norm(tensors, 1)).double().sum() - absolute
