"""Faults on demand, the chaos tests' one mock: importing this makes `core.loop.run.Run.epoch` obey $CHAOS_FAULTS/PID.

Where that file says `FAULT E`, the process's next epoch after epoch E fails: its weights become NaN, which diverges for
real, or torch's error of a device without memory is raised.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from core.loop import EpochMetrics
from core.loop.run import Run

_sound_epoch = Run.epoch


def _epoch(self: Run, *, final: bool) -> EpochMetrics:
    order = Path(os.environ["CHAOS_FAULTS"], str(os.getpid()))
    fault, after = order.read_text().split() if order.exists() else ("", "0")
    if fault and len(self.history) >= int(after):
        order.unlink()
        if fault == "oom":
            raise torch.OutOfMemoryError("out of memory, said the chaos test")
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(float("nan"))
    return _sound_epoch(self, final=final)


Run.epoch = _epoch  # type: ignore[method-assign]
