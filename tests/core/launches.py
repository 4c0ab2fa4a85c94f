"""Counts the kernels that a function would launch on CUDA, from the operations that it runs on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.core.recorded import Operations

aten = torch.ops.aten
_EMPTY = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.detach}


def launches(function: Callable[[], object]) -> int:
    """Count the kernels of a function: at least one per operation that is no view and no allocation."""
    with _Counter() as counter:
        function()
    return counter.count


class _Counter(Operations):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        aliases = [result.alias_info for result in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and func.overloadpacket not in _EMPTY:
            self.count += _kernels(func, args, kwargs)
        return func(*args, **kwargs)


def _kernels(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    name = func.overloadpacket.__name__
    if name.startswith("_foreach"):
        lists = [each for each in args if isinstance(each, (list, tuple)) and each and isinstance(each[0], Tensor)]
        return 1 if all(_in_step(group) for group in zip(*lists, strict=True)) else len(lists[0])
    if name in ("addmm", "baddbmm") and kwargs.get("beta", 1) != 0:
        return 2  # a copy, then the product
    if name == "convolution_backward":
        return sum(args[-1])  # a kernel for each gradient
    return 1


def _in_step(tensors: tuple[Tensor, ...]) -> bool:
    """Whether one kernel can process such tensors of all lists: dense, and equal in layout and dtype."""
    first = tensors[0]
    return all(
        t.shape == first.shape and t.stride() == first.stride() and t.dtype == first.dtype and _is_dense(t)
        for t in tensors
    )


def _is_dense(tensor: Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))
