"""timm's models by name: `timm/convnext_atto`, `timm/vit_small_patch16_224.augreg_in21k`.

Pretrained weights are looked for in `model.pretrained_file`, in the folder of `core.weights`, and in the hub's cache,
without network access, before they are downloaded. A file must match the complete model, since timm skips layers that
do not match and only logs it.
"""

from __future__ import annotations

import difflib
import functools
import logging
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
from core.errors import ConfigError, MissingWeightsError, UserError
from core.models.heads import classifiers
from core.models.weight_files import (
    locate_weights,
    read_weights,
    state_dict_faults,
    without_prefix,
)
from core.runtime import isolated_rng
from core.weights import weights_folder

logger = logging.getLogger(__name__)

# Of the hub's first response; its own client retries for almost a minute.
HUB_TIMEOUT_S = 10.0
# To find out whether a server can be reached at all.
SERVER_TIMEOUT_S = 3.0
# The one that cannot run code first.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# timm's optional argument -> the field that sets it.
_FIELDS = {"drop_rate": "model.dropout", "drop_path_rate": "model.drop_path"}


def build_timm_model(
    config: ModelConfig, *, num_classes: int, in_channels: int, image_size: tuple[int, int]
) -> nn.Module:
    """Build the model; see `core.models.build_model`.

    Raises:
        ConfigError: the model does not support an option or this image size, or the weights are another model's.
        MissingWeightsError: its weights are not at hand.
        UserError: there is no such model, or its weights are unreadable.
    """
    cfg = find_model(config.name)
    name = config.name.removeprefix("timm/")
    arguments: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
    if config.dropout > 0:
        arguments["drop_rate"] = config.dropout
    if config.drop_path > 0:
        arguments["drop_path_rate"] = config.drop_path
    if cfg.fixed_input_size and tuple(cfg.input_size[1:]) != image_size:
        arguments["img_size"] = image_size
    if config.pretrained:
        file = config.pretrained_file
        path = _in_folder(cfg) if file is None else locate_weights(file)
        arguments |= _published(name, cfg) if path is None else _from_file(name, path, arguments, cfg)
    model = _create(name, arguments, cfg)
    if config.pretrained:
        _check_first_layer(name, model, in_channels)
    _check_logits(name, model, (2, in_channels, *image_size), num_classes, cfg)
    if not config.pretrained or getattr(model, "pretrained_cfg", {}).get("num_classes") != num_classes:
        _zero_classifier(model, num_classes)
    return model


@torch.no_grad()
def _zero_classifier(model: nn.Module, num_classes: int) -> None:
    """Set the classifier's weights to 0: the first loss is ln K, and its gradients spoil no pretrained features.

    timm draws those of EfficientNets and MobileNets by fan-out; the first loss of 10 classes is then up to 5.9.
    """
    for module in classifiers(model):
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and len(layer.weight) == num_classes:
                for parameter in layer.parameters(recurse=False):
                    parameter.zero_()


def find_model(name: str) -> Any:
    """Return timm's configuration of `timm/NAME`: image size, weights.

    Raises:
        UserError: timm has no such model, or no weights with this tag.
    """
    name = name.removeprefix("timm/")
    architecture, _, tag = name.partition(".")
    names = timm.list_models()  # excludes deprecated names
    if architecture not in names:
        nearest = difflib.get_close_matches(architecture, names, n=3)
        hint = f"did you mean {_one_of(nearest)}?" if nearest else "timm.list_models() names them all"
        raise UserError(f"model.name: timm {timm.__version__} has no model {architecture!r}; {hint}")
    tags = [full.partition(".")[2] for full in timm.list_models(f"{architecture}.*", include_tags=True)]
    if tag and tag not in tags:
        known = f"it has {', '.join(tags)}" if any(tags) else "it has none"
        raise UserError(f"model.name: timm's {architecture} has no weights {tag!r}; {known}")
    return timm.get_pretrained_cfg(name)


def _create(name: str, arguments: dict[str, Any], cfg: Any) -> nn.Module:
    """Create the model, with errors in terms of the configuration."""
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
        raise _not_at_hand(name, cfg.url, f"{torch.hub.get_dir()}/checkpoints", error) from error
    except (ArithmeticError, AssertionError, RuntimeError, ValueError) as error:
        if arguments.get("pretrained") and "loading state_dict" in str(error):
            raise _unadapted(name, arguments["in_chans"], arguments["num_classes"], error) from error
        if "img_size" not in arguments:
            raise
        raise _unfit(name, arguments["img_size"], cfg, error) from error
    # Otherwise every weight would exist twice, also in copies.
    getattr(model, "pretrained_cfg", {}).pop("state_dict", None)
    return model


