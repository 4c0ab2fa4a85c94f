"""CPU stand-ins for CUDA graphs (`RecordedGraph`), and detection of host synchronization (`HostReads`).

`RecordedGraph` records the operations of a function with their tensors, and repeats them on the same tensors. Python is
not run again, so its numbers are frozen as in a graph. In contrast to a graph, tensors made from host numbers are
recorded as constants instead of being refused, and freed memory is never reused.

`HostReads` sees torch's operations and tensor methods that copy to the host or whose result size depends on values. It
does not see the buffer protocol, data pointers, kernels that read their arguments (fused optimizers with a tensor
learning rate on the CPU), methods called by torch's own Python functions, or `x.to("cpu")` on the CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    import pytest  # benchmarks run without it

aten = torch.ops.aten


# ---- the graph


class RecordedGraph:
    """Recorded operations of a function."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []

    @classmethod
    def capture(cls, function: Callable[[], object]) -> Callable[[], None]:
        """Run the function once, and return a function that repeats its operations.

        Raises:
            HostReadError: the function reads a computed value.
        """
        graph = cls()
        with HostReads(), _Recorder(graph._calls):
            function()
        return graph.replay

    @torch.inference_mode()
    def replay(self) -> None:
        """Repeat the recorded operations on the recorded tensors."""
        # Autograd and autocast were already applied when recording.
        with torch._C._AutoDispatchBelowAutograd(), torch.autocast("cpu", enabled=False):
            for call in self._calls:
                call.repeat()


@dataclass(frozen=True)
class _Call:
    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor]
    """Newly allocated results."""
    repeated: bool
    """False for views and uninitialized memory, which only need to stay alive."""

    def repeat(self) -> None:
        if not self.repeated:
            return
        again = self.operation(*self.args, **self.kwargs)
        if self.results:
            for result, value in zip(self.results, _tensors(again), strict=True):
                result.copy_(value)


class Operations(TorchDispatchMode):
    """Intercepts every primitive operation, including backward passes.

    In inference mode composite operations arrive undecomposed, and are decomposed here.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            parts = func.decompose(*args, **kwargs)
        return self.run(func, args, kwargs) if parts is NotImplemented else parts

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operation and return its result."""
        raise NotImplementedError


class _Recorder(Operations):
    """Appends every operation to a list."""

    def __init__(self, calls: list[_Call]) -> None:
        super().__init__()
        self._calls = calls

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        aliases = [result.alias_info for result in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        writes_all = bool(aliases) and all(alias is not None and alias.is_write for alias in aliases)
        # An operation may write to its arguments and allocate results, as batch norm does.
        results = [] if is_view or writes_all else _tensors(out)
        repeated = not is_view and func.overloadpacket not in _WITHOUT_VALUES
        # Results of views are arguments of later calls.
        self._calls.append(_Call(func, args, kwargs, _tensors(out) if is_view else results, repeated))
        return out


_WITHOUT_VALUES = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# ---- waits


class HostReadError(RuntimeError):
    """The host would have waited for the device."""


class HostReads:
    """Detects operations that make the host wait for the device.

    Args:
        device: the training's device; copies from it to other devices are detected.
        raises: raise HostReadError instead of counting.
        numbers: also detect tensors made from the host's numbers, whose copy to a device waits.
    """

    def __init__(self, device: str | torch.device = "cpu", *, raises: bool = True, numbers: bool = False) -> None:
        self.found: list[str] = []
        """The operations that were such, in order."""
        self._raises = raises
        self.reading = _READING | {aten.lift_fresh} if numbers else _READING
        self._modes = (_ReadingMethods(self), _ReadingOperations(self, torch.device(device)))

    @property
    def count(self) -> int:
        return len(self.found)

    def note(self, name: str) -> None:
        self.found.append(name)
        if self._raises:
            raise HostReadError(f"{name} makes the host wait for the device")

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)


class _ReadingOperations(Operations):
    def __init__(self, reads: HostReads, device: torch.device) -> None:
        super().__init__()
        self._reads, self._device = reads, device

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._waits(func, args, kwargs):
            self._reads.note(str(func))
        return func(*args, **kwargs)

    def _waits(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        operation = func.overloadpacket
        if operation in self._reads.reading:
            return True
        if operation is aten.repeat_interleave:
            return kwargs.get("output_size") is None
        if operation in _INDEXING:
            # The number of indices of a mask depends on its values.
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if operation is aten.copy_:
            return args[1].device.type == self._device.type != args[0].device.type
        if operation is aten._to_copy:
            to = kwargs.get("device")
            return to is not None and args[0].device.type == self._device.type != torch.device(to).type
        return False


class _ReadingMethods(TorchFunctionMode):
    """Detects methods that read CPU memory without an operation."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING_METHODS:
            self._reads.note(f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


_READING = {
    aten._local_scalar_dense,  # item, float, int, bool, a tensor as a Python index
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.unique_dim_consecutive,
    aten.bincount,  # computes the largest value
    aten.equal,
    aten.allclose,
    aten._linalg_check_errors,
}
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index_put}
_READING_METHODS = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__}


# ---- capturable optimizers


def let_the_cpu_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow capturable NAdam and Muon on the CPU."""
    import timm.optim._helpers

    nadam = importlib.import_module("torch.optim.nadam")  # not an attribute of torch.optim

    def devices(supports_xla: bool = True) -> list[str]:
        return ["cpu", "cuda"]

    monkeypatch.setattr(nadam, "_get_capturable_supported_devices", devices)
    monkeypatch.setattr(timm.optim._helpers, "_get_capturable_supported_devices", devices, raising=False)
