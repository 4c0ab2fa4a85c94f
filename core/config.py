"""`TrainConfig`: the tree of every knob of one training, typed, bounded and frozen.

A configuration is plain data. It says nothing of how it was found, and the dotted path of a field (`optim.lr`) is its
only name, in the code, in a search space, in a trial's parameters and on the command line. Every length in time is a
fraction of the run, so a recipe of 200 epochs is the same recipe at 3: `epochs` lives in one place.

`None` means off. A field that does not apply to the chosen model or optimizer either has no effect by the definition
of its choice (`optim.momentum` under `adamw`), or is refused (`model.widths` under a timm model): never half used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

# Optimizer -> (the learning rate that `lr_scale` 1 means at batch 256, the power of batch / 256 it grows with).
# SGD: linear scaling, Goyal et al. 2017, arXiv 1706.02677; 0.1 at 256 is their reference. The adaptive ones: 1e-3 is
# the default of Kingma and Ba 2015, and the square root of the batch is the scaling of Malladi et al. 2022,
# arXiv 2205.10287. SWATS begins as Adam, so its rate is Adam's.
REFERENCE_LR: dict[str, tuple[float, float]] = {
    "sgd": (0.1, 1.0),
    "adamw": (1e-3, 0.5),
    "nadam": (1e-3, 0.5),
    "swats": (1e-3, 0.5),
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
    image_size: int | None = Field(default=None, ge=4, le=1024)
    """Height and width in pixels that images are resized to while decoding; None keeps theirs, which must agree."""
    normalize: Literal["train", "half", "imagenet"] = "train"
    """Mean and standard deviation taken off the pixels: the training images' own, 0.5 and 0.5, or ImageNet's."""


class SamplingConfig(_Section):
    """What one epoch visits."""

    name: Literal["shuffled", "balanced"] = "shuffled"
    """Every image once in random order, or as many draws with every class equally likely."""


class AugmentConfig(_Section):
    """What happens to training images; validation and test images are never augmented."""

    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    vertical_flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a vertical flip."""
    crop_pad_fraction: float = Field(default=0.125, ge=0, le=0.5)
    """Padding before the random crop, as a fraction of the image's side: 0.125 is the usual 4 pixels of 32."""
    rotation_degrees: float = Field(default=0.0, ge=0, le=180)
    """Rotations are drawn from minus to plus this."""
    color_jitter: float = Field(default=0.0, ge=0, le=1)
    """Brightness, contrast and saturation are each scaled by a factor within 1 minus to 1 plus this."""
    ops: int = Field(default=0, ge=0, le=4)
    """RandAugment: how many operations each image gets (Cubuk et al. 2020, arXiv 1909.13719); 0 is off."""
    strength: float = Field(default=0.3, ge=0, le=1)
    """RandAugment: how strong each operation is, 0 nothing and 1 the most of its published range."""
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


class ModelConfig(_Section):
    """The network. Fields from `widths` to `activation` shape `resnet`, and timm models refuse them."""

    name: str = Field(default="resnet", pattern=r"^(resnet|timm/[\w.\-]+)$")
    """`resnet`, the small residual network of `core.models.resnet`, or `timm/NAME`, any model that timm has."""
    widths: Annotated[tuple[Annotated[StrictInt, Field(ge=4, le=4096)], ...], Field(strict=False)] = Field(
        default=(64, 128, 256, 512), min_length=1, max_length=6
    )
    """Channels of each stage, before `width` scales them; every stage after the first halves the image."""
    blocks: Annotated[tuple[Annotated[StrictInt, Field(ge=1, le=64)], ...], Field(strict=False)] = Field(
        default=(2, 2, 2, 2), min_length=1, max_length=6
    )
    """Residual blocks of each stage, before `depth` scales them."""
    width: float = Field(default=1.0, ge=0.125, le=4)
    """Multiplies `widths`, rounded to multiples of 8."""
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
    norm: Literal["batch", "group"] = "batch"
    """Batch norm, or group norm with groups of 16 channels or fewer (Wu and He 2018, arXiv 1803.08494)."""
    activation: Literal["relu", "silu", "mish"] = "relu"
    """The activation function, everywhere in the network."""
    drop_path: float = Field(default=0.0, ge=0, le=0.9)
    """Stochastic depth: probability of the last block's drop, growing linearly from the first (arXiv 1603.09382)."""
    dropout: float = Field(default=0.0, ge=0, le=0.9)
    """Dropout before the classifier."""
    pretrained: bool = False
    """Begin from timm's pretrained weights; they must be at hand, in the hub's cache or downloadable."""

    @model_validator(mode="after")
    def _check_shape(self) -> ModelConfig:
        if self.name == "resnet":
            if self.pretrained:
                raise ValueError("model.pretrained: resnet has no pretrained weights; use model.name: timm/NAME")
            if len(self.widths) != len(self.blocks):
                raise ValueError(
                    f"model.widths names {len(self.widths)} stages and model.blocks {len(self.blocks)}: "
                    "give one number a stage in both"
                )
            return self
        for field in RESNET_ONLY:
            if getattr(self, field) != ModelConfig.model_fields[field].default:
                raise ValueError(f"model.{field} shapes resnet only; model.name is {self.name}: leave it out")
        return self


