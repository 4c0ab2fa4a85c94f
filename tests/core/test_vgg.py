"""VGG and its fields against torchvision's."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from core.errors import ConfigError
from core.models.stages import FixedGroupNorm
from tests.core.networks import build, images

_build = partial(build, name="vgg")

SMALL: dict[str, Any] = {"widths": (8, 16), "blocks": (1, 2)}
VGG16: dict[str, Any] = {"widths": (64, 128, 256, 512, 512), "blocks": (2, 2, 3, 3, 3), "hidden": 4096}
# Names of the classifier's layers here and in torchvision; other names are equal.
RENAMED = {"hidden1": "classifier.0", "hidden2": "classifier.3", "fc": "classifier.6"}


def _as_torchvision(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        renamed[f"{RENAMED.get(layer, layer)}.{kind}"] = tensor
    return renamed


def _layers(model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


# --- the same network as the published one


@pytest.mark.parametrize(
    ("reference", "norm", "blocks"),
    [
        ("vgg11", "none", (1, 1, 2, 2, 2)),
        ("vgg16", "none", (2, 2, 3, 3, 3)),
        ("vgg16_bn", "batch", (2, 2, 3, 3, 3)),
        ("vgg19_bn", "batch", (2, 2, 4, 4, 4)),
    ],
)
def test_as_published_it_has_torchvisions_shapes(reference: str, norm: str, blocks: tuple[int, ...]) -> None:
    with torch.device("meta"):  # 138 million weights, none of them drawn
        theirs = torchvision.models.get_model(reference)
        ours = _build(num_classes=1000, in_channels=3, image_size=(224, 224), norm=norm, **VGG16 | {"blocks": blocks})
    shapes = {name: tensor.shape for name, tensor in _as_torchvision(ours.state_dict()).items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}


def _narrow_torchvision(widths: tuple[int, ...], blocks: tuple[int, ...], hidden: int, *, norm: bool) -> nn.Module:
    """torchvision's VGG with other widths."""
    plan: list[str | int] = []
    for width, count in zip(widths, blocks, strict=True):
        plan += [width] * count + ["M"]
    with torch.device("meta"):
        model = torchvision.models.VGG(nn.Identity(), init_weights=False)
    model.features = torchvision.models.vgg.make_layers(plan, batch_norm=norm)
    for index, (inputs, outputs) in {0: (widths[-1] * 49, hidden), 3: (hidden, hidden), 6: (hidden, 7)}.items():
        model.classifier[index] = nn.Linear(inputs, outputs)
    return model


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("side", [32, 64, 250])  # features of 1, 2 and 7 pixels a side
def test_with_torchvisions_weights_it_gives_torchvisions_logits(norm: str, side: int) -> None:
    widths, blocks = (8, 16, 16, 24, 24), (2, 2, 3, 3, 3)
    torch.manual_seed(0)
    theirs = _narrow_torchvision(widths, blocks, 32, norm=norm == "batch").eval()
    ours = _build(
        num_classes=7, in_channels=3, image_size=(side, side), norm=norm, widths=widths, blocks=blocks, hidden=32
    ).eval()
    names = {f"{theirs_name}.": f"{ours_name}." for ours_name, theirs_name in RENAMED.items()}
    state = {}
    for name, tensor in theirs.state_dict().items():
        prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
        state[names.get(prefix, "") + name.removeprefix(prefix)] = tensor
    ours.load_state_dict(state)
    drawn = images(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(ours(drawn), theirs(drawn), rtol=1e-4, atol=1e-5)


def test_initial_weights_match_torchvision() -> None:
    ours = _as_torchvision(_build(in_channels=3, widths=(64, 128), blocks=(1, 1), hidden=64).state_dict())
    for layer, channels in {"features.0": 64, "features.4": 128}.items():
        kaiming = math.sqrt(2 / (9 * channels))  # over the fan-out of a 3×3 convolution
        assert ours[f"{layer}.weight"].std().item() == pytest.approx(kaiming, rel=0.05)
        assert not ours[f"{layer}.bias"].any()
    for layer in RENAMED.values():
        assert ours[f"{layer}.weight"].std().item() == pytest.approx(0.01, rel=0.1)
        assert not ours[f"{layer}.bias"].any()


# --- each field


def test_a_stage_consists_of_convolutions_and_a_max_pool() -> None:
    model = _build(**SMALL)
    conv = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert [type(layer) for layer in model.features] == [*conv, nn.MaxPool2d, *conv, *conv, nn.MaxPool2d]
    convolutions = _layers(model, nn.Conv2d)
    assert [layer.out_channels for layer in convolutions] == [8, 16, 16]
    assert {(layer.kernel_size, layer.stride, layer.padding) for layer in convolutions} == {((3, 3), (1, 1), (1, 1))}
    assert model.features(images(2, 1, 13, 8)).shape == (2, 16, 3, 2)


def test_without_hidden_layers_the_mean_over_all_positions_is_classified() -> None:
    model = _build(image_size=(16, 16), **SMALL).eval()
    drawn = images(2, 1, 16, 16)
    assert [layer.in_features for layer in _layers(model, nn.Linear)] == [16]
    torch.testing.assert_close(model(drawn), model.fc(model.features(drawn).mean((2, 3))))


def test_hidden_layers_use_7x7_positions_and_dropout() -> None:
    model = _build(hidden=24, dropout=0.25, activation="silu", **SMALL)
    head = [type(layer) for layer in list(model)[3:]]
    assert head == [nn.Linear, nn.SiLU, nn.Dropout, nn.Linear, nn.SiLU, nn.Dropout, nn.Linear]
    shapes = [(layer.in_features, layer.out_features) for layer in _layers(model, nn.Linear)]
    assert shapes == [(16 * 7 * 7, 24), (24, 24), (24, 10)]
    assert [layer.p for layer in _layers(model, nn.Dropout)] == [0.25, 0.25]


def test_width_scales_the_hidden_layers_too_and_depth_the_convolutions() -> None:
    model = _build(widths=(16, 32), blocks=(1, 2), hidden=40, width=1.5, depth=2.0)
    assert [layer.out_channels for layer in _layers(model, nn.Conv2d)] == [24, 24, 48, 48, 48, 48]
    assert [layer.out_features for layer in _layers(model, nn.Linear)] == [64, 64, 10]  # 60, to a multiple of 8


@pytest.mark.parametrize(("norm", "kind"), [("batch", nn.BatchNorm2d), ("group", FixedGroupNorm), ("none", None)])
def test_the_norm_is_used_everywhere_or_nowhere(norm: str, kind: type[nn.Module] | None) -> None:
    norms = _layers(_build(norm=norm, **SMALL), (nn.BatchNorm2d, nn.GroupNorm))
    assert [type(layer) for layer in norms] == ([kind] * 3 if kind else [])


@pytest.mark.parametrize("hidden", [None, 16])
@pytest.mark.parametrize(("activation", "kind"), [("relu", nn.ReLU), ("silu", nn.SiLU), ("mish", nn.Mish)])
def test_the_activation_is_the_same_everywhere(activation: str, kind: type[nn.Module], hidden: int | None) -> None:
    used = _layers(_build(activation=activation, hidden=hidden, **SMALL), (nn.ReLU, nn.SiLU, nn.Mish))
    assert {type(layer) for layer in used} == {kind}


@pytest.mark.parametrize("hidden", [None, 16])
def test_dropout_is_at_work_in_training_only(hidden: int | None) -> None:
    model, drawn = _build(dropout=0.5, hidden=hidden, norm="none", **SMALL), images(8, 1, 8, 8)
    assert not torch.equal(model.train()(drawn), model(drawn))
    assert torch.equal(model.eval()(drawn), model(drawn))


# --- any image


@pytest.mark.parametrize("fields", [{}, {"norm": "none"}, {"norm": "group", "hidden": 16}])
def test_every_parameter_gets_a_gradient(fields: dict[str, Any]) -> None:
    model = _build(**SMALL, **fields)
    model(images(8, 1, 8, 8)).logsumexp(1).mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize(
    ("image_size", "stage"),
    [
        ((8, 10), 4),
        ((15, 99), 4),  # 15, 7, 3, 1: a max-pool leaves an odd pixel out
        ((31, 31), 5),
    ],
)
def test_a_max_pool_that_would_halve_one_pixel_is_refused(image_size: tuple[int, int], stage: int) -> None:
    height, width = image_size
    with pytest.raises(
        ConfigError,
        match=rf"^model: an image of {height}×{width} is down to a side of 1 pixel before the max-pool of "
        rf"stage {stage} of model\.widths, .* name fewer stages .* or enlarge the images by data\.image_size$",
    ) as caught:
        _build(image_size=image_size, **VGG16)
    assert "\n" not in str(caught.value)


def test_a_network_that_ends_at_one_pixel_is_built() -> None:
    model = _build(image_size=(32, 32), widths=(8,) * 5, blocks=(1,) * 5)
    assert model.features(images(2, 1, 32, 32)).shape == (2, 8, 1, 1)
