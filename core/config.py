"""`TrainConfig`: every setting of one training as a tree of typed, bounded, frozen models.

A field is named by its dotted path (`optim.lr`). A field that does not apply to the chosen model or optimizer either
has no effect (`optim.momentum` under `adamw`) or is refused (`model.widths` under a timm model).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

# Optimizer -> (learning rate of `lr_scale` 1 at batch 256, exponent of batch / 256 that scales it).
# SGD: linear scaling (arXiv 1706.02677). Adaptive optimizers: Adam's default with square-root scaling (arXiv
# 2205.10287). Muon's updates are scaled to the size of AdamW's. A logistic regression has no rate.
REFERENCE_LR: dict[str, tuple[float, float]] = {
    "sgd": (0.1, 1.0),
    "adamw": (1e-3, 0.5),
    "nadam": (1e-3, 0.5),
    "swats": (1e-3, 0.5),
    "muon": (1e-3, 0.5),
    "logistic": (1.0, 0.0),
}


MOST_EPOCHS = 100_000
"""Bound of `epochs`."""

BUILTIN_DATA = ("digits", "stl10", "cifar10", "cifar100", "fashion_mnist")
"""Data sets with a name."""


class _Section(BaseModel):
    """Base of the sections: unknown fields are errors, values are not coerced, instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class DataConfig(_Section):
    """The data set and its split."""

    name: str = Field(default="digits", min_length=1)
    """A built-in data set (`hpo data list`), or the path of a folder, archive, .npz, .csv or .parquet. In a
    file, a path relative to it."""
    class_depth: Literal[1, 2, "last"] | None = None
    """The folder that names the class, counted below the splits: the first, the second, or the one that holds the
    image. None refuses folders that can be read in several ways."""
    label_from: Literal["folder", "filename", "table"] | None = None
    """Where the labels are: in the names of folders, in file names (`label_pattern`), or in a table beside the images.
    None refuses a data set that can be read in several ways."""
    label_pattern: str | None = Field(default=None, min_length=1)
    """`label_from: filename`: a regular expression searched in the file name. Its first group is the class."""
    path_column: str | None = Field(default=None, min_length=1)
    """Column of a table with the images' paths or ids. None finds it by its usual names."""
    label_column: str | None = Field(default=None, min_length=1)
    """Column of a table with the labels. None finds it by its usual names."""
    images: str | None = Field(default=None, min_length=1)
    """Folder of a table's images, relative to the table. None is the table's own folder."""
    val: Literal["given", "drawn"] = "given"
    """Validation images: those that the data set gives, if it does, or drawn by `split_seed` from all images outside
    the test set. With `folds` they are drawn."""
    val_fraction: float = Field(default=0.25, gt=0, lt=1)
    """Fraction of the non-test images used for validation, stratified by class."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Fraction of all images used as the test set, if the data set has none of its own."""
    split_seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the validation split. The test set does not depend on it."""
    val_part: int | None = Field(default=None, ge=0)
    """Which of the disjoint validation sets of a `split_seed`, counted from 0, as a confirmation takes in turn. None
    draws one by itself."""
    group: str | None = Field(default=None, min_length=1)
    """Images of a group, such as a patient, stay on one side of every split: a CSV column, or a regular expression that
    is searched in file names, or in paths if it has a slash. Its parentheses are the group. None has no groups."""
    near_duplicates: Literal["together", "ignored"] = "together"
    """Re-encoded, resized, slightly cropped or shifted copies of an image stay on its side of every split, if images
    have at least 32 pixels a side; or they are not looked for."""
    folds: int | None = Field(default=None, ge=2, le=20)
    """k-fold cross-validation: the mean score of this many networks. None trains one, validated on `val_fraction`."""
    image_size: int | None = Field(default=None, ge=4, le=1024)
    """Height and width in pixels to which images are resized. None keeps their size, which must be the same for all."""
    channels: Literal["rgb", "rgba"] | None = None
    """Images with a fourth band that the file does not declare to be transparency: `rgb` ignores it, `rgba` takes it as
    transparency. None refuses them."""
    normalize: Literal["train", "half", "imagenet"] = "train"
    """Mean and standard deviation of pixels: those of the training images, 0.5 and 0.5, or ImageNet's."""

    @model_validator(mode="after")
    def _check_pattern(self) -> DataConfig:
        if self.label_pattern is None:
            return self
        if self.label_from != "filename":
            raise ValueError("data.label_pattern is read only where data.label_from is filename: set that too")
        try:
            re.compile(self.label_pattern)
        except re.error as error:
            raise ValueError(
                f"data.label_pattern: {self.label_pattern} is not a regular expression: {error}"
            ) from error
        return self


