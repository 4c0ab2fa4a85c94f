"""`model.input_size`: a network that resizes its images."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from core.config import TrainConfig
from core.data import load_dataset, split
from core.errors import ConfigError
from core.loop import train
from core.runtime import resize
from tests.core.networks import build, images
from tests.core.trainings import CPU

NETWORKS: list[dict[str, Any]] = [
    {"name": "resnet", "widths": (8, 16), "blocks": (1, 1)},
    {"name": "vgg", "widths": (8, 16), "blocks": (1, 1)},
    {"name": "timm/test_efficientnet"},
    {"name": "timm/test_vit"},
]


def with_drawn_classifier(model: nn.Module) -> nn.Module:
    """timm's networks begin with a classifier of zeros."""
    torch.manual_seed(2)
    for parameter in model.get_classifier().parameters() if hasattr(model, "get_classifier") else ():
        nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize("size", [32, 80])
@pytest.mark.parametrize("fields", NETWORKS, ids=lambda fields: str(fields["name"]))
def test_a_network_sees_resized_images(fields: dict[str, Any], size: int) -> None:
    seen = images(3, 3, 64, 64)
    ours = with_drawn_classifier(build(**fields, input_size=size, in_channels=3, image_size=(64, 64)))
    plain = with_drawn_classifier(build(**fields, in_channels=3, image_size=(size, size)))
    with torch.no_grad():
        assert torch.equal(ours(seen), plain(resize(seen, (size, size))))
        assert torch.equal(copy.deepcopy(ours)(seen), ours(seen))
    assert ours.state_dict().keys() == plain.state_dict().keys()


def test_the_width_and_other_sizes_are_in_proportion() -> None:
    model = build(**NETWORKS[0], input_size=32, in_channels=3, image_size=(64, 96))
    sizes: list[tuple[int, ...]] = []
    next(model.children()).register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[-2:])))
    for height, width in ((64, 96), (48, 72), (80, 120)):  # also those of an augmentation of predictions
        model(images(2, 3, height, width))
    assert sizes == [(32, 48), (24, 36), (40, 60)]


def test_a_network_is_refused_by_the_size_of_its_input() -> None:
    with pytest.raises(ConfigError, match="8×8"):
        build(name="vgg", widths=(8,) * 5, blocks=(1,) * 5, hidden=16, input_size=8, in_channels=3, image_size=(64, 64))


def test_a_training_at_the_size_of_the_images_is_the_same(tiny: TrainConfig) -> None:
    data = split(load_dataset(tiny.data), tiny.data)
    plain, sized = (train(tiny.override({"model.input_size": size}), data, device=CPU) for size in (None, 8))
    for one, other in zip(plain.model.parameters(), sized.model.parameters(), strict=True):
        assert torch.equal(one, other)
