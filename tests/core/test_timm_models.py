"""timm's models: options, errors, and pretrained weights."""

from __future__ import annotations

import argparse
import copy
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from huggingface_hub import constants as hub
from safetensors.torch import save_file
from timm.layers import DropPath
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from core.config import ModelConfig, TrainConfig
from core.errors import ConfigError, UserError
from core.models import build_model, check_model_name, timm_models
from core.models.timm_models import _check_first_layer, find_model
from core.optim import build_optimizer
from tests.core.fake_cuda import to_fake
from tests.core.networks import build as _build
from tests.core.networks import images as _images
from tests.core.networks import parameters as _parameters

# Of timm's modules, one of each that small networks are taken from.
FAMILIES = (
    "resnet", "vgg", "timm/resnet18", "timm/tf_efficientnet_lite0", "timm/mobilenetv3_small_050", "timm/mnasnet_small",
    "timm/convnext_atto", "timm/vit_tiny_patch16_224", "timm/deit_tiny_distilled_patch16_224", "timm/levit_128s",
    "timm/regnety_002", "timm/ghostnet_050", "timm/efficientvit_b0",
)  # fmt: skip
SPACES = Path(__file__).parents[2] / "search_spaces"

# --- timm's models


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_loss_is_that_of_uniform_predictions(name: str) -> None:
    assert _first_loss(_build(name=name, in_channels=3, image_size=(64, 64))) == pytest.approx(math.log(10), rel=0.1)


@pytest.mark.parametrize("name", [name.removeprefix("timm/") for name in FAMILIES if "/" in name])
def test_the_first_loss_of_a_pretrained_network_is_that_of_uniform_predictions(name: str, tmp_path: Path) -> None:
    sized = {"img_size": 64} if find_model(name).fixed_input_size else {}
    source = _source(name, num_classes=1000, **sized)
    pretrained = _load(name, _save(source, tmp_path / "weights.pth"), num_classes=10)
    assert _first_loss(pretrained) == pytest.approx(math.log(10), rel=0.1)


def _first_loss(model: nn.Module) -> float:
    """Mean cross-entropy of ten classes on random images."""
    labels = torch.arange(40) % 10
    with torch.no_grad():
        return nn.functional.cross_entropy(model.eval()(_images(40, 3, 64, 64)), labels).item()


def test_every_family_of_the_search_spaces_is_among_these() -> None:
    def modules(text: str) -> set[str]:
        return {timm.models.model_entrypoint(name).__module__ for name in re.findall(r"\btimm/([a-z]\w+)", text)}

    named = "\n".join(file.read_text() for file in SPACES.rglob("*.yaml"))
    assert modules(named) <= modules("\n".join(FAMILIES))
    assert modules(named)


def test_a_classifier_of_our_classes_is_kept(tmp_path: Path) -> None:
    source = _source("mobilenetv3_small_050", num_classes=7)
    ours = _load("mobilenetv3_small_050", _save(source, tmp_path / "weights.pth"), num_classes=7)
    assert torch.equal(ours.classifier.weight, source.classifier.weight)
    assert ours.classifier.weight.any()


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_timm_model_has_our_channels_and_classes(name: str, in_channels: int) -> None:
    ours = _build(name=f"timm/{name}", num_classes=7, in_channels=in_channels, image_size=(160, 160))
    theirs = timm.create_model(name, num_classes=7, in_chans=in_channels)
    assert type(ours) is type(theirs)
    assert ours.training
    assert _parameters(ours) == _parameters(theirs)
    assert ours(_images(2, in_channels, 160, 160)).shape == (2, 7)


@pytest.mark.parametrize("image_size", [(96, 96), (64, 96)])
def test_a_model_of_fixed_size_is_built_for_the_image_size(image_size: tuple[int, int]) -> None:
    model = _build(name="timm/test_vit", in_channels=3, image_size=image_size)
    assert model.patch_embed.img_size == image_size
    assert model(_images(2, 3, *image_size)).shape == (2, 10)


