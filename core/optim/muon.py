"""Muon (https://kellerjordan.github.io/posts/muon/) with the orthogonalization of many matrices at once.

It equals timm's Muon up to rounding. timm's takes one matrix at a time and launches ten times as many kernels, and
torch's accepts no filters. Updates are scaled to the size of AdamW's (arXiv 2502.16982).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# (a, b, c) of X ← a X + (b X Xᵀ + c (X Xᵀ)²) X, timm's default
# (https://leloykun.github.io/ponder/muon-opt-coeffs/#how-do-we-optimize-the-coefficients).
_ITERATIONS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_EPS = 1e-7  # timm's, also of its AdamW
_DTYPE = torch.bfloat16  # of the products
_FEWEST_ROWS, _LARGEST_ASPECT = 4, 128  # timm's: AdamW is used for narrower matrices

# Zero rows and columns change no other element, so matrices of two shapes can share a batch. It saves some 25 launches,
# on a GPU the time of this many operations. A CPU gains nothing.
_PADDING_OPERATIONS = {"cuda": 15e9}


class Muon(torch.optim.Optimizer):
    """Muon for matrices and filters, AdamW or NAdamW (`nesterov`) for other parameters and groups with `use_fallback`.

    Learning rates may be tensors on the device, and CUDA graphs can capture every step but the first.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        nesterov: bool,
        betas: tuple[float, float],
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "betas": betas, "use_fallback": False}
        super().__init__(params, {**defaults, "fused": True})  # `fused` keeps counters on the device
        self._plans: dict[tuple[int, ...], tuple[list[_Batch], Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the parameters that have gradients."""
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            matrices = [] if group["use_fallback"] else [p for p in moved if _is_orthogonalized(p)]
            others = moved if group["use_fallback"] else [p for p in moved if not _is_orthogonalized(p)]
            if matrices:
                self._orthogonalize(matrices, group)
            if others:
                self._adapt(others, group)

    def _orthogonalize(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        averages = self._moments(parameters, "momentum_buffer")
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        key = tuple(map(id, parameters))
        if key not in self._plans:
            self._plans[key] = _plan(parameters)
        batches, scales = self._plans[key]
        rates = (scales * group["lr"]).unbind()
        for batch in batches:
            theirs, updates = _members(batch, parameters), _members(batch, averages)
            if group["nesterov"]:
                updates = list(torch._foreach_lerp(_members(batch, gradients), updates, group["momentum"]))
            matrices = updates[0].new_empty((len(theirs), *batch.size), dtype=_DTYPE)
            if batch.padded:
                matrices.zero_()
            torch._foreach_copy_(_parts(matrices, theirs), updates)
            torch._foreach_addcmul_(theirs, _parts(_orthogonal(matrices), theirs), _members(batch, rates))

    def _adapt(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if "step" not in self.state[parameter]:
                self.state[parameter]["step"] = torch.zeros((), device=parameter.device)
        averages = self._moments(parameters, "exp_avg")
        beta1, beta2 = group["betas"]
        if group["nesterov"]:
            # NAdamW averages the gradient into the kept moment, then once more for the step.
            ahead = list(torch._foreach_lerp(averages, gradients, 1 - beta1))
            torch._foreach_copy_(averages, ahead)
            averages = ahead
        adamw(
            parameters,
            gradients,
            averages,
            self._moments(parameters, "exp_avg_sq"),
            [],
            [self.state[parameter]["step"] for parameter in parameters],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=0.0,
            eps=_EPS,
            maximize=False,
        )

    def _moments(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [self.state[parameter][name] for parameter in parameters]


@dataclass(frozen=True)
class _Batch:
    """Matrices that are orthogonalized together: those of `members`, in rows and columns of the widest."""

    size: tuple[int, int]
    members: list[int]
    padded: bool


def _plan(parameters: Sequence[Tensor]) -> tuple[list[_Batch], Tensor]:
    """Return the batches, and minus the size (n,) of each parameter's step at a learning rate of 1."""
    by_size: dict[tuple[int, int], list[int]] = {}
    sides = [_sides(parameter) for parameter in parameters]
    for member, (rows, columns) in enumerate(sides):
        by_size.setdefault((min(rows, columns), max(rows, columns)), []).append(member)
    device = parameters[0].device
    merged = _merged(by_size, _PADDING_OPERATIONS.get(device.type, 0))
    batches = [_Batch(size, members, by_size.get(size) != members) for size, members in merged.items()]
    # Copying numbers from the host would wait.
    scales = [torch.full((), -0.2 * math.sqrt(max(both)), device=device) for both in sides]
    return batches, torch.stack(scales)


def _members(batch: _Batch, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensors[member] for member in batch.members]


def _merged(by_size: dict[tuple[int, int], list[int]], budget: float) -> dict[tuple[int, int], list[int]]:
    """Merge the sizes whose padding costs least, while it costs less than `budget` operations."""
    by_size = dict(by_size)

    def padding(pair: tuple[tuple[int, int], tuple[int, int]]) -> float:
        one, other = pair
        widest = (max(one[0], other[0]), max(one[1], other[1]))
        return sum(len(by_size[size]) * (_operations(widest) - _operations(size)) for size in pair)

    while len(by_size) > 1:
        one, other = min(combinations(by_size, 2), key=padding)
        if padding((one, other)) >= budget:
            break
        members = by_size.pop(one) + by_size.pop(other)
        widest = (max(one[0], other[0]), max(one[1], other[1]))
        by_size[widest] = by_size.get(widest, []) + members
    return by_size


def _operations(size: tuple[int, int]) -> int:
    rows, columns = size
    return len(_ITERATIONS) * 2 * rows * rows * (2 * columns + rows)


def _orthogonal(matrices: Tensor) -> Tensor:
    """Orthogonalize (n, rows, columns) with rows ≤ columns by Newton and Schulz's iteration; overwrites them."""
    x = matrices.div_(torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True).clamp_(min=_EPS))
    square, polynomial = (x.new_empty(len(x), x.shape[1], x.shape[1]) for _ in range(2))
    other = torch.empty_like(x)
    for a, b, c in _ITERATIONS:
        torch.bmm(x, x.mT, out=square)
        torch.baddbmm(square, square, square, beta=b, alpha=c, out=polynomial)
        torch.baddbmm(x, polynomial, x, beta=a, out=other)
        x, other = other, x
    return x


def _parts(matrices: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of a batch of matrices that belong to the parameters, in their shapes."""
    return [_part(matrix, parameter) for matrix, parameter in zip(matrices.unbind(), parameters, strict=True)]


def _part(matrix: Tensor, parameter: Tensor) -> Tensor:
    rows, columns = _sides(parameter)
    if rows > columns:
        matrix = matrix.mT
    # The order of columns is free: the parameter's order in memory is the fastest.
    order = sorted(range(1, parameter.ndim), key=parameter.stride, reverse=True)
    part = matrix[:rows, :columns].view(rows, *(parameter.shape[axis] for axis in order))
    return part.permute(0, *(1 + order.index(axis) for axis in range(1, parameter.ndim)))


def _sides(parameter: Tensor) -> tuple[int, int]:
    return parameter.shape[0], math.prod(parameter.shape[1:])


def _is_orthogonalized(parameter: Tensor) -> bool:
    if parameter.ndim < 2 or 1 in parameter.shape[:2]:  # such as depthwise filters
        return False
    narrow, wide = sorted(_sides(parameter))
    return narrow >= _FEWEST_ROWS and wide <= _LARGEST_ASPECT * narrow
