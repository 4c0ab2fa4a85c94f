"""Train a study's waiting trials on this machine's devices or a cluster: in this process, or in several."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

import torch

from core.data import Division, Splits
from core.runtime import describe_device
from core.text import count
from hpo.loggers import Callback
from hpo.reporter import StudyView
from hpo.search.interrupts import Interrupts
from hpo.search.loop import run_study
from hpo.search.options import TrialOptions
from hpo.search.weights import DEFAULTS
from hpo.space import SearchSpace
from hpo.study import Study
from hpo.workers.calibration import at_once, calibrate, not_measured
from hpo.workers.capacity import Capacity, free_capacity, runs_mps
from hpo.workers.engine import Engine, WorkerSlot, WorkerSpec, worker_slots
from hpo.workers.local import LocalProcesses, start_method
from hpo.workers.placement import Placement
from hpo.workers.pool import run_workers

logger = logging.getLogger(__name__)


@dataclass
class Work:
    """Trains the trials of a study.

    Args:
        data: the value of `--data`.
        cluster: connects to a cluster for the workers; None for this machine.
        callbacks: called after each trial, if trials run in this process.
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
    cluster: Callable[[WorkerSpec], tuple[Engine, list[WorkerSlot]]] | None = None
    callbacks: Sequence[Callback] = ()

    def __post_init__(self) -> None:
        self.device = self.placement.devices[0]
        self._sizes: list[int | None] = []
        if self.cluster is None:
            self._sizes = [self._measured_before(device) if size is None else size for device, size in self.placement]
            if not self.inline and not self.placement.none:
                start_method()  # the server imports torch meanwhile

    @property
    def inline(self) -> bool:
        """Whether the trials run in this process."""
        return not self.placement.in_processes and self._sizes == [1]

    def images(self) -> Sequence[Splits]:
        """Return the baseline's splits on the first device."""
        return self.division.on(self.device, self.space.baseline.data)

    def run(self, progress: StudyView) -> bool:
        """Train trials until none waits; `progress` shows the study meanwhile.

        Returns:
            False if the study's deadline or patience does not allow another trial.
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
        engine: Engine = LocalProcesses()
        if self.cluster is not None:
            engine, slots = self.cluster(spec)
        else:
            slots = self._slots(spec)
        if slots:
            return run_workers(
                self.study, spec, engine=engine, slots=slots, progress=progress, interrupts=self.interrupts
            )
        return run_study(
            self.study,
            self.space,
            partial(self.division.on, self.device),
            device=self.device,
            progress=progress,
            interrupts=self.interrupts,
            options=self.options,
            callbacks=self.callbacks,
        )

    def _measured_before(self, device: torch.device) -> int | None:
        """The number of trials at once that an earlier run found, reduced to the room now; None if unknown."""
        known = self.study.settings.packing(_sharing(device))
        if known is None:
            return None
        number, why = known
        self.say(f"as measured on this device before: {why}")
        capacity = free_capacity(device)
        most = min(number, capacity.fitting, capacity.useful or number)
        if most < number:
            self.say(f"--per-device auto: there is less room now; continuing with {most}")
        return most

    def _slots(self, spec: WorkerSpec) -> list[WorkerSlot]:
        """The slots of all devices, in turn, so that few trials are spread over them; none if trials run inline."""
        if self.inline:
            return []
        self.division.release()  # workers need the device's memory
        devices = self.placement.devices
        capacities = [self._capacity(device) for device in devices]
        sizes = [self._size(spec, *each) for each in zip(devices, self._sizes, capacities, strict=True)]
        self._sizes = list(sizes)
        if self.inline:
            return []
        slots = [self._slots_on(*each) for each in zip(devices, sizes, capacities, strict=True)]
        return [slot for slot in chain(*zip_longest(*slots)) if slot is not None]

    def _capacity(self, device: torch.device) -> Capacity:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        capacity = free_capacity(device)
        return replace(capacity, threads=max(1, capacity.threads // len(self.placement.devices)))

    def _size(self, spec: WorkerSpec, device: torch.device, size: int | None, capacity: Capacity) -> int:
        capacity.check(size or 1, asked=self.placement.asked)
        if size is not None or (size := self._measured_before(device)) is not None:  # perhaps just now, on another
            return size
        if self.study.queue.claimable() < 2:
            self.say(not_measured("too few trials are left"))
            return 1
        self.say("measuring how many trials at once train the most images per second")
        with self.interrupts.let_through():
            choice = calibrate(spec, device, capacity)
        self.say(choice.why)
        if choice.measured:
            self.study.settings.set_packing(_sharing(device), choice.trials, choice.why)
        return choice.trials

    def _slots_on(self, device: torch.device, size: int, capacity: Capacity) -> list[WorkerSlot]:
        alone = len(self.placement.devices) == 1
        if capacity.useful and size > capacity.useful:
            why = f"{self.placement.asked}: {capacity.why_useful}"
            logger.warning("%s, and more trials at once only wait for each other", why)
        if size > 1 and device.type == "cuda" and not runs_mps():
            self.say(
                f"NVIDIA MPS is not running: the {count(size, 'trial')} on {device} take turns instead of computing "
                "side by side; on Linux, `nvidia-cuda-mps-control -d` starts it"
            )
        resources = capacity.share(size)
        where, threads = "" if alone else f" on {device}", count(resources.threads, "thread")
        self.say(f"{at_once(size)}{where}, each in a process with {threads}")
        return worker_slots(str(device), size, resources, alone=alone)


def _sharing(device: torch.device) -> str:
    """The device and how processes share it, both of which decide the best number of trials at once."""
    name = describe_device(device)
    return f"{name} with MPS" if device.type == "cuda" and runs_mps() else name
