"""Injected faults, the chaos tests' one mock: importing this makes `core.loop.run.Run.epoch` read $CHAOS_FAULTS/PID.

With `FAULT E` in that file, the process's next epoch after epoch E fails: its weights become NaN, which really
diverges, or torch's out-of-memory error is raised.
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
            raise torch.OutOfMemoryError("out of memory, raised by the chaos test")
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(float("nan"))
    return _sound_epoch(self, final=final)


Run.epoch = _epoch  # type: ignore[method-assign]
