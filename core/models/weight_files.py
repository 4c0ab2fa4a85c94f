"""A file of weights: found, read without running code in it, and held against the model that it is for.

The key choice is that a file either is the model's whole state dict or is refused by the names of its layers: a network
that silently begins half untrained looks like a bad configuration, and a search would believe it.

The formats are timm's: safetensors, or what `torch.save` wrote of a state dict or of a training's checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from timm.models import load_state_dict
from torch import Tensor

from core.errors import UserError


def locate_weights(file: str) -> Path:
    """The file's absolute path, with `~` as the user's home.

    Raises:
        UserError: there is no such file.
    """
    try:
        path = Path(file).expanduser().absolute()
    except RuntimeError as error:  # `~nobody`
        raise UserError(f"model.pretrained_file: {file}: no such home; give the file's whole path") from error
    if not path.is_file():
        found = "a folder, and no file" if path.is_dir() else "no such file"
        raise UserError(
            f"model.pretrained_file: {path}: {found}; give the path of a .safetensors or .pth file, or leave it out "
            "to take the published weights"
        )
    return path


def read_weights(path: Path, field: str, advice: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a torch file: a state dict, or a checkpoint of timm's with one in it.

    Of a checkpoint with averaged weights, those are taken, as timm does. A file with anything in it that could run
    code is refused.

    Raises:
        UserError: the file cannot be read, or holds no state dict.
    """
    try:
        # Said here, because timm's releases differ in what they do by default.
        weights: dict[str, Tensor] = load_state_dict(str(path), weights_only=True)
    except MemoryError:
        raise
    except OSError as error:
        raise UserError(f"{field}: {path} cannot be read ({error.strerror or type(error).__name__})") from error
    except Exception as error:  # on what is no such file the readers raise anything from KeyError to RuntimeError
        kind = "whole .safetensors file" if path.suffix == ".safetensors" else "torch file of tensors and plain values"
        raise UserError(f"{field}: {path} is no {kind}; {advice}") from error
    others = [str(key) for key, value in weights.items() if not isinstance(value, Tensor)]
    if others or not weights:
        found = f"{others[0]!r} in it is no tensor" if others else "it is empty"
        raise UserError(f"{field}: {path} holds no state dict, since {found}; {advice}")
    return weights


def state_dict_faults(weights: dict[str, Tensor], model: dict[str, Tensor], *, file: str, name: str) -> list[str]:
    """What keeps `weights` from being the state dict of `model`, in words that name the `file` and the model.

    Other shapes, missing layers and surplus layers are each told by the first and the number of the others; nothing is
    said where there are none.
    """
    shapes = [key for key in model if key in weights and weights[key].shape != model[key].shape]
    # Files from before torch 0.4.1 do not count batches; torch fills that in.
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
