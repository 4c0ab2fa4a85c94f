"""Trains one configuration: the only room that composes its siblings.

The data set lies on the device as uint8. An epoch permutes indices there, and for each batch gathers, augments,
mixes, goes forward and back, steps and averages; the host reads one number back when the epoch is over. There is no
DataLoader.

`run` holds `train`, the loop over epochs; `step` one step of it; `graphs` replays steps as CUDA graphs; `memory` finds
out beforehand whether a step fits; `divergence` gives up what learns nothing; `results` is what a training tells;
`profile` says where its time goes.
"""

from core.loop.results import EpochMetrics, TrainResult
from core.loop.run import EVALUATION_BATCH, Execution, seconds_per_epoch, train

__all__ = ["EVALUATION_BATCH", "EpochMetrics", "Execution", "TrainResult", "seconds_per_epoch", "train"]