READING_FIELDS = (
    "class_depth", "label_from", "label_pattern", "path_column", "label_column", "images", "group",
    "near_duplicates", "channels",
)  # fmt: skip
"""Fields of `DataConfig` that decide how a source is read. Their effect is part of the data's fingerprint."""

SPLITS_OF_0_1_0 = {"val": "drawn", "near_duplicates": "ignored"}
"""Values by which version 0.1.0, which lacked these fields of `DataConfig`, split images."""


def _pairs(value: Any) -> Any:
    """Turn a mapping into pairs."""
    return tuple(value.items()) if isinstance(value, dict) else value


Cap = Annotated[tuple[str, Annotated[float, Field(gt=0)]], Field(strict=False)]
"""(Class, maximum)."""
Caps = Annotated[
    tuple[Cap, ...],
    Field(strict=False),
    BeforeValidator(_pairs, json_schema_input_type=dict[str, float] | tuple[tuple[str, float], ...]),
]


class SamplingConfig(_Section):
    """The images shown in one epoch."""

    name: Literal["shuffled", "balanced"] = "shuffled"
    """`shuffled` visits every image once; `balanced` makes as many draws with every class equally likely."""
    oversample: int = Field(default=1, ge=1, le=100)
    """Maximum visits of an image per epoch: smaller classes are repeated up to the size of the largest. 1 is off."""
    undersample: float = Field(default=1.0, gt=0, le=1)
    """Maximum images of a class per epoch, as a fraction of the largest class; others in each epoch. 1 is off."""
    caps: Caps = ()
    """Maximum visits per epoch of the named classes, as `{class: n}`: a number of images, or, up to 1, a fraction of
    the class. The largest class is the largest after them. `balanced` only makes shorter epochs of them."""

    @model_validator(mode="after")
    def _check_caps(self) -> SamplingConfig:
        names = [name for name, _ in self.caps]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"sampling.caps names {', '.join(sorted(twice))} twice")
        for name, cap in self.caps:
            if cap > 1 and cap != int(cap):
                raise ValueError(f"sampling.caps: {name} has {cap:g}; give a whole number, or a fraction up to 1")
        return self


IMPORT_PATH = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
"""`PACKAGE.MODULE:NAME`, a callable of the user's own code."""
_MODEL_NAME = rf"^(resnet|vgg|timm/[\w.\-]+|{IMPORT_PATH})$"

OWN = "own"
"""Family of the networks in the user's code."""
OWN_PARTS = ("model", "loss", "augment", "optim")
"""Sections whose `name` may be an import path, which is then called with their `kwargs`."""


def check_import_path(value: str) -> None:
    """Raise ValueError about a file where a module is meant."""
    file, colon, name = value.rpartition(":")
    if colon and (file.endswith(".py") or "/" in file):
        path = PurePath(file).with_suffix("")
        elsewhere = path.is_absolute() or ".." in path.parts
        module = path.name if elsewhere else ".".join(path.parts)
        raise ValueError(
            f"{value} names a file; name the module as Python imports it from the working directory or PYTHONPATH: "
            f"{module}:{name}"
        )


def _own_name(value: Any) -> Any:
    """Explain text that is no import path."""
    if isinstance(value, str):
        check_import_path(value)
        if not re.fullmatch(IMPORT_PATH, value):
            raise ValueError(f"must be PACKAGE.MODULE:NAME of your own code, not '{value}'")
    return value


OwnName = Annotated[str, Field(pattern=f"^{IMPORT_PATH}$"), BeforeValidator(_own_name)]
"""The import path of the user's own code."""


def _or_own(value: Any, choice: ValidatorFunctionWrapHandler) -> Any:
    """Accept an import path beside the names of a choice."""
    return _own_name(value) if isinstance(value, str) and ":" in value else choice(value)


def is_own(name: str | None) -> bool:
    """Return whether a `name` is an import path."""
    return name is not None and ":" in name


def family_of(name: str) -> str:
    """Return the family of a `model.name`."""
    return OWN if is_own(name) else name.partition("/")[0]


def part_of_argument(path: str) -> str | None:
    """Return the section of a keyword argument: `model` of `model.kwargs.width`; None of other paths."""
    section, _, rest = path.partition(".")
    group, _, name = rest.partition(".")
    return section if section in OWN_PARTS and group == "kwargs" and name.isidentifier() else None


