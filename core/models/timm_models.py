"""Any of timm's models, by its name there: `timm/convnext_atto`, `timm/vit_small_patch16_224.augreg_in21k`.

The key choice is that nothing is dropped in silence: a model that cannot do what a field asks (drop path, images of
this size) is refused when it is built. Pretrained weights that lie in the hub's cache are read from there without
asking the network, so that a trial costs no request and a machine without network trains as one with it does. A file of
weights is held against the whole model before it is used: timm itself leaves out layers that do not match wherever the
classifier is another, and says so in a log only.

timm: Wightman 2019, https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

import difflib
import textwrap
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub import constants as hub
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn

from core.config import ModelConfig
from core.errors import ConfigError, UserError
from core.models.weight_files import locate_weights, read_weights, state_dict_faults
from core.runtime import isolated_rng

# Seconds that the hub has for its first answer. Its own client goes on asking for the better part of a minute.
HUB_TIMEOUT_S = 10.0
# The files that timm's repositories on the hub keep weights in, the one that cannot run code first.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# timm's argument, which not every model has -> the field that asks for it.
_FIELDS = {"drop_rate": "model.dropout", "drop_path_rate": "model.drop_path"}


def build_timm_model(
    config: ModelConfig, *, num_classes: int, in_channels: int, image_size: tuple[int, int]
) -> nn.Module:
    """Builds the model: (N, in_channels, H, W) floats to logits (N, num_classes). `image_size` is (H, W) in pixels.

    Raises:
        ConfigError: the model takes no dropout or drop path where one is set, or no images of this size; or
            `pretrained_file` holds the weights of another model.
        UserError: timm has no such model, or no pretrained weights for it; or these are not at hand, or not readable.
    """
    card = find_card(config.name)
    name = config.name.removeprefix("timm/")
    arguments: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
    if config.dropout > 0:
        arguments["drop_rate"] = config.dropout
    if config.drop_path > 0:
        arguments["drop_path_rate"] = config.drop_path
    if card.fixed_input_size and tuple(card.input_size[1:]) != image_size:
        arguments["img_size"] = image_size
    if config.pretrained and config.pretrained_file is not None:
        arguments |= _from_file(name, locate_weights(config.pretrained_file), arguments, card)
    elif config.pretrained:
        arguments |= _published(name, card)
    model = _create(name, arguments, card)
    if config.pretrained:
        _check_first_layer(name, model, in_channels)
    _check_logits(name, model, (2, in_channels, *image_size), num_classes, card)
    return model


def find_card(name: str) -> Any:
    """timm's description of the model `timm/NAME`: its own image size, whether it is fixed, where its weights are.

    Raises:
        UserError: timm has no model of this name, or no weights of this tag for it.
    """
    name = name.removeprefix("timm/")
    architecture, _, tag = name.partition(".")
    names = timm.list_models()  # without the deprecated names, which timm maps to others with a warning
    if architecture not in names:
        nearest = difflib.get_close_matches(architecture, names, n=3)
        hint = f"did you mean {_one_of(nearest)}?" if nearest else "timm.list_models() names them all"
        raise UserError(f"model.name: timm {timm.__version__} has no model {architecture!r}; {hint}")
    tags = [full.partition(".")[2] for full in timm.list_models(f"{architecture}.*", include_tags=True)]
    if tag and tag not in tags:
        known = f"it has {', '.join(tags)}" if any(tags) else "it has none"
        raise UserError(f"model.name: timm's {architecture} has no weights {tag!r}; {known}")
    return timm.get_pretrained_cfg(name)


def _create(name: str, arguments: dict[str, Any], card: Any) -> nn.Module:
    """timm's model, with what it refuses told in the configuration's words."""
    try:
        model: nn.Module = timm.create_model(name, **arguments)
    except TypeError as error:
        for argument, field in _FIELDS.items():
            if argument in arguments and "unexpected keyword" in str(error) and argument in str(error):
                raise ConfigError(f"{field}: timm/{name} has none; set it to 0, or choose another model") from error
        raise
    except OSError as error:
        if not arguments.get("pretrained"):
            raise
        raise _not_at_hand(name, card.url, f"{torch.hub.get_dir()}/checkpoints", error) from error
    except (ArithmeticError, AssertionError, RuntimeError, ValueError) as error:
        if arguments.get("pretrained") and "loading state_dict" in str(error):
            raise _unadapted(name, arguments["in_chans"], arguments["num_classes"], error) from error
        if "img_size" not in arguments:
            raise
        raise _unfit(name, arguments["img_size"], card, error) from error
    # timm's description of the model holds what it was given: without this, every weight would live twice, and be
    # copied with every copy of the model.
    getattr(model, "pretrained_cfg", {}).pop("state_dict", None)
    return model


def _check_logits(name: str, model: nn.Module, shape: tuple[int, ...], num_classes: int, card: Any) -> None:
    """Passes two black images: many models learn only in their forward pass that an image is too small for them."""
    training = model.training
    with isolated_rng(torch.device("cpu")), torch.no_grad():
        try:
            logits = model.eval()(torch.zeros(shape))
        except (ArithmeticError, AssertionError, RuntimeError, ValueError) as error:
            raise _unfit(name, shape[-2:], card, error) from error
    model.train(training)
    if not isinstance(logits, torch.Tensor) or logits.shape != (shape[0], num_classes):
        raise ConfigError(f"model.name: timm/{name} does not return one logit a class; choose another model")


def _published(name: str, card: Any) -> dict[str, Any]:
    """timm's arguments for the published weights: those in the hub's cache, or downloaded into it.

    Weights that timm knows by a URL only (a few old models) are left to torch's hub.
    """
    if not card.has_weights:
        raise UserError(f"model.pretrained: timm has no weights for {name}; set it to false, or choose another model")
    if not card.hf_hub_id:
        return {"pretrained": True}
    for file in WEIGHT_FILES:
        path = huggingface_hub.try_to_load_from_cache(card.hf_hub_id, file, cache_dir=hub.HF_HUB_CACHE)
        if isinstance(path, str):
            break
    else:
        path = _download(name, card.hf_hub_id)
    # The file is a link to a blob, which would be taken for whole again if the link alone were deleted.
    advice = f"delete {Path(path).parents[2]}, and the next run downloads them again"
    return _pretrained({"state_dict": read_weights(Path(path), "model.pretrained", advice)})


def _from_file(name: str, path: Path, arguments: dict[str, Any], card: Any) -> dict[str, Any]:
    """timm's arguments for the weights in a file, after they have been found to be this model's, layer for layer.

    Raises:
        ConfigError: they are not; the first layers that differ are named.
        UserError: the file holds no weights.
    """
    weights = read_weights(path, "model.pretrained_file", "give a file of the state dict alone")
    classes, channels = _outputs(weights, card), _inputs(weights, card, arguments["in_chans"])
    overlay = {"state_dict": weights, "num_classes": classes, "input_size": (channels, *card.input_size[1:])}
    own = arguments | {"num_classes": classes, "in_chans": channels}
    _check_fit(name, path, weights, own, _pretrained(overlay), card)
    return _pretrained(overlay)


def _pretrained(overlay: dict[str, Any]) -> dict[str, Any]:
    """timm's arguments for weights in hand, of which `overlay` says what timm's description of the model does not."""
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}


def _outputs(weights: dict[str, Tensor], card: Any) -> int:
    """How many classes the file's classifier has; 0 where it has no classifier."""
    weight = weights.get(f"{_first(card.classifier)}.weight")
    return 0 if weight is None or weight.ndim == 0 else weight.shape[0]


