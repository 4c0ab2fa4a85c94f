"""The residual network against torchvision's and timm's, and functions common to all families."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import BlurPool2d, DropPath, SEModule
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from core.config import ModelConfig, TrainConfig
from core.errors import ConfigError
from core.models import build_model, head_parameters
from core.models.resnet import SubsampledConv, drop_path_rates
from core.models.stages import FixedGroupNorm, scale_width, stage_blocks, stage_widths
from core.optim import build_optimizer
from core.runtime import normalize
from tests.core.fake_cuda import CUDA, cuda_autocast, to_fake
from tests.core.networks import build, images, parameters

SMALL: dict[str, Any] = {"widths": (16, 32), "blocks": (1, 1)}
VGG: dict[str, Any] = {"name": "vgg", "widths": (8, 16), "blocks": (1, 2)}
OPTIONS: dict[str, Any] = {
    **SMALL, "se": True, "anti_alias": True, "max_pool": True, "activation": "mish", "drop_path": 0.2, "dropout": 0.2,
}  # fmt: skip
RESNET18: dict[str, Any] = {"stem_kernel": 7, "stem_stride": 2, "max_pool": True}


def _kinds(model: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules()}


# --- resnet: the same network as the published ones


@pytest.mark.parametrize(
    ("block", "reference"),
    [
        ("basic", torchvision.models.resnet18),
        ("basic", lambda: timm.create_model("resnet18")),
        ("bottleneck", torchvision.models.resnet50),
    ],
    ids=["torchvision resnet18", "timm resnet18", "torchvision resnet50"],
)
def test_with_the_published_stem_it_equals_the_published_network(block: str, reference: Any) -> None:
    theirs = reference().eval()
    blocks = (2, 2, 2, 2) if block == "basic" else (3, 4, 6, 3)
    ours = build(num_classes=1000, in_channels=3, image_size=(64, 64), block=block, blocks=blocks, **RESNET18).eval()
    assert parameters(ours) == parameters(theirs)
    ours.load_state_dict(theirs.state_dict())
    drawn = images(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(drawn), theirs(drawn), rtol=1e-4, atol=1e-4)


def test_initial_weights_match_timm() -> None:
    ours = build(num_classes=10, in_channels=3, image_size=(64, 64), **RESNET18).state_dict()
    theirs = timm.create_model("resnet18", num_classes=10).state_dict()
    for name, weight in theirs.items():
        if weight.dim() == 4:
            assert ours[name].std().item() == pytest.approx(weight.std().item(), rel=0.05), name
        elif name.startswith(("bn", "layer")):
            torch.testing.assert_close(ours[name], weight, msg=name)


@pytest.mark.parametrize(("block", "reference"), [("basic", "resnetblur18"), ("bottleneck", "resnetblur50")])
def test_anti_aliased_it_equals_timms_network(block: str, reference: str) -> None:
    theirs = timm.create_model(reference).eval()
    blocks = (2, 2, 2, 2) if block == "basic" else (3, 4, 6, 3)
    fields = {"block": block, "blocks": blocks, "anti_alias": True, **RESNET18}
    ours = build(num_classes=1000, in_channels=3, image_size=(64, 64), **fields).eval()
    ours.load_state_dict(theirs.state_dict())  # the blur has no weights
    drawn = images(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(drawn), theirs(drawn), rtol=1e-4, atol=1e-4)


# --- resnet: each field


@pytest.mark.parametrize(
    ("widths", "width", "expected"),
    [
        ((64, 128, 256, 512), 1.0, [64, 128, 256, 512]),
        ((64, 128), 0.5, [32, 64]),
        ((64, 128), 1.3, [80, 168]),  # 83.2 and 166.4
        ((16, 32), 0.125, [8, 8]),
        ((20, 36), 1.0, [20, 36]),
    ],
)
def test_width_scales_to_multiples_of_8(widths: tuple[int, ...], width: float, expected: list[int]) -> None:
    config = ModelConfig(widths=widths, blocks=(1,) * len(widths), width=width)
    assert stage_widths(config) == expected
    assert [scale_width(each, width) for each in widths] == expected


@pytest.mark.parametrize(
    ("blocks", "depth", "expected"),
    [((2, 2), 1.0, [2, 2]), ((2, 3), 0.5, [1, 2]), ((1, 2), 0.25, [1, 1]), ((3, 4), 2.0, [6, 8])],
)
def test_depth_scales_blocks(blocks: tuple[int, ...], depth: float, expected: list[int]) -> None:
    assert stage_blocks(ModelConfig(widths=(16, 32), blocks=blocks, depth=depth)) == expected


def test_the_network_has_the_scaled_widths_and_blocks() -> None:
    model = build(widths=(16, 32), blocks=(1, 2), width=1.5, depth=2.0)
    assert [len(stage) for stage in (model.layer1, model.layer2)] == [2, 4]
    assert [stage[-1].bn2.num_features for stage in (model.layer1, model.layer2)] == [24, 48]


@pytest.mark.parametrize(
    ("fields", "side"),
    [({}, 16), ({"stem_stride": 2}, 8), ({"max_pool": True}, 8), (RESNET18, 4), ({"stem_kernel": 7}, 16)],
)
def test_each_stage_after_the_first_halves_the_image(fields: dict[str, Any], side: int) -> None:
    model = build(image_size=(16, 16), **SMALL, **fields)
    stem = model[: list(dict(model.named_children())).index("layer1")]
    first = model.layer1(stem(images(2, 1, 16, 16)))
    assert first.shape[-2:] == (side, side)
    assert model.layer2(first).shape[-2:] == (side // 2, side // 2)
    assert model.conv1.kernel_size == (fields.get("stem_kernel", 3),) * 2


def test_anti_aliasing_replaces_strides_and_keeps_shapes() -> None:
    fields = {"widths": (16, 32, 48), "blocks": (2, 2, 2), "max_pool": True, "image_size": (17, 24)}
    sharp, blurred = build(**fields).eval(), build(anti_alias=True, **fields).eval()
    assert sharp.state_dict().keys() == blurred.state_dict().keys()
    for layer in ("maxpool", "layer1", "layer2", "layer3"):
        place = list(dict(sharp.named_children())).index(layer) + 1
        assert sharp[:place](images(1, 1, 17, 24)).shape == blurred[:place](images(1, 1, 17, 24)).shape
    assert sum(isinstance(module, BlurPool2d) for module in blurred.modules()) == 3  # one per step of stride 2
    convolutions = [
        module for module in blurred.modules() if isinstance(module, nn.Conv2d) and module.kernel_size[0] == 3
    ]
    assert {module.stride for module in convolutions} == {(1, 1)}
    assert BlurPool2d not in _kinds(sharp)


def test_an_anti_aliased_max_pool_changes_less_when_the_image_is_shifted() -> None:
    """Zhang 2019: the blur retains information of odd pixels."""
    image = torch.rand(1, 16, 33, 33, generator=torch.Generator().manual_seed(1))

    def change(model: nn.Module) -> float:
        return (model.maxpool(image[..., :-1, :-1]) - model.maxpool(image[..., 1:, 1:])).abs().mean().item()

    fields = {"max_pool": True, "image_size": (32, 32), **SMALL}
    assert change(build(anti_alias=True, **fields)) < 0.75 * change(build(**fields))


def test_squeeze_and_excitation_is_in_every_block_or_none() -> None:
    with_se, without = build(se=True, widths=(16, 32), blocks=(2, 2)), build(widths=(16, 32), blocks=(2, 2))
    assert sum(isinstance(module, SEModule) for module in with_se.modules()) == 4
    assert SEModule not in _kinds(without)


@pytest.mark.parametrize(("activation", "kind"), [("relu", nn.ReLU), ("silu", nn.SiLU), ("mish", nn.Mish)])
def test_the_activation_is_used_everywhere(activation: str, kind: type[nn.Module]) -> None:
    used = _kinds(build(activation=activation, se=True, **SMALL)) & {nn.ReLU, nn.SiLU, nn.Mish}
    assert used == {kind}


@pytest.mark.parametrize(("channels", "groups"), [(64, 4), (16, 1), (8, 1), (24, 2), (20, 2), (17, 17)])
def test_group_norm_has_at_most_16_channels_per_group(channels: int, groups: int) -> None:
    model = build(norm="group", widths=(channels,), blocks=(1,))
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {groups}
    assert nn.BatchNorm2d not in _kinds(model)


def test_with_group_norm_an_image_does_not_depend_on_the_rest_of_its_batch() -> None:
    drawn = images(4, 1, 8, 8)
    model = build(norm="group", **SMALL).train()
    torch.testing.assert_close(model(drawn)[:1], model(drawn[:1]))


def test_group_norm_computes_in_the_dtype_of_its_input() -> None:
    norm, theirs = FixedGroupNorm(32), nn.GroupNorm(2, 32)
    drawn, weight = images(8, 32, 5, 7), torch.linspace(-2, 2, 32)
    theirs.load_state_dict({"weight": weight, "bias": weight.flip(0)})
    norm.load_state_dict(theirs.state_dict())
    expected = theirs(drawn)
    assert torch.equal(norm(drawn), expected)
    expected.square().sum().backward()
    norm(drawn).square().sum().backward()
    for ours, reference in zip(norm.parameters(), theirs.parameters(), strict=True):
        assert ours.grad is not None
        assert reference.grad is not None
        assert torch.equal(ours.grad, reference.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = norm(drawn.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "fields", [{**OPTIONS, "norm": "batch"}, {**OPTIONS, "norm": "group"}, VGG, {**VGG, "norm": "group"}]
)
def test_no_feature_map_is_float32_under_autocast_on_cuda(fields: dict[str, Any]) -> None:
    """On tensors without memory. Autocast lists other operations as float32 on a CPU."""
    model = build(in_channels=3, image_size=(32, 32), **fields)
    dtypes: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _module, _input, output, name=name: dtypes.update({name: output.dtype}))
    with FakeTensorMode(), cuda_autocast():
        to_fake(model, CUDA)
        model(torch.empty(6, 3, 32, 32, dtype=torch.bfloat16, device=CUDA))
    assert len(dtypes) > 10
    assert set(dtypes.values()) == {torch.bfloat16}, dtypes


@pytest.mark.gpu
def test_group_norm_on_cuda_is_channels_last_and_equals_the_cpus() -> None:
    norm, drawn = FixedGroupNorm(32), images(8, 32, 5, 7)
    expected = norm(drawn)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = norm.cuda()(drawn.cuda().bfloat16())
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.float().cpu(), expected, rtol=0.02, atol=0.02)


def test_drop_path_grows_linearly() -> None:
    model = build(drop_path=0.3, widths=(16, 32), blocks=(2, 2))
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.1, 0.2, 0.3])  # the first block is never dropped
    assert drop_path_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == [0.3]


def test_uniform_drop_path_is_the_same_for_every_block() -> None:
    model = build(drop_path=0.3, drop_path_shape="uniform", widths=(16, 32), blocks=(2, 2))
    assert [module.drop_prob for module in model.modules() if isinstance(module, DropPath)] == [0.3] * 4
    assert drop_path_rates(0.3, 4, "uniform") == [0.3] * 4


@pytest.mark.parametrize(("block", "after"), [("basic", "bn1"), ("bottleneck", "bn2")])
def test_block_dropout_is_between_the_last_two_convolutions_of_every_block(block: str, after: str) -> None:
    model = build(block=block, block_dropout=0.5, **SMALL).train()
    seen: list[torch.Tensor] = []
    for stage in (model.layer1, model.layer2):
        for module in (stage[0].get_submodule(after), stage[0].drop_block):
            module.register_forward_hook(lambda _, inputs, out: seen.append(out.detach().clone()))
    model(images(8, 1, 8, 8))
    assert len(seen) == 4
    for before, dropped in (seen[:2], seen[2:]):
        assert 0.4 < (dropped == 0).double().mean() < 0.6
        torch.testing.assert_close(dropped, torch.where(dropped == 0, 0.0, 2 * before))
    assert build(block=block, **SMALL).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("field", ["drop_path", "block_dropout", "dropout"])
def test_dropout_is_only_active_in_training(field: str) -> None:
    model, drawn = build(**{field: 0.5}, **SMALL), images(8, 1, 8, 8)
    for block in (model.layer1, model.layer2):
        nn.init.ones_(block[0].bn2.weight)  # zero-initialized, which would hide a dropped path
    assert not torch.equal(model.train()(drawn), model(drawn))
    assert torch.equal(model.eval()(drawn), model(drawn))


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_each_block_starts_as_its_shortcut(block: str, norm: str) -> None:
    last = "bn2" if block == "basic" else "bn3"
    model = build(block=block, norm=norm, **SMALL)
    assert all(not getattr(stage[0], last).weight.any() for stage in (model.layer1, model.layer2))


@pytest.mark.parametrize("in_channels", [1, 3, 5])
@pytest.mark.parametrize("fields", [SMALL, VGG, VGG | {"hidden": 16}])
@pytest.mark.parametrize("image_size", [(8, 8), (9, 13)])
def test_any_channels_and_image_shape_give_one_logit_per_class(
    in_channels: int, fields: dict[str, Any], image_size: tuple[int, int]
) -> None:
    model = build(num_classes=7, in_channels=in_channels, image_size=image_size, **fields)
    assert model.training
    assert model(images(2, in_channels, *image_size)).shape == (2, 7)


@pytest.mark.parametrize(
    "fields", [{}, {"se": True, "activation": "silu"}, {"block": "bottleneck"}, {"anti_alias": True}]
)
def test_every_parameter_gets_a_gradient_after_the_first_step(fields: dict[str, Any]) -> None:
    model = build(**SMALL, **fields)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # in the first step, zero norms block gradients
        optimizer.zero_grad()
        model(images(8, 1, 8, 8)).logsumexp(1).mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize(
    "fields",
    [{}, {"se": True}, {"norm": "group"}, {"max_pool": True}, {"anti_alias": True}, VGG | {"hidden": 16}],
)
def test_every_convolution_works_in_channels_last_also_on_greyscale(in_channels: int, fields: dict[str, Any]) -> None:
    model = build(in_channels=in_channels, image_size=(16, 16), **SMALL | fields)
    pixels = torch.randint(0, 256, (4, in_channels, 16, 16), dtype=torch.uint8)
    seen = []

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # (N, C, 1, 1), inside squeeze-and-excitation, has both formats.
        seen.append(output.shape[-1] == 1 or output.stride(1) == 1)

    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for module in convolutions:
        module.register_forward_hook(look)
    model(normalize(pixels, (0.5,) * in_channels, (0.25,) * in_channels))
    assert seen == [True] * len(convolutions)


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "fields", [SMALL, OPTIONS, {**OPTIONS, "block": "bottleneck", "norm": "group"}, VGG, {**VGG, "hidden": 16}]
)
def test_gradients_are_in_the_memory_order_of_their_weights(
    in_channels: int, autocast: bool, fields: dict[str, Any]
) -> None:
    model = build(in_channels=in_channels, image_size=(16, 16), **fields)
    optimizer = build_optimizer(TrainConfig(), model, total_steps=1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(images(4, in_channels, 16, 16))
    logits.float().square().sum().backward()
    optimizer.step(1.0)  # raises otherwise
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("fields", [SMALL, VGG])
def test_weights_depend_on_the_global_generator_alone(fields: dict[str, Any]) -> None:
    first, second = build(**fields).state_dict(), build(**fields).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_model(ModelConfig(**fields), num_classes=10, in_channels=1, image_size=(8, 8)).state_dict()
    weight = next(iter(first))
    assert not torch.equal(first[weight], other[weight])


# --- resnet: images that are too small


@pytest.mark.parametrize(
    ("fields", "side", "step"),
    [
        ({"stem_stride": 2, "max_pool": True}, 8, "stage 3 of model.widths"),
        ({"stem_stride": 2}, 8, "stage 4 of model.widths"),
        ({}, 4, "stage 4 of model.widths"),
    ],
)
def test_a_network_that_would_halve_one_pixel_is_refused(fields: dict[str, Any], side: int, step: str) -> None:
    with pytest.raises(ConfigError, match=rf"{side}×{side + 2} is down to a side of 1 pixel before {step}") as caught:
        build(image_size=(side, side + 2), **fields)
    for field in fields:
        assert f"model.{field}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_network_that_ends_at_one_pixel_is_built() -> None:
    assert build(image_size=(8, 8))(images(2, 1, 8, 8)).shape == (2, 10)


# --- every family: the classifier


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"name": "resnet", **SMALL}, {"fc.weight", "fc.bias"}),
        ({"name": "vgg", **SMALL}, {"fc.weight", "fc.bias"}),
        ({"name": "vgg", "hidden": 16, **SMALL}, {"fc.weight", "fc.bias"}),
        ({"name": "timm/test_resnet"}, {"fc.weight", "fc.bias"}),
        ({"name": "timm/test_convnext"}, {"head.fc.weight", "head.fc.bias"}),
        ({"name": "timm/mobilenetv3_small_050"}, {"classifier.weight", "classifier.bias"}),
    ],
)
def test_head_parameters_are_the_last_linear_layers(fields: dict[str, Any], names: set[str]) -> None:
    model = build(image_size=(32, 32), **fields)
    head = {id(parameter) for parameter in head_parameters(model)}
    assert {name for name, parameter in model.named_parameters() if id(parameter) in head} == names


def test_a_distilled_model_has_two_heads() -> None:
    model = build(name="timm/deit_tiny_distilled_patch16_224", in_channels=3, image_size=(32, 32))
    assert len(head_parameters(model)) == 4


@pytest.mark.parametrize("kind", ["no classifier", "Identity"])
def test_a_model_without_a_classifier_is_refused(kind: str) -> None:
    model = nn.Flatten() if kind == "no classifier" else timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(
        ConfigError, match=r"^optim\.backbone_lr_scale, optim\.head_only_fraction and .* remove them"
    ) as caught:
        head_parameters(model)
    assert "\n" not in str(caught.value)


# --- start-up


def test_importing_models_and_listing_data_sets_loads_no_heavy_library() -> None:
    code = (
        "import sys, core.models, core.data; core.data.catalogue(); "
        "sys.exit(bool({'timm', 'torchvision', 'sklearn'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("anti_alias", [False, True])
def test_narrow_networks_train_on_the_cpu(anti_alias: bool) -> None:
    """oneDNN may crash below 16 channels, see `FEWEST_STRIDED_CHANNELS`."""
    narrow = ModelConfig(widths=(8, 16), blocks=(1, 1), anti_alias=anti_alias)
    network = build_model(narrow, num_classes=10, in_channels=3, image_size=(96, 96))
    images = torch.randn(4, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    network(images).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


def test_a_subsampled_convolution_equals_the_strided_one() -> None:
    torch.manual_seed(0)
    ours = SubsampledConv(8, 16, 1, 2, bias=False)
    theirs = torch.nn.Conv2d(8, 16, 1, 2, bias=False)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(3, 8, 9, 7)
    torch.testing.assert_close(ours(images), theirs(images))
