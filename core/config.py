"""`TrainConfig`: the tree of every knob of one training, typed, bounded and frozen.

A configuration is plain data. It says nothing of how it was found, and the dotted path of a field (`optim.lr`) is its
only name, in the code, in a search space, in a trial's parameters and on the command line. Every length in time is a
fraction of the run, so a recipe of 200 epochs is the same recipe at 3: `epochs` lives in one place.

`None` means off. A field that does not apply to the chosen model or optimizer either has no effect by the definition
of its choice (`optim.momentum` under `adamw`), or is refused (`model.widths` under a timm model): never half used.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

# Optimizer -> (the learning rate that `lr_scale` 1 means at batch 256, the power of batch / 256 it grows with).
# SGD: linear scaling, Goyal et al. 2017, arXiv 1706.02677; 0.1 at 256 is their reference. The adaptive ones: 1e-3 is
# the default of Kingma and Ba 2015, and the square root of the batch is the scaling of Malladi et al. 2022,
# arXiv 2205.10287. SWATS begins as Adam, so its rate is Adam's. Muon's updates are scaled to the size of AdamW's
# (Liu et al. 2025, arXiv 2502.16982), so that AdamW's rate serves it too.
REFERENCE_LR: dict[str, tuple[float, float]] = {
    "sgd": (0.1, 1.0),
    "adamw": (1e-3, 0.5),
    "nadam": (1e-3, 0.5),
    "swats": (1e-3, 0.5),
    "muon": (1e-3, 0.5),
}


class _Section(BaseModel):
    """One branch of the tree: unknown fields are errors, values are never coerced, nothing changes after."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class DataConfig(_Section):
    """Which images, and which of them are held out."""

    name: str = Field(default="digits", min_length=1)
    """A built-in data set (`hpo data list`), or the path of a folder, archive, .npz or .csv."""
    val_fraction: float = Field(default=0.25, gt=0, lt=1)
    """Share of the images that are not test images that validation takes, stratified by class."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of all images that the test set takes, where the data set brings none of its own."""
    split_seed: int = Field(default=0, ge=0, lt=2**31)
    """Draws the validation images. The test images do not depend on it."""
    folds: int | None = Field(default=None, ge=2, le=20)
    """k-fold: trains this many networks, each validated on another part of the images, and is judged by their mean;
    None trains one, validated on `val_fraction`."""
    image_size: int | None = Field(default=None, ge=4, le=1024)
    """Height and width in pixels that images are resized to while decoding; None keeps theirs, which must agree."""
    normalize: Literal["train", "half", "imagenet"] = "train"
    """Mean and standard deviation taken off the pixels: the training images' own, 0.5 and 0.5, or ImageNet's."""


class SamplingConfig(_Section):
    """What one epoch visits."""

    name: Literal["shuffled", "balanced"] = "shuffled"
    """Every image its share of visits in random order, or as many draws with every class equally likely."""
    oversample: int = Field(default=1, ge=1, le=100)
    """Most visits of one image in an epoch: the images of smaller classes are repeated up to this many times, until
    their class is as large as the largest; 1 is off."""
    undersample: float = Field(default=1.0, gt=0, le=1)
    """Share of the largest class's images that a class may have in an epoch: a larger one shows another random part of
    its images each time; 1 is off."""