def test_building_draws_weights_only() -> None:
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


def test_drop_path_is_refused_for_models_without_it() -> None:
    with pytest.raises(ConfigError, match=r"^model\.drop_path: timm/ghostnet_050 has none; set it to 0"):
        _build(name="timm/ghostnet_050", image_size=(32, 32), in_channels=3, drop_path=0.1)


@pytest.mark.parametrize(
    ("name", "side", "reason"),
    [("test_convnext", 8, "Kernel size"), ("test_vit", 8, "divisible"), ("test_vit", 100, "divisible")],
)
def test_an_unsupported_image_size_is_refused(name: str, side: int, reason: str) -> None:
    own = timm.get_pretrained_cfg(name).input_size[-1]
    with pytest.raises(
        ConfigError, match=rf"^data\.image_size: timm/{name} cannot .*{side}×{side} \(.*{reason}.*\); .* {own}: set"
    ) as caught:
        _build(name=f"timm/{name}", image_size=(side, side), in_channels=3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"), [("resnet_18", "resnet18"), ("vit_tiny_patch16_224_in21k", "vit_tiny_patch16_224")]
)
@pytest.mark.parametrize("check", [check_model_name, lambda name: _build(name=name)], ids=["check", "build"])
def test_an_unknown_or_deprecated_name_suggests_similar_ones(
    name: str, nearest: str, check: Callable[[str], object]
) -> None:
    with pytest.raises(UserError, match=rf"^model\.name: timm .* has no model '{name}'; did you mean .*{nearest}"):
        check(f"timm/{name}")


@pytest.mark.parametrize("check", [check_model_name, lambda name: _build(name=name)], ids=["check", "build"])
def test_an_unknown_tag_lists_the_known_ones(check: Callable[[str], object]) -> None:
    with pytest.raises(UserError, match=r"^model\.name: timm's resnet18 has no weights 'nope'; it has .*a1_in1k"):
        check("timm/resnet18.nope")


@pytest.mark.parametrize("name", ["resnet", "vgg", "timm/convnext_atto", "timm/resnet18.a1_in1k"])
def test_a_known_name_passes_the_check_without_building_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", None)
    check_model_name(name)


