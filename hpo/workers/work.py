"""Train a study's waiting trials on this machine's devices or a cluster: in this process, or in several."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from core.data import Division, Splits
from core.runtime import describe_device
from hpo.reporter import StudyView
from hpo.search.interrupts import Interrupts
from hpo.search.loop import run_study
from hpo.search.options import TrialOptions
from hpo.search.weights import DEFAULTS
from hpo.space import SearchSpace
from hpo.study import Study
from hpo.workers.calibration import at_once, calibrate, not_measured
from hpo.workers.capacity import Capacity, free_capacity
from hpo.workers.engine import Engine, WorkerSpec
from hpo.workers.local import LocalProcesses, start_method
from hpo.workers.placement import Placement
from hpo.workers.pool import WorkerPool, run_workers

logger = logging.getLogger(__name__)

Cluster = Callable[[WorkerSpec], tuple[Engine, WorkerPool]]
"""Connects to a cluster that runs the workers."""


@dataclass
class Work:
    """Trains the trials of a study.

    Args:
        division: the images.
        data: the value of `--data`.
        say: shows the user one line.
        cluster: where the workers run, if not here.
    """

    study: Study
    space: SearchSpace
    division: Division
    placement: Placement
    data: Path | None
    skip_broken: bool
    interrupts: Interrupts
    say: Callable[[str], None]
    options: TrialOptions = DEFAULTS
    cluster: Cluster | None = None

    def __post_init__(self) -> None:
        self.device = self.placement.devices[0]
        self._sizes = [] if self.cluster is not None else [self._known_size(*each) for each in self.placement]
        if self.cluster is None and not self.inline and not self.placement.none:
            start_method()  # the server imports torch meanwhile

    @property
    def inline(self) -> bool:
        """Whether the trials run in this process."""
        return not self.placement.in_processes and self._sizes == [1]

    def images(self) -> Sequence[Splits]:
        """Return the baseline's splits on the first device."""
        return self.division.on(self.device, self.space.baseline.data)

    def run(self, progress: StudyView) -> None:
        """Train trials until none waits.

        Args:
            progress: shows the study meanwhile.
        """
        spec = WorkerSpec(
            self.space,
            self.study.name,
            self.study.storage_url,
            self.data,
            self.skip_broken,
            folder=Path.cwd(),
            options=self.options,
            store_url=None if self.study.files.store is None else self.study.files.store.url,
        )
        engine: Engine
        if self.cluster is not None:
            engine, pool = self.cluster(spec)
            pools = [pool]
        else:
            engine, pools = LocalProcesses(), [] if self.inline else self._pools(spec)
            if self.inline:
                self._run_inline(progress)
                return
        run_workers(self.study, spec, engine=engine, pools=pools, progress=progress, interrupts=self.interrupts)

    def _run_inline(self, progress: StudyView) -> None:
        run_study(
            self.study,
            self.space,
            partial(self.division.on, self.device),
            device=self.device,
            progress=progress,
            interrupts=self.interrupts,
            options=self.options,
        )

    def _known_size(self, device: torch.device, asked: int | None) -> int | None:
        """The number of trials at once; None if it has to be measured.

        A number that an earlier run measured on this device is reduced where the device has less room now.
        """
        known = self.study.settings.packing(describe_device(device)) if asked is None else None
        if known is None:
            return asked
        number, why = known
        self.say(f"as measured on this device before: {why}")
        capacity = free_capacity(device)
        most = min(number, capacity.most, capacity.limit().trials or number)
        if most < number:
            self.say(f"--per-device auto: there is less room now; continuing with {most}")
        return most

    def _pools(self, spec: WorkerSpec) -> list[WorkerPool]:
        """The workers of each device, after measuring how many there should be where that was asked for."""
        self.division.release()  # workers need the device's memory
        devices = self.placement.devices
        capacities = [self._capacity(device) for device in devices]
        sizes = [self._size(spec, *each) for each in zip(devices, self._sizes, capacities, strict=True)]
        self._sizes = list(sizes)
        return [] if self.inline else [self._pool(*each) for each in zip(devices, sizes, capacities, strict=True)]

    def _capacity(self, device: torch.device) -> Capacity:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        capacity = free_capacity(device)
        return replace(capacity, threads=max(1, capacity.threads // len(self.placement.devices)))

    def _size(self, spec: WorkerSpec, device: torch.device, size: int | None, capacity: Capacity) -> int:
        capacity.check(size or 1, asked=self.placement.asked)
        if size is None:
            size = self._known_size(device, None)  # an identical device may just have been measured
        if size is not None:
            return size
        if self.study.queue.waiting() < 2:
            self.say(not_measured("too few trials are left", 1))
            return 1
        self.say("measuring how many trials at once train the most images per second")
        with self.interrupts.let_through():
            choice = calibrate(spec, device, capacity)
        self.say(choice.why)
        if choice.measured:
            self.study.settings.set_packing(describe_device(device), choice.trials, choice.why)
        return choice.trials

    def _pool(self, device: torch.device, size: int, capacity: Capacity) -> WorkerPool:
        asked, limit, alone = self.placement.asked, capacity.limit(), len(self.placement.devices) == 1
        if limit.trials and size > limit.trials:
            logger.warning("%s: %s, and more trials at once only wait for each other", asked, limit.why)
        resources = capacity.share(size)
        threads = f"{resources.threads} thread{'' if resources.threads == 1 else 's'}"
        self.say(f"{at_once(size)}{'' if alone else f' on {device}'}, each in a process with {threads}")
        return WorkerPool(str(device), size, resources, alone=alone)