def _model_name(value: Any) -> Any:
    """Explain names that do not match, and files where a module is meant."""
    if not isinstance(value, str):
        return value
    check_import_path(value)
    if not re.fullmatch(_MODEL_NAME, value):
        raise ValueError(f"must be resnet, vgg, timm/NAME, or PACKAGE.MODULE:NAME of your own code, not '{value}'")
    return value


def _plain(value: Any) -> Any:
    """Accept numbers, text, true, false, null and lists of these, as tuples."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError("must be a number, text, true, false, null, or a list of these")


Kwarg = Annotated[Any, BeforeValidator(_plain)]
"""A keyword argument of the user's code."""

Kwargs = dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], Kwarg]
"""Keyword arguments of the user's code."""

GIVEN_KWARGS = {
    "model": ("in_channels", "num_classes", "image_size"),
    "loss": ("num_classes", "class_counts"),
    "augment": (),
    "optim": ("params", "lr", "weight_decay"),
}
"""Arguments of the user's own parts that the data or other fields decide."""


def _check_kwargs(section: str, name: str | None, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError about arguments of nothing, and about those that are given in any case."""
    if kwargs and not is_own(name):
        raise ValueError(f"{section}.kwargs are for code of your own; {section}.name is {name}: leave them out")
    for given in GIVEN_KWARGS[section]:
        if given in kwargs and section != "optim":
            raise ValueError(f"{section}.kwargs.{given} follows from the images: leave it out")
        if given in kwargs:
            field = "the network's" if given == "params" else f"optim.{given}"
            raise ValueError(f"optim.kwargs.{given} is {field}: leave it out")


class AugmentConfig(_Section):
    """Augmentation of training images."""

    apply_to: Literal["all", "repeats"] = "all"
    """Augment every visit, or only repeated ones within an epoch (`sampling.oversample`)."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    alternate_flip: bool = False
    """Flip every image in every second epoch, half of them from the first on; needs `flip` 0.5 (arXiv 2404.00498)."""
    vertical_flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a vertical flip."""
    crop_pad_fraction: float = Field(default=0.125, ge=0, le=0.5)
    """Padding before the random crop, as a fraction of the image side: 0.125 is the usual 4 pixels of 32."""
    crop_area_min: float = Field(default=1.0, ge=0.05, le=1)
    """Minimum area of a random resized crop as a fraction of the image, with aspect ratios from 3:4 to 4:3 (arXiv
    1409.4842). 1 is off."""
    rotation_degrees: float = Field(default=0.0, ge=0, le=180)
    """Rotations are uniform from minus to plus this angle."""
    scale: float = Field(default=0.0, ge=0, le=0.9)
    """Zooms about the centre are uniform from 1 minus to 1 plus this."""
    shear_degrees: float = Field(default=0.0, ge=0, le=80)
    """Shears of the rows about the centre are uniform from minus to plus this angle."""
    color_jitter: float = Field(default=0.0, ge=0, le=1)
    """Brightness, contrast and saturation are each scaled by a factor from 1 minus to 1 plus this."""
    policy: Literal["randaugment", "six", "trivialaugment", "autoaugment_cifar10"] = "randaugment"
    """`randaugment`: `ops` of fourteen operations at `strength` (arXiv 1909.13719). `six`: `ops` of rotation, shear,
    two shifts, brightness and contrast, at up to `strength`. `trivialaugment`: one operation at a random strength
    (arXiv 2103.10158). `autoaugment_cifar10`: the 25 pairs of AutoAugment (arXiv 1805.09501)."""
    ops: int = Field(default=0, ge=0, le=4)
    """`randaugment`, `six`: operations per image. 0 is off."""
    strength: float = Field(default=0.3, ge=0, le=1)
    """`randaugment`, `six`: from 0 (none) to 1 (maximum of an operation's published range)."""
    erase: float = Field(default=0.0, ge=0, le=1)
    """Probability of erasing a rectangle (arXiv 1708.04896)."""
    mixup: float = Field(default=0.0, ge=0, le=10)
    """Mixup's alpha (arXiv 1710.09412). 0 is off."""
    cutmix: float = Field(default=0.0, ge=0, le=10)
    """CutMix's alpha (arXiv 1905.04899). 0 is off. With mixup on too, each batch draws one of them."""
    mix_probability: float = Field(default=1.0, ge=0, le=1)
    """Probability of mixing a batch."""
    mix_off_fraction: float = Field(default=1.0, ge=0, le=1)
    """Fraction of the run after which no batch is mixed."""
    start_size_fraction: float = Field(default=1.0, ge=0.25, le=1)
    """Side of the images at the start of the run, as a fraction of the full side (arXiv 2104.00298). 1 is off."""
    full_size_from_fraction: float = Field(default=0.5, gt=0, le=1)
    """Fraction of the run until which the side grows linearly."""
    name: OwnName | None = None
    """`PACKAGE.MODULE:NAME`, a callable of your own that takes `kwargs` and returns a transform of batches. It
    follows all other augmentation but mixing. None is off."""
    kwargs: Kwargs = {}
    """Keyword arguments of `name`, each a field that can be searched: `augment.kwargs.NAME`."""

    @model_validator(mode="after")
    def _check_own(self) -> AugmentConfig:
        _check_kwargs("augment", self.name, self.kwargs)
        return self

    @model_validator(mode="after")
    def _check_flip(self) -> AugmentConfig:
        if self.alternate_flip and self.flip != 0.5:
            raise ValueError(
                f"augment.alternate_flip flips every second time: augment.flip must be 0.5, not {self.flip:g}"
            )
        return self


class ModelConfig(_Section):
    """The network. Each family refuses the fields of the others (`FAMILY_FIELDS`)."""

    name: Annotated[str, Field(pattern=_MODEL_NAME), BeforeValidator(_model_name)] = "resnet"
    """`resnet` or `vgg`, networks for small images; `timm/NAME`, any timm model; or `PACKAGE.MODULE:NAME`, a callable
    of your own that takes `in_channels`, `num_classes` and `kwargs` and returns a torch module."""
    kwargs: Kwargs = {}
    """Keyword arguments of a network of your own, each a field that can be searched: `model.kwargs.NAME`. With another
    `model.name` all are dropped but those given or searched with it."""
    input_size: int | None = Field(default=None, ge=8, le=1024)
    """Height in pixels to which the network resizes its images, the width in proportion. None keeps their size. Unlike
    `data.image_size` it can be searched: images are decoded once, and resized on the device after augmentation."""
    widths: Annotated[tuple[Annotated[StrictInt, Field(ge=4, le=4096)], ...], Field(strict=False)] = Field(
        default=(64, 128, 256, 512), min_length=1, max_length=6
    )
    """Channels of each stage, before scaling by `width`. Every stage after the first halves the image."""
    blocks: Annotated[tuple[Annotated[StrictInt, Field(ge=1, le=64)], ...], Field(strict=False)] = Field(
        default=(2, 2, 2, 2), min_length=1, max_length=6
    )
    """Residual blocks (`resnet`) or convolutions (`vgg`) of each stage, before scaling by `depth`."""
    width: float = Field(default=1.0, ge=0.125, le=4)
    """Factor for `widths` and `hidden`, rounded to multiples of 8."""
    depth: float = Field(default=1.0, ge=0.25, le=4)
    """Factor for `blocks`, rounded, at least 1."""
    block: Literal["basic", "bottleneck"] = "basic"
    """Two 3×3 convolutions, or 1×1, 3×3, 1×1 with four times the output channels (arXiv 1512.03385)."""
    stem_kernel: Literal[3, 7] = 3
    """Kernel side of the first convolution."""
    stem_stride: Literal[1, 2] = 1
    """Stride of the first convolution."""
    max_pool: bool = False
    """A 3×3 max-pool of stride 2 after the stem."""
    se: bool = False
    """Squeeze-and-excitation in every block (arXiv 1709.01507)."""
    anti_alias: bool = False
    """Blur before each step of stride 2 in the blocks and the max-pool (arXiv 1904.11486)."""
    norm: Literal["batch", "group", "none"] = "batch"
    """Batch norm, group norm with at most 16 channels per group (arXiv 1803.08494), or, for `vgg`, none."""
    activation: Literal["relu", "silu", "mish"] = "relu"
    """Activation function of the whole network."""
    hidden: int | None = Field(default=None, ge=8, le=8192)
    """`vgg`: units of the two hidden layers before the classifier (4,096 in VGG16), on features pooled to 7×7. None
    classifies the mean of the features."""
    drop_path: float = Field(default=0.0, ge=0, le=0.9)
    """Stochastic depth: probability of dropping the last block (arXiv 1603.09382)."""
    drop_path_shape: Literal["linear", "uniform"] = "linear"
    """The probability grows linearly from 0, or is the same for every block."""
    block_dropout: float = Field(default=0.0, ge=0, le=0.9)
    """Dropout between the last two convolutions of every block (arXiv 1605.07146)."""
    dropout: float = Field(default=0.0, ge=0, le=0.9)
    """Dropout before the classifier and, for `vgg`, after each hidden layer."""
    pretrained: bool = False
    """Start from timm's pretrained weights: from `pretrained_file`, the hub's cache, or a download."""
    pretrained_file: str | None = Field(default=None, min_length=1)
    """Weights file in timm's format, .safetensors or .pth, instead of the published weights. A classifier of other
    classes is dropped."""

    @model_validator(mode="after")
    def _check_family(self) -> ModelConfig:
        family = family_of(self.name)
        for field, families in FAMILY_FIELDS.items():
            if family not in families and getattr(self, field) != ModelConfig.model_fields[field].default:
                shapes = " and ".join(families).replace(OWN, "networks of your own")
                raise ValueError(f"model.{field} shapes {shapes} only; model.name is {self.name}: leave it out")
        _check_kwargs("model", self.name, self.kwargs)
        if self.pretrained_file is not None and not self.pretrained:
            raise ValueError("model.pretrained_file is read only where model.pretrained is true: set that too")
        if family in ("timm", OWN):
            return self
        if len(self.widths) != len(self.blocks):
            raise ValueError(
                f"model.widths names {len(self.widths)} stages and model.blocks {len(self.blocks)}: "
                "give one number a stage in both"
            )
        if self.norm == "none" and family != "vgg":
            raise ValueError("model.norm: none is for vgg; residual blocks need a norm to begin as their shortcut")
        return self

    def input_pixels(self, image_size: tuple[int, int]) -> int:
        """Return the pixels of the network's input for images (H, W)."""
        height, width = image_size
        return height * width if self.input_size is None else self.input_size**2 * width // height


FAMILY_FIELDS: dict[str, tuple[str, ...]] = {
    "widths": ("resnet", "vgg"), "blocks": ("resnet", "vgg"), "width": ("resnet", "vgg"), "depth": ("resnet", "vgg"),
    "norm": ("resnet", "vgg"), "activation": ("resnet", "vgg"), "block": ("resnet",), "stem_kernel": ("resnet",),
    "stem_stride": ("resnet",), "max_pool": ("resnet",), "se": ("resnet",), "anti_alias": ("resnet",),
    "drop_path_shape": ("resnet",), "block_dropout": ("resnet",), "hidden": ("vgg",), "drop_path": ("resnet", "timm"),
    "pretrained": ("timm",), "pretrained_file": ("timm",), "dropout": ("resnet", "vgg", "timm"), "kwargs": (OWN,),
}  # fmt: skip
"""Families that accept each field; fields not listed apply to every family."""


def lacking_fields(network: str) -> list[str]:
    """Return the paths of the fields, except for arguments, that the family of a network does not have."""
    family = family_of(network)
    return [f"model.{name}" for name, has in FAMILY_FIELDS.items() if name != "kwargs" and family not in has]


LossName = Literal["cross_entropy", "focal", "bce"]


class LossConfig(_Section):
    """The training loss."""

    name: Annotated[LossName, WrapValidator(_or_own, json_schema_input_type=LossName | OwnName)] = "cross_entropy"
    """Cross-entropy; focal loss (arXiv 1708.02002); binary cross-entropy per class (arXiv 2110.00476); or
    `PACKAGE.MODULE:NAME`, a callable of your own that takes `kwargs` and returns a loss of logits and labels."""
    kwargs: Kwargs = {}
    """Keyword arguments of a loss of your own, each a field that can be searched: `loss.kwargs.NAME`."""
    gamma: float = Field(default=2.0, ge=0, le=10)
    """`focal`: how far well-classified images are discounted. 0 is cross-entropy; the paper uses 2."""
    smoothing: float = Field(default=0.0, ge=0, le=0.9)
    """Label smoothing (arXiv 1512.00567). Mixed targets are not smoothed."""
    smoothing_final: float | None = Field(default=None, ge=0, le=0.9)
    """Smoothing at the end of the run, reached linearly. None keeps it constant."""
    smoothing_final_from: float | None = Field(default=None, ge=0, lt=1)
    """Fraction of the run from which smoothing is `smoothing_final`, at once. None is linear."""
    smoothing_patience_fraction: float | None = Field(default=None, gt=0, le=1)
    """Fraction of the run without a lower validation loss after which smoothing is `smoothing_final`, at once. None is
    linear."""
    logit_adjustment: float = Field(default=0.0, ge=0, le=3)
    """Adds this times log(class frequency) to each logit in training (arXiv 2007.07314). 1 is balanced softmax (arXiv
    2007.10740); 0 is off."""
    class_weights: Literal["none", "inverse", "effective"] = "none"
    """Weight of an image by its class: equal, inverse class frequency, or inverse effective number (arXiv 1901.05555).
    """
    class_weights_from_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the run from which `class_weights` apply: deferred re-weighting (arXiv 1906.07413)."""

    @model_validator(mode="after")
    def _check_smoothing(self) -> LossConfig:
        given = [
            name for name in ("smoothing_final_from", "smoothing_patience_fraction") if getattr(self, name) is not None
        ]
        if given and self.smoothing_final is None:
            raise ValueError(f"loss.{given[0]} is read only where loss.smoothing_final is given: set that too")
        if len(given) > 1:
            raise ValueError(f"loss.{given[0]} and loss.{given[1]} exclude each other: give one of them")
        return self

    @model_validator(mode="after")
    def _check_name(self) -> LossConfig:
        if self.name == "bce" and self.logit_adjustment > 0:
            raise ValueError("loss.logit_adjustment shifts the logits of a softmax, and loss.name: bce has none")
        _check_kwargs("loss", self.name, self.kwargs)
        for field in NOT_OF_OWN_LOSSES if is_own(self.name) else ():
            if getattr(self, field) != LossConfig.model_fields[field].default:
                raise ValueError(
                    f"loss.{field} is no field of a loss of your own; loss.name is {self.name}: leave it out"
                )
        return self


NOT_OF_OWN_LOSSES = ("smoothing", "smoothing_final", "logit_adjustment", "class_weights")
"""Fields of `LossConfig` that are refused with a loss of the user's own."""


class SwatsConfig(_Section):
    """Switch of SWATS from Adam to SGD (arXiv 1712.07628)."""

    switch: Literal["fraction", "criterion"] = "fraction"
    """Switch at a fixed fraction of the run, or when the projected SGD rate has settled."""
    switch_fraction: float = Field(default=0.25, gt=0, lt=1)
    """`fraction`: the fraction of the run."""
    tolerance: float = Field(default=1e-9, gt=0, le=1)
    """`criterion`: maximum difference of the projected rate at the schedule's peak to its moving average. The paper
    uses 1e-9."""


OptimName = Literal["sgd", "adamw", "nadam", "swats", "muon", "logistic"]


class OptimConfig(_Section):
    """The optimizer. Exactly one of `lr` and `lr_scale` is set."""

    name: Annotated[OptimName, WrapValidator(_or_own, json_schema_input_type=OptimName | OwnName)] = "adamw"
    """SGD with momentum; AdamW; NAdam; SWATS, which starts as Adam and becomes SGD; Muon for matrices and filters with
    AdamW for the rest. Or `logistic`, a probe: a regularized logistic regression on the features of the pretrained
    network, which is not trained, in one epoch. Of the training's fields only `model`, `seed`, `precision.autocast` and
    `loss.class_weights` then have an effect. Or `PACKAGE.MODULE:NAME`, a torch optimizer of your own; give it `lr`."""
    kwargs: Kwargs = {}
    """Keyword arguments of an optimizer of your own, each a field that can be searched: `optim.kwargs.NAME`."""
    lr: float | None = Field(default=None, gt=0, le=100)
    """Peak learning rate."""
    lr_scale: float | None = Field(default=None, gt=0, le=1000)
    """Peak learning rate as a multiple of the optimizer's reference at this batch size (`REFERENCE_LR`)."""
    weight_decay: float = Field(default=5e-5, ge=0, le=0.1)
    """Fraction by which each weight, except norms and biases, shrinks per step at the schedule's peak. It means the
    same under every optimizer (torch's AdamW calls this lr × weight_decay)."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD and Muon, and of SWATS after its switch."""
    nesterov: bool = True
    """Nesterov momentum for SGD, for Muon and its AdamW (then NAdamW), and for SWATS after its switch."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment for AdamW, NAdam, Muon's AdamW, and SWATS before its switch."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment, likewise."""
    grad_clip: float | None = Field(default=None, gt=0)
    """Maximum norm of all gradients together. None is off."""
    backbone_lr_scale: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of all other layers as a fraction of the classifier's."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of each layer of a timm network as a fraction of the next one's (arXiv 2106.08254), by timm's own
    order of layers; the classifier's is not reduced, and `backbone_lr_scale` multiplies those of all others. 1 is off.
    """
    head_only_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the run in which only the classifier is trained. 0 is off."""
    swats: SwatsConfig = SwatsConfig()
    """The switch of SWATS."""

    @model_validator(mode="before")
    @classmethod
    def _default_rate(cls, values: Any) -> Any:
        """Use the reference rate (`lr_scale` 1) if neither rate is given."""
        own = isinstance(values, dict) and is_own(str(values.get("name")))
        if isinstance(values, dict) and not own and values.get("lr") is None and values.get("lr_scale") is None:
            return {**values, "lr_scale": 1.0}
        return values

    @model_validator(mode="after")
    def _one_rate(self) -> OptimConfig:
        if self.lr is not None and self.lr_scale is not None:
            raise ValueError("optim.lr and optim.lr_scale exclude each other: give one of them")
        if is_own(self.name) and self.lr is None:
            raise ValueError(f"optim.lr_scale has no reference for {self.name} of your own: give optim.lr instead")
        _check_kwargs("optim", self.name, self.kwargs)
        if self.name == "swats" and self.swats.switch == "criterion":
            for field, neutral in (("backbone_lr_scale", 1), ("layer_decay", 1), ("head_only_fraction", 0)):
                if getattr(self, field) != neutral:
                    raise ValueError(
                        "optim.swats.switch: criterion measures one learning rate for all layers at once, and "
                        f"optim.{field} tells them apart; set that to {neutral}, or this to fraction"
                    )
        return self

    def peak_lr(self, batch_size: int) -> float:
        """Return `lr`, or `lr_scale` × reference × (batch_size / 256) ** exponent."""
        if self.lr is not None:
            return self.lr
        assert self.lr_scale is not None
        reference, power = REFERENCE_LR[self.name]
        return self.lr_scale * reference * float((batch_size / 256) ** power)


Piece = Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], Annotated[float, Field(gt=0, le=1)]], Field(strict=False)]
"""(Fraction of the run from which it applies, factor of the peak learning rate)."""