RESNET_ONLY = (
    "widths", "blocks", "width", "depth", "block", "stem_kernel", "stem_stride", "max_pool", "se", "norm", "activation",
)  # fmt: skip


class LossConfig(_Section):
    """Cross-entropy against hard or mixed targets."""

    smoothing: float = Field(default=0.0, ge=0, le=0.9)
    """Label smoothing, applied where a batch's targets are hard: mixed targets are soft already."""
    smoothing_final: float | None = Field(default=None, ge=0, le=0.9)
    """Smoothing at the end of the run, reached linearly from `smoothing`; None keeps it constant."""


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

    name: Literal["sgd", "adamw", "nadam", "swats"] = "adamw"
    """SGD with momentum, AdamW, NAdam, or SWATS: Adam that becomes SGD."""
    lr: float | None = Field(default=None, gt=0, le=100)
    """Peak learning rate."""
    lr_scale: float | None = Field(default=None, gt=0, le=1000)
    """Peak learning rate as a multiple of the optimizer's own reference at this batch size (`REFERENCE_LR`)."""
    weight_decay: float = Field(default=5e-5, ge=0, le=0.1)
    """Share of each weight taken off at every step at the schedule's peak: decoupled from the learning rate, so the
    same number means the same under every optimizer (torch's AdamW calls this lr × weight_decay). Vectors (norms and
    biases) are not decayed."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD, and of SWATS after its switch."""
    nesterov: bool = True
    """Nesterov's momentum, for SGD, and for SWATS after its switch."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment, for AdamW, NAdam, and SWATS before its switch."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment, for AdamW, NAdam, and SWATS before its switch."""
    grad_clip: float | None = Field(default=None, gt=0)
    """Largest norm of all gradients together; None is off."""
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
        return self

    def peak_lr(self, batch_size: int) -> float:
        """The learning rate at the schedule's factor 1: `lr`, or `lr_scale` × reference × (batch / 256) ** p."""
        if self.lr is not None:
            return self.lr
        assert self.lr_scale is not None
        reference, power = REFERENCE_LR[self.name]
        return self.lr_scale * reference * float((batch_size / 256) ** power)


class ScheduleConfig(_Section):
    """The learning rate over the run, as a factor of its peak."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """How the factor falls after the warm-up."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Fraction of the run in which the factor rises linearly to 1."""
    warmup_start: float = Field(default=0.01, ge=0, le=1)
    """The factor that the warm-up begins with."""
    final_factor: float = Field(default=0.0, ge=0, le=1)
    """The factor that the run ends with, for cosine and linear."""


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
    """Fraction of the run without a better validation accuracy that ends it; None is off."""


class PrecisionConfig(_Section):
    """Arithmetic."""

    autocast: Literal["auto", "off", "bf16"] = "auto"
    """bfloat16 for matrix products and convolutions; `auto` is bf16 on CUDA and off elsewhere."""


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
