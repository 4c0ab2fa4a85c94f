"""Works a study's waiting trials off on this machine's devices: in this process, or in several."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from core.data import Division, Splits
from core.runtime import describe_device
from hpo.cli.console import say
from hpo.search.interrupts import Interrupts
from hpo.search.loop import DEFAULTS, run_study
from hpo.search.options import TrialOptions
from hpo.space import SearchSpace
from hpo.study import Study
from hpo.workers import Crew, Engine, Job, Lane, LocalProcesses, free_capacity, not_found_out, run_workers
from hpo.workers.packing import at_once
from hpo.workers.placement import Placement

logger = logging.getLogger(__name__)


class Work:
    """What is needed to run trials of a study here.

    Args:
        division: the images.
        data: what `--data` is.
        cluster: connects to where the workers are to run, if that is not here.
    """

    def __init__(
        self,
        study: Study,
        space: SearchSpace,
        division: Division,
        placement: Placement,
        *,
        data: Path | None,
        skip_broken: bool,
        interrupts: Interrupts,
        options: TrialOptions = DEFAULTS,
        cluster: Callable[[Job], tuple[Engine, Crew]] | None = None,
    ) -> None:
        self.study, self.space, self.placement, self.interrupts = study, space, placement, interrupts
        self.device = placement.devices[0]
        self._division, self._options = division, options
        self._job = Job(
            space,
            study.name,
            study.storage_url,
            data,
            skip_broken,
            folder=Path.cwd(),
            options=options,
            depot=None if study.depot is None else study.depot.url,
        )
        self._cluster = cluster
        self._sizes = [known_best(study, space, device) if asked is None else asked for device, asked in placement]
        self.inline = cluster is None and not placement.in_processes and self._sizes == [1]
        """Whether the trials run in this process."""

    def images(self) -> Sequence[Splits]:
        """The base's splits on the first device."""
        return self._division.on(self.device, self.space.baseline.data)

    def off(self, lane: Callable[[], Lane]) -> None:
        """Runs the trials that wait, until none does.

        Args:
            lane: makes one more place for a worker to be shown in.
        """
        if self.inline:
            run_study(
                self.study,
                self.space,
                partial(self._division.on, self.device),
                device=self.device,
                listener=lane(),
                interrupts=self.interrupts,
                options=self._options,
            )
            return
        engine: Engine
        if self._cluster is not None:
            engine, crew = self._cluster(self._job)
            crews = [crew]
        else:
            self._division.release()  # frees device memory for the workers
            engine = LocalProcesses()
            crews = [self._crew(device, size) for device, size in zip(self.placement.devices, self._sizes, strict=True)]
        run_workers(self.study, self._job, engine=engine, crews=crews, lane=lane, interrupts=self.interrupts)

    def _crew(self, device: torch.device, size: int | None) -> Crew:
        """The workers of a device, once it is sure that they fit it."""
        asked, devices = self.placement.asked, self.placement.devices
        name = describe_device(device)  # before the workers: who divides the CPU's threads does not rename it
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what the estimate needed is the workers' now
        capacity = free_capacity(device)
        capacity = replace(capacity, threads=max(1, capacity.threads // len(devices)))
        capacity.check(size or 1, asked=asked)
        limit = capacity.limit()
        if size and limit.trials and size > limit.trials:
            logger.warning("%s: %s, and more trials at once only wait for each other", asked, limit.why)
        on = "" if len(devices) == 1 else f" on {device}"
        if size is None:
            sharing = "" if device.type == "cuda" else f", sharing the CPU's {_threads(capacity.threads)}"
            say(f"the first trials find out how many at once train the most images a second{on}{sharing}")
        else:
            say(f"{at_once(size)}{on}, each in a process with {_threads(capacity.share(size).threads)}")
        return Crew(str(device), name, size, capacity.share, limit, alone=len(devices) == 1)


def known_best(study: Study, space: SearchSpace, device: torch.device) -> int | None:
    """How many trials at once `auto` means before anything is measured, said; None where it is to be measured.

    What an earlier run of the study found best on this device counts as far as the device still has room for it.
    """
    if space.baseline.epochs == 1:  # a training's first epoch pays for start-up, so that none of these could be timed
        say(not_found_out("an epoch can only be timed after another one, and the trials have one", 1))
        return 1
    known = study.packing(describe_device(device))
    if known is None:
        return None
    number, why = known
    say(f"as measured on this device before: {why}")
    capacity = free_capacity(device)
    most = min(number, capacity.most, capacity.limit().trials or number)
    if most < number:
        say(f"--per-device auto: there is less room now; going on with {most}")
    return most


def _threads(number: int) -> str:
    return f"{number} thread{'' if number == 1 else 's'}"
