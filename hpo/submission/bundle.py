"""A submission model's folder: weights, configuration, classes, preprocessing, origin, scores and a model card.

It contains no pickle, so loading a model runs no code in it. A network of the user's own (`model.name:
PACKAGE.MODULE:NAME`) is only named: its code is imported from this machine. A folder is written beside its place and
then renamed, so it is complete or absent. A model is one network, or an ensemble of several, whose probabilities are
averaged, as those of several views are (`core.tta.average`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from core.calibration import scaled
from core.config import OWN, TrainConfig, family_of
from core.data.decode import SIXTEEN_BIT_TOP, Values
from core.errors import UserError
from core.models import build_model
from core.runtime import autocast, isolated_rng, normalize, select_device
from core.tta import EVALUATION_BATCH, VIEWS, average, evaluation_batch, predict_logits
from hpo.errors import BundleError, SpaceError
from hpo.space import recipe_from_yaml, to_yaml
from hpo.study.code import changed_files, code_of
from hpo.study.results import finite
from hpo.submission.predictions import Images, Predictions, predictions_of
from hpo.text import first_fault, joined

WEIGHTS, MEMBER_WEIGHTS = "model.safetensors", "member_{}.safetensors"
CONFIG, MEMBER_CONFIG, CLASSES = "config.yaml", "config_{}.yaml", "classes.json"
PREPROCESS, ORIGIN, METRICS, README = "preprocess.json", "origin.json", "metrics.json", "README.md"
ONNX = "model.onnx"

_REFIT = "refit the trial again"

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Limits for bundles of other authors, which could otherwise exhaust the memory.
MAX_JSON_BYTES = 1 << 24  # a million classes take 16 MB
MAX_NETWORKS = 20  # as `data.folds`
MAX_IMAGE_PIXELS = 1 << 24  # 4096×4096; `data.image_size` ends at 1024

FORMAT, FORMAT_OF_SEVERAL = 4, 5
"""Formats of the folder that is written, for one configuration and for several."""
READABLE = (2, 3, FORMAT, FORMAT_OF_SEVERAL)
"""Format 2 had no temperature, format 3 no range of 16-bit images."""


@dataclass(frozen=True)
class Normalization:
    """Mean and deviation per channel of a network's training pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Part:
    """One network's part in the model."""

    config: TrainConfig
    weight: float
    """Of its probabilities, relative to those of the others."""
    views: str


@dataclass(frozen=True)
class Bundle:
    """A submission model without its weights."""

    config: TrainConfig
    """Of several, that of the first network."""
    classes: tuple[str, ...]
    in_channels: int
    """1 or 3."""
    image_size: tuple[int, int]
    """(height, width) in pixels that images are resized to."""
    normalizations: tuple[Normalization, ...]
    """One for each network."""
    views: str
    """Test-time augmentation: a name in `core.tta.VIEWS`."""
    data_name: str
    fingerprint: str
    """Hash of the images and labels that it was trained on."""
    versions: dict[str, str]
    code: dict[str, Any] = field(default_factory=dict)
    """Fingerprints of the networks that are the user's own code, see `hpo.study.code`."""
    study: str | None = None
    """Name of the refitted study."""
    trial: int | None = None
    """Number of the refitted trial."""
    source: str | None = None
    temperature: float = 1.0
    """Divisor of the averaged logits, which calibrates the probabilities."""
    top: int = SIXTEEN_BIT_TOP
    """The sample of 16-bit images that is white."""
    parts: tuple[Part, ...] = ()
    """One for each network of an ensemble of several configurations; empty for one configuration."""

    @property
    def networks(self) -> tuple[Part, ...]:
        """The part of each network."""
        return self.parts or (Part(self.config, 1.0, self.views),) * len(self.normalizations)

    @property
    def values(self) -> Values:
        return Values(self.config.data.channels, self.top)

    @property
    def weights(self) -> tuple[str, ...]:
        return weight_files(len(self.normalizations))

    def write(self, folder: Path, models: Sequence[nn.Module], report: dict[str, Any]) -> None:
        """Write the networks and the report (`metrics.json`) into an existing folder, see `writing`."""
        for name, model in zip(self.weights, models, strict=True):
            save_model(model, str(folder / name))
        for name, part in zip(config_files(len(self.parts)), self.parts or self.networks[:1], strict=True):
            (folder / name).write_text(to_yaml(part.config), encoding="utf-8")
        _write_json(folder / CLASSES, self.classes)
        preprocess = {
            "channels": self.in_channels,
            "image_size": self.image_size,
            "tta_views": self.views,
            "temperature": self.temperature,
            "sixteen_bit_top": self.top,
            "networks": [
                {"weights": name, "mean": normalization.mean, "std": normalization.std}
                | ({"weight": part.weight, "views": part.views} if self.parts else {})
                for name, normalization, part in zip(self.weights, self.normalizations, self.networks, strict=True)
            ],
        }
        _write_json(folder / PREPROCESS, preprocess)
        origin = {
            "format": FORMAT_OF_SEVERAL if self.parts else FORMAT,
            "study": self.study,
            "trial": self.trial,
            "data": {"name": self.data_name, "source": self.source, "fingerprint": self.fingerprint},
            "versions": self.versions,
            **({"code": self.code} if self.code else {}),
            "weights_sha256": {name: _sha256(folder / name) for name in self.weights},
        }
        _write_json(folder / ORIGIN, origin)
        _write_json(folder / METRICS, report)


