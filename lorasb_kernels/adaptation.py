"""Replaces the linear layers of a model by adapted ones, and back."""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lorasb_kernels.config import LoRASBConfig
from lorasb_kernels.init.estimation.api import listed
from lorasb_kernels.init.estimation.options import EstimationOptions
from lorasb_kernels.init.estimation.usage import unusable_layers
from lorasb_kernels.init.methods import initialize
from lorasb_kernels.io.pretrained import save_adapter_only, save_whole_again
from lorasb_kernels.nn.install import install, new_layer
from lorasb_kernels.nn.quantized import QuantizedLoRALinear, QuantizedLoRASBLinear
from lorasb_kernels.quantization import quantization_of
from lorasb_kernels.targets import (
    ALL_LINEAR,
    CoverageWarning,
    Selection,
    adapted_layers,
    coverage_of,
    find_saved_modules,
    refuse_adapted,
    refuse_meta,
    select_layers,
)

DEFAULTS = EstimationOptions()


def adapt(
    model: nn.Module,
    config: LoRASBConfig,
    batches: Iterable | None = None,
    *,
    learning_rate: float | None = None,
    estimation: EstimationOptions = DEFAULTS,
    progress: bool = True,
    strict: bool = False,
) -> nn.Module:
    """Adapts `model` in place: each target becomes a `LoRASBLinear` over the same weight.

    With an `init` that trains A and B it becomes a `LoRALinear`. Afterwards only `lora_R` (or
    `lora_A` and `lora_B`) of the targets and the parameters of `modules_to_save` require grad. If
    anything raises, the model is unchanged.

    `"all-linear"` leaves out the layers that cannot be adapted, and a `CoverageWarning` says which,
    why, and what share of the model's matrix weights is adapted. The model is run once, on the
    first of `batches` or a tiny random one, to find layers whose adapters would have no effect (see
    `init.estimation.usage`).

    Args:
        model: the pretrained model.
        config: what to adapt and how.
        batches: for inits that start from gradients (`"lora-sb"`, `"lora-one"` and LoRA-SB's
            ablations): the samples whose gradients estimate the first update, as batches the
            model takes (`model(**batch)` with labels), or whatever `estimation.loss_fn` takes.
            LoRA-SB's default is 1/1000 of the training set.
        learning_rate: η of `ΔW = −η·sign(gradient)`: the learning rate of the first
            optimizer step. `"lora-one"` has none.
        estimation: how those gradients are estimated: the loss, the strategy and its memory.
        progress: show a progress bar.
        strict: raise for a layer of `"all-linear"` that cannot be adapted. One that is named in
            `config.target_modules` always raises.

    Returns:
        `model`.

    Raises:
        TypeError: an argument of the wrong type, or a target that does not compute what
            `nn.Linear` does.
        ValueError: nothing matched, a model that is adapted already, shared or meta weights,
            r > min(m, n), a target that the model does not call or runs with gradients off,
            missing batches or learning rate; whatever update estimation raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if not isinstance(config, LoRASBConfig):
        raise TypeError(f"config is a {type(config).__name__}; expected a LoRASBConfig")
    refuse_adapted(model)
    selection = select_layers(
        model, config.target_modules, config.modules_to_save, config.r, strict
    )
    refuse_meta(selection.layers)
    saved = find_saved_modules(model, config.modules_to_save)
    _check_estimation(config, batches, learning_rate, estimation)
    if config.facts.needs_gradients:
        batches = listed(batches, next(iter(selection.layers.values())).weight.device)
    batch = None if batches is None else next(iter(batches), None)
    targets, skipped = _usable(model, selection, config, batch, estimation, strict)
    layers = {name: new_layer(linear, config) for name, linear in targets.items()}
    adapters = initialize(model, targets, config, batches, learning_rate, estimation, progress)
    for name, adapter in adapters:
        layers[name].set_adapter(adapter.lora_A, adapter.lora_R, adapter.lora_B)
        layers[name].init_report = adapter.report
    install(model, layers, saved, config, skipped)
    save_adapter_only(model)
    return model


def _usable(
    model: nn.Module,
    selection: Selection,
    config: LoRASBConfig,
    batch: Any,
    estimation: EstimationOptions,
    strict: bool,
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers on which adapters have an effect, and why the others are left out; warns."""
    unusable = unusable_layers(model, selection.layers, batch, estimation.loss_fn)
    targets = {name: m for name, m in selection.layers.items() if name not in unusable}
    named = config.target_modules != ALL_LINEAR
    if unusable and (named or strict or not targets):
        name, reason = next(iter(unusable.items()))
        raise ValueError(
            f"{name} would have an adapter without effect: {reason}; expected target_modules "
            "without it"
        )
    skipped = selection.skipped | unusable
    coverage = coverage_of(model, targets, skipped, config.modules_to_save)
    if not named and (skipped or coverage.leaves_out_experts):
        warnings.warn(str(coverage), CoverageWarning, stacklevel=3)
    return targets, skipped


