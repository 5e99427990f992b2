"""The quantized linear layers that run on a CPU, made by the real libraries.

Not run, as they need a GPU: torchao's int4 packed for its kernels, bitsandbytes' CUDA kernels.
"""

import bitsandbytes
import torch
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup


def _four_bit(quant_type, compress_statistics):
    def quantize(linear):
        options = {"quant_type": quant_type, "compress_statistics": compress_statistics}
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            **options,
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            linear.weight.detach().clone(), requires_grad=False, module=layer, **options
        )
        layer.bias = linear.bias
        return layer.to("cpu")  # quantizes

    return quantize


def _eight_bit(linear):
    layer = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def _torchao(config):
    def quantize(linear):
        own = nn.Linear(linear.in_features, linear.out_features, device="meta")
        own.weight, own.bias = nn.Parameter(linear.weight.detach().clone()), linear.bias
        holder = nn.Sequential(own)
        quantize_(holder, config)
        return holder[0]

    return quantize


QUANTIZERS = {
    "bitsandbytes nf4": _four_bit("nf4", compress_statistics=True),
    "bitsandbytes fp4": _four_bit("fp4", compress_statistics=False),
    "bitsandbytes int8": _eight_bit,
    "torchao Int8Tensor": _torchao(Int8WeightOnlyConfig()),
    "torchao Float8Tensor": _torchao(Float8WeightOnlyConfig()),
    "torchao IntxUnpackedToInt8Tensor torch.int4": _torchao(
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))
    ),
}


def quantize_model(model: nn.Module, kind: str) -> nn.Module:
    """Quantizes the linear layers of the blocks of a tiny Llama, in place."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and ".layers." in name:
            layer = QUANTIZERS[kind](module).train(module.training)
            model.set_submodule(name, layer.requires_grad_(False))
    return model