class AugmentConfig(_Section):
    """What happens to training images; validation and test images are never augmented."""

    apply_to: Literal["all", "repeats"] = "all"
    """Every training image, or only an image's second and later visits in an epoch (`sampling.oversample`): the first
    is then shown as it is. Mixing is of whole batches, and not concerned."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    alternate_flip: bool = False
    """Flips every image in every other epoch, half of the images in the first; `flip` must be 0.5 (Jordan 2024,
    arXiv 2404.00498)."""
    vertical_flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a vertical flip."""
    crop_pad_fraction: float = Field(default=0.125, ge=0, le=0.5)
    """Padding before the random crop, as a fraction of the image's side: 0.125 is the usual 4 pixels of 32."""
    crop_area_min: float = Field(default=1.0, ge=0.05, le=1)
    """Smallest share of the area that a crop of random area keeps before it is enlarged to the whole image again, with
    an aspect ratio from 3:4 to 4:3 (Szegedy et al. 2014, arXiv 1409.4842; torchvision's RandomResizedCrop); 1 is
    off."""
    rotation_degrees: float = Field(default=0.0, ge=0, le=180)
    """Rotations are drawn from minus to plus this."""
    color_jitter: float = Field(default=0.0, ge=0, le=1)
    """Brightness, contrast and saturation are each scaled by a factor within 1 minus to 1 plus this."""
    policy: Literal["randaugment", "six", "trivialaugment", "autoaugment_cifar10"] = "randaugment"
    """Which operations: `ops` of RandAugment's fourteen, each at `strength` (Cubuk et al. 2020, arXiv 1909.13719);
    `ops` of six plain ones (rotation, shear, two shifts, brightness, contrast), each at up to `strength`; one at any
    strength (TrivialAugment, Müller and Hutter 2021, arXiv 2103.10158); or the 25 pairs that AutoAugment found for
    CIFAR-10 (Cubuk et al. 2019, arXiv 1805.09501)."""
    ops: int = Field(default=0, ge=0, le=4)
    """`randaugment`, `six`: how many operations each image gets; 0 is off."""
    strength: float = Field(default=0.3, ge=0, le=1)
    """`randaugment`, `six`: how strong an operation is, 0 nothing and 1 the most of its published range."""
    erase: float = Field(default=0.0, ge=0, le=1)
    """Probability that a rectangle is erased (Zhong et al. 2017, arXiv 1708.04896)."""
    mixup: float = Field(default=0.0, ge=0, le=10)
    """Mixup's alpha (Zhang et al. 2018, arXiv 1710.09412); 0 is off."""
    cutmix: float = Field(default=0.0, ge=0, le=10)
    """CutMix's alpha (Yun et al. 2019, arXiv 1905.04899); 0 is off. With mixup too, each batch draws one of them."""
    mix_probability: float = Field(default=1.0, ge=0, le=1)
    """Probability that a batch is mixed at all."""
    mix_off_fraction: float = Field(default=1.0, ge=0, le=1)
    """Fraction of the run from which nothing is mixed any more."""
    start_size_fraction: float = Field(default=1.0, ge=0.25, le=1)
    """Side of the images that the run begins with, as a fraction of the whole; 1 is off."""
    full_size_from_fraction: float = Field(default=0.5, gt=0, le=1)
    """Fraction of the run from which images are shown in their whole size, to which their side grows evenly."""

    @model_validator(mode="after")
    def _check_flip(self) -> AugmentConfig:
        if self.alternate_flip and self.flip != 0.5:
            raise ValueError(
                f"augment.alternate_flip flips every second time: augment.flip must be 0.5, not {self.flip:g}"
            )
        return self


class ModelConfig(_Section):
    """The network. A family refuses the fields that belong to others (`FAMILY_FIELDS`)."""

    name: str = Field(default="resnet", pattern=r"^(resnet|vgg|timm/[\w.\-]+)$")
    """`resnet` and `vgg`, the networks of `core.models` for small images, or `timm/NAME`, any model that timm has."""
    widths: Annotated[tuple[Annotated[StrictInt, Field(ge=4, le=4096)], ...], Field(strict=False)] = Field(
        default=(64, 128, 256, 512), min_length=1, max_length=6
    )
    """Channels of each stage, before `width` scales them; every stage after the first halves the image."""
    blocks: Annotated[tuple[Annotated[StrictInt, Field(ge=1, le=64)], ...], Field(strict=False)] = Field(
        default=(2, 2, 2, 2), min_length=1, max_length=6
    )
    """Residual blocks (`resnet`) or convolutions (`vgg`) of each stage, before `depth` scales them."""
    width: float = Field(default=1.0, ge=0.125, le=4)
    """Multiplies `widths` and `hidden`, rounded to multiples of 8."""
    depth: float = Field(default=1.0, ge=0.25, le=4)
    """Multiplies `blocks`, rounded, at least 1."""
    block: Literal["basic", "bottleneck"] = "basic"
    """Two 3×3 convolutions, or 1×1, 3×3, 1×1 with four times the channels at its end (He et al. 2015)."""
    stem_kernel: Literal[3, 7] = 3
    """Side of the first convolution."""
    stem_stride: Literal[1, 2] = 1
    """Stride of the first convolution."""
    max_pool: bool = False
    """A 3×3 max-pool of stride 2 behind the stem."""
    se: bool = False
    """Squeeze-and-excitation in every block (Hu et al. 2018, arXiv 1709.01507)."""
    anti_alias: bool = False
    """Blurs before each step of stride 2 in the blocks and the max-pool (Zhang 2019, arXiv 1904.11486)."""
    norm: Literal["batch", "group", "none"] = "batch"
    """Batch norm, group norm with groups of 16 channels or fewer (Wu and He 2018, arXiv 1803.08494), or, of `vgg`,
    none."""
    activation: Literal["relu", "silu", "mish"] = "relu"
    """The activation function, everywhere in the network."""
    hidden: int | None = Field(default=None, ge=8, le=8192)
    """`vgg`: units of the two hidden layers before the classifier, 4,096 in VGG16, on features pooled to 7×7; None
    classifies their mean."""
    drop_path: float = Field(default=0.0, ge=0, le=0.9)
    """Stochastic depth: probability of the last block's drop (Huang et al. 2016, arXiv 1603.09382)."""
    drop_path_shape: Literal["linear", "uniform"] = "linear"
    """The probability grows linearly from the first block, or is the same for all."""
    dropout: float = Field(default=0.0, ge=0, le=0.9)
    """Dropout before the classifier, and of `vgg` before each hidden layer's successor."""
    pretrained: bool = False
    """Begin from timm's pretrained weights: from `pretrained_file`, the hub's cache, or a download."""
    pretrained_file: str | None = Field(default=None, min_length=1)
    """A file of weights in timm's format, .safetensors or .pth, in place of the published ones. A classifier in it for
    other classes is left out."""

    @model_validator(mode="after")
    def _check_family(self) -> ModelConfig:
        family = self.name.partition("/")[0]
        for field, families in FAMILY_FIELDS.items():
            if family not in families and getattr(self, field) != ModelConfig.model_fields[field].default:
                shapes = " and ".join(families)
                raise ValueError(f"model.{field} shapes {shapes} only; model.name is {self.name}: leave it out")
        if self.pretrained_file is not None and not self.pretrained:
            raise ValueError("model.pretrained_file is read only where model.pretrained is true: set that too")
        if family == "timm":
            return self
        if len(self.widths) != len(self.blocks):
            raise ValueError(
                f"model.widths names {len(self.widths)} stages and model.blocks {len(self.blocks)}: "
                "give one number a stage in both"
            )
        if self.norm == "none" and family != "vgg":
            raise ValueError("model.norm: none is for vgg; residual blocks need a norm to begin as their shortcut")
        return self


