"""The training loop, which combines the other modules of `core`. The host reads one number per epoch."""

from core.loop.results import EpochMetrics, TrainResult
from core.loop.run import Execution, seconds_per_epoch, train, try_own_parts

__all__ = [
    "EpochMetrics",
    "Execution",
    "TrainResult",
    "seconds_per_epoch",
    "train",
    "try_own_parts",
]
