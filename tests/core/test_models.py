"""The networks: what the fields of `ModelConfig` shape, against torchvision's and timm's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from huggingface_hub import constants as hub
from safetensors.torch import save_file
from timm.layers import DropPath, SEModule
from torch import nn

from core.config import ModelConfig
from core.errors import ConfigError, UserError
from core.models import build_model, check_model_name
from core.models.resnet import SubsampledConv, drop_path_rates, stage_blocks, stage_widths
from core.runtime import normalize

SMALL: dict[str, Any] = {"widths": (16, 32), "blocks": (1, 1)}
RESNET18: dict[str, Any] = {"stem_kernel": 7, "stem_stride": 2, "max_pool": True}


def _build(
    *, num_classes: int = 10, in_channels: int = 1, image_size: tuple[int, int] = (8, 8), **fields: Any
) -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(**fields), num_classes=num_classes, in_channels=in_channels, image_size=image_size)


def _images(*shape: int) -> torch.Tensor:
    images = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return images.contiguous(memory_format=torch.channels_last)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


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
def test_with_their_stem_it_is_the_published_network_weight_for_weight(block: str, reference: Any) -> None:
    theirs = reference().eval()
    blocks = (2, 2, 2, 2) if block == "basic" else (3, 4, 6, 3)
    ours = _build(num_classes=1000, in_channels=3, image_size=(64, 64), block=block, blocks=blocks, **RESNET18).eval()
    assert _parameters(ours) == _parameters(theirs)
    ours.load_state_dict(theirs.state_dict())
    images = _images(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


def test_initial_weights_are_drawn_as_timm_draws_them() -> None:
    ours = _build(num_classes=10, in_channels=3, image_size=(64, 64), **RESNET18).state_dict()
    theirs = timm.create_model("resnet18", num_classes=10).state_dict()
    for name, weight in theirs.items():
        if weight.dim() == 4:
            assert ours[name].std().item() == pytest.approx(weight.std().item(), rel=0.05), name
        elif name.startswith(("bn", "layer")):
            torch.testing.assert_close(ours[name], weight, msg=name)


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
def test_width_scales_to_the_nearest_multiple_of_8_and_leaves_widths_alone_at_1(
    widths: tuple[int, ...], width: float, expected: list[int]
) -> None:
    config = ModelConfig(widths=widths, blocks=(1,) * len(widths), width=width)
    assert stage_widths(config) == expected


@pytest.mark.parametrize(
    ("blocks", "depth", "expected"),
    [((2, 2), 1.0, [2, 2]), ((2, 3), 0.5, [1, 2]), ((1, 2), 0.25, [1, 1]), ((3, 4), 2.0, [6, 8])],
)
def test_depth_scales_blocks_with_a_half_rounded_up_and_at_least_one(
    blocks: tuple[int, ...], depth: float, expected: list[int]
) -> None:
    assert stage_blocks(ModelConfig(widths=(16, 32), blocks=blocks, depth=depth)) == expected


def test_the_scaled_widths_and_blocks_are_those_of_the_network() -> None:
    model = _build(widths=(16, 32), blocks=(1, 2), width=1.5, depth=2.0)
    assert [len(stage) for stage in (model.layer1, model.layer2)] == [2, 4]
    assert [stage[-1].bn2.num_features for stage in (model.layer1, model.layer2)] == [24, 48]


@pytest.mark.parametrize(
    ("fields", "side"),
    [({}, 16), ({"stem_stride": 2}, 8), ({"max_pool": True}, 8), (RESNET18, 4), ({"stem_kernel": 7}, 16)],
)
def test_the_first_stage_sees_the_image_as_the_stem_leaves_it_and_each_later_one_half(
    fields: dict[str, Any], side: int
) -> None:
    model = _build(image_size=(16, 16), **SMALL, **fields)
    stem = model[: list(dict(model.named_children())).index("layer1")]
    first = model.layer1(stem(_images(2, 1, 16, 16)))
    assert first.shape[-2:] == (side, side)
    assert model.layer2(first).shape[-2:] == (side // 2, side // 2)
    assert model.conv1.kernel_size == (fields.get("stem_kernel", 3),) * 2


def test_every_block_has_squeeze_and_excitation_or_none_has() -> None:
    with_se, without = _build(se=True, widths=(16, 32), blocks=(2, 2)), _build(widths=(16, 32), blocks=(2, 2))
    assert sum(isinstance(module, SEModule) for module in with_se.modules()) == 4
    assert SEModule not in _kinds(without)


@pytest.mark.parametrize(("activation", "kind"), [("relu", nn.ReLU), ("silu", nn.SiLU), ("mish", nn.Mish)])
def test_the_activation_is_the_same_everywhere_in_squeeze_and_excitation_too(
    activation: str, kind: type[nn.Module]
) -> None:
    used = _kinds(_build(activation=activation, se=True, **SMALL)) & {nn.ReLU, nn.SiLU, nn.Mish}
    assert used == {kind}


@pytest.mark.parametrize(("channels", "groups"), [(64, 4), (16, 1), (8, 1), (24, 2), (20, 2), (17, 17)])
def test_group_norm_has_groups_of_16_channels_or_the_most_below_that_divide(channels: int, groups: int) -> None:
    model = _build(norm="group", widths=(channels,), blocks=(1,))
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {groups}
    assert nn.BatchNorm2d not in _kinds(model)


def test_with_group_norm_an_image_does_not_depend_on_the_rest_of_its_batch() -> None:
    images = _images(4, 1, 8, 8)
    model = _build(norm="group", **SMALL).train()
    torch.testing.assert_close(model(images)[:1], model(images[:1]))


def test_drop_path_grows_linearly_over_all_blocks_to_its_value_at_the_last() -> None:
    model = _build(drop_path=0.3, widths=(16, 32), blocks=(2, 2))
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.1, 0.2, 0.3])  # the first block is never dropped
    assert drop_path_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == [0.3]


@pytest.mark.parametrize("field", ["drop_path", "dropout"])
def test_dropping_is_at_work_in_training_only(field: str) -> None:
    model, images = _build(**{field: 0.5}, **SMALL), _images(8, 1, 8, 8)
    for block in (model.layer1, model.layer2):
        nn.init.ones_(block[0].bn2.weight)  # which begins at zero, and would hide a dropped path
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_each_block_begins_as_its_shortcut(block: str, norm: str) -> None:
    last = "bn2" if block == "basic" else "bn3"
    model = _build(block=block, norm=norm, **SMALL)
    assert all(not getattr(stage[0], last).weight.any() for stage in (model.layer1, model.layer2))


@pytest.mark.parametrize("in_channels", [1, 3, 5])
@pytest.mark.parametrize("image_size", [(8, 8), (9, 13)])
def test_any_number_of_channels_and_any_shape_of_image_gives_one_logit_a_class(
    in_channels: int, image_size: tuple[int, int]
) -> None:
    model = _build(num_classes=7, in_channels=in_channels, image_size=image_size, **SMALL)
    assert model.training
    assert model(_images(2, in_channels, *image_size)).shape == (2, 7)


@pytest.mark.parametrize("fields", [{}, {"se": True, "activation": "silu"}, {"block": "bottleneck"}])
def test_every_parameter_gets_a_gradient_after_the_first_step(fields: dict[str, Any]) -> None:
    model = _build(**SMALL, **fields)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # at the first, the zeroed norms pass nothing on
        optimizer.zero_grad()
        model(_images(8, 1, 8, 8)).logsumexp(1).mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("fields", [{}, {"se": True}, {"norm": "group"}, {"max_pool": True}])
def test_every_convolution_works_in_channels_last_also_on_greyscale(in_channels: int, fields: dict[str, Any]) -> None:
    model = _build(in_channels=in_channels, image_size=(16, 16), **SMALL, **fields)
    pixels = torch.randint(0, 256, (4, in_channels, 16, 16), dtype=torch.uint8)
    seen = []

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # (N, C, 1, 1), inside squeeze-and-excitation, is both.
        seen.append(output.shape[-1] == 1 or output.stride(1) == 1)

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)
    model(normalize(pixels, (0.5,) * in_channels, (0.25,) * in_channels))
    assert len(seen) >= 5
    assert all(seen)


def test_the_global_generator_alone_decides_the_weights() -> None:
    first, second = _build(**SMALL).state_dict(), _build(**SMALL).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_model(ModelConfig(**SMALL), num_classes=10, in_channels=1, image_size=(8, 8)).state_dict()
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


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
        _build(image_size=(side, side + 2), **fields)
    for field in fields:
        assert f"model.{field}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_network_that_ends_at_one_pixel_is_built() -> None:
    assert _build(image_size=(8, 8))(_images(2, 1, 8, 8)).shape == (2, 10)


# --- timm's models


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_timm_model_is_timms_with_our_channels_and_classes(name: str, in_channels: int) -> None:
    ours = _build(name=f"timm/{name}", num_classes=7, in_channels=in_channels, image_size=(160, 160))
    theirs = timm.create_model(name, num_classes=7, in_chans=in_channels)
    assert type(ours) is type(theirs)
    assert ours.training
    assert _parameters(ours) == _parameters(theirs)
    assert ours(_images(2, in_channels, 160, 160)).shape == (2, 7)


@pytest.mark.parametrize("image_size", [(96, 96), (64, 96)])
def test_a_model_of_a_fixed_size_is_built_for_the_size_at_hand(image_size: tuple[int, int]) -> None:
    model = _build(name="timm/test_vit", in_channels=3, image_size=image_size)
    assert model.patch_embed.img_size == image_size
    assert model(_images(2, 3, *image_size)).shape == (2, 10)


def test_building_draws_the_weights_only_and_leaves_batch_statistics_alone() -> None:
    model = _build(name="timm/test_resnet", image_size=(32, 32), in_channels=3)
    after = torch.rand(1)
    torch.manual_seed(0)
    timm.create_model("test_resnet", num_classes=10)
    assert torch.equal(torch.rand(1), after)
    assert all(not module.num_batches_tracked for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_dropout_and_drop_path_reach_a_timm_model() -> None:
    model = _build(name="timm/test_vit", image_size=(160, 160), in_channels=3, dropout=0.25, drop_path=0.5)
    assert max(module.drop_prob for module in model.modules() if isinstance(module, DropPath)) == pytest.approx(0.5)
    assert model.head_drop.p == 0.25


def test_a_timm_model_without_drop_path_is_refused_where_it_is_set() -> None:
    with pytest.raises(ConfigError, match=r"^model\.drop_path: timm/ghostnet_050 has none; set it to 0"):
        _build(name="timm/ghostnet_050", image_size=(32, 32), in_channels=3, drop_path=0.1)


@pytest.mark.parametrize(
    ("name", "side", "reason"),
    [("test_convnext", 8, "Kernel size"), ("test_vit", 8, "divisible"), ("test_vit", 100, "divisible")],
)
def test_a_timm_model_that_cannot_take_such_images_is_refused_with_its_own_size(
    name: str, side: int, reason: str
) -> None:
    own = timm.get_pretrained_cfg(name).input_size[-1]
    with pytest.raises(
        ConfigError, match=rf"^data\.image_size: timm/{name} cannot .*{side}×{side} \(.*{reason}.*\); .* {own}: set"
    ) as caught:
        _build(name=f"timm/{name}", image_size=(side, side), in_channels=3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"), [("resnet_18", "resnet18"), ("vit_tiny_patch16_224_in21k", "vit_tiny_patch16_224")]
)
def test_an_unknown_or_deprecated_timm_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.name: timm .* has no model '{name}'; did you mean .*{nearest}"):
        _build(name=f"timm/{name}")


def test_an_unknown_tag_is_answered_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"^model\.name: timm's resnet18 has no weights 'nope'; it has .*a1_in1k"):
        _build(name="timm/resnet18.nope")


@pytest.mark.parametrize("name", ["resnet", "timm/convnext_atto", "timm/resnet18.a1_in1k"])
def test_a_known_name_passes_the_check_without_building_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", None)
    check_model_name(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/resnet_18", r"^model\.name: timm .* has no model 'resnet_18'; did you mean .*resnet18"),
        ("timm/resnet18.nope", r"^model\.name: timm's resnet18 has no weights 'nope'; it has .*a1_in1k"),
    ],
)
def test_an_unknown_name_fails_the_check_as_it_fails_the_build(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_model_name(name)


# --- pretrained weights


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("in_channels", [1, 3])
def test_weights_in_the_cache_are_used_without_asking_the_network(hub_cache: Path, in_channels: int) -> None:
    source = timm.create_model("test_resnet")
    snapshot = hub_cache / "models--timm--test_resnet.r160_in1k" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    save_file(source.state_dict(), snapshot / "model.safetensors")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0")

    model = _build(
        name="timm/test_resnet", pretrained=True, num_classes=7, in_channels=in_channels, image_size=(32, 32)
    )
    assert torch.equal(model.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
    if in_channels == 3:
        assert torch.equal(model.conv1[0].weight, source.conv1[0].weight)
    assert model.fc.out_features == 7


def test_weights_that_are_not_at_hand_are_named_with_where_they_were_sought(hub_cache: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.pretrained: the weights of timm/resnet18, ") as caught:
        _build(name="timm/resnet18", pretrained=True, in_channels=3, image_size=(32, 32))
    for part in ("model.safetensors of timm/resnet18.a1_in1k", str(hub_cache), "set model.pretrained to false"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_timm_has_not_are_refused() -> None:
    with pytest.raises(UserError, match=r"^model\.pretrained: timm has no weights for convnext_atto_rms;"):
        _build(name="timm/convnext_atto_rms", pretrained=True, in_channels=3, image_size=(32, 32))


# --- start-up


def test_importing_the_package_loads_no_architecture() -> None:
    code = "import sys, core.models; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_narrow_networks_train_on_the_cpu_without_crashing_it() -> None:
    """oneDNN's kernel for the shortcut of fewer than 16 channels ends the process: see `FEWEST_STRIDED_CHANNELS`."""
    narrow = ModelConfig(widths=(8, 16), blocks=(1, 1))
    network = build_model(narrow, num_classes=10, in_channels=3, image_size=(96, 96))
    images = torch.randn(4, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    network(images).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


def test_a_subsampled_convolution_is_the_strided_one() -> None:
    torch.manual_seed(0)
    ours = SubsampledConv(8, 16, 1, 2, bias=False)
    theirs = torch.nn.Conv2d(8, 16, 1, 2, bias=False)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(3, 8, 9, 7)
    torch.testing.assert_close(ours(images), theirs(images))