FAMILY_FIELDS: dict[str, tuple[str, ...]] = {
    "widths": ("resnet", "vgg"), "blocks": ("resnet", "vgg"), "width": ("resnet", "vgg"), "depth": ("resnet", "vgg"),
    "norm": ("resnet", "vgg"), "activation": ("resnet", "vgg"), "block": ("resnet",), "stem_kernel": ("resnet",),
    "stem_stride": ("resnet",), "max_pool": ("resnet",), "se": ("resnet",), "anti_alias": ("resnet",),
    "drop_path_shape": ("resnet",), "hidden": ("vgg",), "drop_path": ("resnet", "timm"), "pretrained": ("timm",),
    "pretrained_file": ("timm",),
}  # fmt: skip
"""The families that each field belongs to; the others refuse it. A field that is not named here serves all."""


class LossConfig(_Section):
    """What is minimised, against hard or mixed targets."""

    name: Literal["cross_entropy", "focal", "bce"] = "cross_entropy"
    """Cross-entropy; focal loss (Lin et al. 2017, arXiv 1708.02002); or a binary cross-entropy of each class (Wightman
    et al. 2021, arXiv 2110.00476)."""
    gamma: float = Field(default=2.0, ge=0, le=10)
    """`focal`: how far images that are right already are discounted; 0 is cross-entropy, 2 the paper's."""
    smoothing: float = Field(default=0.0, ge=0, le=0.9)
    """Label smoothing, applied where a batch's targets are hard: mixed targets are soft already."""
    smoothing_final: float | None = Field(default=None, ge=0, le=0.9)
    """Smoothing at the end of the run, reached linearly from `smoothing`; None keeps it constant."""
    logit_adjustment: float = Field(default=0.0, ge=0, le=3)
    """Adds this times the logarithm of each class's share of the training images to its logit, in training only: 1 is
    balanced softmax (Ren et al. 2020, arXiv 2007.10740; Menon et al. 2021, arXiv 2007.07314); 0 is off."""
    class_weights: Literal["none", "inverse", "effective"] = "none"
    """Weighs an image by its class: all alike, one over the class's images, or one over their effective number (Cui et
    al. 2019, arXiv 1901.05555)."""
    class_weights_from_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the run from which `class_weights` hold: deferred re-weighting (Cao et al. 2019, arXiv
    1906.07413)."""

    @model_validator(mode="after")
    def _check_name(self) -> LossConfig:
        if self.name == "bce" and self.logit_adjustment > 0:
            raise ValueError("loss.logit_adjustment shifts the logits of a softmax, and loss.name: bce has none")
        return self


class SwatsConfig(_Section):
    """When SWATS leaves Adam for SGD (Keskar and Socher 2017, arXiv 1712.07628)."""

    switch: Literal["fraction", "criterion"] = "fraction"
    """At a fixed fraction of the run, or when the projected SGD rate has settled."""
    switch_fraction: float = Field(default=0.25, gt=0, lt=1)
    """`fraction`: the fraction of the run at which it switches."""
    tolerance: float = Field(default=1e-9, gt=0, le=1)
    """`criterion`: how near the projected rate must be to its own average, as a difference of rates at the schedule's
    peak. 1e-9 is the paper's."""


