"""Frozen linear layers with an adapter, over plain and quantized weights, alone or in groups."""

from lorasb_kernels.nn.adapted import AdaptedLinear
from lorasb_kernels.nn.linear import LoRALinear, LoRASBLinear
from lorasb_kernels.nn.quantized import QuantizedLoRALinear, QuantizedLoRASBLinear
from lorasb_kernels.nn.shared_input import SharedInput, share_inputs

__all__ = [
    "AdaptedLinear",
    "LoRALinear",
    "LoRASBLinear",
    "QuantizedLoRALinear",
    "QuantizedLoRASBLinear",
    "SharedInput",
    "share_inputs",
]