def _inputs(weights: dict[str, Tensor], card: Any, in_channels: int) -> int:
    """How many channels the file's model sees: those of our images where its first layer says so, else timm's own.

    timm turns its own three into any other number; a model that was itself trained on greyscale needs no turning.
    """
    weight = weights.get(f"{_first(card.first_conv)}.weight")
    fits = weight is not None and weight.ndim == 4 and weight.shape[1] == in_channels
    return in_channels if fits else int(card.input_size[0])


def _first(names: str | tuple[str, ...] | None) -> str:
    """A layer's name where timm gives one, several (the first counts), or none."""
    return names if isinstance(names, str) else (names or ("",))[0]


def _check_fit(
    name: str, path: Path, weights: dict[str, Tensor], own: dict[str, Any], pretrained: dict[str, Any], card: Any
) -> None:
    """Refuses a file of another model. `own` are timm's arguments for the model with the file's classes and channels.

    Names and shapes decide where they are timm's. Where they are not, timm may know how to convert them (position
    embeddings of another image size, older names): it is asked to, strictly, and must then have filled every layer.
    """
    with isolated_rng(torch.device("cpu")):
        torch.manual_seed(0)
        empty = _create(name, own, card).state_dict()
        faults = state_dict_faults(weights, empty, file=path.name, name=f"timm/{name}")
        if not faults:
            return
        torch.manual_seed(0)
        try:
            filled = _create(name, own | pretrained, card).state_dict()
        except MemoryError:
            raise
        except Exception as error:  # timm's converters raise anything on what they do not expect
            raise _misfit(name, path, faults) from error
    # A few models are not loaded strictly. What was drawn at random, and still is the same, has not been loaded.
    doubtful = [key for key in empty if key not in weights or weights[key].shape != empty[key].shape]
    if any(_is_drawn(empty[key]) and torch.equal(filled[key], empty[key]) for key in doubtful):
        raise _misfit(name, path, faults)