# --- published weights


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache without network."""
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    return tmp_path


def _publish(hub_cache: Path, repository: str) -> Path:
    """Return the folder of a repository's files in the hub's cache."""
    snapshot = hub_cache / f"models--timm--{repository}" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    return snapshot


@pytest.mark.parametrize("in_channels", [1, 3])
def test_weights_in_the_cache_are_used_without_network(hub_cache: Path, in_channels: int) -> None:
    source = timm.create_model("test_resnet")
    save_file(source.state_dict(), _publish(hub_cache, "test_resnet.r160_in1k") / "model.safetensors")

    model = _build(
        name="timm/test_resnet", pretrained=True, num_classes=7, in_channels=in_channels, image_size=(32, 32)
    )
    assert torch.equal(model.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
    if in_channels == 3:
        assert torch.equal(model.conv1[0].weight, source.conv1[0].weight)
    assert model.fc.out_features == 7


def test_missing_weights_are_reported_with_their_location(hub_cache: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.pretrained: the weights of timm/resnet18, ") as caught:
        _build(name="timm/resnet18", pretrained=True, in_channels=3, image_size=(32, 32))
    for part in (
        "model.safetensors of timm/resnet18.a1_in1k",
        str(hub_cache),
        "in model.pretrained_file",
        "set model.pretrained to false",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_models_without_published_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"^model\.pretrained: timm has no weights for convnext_atto_rms;"):
        _build(name="timm/convnext_atto_rms", pretrained=True, in_channels=3, image_size=(32, 32))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_cached_file_is_reported_with_the_folder_to_delete(hub_cache: Path, file: str) -> None:
    snapshot = _publish(hub_cache, "test_resnet.r160_in1k")
    (snapshot / file).write_bytes(b"torn")
    with pytest.raises(UserError, match=r"^model\.pretrained: .* is no .*; delete .*, and the next run") as caught:
        _build(name="timm/test_resnet", pretrained=True, in_channels=3, image_size=(32, 32))
    assert str(snapshot / file) in str(caught.value)
    assert f"delete {snapshot.parents[1]}," in str(caught.value)


def test_published_weights_that_do_not_fit_are_refused(hub_cache: Path) -> None:
    weights = timm.create_model("test_resnet").state_dict() | {"layer1.0.conv1.weight": torch.ones(8, 8, 3, 3)}
    save_file(weights, _publish(hub_cache, "test_resnet.r160_in1k") / "model.safetensors")
    with pytest.raises(ConfigError, match=r"^model\.pretrained: .* timm/test_resnet for 3 channels and 10") as caught:
        _build(name="timm/test_resnet", pretrained=True, in_channels=3, image_size=(64, 64))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["resnet34", "resnet152", "wide_resnet101_2", "resnext101_32x8d"])
def test_torchvisions_networks_have_published_weights(name: str) -> None:
    cfg = find_model(f"timm/{name}.tv_in1k")
    assert cfg.hf_hub_id == f"timm/{name}.tv_in1k"
    assert f"/models/{name}-" in cfg.url  # torchvision's own file
    check_model_name(f"timm/{name}.tv_in1k")


def test_a_first_layer_that_timm_cannot_adapt_is_refused() -> None:
    model = timm.create_model("naflexvit_base_patch16_gap", in_chans=1, depth=1, embed_dim=64, num_heads=2)
    with pytest.raises(
        ConfigError, match=r"^model\.pretrained: the first layer of timm/.*, embeds\.proj, .* 3 channels"
    ):
        _check_first_layer("naflexvit_base_patch16_gap", model, in_channels=1)
    _check_first_layer("naflexvit_base_patch16_gap", model, in_channels=3)


# --- weights from a file

SMALL_MODELS = ["test_resnet", "resnet10t", "mobilenetv3_small_050"]
Save = Callable[[dict[str, torch.Tensor], Path], None]
FORMATS: dict[str, Save] = {
    "weights.safetensors": lambda state, path: save_file(state, path),
    "weights.pth": lambda state, path: torch.save(state, path),
    "checkpoint.pth.tar": lambda state, path: torch.save(
        {"epoch": 3, "arch": "any", "args": argparse.Namespace(lr=0.1), "state_dict": state}, path
    ),
    "model.pt": lambda state, path: torch.save({"model": state}, path),
    "parallel.pth": lambda state, path: torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path),
}


@functools.cache
def _source(name: str, **arguments: Any) -> nn.Module:
    """A model with random weights and statistics, which no test changes."""
    torch.manual_seed(7)
    model = timm.create_model(name, **arguments)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand_like(tensor))
    return model


def _save(model: nn.Module, path: Path) -> Path:
    FORMATS["weights.safetensors" if path.suffix == ".safetensors" else "weights.pth"](model.state_dict(), path)
    return path


def _load(name: str, path: Path | str, *, side: int = 64, **arguments: Any) -> nn.Module:
    arguments = {"in_channels": 3, "image_size": (side, side)} | arguments
    return _build(name=f"timm/{name}", pretrained=True, pretrained_file=str(path), **arguments)


def _logits(model: nn.Module, channels: int = 3, side: int = 64) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).to(memory_format=torch.channels_last).eval()(_images(2, channels, side, side))


@pytest.mark.parametrize("file", FORMATS)
def test_a_file_of_our_classes_gives_timms_logits_in_every_format(tmp_path: Path, file: str) -> None:
    source = _source("test_resnet", num_classes=7)
    FORMATS[file](source.state_dict(), tmp_path / file)
    theirs = timm.create_model("test_resnet", num_classes=7, checkpoint_path=str(tmp_path / file))
    ours = _load("test_resnet", tmp_path / file, num_classes=7)
    assert torch.equal(_logits(ours), _logits(theirs))
    assert torch.equal(_logits(ours), _logits(source))


@pytest.mark.parametrize("name", [*SMALL_MODELS, "test_vit", "test_convnext"])
def test_every_kind_of_model_loads_its_own_file(tmp_path: Path, name: str) -> None:
    source = _source(name, num_classes=7)
    side = 160 if name == "test_vit" else 64
    ours = _load(name, _save(source, tmp_path / "weights.safetensors"), num_classes=7, side=side)
    assert torch.equal(_logits(ours, side=side), _logits(source, side=side))


@pytest.mark.parametrize("prefix", ["model.", "module.model.", "net.backbone."])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_common_prefix_of_all_layers_is_removed(tmp_path: Path, name: str, prefix: str) -> None:
    source = _source(name, num_classes=7)
    state = {prefix + layer: tensor for layer, tensor in source.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "last.ckpt")
    side = 160 if name == "test_vit" else 64
    ours = _load(name, tmp_path / "last.ckpt", num_classes=7, side=side)
    assert torch.equal(_logits(ours, side=side), _logits(source, side=side))


def test_a_prefix_that_some_layers_lack_is_named(tmp_path: Path) -> None:
    state = {f"model.{layer}": tensor for layer, tensor in _source("test_resnet", num_classes=7).state_dict().items()}
    torch.save(state | {"loss.weight": torch.ones(7)}, tmp_path / "last.ckpt")
    message = _refusal("test_resnet", tmp_path / "last.ckpt", UserError, num_classes=7)
    assert "its layers begin with model., but loss.weight does not; save the state dict of the network alone" in message


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_a_classifier_of_other_classes_is_not_loaded(tmp_path: Path, name: str) -> None:
    source = _source(name, num_classes=13)
    ours = _load(name, _save(source, tmp_path / "weights.pth"), num_classes=7)
    theirs = source.state_dict()
    for key, tensor in ours.state_dict().items():
        is_head = key.startswith(("fc.", "classifier."))
        assert torch.equal(tensor, torch.zeros_like(tensor) if is_head else theirs[key]), key


def test_a_file_without_a_classifier_is_loaded(tmp_path: Path) -> None:
    source = _source("test_resnet", num_classes=0)
    ours = _load("test_resnet", _save(source, tmp_path / "weights.safetensors"), num_classes=7).state_dict()
    assert all(torch.equal(ours[key], tensor) for key, tensor in source.state_dict().items())
    assert not ours["fc.weight"].any()


@pytest.mark.parametrize("num_classes", [7, 13])
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_a_first_layer_is_adapted_to_greyscale_as_in_timm(tmp_path: Path, name: str, num_classes: int) -> None:
    file = _save(_source(name, num_classes=7), tmp_path / "weights.pth")
    torch.manual_seed(0)
    theirs = timm.create_model(
        name,
        pretrained=True,
        num_classes=num_classes,
        in_chans=1,
        pretrained_cfg_overlay={"file": str(file), "num_classes": 7},
    )
    ours = _load(name, file, num_classes=num_classes, in_channels=1).state_dict()
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(ours[key], tensor) or (num_classes == 13 and key.startswith(("fc.", "classifier."))), key


def test_a_greyscale_model_is_loaded_unchanged(tmp_path: Path) -> None:
    source = _source("test_resnet", num_classes=7, in_chans=1)
    ours = _load("test_resnet", _save(source, tmp_path / "weights.pth"), num_classes=7, in_channels=1)
    assert torch.equal(_logits(ours, channels=1), _logits(source, channels=1))


def test_position_embeddings_are_resized_as_in_timm(tmp_path: Path) -> None:
    file = _save(_source("test_vit", num_classes=7), tmp_path / "weights.safetensors")
    theirs = timm.create_model(
        "test_vit",
        pretrained=True,
        num_classes=7,
        img_size=(96, 96),
        pretrained_cfg_overlay={"file": str(file), "num_classes": 7},
    )
    ours = _load("test_vit", file, num_classes=7, side=96)
    assert torch.equal(_logits(ours, side=96), _logits(theirs, side=96))


def test_torchvisions_resnet_has_timms_names(tmp_path: Path) -> None:
    torch.manual_seed(7)
    source = torchvision.models.resnet18(num_classes=7)
    ours = _load("resnet18", _save(source, tmp_path / "resnet18.pth"), num_classes=7)
    torch.testing.assert_close(_logits(ours), _logits(source), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(ours.state_dict()[key], tensor) for key, tensor in source.state_dict().items())


def test_averaged_weights_in_a_checkpoint_are_preferred(tmp_path: Path) -> None:
    raw, averaged = timm.create_model("test_resnet", num_classes=7), _source("test_resnet", num_classes=7)
    states = {"state_dict": raw.state_dict(), "state_dict_ema": averaged.state_dict()}
    torch.save(states, tmp_path / "checkpoint.pth")
    assert torch.equal(_logits(_load("test_resnet", tmp_path / "checkpoint.pth", num_classes=7)), _logits(averaged))


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    source = _source("test_resnet", num_classes=7)
    _save(source, tmp_path / "weights.pth")
    assert torch.equal(_load("test_resnet", "~/weights.pth", num_classes=7).fc.weight, source.fc.weight)


def test_a_file_needs_no_hub(tmp_path: Path, hub_cache: Path) -> None:
    source = _source("test_resnet", num_classes=7)
    _load("test_resnet", _save(source, tmp_path / "weights.pth"), num_classes=7)
    assert not (hub_cache / "models--timm--test_resnet.r160_in1k").exists()


def test_a_model_without_published_weights_loads_a_file(tmp_path: Path) -> None:
    name = "resnetblur18"
    assert not find_model(f"timm/{name}").has_weights
    source = _source(name, num_classes=7)
    ours = _load(name, _save(source, tmp_path / "weights.pth"), num_classes=7)
    assert torch.equal(_logits(ours), _logits(source))


def test_the_file_is_not_needed_without_pretraining() -> None:
    """A submission model has its own weights, so the file may be missing."""
    config = ModelConfig(name="timm/test_resnet", pretrained=True, pretrained_file="gone.pth")
    plain = config.model_copy(update={"pretrained": False})
    build_model(plain, num_classes=7, in_channels=3, image_size=(32, 32))


def test_the_model_has_one_copy_of_its_weights(tmp_path: Path) -> None:
    model = _load("test_resnet", _save(_source("test_resnet", num_classes=7), tmp_path / "weights.pth"), num_classes=7)
    assert "state_dict" not in model.pretrained_cfg
    assert "state_dict" not in model.default_cfg


def test_checking_a_file_does_not_change_random_numbers(tmp_path: Path) -> None:
    file = _save(_source("test_resnet", num_classes=13), tmp_path / "weights.pth")
    _load("test_resnet", file, num_classes=7)
    after = torch.rand(1)
    _build(name="timm/test_resnet", num_classes=7, in_channels=3, image_size=(64, 64))
    assert torch.equal(torch.rand(1), after)


# --- files that are refused, each in one line


def _refusal(name: str, path: Path | str, error: type[UserError], **arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        _load(name, path, **arguments)
    text = str(caught.value)
    assert type(caught.value) is error
    assert text.startswith("model.pretrained_file: ")
    assert "\n" not in text
    return text


def test_a_missing_file_is_reported_with_its_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    missing = _refusal("test_resnet", "weights.pth", UserError)
    assert f"{tmp_path / 'weights.pth'}: no such file; give the path" in missing
    assert f"{tmp_path / 'folder'}: a folder, not a file; give" in _refusal("test_resnet", "folder", UserError)
    assert "no such home" in _refusal("test_resnet", "~nobody-of-this-name/weights.pth", UserError)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code in a file of weights was run')",)


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("torn.safetensors", lambda path: path.write_bytes(b"torn"), "is no whole .safetensors file"),
        ("empty.pth", lambda path: path.write_bytes(b""), "is no torch file of tensors and plain values"),
        ("notes.pth", lambda path: path.write_text("no weights"), "is no torch file of tensors and plain values"),
        ("code.pth", lambda path: torch.save({"fc.weight": _Code()}, path), "is no torch file of tensors"),
        ("list.pth", lambda path: torch.save([torch.ones(3)], path), "is no torch file of tensors"),
        ("nested.pth", lambda path: torch.save({"net": {"w": torch.ones(3)}}, path), "'net' in it is not a tensor"),
        ("nothing.pth", lambda path: torch.save({}, path), "holds no state dict, since it is empty"),
    ],
)
def test_a_file_without_weights_is_reported_with_the_reason(
    tmp_path: Path, name: str, write: Callable[[Path], Any], reason: str
) -> None:
    write(tmp_path / name)
    text = _refusal("test_resnet", tmp_path / name, UserError)
    assert f"{tmp_path / name} " in text
    assert reason in text
    assert text.endswith("; give a file of the state dict alone")


@pytest.mark.parametrize("num_classes", [7, 13])
def test_weights_of_another_model_are_refused_naming_a_layer(tmp_path: Path, num_classes: int) -> None:
    with torch.device("meta"):
        shapes = timm.create_model("resnet50", num_classes=7).state_dict()
    file = tmp_path / "resnet50.pth"
    torch.save({name: torch.zeros(()).expand(tensor.shape) for name, tensor in shapes.items()}, file)
    text = _refusal("resnet34", file, ConfigError, num_classes=num_classes)
    assert f"{file} holds the weights of another model than timm/resnet34: " in text
    assert "layer1.0.conv1.weight is (64, 64, 1, 1) in resnet50.pth and (64, 64, 3, 3) in timm/resnet34 (and " in text
    assert "; layer1.0.conv3.weight is not in timm/resnet34 (and " in text
    assert "set model.name to the model that it was saved from" in text


@pytest.mark.parametrize("num_classes", [7, 13])  # timm does not raise for other classes
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda state: state.pop("layer2.0.conv1.weight"), r"layer2\.0\.conv1\.weight is missing in weights\.pth;"),
        (lambda state: state.update(extra=torch.ones(1)), r"extra is not in timm/test_resnet;"),
        (
            lambda state: [state.pop(name) for name in list(state) if name.startswith("layer4.0.bn1")],
            r"layer4\.0\.bn1\.weight is missing in weights\.pth \(and [34] more\);",
        ),
    ],
)
def test_missing_and_surplus_layers_are_named(
    tmp_path: Path, num_classes: int, change: Callable[[dict[str, Any]], Any], fault: str
) -> None:
    state = dict(_source("test_resnet", num_classes=7).state_dict())
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    assert re.search(fault, _refusal("test_resnet", tmp_path / "weights.pth", ConfigError, num_classes=num_classes))


def test_models_that_timm_loads_loosely_are_checked_strictly(tmp_path: Path) -> None:
    """timm loads DLA models with `strict=False`."""
    file = _save(_source("test_resnet", num_classes=7), tmp_path / "weights.pth")
    text = _refusal("dla46x_c", file, ConfigError, num_classes=7)
    assert "is missing in weights.pth (and " in text


def test_greyscale_weights_for_colour_images_are_refused(tmp_path: Path) -> None:
    file = _save(_source("test_resnet", num_classes=7, in_chans=1), tmp_path / "weights.pth")
    text = _refusal("test_resnet", file, ConfigError, num_classes=7)
    assert "conv1.0.weight is (16, 1, 3, 3) in weights.pth and (16, 3, 3, 3) in timm/test_resnet;" in text


def test_a_file_without_batch_counters_is_accepted(tmp_path: Path) -> None:
    source = _source("test_resnet", num_classes=7)
    state = {key: tensor for key, tensor in source.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "weights.pth")
    assert torch.equal(_logits(_load("test_resnet", tmp_path / "weights.pth", num_classes=7)), _logits(source))


def test_the_name_is_checked_without_the_weights_file() -> None:
    ModelConfig(name="timm/test_resnet", pretrained=True, pretrained_file="nowhere.pth")
    check_model_name("timm/test_resnet")


# ---- gradients

NAMED = {name for file in SPACES.rglob("*.yaml") for name in re.findall(r"\btimm/([a-z][\w.]+)", file.read_text())}


@pytest.mark.parametrize("name", sorted(NAMED | {name.removeprefix("timm/") for name in FAMILIES[2:]}))
def test_gradients_are_in_the_memory_order_of_their_weights(name: str) -> None:
    """On tensors without memory, since the largest network of the search spaces has 127 million weights."""
    options = {"img_size": 64} if find_model(name).fixed_input_size else {}
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=6, **options).to(memory_format=torch.channels_last)
    with FakeTensorMode():
        to_fake(model, torch.device("cpu"))
        optimizer = build_optimizer(TrainConfig(), model, total_steps=1)
        images = torch.empty(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
        logits = model(images)
        sum(part.sum() for part in (logits if isinstance(logits, tuple) else [logits])).backward()
        optimizer.step(1.0)
        assert all(parameter.grad is not None for parameter in model.parameters())


# --- a folder of weights


@pytest.mark.parametrize(
    "file",
    [
        "test_resnet.r160_in1k.safetensors", "test_resnet.r160_in1k.pth", "test_resnet.r160_in1k.bin",
        "test_resnet.safetensors", "test_resnet.r160_in1k/model.safetensors",
        "test_resnet.r160_in1k/pytorch_model.bin",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["test_resnet", "test_resnet.r160_in1k"])
def test_weights_are_found_in_the_folder_and_named_in_one_line(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = _source("test_resnet", num_classes=7)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    _save(source, tmp_path / file)
    monkeypatch.setenv("HPO_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(timm_models, "_published", None)
    with caplog.at_level("INFO", "core"):
        for _ in range(2):
            ours = _build(name=f"timm/{name}", pretrained=True, num_classes=7, in_channels=3, image_size=(64, 64))
    assert torch.equal(_logits(ours), _logits(source))
    assert caplog.messages == [f"timm/{name} starts from {tmp_path / file}"]


def test_a_file_as_downloaded_from_its_address_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source("mobilenetv3_small_050", num_classes=7)
    _save(source, tmp_path / "mobilenetv3_small_050_lambc-4b7bbe87.pth")
    monkeypatch.setenv("HPO_WEIGHTS", str(tmp_path))
    ours = _build(name="timm/mobilenetv3_small_050", pretrained=True, num_classes=7, in_channels=3, image_size=(64, 64))
    assert torch.equal(_logits(ours), _logits(source))


def test_a_file_without_tag_is_only_of_the_default_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(_source("resnet18", num_classes=7), tmp_path / "resnet18.safetensors")
    monkeypatch.setenv("HPO_WEIGHTS", str(tmp_path))
    assert timm_models._in_folder(find_model("timm/resnet18")) == tmp_path / "resnet18.safetensors"
    assert timm_models._in_folder(find_model("timm/resnet18.tv_in1k")) is None


def test_a_missing_folder_of_weights_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"^HPO_WEIGHTS: .*nowhere: no such folder"):
        _build(name="timm/test_resnet", pretrained=True, in_channels=3, image_size=(64, 64))