@dataclass(frozen=True)
class LoadedBundle:
    """A submission model, ready to predict."""

    models: tuple[nn.Module, ...]
    """The networks on the device, in evaluation mode."""
    meta: Bundle
    device: torch.device
    folder: Path | None = None
    """The folder that it was loaded from."""

    def logits(self, images: Tensor, *, batch_size: int = EVALUATION_BATCH) -> Tensor:
        """Predict log-probabilities (N, K) float32 on the CPU; logits for one network, one view and temperature 1.

        Args:
            images: (N, C, H, W) uint8 of the model's channels and size, N at least 1, on any device.
            batch_size: Images at once on the device.

        Raises:
            BundleError: The images have another shape or type.
        """
        channels, (height, width) = self.meta.in_channels, self.meta.image_size
        if images.dtype != torch.uint8 or images.shape[1:] != (channels, height, width) or not len(images):
            raise BundleError(
                f"images are {str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape)}; "
                f"this bundle takes uint8 of (N, {channels}, {height}, {width}), N at least 1"
            )
        parts = self.meta.networks
        of_each = [
            self._logits_of(model, normalization, part, images, batch_size)
            for model, normalization, part in zip(self.models, self.meta.normalizations, parts, strict=True)
        ]
        return scaled(average(torch.stack(of_each), [part.weight for part in parts]), self.meta.temperature)

    def _logits_of(self, model: nn.Module, by: Normalization, part: Part, images: Tensor, batch_size: int) -> Tensor:
        logits = predict_logits(
            model,
            images,
            prepare=lambda batch: normalize(batch.to(self.device), by.mean, by.std),
            views=part.views,
            batch_size=min(batch_size, evaluation_batch(part.config.model, self.meta.image_size, self.device)),
            autocast=partial(autocast, part.config.precision.autocast, self.device),
        )
        return logits.cpu()

    def probabilities(self, images: Tensor, *, batch_size: int = EVALUATION_BATCH) -> Tensor:
        """Predict probabilities (N, K) float32 on the CPU, from images as for `logits`."""
        return self.logits(images, batch_size=batch_size).softmax(1)

    def predict(self, images: Images, *, batch_size: int = EVALUATION_BATCH, skip_broken: bool = False) -> Predictions:
        """Predict labels of images of any size, which are read and resized as in training.

        Args:
            images: A path or a list of paths, of images, folders, archives, .npz files or CSVs of paths; Pillow images;
                an array (H, W), (H, W, C) or (N, H, W, C); a tensor (C, H, W) or (N, C, H, W). Pixels are uint8.
            batch_size: Images at once on the device.
            skip_broken: Leave unreadable images out instead of raising an error.

        Raises:
            BundleError: The images are of an unknown kind, for example floats, whose range is not known.
            UserError: There is no image at a path, or one is broken.
        """
        return predictions_of(
            images,
            partial(self.probabilities, batch_size=batch_size),
            classes=self.meta.classes,
            image_size=self.meta.image_size,
            channels=self.meta.in_channels,
            batch_size=batch_size,
            skip_broken=skip_broken,
            values=self.meta.values,
        )


def weight_files(networks: int) -> tuple[str, ...]:
    """Return the file names of the networks' weights."""
    return (WEIGHTS,) if networks == 1 else tuple(MEMBER_WEIGHTS.format(i) for i in range(1, networks + 1))


def config_files(configurations: int) -> tuple[str, ...]:
    """Return the file names of the configurations, the first network's first."""
    return (CONFIG, *(MEMBER_CONFIG.format(i) for i in range(2, configurations + 1)))