class OptimConfig(_Section):
    """The optimizer. Exactly one of `lr` and `lr_scale` is given."""

    name: Literal["sgd", "adamw", "nadam", "swats", "muon"] = "adamw"
    """SGD with momentum, AdamW (without weight decay it is Adam), NAdam, SWATS: Adam that becomes SGD, or Muon for
    filters and matrices, with AdamW for vectors and the classifier (Jordan et al. 2024, timm's)."""
    lr: float | None = Field(default=None, gt=0, le=100)
    """Peak learning rate."""
    lr_scale: float | None = Field(default=None, gt=0, le=1000)
    """Peak learning rate as a multiple of the optimizer's own reference at this batch size (`REFERENCE_LR`)."""
    weight_decay: float = Field(default=5e-5, ge=0, le=0.1)
    """Share of each weight taken off at every step at the schedule's peak: decoupled from the learning rate, so the
    same number means the same under every optimizer (torch's AdamW calls this lr × weight_decay). Vectors (norms and
    biases) are not decayed."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD and Muon, and of SWATS after its switch."""
    nesterov: bool = True
    """Nesterov's momentum, for SGD, for Muon and the AdamW beside it (then NAdamW), and for SWATS after its switch."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment, for AdamW, NAdam, Muon's vectors, and SWATS before its switch."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment, for AdamW, NAdam, Muon's vectors, and SWATS before its switch."""
    grad_clip: float | None = Field(default=None, gt=0)
    """Largest norm of all gradients together; None is off."""
    backbone_lr_scale: float = Field(default=1.0, gt=0, le=1)
    """The learning rate of everything before the classifier, as a share of the classifier's."""
    head_only_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the run in which the classifier alone is trained; 0 is off."""
    swats: SwatsConfig = SwatsConfig()
    """SWATS's switch."""

    @model_validator(mode="before")
    @classmethod
    def _default_rate(cls, values: Any) -> Any:
        """Where neither rate is given, the reference itself: `lr_scale` 1."""
        if isinstance(values, dict) and values.get("lr") is None and values.get("lr_scale") is None:
            return {**values, "lr_scale": 1.0}
        return values

    @model_validator(mode="after")
    def _one_rate(self) -> OptimConfig:
        if self.lr is not None and self.lr_scale is not None:
            raise ValueError("optim.lr and optim.lr_scale exclude each other: give one of them")
        if self.name == "swats" and self.swats.switch == "criterion":
            for field, neutral in (("backbone_lr_scale", 1), ("head_only_fraction", 0)):
                if getattr(self, field) != neutral:
                    raise ValueError(
                        "optim.swats.switch: criterion measures one learning rate for all layers at once, and "
                        f"optim.{field} tells them apart; set that to {neutral}, or this to fraction"
                    )
        return self

    def peak_lr(self, batch_size: int) -> float:
        """The learning rate at the schedule's factor 1: `lr`, or `lr_scale` × reference × (batch / 256) ** p."""
        if self.lr is not None:
            return self.lr
        assert self.lr_scale is not None
        reference, power = REFERENCE_LR[self.name]
        return self.lr_scale * reference * float((batch_size / 256) ** power)


Piece = Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], Annotated[float, Field(gt=0, le=1)]], Field(strict=False)]
"""(the fraction of the run from which it holds, the factor of the peak learning rate)"""