def _check_logits(name: str, model: nn.Module, shape: tuple[int, ...], num_classes: int, cfg: Any) -> None:
    """Predict black images: many models fail only then if images are too small."""
    training = model.training
    with isolated_rng(torch.device("cpu")), torch.no_grad():
        try:
            logits = model.eval()(torch.zeros(shape))
        except (ArithmeticError, AssertionError, RuntimeError, ValueError) as error:
            raise _unfit(name, shape[-2:], cfg, error) from error
    model.train(training)
    if not isinstance(logits, torch.Tensor) or logits.shape != (shape[0], num_classes):
        raise ConfigError(f"model.name: timm/{name} does not return one logit a class; choose another model")


def _in_folder(cfg: Any) -> Path | None:
    """The model's weights in the folder of weights, under a name that a download gives them."""
    folder = weights_folder()
    if folder is None:
        return None
    full = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture
    stems = [full]
    if find_model(cfg.architecture).tag == cfg.tag:  # the default
        stems.append(cfg.architecture)
    names = [f"{stem}{suffix}" for stem in stems for suffix in (".safetensors", ".pth", ".bin")]
    names += [f"{full}/{file}" for file in WEIGHT_FILES]
    if cfg.url:
        names.append(cfg.url.rpartition("/")[2])
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _in_cache(repository: str) -> str | None:
    """Path of a repository's weights in the hub's cache; None if they are not there."""
    found = (
        huggingface_hub.try_to_load_from_cache(repository, each, cache_dir=hub.HF_HUB_CACHE) for each in WEIGHT_FILES
    )
    return next((path for path in found if isinstance(path, str)), None)


def has_weights(name: str) -> bool:
    """Return whether the weights of `timm/NAME` are in the folder or a cache, or their server answers.

    Each server is tried once in a process, for `SERVER_TIMEOUT_S` seconds.

    Raises:
        UserError: timm has no such model.
    """
    cfg = find_model(name)
    if not cfg.has_weights:
        return False
    if _in_folder(cfg) is not None:
        return True
    if cfg.hf_hub_id:
        return _in_cache(cfg.hf_hub_id) is not None or _answers(hub.ENDPOINT)
    cached = Path(f"{torch.hub.get_dir()}/checkpoints/{cfg.url.rpartition('/')[2]}")
    return cached.is_file() or _answers("/".join(cfg.url.split("/")[:3]))


def weights_address(name: str) -> str:
    """Return the address of the published weights of `timm/NAME`."""
    cfg = find_model(name)
    return str(cfg.url) if not cfg.hf_hub_id else huggingface_hub.hf_hub_url(cfg.hf_hub_id, WEIGHT_FILES[0])


@functools.cache
def _answers(server: str) -> bool:
    """Whether a server answers, at this address without a path."""
    try:
        response = huggingface_hub.get_session().head(server, timeout=SERVER_TIMEOUT_S)
    except Exception:  # types vary with the hub's version
        return False
    return int(response.status_code) < 500


@functools.cache
def _log_source(name: str, source: str) -> None:
    """Log once where a model's weights are from."""
    logger.info("timm/%s starts from %s", name, source)


def _published(name: str, cfg: Any) -> dict[str, Any]:
    """Arguments for the published weights, downloaded if needed; torch.hub loads those of a few old models."""
    if not cfg.has_weights:
        raise UserError(f"model.pretrained: timm has no weights for {name}; set it to false, or choose another model")
    if not cfg.hf_hub_id:
        _log_source(name, cfg.url)
        return {"pretrained": True}
    path = _in_cache(cfg.hf_hub_id) or _download(name, cfg.hf_hub_id)
    # Deleting only the link to the blob would not help.
    advice = f"delete {Path(path).parents[2]}, and the next run downloads them again"
    weights = read_weights(Path(path), "model.pretrained", advice)
    _log_source(name, f"the weights of {cfg.hf_hub_id} in {hub.HF_HUB_CACHE}")
    return _pretrained({"state_dict": weights})


def _from_file(name: str, path: Path, arguments: dict[str, Any], cfg: Any) -> dict[str, Any]:
    """Arguments for the weights in a file, after checking that they are this model's."""
    weights = read_weights(path, "model.pretrained_file", "give a file of the state dict alone")
    weights = without_prefix(weights, _first(cfg.first_conv), path)
    classes, channels = _outputs(weights, cfg), _inputs(weights, cfg, arguments["in_chans"])
    overlay = {"state_dict": weights, "num_classes": classes, "input_size": (channels, *cfg.input_size[1:])}
    own = arguments | {"num_classes": classes, "in_chans": channels}
    _check_fit(name, path, weights, own, _pretrained(overlay), cfg)
    _log_source(name, str(path))
    return _pretrained(overlay)


