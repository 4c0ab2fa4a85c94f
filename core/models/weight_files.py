"""Weights files: located, read without running code, and compared with the model.

A file is used only if it is the complete state dict of the model: a partly untrained network would look like a bad
configuration.
"""

from __future__ import annotations

from pathlib import Path

from timm.models import load_state_dict
from torch import Tensor

from core.errors import UserError


def locate_weights(file: str) -> Path:
    """Return the file's absolute path, with `~` expanded.

    Raises:
        UserError: the file does not exist.
    """
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
    """Read the tensors of a .safetensors file, or of a torch file with a state dict or a checkpoint of timm's.

    Averaged weights of a checkpoint are preferred, as in timm. Files that could run code are refused.

    Raises:
        UserError: the file cannot be read, or has no state dict; `field` and `advice` are part of the message.
    """
    try:
        # timm's default varies between releases.
        weights: dict[str, Tensor] = load_state_dict(str(path), weights_only=True)
    except MemoryError:
        raise
    except OSError as error:
        raise UserError(f"{field}: {path} cannot be read ({error.strerror or type(error).__name__})") from error
    except Exception as error:  # readers raise many types on invalid files
        kind = "whole .safetensors file" if path.suffix == ".safetensors" else "torch file of tensors and plain values"
        raise UserError(f"{field}: {path} is no {kind}; {advice}") from error
    others = [str(key) for key, value in weights.items() if not isinstance(value, Tensor)]
    if others or not weights:
        found = f"{others[0]!r} in it is not a tensor" if others else "it is empty"
        raise UserError(f"{field}: {path} holds no state dict, since {found}; {advice}")
    return weights


def state_dict_faults(weights: dict[str, Tensor], model: dict[str, Tensor], *, file: str, name: str) -> list[str]:
    """Describe the differences of `weights` to the state dict `model`, naming the file and the model.

    Returns one entry each for other shapes, missing layers and surplus layers, with the first layer and the number of
    others.
    """
    shapes = [key for key in model if key in weights and weights[key].shape != model[key].shape]
    # Files from before torch 0.4.1 lack the number of batches, which torch fills in.
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
