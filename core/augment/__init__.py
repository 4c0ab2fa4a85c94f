"""Per-image augmentation of whole batches on the device: a geometric pass, a photometric pass, then mixing.

All shapes are fixed, so nothing waits for the device, and each operation still processes only the images that need it:
a batch is padded to a multiple of the number of a policy's operations, shuffled and divided evenly among them. Only the
operations of two images of a batch (on a CPU, of a chunk) are slightly anticorrelated.
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
