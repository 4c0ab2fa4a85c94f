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

A step has two halves. What the host decides is in `begin_step` and `end_step`; `step` is the device's half, which never
waits and can be captured as a CUDA graph: there the schedule's factor is a scalar on the device, and so is all that
follows from it, the learning rates included. Without capture the factor is a number, which is faster on the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from core.config import REFERENCE_LR, OptimConfig, TrainConfig

logger = logging.getLogger(__name__)

_COUNTERS = {"step", "mu_product"}  # torch's and timm's names for them
ADAM_EPS = 1e-8  # Kingma and Ba 2015, arXiv 1412.6980; torch's default
# timm's Muon can be captured from 1.0.28 on, but up to 1.0.30 its fallback then divides 0 by 0 where both the rate and
# a second moment are 0, as in the first step of a warm-up from 0.
_CAPTURABLE_MUON = (1, 0, 31)


class StepOptimizer:
    """An optimizer that is told at every step where the run stands.

    A step is `begin_step`, the forward and backward passes, `step`, `end_step`.

    Args:
        config: the run's.
        model: on its device already. Parameters that need no gradient are left alone.
        head: the classifier's parameters, where `needs_head`.
        capturable: whether `step` shall be fit for a CUDA graph. That costs time where none is captured. torch's NAdam
            and timm's Muon allow it on CUDA only.
    """

    switched_at: float | None = None
    """SWATS: the progress of the first step that SGD made; None before."""
    sgd_lr: float | None = None
    """SWATS: the peak learning rate of SGD, as torch's SGD takes it; None before the switch."""

    def __init__(
        self, config: TrainConfig, model: nn.Module, head: Collection[nn.Parameter] = (), *, capturable: bool = False
    ) -> None:
        self._config = config.optim
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._head = {id(p) for p in head}
        self._frozen = False
        self._capturable = capturable
        if capturable and config.optim.name == "muon" and not _muon_is_capturable():
            logger.info(
                "timm's Muon can be captured in a CUDA graph from timm 1.0.31 on: its steps are launched singly"
            )
            self._capturable = False
        self.lr = config.optim.peak_lr(config.batch_size)
        """The learning rate of the last step, the classifier's; its peak before the first."""
        self._begin(config.optim.name, self.lr)

    @property
    def capturable(self) -> bool:
        """Whether `step` may be captured in a CUDA graph, and takes its factor as a tensor."""
        return self._capturable

    @property
    def phase(self) -> Hashable:
        """What decides which kernels `step` launches: a captured step is valid as long as this stays equal.

        The first step of a phase also makes the moments of what moves from then on, so it cannot be the captured one.
        `load_state_dict` makes them anew: nothing that was captured before is valid after it.
        """
        return (self._frozen,)

    @property
    def moments(self) -> int:
        """How many tensors of the parameters' sizes its state holds, at most and at any time of the run."""
        return int(self._config.momentum > 0) if self._config.name == "sgd" else 2

    def begin_step(self, progress: float) -> None:
        """To be called before a step's forward pass: takes the backbone out of it while the classifier trains alone.

        The host's half; never captured.

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

    def step(self, factor: float | Tensor) -> None:
        """Clips the gradients, shrinks the weights, and moves them: the device's half.

        Args:
            factor: the schedule's, in [0, 1]: `core.schedule.factor` at this progress; a number, or where this is
                `capturable` a float32 scalar () on the device.

        Raises:
            TypeError: the factor is a tensor, but this is not `capturable`: it would have to be read back.
        """
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
        """To be called after a step, with the schedule's factor as a number: the host's record of it."""
        self.lr = self._peak_lr * factor

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, or fills them with zeros."""
        self._inner.zero_grad(set_to_none)

    def end_epoch(self) -> None:
        """To be called at the end of every epoch. May wait for the device."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs. The tensors are the live ones: save or copy them before the next step."""
        return {"lr": self.lr, "moments": self._inner.state_dict()["state"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a state, bitwise. The state is copied, and rates come from the configuration.

        The state may be of an optimizer on another device, capturable or not.
        """
        self.lr = state["lr"]
        moments = {
            index: {name: value.clone() if isinstance(value, Tensor) else value for name, value in moment.items()}
            for index, moment in state["moments"].items()
        }
        self._inner.load_state_dict({"state": moments, "param_groups": self._inner.state_dict()["param_groups"]})
        self._hold_rates()  # torch has put copies into the groups
        if not self._capturable and not self._inner.defaults.get("fused"):
            # These count on the CPU, and would wait for the device at each step if a checkpoint had moved their
            # counters. What is fused or captured counts on the device, and torch has moved its counters there.
            for moment in self._inner.state.values():
                for name in _COUNTERS & moment.keys():
                    moment[name] = moment[name].cpu()

    def _observe(self) -> None:
        """For an optimizer that watches its own steps; the end of the device's half."""

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
            )  # needs no word to be capturable
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
        elif name == "muon":
            from timm.optim.muon import Muon

            # Versions of timm that know no `capturable` are told nothing of it.
            options: dict[str, Any] = {"capturable": True} if self._capturable else {}
            self._inner = Muon(
                groups, lr=peak_lr, momentum=config.momentum, nesterov=config.nesterov, betas=betas, **options
            )
        else:
            self._inner = torch.optim.AdamW(
                groups, lr=peak_lr, betas=betas, eps=ADAM_EPS, fused=True, capturable=self._capturable
            )
        if self._capturable:
            device = self._params[0].device
            peaks = [peak_lr * group["lr_scale"] for group in self._inner.param_groups]
            # Filled on the device: copying a list of numbers to it would wait.
            self._peak_rates = torch.stack([torch.full((), peak, dtype=torch.float32, device=device) for peak in peaks])
            self._rates = self._peak_rates.clone()
            self._hold_rates()

    def _hold_rates(self) -> None:
        """Where steps are captured, the groups' rates are views of one tensor, which `_set_rates` fills."""
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

    def __init__(
        self, config: TrainConfig, model: nn.Module, head: Collection[nn.Parameter] = (), *, capturable: bool = False
    ) -> None:
        super().__init__(config, model, head, capturable=capturable)
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
            "SWATS goes on as SGD at %.3g of the run, with a peak learning rate of %.3g", progress, self.sgd_lr
        )


