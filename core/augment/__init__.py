"""Per-image augmentation of whole batches on the device: a geometric pass, a photometric pass, then mixing.

All shapes are fixed, so nothing waits for the device, and each operation still processes only the images that need it.
A policy assigns its operations to equal groups: a batch is padded to a multiple of the number of operations, shuffled
and divided evenly. For each image all operations are equally likely, and magnitudes and signs are drawn independently;
only the operations of two images of a batch (on a CPU, of a chunk) are slightly anticorrelated. Applying all operations
to all images would cost fourteen times as much; selecting images by random index would need a synchronization per
operation and prevent CUDA graphs.

`pipeline` contains `Augment`, which combines the rest: `geometry` moves pixels, `photometry` changes them, `operations`
defines names and ranges, `policies` assigns operations to images, `draws` draws random numbers; `cropping`, `erasing`,
`mixing` and `sizing` are further steps.
"""

from core.augment.mixing import MixPlan, apply_mix, mixes, plan_mix, symmetric_beta
from core.augment.pipeline import Augment, alternating_flips
from core.augment.sizing import resize, size_at

__all__ = [
    "Augment",
    "MixPlan",
    "alternating_flips",
    "apply_mix",
    "mixes",
    "plan_mix",
    "resize",
    "size_at",
    "symmetric_beta",
]
