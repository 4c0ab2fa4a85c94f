"""Weights files, read without running code.

A file must be the model's complete state dict: a partly untrained network would look like a bad configuration.
"""

from __future__ import annotations

from pathlib import Path

from timm.models import load_state_dict
from torch import Tensor

from core.errors import UserError


def locate_weights(file: str) -> Path:
    """Return the absolute path, with `~` expanded, or raise UserError if there is no such file."""
    try:
        path = Path(file).expanduser().absolute()
    except RuntimeError as error:  # unknown user
        raise UserError(f"model.pretrained_file: {file}: no such home; give the file's whole path") from error
    if not path.is_file():
        found = "a folder, not a file" if path.is_dir() else "no such file"
        raise UserError(
            f"model.pretrained_file: {path}: {found}; give the path of a .safetensors or .pth file, or remove it "
            "to use the published weights"
        )
    return path


def read_weights(path: Path, field: str, advice: str) -> dict[str, Tensor]:
    """Read a state dict, or that of a checkpoint of timm's, averaged if it has one. Files that run code are refused.

    Raises:
        UserError: the file cannot be read, or has no state dict; the message has `field` and `advice`.
    """
    try:
        # timm's default varies between releases.
        weights: dict[str, Tensor] = load_state_dict(str(path), weights_only=True)
    except MemoryError:
        raise
    except OSError as error:
        raise UserError(f"{field}: {path} cannot be read ({error.strerror or type(error).__name__})") from error
    except Exception as error:  # readers raise many types
        kind = "whole .safetensors file" if path.suffix == ".safetensors" else "torch file of tensors and plain values"
        raise UserError(f"{field}: {path} is no {kind}; {advice}") from error
    others = [str(key) for key, value in weights.items() if not isinstance(value, Tensor)]
    if others or not weights:
        found = f"{others[0]!r} in it is not a tensor" if others else "it is empty"
        raise UserError(f"{field}: {path} holds no state dict, since {found}; {advice}")
    return weights


def without_prefix(weights: dict[str, Tensor], layer: str, path: Path) -> dict[str, Tensor]:
    """Remove the prefix that a training framework has given all layers, such as Lightning's `model.`.

    Args:
        weights: the tensors of the file.
        layer: the model's first layer, by which a prefix is found; empty if it is not known.
        path: the file.

    Raises:
        UserError: other layers of the file lack the prefix.
    """
    first = f"{layer}.weight"
    prefixes = [name.removesuffix(first) for name in weights if name.endswith(f".{first}")]
    if not layer or first in weights or not prefixes:
        return weights
    prefix = min(prefixes, key=len)
    others = [name for name in weights if not name.startswith(prefix)]
    if 2 * len(others) > len(weights):  # a layer within the network has the name of the first
        return weights
    if others:
        raise UserError(
            f"model.pretrained_file: {path}: its layers begin with {prefix}, but {others[0]} does not{_more(others)}; "
            "save the state dict of the network alone"
        )
    return {name.removeprefix(prefix): weight for name, weight in weights.items()}


def state_dict_faults(weights: dict[str, Tensor], model: dict[str, Tensor], *, file: str, name: str) -> list[str]:
    """Describe other shapes, missing and surplus layers of `weights`, by the first layer and the number of others."""
    shapes = [key for key in model if key in weights and weights[key].shape != model[key].shape]
    # torch fills in the number of batches, missing before version 0.4.1.
    missing = [key for key in model if key not in weights and not key.endswith("num_batches_tracked")]
    surplus = [key for key in weights if key not in model]
    faults = []
    if shapes:
        theirs, ours = tuple(weights[shapes[0]].shape), tuple(model[shapes[0]].shape)
        faults.append(f"{shapes[0]} is {theirs} in {file} and {ours} in {name}{_more(shapes)}")
    if missing:
        faults.append(f"{missing[0]} is missing in {file}{_more(missing)}")
    if surplus:
        faults.append(f"{surplus[0]} is not in {name}{_more(surplus)}")
    return faults


def _more(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
