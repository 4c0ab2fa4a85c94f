"""Whole-batch, per-sample augmentation on the device: one geometric pass, one photometric pass, then mixing.

Its key choice: every shape is known beforehand, so nothing waits for the device, and still each operation touches only
the images that need it. A policy's operations are *dealt like cards*: a batch is padded to a multiple of the number of
cards, shuffled, and cut into equal hands. For one image each operation is as likely as any other, and magnitudes, signs
and everything else are drawn independently for each image; only the operations of two images of a batch (on a CPU, of a
chunk of it) are a little less alike than by chance. The alternatives are all operations on all images, at fourteen
times the work, or asking the device which images to work on, at a wait for each operation, and no CUDA graph.

`pipeline` holds `Augment`, which composes the others, a concept each: `geometry` moves pixels, `photometry` changes
them, `operations` gives both their names and ranges, `policies` deals operations to images, `cropping`, `erasing`,
`mixing` and `sizing` do what they say, and `draws` draws.
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
