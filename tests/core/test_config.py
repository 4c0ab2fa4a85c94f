"""Every field of `TrainConfig` is bounded, described, and changes the training."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.datasets import load_digits

from core.config import FAMILY_FIELDS, READING_FIELDS, REFERENCE_LR, DataConfig, OptimConfig, TrainConfig
from core.data import Splits, load_dataset, split
from core.loop import train

CPU = torch.device("cpu")

SWATS = {"optim.name": "swats"}
TIMM = {"model.name": "timm/test_resnet", "model.widths": (64, 128, 256, 512), "model.blocks": (2, 2, 2, 2)}
CRITERION = {"optim.name": "swats", "optim.swats.switch": "criterion"}

# field -> (other fields it depends on, another value).
WEIGHTS: dict[str, tuple[dict[str, Any], Any]] = {
    "epochs": ({}, 3),
    "batch_size": ({}, 32),
    "seed": ({}, 1),
    "data.val_fraction": ({}, 0.4),
    "data.test_fraction": ({}, 0.4),
    "data.split_seed": ({}, 1),
    "data.val_part": ({}, 0),
    "data.image_size": ({}, 12),
    "data.normalize": ({}, "half"),
    "sampling.name": ({}, "balanced"),
    "sampling.oversample": ({}, 2),
    "sampling.undersample": ({}, 0.5),
    "sampling.caps": ({}, (("3", 0.5),)),
    "augment.apply_to": ({"sampling.oversample": 2}, "repeats"),
    "augment.flip": ({}, 0.5),
    "augment.alternate_flip": ({"augment.flip": 0.5}, True),
    "augment.vertical_flip": ({}, 0.5),
    "augment.crop_pad_fraction": ({}, 0.0),
    "augment.crop_area_min": ({}, 0.5),
    "augment.rotation_degrees": ({}, 20.0),
    "augment.scale": ({}, 0.3),
    "augment.shear_degrees": ({}, 20.0),
    "augment.color_jitter": ({}, 0.5),
    "augment.policy": ({"augment.ops": 2}, "trivialaugment"),
    "augment.ops": ({}, 2),
    "augment.strength": ({"augment.ops": 2}, 0.9),
    "augment.erase": ({}, 0.5),
    "augment.mixup": ({}, 0.4),
    "augment.cutmix": ({}, 1.0),
    "augment.mix_probability": ({"augment.mixup": 0.4}, 0.3),
    "augment.mix_off_fraction": ({"augment.mixup": 0.4}, 0.5),
    "augment.start_size_fraction": ({}, 0.5),
    "augment.full_size_from_fraction": ({"augment.start_size_fraction": 0.5}, 1.0),
    "model.name": ({**TIMM, "epochs": 1}, "timm/mobilenetv3_small_050"),
    "model.widths": ({}, (16, 16)),
    "model.blocks": ({}, (2, 1)),
    "model.width": ({}, 2.0),
    "model.depth": ({}, 2.0),
    "model.input_size": ({}, 12),
    "model.block": ({}, "bottleneck"),
    "model.stem_kernel": ({}, 7),
    "model.stem_stride": ({}, 2),
    "model.max_pool": ({}, True),
    "model.se": ({}, True),
    "model.anti_alias": ({}, True),
    "model.norm": ({}, "group"),
    "model.activation": ({}, "mish"),
    "model.hidden": ({"model.name": "vgg"}, 16),
    "model.drop_path": ({}, 0.3),
    "model.drop_path_shape": ({"model.drop_path": 0.3}, "uniform"),
    "model.block_dropout": ({}, 0.3),
    "model.dropout": ({}, 0.3),
    "loss.name": ({}, "focal"),
    "loss.gamma": ({"loss.name": "focal"}, 1.0),
    "loss.smoothing": ({}, 0.1),
    "loss.smoothing_final": ({}, 0.1),
    "loss.smoothing_final_from": ({"loss.smoothing_final": 0.1}, 0.5),
    "loss.smoothing_patience_fraction": ({"loss.smoothing_final": 0.1}, 0.9),
    "loss.logit_adjustment": ({}, 1.0),
    "loss.class_weights": ({}, "inverse"),
    "loss.class_weights_from_fraction": ({"loss.class_weights": "inverse"}, 0.5),
    "optim.name": ({}, "nadam"),
    "optim.lr": ({}, 0.02),
    "optim.lr_scale": ({}, 0.5),
    "optim.weight_decay": ({}, 1e-2),
    "optim.momentum": ({"optim.name": "sgd"}, 0.5),
    "optim.nesterov": ({"optim.name": "sgd"}, False),
    "optim.beta1": ({}, 0.5),
    "optim.beta2": ({}, 0.9),
    "optim.grad_clip": ({"optim.name": "sgd"}, 0.1),
    "optim.backbone_lr_scale": ({}, 0.1),
    "optim.layer_decay": (TIMM, 0.5),
    "optim.head_only_fraction": ({}, 0.5),
    "optim.swats.switch": (SWATS, "criterion"),
    "optim.swats.switch_fraction": (SWATS, 0.75),
    "optim.swats.tolerance": (CRITERION, 1.0),
    "schedule.name": ({}, "linear"),
    "schedule.warmup_fraction": ({}, 0.3),
    "schedule.warmup_start": ({}, 0.5),
    "schedule.final_factor": ({}, 0.5),
    "schedule.step_fraction": ({"schedule.name": "step"}, 0.6),
    "schedule.gamma": ({"schedule.name": "step"}, 0.5),
    "schedule.pieces": ({"schedule.name": "pieces"}, ((0.3, 0.5),)),
    # At this rate validation does not improve: the first patience ends in the middle, the second never.
    "schedule.patience_fraction": ({"schedule.name": "plateau", "optim.lr_scale": 1e-4}, 1.0),
    "averaging.name": ({}, "ema"),
    "averaging.half_life_fraction": ({"averaging.name": "ema"}, 0.4),
    "averaging.swa_start_fraction": ({"averaging.name": "swa"}, 0.25),
    "averaging.swa_factor": ({"averaging.name": "swa"}, 0.1),
    "early_stop.patience_fraction": ({"optim.lr_scale": 1e-6}, 0.25),
    "precision.autocast": ({}, "bf16"),
}
# Tested elsewhere: below, in `test_models.py` (pretrained weights), `tests/hpo` (folds), `test_groups.py`,
# `test_pixels.py`, `test_execution.py` and `test_own_parts.py` (`augment.name`).
ELSEWHERE = {"data.name", "data.folds", "data.group", "data.channels", "model.pretrained", "model.pretrained_file"}
ELSEWHERE |= {"augment.name"}
ELSEWHERE |= {"precision.compile", "precision.cuda_graphs"}
# In the table of layouts, and in `test_data.py`.
ELSEWHERE |= {*(f"data.{name}" for name in READING_FIELDS), "data.val"}


def test_the_tables_cover_every_field() -> None:
    assert WEIGHTS.keys() | ELSEWHERE == TrainConfig().flat().keys()


@pytest.fixture(scope="module")
def trained() -> dict[str, dict[str, torch.Tensor]]:
    """Weights of configurations that several fields are compared with."""
    return {}


@functools.cache
def few(data: DataConfig) -> Splits:
    """100 training and 40 validation images of a data set."""
    splits = split(load_dataset(data), data)
    return dataclasses.replace(splits, train=splits.train[:100], val=splits.val[:40])


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return train(config, few(config.data), device=CPU).model.state_dict()


@pytest.mark.parametrize(("field", "context", "value"), [(name, *row) for name, row in WEIGHTS.items()], ids=WEIGHTS)
def test_each_field_changes_the_trained_weights(
    tiny: TrainConfig,
    trained: dict[str, dict[str, torch.Tensor]],
    field: str,
    context: dict[str, Any],
    value: Any,
) -> None:
    before = tiny.override(context)
    after = before.override({field: value})
    key = before.model_dump_json()
    if key not in trained:
        trained[key] = weights(before)
    ours, theirs = trained[key], weights(after)
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    if shapes == {name: tensor.shape for name, tensor in theirs.items()}:
        assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_data_set_changes_the_trained_weights(tiny: TrainConfig, tmp_path: Path) -> None:
    images, labels = load_digits(return_X_y=True)
    inverted = (16 - images.reshape(-1, 8, 8)).astype(np.uint8) * 15
    np.savez(tmp_path / "inverted.npz", images=inverted, labels=labels)
    ours, theirs = weights(tiny), weights(tiny.override({"data.name": str(tmp_path / "inverted.npz")}))
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("field", TrainConfig().flat())
def test_every_field_has_a_description(field: str) -> None:
    node: Any = TrainConfig
    *parents, leaf = field.split(".")
    for name in parents:
        node = node.model_fields[name].annotation
    description = node.model_fields[leaf].description
    assert description
    assert description.rstrip().endswith((".", ")"))


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"epochs": 0}, "greater than or equal to 1"),
        ({"batch_size": "32"}, "valid integer"),
        ({"batch_size": 32.5}, "valid integer"),
        ({"model.se": 1}, "valid boolean"),
        ({"model.widths": (8, 16)}, "widths names 2 stages and model.blocks 4"),
        ({"model.name": "resnext"}, "PACKAGE.MODULE:NAME of your own code, not 'resnext'"),
        ({"model.name": "nets/tiny.py:Net"}, "names a file; .* or PYTHONPATH: nets.tiny:Net"),
        ({"model.name": "/home/me/tiny.py:Net"}, "names a file; .* or PYTHONPATH: tiny:Net"),
        ({"model.kwargs.width": 8}, "model.kwargs shapes networks of your own only; model.name is resnet"),
        ({"model.name": "nets:Net", "model.kwargs.num_classes": 8}, "num_classes follows from the images"),
        ({"model.name": "nets:Net", "model.kwargs.width": {"a": 1}}, "or a list of these"),
        ({"model.name": "nets:Net", "model.dropout": 0.1}, "model.dropout shapes resnet and vgg and timm only"),
        ({"model.pretrained": True}, "model.pretrained shapes timm only"),
        ({"model.name": "timm/resnet18", "model.se": True}, "model.se shapes resnet only"),
        ({"model.hidden": 64}, "model.hidden shapes vgg only"),
        ({"model.norm": "none"}, "model.norm: none is for vgg"),
        ({"model.name": "timm/resnet18", "model.pretrained_file": "a.pth"}, "where model.pretrained is true"),
        ({"augment.alternate_flip": True, "augment.flip": 0.3}, "flip must be 0.5, not 0.3"),
        ({"loss.name": "bce", "loss.logit_adjustment": 1.0}, "bce has none"),
        ({"schedule.pieces": ((0.5, 0.1), (0.5, 0.01))}, "one after the other"),
        (
            {"optim.name": "swats", "optim.swats.switch": "criterion", "optim.backbone_lr_scale": 0.1},
            "optim.backbone_lr_scale tells them apart; set that to 1",
        ),
        (
            {"optim.name": "swats", "optim.swats.switch": "criterion", "optim.head_only_fraction": 0.1},
            "optim.head_only_fraction tells them apart; set that to 0",
        ),
        (
            {"optim.name": "swats", "optim.swats.switch": "criterion", **TIMM, "optim.layer_decay": 0.5},
            "optim.layer_decay tells them apart; set that to 1",
        ),
        (
            {"model.input_size": 16, "augment.start_size_fraction": 0.5},
            "input_size gives images one size, and augment.start_size_fraction lets it grow",
        ),
        ({"optim.layer_decay": 0.5}, "layer_decay is for timm networks, and model.name is resnet"),
        ({"data.label_pattern": "(a)"}, "label_pattern is read only where data.label_from is filename"),
        ({"data.label_from": "filename", "data.label_pattern": "("}, "is not a regular expression"),
        ({"data.class_depth": 3}, "Input should be 1, 2 or 'last'"),
        ({"augment.apply_to": "repeats"}, "augments nothing where no image is repeated"),
        ({"optim.lr": 0.1, "optim.lr_scale": 1.0}, "exclude each other"),
        ({"augment.flip": 1.5}, "less than or equal to 1"),
    ],
)
def test_invalid_values_are_refused(values: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        TrainConfig().override(values)


@pytest.mark.parametrize("path", ["optim.lrr", "optim", "lr", "optim.lr.x", "epochs.x"])
def test_unknown_paths_are_refused(path: str) -> None:
    with pytest.raises(KeyError, match=path):
        TrainConfig().override({path: 1})


def test_setting_one_rate_clears_the_other() -> None:
    absolute = TrainConfig().override({"optim.lr": 0.3})
    assert absolute.optim.lr_scale is None
    assert absolute.override({"optim.lr_scale": 2.0}).optim.lr is None


@pytest.mark.parametrize("name", REFERENCE_LR)
def test_lr_scale_1_at_batch_256_is_the_reference_rate(name: str) -> None:
    optim = OptimConfig(name=name)
    reference, power = REFERENCE_LR[name]
    assert optim.peak_lr(256) == reference
    assert optim.peak_lr(64) == pytest.approx(reference * 0.25**power)


def test_family_fields_exist() -> None:
    assert set(FAMILY_FIELDS) < set(TrainConfig.model_fields["model"].annotation.model_fields)  # type: ignore[union-attr]


def test_a_configuration_round_trips_through_json() -> None:
    config = TrainConfig().override({"optim.lr": 0.3, "model.widths": (8, 16), "model.blocks": (1, 1)})
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config
