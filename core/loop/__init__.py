"""The training loop, which combines the other modules of `core`.

The images are on the device as uint8. Each epoch permutes indices there, and for each batch gathers, augments, mixes,
trains and averages; the host reads one number per epoch. There is no DataLoader.

`run` contains `train`, the loop over epochs; `step` is one optimizer step; `graphs` replays steps as CUDA graphs;
`memory` checks whether a step fits the memory; `divergence` detects diverged runs; `results` defines the results;
`profile` measures time.
"""

from core.loop.results import EpochMetrics, TrainResult
from core.loop.run import EVALUATION_BATCH, Execution, seconds_per_epoch, train

__all__ = ["EVALUATION_BATCH", "EpochMetrics", "Execution", "TrainResult", "seconds_per_epoch", "train"]