class ScheduleConfig(_Section):
    """The learning rate over the run, as a factor of its peak."""

    name: Literal["cosine", "linear", "constant", "step", "pieces", "plateau"] = "cosine"
    """Decay after the warm-up: `cosine` (arXiv 1608.03983) or `linear` to `final_factor`; `constant`; `step` by
    `gamma`; `pieces` as listed; or `plateau` by `gamma` when validation stops improving."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Fraction of the run in which the factor rises linearly to 1 (arXiv 1706.02677)."""
    warmup_start: float = Field(default=0.01, ge=0, le=1)
    """Factor at the start of the warm-up."""
    final_factor: float = Field(default=0.0, ge=0, le=1)
    """Factor at the end of the run for cosine and linear; lowest factor of plateau."""
    step_fraction: float = Field(default=0.3, gt=0, le=1)
    """`step`: fraction of the run between two reductions (torch's StepLR)."""
    gamma: float = Field(default=0.1, gt=0, le=1)
    """`step`, `plateau`: multiplier of the factor at each reduction."""
    pieces: Annotated[tuple[Piece, ...], Field(strict=False)] = ((0.5, 0.1), (0.75, 0.01))
    """`pieces`: increasing pairs (fraction of the run from which a factor applies, factor), from 1 on."""
    patience_fraction: float = Field(default=0.1, gt=0, le=1)
    """`plateau`: fraction of the run without a better validation score that triggers a reduction (torch's
    ReduceLROnPlateau)."""

    @model_validator(mode="after")
    def _check_pieces(self) -> ScheduleConfig:
        starts = [start for start, _ in self.pieces]
        if any(later <= earlier for earlier, later in itertools.pairwise(starts)):
            raise ValueError(f"schedule.pieces must begin one after the other, not at {starts}")
        return self