# Writing ------------------------------------------------------------------------------------------------------------


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """Provide a new folder for a bundle, which replaces `target` after the block if there was no exception."""
    _restore(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.new-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        _replace(target, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _replace(target: Path, new: Path) -> None:
    """Replace a folder by two renames; `_restore` undoes the first if the process dies between them."""
    old = _aside(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    finally:
        _restore(target)
    shutil.rmtree(old, ignore_errors=True)


def _aside(target: Path) -> Path:
    target = target.resolve()  # "." has no name
    return target.with_name(f".{target.name}.old")


def _restore(target: Path) -> None:
    if not target.exists() and _aside(target).exists():
        _aside(target).rename(target)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Loading ------------------------------------------------------------------------------------------------------------


class _File(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Network(_File):
    weights: str
    mean: tuple[FiniteFloat, ...]
    std: tuple[Annotated[FiniteFloat, Field(gt=0)], ...]


class _Preprocess(_File):
    channels: Literal[1, 3]
    image_size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    tta_views: str
    temperature: Annotated[FiniteFloat, Field(gt=0)]
    sixteen_bit_top: Annotated[int, Field(ge=255, le=SIXTEEN_BIT_TOP)]
    networks: Annotated[tuple[_Network, ...], Field(min_length=1, max_length=MAX_NETWORKS)]


class _PreprocessBefore4(_Preprocess):
    sixteen_bit_top: Literal[65535] = 65535


class _PreprocessBefore3(_PreprocessBefore4):
    temperature: Literal[1] = 1


class _NetworkOfSeveral(_Network):
    weight: Annotated[FiniteFloat, Field(gt=0)]
    views: str


class _PreprocessOfSeveral(_Preprocess):
    networks: Annotated[tuple[_NetworkOfSeveral, ...], Field(min_length=2, max_length=MAX_NETWORKS)]


_PREPROCESS: dict[int, type[_Preprocess]] = {
    2: _PreprocessBefore3,
    3: _PreprocessBefore4,
    FORMAT: _Preprocess,
    FORMAT_OF_SEVERAL: _PreprocessOfSeveral,
}


class _Data(_File):
    name: str
    source: str | None = None
    fingerprint: str


class _Code(_File):
    folder: str
    files: dict[str, str]


class _Origin(_File):
    format: int
    study: str | None = None
    trial: int | None = None
    data: _Data
    versions: dict[str, str]
    code: dict[str, _Code] = {}
    weights_sha256: dict[str, str]


class _Format(_File):
    format: int


_CLASSES: TypeAdapter[tuple[str, ...]] = TypeAdapter(Annotated[tuple[str, ...], Field(min_length=1)])


def load_bundle(folder: Path | str, device: torch.device | str | None = None) -> LoadedBundle:
    """Load a submission model. Nothing is downloaded, and no code of the folder is run.

    A network of the user's own is imported from this machine and called with the bundle's `model.kwargs`, with a
    warning if its code has changed. Load such a model only if its author is trusted.

    Args:
        folder: The output of `hpo refit`.
        device: `cpu`, `cuda` or `cuda:N`; default: the first CUDA device, or the CPU.

    Raises:
        BundleError: The folder is not a bundle, or a file is missing, damaged or does not fit the others.
        UserError: There is no such device.
    """
    folder = Path(folder)
    _restore(folder)
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such folder; give an output folder of `hpo refit`")
    _check_present(folder, ORIGIN, CONFIG, CLASSES, PREPROCESS)
    meta = _read_meta(folder)
    device = device if isinstance(device, torch.device) else select_device(device)
    configs = config_files(len(meta.parts)) if meta.parts else (CONFIG,) * len(meta.weights)
    _check_code(folder, meta)
    models = tuple(
        _load_network(folder, name, replace(meta, config=part.config), config, device)
        for name, part, config in zip(meta.weights, meta.networks, configs, strict=True)
    )
    return LoadedBundle(models, meta, device, folder)


def _check_code(folder: Path, meta: Bundle) -> None:
    """Warn if a network of the user's own has changed; its weights may then fit, and its predictions differ."""
    for name, known in meta.code.items():
        try:
            changed = changed_files(known, code_of({name: "model.name"})[name])
        except UserError as error:
            raise BundleError(f"{folder}: the model needs the code of {known['folder']} ({error})") from error
        if changed:
            text = "%s: the code of %s has changed since (%s): predictions may differ from those of the refit"
            logger.warning(text, folder, name, ", ".join(changed))


def _check_present(folder: Path, *names: str) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise BundleError(f"{folder}: {name} is missing; give an output folder of `hpo refit`, with all its files")


def _load_network(folder: Path, name: str, meta: Bundle, config: str, device: torch.device) -> nn.Module:
    """Load a network of `meta.config`, whose file is `config`."""
    misfit = BundleError(
        f"{folder / name}: does not fit {config} and the {len(meta.classes)} classes of {CLASSES}; {_REFIT}"
    )
    if family_of(meta.config.model.name) not in ("timm", OWN):  # the size of a timm model follows from its name
        # A hostile configuration could describe a network of terabytes, so it is built without memory first.
        sketch = _build(folder / config, meta, torch.device("meta"))
        if sum(weight.nbytes for weight in sketch.parameters()) > (folder / name).stat().st_size:
            raise misfit
    model = _build(folder / config, meta, torch.device("cpu"))
    try:
        load_model(model, folder / name)
    except (RuntimeError, SafetensorError) as error:
        raise misfit from error
    return model.to(device).to(memory_format=torch.channels_last).eval()


def _read_meta(folder: Path) -> Bundle:
    """Read everything but the weights, and compare their checksums."""
    made = _read_json(folder / ORIGIN, TypeAdapter(_Format)).format  # first, since other formats have other keys
    if made not in READABLE:
        known = joined(list(map(str, READABLE)))
        raise BundleError(f"{folder}: the bundle has format {made}, and this version of hpo reads {known}")
    origin = _read_json(folder / ORIGIN, TypeAdapter(_Origin))
    preprocess = _read_json(folder / PREPROCESS, TypeAdapter(_PREPROCESS[made]))
    names = weight_files(len(preprocess.networks))
    if tuple(network.weights for network in preprocess.networks) != names:
        raise BundleError(f"{folder / PREPROCESS}: the weights of its networks must be {', '.join(names)}, in order")
    _check_present(folder, *names)
    for name in names:
        if _sha256(folder / name) != origin.weights_sha256.get(name):
            raise BundleError(f"{folder / name}: damaged, or from another bundle; {_REFIT}")
    if any(not len(each.mean) == len(each.std) == preprocess.channels for each in preprocess.networks):
        raise BundleError(f"{folder / PREPROCESS}: mean and std must have one number for each channel")
    if math.prod(preprocess.image_size) > MAX_IMAGE_PIXELS:
        raise BundleError(f"{folder / PREPROCESS}: damaged (image_size: more than 4096×4096); {_REFIT}")
    several = preprocess.networks if isinstance(preprocess, _PreprocessOfSeveral) else ()
    for views in (preprocess.tta_views, *(each.views for each in several)):
        if views not in VIEWS:
            raise BundleError(f"{folder / PREPROCESS}: tta_views {views}: this hpo knows {', '.join(VIEWS)}")
    files = config_files(len(several))
    _check_present(folder, *files)
    configs = [_read_config(folder, name) for name in files]
    parts = zip(configs if several else (), several, strict=True)
    return Bundle(
        config=configs[0],
        parts=tuple(Part(config, each.weight, each.views) for config, each in parts),
        classes=_read_json(folder / CLASSES, _CLASSES),
        in_channels=preprocess.channels,
        image_size=preprocess.image_size,
        normalizations=tuple(Normalization(network.mean, network.std) for network in preprocess.networks),
        views=preprocess.tta_views,
        data_name=origin.data.name,
        fingerprint=origin.data.fingerprint,
        versions=origin.versions,
        code={name: each.model_dump() for name, each in origin.code.items()},
        study=origin.study,
        trial=origin.trial,
        source=origin.data.source,
        temperature=preprocess.temperature,
        top=preprocess.sixteen_bit_top,
    )


def _read_config(folder: Path, name: str) -> TrainConfig:
    path = folder / name
    try:
        return recipe_from_yaml(path.read_text(encoding="utf-8"), str(path)).config
    except (SpaceError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: damaged ({str(error).splitlines()[0]}); {_REFIT}") from error


def _read_json(path: Path, adapter: TypeAdapter[T]) -> T:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise BundleError(f"{path}: damaged (longer than {MAX_JSON_BYTES:,} bytes); {_REFIT}")
    try:
        return adapter.validate_json(path.read_bytes())
    except ValidationError as error:
        raise BundleError(f"{path}: damaged ({first_fault(error)}); {_REFIT}") from error


def _build(config: Path, meta: Bundle, device: torch.device) -> nn.Module:
    """Build the network with random weights; pretrained weights would be downloaded and overwritten."""
    plain = meta.config.model.model_copy(update={"pretrained": False})
    try:
        with isolated_rng(device), device:
            return build_model(
                plain, num_classes=len(meta.classes), in_channels=meta.in_channels, image_size=meta.image_size
            )
    except UserError as error:
        raise BundleError(f"{config}: cannot be built here ({error})") from error