def _misfit(name: str, path: Path, faults: list[str]) -> ConfigError:
    return ConfigError(
        f"model.pretrained_file: {path} holds the weights of another model than timm/{name}: {'; '.join(faults)}; "
        "set model.name to the model that it was saved from, or give another file"
    )


def _is_drawn(tensor: Tensor) -> bool:
    """Whether a tensor begins with random numbers, and not with a constant, as norms and biases do."""
    return tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor != tensor.flatten()[0]).any())


def _check_first_layer(name: str, model: nn.Module, in_channels: int) -> None:
    """Refuses a model whose pretrained first layer timm has left out, since it sees another number of channels.

    timm turns the weights of a convolution only, and says in a log only that it begins another layer anew.
    """
    described: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    layer = _first(described.get("first_conv"))
    channels = described.get("input_size", (in_channels,))[0]
    if layer and channels != in_channels and not isinstance(model.get_submodule(layer), nn.Conv2d):
        raise ConfigError(
            f"model.pretrained: the first layer of timm/{name}, {layer}, is no convolution, so that its weights for "
            f"{channels} channels cannot be turned into those for {in_channels}; choose another model"
        )


def _unadapted(name: str, channels: int, classes: int, error: Exception) -> ConfigError:
    reason = textwrap.shorten(str(error), width=200, placeholder=" …")
    return ConfigError(
        f"model.pretrained: the weights do not go into timm/{name} for {channels} channels and {classes} classes "
        f"({reason}); choose another model, or name a file of its own weights in model.pretrained_file"
    )


def _download(name: str, repository: str) -> str:
    try:
        address = huggingface_hub.hf_hub_url(repository, WEIGHT_FILES[0])
        huggingface_hub.get_session().head(address, timeout=HUB_TIMEOUT_S)
        try:
            return huggingface_hub.hf_hub_download(repository, WEIGHT_FILES[0], cache_dir=hub.HF_HUB_CACHE)
        except EntryNotFoundError:
            return huggingface_hub.hf_hub_download(repository, WEIGHT_FILES[1], cache_dir=hub.HF_HUB_CACHE)
    except Exception as error:  # the hub's client raises its HTTP library's errors, which change with its version
        raise _not_at_hand(name, f"{WEIGHT_FILES[0]} of {repository}", hub.HF_HUB_CACHE, error) from error


def _not_at_hand(name: str, file: str, cache: str, error: Exception) -> UserError:
    return UserError(
        f"model.pretrained: the weights of timm/{name}, {file}, are not in {cache}, and cannot be downloaded "
        f"({_reason(error)}); copy that folder from a machine that has them, name a file of them in "
        "model.pretrained_file, or set model.pretrained to false"
    )


def _unfit(name: str, image_size: tuple[int, ...], card: Any, error: Exception) -> ConfigError:
    height, width = image_size
    return ConfigError(
        f"data.image_size: timm/{name} cannot take images of {height}×{width} ({_reason(error)}); "
        f"its own size is {card.input_size[-1]}: set that, or choose another model"
    )


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].rstrip(". ") or type(error).__name__


def _one_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