class AveragingConfig(_Section):
    """Averaging of the weights over time. The average is evaluated and kept."""

    name: Literal["none", "ema", "swa"] = "none"
    """None, exponential moving average, or stochastic weight averaging (arXiv 1803.05407)."""
    half_life_fraction: float = Field(default=0.02, gt=0, le=0.5)
    """EMA: half-life of a weight's contribution, as a fraction of the run."""
    swa_start_fraction: float = Field(default=0.75, ge=0, lt=1)
    """SWA: fraction of the run from which the weights at the end of each epoch are averaged."""
    swa_factor: float = Field(default=0.5, gt=0, le=1)
    """SWA: factor of the peak learning rate while weights are averaged. Cosine and linear schedules fall to it by then,
    and hold it: at a rate near zero the averaged weights would hardly differ."""


class EarlyStopConfig(_Section):
    """Early stopping, which keeps the weights of the best epoch."""

    patience_fraction: float | None = Field(default=None, gt=0, le=1)
    """Fraction of the run without a better validation score that ends it. None is off."""


class PrecisionConfig(_Section):
    """Arithmetic and execution of a step."""

    autocast: Literal["auto", "off", "bf16"] = "auto"
    """bfloat16 for matrix products and convolutions. `auto` is bf16 on GPUs of compute capability 8.0 or higher, and
    off elsewhere."""
    compile: bool | Literal["auto"] = False
    """Compile the network with torch.compile. Takes about a minute before the first step, unless cached on disk. `auto`
    compiles its repeated blocks on a GPU, if that is predicted to save more time than it takes."""
    cuda_graphs: bool = True
    """On CUDA, record the whole step once and replay it. A network that cannot be recorded is trained without."""