class ScheduleConfig(_Section):
    """The learning rate over the run, as a factor of its peak."""

    name: Literal["cosine", "linear", "constant", "step", "pieces", "plateau"] = "cosine"
    """How the factor falls after the warm-up: along half a cosine or a line, not at all, by `gamma` at every
    `step_fraction`, as `pieces` says, or by `gamma` when validation has not improved for `patience_fraction`."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Fraction of the run in which the factor rises linearly to 1."""
    warmup_start: float = Field(default=0.01, ge=0, le=1)
    """The factor that the warm-up begins with."""
    final_factor: float = Field(default=0.0, ge=0, le=1)
    """The factor that the run ends with, for cosine and linear; the lowest that plateau goes to."""
    step_fraction: float = Field(default=0.3, gt=0, le=1)
    """`step`: the fraction of the run after which the factor falls, again and again (torch's StepLR)."""
    gamma: float = Field(default=0.1, gt=0, le=1)
    """`step`, `plateau`: what the factor is multiplied by."""
    pieces: Annotated[tuple[Piece, ...], Field(strict=False)] = ((0.5, 0.1), (0.75, 0.01))
    """`pieces`: pairs of the fraction of the run from which a factor holds, increasing, and that factor; before the
    first it is 1."""
    patience_fraction: float = Field(default=0.1, gt=0, le=1)
    """`plateau`: the fraction of the run without a better validation score after which the factor falls (torch's
    ReduceLROnPlateau)."""

    @model_validator(mode="after")
    def _check_pieces(self) -> ScheduleConfig:
        starts = [start for start, _ in self.pieces]
        if any(later <= earlier for earlier, later in itertools.pairwise(starts)):
            raise ValueError(f"schedule.pieces must begin one after the other, not at {starts}")
        return self


class AveragingConfig(_Section):
    """Averages of the weights over time, which are what is evaluated and kept."""

    name: Literal["none", "ema", "swa"] = "none"
    """None, an exponential moving average, or stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407)."""
    half_life_fraction: float = Field(default=0.02, gt=0, le=0.5)
    """EMA: the fraction of the run after which a weight's share has halved."""
    swa_start_fraction: float = Field(default=0.75, ge=0, lt=1)
    """SWA: the fraction of the run from which the weights at each epoch's end are averaged."""


class EarlyStopConfig(_Section):
    """Ends a run that no longer improves, and keeps its best epoch."""

    patience_fraction: float | None = Field(default=None, gt=0, le=1)
    """Fraction of the run without a better validation score that ends it; None is off."""


class PrecisionConfig(_Section):
    """Arithmetic."""

    autocast: Literal["auto", "off", "bf16"] = "auto"
    """bfloat16 for matrix products and convolutions; `auto` is bf16 on CUDA and off elsewhere."""
    compile: bool = False
    """Compiles the network by torch.compile, with a minute or so of its own before the first step: for long trainings,
    such as a refit's. What is compiled is kept on disk, and used again for the same architecture."""
    cuda_graphs: bool = True
    """On CUDA, records the whole step once and replays it; false launches its kernels one by one, which networks that
    wait for the host in their forward pass need."""


class TrainConfig(_Section):
    """Everything that decides one training, its data included."""

    epochs: int = Field(default=60, ge=1, le=100_000)
    """Passes over the training images."""
    batch_size: int = Field(default=128, ge=2, le=65_536)
    """Images a step."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Initial weights, order, augmentation and dropout follow from it. A study sets it trial by trial."""
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    averaging: AveragingConfig = AveragingConfig()
    early_stop: EarlyStopConfig = EarlyStopConfig()
    precision: PrecisionConfig = PrecisionConfig()

    @model_validator(mode="after")
    def _check_repeats(self) -> TrainConfig:
        sampling = self.sampling
        if self.augment.apply_to == "repeats" and sampling.name == "shuffled" and sampling.oversample == 1:
            raise ValueError(
                "augment.apply_to: repeats augments nothing where no image is repeated: "
                "set sampling.oversample, or sampling.name to balanced"
            )
        return self

    def override(self, values: dict[str, Any]) -> TrainConfig:
        """A copy with the fields at these dotted paths set, validated anew.

        Setting one of `optim.lr` and `optim.lr_scale` drops the other, since the two are one knob.

        Raises:
            KeyError: a path that is no field.
            pydantic.ValidationError: a value that its field refuses.
        """
        tree = self.model_dump()
        for path, value in values.items():
            *parents, leaf = path.split(".")
            node: Any = tree
            for name in parents:
                node = node[name] if isinstance(node, dict) and name in node else None
            if not isinstance(node, dict) or leaf not in node or isinstance(node[leaf], dict):
                raise KeyError(path)
            node[leaf] = value
        for given, dropped in (("lr", "lr_scale"), ("lr_scale", "lr")):
            if values.get(f"optim.{given}") is not None and values.get(f"optim.{dropped}") is None:
                tree["optim"][dropped] = None
        return TrainConfig.model_validate(tree)

    def flat(self) -> dict[str, Any]:
        """Every field by its dotted path."""
        return dict(_walk(self.model_dump(), ""))


def _walk(tree: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in tree.items():
        path = f"{prefix}{name}"
        rows += _walk(value, f"{path}.") if isinstance(value, dict) else [(path, value)]
    return rows
