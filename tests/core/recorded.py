"""CPU stand-ins for CUDA graphs (`RecordedGraph`), and detection of host synchronization (`HostReads`).

`RecordedGraph` records the operations of a function with their tensors, and repeats them on the same tensors. Python is
not run again, so its numbers are frozen as in a graph. In contrast to a graph, freed memory is never reused.

`HostReads` sees operations that copy to the host, make tensors of the host's numbers, or whose result size depends on
values, in torch's profiler. Under a dispatch mode torch would take other branches, which do not wait. It does not see
the buffer protocol, data pointers, methods called by torch's own Python functions, or `x.to("cpu")` on the CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
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
    """Detects operations of the body that make the host wait for the device, when it ends.

    Args:
        raises: raise HostReadError instead of only listing them.
    """

    def __init__(self, *, raises: bool = True) -> None:
        self.found: list[str] = []
        """Each with the operations that called it, outermost first."""
        self._raises = raises
        self._methods = _ReadingMethods(self.found)
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def __enter__(self) -> Self:
        self._profiler.__enter__()
        self._methods.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._methods.__exit__(kind, error, trace)
        self._profiler.__exit__(kind, error, trace)
        for path in _call_paths(self._profiler.profiler.kineto_results.events()):
            read, callers = path[-1], path[:-1]
            if not any(caller in _READING or read in _ON_THE_CPU.get(caller, ()) for caller in callers):
                self.found.append(" > ".join(path))
        if self.found and self._raises and error is None:
            raise HostReadError(f"the host waits for the device in {'; '.join(self.found)}")


def _call_paths(events: Iterable[Any]) -> Iterator[list[str]]:
    """Yield each reading event of the profiler with its callers. Its own tree takes longer to build than a step."""
    running: dict[int, list[tuple[int, str]]] = {}  # by thread, each with its end
    for event in sorted(events, key=lambda event: (event.start_ns(), -event.end_ns())):
        stack = running.setdefault(event.start_thread_id(), [])
        while stack and stack[-1][0] < event.end_ns():
            stack.pop()
        stack.append((event.end_ns(), event.name()))
        if event.name() in _READING:
            yield [name for _, name in stack]


class _ReadingMethods(TorchFunctionMode):
    """Detects methods that read CPU memory without an operation."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING_METHODS:
            self._found.append(f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


_READING = {
    "aten::item",  # also float, int, a tensor as a Python index
    "aten::_local_scalar_dense",
    "aten::is_nonzero",  # bool
    "aten::nonzero",  # also a mask as an index
    "aten::masked_select",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::unique_dim_consecutive",
    "aten::bincount",  # computes the largest value
    "aten::histc",  # the smallest and the largest
    "aten::equal",
    "aten::allclose",
    "aten::_linalg_check_errors",
    "aten::lift_fresh",  # a tensor of the host's numbers, whose copy to a device waits
}
_READING_METHODS = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__}

# Operation -> what it does on the CPU only.
_ON_THE_CPU: dict[str, tuple[str, ...]] = {
    # CUDA's kernels read a learning rate in a tensor on the device.
    "aten::_fused_adamw_": ("aten::item",),
    "aten::_fused_sgd_": ("aten::item",),
    # Adds a number to counters on CUDA, and a tensor to those on the CPU.
    "Optimizer.step#NAdam.step": ("aten::lift_fresh",),
}


# ---- capturable optimizers


def let_the_cpu_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow capturable NAdam on the CPU."""
    nadam = importlib.import_module("torch.optim.nadam")  # not an attribute of torch.optim

    def devices(supports_xla: bool = True) -> list[str]:
        return ["cpu", "cuda"]

    monkeypatch.setattr(nadam, "_get_capturable_supported_devices", devices)
