"""Configurations that together use every choice of a training step, made from the fields of `TrainConfig`."""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from core.config import TrainConfig

# Fields and sections that no operation of a step depends on.
WITHOUT_EFFECT = (
    "epochs", "batch_size", "seed", "data", "schedule", "early_stop",  # only numbers, or the host's part
    "model.pretrained", "model.pretrained_file",  # only weights
    "precision.compile",  # other kernels, which inductor writes
    "precision.cuda_graphs",  # whether a step is captured
)  # fmt: skip

WITHOUT_STEPS = {"optim.name": ("logistic",)}
"""Values of a field with which a training makes no steps."""

STEP: dict[str, Any] = {
    "batch_size": 16, "model.widths": (8, 16), "model.blocks": (1, 1), "model.dropout": 0.2, "augment.ops": 2,
    "augment.start_size_fraction": 0.5, "loss.smoothing": 0.1, "loss.class_weights": "inverse",
    "optim.grad_clip": 1.0, "averaging.name": "ema",
}  # fmt: skip
"""A small network, with the options that steps have in common switched on."""

_TIMM = {path: TrainConfig().flat()[path] for path in ("model.widths", "model.blocks", "augment.start_size_fraction")}
MIXUP = {"augment.mixup": 0.4}
VGG = {"model.name": "vgg"}
SWATS = {"optim.name": "swats"}
NEEDED: dict[str, dict[str, Any]] = {
    "augment.alternate_flip": {"augment.flip": 0.5}, "augment.apply_to": {"sampling.oversample": 3},
    "augment.mix_probability": MIXUP, "augment.mix_off_fraction": MIXUP, "loss.gamma": {"loss.name": "focal"},
    "model.hidden": VGG, "model.norm=none": VGG, "model.drop_path_shape": {"model.drop_path": 0.2},
    "optim.swats.switch": SWATS, "optim.swats.switch_fraction": SWATS,
    "optim.swats.tolerance": {**SWATS, "optim.swats.switch": "criterion"},
    "averaging.swa_start_fraction": {"averaging.name": "swa"}, "averaging.swa_factor": {"averaging.name": "swa"},
    "model.input_size": {"augment.start_size_fraction": 1.0}, "optim.momentum": {"optim.name": "sgd"},
    "optim.nesterov": {"optim.name": "sgd"}, "optim.layer_decay": {"model.name": "timm/test_efficientnet", **_TIMM},
    "loss.smoothing_final_from": {"loss.smoothing_final": 0.0},
    "loss.smoothing_patience_fraction": {"loss.smoothing_final": 0.0},
}  # fmt: skip
"""Other fields without which a field, or one of its values, has no effect or is refused."""

NETWORKS: dict[str, dict[str, Any]] = {"vgg": {}} | dict.fromkeys([f"timm/test_{name}" for name in (
    "byobnet", "convnext", "convnext2", "convnext3", "efficientnet", "efficientnet_evos", "efficientnet_gn",
    "efficientnet_ln", "mambaout", "nfnet", "resnet", "vit", "vit2", "vit3",
)], _TIMM)  # fmt: skip
"""Fields of each network: timm's do not take all of those of `STEP`."""


def fields(section: type[BaseModel] = TrainConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted paths of the fields with an effect on a step."""
    for name, field in section.model_fields.items():
        path = prefix + name
        if path in WITHOUT_EFFECT:
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{path}.")
        else:
            yield path, field


def choices(path: str, field: FieldInfo) -> list[Any]:
    """Return each value of a choice; of a number one that differs from the default; none for other types."""
    kinds = [field.annotation]
    if get_origin(field.annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    kind = kinds[0]
    if get_origin(kind) is Literal:
        return [value for value in get_args(kind) if value not in WITHOUT_STEPS.get(path, ())]
    if kind is bool:
        return [not field.default]
    if kind not in (int, float):
        return []
    low = max((bound for item in field.metadata if (bound := _lower(item)) is not None), default=0)
    high = min((bound for item in field.metadata if (bound := _upper(item)) is not None), default=low + 2)
    between = kind(low + (min(high, low + 4) - low) / 2)
    return [between if between != field.default else kind((between + high) / 2)]


def _lower(item: Any) -> Any:
    return item.ge if isinstance(item, annotated_types.Ge) else getattr(item, "gt", None)


def _upper(item: Any) -> Any:
    return item.le if isinstance(item, annotated_types.Le) else getattr(item, "lt", None)


def _each_field() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, field in fields():
        for value in choices(path, field):
            needed = NEEDED.get(f"{path}={value}", NEEDED.get(path, {}))
            yield f"{path}={value}", {**needed, path: value}


def _product(*changes: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for parts in itertools.product(*changes):
        merged = {path: value for part in parts for path, value in part.items()}
        yield ", ".join(f"{path.rpartition('.')[2]}={value}" for path, value in merged.items()), merged


def _values(path: str) -> list[dict[str, Any]]:
    return [{path: value} for field_path, field in fields() if field_path == path for value in choices(path, field)]


def _steps() -> dict[str, dict[str, Any]]:
    plain = {path: TrainConfig().flat()[path] for path in STEP if not path.startswith(("batch", "model"))}
    changes = [
        ("the defaults", plain),
        *_each_field(),
        *((f"model.name={name}", {"model.name": name, **fields}) for name, fields in NETWORKS.items()),
        *_product(
            _values("loss.name"),
            _values("loss.class_weights"),
            [{"loss.smoothing": 0.0}, {"loss.smoothing": 0.1}, {"loss.smoothing_final": 0.3}],
            [{}, MIXUP],
        ),
        *_product(
            _values("optim.name"),
            _values("averaging.name"),
            [{}, {"precision.autocast": "bf16", "optim.head_only_fraction": 0.5}],
        ),
        *_product(
            _values("augment.policy"),
            [{"augment.rotation_degrees": 20.0}, {"augment.crop_area_min": 0.3}, {"augment.cutmix": 1.0}],
        ),
    ]
    steps: dict[str, dict[str, Any]] = {}
    for name, fields_of in changes:
        step = {**STEP, **fields_of}
        if step not in steps.values():
            steps[name] = step
    return steps


STEPS = _steps()
"""Changes of the defaults by name."""