def _check_estimation(config: LoRASBConfig, batches, learning_rate, estimation) -> None:
    init, facts = config.init, config.facts
    if not isinstance(estimation, EstimationOptions):
        raise TypeError(f"estimation is a {type(estimation).__name__}; expected EstimationOptions")
    if batches is None and facts.needs_gradients:
        raise ValueError(f"batches is None; expected batches, as init={init!r} needs gradients")
    if not facts.needs_eta:
        return
    if isinstance(learning_rate, bool) or not isinstance(learning_rate, (int, float)):
        raise TypeError(
            f"learning_rate is {learning_rate!r}; expected a number, as init={init!r} needs η"
        )
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate is {learning_rate}; expected a finite number > 0")


@torch.no_grad()
def merge_and_unload(
    model: nn.Module,
    safe_merge: bool = False,
    dequantize: torch.dtype | None = None,
    skip_unreached: bool = False,
) -> nn.Module:
    """Merges every adapter and puts plain `nn.Linear` layers back, in place.

    Args:
        model: an adapted model.
        safe_merge: raise, with no weight changed, if a merged weight would not be finite.
        dequantize: dtype of the plain layers that replace quantized ones; they take several times
            the memory. `lorasb merge` into the model before quantization loses less precision.
        skip_unreached: give layers that training never reached their frozen weight back, without
            the adapter.

    Returns:
        `model`, without adapters; all of it is still frozen except `modules_to_save`.

    Raises:
        ValueError: the model holds no adapter, `safe_merge` found a non-finite weight, a
            quantized layer without `dequantize`, or layers that training never reached without
            `skip_unreached`: the model does not call them, or reads their weight past them, and
            merging would change what it computes.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model holds no adapter; expected an adapted model")
    quantized = {name: kind for name in layers if (kind := quantization_of(layers[name]))}
    if quantized and dequantize is None:
        name, kind = next(iter(quantized.items()))
        raise ValueError(
            f"{name} is quantized ({kind}); expected dequantize, the dtype of the plain layer to "
            "merge into, or the adapter merged into the model it was quantized from"
        )
    unreached = {name for name, layer in layers.items() if layer.without_effect()}
    if unreached and not skip_unreached:
        raise ValueError(
            f"training never reached {len(unreached)} of {len(layers)} adapted layers, such as "
            f"{min(unreached)}: the model does not call them, or reads their weight past them, so "
            "that merging would change the model; expected skip_unreached=True to leave their "
            "weights as they are"
        )
    if safe_merge:
        for name, layer in layers.items():
            if not (layer.merged or layer.get_delta_weight().isfinite().all()):
                raise ValueError(f"the adapter of {name} is not finite; nothing was merged")
    for name, layer in layers.items():
        if layer.shared_input is not None:
            layer.shared_input.detach()
        if name in unreached:
            model.set_submodule(name, layer.without_adapter())
            continue
        if isinstance(layer, QuantizedLoRALinear | QuantizedLoRASBLinear):
            layer.merge(safe_merge, dequantize=dequantize)
        else:
            layer.merge(safe_merge)
        model.set_submodule(name, layer.to_linear())
    if quantized and not any(map(quantization_of, model.modules())):
        _forget_quantizer(model)
    del model.lorasb_config, model.lorasb_skipped
    save_whole_again(model)
    return model


def _forget_quantizer(model: nn.Module) -> None:
    """Removes the mark that makes transformers save the model as a quantized one."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


__all__ = ["adapt", "merge_and_unload"]
