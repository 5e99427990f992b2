"""Adapted layers as a configuration describes them, and putting them into a model."""

from torch import nn

from lorasb_kernels.config import LoRASBConfig
from lorasb_kernels.nn.adapted import AdaptedLinear
from lorasb_kernels.nn.linear import LoRALinear, LoRASBLinear
from lorasb_kernels.nn.quantized import QuantizedLoRALinear, QuantizedLoRASBLinear
from lorasb_kernels.nn.reached import watch_training
from lorasb_kernels.nn.shared_input import share_inputs
from lorasb_kernels.quantization import quantization_of


def new_layer(linear: nn.Module, config: LoRASBConfig) -> AdaptedLinear:
    """The adapted layer over `linear` that `config` describes; its factors are 0."""
    options = {
        "scaling": config.s,
        "dropout": config.dropout,
        "backend": config.backend,
        "init": config.init,
    }
    quantized = quantization_of(linear) is not None
    if not config.facts.has_core:
        lora = QuantizedLoRALinear if quantized else LoRALinear
        return lora.from_linear(linear, config.r, reset=False, **options)
    lora_sb = QuantizedLoRASBLinear if quantized else LoRASBLinear
    return lora_sb.from_linear(
        linear, config.r, reset=False, optimal_gradient=config.optimal_gradient, **options
    )


def install(
    model: nn.Module,
    layers: dict[str, AdaptedLinear],
    saved: dict[str, nn.Module],
    config: LoRASBConfig,
    skipped: dict[str, str] | None = None,
) -> None:
    """Puts the layers into the model and freezes everything else except the saved modules.

    Args:
        model: the plain model.
        layers: the adapted layers by name.
        saved: modules that are trained whole.
        config: becomes `model.lorasb_config`.
        skipped: why layers that `config` selects are not adapted; `model.lorasb_skipped`.
    """
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    model.requires_grad_(False)
    for layer in layers.values():
        for name in layer.trained:
            getattr(layer, name).requires_grad_(True)
    for module in saved.values():
        module.requires_grad_(True)
    if config.share_inputs:
        share_inputs(model)
    watch_training(layers)
    model.lorasb_config = config  # type: ignore[assignment]
    model.lorasb_skipped = skipped or {}  # type: ignore[assignment]


__all__ = ["install", "new_layer"]