def _pretrained(overlay: dict[str, Any]) -> dict[str, Any]:
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}


def _outputs(weights: dict[str, Tensor], cfg: Any) -> int:
    """Classes of the file's classifier, if any."""
    weight = weights.get(f"{_first(cfg.classifier)}.weight")
    return 0 if weight is None or weight.ndim == 0 else weight.shape[0]


def _inputs(weights: dict[str, Tensor], cfg: Any, in_channels: int) -> int:
    """Input channels of the file's model: `in_channels`, or timm's default, which timm adapts."""
    weight = weights.get(f"{_first(cfg.first_conv)}.weight")
    fits = weight is not None and weight.ndim == 4 and weight.shape[1] == in_channels
    return in_channels if fits else int(cfg.input_size[0])


def _first(names: str | tuple[str, ...] | None) -> str:
    return names if isinstance(names, str) else (names or ("",))[0]


def _check_fit(
    name: str, path: Path, weights: dict[str, Tensor], own: dict[str, Any], pretrained: dict[str, Any], cfg: Any
) -> None:
    """Raise ConfigError if the file is of another model. `own` are arguments with the file's classes and channels.

    timm may convert other names or shapes (older names, position embeddings of another image size), which must load
    strictly and fill every layer.
    """
    with isolated_rng(torch.device("cpu")):
        torch.manual_seed(0)
        empty = _create(name, own, cfg).state_dict()
        faults = state_dict_faults(weights, empty, file=path.name, name=f"timm/{name}")
        if not faults:
            return
        torch.manual_seed(0)
        try:
            filled = _create(name, own | pretrained, cfg).state_dict()
        except MemoryError:
            raise
        except Exception as error:  # timm's converters raise many types
            raise _misfit(name, path, faults) from error
    # A few models do not load strictly, and layers that were not loaded have their initial values.
    doubtful = [key for key in empty if key not in weights or weights[key].shape != empty[key].shape]
    if any(_is_drawn(empty[key]) and torch.equal(filled[key], empty[key]) for key in doubtful):
        raise _misfit(name, path, faults)


def _misfit(name: str, path: Path, faults: list[str]) -> ConfigError:
    return ConfigError(
        f"model.pretrained_file: {path} holds the weights of another model than timm/{name}: {'; '.join(faults)}; "
        "set model.name to the model that it was saved from, or give another file"
    )


def _is_drawn(tensor: Tensor) -> bool:
    """Whether a tensor is random, and not constant as norms and biases are."""
    return tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor != tensor.flatten()[0]).any())


def _check_first_layer(name: str, model: nn.Module, in_channels: int) -> None:
    """Raise if timm only logged that it cannot adapt the first layer to other channels: it adapts convolutions only."""
    described: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    layer = _first(described.get("first_conv"))
    channels = described.get("input_size", (in_channels,))[0]
    if layer and channels != in_channels and not isinstance(model.get_submodule(layer), nn.Conv2d):
        raise ConfigError(
            f"model.pretrained: the first layer of timm/{name}, {layer}, is not a convolution, so its weights for "
            f"{channels} channels cannot be adapted to {in_channels}; choose another model"
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
    except Exception as error:  # types vary with the hub's version
        raise _not_at_hand(name, f"{WEIGHT_FILES[0]} of {repository}", hub.HF_HUB_CACHE, error) from error


def _not_at_hand(name: str, file: str, cache: str, error: Exception) -> MissingWeightsError:
    return MissingWeightsError(
        f"model.pretrained: the weights of timm/{name}, {file}, are not in {cache}, and cannot be downloaded "
        f"({_reason(error)}); copy that folder from a machine that has them, put the file as {name}.safetensors into a "
        "folder named by --weights or HPO_WEIGHTS, name it in model.pretrained_file, or set model.pretrained to false"
    )


def _unfit(name: str, image_size: tuple[int, ...], cfg: Any, error: Exception) -> ConfigError:
    height, width = image_size
    return ConfigError(
        f"data.image_size: timm/{name} cannot take images of {height}×{width} ({_reason(error)}); "
        f"its own size is {cfg.input_size[-1]}: set that, or choose another model"
    )


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].rstrip(". ") or type(error).__name__


def _one_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
