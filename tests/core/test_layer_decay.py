"""`optim.layer_decay`: learning rates that decrease from a network's last layer to its first."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from core.config import ModelConfig, TrainConfig
from core.errors import ConfigError
from core.models import build_model, head_parameters, layer_scales
from core.optim import StepOptimizer, build_optimizer

DECAY = 0.7
# One of each family that search_spaces/photos.yaml searches, and a transformer.
FAMILIES = (
    "tf_efficientnet_lite0", "mobilenetv3_small_050", "mobilenetv4_conv_small_035", "convnextv2_atto", "resnet18",
    "regnety_002", "vit_tiny_patch16_224",
)  # fmt: skip


def built(network: str, **optim: Any) -> tuple[nn.Module, StepOptimizer]:
    """A network of this name with its optimizer at a constant rate of 0.1."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=f"timm/{network}"), num_classes=5, in_channels=3, image_size=(64, 64))
    config = TrainConfig().override(
        {
            "model.name": f"timm/{network}",
            "optim.lr": 0.1,
            "optim.momentum": 0.0,
            "optim.layer_decay": DECAY,
            **{f"optim.{field}": value for field, value in optim.items()},
        }
    )
    return model, build_optimizer(config, model, 10, head_parameters(model), layer_scales=layer_scales(model, DECAY))


def moved(model: nn.Module, optimizer: StepOptimizer, gradient: float) -> dict[str, torch.Tensor]:
    """The change of each parameter in a step with this gradient everywhere."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.begin_step(0.0)
    optimizer.step(1.0)
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("backbone", [1.0, 0.5])
@pytest.mark.parametrize("name", FAMILIES)
def test_rates_are_those_of_timms_groups_times_that_of_the_backbone(name: str, backbone: float) -> None:
    model, optimizer = built(name, name="sgd", weight_decay=0.0, backbone_lr_scale=backbone)
    groups = param_groups_layer_decay(model, layer_decay=DECAY)
    scales = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    head = set(head_parameters(model))
    assert {scales[parameter] for parameter in head} == {1.0}
    assert len(set(scales.values())) > 4
    changes = moved(model, optimizer, 1.0)
    for key, parameter in model.named_parameters():
        rate = 0.1 * scales[parameter] * (1.0 if parameter in head else backbone)
        torch.testing.assert_close(changes[key], torch.full_like(parameter, -rate), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw", "nadam", "muon", "swats"])
def test_weights_of_all_layers_shrink_alike(name: str) -> None:
    model, optimizer = built("resnet18", name=name, weight_decay=0.01, backbone_lr_scale=0.5)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    for key, change in moved(model, optimizer, 0.0).items():
        shrunk = before[key] * (-0.01 if before[key].ndim > 1 else 0.0)
        torch.testing.assert_close(change, shrunk, rtol=1e-3, atol=1e-6)


def test_the_first_layers_are_slower_than_the_last() -> None:
    model = timm.create_model("resnet18", num_classes=5)
    scales = layer_scales(model, DECAY)
    assert scales[model.conv1.weight] < scales[model.layer2[0].conv1.weight] < scales[model.layer4[1].conv2.weight] < 1
    assert scales[model.fc.weight] == 1


def test_a_network_of_one_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^optim.layer_decay: timm does not tell the layers of Linear apart"):
        layer_scales(nn.Linear(2, 2), DECAY)
