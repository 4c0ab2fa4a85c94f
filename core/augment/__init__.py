"""Per-image augmentation of several batches at once on the device: geometry, photometry, then mixing of each batch.

Shapes are fixed, so nothing waits for the device: each batch is padded, shuffled and divided evenly among the policy's
operations. This slightly anticorrelates the operations of two of its images.
"""

from core.augment.cropping import largest_shift
from core.augment.mixing import MixPlan, apply_mix, mixes, plan_mix, symmetric_beta
from core.augment.own_transform import OwnTransform
from core.augment.pipeline import Augment, alternating_flips
from core.augment.sizing import size_at

__all__ = [
    "Augment",
    "MixPlan",
    "OwnTransform",
    "alternating_flips",
    "apply_mix",
    "largest_shift",
    "mixes",
    "plan_mix",
    "size_at",
    "symmetric_beta",
]