class TrainConfig(_Section):
    """Complete configuration of one training, including its data."""

    epochs: int = Field(default=60, ge=1, le=MOST_EPOCHS)
    """Passes over the training images."""
    batch_size: int = Field(default=128, ge=2, le=65_536)
    """Images per step."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of initial weights, order, augmentation and dropout. A study sets it for each trial."""
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

    @model_validator(mode="after")
    def _check_size(self) -> TrainConfig:
        if self.model.input_size is not None and self.augment.start_size_fraction < 1:
            raise ValueError(
                "model.input_size gives images one size, and augment.start_size_fraction lets it grow: give one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_layers(self) -> TrainConfig:
        if self.optim.layer_decay != 1 and not self.model.name.startswith("timm/"):
            raise ValueError(
                f"optim.layer_decay is for timm networks, and model.name is {self.model.name}: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_probe(self) -> TrainConfig:
        if self.is_probe and not self.model.pretrained:
            raise ValueError(
                "optim.name: logistic classifies the features of a pretrained network: "
                "set model.pretrained, and model.name to a timm model"
            )
        return self

    @property
    def is_probe(self) -> bool:
        """Whether only a logistic regression on the features of a frozen network is fitted."""
        return self.optim.name == "logistic"

    def override(self, values: dict[str, Any]) -> TrainConfig:
        """Return a validated copy with the fields at these paths replaced.

        The two rates clear each other, and another `name` of a section the fields that it lacks (`dropped_by`).

        Raises:
            KeyError: a path is not a field.
            pydantic.ValidationError: a value is invalid for its field.
        """
        tree = self.model_dump()
        for path in self.dropped_by(values):
            section, name = path.partition(".")[0], path.rpartition(".")[2]
            if part_of_argument(path):
                del tree[section]["kwargs"][name]
            else:
                tree[section][name] = (ModelConfig if section == "model" else LossConfig).model_fields[name].default
        for path, value in values.items():
            *parents, leaf = path.split(".")
            node: Any = tree
            for name in parents:
                node = node[name] if isinstance(node, dict) and name in node else None
            known = isinstance(node, dict) and (leaf in node or part_of_argument(path) is not None)
            if not known or isinstance(node.get(leaf), dict):
                raise KeyError(path)
            node[leaf] = value
        for given, dropped in (("lr", "lr_scale"), ("lr_scale", "lr")):
            if values.get(f"optim.{given}") is not None and values.get(f"optim.{dropped}") is None:
                tree["optim"][dropped] = None
        return TrainConfig.model_validate(tree)

    def dropped_by(self, values: Mapping[str, Any]) -> list[str]:
        """Return the fields that `override` resets, since another `name` of their section in `values` has no such."""
        given = {part: values.get(f"{part}.name", getattr(self, part).name) for part in OWN_PARTS}
        changed = [part for part in OWN_PARTS if given[part] != getattr(self, part).name]
        lacking = []
        if "model" in changed:
            lacking += lacking_fields(str(given["model"]))
        if "loss" in changed and is_own(str(given["loss"])):
            lacking += [f"loss.{name}" for name in NOT_OF_OWN_LOSSES]
        now, defaults = self.flat(), TrainConfig().flat()
        dropped = [path for path in lacking if now[path] != defaults[path]]
        dropped += [f"{part}.kwargs.{name}" for part in changed for name in getattr(self, part).kwargs]
        return [path for path in dropped if path not in values]

    def flat(self) -> dict[str, Any]:
        """Return every field's value by its dotted path; of `kwargs`, each argument's."""
        return dict(_walk(self.model_dump(), ""))


def _walk(tree: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in tree.items():
        path = f"{prefix}{name}"
        rows += _walk(value, f"{path}.") if isinstance(value, dict) else [(path, value)]
    return rows
