"""`--per-device auto`: how many trials at once train the most images per second on one device.

Before the first trial, 1, 2, 4, … processes train the baseline side by side for some seconds, as long as that gains a
tenth more images per second and they fit the device.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Barrier

import numpy as np
import torch

from core.data import Splits
from core.errors import GraphError
from core.loop import EpochMetrics, seconds_per_epoch, train
from core.runtime import is_out_of_memory
from core.text import count
from hpo.workers.capacity import Capacity, used_memory_bytes
from hpo.workers.engine import Resources, WorkerSpec
from hpo.workers.local import enter_child, in_child, own_name, run_in_child, signals_blocked, start_method
from hpo.workers.worker import open_data

# The gain that a larger number needs: more trials at once teach sampler and pruner less.
WORTHWHILE = 1.10
# Factor on the baseline's measured memory: other configurations may need more.
MARGIN = 1.25
# Seconds of timed training: on two CPU cores the rate of half a second of digits spreads by 2 to 4 %.
_WINDOW_S = 2.0
# Seconds for a process to open the data and to warm up.
_PATIENCE_S = 600.0


@dataclass(frozen=True)
class Measured:
    """The speed of several trainings side by side."""

    images_per_s: float
    """In total, validation included."""
    memory_bytes: int
    """The most used by one process."""


@dataclass(frozen=True)
class Choice:
    """The number of trials at once."""

    trials: int
    why: str
    measured: bool = True
    """False if the measurement failed; then it is not remembered."""


def choose(measure: Callable[[int], Measured], capacity: Capacity) -> Choice:
    """Double the number of trials at once as long as that is worthwhile.

    Args:
        measure: times so many trainings side by side; raises if they do not fit.
    """
    speeds: dict[int, float] = {}
    best, number, used, bound = 1, 1, 0, ""
    while True:
        try:
            measured = measure(number)
        except Exception as error:
            lost = (BrokenProcessPool, GraphError, threading.BrokenBarrierError)
            if not (is_out_of_memory(error) or isinstance(error, lost)):
                raise
            if not speeds:
                return Choice(1, not_measured(f"the baseline could not be timed ({error})"), measured=False)
            bound = f"{number} did not fit"
            break
        speeds[number], used = measured.images_per_s, max(used, measured.memory_bytes)
        if number > 1 and speeds[number] < WORTHWHILE * speeds[best]:
            break
        best = number
        fitting = int(capacity.memory_bytes // (MARGIN * used))
        number = min(2 * best, fitting, capacity.useful or 2 * best)
        if number <= best:
            bound = _bound(capacity, used, fitting)
            break
    return Choice(best, _explained(speeds, best, bound))


def _bound(capacity: Capacity, used: int, fitting: int) -> str:
    if capacity.useful is not None and capacity.useful <= max(fitting, 1):
        return capacity.why_useful
    return f"the memory holds no more ({used / 1e9:.1f} GB per trial, {capacity.memory_bytes / 1e9:.1f} GB free)"


def _explained(speeds: dict[int, float], best: int, bound: str) -> str:
    against = "" if best == 1 else f" against {speeds[1]:,.0f} with one"
    others = [f"{number} gave {speed:,.0f}" for number, speed in speeds.items() if number not in (1, best)]
    return "; ".join(filter(None, [f"{at_once(best)}: {speeds[best]:,.0f} images/s{against}", *others, bound]))


def at_once(number: int) -> str:
    """Format a number of trials at once."""
    return f"{count(number, 'trial')} at once"


def not_measured(why: str) -> str:
    """Explain why the best number is unknown."""
    return f"--per-device auto: not measured, {why}; continuing with 1"


def calibrate(spec: WorkerSpec, device: torch.device, capacity: Capacity) -> Choice:
    """Measure how many trials at once are best on the device.

    Raises:
        UserError: the baseline cannot be trained.
    """
    return choose(lambda number: _side_by_side(spec, str(device), capacity.share(number), number), capacity)


def _side_by_side(spec: WorkerSpec, device: str, resources: Resources, number: int) -> Measured:
    context = start_method()
    entry = in_child(device, _enter, context.Barrier(number))
    alone = number == 1 and torch.device(device).type == "cuda"
    free_before = torch.cuda.mem_get_info(device)[0] if alone else None
    with (
        signals_blocked(),
        ProcessPoolExecutor(number, mp_context=context, initializer=run_in_child, initargs=entry) as executor,
    ):
        # The barrier gives each task a process of its own.
        arguments = (spec, own_name(device), resources, _WINDOW_S, free_before)
        tasks = [executor.submit(_timed, *arguments) for _ in range(number)]
        measured = [task.result() for task in tasks]
    return Measured(sum(each.images_per_s for each in measured), max(each.memory_bytes for each in measured))


# In a process of the measurement

_barrier: Barrier


def _enter(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    enter_child(lambda: None, patience_s=0.0)


def _timed(
    spec: WorkerSpec, device_name: str, resources: Resources, window_s: float, free_before: int | None
) -> Measured:
    """Train the baseline beside the other processes, in epochs of a quarter of the window."""
    device = torch.device(device_name)
    try:
        _, division = open_data(spec, device, resources)
        config = spec.space.baseline
        [splits, *_] = division.on(device, config.data)
        share = window_s / 4 / seconds_per_epoch(config, splits, device=device)
        part = _first_part(splits, share, 2 * config.batch_size)
    except BaseException:
        _barrier.abort()
        raise
    _barrier.wait(_PATIENCE_S)
    epochs: list[EpochMetrics] = []
    memory_bytes = 0

    def ended(epoch: EpochMetrics) -> None:
        nonlocal memory_bytes
        epochs.append(epoch)
        memory_bytes = used_memory_bytes(device, free_before)  # while the graphs exist
        if len(epochs) > 2 and epoch.elapsed_s - epochs[0].elapsed_s > window_s:
            raise _EnoughError

    with contextlib.suppress(_EnoughError):
        train(config.override({"epochs": 1000}), part, device=device, on_epoch_end=ended, metric=spec.space.metric)
    counted = epochs[1:]  # the first pays for start-up
    seconds = counted[-1].elapsed_s - epochs[0].elapsed_s
    return Measured(sum(epoch.images for epoch in counted) / seconds, memory_bytes)


class _EnoughError(Exception):
    """Ends a timed training."""


def _first_part(splits: Splits, share: float, least: int) -> Splits:
    """Take about this fraction of the training and validation images."""
    if share >= 1 or len(splits.train) <= least:
        return splits
    every = max(1, int(len(splits.train) / max(least, share * len(splits.train))))
    labels = splits.labels[splits.train].cpu()
    first_of_class = np.unique(labels, return_index=True)[1]  # losses and sampling need every class
    chosen = np.union1d(np.arange(0, len(labels), every), first_of_class)
    return replace(splits, train=splits.train[torch.from_numpy(chosen)], val=splits.val[::every])
