"""The adapters that a model holds."""

from typing import cast

from torch import nn

from lorasb_kernels.config import LoRASBConfig
from lorasb_kernels.nn.adapted import AdaptedLinear


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers of `model` by name, in module order."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)
    }


def layers_of(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers of a model that `adapt` returned; ValueError for a plain model."""
    layers = adapted_layers(model)
    if not layers or not hasattr(model, "lorasb_config"):
        raise ValueError("the model holds no adapter; expected a model that adapt() returned")
    return layers


def config_of(model: nn.Module) -> LoRASBConfig:
    """The configuration that `adapt` left in `model`."""
    return cast(LoRASBConfig, model.lorasb_config)


def refuse_adapted(model: nn.Module) -> None:
    """Raises ValueError if `model` holds an adapter."""
    already = next(iter(adapted_layers(model)), None)
    if already is not None:
        raise ValueError(f"the model is adapted already ({already}); expected a plain model")


__all__ = ["adapted_layers", "config_of", "layers_of", "refuse_adapted"]