class _Projection:
    """Algorithm 1's estimate of SGD's rate, kept on the device in float64.

    In the paper's letters: a step of Adam at the schedule's peak is p = −α d, so γ = pᵀp / (−pᵀg) = α dᵀd / dᵀg.
    """

    def __init__(self, config: OptimConfig, peak_lr: float, device: torch.device) -> None:
        self._beta1, self._beta2 = config.beta1, config.beta2
        self._tolerance, self._peak_lr = config.swats.tolerance, peak_lr
        # All on the device, even the count, and changed in place, so that a captured step finds them again.
        self._k = torch.zeros((), dtype=torch.float64, device=device)
        self._average = torch.zeros((), dtype=torch.float64, device=device)  # λ
        self._settled_lr = torch.zeros((), dtype=torch.float64, device=device)  # Λ where it was met, 0 before

    @torch.no_grad()
    def observe(self, gradients: list[Tensor], first: list[Tensor], second: list[Tensor], *, judged: bool) -> None:
        """Takes in one step of Adam: its gradients and both moments after it, a tensor for each parameter."""
        self._k += 1
        # `torch.pow`: what ** makes of a number and a tensor was not always fit for capture.
        first_correction, second_correction = (1 - torch.pow(beta, self._k) for beta in (self._beta1, self._beta2))
        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, second_correction.sqrt().to(roots[0].dtype))
        torch._foreach_add_(roots, ADAM_EPS)
        directions = torch._foreach_div(first, roots)  # d, but for the first moment's correction
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
        """Λ, or None while the criterion has not been met. Waits for the device."""
        return self._settled_lr.item() or None

    def state_dict(self) -> dict[str, Any]:
        return {"k": self._k, "average": self._average, "settled_lr": self._settled_lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._k.copy_(state["k"])
        self._average.copy_(state["average"])
        self._settled_lr.copy_(state["settled_lr"])


def needs_head(config: OptimConfig) -> bool:
    """Whether the optimizer must know which parameters are the classifier's."""
    return config.name == "muon" or config.backbone_lr_scale != 1 or config.head_only_fraction > 0


def build_optimizer(
    config: TrainConfig,
    model: nn.Module,
    total_steps: int,
    head: Collection[nn.Parameter] = (),
    *,
    capturable: bool = False,
) -> StepOptimizer:
    """The optimizer of a run of that many steps; the other arguments are those of `StepOptimizer`."""
    if config.optim.name != "swats":
        return StepOptimizer(config, model, head, capturable=capturable)
    swats = config.optim.swats
    if swats.switch == "fraction" and (total_steps - 1) / total_steps < swats.switch_fraction:
        logger.warning(
            "optim.swats.switch_fraction %g: a run of %d step(s) ends before the switch",
            swats.switch_fraction,
            total_steps,
        )
    return Swats(config, model, head, capturable=capturable)


def _muon_is_capturable() -> bool:
    import timm

    return tuple(int(part) for part in timm.__version__.split(".")[:3]) >= _CAPTURABLE_MUON


def _is_decayed(parameter: Tensor) -> bool:
    return parameter.ndim >= 2


def _sum(tensors: tuple[Tensor, ...]) -> Tensor:
    """The sum of all elements, a float64 scalar. Overwrites the tensors.

    There is no foreach sum, but a foreach 1-norm, and a sum is twice its positive part's less all absolute values.
    """
    absolute = torch.stack(torch._foreach_norm(tensors, 1)).double().sum()
    torch._foreach_clamp_min_(tensors, 0)
    return 2 * torch.stack(torch._foreach_norm(tensors, 1)).double().sum() - absolute
