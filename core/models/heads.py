"""The classifier of a network."""

from __future__ import annotations

from torch import nn

from core.errors import ConfigError


def classifiers(model: nn.Module) -> list[nn.Module]:
    """Return the classifier: usually the last linear layer, in timm's models sometimes with a norm.

    A distilled model has two. The list is empty if there is no separate classifier.
    """
    find = getattr(model, "get_classifier", None)
    found = find() if find is not None else getattr(model, "fc", None)
    return [each for each in (found if isinstance(found, tuple | list) else [found]) if isinstance(each, nn.Module)]


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the classifier's parameters, or raise ConfigError if there is no separate classifier."""
    parameters = dict.fromkeys(parameter for module in classifiers(model) for parameter in module.parameters())
    if not parameters:
        raise ConfigError(
            "optim.backbone_lr_scale, optim.head_only_fraction and optim.name: muon need a separate classifier, "
            f"which {type(model).__name__} does not have; remove them, or choose another model.name; in a network of "
            "your own, name it fc or return it by get_classifier()"
        )
    return list(parameters)


def layer_scales(model: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Return the factor of each parameter's learning rate with `optim.layer_decay`, by timm's order of layers.

    Raises:
        ConfigError: timm does not tell the network's layers apart.
    """
    from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]

    groups = param_groups_layer_decay(model, layer_decay=decay)
    scales = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    if len(set(scales.values())) == 1:
        raise ConfigError(
            f"optim.layer_decay: timm does not tell the layers of {type(model).__name__} apart; set it to 1, or choose "
            "another model.name"
        )
    return scales


def probed_classifier(model: nn.Module) -> nn.Linear:
    """Return the classifier if it is one linear layer, or raise ConfigError."""
    found = classifiers(model)
    if len(found) == 1 and isinstance(found[0], nn.Linear) and found[0].bias is not None:
        return found[0]
    raise ConfigError(
        f"optim.name: logistic needs a network that ends in one linear layer, and {type(model).__name__} does not; "
        "choose another model.name"
    )
