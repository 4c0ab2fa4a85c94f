"""Any of timm's models, by its name there: `timm/convnext_atto`, `timm/vit_small_patch16_224.augreg_in21k`.

The key choice is that nothing is dropped in silence: a model that cannot do what a field asks (drop path, images of
this size) is refused when it is built. Pretrained weights that lie in the hub's cache are read from there without
asking the network, so that a trial costs no request and a machine without network trains as one with it does.

timm: Wightman 2019, https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

import difflib
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub import constants as hub
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from core.config import ModelConfig
from core.errors import ConfigError, UserError
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
        ConfigError: the model takes no dropout or drop path where one is set, or no images of this size.
        UserError: timm has no such model, or no pretrained weights for it, or these are not at hand.
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
    if config.pretrained:
        arguments["pretrained"] = True
        arguments["pretrained_cfg_overlay"] = _weights(name, card)
    model = _create(name, arguments, card)
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
        if "img_size" not in arguments:
            raise
        raise _unfit(name, arguments["img_size"], card, error) from error
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


def _weights(name: str, card: Any) -> dict[str, Any]:
    """Where the pretrained weights are: what to lay over timm's own description of the model.

    Weights that timm knows by a URL only (a few old models) are left to torch's hub.
    """
    if not card.has_weights:
        raise UserError(f"model.pretrained: timm has no weights for {name}; set it to false, or choose another model")
    if not card.hf_hub_id:
        return {}
    for file in WEIGHT_FILES:
        path = huggingface_hub.try_to_load_from_cache(card.hf_hub_id, file, cache_dir=hub.HF_HUB_CACHE)
        if isinstance(path, str):
            break
    else:
        path = _download(name, card.hf_hub_id)
    # Some models read a file of their own format where timm is given a path: those on the hub are all plain.
    return {"file": path, "custom_load": False}


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
        f"({_reason(error)}); copy that folder from a machine that has them, or set model.pretrained to false"
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
