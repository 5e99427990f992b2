"""Quantized linear layers: which they are, and their weight as a plain tensor.

bitsandbytes' NF4, FP4 and INT8 layers and torchao's weight-only formats. Neither library is
imported here, so neither needs to be installed.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lorasb_kernels.linear_layers import stores_transposed

_REPACKING = "support_avx512bf16_for_cpu"  # a flag of bitsandbytes' Linear4bit


def quantization_of(layer: nn.Module) -> str | None:
    """How the frozen weight of a linear layer, adapted or not, is quantized.

    Returns:
        `"bitsandbytes nf4"`, `"bitsandbytes int8"`, `"torchao Float8Tensor"` and the like; None
        for a plain weight.
    """
    layer = _frozen(layer)
    if (bitsandbytes := sys.modules.get("bitsandbytes")) is not None:
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            return f"bitsandbytes {layer.weight.quant_type}"
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            return "bitsandbytes int8"
    if type(layer) is nn.Linear and _is_torchao(layer.weight):
        width = getattr(layer.weight, "target_dtype", None)
        return f"torchao {type(layer.weight).__name__}" + (f" {width}" if width else "")
    return None


def check_quantized(name: str, layer: nn.Linear) -> None:
    """Refuses a quantized layer that cannot be the base of an adapter.

    Raises:
        TypeError: a weight that is not quantized yet, or was repacked for inference; a format
            that also quantizes activations, or that cannot be dequantized.
    """
    weight = layer.weight
    if _is_torchao(weight):
        for attribute in ("act_quant_kwargs", "activation_quantization", "act_pre_scale"):
            if getattr(weight, attribute, None) is not None:
                raise TypeError(
                    f"{name}.weight is a torchao {type(weight).__name__} with {attribute}, which "
                    "changes the layer's input; expected a weight-only format"
                )
        if type(weight).dequantize is torch.Tensor.dequantize:
            raise TypeError(
                f"{name}.weight is a torchao {type(weight).__name__}, which torchao can neither "
                "dequantize nor differentiate; expected Int8WeightOnlyConfig, "
                "Float8WeightOnlyConfig or IntxWeightOnlyConfig"
            )
    elif hasattr(layer, "compute_dtype"):
        state = weight.quant_state
        if state is None:
            raise TypeError(
                f"{name} is a bitsandbytes layer that is not quantized yet; expected it to have "
                "been moved to its device"
            )
        if getattr(state, "packing_format_for_cpu", False):
            raise TypeError(
                f"{name} was repacked by bitsandbytes for inference on the CPU, which cannot be "
                "undone exactly; expected the model freshly loaded, or in train() until now"
            )
    elif layer.state.has_fp16_weights:
        raise TypeError(
            f"{name} is a bitsandbytes Linear8bitLt with has_fp16_weights=True, whose weight is "
            "not quantized; expected has_fp16_weights=False"
        )


def prevent_repacking(layer: nn.Module) -> None:
    """Keeps a bitsandbytes 4-bit layer in the format that can be dequantized.

    On CPUs with AVX512-BF16 its first forward pass in eval mode would repack the weight for
    inference, round its scales to bf16, and have no gradient from then on.
    """
    if hasattr(layer, _REPACKING):
        setattr(layer, _REPACKING, False)


@contextmanager
def repacking_prevented(model: nn.Module) -> Iterator[None]:
    """`prevent_repacking` for every layer of `model`, while the context is open."""
    before = [(m, getattr(m, _REPACKING)) for m in model.modules() if hasattr(m, _REPACKING)]
    try:
        for layer, _ in before:
            prevent_repacking(layer)
        yield
    finally:
        for layer, value in before:
            setattr(layer, _REPACKING, value)


def weight_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype of `dense_weight(layer)`; fp16 for INT8, which does not store the model's dtype."""
    quantization, weight = quantization_of(layer), _frozen(layer).weight
    if quantization == "bitsandbytes int8":
        return torch.float16
    if quantization is not None and not _is_torchao(weight) and weight.quant_state is not None:
        return weight.quant_state.dtype
    return weight.dtype


@torch.no_grad()
def dense_weight(layer: nn.Module) -> torch.Tensor:
    """W [m, n] of a linear layer, adapted or not, as a plain tensor.

    The weight itself (a view of it where it is stored transposed) if it is not quantized; otherwise
    dequantized by the library that made it.
    """
    quantization, layer = quantization_of(layer), _frozen(layer)
    weight = layer.weight.detach()
    if quantization is None:
        return weight.T if stores_transposed(layer) else weight
    if _is_torchao(weight):
        return weight.dequantize()
    import bitsandbytes

    if quantization != "bitsandbytes int8":
        return bitsandbytes.functional.dequantize_4bit(weight, layer.weight.quant_state)
    # Before its first forward pass the layer keeps codes and scales in the weight.
    holder = layer.state if layer.weight.CB is None else layer.weight
    dense = bitsandbytes.functional.int8_vectorwise_dequant(holder.CB, holder.SCB)
    return dense.to(weight_dtype(layer))


def frozen_bytes(layer: nn.Module) -> int:
    """Bytes of the frozen weight and bias of a linear layer, adapted or not, scales included."""
    layer = _frozen(layer)
    if quantization_of(layer) is None:
        return sum(t.nbytes for t in (layer.weight, layer.bias) if t is not None)
    return sum(map(_nbytes, layer.state_dict().values()))


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model; those of packed quantized weights count as m·n."""
    packed = {
        id(module.weight): module.out_features * module.in_features
        for module in model.modules()
        if isinstance(module, nn.Linear) and quantization_of(module) is not None
    }
    return sum(packed.get(id(p), p.numel()) for p in model.parameters())


def _frozen(layer: nn.Module) -> nn.Module:
    """An adapted layer keeps the quantized one it was made from as `base_layer`."""
    return getattr(layer, "base_layer", layer)


def _is_torchao(weight: torch.Tensor) -> bool:
    utils = sys.modules.get("torchao.utils")
    return utils is not None and isinstance(weight, utils.TorchAOBaseTensor)


def _nbytes(tensor: torch.Tensor) -> int:
    if not _is_torchao(tensor):
        return tensor.nbytes
    return sum(getattr(tensor, name).nbytes for name in tensor.__tensor_flatten__()[0])


__all__ = [
    "check_quantized",
    "dense_weight",
    "frozen_bytes",
    "parameter_count",
    "prevent_repacking",
    "quantization_of",
    "repacking_prevented",
    "weight_dtype",
]
